"""Bottlenecks of plain and variational autoencoders, with the interface of the quantizers."""

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, check_positive, check_range
from vqvae_lightning.quantizers.protocol import Posterior, QuantizerOutput
from vqvae_lightning.randomness import draw_for_batch


class ContinuousBottleneck(nn.Module):
    """Base class of the bottlenecks without codes.

    Args:
        code_dim: Channels of the decoder's input (D).
        encoder_channels: Channels of the encoder's output.

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
        """Raise an error, because there are no codes.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{type(self).__name__} has no codes: choose quantizer=ema or loss.")

    def decode(self, codes: Tensor) -> NoReturn:
        """Raise an error, because there are no codes.

        Raises:
            InputError: Always.
        """
        self.encode(codes)

    def update(self, progress: float = 0.0) -> dict[str, float]:
        """Do nothing, because there are no statistics to learn from."""
        return {}


class NoQuantizer(ContinuousBottleneck):
    """Bottleneck of a plain autoencoder, limited only by its number of channels.

    Args:
        code_dim: Channels between encoder and decoder (D).
    """

    def __init__(self, code_dim: int) -> None:
        super().__init__(code_dim, code_dim)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Return `z` (B, D, H, W) unchanged, in float32."""
        return QuantizerOutput(z.float(), None, z.new_zeros((), dtype=torch.float32), {})


class GaussianBottleneck(ContinuousBottleneck):
    """Bottleneck of a variational autoencoder, a diagonal Gaussian.

    The decoder gets a sample in training (reparameterisation) and the mean in evaluation, so that
    reconstructions are deterministic. The KL divergence from the standard normal is
    -1/2 (1 + log s^2 - m^2 - s^2) per latent value. Source: Kingma and Welling 2019
    (arXiv:1906.02691), sections 2.4 and 2.5.

    The KL term is the mean over latent values, because the reconstruction term is a mean over
    pixels (normalised beta, Higgins et al. 2017, section 4.2). Let M be the number of latent
    values, N the number of pixel values and var the variance of the pixels. The loss is then a
    negative evidence lower bound with a Gaussian likelihood of variance s^2 if
    beta = 2 M s^2 / (N var). With a likelihood of weight w, that is so if beta = w M / N.

    Args:
        code_dim: Latent channels (D). The encoder returns a mean and a log variance for each.
        beta: Weight of the KL term.
        free_bits: Bits per latent value that each channel carries at no cost, so that channels
            below it are not pushed to collapse (Kingma et al. 2016, arXiv:1606.04934, appendix
            C.8). Above 0, the loss uses the term `kl_clamped`, and `kl` is only logged.

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
        """Sample the Gaussian given by `z` (B, 2 D, H, W), or return its mean in evaluation."""
        # float32, because in float16 the exponential of a log variance above 11 is infinite.
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = self.split_posterior(z)
            kl = self.compute_kl(mean, log_variance)
            vectors = mean
            if self.training:
                vectors = mean + (log_variance / 2).exp() * self._draw_noise(mean)
            by_channel = kl.movedim(1, 0).flatten(1).mean(1)
            clamped = by_channel.clamp(min=self.free_nats).mean()
        terms = {"kl": by_channel.mean(), self.term: clamped}
        posterior = Posterior(mean.detach(), kl.detach())
        return QuantizerOutput(vectors, None, self.beta * clamped, terms, posterior)

    def split_posterior(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Split `z` (B, 2 D, H, W) into the mean and the log variance (B, D, H, W) of q(z | x)."""
        mean, log_variance = z.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def compute_kl(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Compute the KL divergence from the standard normal, in nats per latent value."""
        return (mean.square() + log_variance.exp() - log_variance - 1) / 2

    def _draw_noise(self, mean: Tensor) -> Tensor:
        """Draw standard normal noise (B, D, H, W) for `mean`, with channels innermost in memory."""
        _, channels, height, width = mean.shape

        def draw(images: int) -> Tensor:
            return torch.randn(images, height, width, channels, device=mean.device)

        return draw_for_batch(draw, len(mean)).movedim(-1, 1)
