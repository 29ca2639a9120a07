"""Images out of tar shards in WebDataset's layout: read as a stream, never all held in memory."""

import glob
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqvae_lightning.data.images import Batch, EpochBatches, PixelDataModule, ResumableLoader
from vqvae_lightning.data.sources import SUFFIXES, check_size, decode, resize
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.progress import progress_bar
from vqvae_lightning.randomness import stream_seed
from vqvae_lightning.results import replacing, write_text

SCHEMES = ("http", "https", "gs", "hf")  # of webdataset; not `pipe`, which would run commands
# A new interpreter takes seconds to import torch, for each worker of each loader. Workers use no
# GPU, print nothing and compute on one thread: what makes a fork unsafe they keep away from.
START = "fork" if sys.platform == "linux" else "spawn"
Sample = dict[str, Any]


class View(NamedTuple):
    """How the files in the shards become images."""

    size: tuple[int, int] | None
    """Height and width to resize and crop to; None keeps the images."""
    grey: bool

    @property
    def name(self) -> str:
        """Of the index: what it counts depends on the view."""
        size = "whole" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        return f"{size}-{'grey' if self.grey else 'rgb'}"

    def image(self, sample: Sample) -> Tensor:
        """(C, H, W) uint8.

        Raises:
            InputError: If the sample does not have one readable image.
        """
        found = [ending for ending in sample if f".{ending}" in SUFFIXES]
        if len(found) != 1:
            known = ", ".join(sorted(SUFFIXES))
            raise InputError(
                f"{_where(sample)} has {', '.join(found) or 'no image'} among its files "
                f"({', '.join(_endings(sample))}): it must have one of {known}."
            )
        file = io.BytesIO(sample[found[0]])
        return resize(decode(file, self.grey, _where(sample)), self.size)[0]


class Shard(NamedTuple):
    """What the index knows of a tar file."""

    url: str
    images: int
    shape: tuple[int, int, int]
    labels: dict[str, int] | None
    """Images of each label; None where they have none."""
    levels: list[int]
    """How often each of the 256 values occurs in the pixels."""
    digest: str
    """Of all files of its samples."""


def read_shard(url: str) -> Generator[Sample, None, None]:
    """The samples of a shard: `__key__`, `__url__`, and the files' bytes by lower-case ending.

    Raises:
        InputError: If it cannot be read to its end, with the last key that could be.
    """
    try:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError as error:
        raise InputError(
            "dataset=shards needs the package webdataset: install the extra `shards`."
        ) from error
    place = "at its start"
    try:
        with closing(gopen(url) if _is_remote(url) else open(url, "rb")) as opened:
            watched = _Watched(opened)
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": watched}])):
                place = f"after sample {sample['__key__']}"
                yield sample
            watched.check_end()
    except Exception as error:
        # webdataset adds its own arguments to an error's.
        said = error if isinstance(error, OSError) or not error.args else error.args[0]
        raise InputError(f"shard {url} cannot be read {place}: {said}") from error


class _Watched:
    """A stream that knows whether a tar file came whole; tarfile takes a bad header for the end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.last = data or self.last
        return data

    def check_end(self) -> None:
        """Raise unless all that is left, and the last block of all, is zeros."""
        while rest := self.read(2**20):
            if rest.strip(b"\0"):
                raise ValueError("it is damaged")
        if self.last[-512:].strip(b"\0"):
            raise ValueError("it is cut off")


def label_of(sample: Sample) -> int | None:
    """The sample's class; None without one.

    Raises:
        InputError: If it is no class number.
    """
    if "cls" not in sample:
        return None
    text = sample["cls"].decode(errors="replace").strip()
    if not text.isdecimal():
        raise InputError(
            f"{_where(sample)}: its .cls says {text[:20]!r}, it must be a class number, from 0."
        )
    return int(text)


def scan_shard(url: str, view: View) -> Shard:
    """Read a whole shard for the index.

    Raises:
        InputError: If anything in it cannot be used; with file and key.
    """
    shape: tuple[int, ...] | None = None
    levels, digest = np.zeros(256, np.int64), hashlib.sha256()
    labels: Counter[int | None] = Counter()
    for sample in read_shard(url):
        image, label = view.image(sample), label_of(sample)
        shape = shape or tuple(image.shape)
        if tuple(image.shape) != shape:
            raise InputError(
                f"{_where(sample)} is {tuple(image.shape[1:])} pixels and the first image of the "
                f"shard {shape[1:]}: set ",
                Key("size"),
                " to bring them to one size.",
            )
        labels[label] += 1
        if None in labels and len(labels) > 1:
            has = "no .cls" if label is None else "a .cls"
            raise InputError(f"{_where(sample)} has {has}, unlike those before it.")
        levels += np.bincount(image.flatten().numpy(), minlength=256)
        for ending in _endings(sample):
            digest.update(f"{ending} {len(sample[ending])} ".encode() + sample[ending])
    if shape is None:
        raise InputError(f"shard {url} holds no samples.")
    counted = {str(label): count for label, count in sorted(labels.items()) if label is not None}
    channels, height, width = shape
    return Shard(
        url,
        labels.total(),
        (channels, height, width),
        None if None in labels else counted,
        levels.tolist(),
        digest.hexdigest(),
    )


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


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Let workers start with SIGTERM blocked, in threads too that a library starts at the fork."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(number: int) -> None:
    """Leave signals to the process that trains: it may want batches until it has saved."""
    torch.set_num_threads(1)  # others that the parent had do not survive a fork
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first one only
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """End at the SIGTERM with which the process that trains ends its workers; at no other's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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


