"""Categorical distribution over the 256 levels of every pixel and channel."""

import torch
from torch import Tensor

from vqvae_lightning.likelihoods.protocol import (
    LEVELS,
    PixelDistribution,
    draw_uniform_like,
    to_pixels,
)


class Categorical(PixelDistribution):
    """256 probabilities per pixel and channel, as in van den Oord et al. 2016 (arXiv:1601.06759).

    It assumes nothing about the shape of the distribution, but needs 256 decoder outputs per
    channel and does not know the order of the levels.
    """

    def __init__(self, channels: int, weight: float = 0.1) -> None:
        super().__init__(channels, weight)
        self.outputs = LEVELS * channels

    def _compute_log_probabilities(self, output: Tensor) -> Tensor:
        """Compute the log probability (B, C, 256, H, W) of each level."""
        return torch.log_softmax(output.float().unflatten(1, (self.channels, LEVELS)), 2)

    def log_prob(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the log probability of `levels` (B, H, W) in nats, summed over channels."""
        with torch.autocast(output.device.type, enabled=False):
            shares = self._compute_log_probabilities(output)
            return shares.gather(2, levels.long()[:, :, None])[:, :, 0].sum(1)

    def mean(self, output: Tensor) -> Tensor:
        """Compute the mean level (B, C, H, W), as pixels in [-1, 1]."""
        with torch.autocast(output.device.type, enabled=False):
            shares = self._compute_log_probabilities(output).exp()
            axis = torch.arange(LEVELS, dtype=torch.float32, device=output.device)
            return to_pixels(torch.einsum("bclhw,l->bchw", shares, axis))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8 by the Gumbel-max trick."""
        with torch.autocast(output.device.type, enabled=False):
            shares = self._compute_log_probabilities(output)
            gumbel = -torch.log(-torch.log(draw_uniform_like(shares, generator)))
            return (shares + gumbel).argmax(2).to(torch.uint8)
