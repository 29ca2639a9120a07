"""Grids of images as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vqvae_lightning.networks.autoencoder import to_uint8
from vqvae_lightning.results import replacing


def pairs(originals: Tensor, reconstructions: Tensor, columns: int = 10) -> Tensor:
    """Rows of originals, each with its reconstructions in the row below.

    Args:
        originals: (N, C, H, W) in [-1, 1].
        reconstructions: Likewise.
        columns: Pairs per row.

    Returns:
        (3, height, width) uint8.
    """
    rows = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    return grid([half for row in rows for half in row], columns)


def grid(rows: Sequence[Tensor] | Tensor, columns: int = 10) -> Tensor:
    """Images in [-1, 1] as one picture (3, height, width) uint8; small ones are enlarged."""
    images = rows if isinstance(rows, Tensor) else torch.cat(list(rows))
    levels = to_uint8(images.detach().cpu())
    factor = max(1, round(64 / levels.shape[-1]))
    levels = levels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    picture: Tensor = make_grid(levels, nrow=columns, padding=2, pad_value=255)
    return picture


def save_png(picture: Tensor, path: Path) -> None:
    """Replace `path` by a PNG of (3, H, W) uint8, so that no half picture is ever seen."""
    with replacing(path) as partial:
        image = Image.fromarray(picture.movedim(0, -1).numpy())
        image.save(partial, format="PNG", optimize=True)
