"""Gaussian and discretised logistic likelihoods with one learned scale per channel."""

import math

import torch
from torch import Tensor, nn

from vqvae_lightning.likelihoods.logistic import MIN_LOG_SCALE, discretised_logistic
from vqvae_lightning.likelihoods.protocol import (
    LEVELS,
    PixelDistribution,
    draw_uniform_like,
    to_levels,
)

START = math.log(20.0)  # log scale in levels at the start of training: the error of a blurred image


class _Scaled(PixelDistribution):
    """Base class: the decoder computes the mean, and the scale (C, 1, 1) is a parameter."""

    def __init__(self, channels: int, weight: float = 0.1) -> None:
        super().__init__(channels, weight)
        self.outputs = channels
        self.log_scale = nn.Parameter(torch.full((channels, 1, 1), START))

    def mean(self, output: Tensor) -> Tensor:
        """Return `output` unchanged."""
        return output

    def _draw(self, output: Tensor, noise: Tensor) -> Tensor:
        scale = self.log_scale.float().clamp_min(MIN_LOG_SCALE).exp()
        return quantize(to_levels(output) + scale * noise)


def quantize(values: Tensor) -> Tensor:
    """Round real values to levels, uint8: each to the level whose bin contains it."""
    return values.round().clamp(0, LEVELS - 1).to(torch.uint8)


class Gaussian(_Scaled):
    """Gaussian around the decoder's output, with one learned scale per channel.

    Training uses uniform dequantisation (Theis et al. 2016, arXiv:1511.01844, section 3.1). The
    loss is the expected negative log density of the level plus noise u in [-1/2, 1/2). Its closed
    form needs no noise, because E (x + u - mean)^2 = (x - mean)^2 + 1/12. By Jensen's inequality,
    it is an upper bound on the negative log mass of the level's bin, which `log_prob` returns. The
    two outer bins extend to infinity.
    """

    def compute_loss(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the bound (), in nats per pixel and channel."""
        with torch.autocast(output.device.type, enabled=False):
            log_scale = self.log_scale.float().clamp_min(MIN_LOG_SCALE)
            squared = (levels.float() - to_levels(output)).square() + 1 / 12
            nats = 0.5 * math.log(2 * math.pi) + log_scale + squared / (2 * (2 * log_scale).exp())
            return nats.mean()

    def log_prob(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the log mass of the bins (B, H, W) in nats, summed over channels."""
        with torch.autocast(output.device.type, enabled=False):
            # float64, because a bin's mass is a difference of two nearly equal probabilities.
            x, mean = levels.double(), to_levels(output).double()
            inverse = (-self.log_scale.double().clamp_min(MIN_LOG_SCALE)).exp()
            low, high = (x - 0.5 - mean) * inverse, (x + 0.5 - mean) * inverse
            # Bins above the mean are mirrored, because log_ndtr is exact in the lower tail.
            above = low > 0
            low, high = torch.where(above, -high, low), torch.where(above, -low, high)
            first, last = x < 0.5, x > LEVELS - 1.5
            bottom, top = torch.where(above, last, first), torch.where(above, first, last)
            upper = torch.where(top, torch.zeros_like(high), torch.special.log_ndtr(high))
            lower = torch.special.log_ndtr(low)
            gap = torch.where(bottom, torch.full_like(low, math.inf), upper - lower)
            mass = upper + torch.log(-torch.expm1(-gap))
            return mass.sum(1).float()

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8."""
        noise = torch.randn(
            output.shape, dtype=torch.float32, device=output.device, generator=generator
        )
        return self._draw(output, noise)


class Logistic(_Scaled):
    """Discretised logistic around the decoder's output, with one learned scale per channel.

    Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1.
    """

    def log_prob(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the log mass of the bins (B, H, W) in nats, summed over channels."""
        with torch.autocast(output.device.type, enabled=False):
            return discretised_logistic(levels, to_levels(output), self.log_scale.float()).sum(1)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8."""
        return self._draw(output, torch.logit(draw_uniform_like(output, generator)))
