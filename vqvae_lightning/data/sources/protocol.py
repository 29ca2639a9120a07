"""What a source of images is: the protocol `Source`, and the splits that it returns."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.uint8]]
Allocate = Callable[[str, tuple[int, ...]], Array]
"""Returns an array for the images of a split, given the split's name and the array's shape."""


class StorageError(OSError):
    """An `Allocate` cannot provide the array."""


def allocate_in_memory(split: str, shape: tuple[int, ...]) -> Array:
    """An `Allocate` whose arrays belong to this process alone."""
    return np.empty(shape, np.uint8)


class Stamp(NamedTuple):
    """Identifies one state of a source's files and one way of reading them."""

    place: Path
    """Folder of the files."""
    name: str
    """Readable name of the source."""
    view: str
    """Options that change the images."""
    files: list[tuple[str, int, int]]
    """Path relative to `place`, size in bytes and modification time in nanoseconds."""


def stamp_files(place: Path, name: str, view: str, paths: list[Path]) -> Stamp:
    """The stamp of the files `paths`, which are stored below `place`."""
    status = [(path, path.stat()) for path in paths]
    files = [(str(p.relative_to(place)), s.st_size, s.st_mtime_ns) for p, s in status]
    return Stamp(place, name, view, files)


class Split(NamedTuple):
    """Images of one split."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor | None
    """(N,) int64, or None without labels."""


class Splits(NamedTuple):
    """A whole data set; `val` and `test` are None if it defines no such split."""

    train: Split
    val: Split | None
    test: Split | None
    class_names: list[str]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any pixel, label or class name."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in (self.train, self.val, self.test):
            for tensor in split or ():
                if tensor is not None:
                    digest.update(str(tuple(tensor.shape)).encode())
                    digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Source(Protocol):
    """A data set that can be downloaded and read.

    The images of a source that also has a method `stamp` are read once, written to a file and
    memory-mapped from it; see `data.mapped`. Without `stamp`, `load` may omit `allocate`.
    """

    def prepare(self) -> None:
        """Download missing files; called by one process per node."""

    def load(self, allocate: Allocate = allocate_in_memory) -> Splits:
        """Read all splits into arrays from `allocate`.

        Raises:
            InputError: If something is missing or malformed; the message says how to fix it.
        """
