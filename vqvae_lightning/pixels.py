"""Conversion of pixels: uint8 in storage and pictures, float32 in [-1, 1] in the networks."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in approximately [-1, 1] to uint8, by rounding and clipping."""
    levels = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8, memory_format=torch.contiguous_format)


def from_uint8(images: Tensor) -> Tensor:
    """Convert images of 0 to 255 to float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)
