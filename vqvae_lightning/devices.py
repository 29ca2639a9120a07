"""What the package needs to know of devices: which to run on, their memory, their precision."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqvae_lightning.errors import InputError, Key, check_positive


def device_for(accelerator: str) -> torch.device:
    """The device that `accelerator` (cpu, gpu or cuda) stands for here.

    Raises:
        InputError: If it is unknown, or a GPU is asked for and there is none.
    """
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise InputError(Key("accelerator"), f"={accelerator} must be one of cpu, gpu, cuda.")
    found = torch.cuda.is_available()
    if accelerator != "cpu" and not found:
        said = f"={accelerator}: this machine has no CUDA device; use "
        raise InputError(Key("accelerator"), said, Key("accelerator"), "=cpu.")
    return torch.device("cpu" if accelerator == "cpu" else "cuda")


def devices_for(accelerator: str, count: int | str) -> list[torch.device]:
    """`count` devices to share work between; on a CPU that many processes.

    Args:
        accelerator: As `device_for`.
        count: How many; `auto` for all GPUs, or one process on a CPU.

    Raises:
        InputError: As `device_for`, and if there are fewer GPUs than asked for.
    """
    device = device_for(accelerator)
    if count == "auto":
        count = torch.cuda.device_count() if device.type == "cuda" else 1
    count = check_positive("devices", count)
    if device.type == "cpu":
        return [device] * count
    present = torch.cuda.device_count()
    if count > present:
        said = f"={count} must be at most {present}, the GPUs of this machine."
        raise InputError(Key("devices"), said)
    return [torch.device("cuda", number) for number in range(count)]


def available_memory() -> int:
    """Bytes that Linux could give to a new process; elsewhere 16 GiB."""
    found = Path("/proc/meminfo")
    for line in found.read_text().splitlines() if found.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**34


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the CPU on `device`, without waiting for what a GPU still has to do."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, the copy may wait
    return tensor.to(device, non_blocking=True)


def reads_late(device: torch.device) -> bool:
    """Whether a number is better read a step after it was computed: a GPU works behind the CPU."""
    return device.type != "cpu"


class Reading:
    """Numbers of a tensor, on their way to the CPU.

    `tensor.tolist()` waits until a GPU has done all that was given to it; this waits only for what
    was given before the reading began.

    Args:
        values: (N,) numbers that nothing changes in place.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().to("cpu", non_blocking=True)  # pinned, from a GPU
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def numbers(self) -> list[float]:
        """The values, as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values.tolist()]


_exact = threading.Lock()
_users = 0  # blocks of `exact_products` that have begun and not ended, in all threads
_given: tuple[str, ...] = ()  # the settings before the first of them


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, whatever is set outside.

    `torch.set_float32_matmul_precision` and others let a GPU round the factors to TF32, and some
    CPUs to bfloat16. The settings are the process's: threads share the block, and the last to leave
    it restores them. Products in other threads are exact meanwhile, which costs them time only.
    """
    global _given, _users

    # Not `allow_tf32`, which raises after a program has used this newer interface. Libraries read
    # the precision from here, however it was set.
    onednn: Any = torch.backends.mkldnn
    settings = torch.backends.cuda.matmul, onednn.matmul
    with _exact:
        _users += 1
        if _users == 1:
            _given = tuple(part.fp32_precision for part in settings)
            _set_precisions(settings, ("ieee",) * len(settings))
    try:
        yield
    finally:
        with _exact:
            _users -= 1
            if _users == 0:
                _set_precisions(settings, _given)


def _set_precisions(settings: tuple[Any, ...], values: tuple[str, ...]) -> None:
    for part, value in zip(settings, values, strict=True):
        part.fp32_precision = value
