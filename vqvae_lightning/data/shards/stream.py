"""Batches of images that worker processes stream from shards."""

import random
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import accumulate, groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqvae_lightning.data.images import Batch, EpochBatches, ResumableLoader
from vqvae_lightning.data.shards.index import Shard
from vqvae_lightning.data.shards.read import Sample, View, parse_label, read_shard
from vqvae_lightning.data.shards.workers import START, block_sigterm, init_worker
from vqvae_lightning.errors import InputError
from vqvae_lightning.randomness import derive_seed


class ShardBatches(EpochBatches):
    """Which rows each worker of this rank reads; a function of seed, epoch, ranks and workers.

    In training, the shards are shuffled in each epoch. Their rows, in that order, are cut into one
    contiguous part per rank and worker. The worker reads its part from start to end and shuffles it
    through a buffer. Each rank has the same number of full batches; the rows at the end of the
    epoch's order that do not fill a batch, at most batch_size - 1, are dropped. In an evaluation
    each row comes once, and the ranks have the parts of `EpochBatches`.

    The items are tickets (epoch, batch number) instead of rows. With W workers, batch n is read by
    worker n % W, as in `DataLoader`.

    Args:
        sizes: Number of rows of each shard.
        batch_size: Rows per batch, over all ranks together.
        seed: Seed of the order of each epoch; None keeps the rows in order.
        workers: Number of workers of this rank; 0 reads one stream in this process.
        buffer_size: Number of rows in a worker's shuffle buffer.
    """

    def __init__(
        self, sizes: list[int], batch_size: int, seed: int | None, workers: int, buffer_size: int
    ) -> None:
        super().__init__(sum(sizes), batch_size, seed)
        self.sizes, self.streams, self.buffer_size = sizes, max(1, workers), buffer_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # The loader counts on from here, because workers run ahead.
        self.position = start = self.start()
        yield from ((self.epoch, number) for number in range(start, len(self)))

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of this epoch, in order."""
        orders = [
            self.order_stream(self.epoch, stream)[1].split(self.local)
            for stream in range(self.streams)
        ]
        return [
            orders[number % self.streams][number // self.streams] for number in range(len(self))
        ]

    def order_stream(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The rows of a worker in the order in which it reads them, and in that of its batches."""
        own = self._own_rows()
        if self.seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            shards = torch.arange(self.total).split(self.sizes)
            order = torch.randperm(len(shards), generator=generator)
            first = self.rank * len(self) * self.local
            own = torch.cat([shards[n] for n in order])[first : first + len(self) * self.local]
        batches = [len(range(stream, len(self), self.streams)) for stream in range(self.streams)]
        first = sum(batches[:number]) * self.local
        read = own[first : first + batches[number] * self.local]
        if self.seed is None:
            return read, read
        chance = random.Random(derive_seed(self.seed, "shuffle", epoch, self.rank, number))
        returned = list(_shuffle_in_buffer(len(read), self.buffer_size, chance))
        return read, read[torch.tensor(returned, dtype=torch.long)]


def _shuffle_in_buffer(count: int, size: int, chance: random.Random) -> Iterator[int]:
    """The numbers 0 to `count` - 1, shuffled by a buffer of `size` that is filled in order."""
    buffer = list(range(min(size, count)))
    for number in range(len(buffer), count):
        slot = chance.randrange(len(buffer))
        yield buffer[slot]
        buffer[slot] = number
    chance.shuffle(buffer)
    yield from buffer


