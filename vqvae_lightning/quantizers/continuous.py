"""The traditional autoencoders' bottlenecks, behind the same door as the quantizers."""

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, check_positive, check_range
from vqvae_lightning.quantizers.protocol import Posterior, QuantizerOutput
from vqvae_lightning.randomness import draw_for_batch


class ContinuousBottleneck(nn.Module):
    """A bottleneck without codes: nothing to look up, to encode or to move after a step.

    Args:
        code_dim: Channels that the decoder gets (D).
        encoder_channels: Channels that the encoder delivers.

    Raises:
        InputError: If `code_dim` is not a positive integer.
    """

    num_codes = 0
    codes_per_position = 0

    def __init__(self, code_dim: int, encoder_channels: int) -> None:
        super().__init__()
        self.code_dim = check_positive("code_dim", code_dim)
        self.encoder_channels = encoder_channels
        self.weights: dict[str, float] = {}

    def encode(self, z: Tensor) -> NoReturn:
        """Refuse.

        Raises:
            InputError: Always: there are no codes.
        """
        raise InputError(f"{type(self).__name__} has no codes: choose quantizer=ema or loss.")

    def decode(self, codes: Tensor) -> NoReturn:
        """Refuse.

        Raises:
            InputError: Always: there are no codes.
        """
        self.encode(codes)

    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Nothing to learn outside the gradient."""
        return {}


class NoQuantizer(ContinuousBottleneck):
    """No bottleneck but the number of channels: a plain autoencoder.

    Args:
        code_dim: Channels between encoder and decoder (D).
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Pass `z` (B, D, H, W) on."""
        return QuantizerOutput(z.float(), None, z.new_zeros((), dtype=torch.float32), {})


class GaussianBottleneck(ContinuousBottleneck):
    """The latents of a variational autoencoder: a diagonal Gaussian, drawn by reparameterisation.

    In training the decoder gets a sample, in evaluation the mean, so that a reconstruction is the
    same each time. The KL divergence from the standard normal is the closed form -1/2 (1 + log s^2
    - m^2 - s^2) per latent value. Source: Kingma and Welling 2019 (arXiv:1906.02691), sections 2.4
    and 2.5.

    The term is the mean over latent values, not their sum, as the reconstruction term is a mean
    over pixels (Higgins et al. 2017, section 4.2: normalised beta). With M latent values for N
    pixel values, the loss is a negative evidence bound with a Gaussian likelihood of variance s^2
    where beta = 2 M s^2 / (N var), var the variance of the pixels.

    Args:
        code_dim: Latent channels (D); the encoder delivers a mean and a log variance for each.
        beta: Weight of the KL term.
        free_bits: Bits per latent value that each channel may carry at no cost (Kingma et al. 2016,
            arXiv:1606.04934, appendix C.8): a channel below it is not pushed to collapse. The loss
            then has the term `kl_clamped`; `kl` stays the divergence as it is.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, code_dim: int, beta: float = 0.01, free_bits: float = 0.0) -> None:
        super().__init__(code_dim, 2 * check_positive("code_dim", code_dim))
        self.beta = check_range("beta", beta, 0)
        self.free_nats = math.log(2) * check_range("free_bits", free_bits, 0)
        self.term = "kl_clamped" if free_bits else "kl"
        self.weights = {self.term: self.beta}

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Draw from, or take the mean of, the Gaussian that `z` (B, 2 D, H, W) describes."""
        # float32: in half precision the exponential of a log variance above 11 is infinite.
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = z.float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            kl = (mean.square() + log_variance.exp() - log_variance - 1) / 2
            vectors = mean
            if self.training:
                vectors = mean + (log_variance / 2).exp() * self._noise(mean)
            by_channel = kl.movedim(1, 0).flatten(1).mean(1)
            clamped = by_channel.clamp(min=self.free_nats).mean()
        terms = {"kl": by_channel.mean(), self.term: clamped}
        posterior = Posterior(mean.detach(), kl.detach())
        return QuantizerOutput(vectors, None, self.beta * clamped, terms, posterior)

    def _noise(self, mean: Tensor) -> Tensor:
        """Standard normal values for `mean` (B, D, H, W); in memory the channels are innermost."""
        _, channels, height, width = mean.shape

        def draw(images: int) -> Tensor:
            return torch.randn(images, height, width, channels, device=mean.device)

        return draw_for_batch(draw, len(mean)).movedim(-1, 1)
