"""Devices: choosing them, measuring memory, transfers and exact matrix products."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae_lightning.errors import InputError, Key, check_positive


def choose_device(accelerator: str) -> torch.device:
    """Return the device for `accelerator` (cpu, gpu or cuda).

    Raises:
        InputError: If it is unknown, or a GPU is requested and there is none.
    """
    if accelerator not in ("cpu", "gpu", "cuda"):
        raise InputError(Key("accelerator"), f"={accelerator} must be one of cpu, gpu, cuda.")
    found = torch.cuda.is_available()
    if accelerator != "cpu" and not found:
        said = f"={accelerator}: this machine has no CUDA device; use "
        raise InputError(Key("accelerator"), said, Key("accelerator"), "=cpu.")
    return torch.device("cpu" if accelerator == "cpu" else "cuda")


def choose_devices(accelerator: str, count: int | str) -> list[torch.device]:
    """Return `count` devices to divide work between, on a CPU the CPU `count` times.

    Args:
        accelerator: One of cpu, gpu and cuda.
        count: Number of devices, or `auto` for all GPUs or one process on a CPU.

    Raises:
        InputError: If the accelerator is unknown, or there are fewer GPUs than requested.
    """
    device = choose_device(accelerator)
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


def measure_available_memory(root: Path = Path("/")) -> int:
    """Measure the bytes that Linux could give to a new process, elsewhere 16 GiB.

    The result is the minimum of the machine's available memory and what remains under the limits of
    this process's control groups, which a container or a scheduler sets.

    Args:
        root: Folder that contains `proc` and `sys`.
    """
    rooms = [_read_numbers(root / "proc/meminfo").get("MemAvailable:", 2**34 // 1024) * 1024]
    for groups, files in _list_groups(root):
        rooms += [room for group in groups if (room := _measure_group(group, files)) is not None]
    return min(rooms)


class _GroupFiles(NamedTuple):
    """Names of a control group's files, and of the entry for its cache in `memory.stat`."""

    limit: str
    used: str
    cache: str


_GROUPS_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUPS_V2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def _list_groups(root: Path) -> Iterator[tuple[list[Path], _GroupFiles]]:
    """Yield the folders of this process's control groups, innermost first, for each version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            # Version 2 is mounted at `unified` where both versions are in use.
            mounts, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _GROUPS_V2
        elif "memory" in controllers.split(","):
            mounts, files = ["sys/fs/cgroup/memory"], _GROUPS_V1
        else:
            continue
        # In a container, the path may be that of the host while the mount starts further down.
        # Folders that do not exist have no limit to read.
        inmost = Path(path.lstrip("/"))
        for mount in mounts:
            yield [root / mount / group for group in (inmost, *inmost.parents)], files


def _measure_group(group: Path, files: _GroupFiles) -> int | None:
    """Measure the bytes that the group may still allocate, None without a limit."""
    try:
        limit = int((group / files.limit).read_text())  # "max" in version 2: no limit
        used = int((group / files.used).read_text())
    except (OSError, ValueError):
        return None
    # Cached files count as used, but the kernel frees inactive ones when memory is needed.
    reclaimable = _read_numbers(group / "memory.stat").get(files.cache, 0)
    return max(0, limit - used + reclaimable)


def _read_numbers(path: Path) -> dict[str, int]:
    """Read a file of names and numbers, an empty mapping if there is no such file."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU `tensor` to `device` without waiting for the GPU's queued work."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory may wait
    return tensor.to(device, non_blocking=True)


def reads_late(device: torch.device) -> bool:
    """Return whether to read a number one step late, because a GPU runs behind the CPU."""
    return device.type != "cpu"


class Reading:
    """Numbers of a tensor on their way to the CPU.

    `tensor.tolist()` waits for all work queued on a GPU. `wait` waits only for the work that was
    queued before this object was created.

    Args:
        values: Numbers (N,) that nothing changes in place.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().to("cpu", non_blocking=True)  # pinned if it comes from a GPU
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """Wait for the values and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values.tolist()]


_exact = threading.Lock()
_users = 0  # open blocks of `exact_products` in all threads
_given: tuple[str, ...] = ()  # the settings before the first block opened


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, whatever the settings outside.

    `torch.set_float32_matmul_precision` and similar settings let a GPU round the factors to TF32,
    and some CPUs to bfloat16. The settings belong to the process, so the last thread to leave its
    block restores them. Meanwhile, products in other threads are exact too, which only costs time.
    """
    global _given, _users

    # `allow_tf32` raises once a program has used this newer interface. Here, libraries read the
    # precision whichever interface has set it.
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
