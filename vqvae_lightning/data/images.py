"""Batches of both stages and their order, and the LightningDataModule of images in arrays."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqvae_lightning.data import mapped
from vqvae_lightning.data.sources.arrays import rows_per_block
from vqvae_lightning.data.sources.protocol import Source
from vqvae_lightning.devices import to_device
from vqvae_lightning.distributed import get_rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range, prefix_keys
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.randomness import derive_seed, draw_for_batch

SplitName = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """A batch of either stage."""

    data: Tensor
    """Images (B, C, H, W), float32 in [-1, 1] on the device; or codes (B, h, w) int64."""
    labels: Tensor | None
    """(B,) int64, or None without labels."""


def check_divides(key: str, batch_size: int, world: int) -> None:
    """Refuse a batch size that is not a multiple of the number of devices.

    Raises:
        InputError: If it is not; the message names `key` and the nearest multiples.
    """
    if batch_size % world:
        down = batch_size // world * world
        near = f"{down} and {down + world}" if down else str(world)
        raise InputError(
            Key(key),
            f"={batch_size} does not divide over {world} devices; it counts all devices together. "
            f"Nearest that do: {near}.",
        )


class SplitDataset(Protocol):
    """One split: an array, or a stream from shards."""

    def __len__(self) -> int:
        """Number of images, or of grids of codes."""

    def preview(self, count: int) -> Batch:
        """The first `count` rows in the order of storage."""

    def loader(self, batch_size: int, seed: int | None) -> "ResumableLoader":
        """Batches of this rank: shuffled by `seed`, or each row once and in order if it is None."""


class ArrayDataset(Dataset[Batch]):
    """Rows of an array and their labels; a whole batch is read by one indexing operation.

    Args:
        array: Images (N, C, H, W) or codes (N, h, w), in memory or memory-mapped.
        labels: Classes (N,) int64, or None without labels.
        chosen: Rows of the array that make up the split, (n,) int64; None for all.
    """

    def __init__(self, array: Any, labels: Tensor | None, chosen: Tensor | None = None) -> None:
        self.array = array
        self.chosen = chosen
        self.labels = labels if labels is None or chosen is None else labels[chosen]

    def __len__(self) -> int:
        return len(self.array if self.chosen is None else self.chosen)

    @property
    def data(self) -> Any:
        """All rows of the split; a copy if they are only some rows of the array."""
        return self.array if self.chosen is None else self.array[self.chosen.numpy()]

    def __getitems__(self, rows: Tensor) -> Batch:
        """The batch of the given rows."""
        # numpy treats a tensor of one element as a number and drops the dimension. Index by array.
        places = rows if self.chosen is None else self.chosen[rows]
        data = torch.as_tensor(self.array[places.numpy()])
        return Batch(data, None if self.labels is None else self.labels[rows])

    def preview(self, count: int) -> Batch:
        """The first `count` rows."""
        return self.__getitems__(torch.arange(min(count, len(self))))

    def loader(self, batch_size: int, seed: int | None) -> "ResumableLoader":
        """Batches of this rank in the order of `EpochBatches`."""
        return ResumableLoader(self, EpochBatches(len(self), batch_size, seed))


class EpochBatches:
    """Row numbers of each batch of this rank; a function of seed, epoch and position alone.

    Args:
        total: Number of rows of the split.
        batch_size: Rows per batch, over all ranks together.
        seed: Seed of the order of each epoch; None keeps the rows in order, with a smaller last
            batch and no padding.
    """

    def __init__(self, total: int, batch_size: int, seed: int | None) -> None:
        self.rank, self.world = get_rank_and_world()
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.epoch = self.position = 0
        # Epoch, or None for the next one, and how many of its batches are done.
        self.resume_at: tuple[int | None, int] = (None, 0)

    @property
    def sampler(self) -> "EpochBatches":
        """The object itself, because Lightning calls `set_epoch` on a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.seed is not None:
            return self.total // self.batch_size
        return -(-len(self._own_rows()) // self.local)

    @property
    def local(self) -> int:
        """Number of rows that this rank has of a full batch."""
        return max(1, self.batch_size // self.world)

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of an evaluation, in order."""
        return list(self)

    def __iter__(self) -> Iterator[Any]:
        start, local = self.start(), self.local
        if self.seed is None:
            # Empty parts are left out: a split may have fewer rows than there are ranks.
            yield from (part for part in self._own_rows().split(local) if len(part))
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.total, generator=generator)
        for number in range(start, len(self)):
            self.position = number + 1
            # All ranks cut the same global batch, so that training does not depend on their number.
            first = number * self.batch_size + self.rank * local
            yield order[first : first + local]

    def start(self) -> int:
        """Return the number of the first batch of this iteration."""
        (epoch, done), self.resume_at = self.resume_at, (None, 0)
        return done if epoch in (None, self.epoch) and done < len(self) else 0

    def _own_rows(self) -> Tensor:
        return torch.arange(self.total).tensor_split(self.world)[self.rank]


def set_aside(total: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split `total` rows at random: those that remain, and a `share` that is set aside.

    Returns:
        The remaining rows and those set aside, both sorted.

    Raises:
        InputError: If one of the two parts would be empty.
    """
    taken = round(total * share)
    if not 0 < taken < total:
        raise InputError(
            f"{total} images are too few to set ", Key("val_share"), f"={share} of them aside."
        )
    # The plain seed, not a `derive_seed`: published results depend on these validation images.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[taken:].sort().values, order[:taken].sort().values


class ResumableLoader(DataLoader[Batch]):
    """A loader that resumes after the last batch that it returned.

    Lightning stores its state in each checkpoint.

    Args:
        dataset: Dataset that returns whole batches.
        batches: Row numbers of each batch.
        **options: Further arguments of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Batch], batches: EpochBatches, **options: Any) -> None:
        super().__init__(
            dataset, batch_sampler=cast(Any, batches), collate_fn=_keep_batch, **options
        )
        self.batches = batches

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of an evaluation, in order."""
        return self.batches.rows()

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were returned."""
        return {"epoch": self.batches.epoch, "batches": self.batches.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration after the batches that `state` counts."""
        # Earlier versions stored no epoch.
        self.batches.resume_at = state.get("epoch"), state["batches"]


def _keep_batch(batch: Any) -> Any:
    # Not a lambda, because spawned workers pickle it.
    return batch


class StageDataModule(pl.LightningDataModule):
    """Batches of the three splits, for images and for codes alike."""

    datasets: Mapping[str, SplitDataset]
    batch_size_key = "dataset.batch_size"  # key in the config of a stage

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = check_positive("batch_size", batch_size)
        self.eval_batch_size = check_positive("eval_batch_size", eval_batch_size)
        self.seed = seed
        self.datasets = {}

    def train_dataloader(self) -> ResumableLoader:
        """Training batches, shuffled in each epoch; an incomplete last batch is dropped."""
        return self._loader("train", self.batch_size, self.seed)

    def val_dataloader(self) -> ResumableLoader:
        """Validation batches in order; over all ranks, each image comes once."""
        return self.batches("val")

    def test_dataloader(self) -> ResumableLoader:
        """Test batches in order; over all ranks, each image comes once."""
        return self.batches("test")

    def batches(self, split: SplitName) -> ResumableLoader:
        """Batches of any split in order; over all ranks, each image comes once."""
        return self._loader(split, self.eval_batch_size, None)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy the batch to the device, without waiting for earlier work there."""
        labels = None if batch.labels is None else to_device(batch.labels, device)
        return Batch(to_device(batch.data, device), labels)

    def _loader(self, split: str, batch_size: int, seed: int | None) -> ResumableLoader:
        # The number of ranks is known only now. The batch size of an evaluation need not divide.
        if seed is not None:
            check_divides(self.batch_size_key, batch_size, get_rank_and_world()[1])
        return self.datasets[split].loader(batch_size, seed)


class PixelDataModule(StageDataModule):
    """Images for both stages, from arrays or from shards.

    Images are transferred to the device as uint8, then scaled to [-1, 1] and flipped there.

    Attributes:
        image_shape: Shape (C, H, W) of each image.
        class_names: Names of the classes; empty without labels.
        fingerprint: 16 hexadecimal digits that change with any image, label or split.
        pixel_variance: Variance of all values of the training images, scaled to [0, 1]; NMSE is
            the squared error divided by it.
        memory: Bytes of images that each process holds in its own memory.
        mapped: Bytes of images in files that all processes of the machine share.
    """

    size_key = "dataset.source.size"  # key in the config of a stage
    image_shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str
    pixel_variance: float
    memory: int = 0
    mapped: int = 0

    def __init__(
        self, batch_size: int, eval_batch_size: int, flip: bool, val_share: float, seed: int
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        if not check_range("val_share", val_share, 0, 0.5) > 0:
            raise InputError(Key("val_share"), "=0 leaves no images to validate on.")
        self.flip = flip
        self.val_share = val_share

    def setup(self, stage: str | None = None) -> None:
        """Load the splits, unless they are loaded."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Scale images to [-1, 1]; in training, mirror some of them at random if `flip` is set."""
        images = from_uint8(batch.data)
        if self.flip and self.trainer is not None and self.trainer.training:
            # A function of seed and batch, so that a resumed run flips the same images.
            number = self.trainer.fit_loop.total_batch_idx + 1  # number of this batch
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "flip", number))
            drawn = draw_for_batch(partial(torch.rand, generator=generator), len(images))
            where = to_device(drawn < 0.5, images.device)[:, None, None, None]
            images = torch.where(where, images.flip(-1), images)
        return Batch(images, batch.labels)

    def _check_train(self, images: int) -> None:
        if self.batch_size > images:
            raise InputError(
                Key("batch_size"),
                f"={self.batch_size} is larger than the training split: it must be at most its "
                f"{images} images.",
            )

    def _set_pixel_variance(self, counts: Tensor) -> None:
        """Set `pixel_variance` from the histogram (256,) of the values of all training pixels."""
        share, levels = counts.double() / counts.sum(), torch.arange(256).double() / 255
        mean = (share * levels).sum()
        self.pixel_variance = float((share * (levels - mean) ** 2).sum())
        if self.pixel_variance == 0:
            raise InputError("all training pixels are equal: there is nothing to learn.")


