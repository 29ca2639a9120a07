"""Which device a command without a Trainer runs on."""

import torch

from vqvae_lightning.errors import InputError


def device_for(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu or gpu) stands for here.

    Raises:
        InputError: If it is unknown, or a GPU is asked for and there is none.
    """
    if accelerator not in ("auto", "cpu", "gpu"):
        raise InputError(f"accelerator={accelerator} must be one of auto, cpu, gpu.")
    found = torch.cuda.is_available()
    if accelerator == "gpu" and not found:
        raise InputError("accelerator=gpu: this machine has no CUDA device; use accelerator=cpu.")
    return torch.device("cuda" if found and accelerator != "cpu" else "cpu")