class ShardDataModule(PixelDataModule):
    """Images out of tar shards, for sets that do not fit in memory.

    A shard is a tar file of samples in WebDataset's layout: `KEY.png` (or another image) and, for
    classes, `KEY.cls` with a number from 0. `vqvae-shards` writes them. Where a split is not given,
    whole shards at the end of the training shards are set aside, so these should have been written
    in a random order.

    An index (how many images, of which size and classes, the values of their pixels) is made in one
    pass over all shards when they are first used. It is kept beside them, or in `index_dir` where
    nothing can be written there, and made anew for files that changed; files behind a URL are taken
    never to.

    Args:
        root: Folder with `train-*.tar` and, if there are, `val-*.tar` and `test-*.tar`; null if
            `train` is given.
        train: Shards: paths or URLs, with `{000000..000146}` for a range or `*`; or a list of them.
        val: Likewise.
        test: Likewise.
        size: Side, or [height, width]: the shorter side is resized and the centre cropped. None if
            all images have one size already.
        grey: Whether to read grey images instead of RGB.
        classes: File with the name of a class on each line; null: `classes.txt` beside the training
            shards, or else the classes are called by their numbers.
        index_dir: For indexes that cannot be kept beside the shards.
        num_workers: Processes that read and decode, for each rank; 0 to do without.
        shuffle: Images that each of them holds, still packed, to draw the next one from. The order
            of an epoch is that of the shards, drawn anew, and this drawing.
        batch_size: Images per optimizer step, over all ranks together.
        eval_batch_size: Images per batch in validation, testing and encoding, over all ranks
            together.
        flip: Mirror each training image left to right with probability 1/2.
        val_share: Share of the training images set aside, at least, for each split not given.
        seed: Order of the training batches and flips.
    """

    size_key = "dataset.size"

    def __init__(
        self,
        root: str | None = None,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        size: int | Sequence[int] | None = None,
        grey: bool = False,
        classes: str | None = None,
        index_dir: str = "data/shards",
        num_workers: int = 4,
        shuffle: int = 5000,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        flip: bool = False,
        val_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, flip, val_share, seed)
        if (root is None) == (train is None):
            raise InputError(
                Key("root"),
                f"={root}, ",
                Key("train"),
                f"={train}: give one of them, the folder of the shards or the shards.",
            )
        self.root = root
        self.given = {"train": train, "val": val, "test": test}
        self.view = View(check_size(size), grey)
        self.classes = classes
        self.index_dir = Path(index_dir)
        self.num_workers = int(check_range("num_workers", num_workers, 0))
        self.shuffle = check_positive("shuffle", shuffle)

    def prepare_data(self) -> None:
        """Make the index, unless it is there."""
        self._indexed()

    def setup(self, stage: str | None = None) -> None:
        """Read the index, and make it first if need be."""
        if self.datasets:
            return
        splits = self._indexed()
        for name in ("test", "val"):
            if name not in splits:
                splits["train"], splits[name] = self._set_aside(name, splits["train"])
        self._check_train(sum(shard.images for shard in splits["train"]))
        everything = [shard for name in ("train", "val", "test") for shard in splits[name]]
        self.image_shape = everything[0].shape
        for shard in everything:
            if shard.shape != self.image_shape:
                raise InputError(
                    f"the images of shard {shard.url} are {shard.shape[1:]} pixels, those of "
                    f"{everything[0].url} {self.image_shape[1:]}: set ",
                    Key("size"),
                    " to bring them to one size.",
                )
        self.class_names = self._names(everything)
        self._take_levels(torch.tensor([shard.levels for shard in splits["train"]]).sum(0))
        digests = {name: [shard.digest for shard in shards] for name, shards in splits.items()}
        facts = [sorted(digests.items()), self.view, self.class_names]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.datasets = {
            name: ShardDataset(splits[name], self.view, self.num_workers, self.shuffle)
            for name in ("train", "val", "test")
        }

    def _indexed(self) -> dict[str, list[Shard]]:
        """The shards of each split that is given."""
        listed = {name: self._listed(name) for name in self.given}
        urls = {name: found for name, found in listed.items() if found}
        together = [url for listed in urls.values() for url in listed]
        twice = [url for url, count in Counter(together).items() if count > 1]
        if twice:
            raise InputError(f"shard {twice[0]} is given twice: an image belongs to one split.")
        found: dict[str, Shard] = {}
        for folder in sorted({url.rpartition("/")[0] for url in together}):
            inside = [url for url in together if url.rpartition("/")[0] == folder]
            found |= self._index(folder, inside)
        return {name: [found[url] for url in listed] for name, listed in urls.items()}

    def _listed(self, name: str) -> list[str]:
        """The shards of a split, given or in `root`; none if it must be set aside."""
        given = self.given[name]
        if given or self.root is None:
            return shard_urls(name, given) if given else []
        if _is_remote(self.root):
            said = f"={self.root}: nothing lists URLs; give "
            raise InputError(Key("root"), said, Key("train"), " with a range, {000..146}.")
        # The folder's name is no pattern, whatever characters it has.
        found = sorted(glob.glob(f"{glob.escape(self.root)}/{name}-*.tar"))
        if name == "train" and not found:
            said = f"={self.root}: there is no file {self.root}/train-*.tar."
            raise InputError(Key("root"), said)
        return found

    def _index(self, folder: str, urls: list[str]) -> dict[str, Shard]:
        """The index of the shards of a folder, completed."""
        file = f"index-{self.view.name}.json"
        own = self.index_dir / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
        beside = None if _is_remote(folder) else Path(folder or ".") / file
        stored = {**_stored(beside), **_stored(own)}
        stamps = {url: _stamp(url) for url in urls}
        known: dict[str, Shard] = {}
        for url in urls:
            entry = stored.get(url.rpartition("/")[2])
            # One of other fields, as another version may have written, is made anew.
            whole = {*Shard._fields, "stamp"} - {"url"}
            if entry is None or entry.keys() != whole:
                continue
            if entry["stamp"] == stamps[url]:
                fields = {**entry, "url": url, "shape": tuple(entry["shape"])}
                del fields["stamp"]
                known[url] = Shard(**fields)
        missing = [url for url in urls if url not in known]
        if not missing:
            return known
        try:
            with progress_bar("indexing the shards", None) as advance:
                for shard in _scanned(missing, self.view, self.num_workers):
                    known[shard.url] = shard
                    advance(shard.images)
        finally:
            # After an interruption too: what has been read need not be read again.
            entries = dict(stored)
            for url, shard in known.items():
                entry = {**shard._asdict(), "stamp": stamps[url]}
                del entry["url"]
                entries[url.rpartition("/")[2]] = entry
            writable = beside is not None and os.access(beside.parent, os.W_OK)
            write_text(beside if beside is not None and writable else own, json.dumps(entries))
        return known

    def _set_aside(self, name: str, shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
        """The training shards without the last ones, and these."""
        wanted = sum(shard.images for shard in shards) * self.val_share
        taken = count = 0
        while count < wanted:
            taken += 1
            count += shards[-taken].images
        if taken == len(shards):
            raise InputError(
                Key(name),
                f"=null sets whole training shards aside, but there are only {len(shards)}: give ",
                Key(name),
                ", or write smaller shards.",
            )
        aside = shards[-taken:]
        classes = [{label for s in part for label in s.labels or ()} for part in (shards, aside)]
        if len(classes[1]) == 1 < len(classes[0]):
            raise InputError(
                Key(name),
                "=null sets the last training shards aside, but all their images are of class "
                f"{classes[1].pop()}: the shards were written class by class; give ",
                Key(name),
                ", or write them in a random order.",
            )
        return shards[:-taken], aside

    def _names(self, shards: list[Shard]) -> list[str]:
        """Names of the classes; empty without labels."""
        labelled = [shard for shard in shards if shard.labels is not None]
        if not labelled:
            return []
        bare = next((shard for shard in shards if shard.labels is None), None)
        if bare is not None:
            raise InputError(f"the images of shard {bare.url} have no .cls, unlike others.")
        top = max(int(label) for shard in shards for label in shard.labels or ())
        if top >= (total := sum(shard.images for shard in shards)):
            raise InputError(
                f"class {top} of a .cls is above the number of images ({total}): classes count "
                "from 0."
            )
        beside = Path(shards[0].url).with_name("classes.txt")
        path = Path(self.classes) if self.classes is not None else beside
        if self.classes is None and (_is_remote(shards[0].url) or not beside.is_file()):
            return [str(number) for number in range(top + 1)]
        try:
            names = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(Key("classes"), f"={path} cannot be read: {error}") from error
        names = [name.strip() for name in names if name.strip()]
        if top >= len(names):
            shard = next(s for s in labelled if any(int(n) >= len(names) for n in s.labels or ()))
            sample = next(s for s in read_shard(shard.url) if (label_of(s) or 0) >= len(names))
            raise InputError(
                f"{_where(sample)}: class {label_of(sample)} has no name in {path}, which has "
                f"{len(names)}."
            )
        return names


def shard_urls(key: str, given: str | list[str]) -> list[str]:
    """The shards that a config value stands for.

    Raises:
        InputError: If there are none, one is missing, or a URL is of an unknown kind.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise InputError(
            "dataset=shards needs the package webdataset: install the extra `shards`."
        ) from error
    urls: list[str] = []
    for part in [given] if isinstance(given, str) else given:
        try:
            expanded = expand_urls(part)
        except ValueError as error:
            raise InputError(Key(key), f"={part}: {error}") from error
        for url in expanded:
            scheme = url.partition("://")[0]
            if scheme != url and scheme not in SCHEMES:
                known = ", ".join(f"{name}://" for name in SCHEMES)
                said = f"={url} must be a path, or start with one of {known}."
                raise InputError(Key(key), said)
            if scheme != url and "*" in url:
                said = f"={url}: nothing lists URLs; give a range, {{000..146}}."
                raise InputError(Key(key), said)
            if scheme != url or Path(url).is_file():
                urls.append(url)
            elif matches := sorted(glob.glob(url)):
                urls += matches
            else:
                raise InputError(Key(key), f"={part}: there is no file {url}.")
    return urls


def write_shards(
    samples: Iterable[tuple[str, bytes, int | None]],
    folder: Path,
    name: str,
    per_shard: int,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Write `NAME-000000.tar` and on.

    Args:
        samples: Ending (such as `png`), contents and label (or None) of each image, in order.
        folder: Where to.
        name: Of the split.
        per_shard: Images in each shard but the last.
        advance: Called with the number of images just written.

    Returns:
        Number of shards.
    """
    from webdataset.writer import TarWriter

    shards = 0
    for number, part in groupby(enumerate(samples), lambda item: item[0] // per_shard):
        with (
            replacing(folder / f"{name}-{number:06d}.tar") as path,
            open(path, "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,  # a time would change the bytes
        ):
            for key, (ending, contents, label) in part:
                cls = {} if label is None else {"cls": str(label).encode()}
                tar.write({"__key__": f"{name}-{key:09d}", ending: contents, **cls})
                advance(1)
        shards += 1
    return shards


def png(image: Tensor) -> bytes:
    """An image (C, H, W) uint8 as the contents of a PNG file."""
    file = io.BytesIO()
    array = image.movedim(0, -1).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()


def _scanned(urls: list[str], view: View, workers: int) -> Iterator[Shard]:
    scan = partial(scan_shard, view=view)
    if workers < 2 or len(urls) < 2:
        yield from map(scan, urls)
        return
    context = multiprocessing.get_context(START)
    with ProcessPoolExecutor(min(workers, len(urls)), context, _start_worker, (0,)) as pool:
        try:
            yield from pool.map(scan, urls)
        finally:
            pool.shutdown(cancel_futures=True)


def _stored(path: Path | None) -> dict[str, Any]:
    """Entries of an index; a damaged one is made anew."""
    try:
        entries = json.loads(path.read_text()) if path is not None else {}
        return {url: entry for url, entry in entries.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _stamp(url: str) -> list[int] | None:
    """What changes with a file; None where nothing tells."""
    if _is_remote(url):
        return None
    status = os.stat(url)
    return [status.st_size, status.st_mtime_ns]


def _is_remote(url: str) -> bool:
    return "://" in url


def _endings(sample: Sample) -> list[str]:
    return [ending for ending in sample if not ending.startswith("__")]


def _where(sample: Sample) -> str:
    return f"sample {sample['__key__']} of shard {sample['__url__']}"
