"""Reading tar shards: which files they are, and their samples."""

import glob
import io
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vqvae_lightning.data.sources.arrays import describe_size, resize
from vqvae_lightning.data.sources.folder import SUFFIXES, decode
from vqvae_lightning.errors import InputError, Key

SCHEMES = ("http", "https", "gs", "hf")  # of those in webdataset; `pipe` would run commands
Sample = dict[str, Any]
"""`__key__`, `__url__`, and the bytes of each file by its lower-case ending."""


class View(NamedTuple):
    """How the files in the shards become images."""

    size: tuple[int, int] | None
    """Height and width to resize and crop to; None keeps the images' size."""
    grey: bool

    @property
    def name(self) -> str:
        """Name of the view, in the name of its index."""
        return f"{describe_size(self.size)}-{'grey' if self.grey else 'rgb'}"

    def decode(self, sample: Sample) -> Tensor:
        """The image of a sample, (C, H, W) uint8.

        Raises:
            InputError: If the sample does not have exactly one readable image.
        """
        found = [ending for ending in sample if f".{ending}" in SUFFIXES]
        if len(found) != 1:
            known = ", ".join(sorted(SUFFIXES))
            raise InputError(
                f"{describe_sample(sample)} has {', '.join(found) or 'no image'} among its files "
                f"({', '.join(list_endings(sample))}): it must have one of {known}."
            )
        file = io.BytesIO(sample[found[0]])
        return resize(decode(file, self.grey, describe_sample(sample)), self.size)[0]


def read_shard(url: str) -> Generator[Sample, None, None]:
    """Read the samples of a shard.

    Raises:
        InputError: If it cannot be read to its end; the message has the last key that was read.
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
        with closing(gopen(url) if is_remote(url) else open(url, "rb")) as opened:
            checked = _CheckedStream(opened)
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": checked}])):
                place = f"after sample {sample['__key__']}"
                yield sample
            checked.check_end()
    except Exception as error:
        # webdataset appends arguments of its own to those of an error.
        reason = error if isinstance(error, OSError) or not error.args else error.args[0]
        raise InputError(f"shard {url} cannot be read {place}: {reason}") from error


class _CheckedStream:
    """A stream that notices incomplete tar files; tarfile takes a bad header for the end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.last = data or self.last
        return data

    def check_end(self) -> None:
        """Raise ValueError unless the rest of the file, and its last block, are zeros."""
        while rest := self.read(2**20):
            if rest.strip(b"\0"):
                raise ValueError("it is damaged")
        if self.last[-512:].strip(b"\0"):
            raise ValueError("it is cut off")


def parse_label(sample: Sample) -> int | None:
    """The class of a sample; None if it has no `.cls`.

    Raises:
        InputError: If its `.cls` is not a class number.
    """
    if "cls" not in sample:
        return None
    text = sample["cls"].decode(errors="replace").strip()
    if not text.isdecimal():
        raise InputError(
            f"{describe_sample(sample)}: its .cls holds {text[:20]!r}, it must be a class number, "
            "from 0."
        )
    return int(text)


def list_shards(key: str, given: str | list[str]) -> list[str]:
    """Paths and URLs of the shards that a config value stands for.

    Args:
        key: Config key, for messages.
        given: Path, glob or URL, with ranges such as `{000000..000146}`; or a list of them.

    Raises:
        InputError: If there are none, a file is missing, or a URL has an unknown scheme.
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
                raise InputError(Key(key), f"={url} must be a path, or start with one of {known}.")
            if scheme != url and "*" in url:
                raise InputError(
                    Key(key), f"={url}: URLs cannot be listed; give a range such as {{000..146}}."
                )
            if scheme != url or Path(url).is_file():
                urls.append(url)
            elif matches := sorted(glob.glob(url)):
                urls += matches
            else:
                raise InputError(Key(key), f"={part}: there is no file {url}.")
    return urls


def is_remote(url: str) -> bool:
    """Whether a shard is behind a URL."""
    return "://" in url


def list_endings(sample: Sample) -> list[str]:
    """Endings of the files of a sample."""
    return [ending for ending in sample if not ending.startswith("__")]


def describe_sample(sample: Sample) -> str:
    """Key and shard of a sample, for messages."""
    return f"sample {sample['__key__']} of shard {sample['__url__']}"
