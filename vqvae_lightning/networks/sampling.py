"""Draw codes from a PixelCNN: its own layers, run one row and one code at a time."""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.errors import InputError, check_positive, check_range
from vqvae_lightning.networks.pixelcnn import GatedLayer, PixelCNN, gate


@torch.no_grad()
def sample(
    prior: PixelCNN,
    shape: tuple[int, int, int],
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw codes in raster order.

    The vertical stack runs once per row and the horizontal one once per code, so that all positions
    together cost about one forward pass. One uniform number per code is drawn for all images before
    the first batch: an image depends on the generator and on its own place, not on the batch it is
    drawn in.

    Args:
        prior: In evaluation mode.
        shape: Number of images, rows and columns.
        labels: (number of images,) int64 for a conditional prior.
        temperature: Divides the logits; 0 takes the likeliest code.
        top_k: Draw among the `top_k` likeliest codes only; None or at least K for all.
        generator: CPU generator of the uniform numbers; None for torch's own.
        batch_size: Images drawn together.
        on_batch: Called with the number of images finished, after each batch.

    Returns:
        (number of images, rows, columns) int64 on the prior's device.

    Raises:
        InputError: If the prior is in training mode (its dropout would change the samples), labels
            do not fit, or an option is outside its range.
    """
    if prior.training:
        raise InputError("sample() needs prior.eval(): dropout would change the samples.")
    prior.check_labels(labels)
    count, height, width = shape
    check_range("temperature", temperature, 0)
    check_positive("batch_size", batch_size)
    keep = (
        prior.num_codes if top_k is None else min(check_positive("top_k", top_k), prior.num_codes)
    )
    device = prior.embedding.weight.device
    if labels is not None:
        if len(labels) != count:
            raise InputError(f"{len(labels)} labels for {count} images: give one each.")
        labels = labels.to(device)
    uniform = torch.rand(count, height, width, generator=generator, dtype=torch.float64).to(device)
    drawn = torch.empty(shape, dtype=torch.int64, device=device)
    for start in range(0, count, batch_size):
        part = slice(start, min(start + batch_size, count))
        batch_labels = None if labels is None else labels[part]
        _draw(prior, drawn[part], uniform[part], batch_labels, temperature, keep)
        if on_batch is not None:
            on_batch(len(drawn[part]))
    return drawn


def choose(logits: Tensor, uniform: Tensor, temperature: float, keep: int) -> Tensor:
    """One code per row by inverting the distribution function at `uniform`.

    Args:
        logits: (B, K).
        uniform: (B,) in [0, 1).
        temperature: At least 0; 0 takes the likeliest code.
        keep: Number of likeliest codes to draw among.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(1)
    scaled = logits.double() / temperature
    if keep < scaled.shape[1]:
        best, where = scaled.topk(keep, dim=1)
        scaled = torch.full_like(scaled, -math.inf).scatter_(1, where, best)
    cumulative = scaled.softmax(1).cumsum(1)
    # Scaled by the last sum, so that rounding never leaves a gap above it in which no code is
    # found.
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_max(logits.shape[1] - 1)


def _draw(
    prior: PixelCNN,
    codes: Tensor,
    uniform: Tensor,
    labels: Tensor | None,
    temperature: float,
    keep: int,
) -> None:
    """Fill `codes` (B, H, W) in place."""
    batch, height, width = codes.shape
    layers = [cast(GatedLayer, layer) for layer in prior.layers]
    stacks = [_Stack(layer, batch, height, width, labels) for layer in layers]
    for row in range(height):
        for number, stack in enumerate(stacks):
            above = stack.vertical_row(row)
            if number + 1 < len(stacks):
                stacks[number + 1].put_row(row, above)
        for column in range(width):
            total: Tensor | float = 0.0
            horizontal = None
            for stack in stacks:
                horizontal, skip = stack.horizontal_step(column, horizontal)
                total = total + skip
            logits = prior.head(total)[..., 0, 0]
            chosen = choose(logits, uniform[:, row, column], temperature, keep)
            codes[:, row, column] = chosen
            stacks[0].left[..., stacks[0].reach + column] = prior.embedding(chosen)[:, :, None]
        stacks[0].put_row(row, stacks[0].left[..., stacks[0].reach :])


class _Stack:
    """What one layer remembers while a batch is drawn: its inputs so far, padded as in `forward`.

    Attributes:
        above: (B, C, reach + H, W + 2 * reach) inputs of the vertical stack.
        left: (B, C, 1, reach + W) inputs of the horizontal stack in the current row.
    """

    def __init__(
        self, layer: GatedLayer, batch: int, height: int, width: int, labels: Tensor | None
    ) -> None:
        weight = layer.residual.weight
        self.layer = layer
        self.reach = layer.reach
        self.above = weight.new_zeros(
            batch, len(weight), layer.reach + height, width + 2 * layer.reach
        )
        self.left = weight.new_zeros(batch, len(weight), 1, layer.reach + width)
        self.for_vertical, self.for_horizontal = layer.shifts(labels)

    def put_row(self, row: int, values: Tensor) -> None:
        """Store the vertical stack's input (B, C, 1, W) of a finished row."""
        self.above[:, :, self.reach + row, self.reach : self.reach + values.shape[-1]] = values[
            :, :, 0
        ]

    def vertical_row(self, row: int) -> Tensor:
        """The vertical stack's output (B, C, 1, W) in this row; readies the horizontal one."""
        layer = self.layer
        window = self.above[:, :, row : row + layer.extent]
        vertical = gate(layer.vertical(window) + self.for_vertical)
        self.from_above = layer.vertical_to_horizontal(vertical) + self.for_horizontal
        return vertical

    def horizontal_step(self, column: int, entering: Tensor | None) -> tuple[Tensor, Tensor]:
        """The horizontal stack's output and the skip output (B, C, 1, 1) at this column.

        `entering` is the layer's input there; the first layer has none, since its window ends
        before.
        """
        layer = self.layer
        if entering is not None:
            self.left[..., self.reach + column] = entering[..., 0]
        window = self.left[..., column : column + layer.extent]
        gated = gate(layer.horizontal(window) + self.from_above[..., column : column + 1])
        residual = layer.residual(gated)
        return residual if entering is None else entering + residual, layer.skip(gated)


def score(prior: PixelCNN, codes: Tensor, labels: Tensor | None = None) -> Tensor:
    """Natural log-likelihood log p(codes | label) of each image, (B,) float32, in one forward pass.

    Args:
        prior: In evaluation mode.
        codes: (B, H, W) int64.
        labels: (B,) int64 for a conditional prior.
    """
    logits = prior(codes, labels)
    return -F.cross_entropy(logits.float(), codes, reduction="none").sum((1, 2))
