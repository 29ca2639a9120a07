"""Images in files that the processes of a machine share: decoded once, then memory-mapped.

The images of a source are stored in `.vqvae_lightning` in the folder of its files, or in
`cache_dir` if that folder cannot be written to. Each split has an array and its labels. The name of
the stored folder contains a hash of the names, sizes and modification times of the source's files,
so that changed files are decoded again. The folder is written under a temporary name and then
renamed. If two processes write it at the same time, the first to finish wins.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vqvae_lightning.console import console
from vqvae_lightning.data.sources.protocol import (
    Array,
    Source,
    Split,
    Splits,
    Stamp,
    StorageError,
)
from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.jobs.ranks import get_local_rank

FOLDER = ".vqvae_lightning"
LAYOUT = 1  # increase it when files of older versions must not be used
SPLITS = ("train", "val", "test")


class Loaded(NamedTuple):
    """The images of a source, and the folder that they are mapped from."""

    splits: Splits
    folder: Path | None
    """None if this process holds them in its own memory."""

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, stored with the images as JSON under `name`."""
        if self.folder is None:
            return compute()
        path = self.folder / f"fact-{_hash(name)}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())
        value = compute()
        with suppress(OSError):  # the files may belong to another user
            write_text(path, json.dumps(value))
        return value


def load(source: Source, cache_dir: Path | None) -> Loaded:
    """The images of `source`: mapped from a folder, or in memory if no folder can be written to.

    Args:
        source: Source of the images, whose files are not missing.
        cache_dir: Folder to use if the folder of the source's files cannot be written to.

    Raises:
        InputError: If `source.load` raises it, or if the files change while they are read.
    """
    stamp = _stamp_source(source)
    if stamp is None:
        return Loaded(source.load(), None)
    found = _open_stored(stamp, cache_dir)
    if found is not None:
        return found
    reason = ""
    for folder in _list_folders(stamp, cache_dir):
        try:
            _write(source, stamp, folder)
            return Loaded(_read(folder), folder)
        except OSError as error:
            reason = str(error)
    if get_local_rank() == 0:
        console.print(
            f"warning: the images of {stamp.place} are held in memory by every process, because "
            f"they cannot be stored ({reason}): set dataset.cache_dir to a writable folder.",
            highlight=False,
        )
    return Loaded(source.load(), None)


def is_stored(source: Source, cache_dir: Path | None) -> bool:
    """Whether `load` finds the images stored, and need not read the source's files."""
    stamp = _stamp_source(source)
    return stamp is not None and _open_stored(stamp, cache_dir) is not None


def _stamp_source(source: Any) -> Stamp | None:
    """The stamp of a source; None if its class has no method `stamp`, which is optional."""
    return source.stamp() if hasattr(source, "stamp") else None


def _list_folders(stamp: Stamp, cache_dir: Path | None) -> list[Path]:
    """Folders in which the images may be stored, in the order in which they are tried."""
    places = [stamp.place / FOLDER] + ([] if cache_dir is None else [cache_dir])
    return [place / f"{_name_prefix(stamp)}{_hash([LAYOUT, *stamp])}" for place in places]


def _name_prefix(stamp: Stamp) -> str:
    """Start of the names of all folders of one source, whatever the state of its files."""
    return f"{stamp.name}-{_hash([str(stamp.place.resolve()), stamp.view])[:8]}-"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _open_stored(stamp: Stamp, cache_dir: Path | None) -> Loaded | None:
    """The stored images, or None; damaged ones are deleted."""
    for folder in _list_folders(stamp, cache_dir):
        try:
            return Loaded(_read(folder), folder)
        except FileNotFoundError as error:
            if not folder.is_dir():
                continue
            damage: Exception = error
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            damage = error
        if isinstance(damage, PermissionError | NotADirectoryError):
            continue  # it cannot be repaired from here
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(folder: Path) -> Splits:
    header = json.loads((folder / "header.json").read_text())
    splits: dict[str, Split] = {}
    for name, shape in header["shapes"].items():
        # Copy on write, because torch warns about read-only memory. Nothing writes to it.
        images = np.load(folder / f"{name}.npy", mmap_mode="c")
        if list(images.shape) != shape or images.dtype != np.uint8:
            raise ValueError(f"{folder}/{name}.npy is {images.dtype} {images.shape}")
        labels = None
        if header["labels"]:
            labels = torch.from_numpy(np.load(folder / f"{name}_labels.npy"))
            if len(labels) != len(images):
                raise ValueError(f"{folder}/{name}_labels.npy has {len(labels)} labels")
        splits[name] = Split(torch.from_numpy(images), labels)
    return Splits(splits["train"], splits.get("val"), splits.get("test"), header["class_names"])


def _write(source: Source, stamp: Stamp, folder: Path) -> None:
    """Read the source and store its images in `folder`.

    Raises:
        OSError: If the folder cannot be written to, or the disk is full.
        InputError: If the source's files change in the meantime.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        header = {**_fill(source, partial), "source": str(stamp.place), "view": stamp.view}
        (partial / "header.json").write_text(json.dumps(header))
        if _stamp_source(source) != stamp:
            raise InputError(
                f"the files in {stamp.place} changed while they were read: run the command again."
            )
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for other in folder.parent.glob(f"{escape(_name_prefix(stamp))}*"):
        if other != folder:  # images of an older state of the files
            shutil.rmtree(other, ignore_errors=True)


def _fill(source: Source, folder: Path) -> dict[str, Any]:
    """Write the arrays of images and labels, and return the header that `_read` needs."""
    maps: list[Any] = []

    def allocate(split: str, shape: tuple[int, ...]) -> Array:
        path = folder / f"{split}.npy"
        try:
            array: Any = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):
                # On a full disk, writing to the map would kill the process. This raises instead.
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise StorageError(str(error)) from error
        maps.append(array)
        return array  # type: ignore[no-any-return]

    splits = source.load(allocate)
    given = {n: s for n, s in zip(SPLITS, splits[:3], strict=True) if s is not None}
    for name, split in given.items():
        if split.labels is not None:
            np.save(folder / f"{name}_labels.npy", split.labels.numpy())
    for array in maps:
        array.flush()  # otherwise a power cut could leave zeros under the final name
    return {
        "shapes": {name: list(split.images.shape) for name, split in given.items()},
        "labels": splits.train.labels is not None,
        "class_names": splits.class_names,
    }
