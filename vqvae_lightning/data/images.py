"""The LightningDataModule of both stages: images in memory, one indexing operation per batch."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqvae_lightning.data.sources import Source, Split
from vqvae_lightning.distributed import rank_and_world
from vqvae_lightning.errors import InputError, check_positive, check_range
from vqvae_lightning.networks.autoencoder import from_uint8

SplitName = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """A batch of either stage."""

    data: Tensor
    """Images (B, C, H, W), float32 in [-1, 1] on the device; or codes (B, h, w) int64."""
    labels: Tensor | None
    """(B,) int64, or None where the set has none."""


def batch_seed(seed: int, number: int, rank: int) -> int:
    """A seed of its own for each run, training batch and rank."""
    # 1024 apart, so that no two ranks of two batches share one.
    return (seed * 1_000_003 + number) * 1024 + rank


class ArrayDataset(Dataset[Batch]):
    """Rows of an array and their labels; a whole batch is read by one indexing operation."""

    def __init__(self, data: Any, labels: Tensor | None) -> None:
        self.data = data
        self.labels = labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: Tensor) -> Batch:
        """The batch with these rows."""
        data = torch.as_tensor(self.data[rows])
        return Batch(data, None if self.labels is None else self.labels[rows])


class EpochBatches:
    """Row numbers of each batch of this rank; a function of seed, epoch and position alone.

    Args:
        total: Rows of the split.
        batch_size: Over all ranks together.
        seed: Order of the epochs; None keeps the rows in order, with a smaller last batch and no
            padding.
    """

    def __init__(self, total: int, batch_size: int, seed: int | None) -> None:
        self.rank, self.world = rank_and_world()
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.epoch = self.position = self.resume_at = 0

    @property
    def sampler(self) -> "EpochBatches":
        """Itself: Lightning calls `set_epoch` on a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.seed is not None:
            return self.total // self.batch_size
        return -(-len(self._own()) // (self.batch_size // self.world))

    def __iter__(self) -> Iterator[Tensor]:
        start, self.resume_at = self.resume_at % max(1, len(self)), 0
        local = self.batch_size // self.world
        if self.seed is None:
            # A split may have fewer rows than there are ranks.
            yield from (part for part in self._own().split(local) if len(part))
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.total, generator=generator)
        for number in range(start, len(self)):
            self.position = number + 1
            # Ranks cut one global batch, so that what is learnt does not depend on their number.
            first = number * self.batch_size + self.rank * local
            yield order[first : first + local]

    def _own(self) -> Tensor:
        return torch.arange(self.total).tensor_split(self.world)[self.rank]


