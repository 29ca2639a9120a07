"""Bottlenecks between encoder and decoder: vector quantizers and their continuous baselines.

This folder needs torch and numpy only, and `library` also vector-quantize-pytorch. Start with
`protocol`, the interface of every bottleneck.

- `protocol`: what a bottleneck takes and returns.
- `codebook`: what the EMA and loss codebooks share: look-up, warm-up, revival of dead codes.
- `arrangements`: several codes per position, as product or residual codes.
- `ema`: the EMA rule, which moves the codebook by moving averages.
- `loss`: the codebook that learns by gradient.
- `lookup`: the search for the nearest codebook row.
- `gradients`: the estimators that pass the gradient through the look-up.
- `rows`: the encoder vectors that become codebook rows, at the start and in a revival.
- `sonnet`: the EMA codebook of sonnet's example, for comparison.
- `library`: quantizers of vector-quantize-pytorch.
- `continuous`: bottlenecks without codes, for an autoencoder or a variational autoencoder.
"""

from vqvae_lightning.quantizers.codebook import VectorQuantizer
from vqvae_lightning.quantizers.continuous import GaussianBottleneck, NoQuantizer
from vqvae_lightning.quantizers.ema import EMAQuantizer
from vqvae_lightning.quantizers.library import LibraryQuantizer
from vqvae_lightning.quantizers.loss import LossQuantizer
from vqvae_lightning.quantizers.protocol import Posterior, Quantizer, QuantizerOutput
from vqvae_lightning.quantizers.sonnet import SonnetEMAQuantizer

__all__ = [
    "EMAQuantizer",
    "GaussianBottleneck",
    "LibraryQuantizer",
    "LossQuantizer",
    "NoQuantizer",
    "Posterior",
    "Quantizer",
    "QuantizerOutput",
    "SonnetEMAQuantizer",
    "VectorQuantizer",
]
