"""Which device a command without a Trainer runs on."""

import torch

from vqvae_lightning.errors import InputError


def device_for(accelerator: str) -> torch.device:
    """The device that `accelerator` (cpu, gpu or cuda) stands for here.

    Raises:
        InputError: If it is unknown, or a GPU is asked for and there is none.
    """
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise InputError(f"accelerator={accelerator} must be one of cpu, gpu, cuda.")
    found = torch.cuda.is_available()
    if accelerator != "cpu" and not found:
        raise InputError(
            f"accelerator={accelerator}: this machine has no CUDA device; use accelerator=cpu."
        )
    return torch.device("cpu" if accelerator == "cpu" else "cuda")
