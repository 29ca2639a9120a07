"""Images in files that the processes of a machine share: read from their source once, then mapped.

A source's images lie in `.vqvae_lightning` beside its files, or in another folder where nothing can
be written there: per split an array, and its labels. The folder's name holds a hash of the names,
sizes and times of the source's files, so that files that change are read again. It is written under
another name and then renamed: of two processes that write it at once the first to finish wins.
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
from vqvae_lightning.data.sources.arrays import Array, Source, Split, Splits, Stamp, StorageError
from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.jobs.ranks import local_rank

BESIDE = ".vqvae_lightning"
LAYOUT = 1  # increased when an older version's files must not be used
SPLITS = ("train", "val", "test")


class Loaded(NamedTuple):
    """A source's images, and where they are mapped from."""

    splits: Splits
    folder: Path | None
    """None if this process has them in memory of its own."""

    def fact(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of the images, as JSON holds it; kept beside them under `name`."""
        if self.folder is None:
            return compute()
        path = self.folder / f"fact-{_hash(name)}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())
        value = compute()
        with suppress(OSError):  # another user's files
            write_text(path, json.dumps(value))
        return value


def load(source: Source, cache_dir: Path | None) -> Loaded:
    """The images of `source`, mapped where a folder can be written, else in memory.

    Args:
        source: Its files are there.
        cache_dir: Where to write if nothing can be written beside the source's files.

    Raises:
        InputError: As `source.load` does, and if the files change while they are read.
    """
    stamp = _stamp(source)
    if stamp is None:
        return Loaded(source.load(), None)
    found = _opened(stamp, cache_dir)
    if found is not None:
        return found
    said = ""
    for folder in _folders(stamp, cache_dir):
        try:
            _write(source, stamp, folder)
            return Loaded(_read(folder), folder)
        except OSError as error:
            said = str(error)
    if local_rank() == 0:
        console.print(
            f"warning: the images of {stamp.place} are held in memory by every process, because "
            f"they cannot be stored ({said}): set dataset.cache_dir to a folder that can be "
            "written.",
            highlight=False,
        )
    return Loaded(source.load(), None)


def is_stored(source: Source, cache_dir: Path | None) -> bool:
    """Whether `load` will find the images without reading the source's files."""
    stamp = _stamp(source)
    return stamp is not None and _opened(stamp, cache_dir) is not None


def _stamp(source: Any) -> Stamp | None:
    """The stamp of a source that has one: a user's own class need not."""
    return source.stamp() if hasattr(source, "stamp") else None


def _folders(stamp: Stamp, cache_dir: Path | None) -> list[Path]:
    """Where the images may lie, in the order in which places are tried."""
    places = [stamp.place / BESIDE] + ([] if cache_dir is None else [cache_dir])
    return [place / f"{_prefix(stamp)}{_hash([LAYOUT, *stamp])}" for place in places]


def _prefix(stamp: Stamp) -> str:
    """What the folders of one source have in common, whatever the state of its files."""
    return f"{stamp.name}-{_hash([str(stamp.place.resolve()), stamp.view])[:8]}-"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _opened(stamp: Stamp, cache_dir: Path | None) -> Loaded | None:
    """The images, if they are stored."""
    for folder in _folders(stamp, cache_dir):
        try:
            return Loaded(_read(folder), folder)
        except FileNotFoundError as error:
            if not folder.is_dir():
                continue
            damage: Exception = error
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            damage = error
        if isinstance(damage, PermissionError | NotADirectoryError):
            continue  # not ours to mend
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(folder: Path) -> Splits:
    header = json.loads((folder / "header.json").read_text())
    splits: dict[str, Split] = {}
    for name, shape in header["shapes"].items():
        # Copy on write: torch warns about memory that cannot be written, though nobody does.
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
    """Read the source into `folder`.

    Raises:
        OSError: If that cannot be written, or the disk is too small.
        InputError: If the files change meanwhile.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        header = {**_fill(source, partial), "source": str(stamp.place), "view": stamp.view}
        (partial / "header.json").write_text(json.dumps(header))
        if _stamp(source) != stamp:
            raise InputError(
                f"the files in {stamp.place} changed while they were read: start again."
            )
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for other in folder.parent.glob(f"{escape(_prefix(stamp))}*"):
        if other != folder:  # of files that have changed since
            shutil.rmtree(other, ignore_errors=True)


def _fill(source: Source, folder: Path) -> dict[str, Any]:
    """Write the arrays of images and labels; return what `_read` has to know of them."""
    maps: list[Any] = []

    def allocate(split: str, shape: tuple[int, ...]) -> Array:
        path = folder / f"{split}.npy"
        try:
            array: Any = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):
                # Now, or a full disk would kill the process when it writes to the map.
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
        array.flush()  # or a power cut could leave an array of zeros under the final name
    return {
        "shapes": {name: list(split.images.shape) for name, split in given.items()},
        "labels": splits.train.labels is not None,
        "class_names": splits.class_names,
    }