class ResumableLoader(DataLoader[Batch]):
    """A loader that goes on after the last batch it gave.

    Lightning stores its state in each checkpoint.
    """

    def state_dict(self) -> dict[str, int]:
        """Batches given in this epoch."""
        return {"batches": cast(EpochBatches, self.batch_sampler).position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin after the batches of `state`."""
        cast(EpochBatches, self.batch_sampler).resume_at = state["batches"]


class ArrayDataModule(pl.LightningDataModule):
    """Batches out of arrays in memory, for images and for codes alike."""

    batch_size_key = "dataset.batch_size"

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = check_positive("dataset.batch_size", batch_size)
        self.eval_batch_size = check_positive("dataset.eval_batch_size", eval_batch_size)
        self.seed = seed
        self.datasets: dict[str, ArrayDataset] = {}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled anew in each epoch; a last batch that is not full is left for a later epoch."""
        return self._loader("train", self.batch_size_key, self.batch_size, self.seed)

    def val_dataloader(self) -> ResumableLoader:
        """In order; each image once, over all ranks."""
        return self.batches("val")

    def test_dataloader(self) -> ResumableLoader:
        """In order; each image once, over all ranks."""
        return self.batches("test")

    def batches(self, split: SplitName) -> ResumableLoader:
        """Any split in order, each image once."""
        return self._loader(split, "dataset.eval_batch_size", self.eval_batch_size, None)

    def _loader(self, split: str, key: str, batch_size: int, seed: int | None) -> ResumableLoader:
        dataset = self.datasets[split]
        batches = EpochBatches(len(dataset), batch_size, seed)
        # Checked here, where the number of ranks is known.
        if batch_size % batches.world:
            down = batch_size // batches.world * batches.world
            raise InputError(
                f"{key}={batch_size} does not divide over {batches.world} devices; it counts all "
                f"devices together. Nearest that do: {down} and {down + batches.world}."
            )
        return ResumableLoader(
            dataset, batch_sampler=cast(Any, batches), collate_fn=lambda batch: batch
        )


class ImageDataModule(ArrayDataModule):
    """Images for both stages.

    Images stay uint8 in memory and on the bus; they are scaled to [-1, 1], and flipped, on the
    device.

    Args:
        source: Where they come from.
        batch_size: Images per optimizer step, over all ranks together.
        eval_batch_size: Images per batch in validation, testing and encoding, over all ranks
            together.
        flip: Mirror each training image left to right with probability 1/2.
        val_share: Share of the training images set aside for validation where the set has no such
            split, and for testing where it has no test split either.
        split_seed: Chooses them; not the run's seed, so that all runs see one split.
        seed: Order of the training batches and flips.

    Attributes:
        image_shape: (C, H, W).
        class_names: Empty without labels.
        fingerprint: 16 hexadecimal digits that change with any pixel, label or split.
        pixel_variance: Of all values of the training images, in [0, 1]: the divisor of NMSE.
    """

    image_shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str
    pixel_variance: float

    def __init__(
        self,
        source: Source,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        flip: bool = False,
        val_share: float = 0.05,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if not check_range("dataset.val_share", val_share, 0, 0.5) > 0:
            raise InputError("dataset.val_share=0 leaves no images to validate on.")
        self.source = source
        self.flip = flip
        self.val_share = val_share
        self.split_seed = split_seed

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Download, in one process per node."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load the images and carve missing splits."""
        if self.datasets:
            return
        splits = self.source.load()
        train, val, test = splits.train, splits.val, splits.test
        if test is None:
            train, test = self._carve(train, seed=self.split_seed + 1)
        if val is None:
            train, val = self._carve(train, seed=self.split_seed)
        if self.batch_size > len(train.images):
            raise InputError(
                f"dataset.batch_size={self.batch_size} is larger than the training split "
                f"({len(train.images)} images): it must be at most that."
            )
        for name, split in (("train", train), ("val", val), ("test", test)):
            self.datasets[name] = ArrayDataset(split.images, split.labels)
        self.class_names = splits.class_names
        carved = f"{self.val_share} {self.split_seed}" if None in splits[:3] else ""
        self.fingerprint = splits._replace(class_names=[*splits.class_names, carved]).fingerprint()
        channels, height, width = train.images.shape[1:]
        self.image_shape = channels, height, width
        counts = train.images.flatten().bincount(minlength=256).double()
        share, levels = counts / counts.sum(), torch.arange(256).double() / 255
        mean = (share * levels).sum()
        self.pixel_variance = float((share * (levels - mean) ** 2).sum())
        if self.pixel_variance == 0:
            raise InputError("all training pixels are equal: there is nothing to learn.")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """To [-1, 1] and, in training, flipped; on the device."""
        images = from_uint8(batch.data)
        if self.flip and self.trainer is not None and self.trainer.training:
            # A function of seed and batch, so that a resumed run flips what the first would have;
            # of the whole batch, of which the ranks have parts, so that their number changes
            # nothing.
            number = self.trainer.fit_loop.total_batch_idx + 1  # of the batch that comes now
            rank, world = rank_and_world()
            generator = torch.Generator().manual_seed(batch_seed(self.seed, number, 0))
            mirrored = torch.rand(self.batch_size, generator=generator).chunk(world)[rank] < 0.5
            where = mirrored.to(images.device)[:, None, None, None]
            images = torch.where(where, images.flip(-1), images)
        return Batch(images, batch.labels)

    def _carve(self, split: Split, seed: int) -> tuple[Split, Split]:
        total = len(split.images)
        taken = round(total * self.val_share)
        if not 0 < taken < total:
            raise InputError(
                f"{total} images are too few to set dataset.val_share={self.val_share} of them "
                "aside."
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        rest, aside = order[taken:].sort().values, order[:taken].sort().values
        labels = split.labels
        return (
            Split(split.images[rest], None if labels is None else labels[rest]),
            Split(split.images[aside], None if labels is None else labels[aside]),
        )
