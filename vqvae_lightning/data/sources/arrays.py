"""What every source of images returns: uint8 arrays, labels and a fingerprint."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vqvae_lightning.errors import InputError, Key

Array = np.ndarray[Any, np.dtype[np.uint8]]
Allocate = Callable[[str, tuple[int, ...]], Array]
"""Gives the array that the images of a split are read into, by the split's name and its shape."""
BLOCK = 2**20  # bytes of images that are handled at a time, where it makes copies


class StorageError(OSError):
    """An `Allocate` cannot give the array."""


def in_memory(split: str, shape: tuple[int, ...]) -> Array:
    """An `Allocate` of arrays that only this process has."""
    return np.empty(shape, np.uint8)


class Stamp(NamedTuple):
    """What tells one state of a source's files, and one way to read them, from all others."""

    place: Path
    """Folder of the files."""
    name: str
    """What people call the source."""
    view: str
    """Options that change the images."""
    files: list[tuple[str, int, int]]
    """Name within `place`, bytes and time of the last change in nanoseconds."""


class Split(NamedTuple):
    """Images of one split."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor | None
    """(N,) int64, or None where the set has none."""


class Splits(NamedTuple):
    """All of a data set; `val` and `test` are None where the set defines none."""

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
    """A data set that can be brought here and read."""

    def prepare(self) -> None:
        """Download what is missing; called by one process per node."""

    def load(self, allocate: Allocate = in_memory) -> Splits:
        """Read everything, into arrays from `allocate`.

        A source that has a method `stamp` besides is read once and then mapped from a file; see
        `data.mapped`. One that has none may leave `allocate` out.

        Raises:
            InputError: If something is missing or malformed, with what to do about it.
        """


def _filled(split: str, total: int, parts: Iterable[Tensor], allocate: Allocate) -> Tensor:
    """The images of `parts`, each (n, C, H, W) uint8, in one array (total, C, H, W)."""
    array: Array | None = None
    row = 0
    for part in parts:
        if array is None:
            array = allocate(split, (total, *part.shape[1:]))
        array[row : row + len(part)] = part.numpy()
        row += len(part)
    assert array is not None
    return torch.from_numpy(array)


def rows_per_block(shape: Sequence[int]) -> int:
    """Images of an array (N, ...) uint8 that a block of `BLOCK` bytes has."""
    return max(1, BLOCK // math.prod(shape[1:]))


def _stamp(place: Path, name: str, view: str, paths: list[Path]) -> Stamp:
    status = [(path, path.stat()) for path in paths]
    files = [(str(p.relative_to(place)), s.st_size, s.st_mtime_ns) for p, s in status]
    return Stamp(place, name, view, files)


def _view(size: tuple[int, int] | None) -> str:
    return "whole" if size is None else f"{size[0]}x{size[1]}"


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """`size` as (height, width).

    Raises:
        InputError: If it is neither None, a positive integer nor two of them.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(Key("size"), f"={size} must be a side or [height, width] in pixels.")
    return pair[0], pair[1]


def resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Scale uint8 images (N, C, H, W) to just cover `size`, then centre-crop them to it."""
    if size is None or tuple(images.shape[2:]) == size:
        return images
    scale = max(size[0] / images.shape[2], size[1] / images.shape[3])
    cover = [
        max(side, round(old * scale)) for side, old in zip(size, images.shape[2:], strict=True)
    ]
    parts = [transforms.resize(part, cover, antialias=True) for part in images.split(4096)]
    return torch.cat([transforms.center_crop(part, list(size)) for part in parts])
