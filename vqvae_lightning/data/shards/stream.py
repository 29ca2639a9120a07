"""Batches of images read from shards as a stream."""

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
from vqvae_lightning.data.shards.index import Sample, Shard, View, label_of, read_shard
from vqvae_lightning.data.shards.workers import START, _sigterm_held, _start_worker
from vqvae_lightning.errors import InputError
from vqvae_lightning.randomness import stream_seed


class ShardBatches(EpochBatches):
    """Which rows each worker of this rank reads; a function of seed, epoch, ranks and workers.

    In training the shards come in a new order in each epoch; in that order their rows are cut into
    one run per rank and worker, which reads it from end to end and draws from the rows that it has
    read and not given yet. Each rank has the same number of full batches; rows that fill no last
    batch, at most batch_size - 1, are those at the end of this epoch's order. In an evaluation each
    row comes once, the ranks' parts being those of `EpochBatches`.

    It asks for batches by epoch and number. Of W workers, batch n is the next one of worker n % W,
    as `DataLoader` has it.

    Args:
        sizes: Rows of each shard.
        batch_size: Over all ranks together.
        seed: Order of the epochs; None keeps the rows in order.
        workers: Of this rank; 0 for none, which is one stream too.
        held: Rows that a worker draws from.
    """

    def __init__(
        self, sizes: list[int], batch_size: int, seed: int | None, workers: int, held: int
    ) -> None:
        super().__init__(sum(sizes), batch_size, seed)
        self.sizes, self.streams, self.held = sizes, max(1, workers), held

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.resume_at = self.resume_at % max(1, len(self)), 0
        self.position = start  # counted on by the loader: workers run ahead
        yield from ((self.epoch, number) for number in range(start, len(self)))

    def rows(self) -> list[Tensor]:
        """Row numbers of each batch of this epoch, in the loader's order."""
        orders = [self.stream(self.epoch, stream)[1].split(self.local) for stream in self._all()]
        return [
            orders[number % self.streams][number // self.streams] for number in range(len(self))
        ]

    def stream(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The rows that a worker reads, in order; and the same in the order that it gives them."""
        own = self._own()
        if self.seed is not None:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
            shards = torch.arange(self.total).split(self.sizes)
            order = torch.randperm(len(shards), generator=generator)
            first = self.rank * len(self) * self.local
            own = torch.cat([shards[n] for n in order])[first : first + len(self) * self.local]
        batches = [len(range(stream, len(self), self.streams)) for stream in self._all()]
        first = sum(batches[:number]) * self.local
        read = own[first : first + batches[number] * self.local]
        if self.seed is None:
            return read, read
        chance = random.Random(stream_seed(self.seed, "shuffle", epoch, self.rank, number))
        return read, read[
            torch.tensor(list(_drawn(len(read), self.held, chance)), dtype=torch.long)
        ]

    def _all(self) -> range:
        return range(self.streams)


def _drawn(count: int, held: int, chance: random.Random) -> Iterator[int]:
    """0 to `count` - 1 in the order in which a buffer of `held` gives them, filled in order."""
    buffer = list(range(min(held, count)))
    for number in range(len(buffer), count):
        slot = chance.randrange(len(buffer))
        yield buffer[slot]
        buffer[slot] = number
    chance.shuffle(buffer)
    yield from buffer


class ShardReader(Dataset[Any]):
    """Reads the batches that `ShardBatches` asks for; in a worker, which stays at its stream.

    A batch out of turn, as the first one after a resume, opens the stream anew, where what has been
    given already is left out.
    """

    def __init__(self, split: "ShardDataset", batches: ShardBatches) -> None:
        self.split, self.batches = split, batches
        self._next: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, ticket: tuple[int, int]) -> Batch | InputError:
        """The batch, or what is wrong with the shards: an error would lose its shape on its way."""
        epoch, number = ticket
        stream, place = number % self.batches.streams, number // self.batches.streams
        try:
            if self._next != (epoch, stream, place):
                self._open(epoch, stream, place * self.batches.local)
            samples = [self._take(row) for row in islice(self._given, self.batches.local)]
            self._next = epoch, stream, place + 1
            return self.split.batch(samples)
        except InputError as error:
            self._next = None
            return error.with_traceback(None)

    def _open(self, epoch: int, stream: int, given: int) -> None:
        read, order = (rows.tolist() for rows in self.batches.stream(epoch, stream))
        done = set(order[:given])
        self._given = iter(order[given:])
        self._left = len(order) - given
        self._samples = self.split.read(row for row in read if row not in done)
        self._held: dict[int, Sample] = {}

    def _take(self, row: int) -> Sample:
        while row not in self._held:
            found, sample = next(self._samples)
            self._held[found] = sample
        self._left -= 1
        if not self._left:
            self._samples.close()  # or a connection would stay open until the next epoch
        return self._held.pop(row)


class ShardLoader(ResumableLoader):
    """Batches that workers read.

    They are started once per loader.

    Args:
        reader: What each worker has a copy of.
        batches: What to ask it for.
        workers: Processes; 0 reads in this one.
    """

    def __init__(self, reader: ShardReader, batches: ShardBatches, workers: int) -> None:
        options: dict[str, Any] = {
            "num_workers": workers,
            "persistent_workers": True,
            "multiprocessing_context": START,
            "worker_init_fn": _start_worker,
        }
        super().__init__(reader, batches, **(options if workers else {}))

    def __iter__(self) -> Any:
        """This rank's batches.

        Raises:
            InputError: If the shards are not what their index says.
        """
        with _sigterm_held():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, InputError):
                raise InputError(*batch.args)  # `batch` would hold this frame, and the workers
            self.batches.position += 1
            yield batch


class ShardDataset:
    """One split in shards.

    Args:
        shards: In the order of the rows.
        view: How files become images.
        workers: Processes that read.
        held: Images, still packed, that each of them draws from in training.
    """

    def __init__(self, shards: list[Shard], view: View, workers: int, held: int) -> None:
        self.shards, self.view, self.workers, self.held = shards, view, workers, held
        self._starts = [0, *accumulate(shard.images for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def preview(self, count: int) -> Batch:
        """The first `count` images, uint8."""
        return self.batch([sample for _, sample in self.read(range(min(count, len(self))))])

    def loader(self, batch_size: int, seed: int | None) -> ShardLoader:
        """Batches of this rank, as `ShardBatches` has them."""
        sizes = [shard.images for shard in self.shards]
        batches = ShardBatches(sizes, batch_size, seed, self.workers, self.held)
        return ShardLoader(ShardReader(self, batches), batches, self.workers)

    def read(self, rows: Iterable[int]) -> Generator[tuple[int, Sample], None, None]:
        """Rows and their samples, one shard after the other; within each, `rows` must go upwards.

        Raises:
            InputError: If a shard is not what its index says.
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
        """Decode them."""
        labels = [label_of(sample) for sample in samples]
        images = torch.stack([self.view.image(sample) for sample in samples])
        return Batch(images, None if None in labels else torch.tensor(labels))
