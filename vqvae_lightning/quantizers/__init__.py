"""How a grid of vectors becomes a grid of codes (torch only)."""

from vqvae_lightning.quantizers.base import Quantizer, QuantizerOutput, VectorQuantizer
from vqvae_lightning.quantizers.ema import EMAQuantizer
from vqvae_lightning.quantizers.loss import LossQuantizer

__all__ = ["EMAQuantizer", "LossQuantizer", "Quantizer", "QuantizerOutput", "VectorQuantizer"]
