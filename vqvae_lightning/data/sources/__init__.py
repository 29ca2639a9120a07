"""Sources of images.

protocol: the protocol `Source`, and the splits that a source returns.
torchvision: data sets of torchvision.
npz: `.npz` files, and the bundled subset of Fashion-MNIST.
folder: folders of image files.
arrays: arrays of uint8 images, and resizing.
"""

from vqvae_lightning.data.sources.folder import ImageFolderSource
from vqvae_lightning.data.sources.npz import BundledSource, NpzSource
from vqvae_lightning.data.sources.protocol import Source, Split, Splits, StorageError
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
