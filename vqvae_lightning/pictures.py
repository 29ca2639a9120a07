"""Grids of images, as tensors and as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vqvae_lightning.files import replace_file
from vqvae_lightning.pixels import to_uint8


def arrange_pairs(originals: Tensor, reconstructions: Tensor, columns: int = 10) -> Tensor:
    """Arrange originals in rows, each row above the row of its reconstructions.

    Args:
        originals: (N, C, H, W) uint8.
        reconstructions: (N, C, H, W) uint8.
        columns: Pairs per row.

    Returns:
        (3, height, width) uint8.
    """
    rows = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    return arrange_grid([half for row in rows for half in row], columns)


def arrange_grid(rows: Sequence[Tensor] | Tensor, columns: int = 10) -> Tensor:
    """Arrange images (N, C, H, W) uint8 in one picture (3, height, width) uint8.

    Small images are enlarged to about 64 pixels.
    """
    images = (rows if isinstance(rows, Tensor) else torch.cat(list(rows))).cpu()
    factor = max(1, round(64 / images.shape[-1]))
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    picture: Tensor = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return picture


def draw_code_maps(images: Tensor, codes: Tensor, columns: int = 10) -> Tensor:
    """Arrange images in rows, each row above the row of its codes, with one colour per code.

    Args:
        images: (N, C, H, W) uint8.
        codes: (N, h, w), or (N, h, w, Q), of which the first code of each position is shown.
        columns: Images per row.

    Returns:
        (3, height, width) uint8.
    """
    chosen = codes if codes.ndim == 3 else codes[..., 0]
    # Hues a golden section apart, so that codes with close numbers differ in colour.
    hue = chosen.cpu().double() * 0.6180339887 % 1
    value = 0.55 + 0.45 * (chosen.cpu().double() * 0.7548776662 % 1)
    colours = hsv_to_rgb(torch.stack([hue, torch.full_like(hue, 0.65), value], -1).numpy())
    tiles = to_uint8(torch.from_numpy(colours).movedim(-1, 1).float() * 2 - 1)
    enlarged = F.interpolate(tiles, images.shape[-2:], mode="nearest")
    return arrange_pairs(images.cpu().expand(-1, 3, -1, -1), enlarged, columns)


def save_png(picture: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 to `path` as a PNG; a reader never sees a partly written file."""
    with replace_file(path) as partial:
        image = Image.fromarray(picture.movedim(0, -1).numpy())
        image.save(partial, format="PNG", optimize=True)