class ShardReader(Dataset[Any]):
    """Reads the batches of `ShardBatches`; each worker has a copy and keeps its stream open.

    For a batch out of order, such as the first after a resume, it opens the stream again and skips
    the rows that earlier batches have returned.
    """

    def __init__(self, split: "ShardDataset", batches: ShardBatches) -> None:
        self.split, self.batches = split, batches
        self._next: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, ticket: tuple[int, int]) -> Batch | InputError:
        """The batch, or an error as a value; an error raised in a worker would change its type."""
        epoch, number = ticket
        stream, place = number % self.batches.streams, number // self.batches.streams
        try:
            if self._next != (epoch, stream, place):
                self._open(epoch, stream, place * self.batches.local)
            samples = [self._take(row) for row in islice(self._remaining, self.batches.local)]
            self._next = epoch, stream, place + 1
            return self.split.batch(samples)
        except InputError as error:
            self._next = None
            return error.with_traceback(None)

    def _open(self, epoch: int, stream: int, returned: int) -> None:
        read, order = (rows.tolist() for rows in self.batches.order_stream(epoch, stream))
        done = set(order[:returned])
        self._remaining = iter(order[returned:])
        self._left = len(order) - returned
        self._samples = self.split.read(row for row in read if row not in done)
        self._buffer: dict[int, Sample] = {}

    def _take(self, row: int) -> Sample:
        while row not in self._buffer:
            found, sample = next(self._samples)
            self._buffer[found] = sample
        self._left -= 1
        if not self._left:
            self._samples.close()  # otherwise a connection would stay open until the next epoch
        return self._buffer.pop(row)


class ShardLoader(ResumableLoader):
    """Batches that workers read; the workers are started once per loader.

    Args:
        reader: Reader, copied to each worker.
        batches: Order of the batches.
        workers: Number of worker processes; 0 reads in this one.
    """

    def __init__(self, reader: ShardReader, batches: ShardBatches, workers: int) -> None:
        options: dict[str, Any] = {
            "num_workers": workers,
            "persistent_workers": True,
            "multiprocessing_context": START,
            "worker_init_fn": init_worker,
        }
        super().__init__(reader, batches, **(options if workers else {}))

    def __iter__(self) -> Any:
        """Iterate over the batches of this rank.

        Raises:
            InputError: If the shards differ from their index.
        """
        with block_sigterm():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, InputError):
                # Raising `batch` itself would keep this frame, and so the workers, alive.
                raise InputError(*batch.args)
            self.batches.position += 1
            yield batch


class ShardDataset:
    """One split in shards.

    Args:
        shards: Entries of the index, in the order of the rows.
        view: How files become images.
        workers: Number of worker processes.
        buffer_size: Number of encoded images in each worker's shuffle buffer.
    """

    def __init__(self, shards: list[Shard], view: View, workers: int, buffer_size: int) -> None:
        self.shards, self.view, self.workers = shards, view, workers
        self.buffer_size = buffer_size
        self._starts = [0, *accumulate(shard.images for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def preview(self, count: int) -> Batch:
        """The first `count` images, uint8, and their labels."""
        return self.batch([sample for _, sample in self.read(range(min(count, len(self))))])

    def loader(self, batch_size: int, seed: int | None) -> ShardLoader:
        """Batches of this rank in the order of `ShardBatches`."""
        sizes = [shard.images for shard in self.shards]
        batches = ShardBatches(sizes, batch_size, seed, self.workers, self.buffer_size)
        return ShardLoader(ShardReader(self, batches), batches, self.workers)

    def read(self, rows: Iterable[int]) -> Generator[tuple[int, Sample], None, None]:
        """Read rows and their samples, shard by shard; within a shard, `rows` must be ascending.

        Raises:
            InputError: If a shard has fewer samples than its index says.
        """
        for number, wanted in groupby(rows, lambda row: bisect_right(self._starts, row) - 1):
            shard = self.shards[number]
            with closing(read_shard(shard.url)) as samples:
                numbered = enumerate(samples, self._starts[number])
                for row in wanted:
                    sample = next((sample for at, sample in numbered if at == row), None)
                    if sample is None:
                        raise InputError(
                            f"shard {shard.url} has fewer samples than its index says "
                            f"({shard.images}): has it changed? Delete the index."
                        )
                    yield row, sample

    def batch(self, samples: list[Sample]) -> Batch:
        """Decode samples into a batch."""
        labels = [parse_label(sample) for sample in samples]
        images = torch.stack([self.view.decode(sample) for sample in samples])
        return Batch(images, None if None in labels else torch.tensor(labels))
