"""The index of tar shards: which images each shard holds."""

import glob
import hashlib
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vqvae_lightning.data.shards.workers import START, _start_worker
from vqvae_lightning.data.sources.arrays import resize
from vqvae_lightning.data.sources.folder import SUFFIXES, decode
from vqvae_lightning.errors import InputError, Key

SCHEMES = ("http", "https", "gs", "hf")  # of webdataset; not `pipe`, which would run commands
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
