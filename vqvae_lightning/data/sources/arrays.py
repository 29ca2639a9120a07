"""Arrays of uint8 images: filling them block by block, and resizing."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vqvae_lightning.data.sources.protocol import Allocate, Array
from vqvae_lightning.errors import InputError, Key

BLOCK = 2**20  # bytes of images to process at a time where processing copies them


def fill_array(split: str, total: int, parts: Iterable[Tensor], allocate: Allocate) -> Tensor:
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
    """Number of images of a uint8 array (N, ...) in a block of `BLOCK` bytes; at least 1."""
    return max(1, BLOCK // math.prod(shape[1:]))


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


def describe_size(size: tuple[int, int] | None) -> str:
    """Name of a size, as used in names of files and folders."""
    return "whole" if size is None else f"{size[0]}x{size[1]}"


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
