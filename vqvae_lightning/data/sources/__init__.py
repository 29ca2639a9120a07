"""Sources of images: torchvision data sets, `.npz` files, folders, the bundled subset."""

from vqvae_lightning.data.sources.arrays import Source, Split, Splits, StorageError
from vqvae_lightning.data.sources.folder import ImageFolderSource
from vqvae_lightning.data.sources.npz import BundledSource, NpzSource
from vqvae_lightning.data.sources.torchvision import TorchvisionSource

__all__ = [
    "BundledSource",
    "ImageFolderSource",
    "NpzSource",
    "Source",
    "Split",
    "Splits",
    "StorageError",
    "TorchvisionSource",
]
