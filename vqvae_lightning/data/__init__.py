"""One LightningDataModule for both stages: images, and the same splits as codes."""

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import Batch, ImageDataModule
from vqvae_lightning.data.shards import ShardDataModule
from vqvae_lightning.data.sources import (
    BundledSource,
    ImageFolderSource,
    NpzSource,
    Source,
    TorchvisionSource,
)

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
