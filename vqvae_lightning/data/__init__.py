"""One LightningDataModule for both stages: images, and the same splits as codes."""

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import Batch, ImageDataModule
from vqvae_lightning.data.shards.datamodule import ShardDataModule
from vqvae_lightning.data.sources.arrays import Source
from vqvae_lightning.data.sources.folder import ImageFolderSource
from vqvae_lightning.data.sources.npz import BundledSource, NpzSource
from vqvae_lightning.data.sources.torchvision import TorchvisionSource

__all__ = [
    "Batch",
    "BundledSource",
    "CodesDataModule",
    "ImageDataModule",
    "ImageFolderSource",
    "NpzSource",
    "ShardDataModule",
    "Source",
    "TorchvisionSource",
]