class ImageDataModule(PixelDataModule):
    """Images as uint8 arrays, mapped from a file that the processes of a machine share.

    The file is written when a source is first read; see `data.mapped`. Images of a source without
    a stamp, such as your own class, are held in memory.

    Args:
        source: Source of the images.
        batch_size: Images per optimizer step, over all ranks together.
        eval_batch_size: Images per batch in validation, testing and encoding, over all ranks
            together.
        flip: Mirror each training image left to right with probability 1/2.
        val_share: Share of the training images to set aside for validation if the data set has no
            validation split, and for testing if it has no test split.
        split_seed: Seed that chooses them. It is separate from the run's seed, so that all runs
            have the same splits.
        seed: Seed of the order of training batches and of the flips.
        cache_dir: Folder for decoded images if the folder of the source's files cannot be written
            to; None to hold them in memory then.
    """

    datasets: dict[str, ArrayDataset]

    def __init__(
        self,
        source: Source,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        flip: bool = False,
        val_share: float = 0.05,
        split_seed: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, flip, val_share, seed)
        self.source = source
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.split_seed = split_seed

    def prepare_data(self) -> None:
        """Download the data unless decoded images are stored; called by one process per node."""
        with prefix_keys("source"):
            if not self.datasets and not mapped.is_stored(self.source, self.cache_dir):
                self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Map or load the images; missing splits are set aside from the training images."""
        if self.datasets:
            return
        with prefix_keys("source"):
            loaded = mapped.load(self.source, self.cache_dir)
        splits = loaded.splits
        given = dict(zip(("train", "val", "test"), splits[:3], strict=True))
        carved: dict[str, Tensor] = {}
        rows = torch.arange(len(splits.train.images))
        for name, seed in (("test", self.split_seed + 1), ("val", self.split_seed)):
            if given[name] is None:
                rest, aside = set_aside(len(rows), self.val_share, seed)
                carved[name], carved["train"] = rows[aside], rows[rest]
                rows = carved["train"]
        self._check_train(len(rows))
        for name, split in given.items():
            images, labels = split or splits.train
            self.datasets[name] = ArrayDataset(images, labels, carved.get(name))
        self.class_names = splits.class_names
        how = f"{self.val_share} {self.split_seed}" if carved else ""
        whole = splits._replace(class_names=[*splits.class_names, how])
        self.fingerprint = loaded.compute_once(f"fingerprint {how}", whole.fingerprint)
        size = sum(split.images.nbytes for split in given.values() if split is not None)
        self.memory, self.mapped = (size, 0) if loaded.folder is None else (0, size)
        channels, height, width = splits.train.images.shape[1:]
        self.image_shape = channels, height, width
        levels = loaded.compute_once(
            f"levels {how}", partial(_count_levels, splits.train.images, rows)
        )
        self._set_pixel_variance(torch.tensor(levels))


def _count_levels(images: Tensor, rows: Tensor) -> list[int]:
    """Histogram of the 256 pixel values in the given rows of `images`."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in rows.split(rows_per_block(images.shape)):  # `bincount` converts its input to int64
        counts += images[part].flatten().bincount(minlength=256)
    return counts.tolist()
