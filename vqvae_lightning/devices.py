"""What the package needs to know of devices: which to run on, their memory, their precision."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae_lightning.errors import InputError, Key, check_positive


def choose_device(accelerator: str) -> torch.device:
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


def choose_devices(accelerator: str, count: int | str) -> list[torch.device]:
    """`count` devices to share work between; on a CPU that many processes.

    Args:
        accelerator: As `choose_device`.
        count: How many; `auto` for all GPUs, or one process on a CPU.

    Raises:
        InputError: As `choose_device`, and if there are fewer GPUs than asked for.
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
    """Bytes that Linux could give to a new process; elsewhere 16 GiB.

    The smallest of what the machine has available and what the control groups of this process, as
    set by a container or a scheduler, leave of their limits.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    rooms = [_lines(root / "proc/meminfo").get("MemAvailable:", 2**34 // 1024) * 1024]
    for groups, files in _control_groups(root):
        rooms += [room for group in groups if (room := _room(group, files)) is not None]
    return min(rooms)


class _GroupFiles(NamedTuple):
    """Names of a control group's files, and of a count in the last of them."""

    limit: str
    used: str
    cache: str


_GROUPS_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUPS_V2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def _control_groups(root: Path) -> Iterator[tuple[list[Path], _GroupFiles]]:
    """Folders of the groups that this process is in, from the inmost to the root, by version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            # `unified` where both versions are mounted.
            mounts, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _GROUPS_V2
        elif "memory" in controllers.split(","):
            mounts, files = ["sys/fs/cgroup/memory"], _GROUPS_V1
        else:
            continue
        # In a container the path may be the host's and the mount begin within it: what is not
        # there has no limit to read.
        inmost = Path(path.lstrip("/"))
        for mount in mounts:
            yield [root / mount / group for group in (inmost, *inmost.parents)], files


def _room(group: Path, files: _GroupFiles) -> int | None:
    """Bytes that the group may still take; None without a limit."""
    try:
        limit = int((group / files.limit).read_text())  # "max" in version 2: no limit
        used = int((group / files.used).read_text())
    except (OSError, ValueError):
        return None
    # Files that were read long ago count as used, but make room for whoever needs it.
    reclaimable = _lines(group / "memory.stat").get(files.cache, 0)
    return max(0, limit - used + reclaimable)


def _lines(path: Path) -> dict[str, int]:
    """The numbers in a file of names and numbers; none if there is no such file."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


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

    def wait(self) -> list[float]:
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
