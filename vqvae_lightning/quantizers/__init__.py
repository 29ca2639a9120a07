"""How a grid of vectors becomes a grid of codes (torch only)."""

from vqvae_lightning.quantizers.codebook import VectorQuantizer
from vqvae_lightning.quantizers.continuous import GaussianBottleneck, NoQuantizer
from vqvae_lightning.quantizers.ema import EMAQuantizer
from vqvae_lightning.quantizers.library import LibraryQuantizer
from vqvae_lightning.quantizers.loss import LossQuantizer
from vqvae_lightning.quantizers.protocol import Posterior, Quantizer, QuantizerOutput

__all__ = [
    "EMAQuantizer",
    "GaussianBottleneck",
    "LibraryQuantizer",
    "LossQuantizer",
    "NoQuantizer",
    "Posterior",
    "Quantizer",
    "QuantizerOutput",
    "VectorQuantizer",
]
