"""The LightningDataModule of both stages: one indexing operation per batch of an array."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqvae_lightning.data import mapped
from vqvae_lightning.data.sources.arrays import Source, rows_per_block
from vqvae_lightning.devices import to_device
from vqvae_lightning.distributed import rank_and_world
from vqvae_lightning.errors import InputError, Key, check_positive, check_range, prefix_keys
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.randomness import draw_for_batch, stream_seed

SplitName = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """A batch of either stage."""

    data: Tensor
    """Images (B, C, H, W), float32 in [-1, 1] on the device; or codes (B, h, w) int64."""
    labels: Tensor | None
    """(B,) int64, or None where the set has none."""


def check_divides(key: str, batch_size: int, world: int) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
        InputError: Naming `key` and the nearest sizes that they can.
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
    """One split, in memory or not."""

    def __len__(self) -> int:
        """Images, or their codes."""

    def preview(self, count: int) -> Batch:
        """The first `count` rows, as they are stored."""

    def loader(self, batch_size: int, seed: int | None) -> "ResumableLoader":
        """Batches of this rank: in an order that `seed` decides, or each row once if it is None."""


class ArrayDataset(Dataset[Batch]):
    """Rows of an array and their labels; a whole batch is read by one indexing operation.

    Args:
        array: Images (N, C, H, W) or codes (N, h, w), in memory or mapped from a file.
        labels: (N,) int64, or None where the set has none.
        chosen: Rows of the split (n,) int64; None for all.
    """

    def __init__(self, array: Any, labels: Tensor | None, chosen: Tensor | None = None) -> None:
        self.array = array
        self.chosen = chosen
        self.labels = labels if labels is None or chosen is None else labels[chosen]

    def __len__(self) -> int:
        return len(self.array if self.chosen is None else self.chosen)

    @property
    def data(self) -> Any:
        """All rows; copied where the split is some rows of the array."""
        return self.array if self.chosen is None else self.array[self.chosen.numpy()]

    def __getitems__(self, rows: Tensor) -> Batch:
        """The batch with these rows."""
        # As an array: numpy takes a tensor of one element for a number, and drops a dimension.
        places = rows if self.chosen is None else self.chosen[rows]
        data = torch.as_tensor(self.array[places.numpy()])
        return Batch(data, None if self.labels is None else self.labels[rows])

    def preview(self, count: int) -> Batch:
        """The first `count` rows."""
        return self.__getitems__(torch.arange(min(count, len(self))))

    def loader(self, batch_size: int, seed: int | None) -> "ResumableLoader":
        """Batches of this rank, as `EpochBatches` has them."""
        return ResumableLoader(self, EpochBatches(len(self), batch_size, seed))


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
        return -(-len(self._own()) // self.local)

    @property
    def local(self) -> int:
        """Rows of a full batch of this rank."""
        return max(1, self.batch_size // self.world)

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of an evaluation, in the loader's order."""
        return list(self)

    def __iter__(self) -> Iterator[Any]:
        start, self.resume_at = self.resume_at % max(1, len(self)), 0
        local = self.local
        if self.seed is None:
            # A split may have fewer rows than there are ranks.
            yield from (part for part in self._own().split(local) if len(part))
            return
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.total, generator=generator)
        for number in range(start, len(self)):
            self.position = number + 1
            # Ranks cut one global batch, so that what is learnt does not depend on their number.
            first = number * self.batch_size + self.rank * local
            yield order[first : first + local]

    def _own(self) -> Tensor:
        return torch.arange(self.total).tensor_split(self.world)[self.rank]


def set_aside(total: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows that stay, and `share` of them that `seed` sets aside; both in order.

    Raises:
        InputError: If that leaves one of them empty.
    """
    taken = round(total * share)
    if not 0 < taken < total:
        raise InputError(
            f"{total} images are too few to set ", Key("val_share"), f"={share} of them aside."
        )
    # The seed as it is, not a `stream_seed`: published results name these validation images.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[taken:].sort().values, order[:taken].sort().values


class ResumableLoader(DataLoader[Batch]):
    """A loader that goes on after the last batch it gave.

    Lightning stores its state in each checkpoint.

    Args:
        dataset: Gives whole batches.
        batches: What to ask it for.
        **options: Of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Batch], batches: EpochBatches, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=cast(Any, batches), collate_fn=_as_it_is, **options)
        self.batches = batches

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of an evaluation, in order."""
        return self.batches.rows()

    def state_dict(self) -> dict[str, int]:
        """Batches given in this epoch."""
        return {"batches": self.batches.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin after the batches of `state`."""
        self.batches.resume_at = state["batches"]


def _as_it_is(batch: Any) -> Any:
    # A function with a name, which can be sent to a worker.
    return batch


