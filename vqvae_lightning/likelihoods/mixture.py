"""Mixture of discretised logistics per pixel, with dependent colour channels."""

import torch
from torch import Tensor

from vqvae_lightning.errors import InputError, Key, check_positive
from vqvae_lightning.likelihoods.logistic import MIN_LOG_SCALE, discretised_logistic
from vqvae_lightning.likelihoods.protocol import (
    MIDDLE,
    PixelDistribution,
    draw_uniform_like,
    to_levels,
    to_pixels,
)
from vqvae_lightning.likelihoods.scaled import START, quantize

MOST_COMPONENTS = 10


class LogisticMixture(PixelDistribution):
    """Mixture of discretised logistics (Salimans et al. 2017, arXiv:1701.05517, section 2.2).

    The decoder computes the probability of each component per pixel, and a mean and a scale per
    component and channel. The mean of a channel depends linearly on the earlier channels of the
    pixel, with coefficients in (-1, 1) that the decoder computes too. A component therefore
    describes a colour as a whole.

    Args:
        channels: Channels of the images (C).
        components: Components of the mixture (M), 1 to 10.
        weight: Weight in the loss, as for `PixelDistribution`.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, channels: int, components: int = 5, weight: float = 0.1) -> None:
        super().__init__(channels, weight)
        self.components = check_positive("components", components)
        if components > MOST_COMPONENTS:
            raise InputError(
                Key("components"), f"={components} must be from 1 to {MOST_COMPONENTS}."
            )
        pairs = channels * (channels - 1) // 2
        self._sizes = [1, channels, channels, pairs]
        self.outputs = components * sum(self._sizes)

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split into logits (B, M, H, W), means, log scales (B, M, C, H, W) and coefficients."""
        # Pixels innermost: with channels innermost, each part would be a strided view, on which
        # everything below takes several times as long.
        planes = output.float().contiguous(memory_format=torch.contiguous_format)
        split = planes.unflatten(1, (self.components, -1)).split(self._sizes, 2)
        logits, means, scales, coefficients = split
        # The scale starts at about 20 levels, because the decoder's first outputs are about 0.
        return logits[:, :, 0], means, scales + START, coefficients.tanh()

    def _shift_means(self, means: Tensor, coefficients: Tensor, pixels: Tensor) -> Tensor:
        """Shift means (B, M, C, H, W) by the earlier channels of `pixels` (B, 1 or M, C, H, W)."""
        moved, pair = [], 0
        for channel in range(self.channels):
            mean = means[:, :, channel]
            for earlier in range(channel):
                mean = mean + coefficients[:, :, pair] * pixels[:, :, earlier]
                pair += 1
            moved.append(mean)
        return torch.stack(moved, 2)

    def log_prob(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the log mass of each pixel (B, H, W) in nats, over all its channels."""
        with torch.autocast(output.device.type, enabled=False):
            logits, means, scales, coefficients = self._split(output)
            means = self._shift_means(means, coefficients, to_pixels(levels)[:, None])
            mass = discretised_logistic(levels[:, None], to_levels(means), scales).sum(2)
            return torch.logsumexp(logits.log_softmax(1) + mass, 1)

    def mean(self, output: Tensor) -> Tensor:
        """Compute the average (B, C, H, W) of the components' means, without rounding to levels."""
        with torch.autocast(output.device.type, enabled=False):
            logits, means, _, coefficients = self._split(output)
            placed: list[Tensor] = []
            for channel in range(self.channels):
                known = torch.stack([*placed, *[means[:, :, 0]] * (self.channels - channel)], 2)
                placed.append(self._shift_means(means, coefficients, known)[:, :, channel])
            together = torch.stack(placed, 2).clamp(-1, 1)
            return (logits.softmax(1)[:, :, None] * together).sum(1)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8: first a component per pixel, then the channels."""
        with torch.autocast(output.device.type, enabled=False):
            logits, means, scales, coefficients = self._split(output)
            gumbel = -torch.log(-torch.log(draw_uniform_like(logits, generator)))
            chosen = (logits + gumbel).argmax(1)[:, None, None]

            def gather_chosen(values: Tensor) -> Tensor:
                index = chosen.expand(-1, -1, values.shape[2], -1, -1)
                return values.gather(1, index)

            means, scales, coefficients = map(gather_chosen, (means, scales, coefficients))
            noise = torch.logit(draw_uniform_like(means, generator))
            noise = noise * scales.clamp_min(MIN_LOG_SCALE).exp() / MIDDLE
            values = torch.zeros_like(means)
            for channel in range(self.channels):
                mean = self._shift_means(means, coefficients, values)[:, :, channel]
                drawn = quantize(to_levels(mean + noise[:, :, channel]))
                values[:, :, channel] = to_pixels(drawn)
            return quantize(to_levels(values[:, 0]))
