"""The index of tar shards: how many images each has, of which size, classes and pixel values."""

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.shards.read import (
    View,
    describe_sample,
    is_remote,
    list_endings,
    parse_label,
    read_shard,
)
from vqvae_lightning.data.shards.workers import START, init_worker
from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.files import write_text


class Shard(NamedTuple):
    """Entry of the index for one tar file."""

    url: str
    images: int
    shape: tuple[int, int, int]
    """(C, H, W) of every image."""
    labels: dict[str, int] | None
    """Number of images of each label; None without labels."""
    levels: list[int]
    """Histogram of the 256 pixel values."""
    digest: str
    """SHA-256 of the files of all samples."""


def index_folder(
    folder: str, urls: list[str], view: View, index_dir: Path, workers: int
) -> dict[str, Shard]:
    """The entries of the shards `urls`, all in `folder`; missing ones are made and stored.

    Args:
        folder: Folder of the shards, or the URL up to their names.
        urls: Paths or URLs of the shards.
        view: How the files become images.
        index_dir: Folder for the index if `folder` cannot be written to.
        workers: Processes that read shards; 0 reads in this one.

    Raises:
        InputError: If a shard cannot be used.
    """
    file = f"index-{view.name}.json"
    fallback = index_dir / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
    local = None if is_remote(folder) else Path(folder or ".") / file
    stored = {**_read_index(local), **_read_index(fallback)}
    stamps = {url: _stamp_shard(url) for url in urls}
    known: dict[str, Shard] = {}
    for url in urls:
        entry = stored.get(url.rpartition("/")[2])
        # An entry with other fields, from another version, is made again.
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
        with show_progress("indexing the shards", None) as advance:
            for shard in _scan_shards(missing, view, workers):
                known[shard.url] = shard
                advance(shard.images)
    finally:
        # Also after an interruption, so that finished shards need not be read again.
        entries = dict(stored)
        for url, shard in known.items():
            entry = {**shard._asdict(), "stamp": stamps[url]}
            del entry["url"]
            entries[url.rpartition("/")[2]] = entry
        writable = local is not None and os.access(local.parent, os.W_OK)
        write_text(local if local is not None and writable else fallback, json.dumps(entries))
    return known


def scan_shard(url: str, view: View) -> Shard:
    """Read a whole shard for its entry in the index.

    Raises:
        InputError: If anything in it cannot be used; the message names the shard and the sample.
    """
    shape: tuple[int, ...] | None = None
    levels, digest = np.zeros(256, np.int64), hashlib.sha256()
    labels: Counter[int | None] = Counter()
    for sample in read_shard(url):
        image, label = view.decode(sample), parse_label(sample)
        shape = shape or tuple(image.shape)
        if tuple(image.shape) != shape:
            raise InputError(
                f"{describe_sample(sample)} has {tuple(image.shape[1:])} pixels, the first image "
                f"of the shard {shape[1:]}: set ",
                Key("size"),
                " to bring them to one size.",
            )
        labels[label] += 1
        if None in labels and len(labels) > 1:
            has = "no .cls" if label is None else "a .cls"
            raise InputError(f"{describe_sample(sample)} has {has}, unlike the samples before it.")
        levels += np.bincount(image.flatten().numpy(), minlength=256)
        for ending in list_endings(sample):
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


def _scan_shards(urls: list[str], view: View, workers: int) -> Iterator[Shard]:
    scan = partial(scan_shard, view=view)
    if workers < 2 or len(urls) < 2:
        yield from map(scan, urls)
        return
    context = multiprocessing.get_context(START)
    with ProcessPoolExecutor(min(workers, len(urls)), context, init_worker, (0,)) as pool:
        try:
            yield from pool.map(scan, urls)
        finally:
            pool.shutdown(cancel_futures=True)


def _read_index(path: Path | None) -> dict[str, Any]:
    """Entries of a stored index; none if it is missing or damaged."""
    try:
        entries = json.loads(path.read_text()) if path is not None else {}
        return {url: entry for url, entry in entries.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _stamp_shard(url: str) -> list[int] | None:
    """Size and modification time of a shard; None behind a URL."""
    if is_remote(url):
        return None
    status = os.stat(url)
    return [status.st_size, status.st_mtime_ns]
