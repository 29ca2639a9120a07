"""The data of both stages: images, and the same splits as codes.

images: batches and their order, and the LightningDataModule of images.
codes: the LightningDataModule of codes, which are encoded once and stored.
mapped: decoded images in files that the processes of a machine share.
sources: where images come from.
shards: images streamed from tar shards.
bundled: a subset of Fashion-MNIST, shipped with the package.
"""

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import Batch, ImageDataModule
from vqvae_lightning.data.shards.datamodule import ShardDataModule
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
