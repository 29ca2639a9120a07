"""Two-stage discrete image models: a VQ-VAE and a PixelCNN prior over its codes.

`load` returns the network in a checkpoint. `VQVAE` and `PixelCNN` are the two networks,
`EMAQuantizer` is the codebook and `ImageDataModule` feeds both stages. They are imported on first
use, so importing the package takes milliseconds and not the seconds that torch needs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "EMAQuantizer": "vqvae_lightning.quantizers.ema",
    "ImageDataModule": "vqvae_lightning.data.images",
    "PixelCNN": "vqvae_lightning.networks.pixelcnn",
    "VQVAE": "vqvae_lightning.networks.autoencoder",
    "load": "vqvae_lightning.checkpoints",
}
__all__ = ["VQVAE", "EMAQuantizer", "ImageDataModule", "PixelCNN", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
