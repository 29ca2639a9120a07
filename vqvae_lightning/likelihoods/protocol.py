"""Interface of the likelihoods p(x | z), which give the decoder's output its meaning."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, Key, check_range

LEVELS = 256
MIDDLE = 127.5
"""Half of the range of levels 0 to 255: a pixel of -1 is level 0, one of 1 is level 255."""


def to_levels(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to levels from 0 to 255, float32, without rounding."""
    return (pixels.float() + 1) * MIDDLE


def to_pixels(levels: Tensor) -> Tensor:
    """Convert levels from 0 to 255 to float32 pixels in [-1, 1]."""
    return levels.float() / MIDDLE - 1


class Likelihood(nn.Module, ABC):
    """Distribution of an image given its codes, whose parameters the decoder computes.

    The pixels of an image are independent given the codes. All methods compute in float32, also
    under autocast.

    Attributes:
        channels: Channels of the images (C).
        outputs: Channels that the decoder produces.
    """

    channels: int
    outputs: int

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """Compute the mean image (B, C, H, W), approximately in [-1, 1]."""


class PixelDistribution(Likelihood):
    """A likelihood that assigns a probability to each of the 256 levels of every pixel.

    Args:
        channels: Channels of the images (C).
        weight: Weight of the negative log-likelihood in the loss. The weights of the quantizers'
            terms were chosen for NMSE, whose gradient for an error e is 2 e / (variance of the
            pixels). The negative log-likelihood of a Gaussian has the gradient e / (variance of the
            errors). Both are equal at weight = 2 NMSE, so 0.1 corresponds to an NMSE of 0.05.

    Raises:
        InputError: If `weight` is not positive.
    """

    def __init__(self, channels: int, weight: float = 0.1) -> None:
        super().__init__()
        self.channels = channels
        if check_range("weight", weight, 0) == 0:
            raise InputError(Key("weight"), "=0 must be positive: nothing else trains the decoder.")
        self.weight = weight

    @abstractmethod
    def log_prob(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute log p(x | z) in nats per pixel, summed over its channels.

        Args:
            output: Decoder output (B, outputs, H, W).
            levels: Pixels (B, C, H, W), 0 to 255, of any dtype.

        Returns:
            (B, H, W) float32. The exponentials sum to 1 over all 256**C values of a pixel.
        """

    @abstractmethod
    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8 from p(x | z).

        Args:
            output: Decoder output (B, outputs, H, W).
            generator: Generator on the device of `output`; None for torch's default generator.
        """

    def compute_loss(self, output: Tensor, levels: Tensor) -> Tensor:
        """Compute the mean negative log-likelihood (), in nats per pixel and channel."""
        return -self.log_prob(output, levels).mean() / self.channels


class SquaredError(Likelihood):
    """Squared error instead of a distribution; the decoder's output is the image itself.

    Evaluation fits a discretised logistic distribution per channel on validation images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.outputs = channels

    def mean(self, output: Tensor) -> Tensor:
        """Return `output` unchanged."""
        return output


def draw_uniform_like(output: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers in (0, 1), without the ends, in the shape of `output`."""
    drawn = torch.rand(output.shape, dtype=torch.float32, device=output.device, generator=generator)
    return drawn.clamp(1e-7, 1 - 1e-7)
