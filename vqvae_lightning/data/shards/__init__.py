"""Tar shards: images read as a stream, never all in memory."""

from vqvae_lightning.data.shards.datamodule import ShardDataModule
from vqvae_lightning.data.shards.write import write_shards

__all__ = ["ShardDataModule", "write_shards"]
