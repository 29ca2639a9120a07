"""Which devices a command without a Trainer runs on, and how much memory there is."""

from pathlib import Path

import torch

from vqvae_lightning.errors import InputError, check_positive


def device_for(accelerator: str, prefix: str = "") -> torch.device:
    """The device that `accelerator` (cpu, gpu or cuda) stands for here; `prefix` is of its key.

    Raises:
        InputError: If it is unknown, or a GPU is asked for and there is none.
    """
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise InputError(f"{prefix}accelerator={accelerator} must be one of cpu, gpu, cuda.")
    found = torch.cuda.is_available()
    if accelerator != "cpu" and not found:
        raise InputError(
            f"{prefix}accelerator={accelerator}: this machine has no CUDA device; use "
            f"{prefix}accelerator=cpu."
        )
    return torch.device("cpu" if accelerator == "cpu" else "cuda")


def devices_for(accelerator: str, count: int | str, prefix: str = "") -> list[torch.device]:
    """`count` devices to share work between; on a CPU that many processes.

    Args:
        accelerator: As `device_for`.
        count: How many; `auto` for all GPUs, or one process on a CPU.
        prefix: Of the config's keys, for messages.

    Raises:
        InputError: As `device_for`, and if there are fewer GPUs than asked for.
    """
    device = device_for(accelerator, prefix)
    if count == "auto":
        count = torch.cuda.device_count() if device.type == "cuda" else 1
    count = check_positive(f"{prefix}devices", count)
    if device.type == "cpu":
        return [device] * count
    present = torch.cuda.device_count()
    if count > present:
        raise InputError(
            f"{prefix}devices={count} must be at most {present}, the GPUs of this machine."
        )
    return [torch.device("cuda", number) for number in range(count)]


def available_memory() -> int:
    """Bytes that Linux could give to a new process; elsewhere 16 GiB."""
    found = Path("/proc/meminfo")
    for line in found.read_text().splitlines() if found.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**34
