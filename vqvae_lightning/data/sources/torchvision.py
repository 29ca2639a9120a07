"""The data sets of torchvision."""

import gzip
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.sources.arrays import (
    check_size,
    describe_size,
    fill_array,
    resize,
    rows_per_block,
)
from vqvae_lightning.data.sources.protocol import (
    Allocate,
    Split,
    Splits,
    Stamp,
    allocate_in_memory,
    stamp_files,
)
from vqvae_lightning.errors import InputError


class TorchvisionSource:
    """A data set of torchvision, downloaded on first use.

    Args:
        dataset: Class of `torchvision.datasets`, or a partial of it, that takes `root`, `download`
            and either `train` or `split`.
        root: Folder below which torchvision stores its files.
        mirror: Folder that may hold the packed files already, such as that of Debian's package
            dataset-fashion-mnist; they are unpacked from there instead of downloaded.
        val_split: Name of the validation split, if the data set has one.
        size: Side, or [height, width], to resize and centre-crop to; None keeps the images' size.
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str,
        mirror: str | None = None,
        val_split: str | None = None,
        size: int | Sequence[int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.type: Any = getattr(dataset, "func", dataset)
        self.root = Path(root)
        self.mirror = mirror
        self.val_split = val_split
        self.size = check_size(size)

    def prepare(self) -> None:
        """Unpack the files from the mirror, or download them.

        Raises:
            InputError: If the files are missing and cannot be downloaded.
        """
        raw = self.root / self.type.__name__ / "raw"
        if self.mirror and Path(self.mirror).is_dir() and not raw.is_dir():
            partial = raw.with_name(f"raw.{os.getpid()}")
            partial.mkdir(parents=True)
            for packed in Path(self.mirror).glob("*.gz"):
                with gzip.open(packed) as inside, open(partial / packed.stem, "wb") as out:
                    shutil.copyfileobj(inside, out)
            partial.rename(raw)
        for name in ("train", "test"):
            try:
                self._open(name, download=True)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"{self.type.__name__} is not in {self.root} and cannot be downloaded "
                    f"({error}): put {self._describe_files()}, or set data_dir (or "
                    "VQVAE_DATA_DIR) to the folder that has them."
                ) from error

    def stamp(self) -> Stamp | None:
        """The stamp of the files below `root`; None without any, or for another package's class."""
        options = getattr(self.dataset, "keywords", {})
        known = self.type.__module__.startswith("torchvision.datasets.")
        if not known or not all(isinstance(v, str | int | None) for v in options.values()):
            return None
        if hasattr(self.type, "split_list"):  # `root` may hold files of other data sets
            paths = [self.root / entry[1] for entry in self.type.split_list.values()]
        else:
            paths = sorted(self._find_folder().rglob("*"))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            return None
        view = f"{describe_size(self.size)} {sorted(options.items())} {self.val_split}"
        return stamp_files(self.root, self.type.__name__, view, paths)

    def load(self, allocate: Allocate = allocate_in_memory) -> Splits:
        """Read the training and test split, and the validation split if there is one."""
        opened = self._open("train")
        names = [str(name) for name in getattr(opened, "classes", [])]
        train = self._read(opened, "train", allocate)
        del opened  # so that torchvision holds one split at a time
        val = self._read(self._open(self.val_split), "val", allocate) if self.val_split else None
        test = self._read(self._open("test"), "test", allocate)
        if train.labels is None:
            names = []
        elif not names:
            names = [str(number) for number in range(int(train.labels.max()) + 1)]
        return Splits(train, val, test, names)

    def _open(self, split: str, download: bool = False) -> Any:
        key: dict[str, Any] = {"split": split}
        if "train" in inspect.signature(self.type).parameters:
            key = {"train": split == "train"}
        return self.dataset(root=str(self.root), download=download, **key)

    def _read(self, opened: Any, split: str, allocate: Allocate) -> Split:
        found = getattr(opened, "labels", getattr(opened, "targets", None))
        labels = None if found is None else torch.as_tensor(found).long()
        if not hasattr(opened, "data"):
            with show_progress(f"reading {self.type.__name__}", len(opened)) as advance:
                read = fill_array(split, len(opened), self._decode_each(opened, advance), allocate)
            return Split(read, labels)
        images = torch.as_tensor(opened.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] in (1, 3):
            images = images.movedim(-1, 1)
        unchanged = self.size in (None, tuple(images.shape[2:])) and images.is_contiguous()
        if unchanged and allocate is allocate_in_memory:
            return Split(images, labels)
        blocks = images.split(rows_per_block(images.shape))
        resized = (resize(block, self.size) for block in blocks)
        return Split(fill_array(split, len(images), resized, allocate), labels)

    def _decode_each(self, opened: Any, advance: Callable[[int], None]) -> Iterator[Tensor]:
        for index in range(len(opened)):
            yield resize(
                torch.from_numpy(np.array(opened[index][0])).movedim(-1, 0)[None], self.size
            )
            advance(1)

    def _find_folder(self) -> Path:
        """The folder of the unpacked files."""
        return self.root / getattr(self.type, "base_folder", f"{self.type.__name__}/raw")

    def _describe_files(self) -> str:
        """Which files the data set needs, and in which folder."""
        folder = self._find_folder()
        if hasattr(self.type, "resources"):
            names = [name for name, _ in self.type.resources]
        elif hasattr(self.type, "split_list"):
            folder = self.root
            names = [self.type.split_list[key][1] for key in ("train", "test")]
        elif hasattr(self.type, "file_list"):
            names = [entry[2] for entry in self.type.file_list]
        else:
            folder, names = self.root, [self.type.filename]
        return f"{', '.join(names)} into {folder}"
