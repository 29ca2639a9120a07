"""The interface of every bottleneck: what it takes and returns."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Posterior(NamedTuple):
    """What a Gaussian bottleneck knows of its latents; both (B, D, H, W)."""

    mean: Tensor
    kl: Tensor
    """KL divergence from the standard normal in nats, per latent value."""


class QuantizerOutput(NamedTuple):
    """What a quantizer returns for encoder vectors `z` of shape (B, encoder_channels, H, W)."""

    vectors: Tensor
    """(B, D, H, W) float32, the decoder's input."""
    codes: Tensor | None
    """(B, H, W) int64 in [0, num_codes), or (B, H, W, Q) with Q = codes_per_position > 1; None from
    a continuous bottleneck, and while the codebook waits for the warm-up to end."""
    loss: Tensor
    """() the weighted sum of `terms`: add it to the reconstruction term."""
    terms: dict[str, Tensor]
    """Unweighted parts of `loss`, each (), for logging; the weights are `Quantizer.weights`."""
    posterior: Posterior | None = None
    """Of a Gaussian bottleneck only."""


class Quantizer(Protocol):
    """What the networks and tasks need of a bottleneck."""

    num_codes: int
    """Rows of (each) codebook; 0 for a continuous bottleneck."""
    codes_per_position: int
    """1, or more for residual quantizers, or 0 for a continuous bottleneck."""
    code_dim: int
    """Channels that the decoder gets."""
    encoder_channels: int
    """Channels that the encoder delivers."""
    weights: dict[str, float]

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Quantize (B, encoder_channels, H, W); in training mode gather what `update` needs."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, H, W) of `z`; never learns, even in training mode."""

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, H, W) of `codes`."""

    def update(self, progress: float) -> dict[str, float]:
        """Learn from the batches since the last call; call it once after each optimizer step.

        `progress` is the share of training that is done, in [0, 1]. Returns figures to log.
        """
