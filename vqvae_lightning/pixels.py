"""Pixel values: uint8 in storage and in pictures, float32 in [-1, 1] in the networks."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images in about [-1, 1] as uint8, rounded and clipped: what is seen and what is scored."""
    levels = images.float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8, memory_format=torch.contiguous_format)


def from_uint8(images: Tensor) -> Tensor:
    """Images of 0 to 255 as float32 in [-1, 1], the networks' range."""
    return images.float().div(127.5).sub(1)
