"""The interface of every bottleneck: its input, output and methods."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Posterior(NamedTuple):
    """Posterior of a Gaussian bottleneck; both fields are (B, D, H, W)."""

    mean: Tensor
    kl: Tensor
    """KL divergence from the standard normal, in nats per latent value."""


class QuantizerOutput(NamedTuple):
    """Output of a quantizer for encoder vectors `z` of shape (B, encoder_channels, H, W)."""

    vectors: Tensor
    """Input of the decoder, (B, D, H, W) float32."""
    codes: Tensor | None
    """(B, H, W) int64 in [0, num_codes), or (B, H, W, Q) with Q = codes_per_position > 1. None from
    a continuous bottleneck and during the warm-up of a codebook."""
    loss: Tensor
    """Weighted sum of those `terms` that have a weight, shape (), to be added to the
    reconstruction term."""
    terms: dict[str, Tensor]
    """Unweighted terms, each of shape (), for logging. `Quantizer.weights` holds the weights of
    those that enter `loss`."""
    posterior: Posterior | None = None
    """Set by a Gaussian bottleneck only."""


class Quantizer(Protocol):
    """Interface that the networks and tasks expect of a bottleneck."""

    num_codes: int
    """Rows of the codebook, or of each codebook; 0 for a continuous bottleneck."""
    codes_per_position: int
    """1 for most quantizers, more for product and residual codes, 0 for a continuous bottleneck."""
    code_dim: int
    """Channels of the decoder's input."""
    encoder_channels: int
    """Channels of the encoder's output."""
    weights: dict[str, float]
    """Weight of each loss term, by name."""

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Quantize `z` (B, encoder_channels, H, W); in training mode, collect statistics too."""

    def encode(self, z: Tensor) -> Tensor:
        """Return the codes (B, H, W[, Q]) of `z`; never learns, even in training mode."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the vectors (B, D, H, W) of `codes` (B, H, W[, Q])."""

    def update(self, progress: float) -> dict[str, float]:
        """Learn from the batches since the last call; call this once after each optimizer step.

        Args:
            progress: Completed share of the training, in [0, 1].

        Returns:
            Metrics to log.
        """
