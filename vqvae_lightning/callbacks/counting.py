"""The number of images that a validation or a test evaluates."""

from typing import Literal

import pytorch_lightning as pl

from vqvae_lightning.data.images import ResumableLoader
from vqvae_lightning.distributed import gather


def count_images(trainer: pl.Trainer, split: Literal["val", "test"]) -> int:
    """Count the images of all ranks, which wait for each other here.

    They are fewer than the split has if `limit_val_batches` or `limit_test_batches` is set.

    Args:
        trainer: Trainer that has set up the loader of the split.
        split: Split that it evaluates.
    """
    loader: ResumableLoader
    if split == "val":
        loader, (batches,) = trainer.val_dataloaders, trainer.num_val_batches  # type: ignore[assignment]
    else:
        loader, (batches,) = trainer.test_dataloaders, trainer.num_test_batches  # type: ignore[assignment]
    return sum(gather(sum(len(rows) for rows in loader.rows()[: int(batches)])))
