"""Tar shards: images streamed from files, for data sets larger than memory.

datamodule: the LightningDataModule over shards.
stream: which worker reads which rows, and the batches that result.
index: how many images each shard has, of which size, classes and pixel values.
read: the samples of a shard.
workers: how worker processes start and which signals they ignore.
write: writing shards.
"""

from vqvae_lightning.data.shards.datamodule import ShardDataModule
from vqvae_lightning.data.shards.write import write_shards

__all__ = ["ShardDataModule", "write_shards"]