class StageDataModule(pl.LightningDataModule):
    """Batches of the three splits, for images and for codes alike."""

    datasets: Mapping[str, SplitDataset]
    batch_size_key = "dataset.batch_size"  # in the config of a stage

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = check_positive("batch_size", batch_size)
        self.eval_batch_size = check_positive("eval_batch_size", eval_batch_size)
        self.seed = seed
        self.datasets = {}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled anew in each epoch; a last batch that is not full is left for a later epoch."""
        return self._loader("train", self.batch_size, self.seed)

    def val_dataloader(self) -> ResumableLoader:
        """In order; each image once, over all ranks."""
        return self.batches("val")

    def test_dataloader(self) -> ResumableLoader:
        """In order; each image once, over all ranks."""
        return self.batches("test")

    def batches(self, split: SplitName) -> ResumableLoader:
        """Any split in order, each image once."""
        return self._loader(split, self.eval_batch_size, None)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """To the device, which need not have finished what it was given before."""
        labels = None if batch.labels is None else to_device(batch.labels, device)
        return Batch(to_device(batch.data, device), labels)

    def _loader(self, split: str, batch_size: int, seed: int | None) -> ResumableLoader:
        # Checked here, where the number of ranks is known. Batches of an evaluation change nothing.
        if seed is not None:
            check_divides(self.batch_size_key, batch_size, rank_and_world()[1])
        return self.datasets[split].loader(batch_size, seed)


class PixelDataModule(StageDataModule):
    """Images for both stages, from memory or from shards.

    Images stay uint8 on the bus; they are scaled to [-1, 1], and flipped, on the device.

    Attributes:
        image_shape: (C, H, W).
        class_names: Empty without labels.
        fingerprint: 16 hexadecimal digits that change with any image, label or split.
        pixel_variance: Of all values of the training images, in [0, 1]: the divisor of NMSE.
        memory: Bytes that the images take in each process.
        mapped: Bytes of images in files that all processes of the machine share.
    """

    size_key = "dataset.source.size"  # in the config of a stage
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
        """Make the splits known, once."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """To [-1, 1] and, in training, flipped; on the device."""
        images = from_uint8(batch.data)
        if self.flip and self.trainer is not None and self.trainer.training:
            # A function of seed and batch, so that a resumed run flips what the first would have.
            number = self.trainer.fit_loop.total_batch_idx + 1  # of the batch that comes now
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "flip", number))
            drawn = draw_for_batch(partial(torch.rand, generator=generator), len(images))
            where = to_device(drawn < 0.5, images.device)[:, None, None, None]
            images = torch.where(where, images.flip(-1), images)
        return Batch(images, batch.labels)

    def _check_train(self, images: int) -> None:
        if self.batch_size > images:
            raise InputError(
                Key("batch_size"),
                f"={self.batch_size} is larger than the training split ({images} images): it must "
                "be at most that.",
            )

    def _take_levels(self, counts: Tensor) -> None:
        """Take the variance from how often each of the 256 levels occurs in training images."""
        share, levels = counts.double() / counts.sum(), torch.arange(256).double() / 255
        mean = (share * levels).sum()
        self.pixel_variance = float((share * (levels - mean) ** 2).sum())
        if self.pixel_variance == 0:
            raise InputError("all training pixels are equal: there is nothing to learn.")


class ImageDataModule(PixelDataModule):
    """Images as uint8 arrays, mapped from a file that the processes of a machine share.

    The file is made when a source is first read; see `data.mapped`. A source without a stamp, such
    as a class of your own, is held in memory.

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
        cache_dir: Folder to store decoded images in, where nothing can be written beside the
            source's files; None to hold them in memory then.
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
        """Download, in one process per node; not where the images are stored already."""
        with prefix_keys("source"):
            if not self.datasets and not mapped.is_stored(self.source, self.cache_dir):
                self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Map or load the images; missing splits are rows of the training images."""
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
        self.fingerprint = loaded.fact(f"fingerprint {how}", whole.fingerprint)
        size = sum(split.images.nbytes for split in given.values() if split is not None)
        self.memory, self.mapped = (size, 0) if loaded.folder is None else (0, size)
        channels, height, width = splits.train.images.shape[1:]
        self.image_shape = channels, height, width
        levels = loaded.fact(f"levels {how}", partial(_levels, splits.train.images, rows))
        self._take_levels(torch.tensor(levels))


def _levels(images: Tensor, rows: Tensor) -> list[int]:
    """How often each of the 256 values occurs in the pixels of some rows of `images`."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in rows.split(rows_per_block(images.shape)):  # `bincount` makes int64 of its input
        counts += images[part].flatten().bincount(minlength=256)
    return counts.tolist()
