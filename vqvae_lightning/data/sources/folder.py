"""Folders of image files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.sources.arrays import check_size, describe_size, fill_array, resize
from vqvae_lightning.data.sources.protocol import (
    Allocate,
    Split,
    Splits,
    Stamp,
    allocate_in_memory,
    stamp_files,
)
from vqvae_lightning.errors import InputError, Key

# A subset of Pillow's formats: for an EPS, whatever the file's name, Pillow runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


class ImageFolderSource:
    """A folder of images.

    Subfolders `train`, `val` (or `valid`) and `test` are the splits if there is a `train`.
    Otherwise all images are training images, from which validation and test images are set aside.
    Within a split, subfolders are classes.

    Args:
        root: Path of the folder.
        size: Side, or [height, width]: images are resized to cover it and centre-cropped. None if
            all images already have the same size.
        grey: Whether to read the images as grey instead of RGB.
    """

    def __init__(
        self, root: str, size: int | Sequence[int] | None = None, grey: bool = False
    ) -> None:
        self.root = Path(root)
        self.size = check_size(size)
        self.grey = grey

    def prepare(self) -> None:
        """Do nothing: there is nothing to download."""

    def stamp(self) -> Stamp:
        """The stamp of all image files."""
        paths = [path for listed, _ in self.list_files()[0].values() for path in listed]
        view = f"{describe_size(self.size)}-{'grey' if self.grey else 'rgb'}"
        return stamp_files(self.root, self.root.resolve().name, view, paths)

    def load(self, allocate: Allocate = allocate_in_memory) -> Splits:
        """Decode all images."""
        found, classes = self.list_files()
        splits = {
            name: Split(
                self._read(name, paths, allocate),
                None if labels is None else torch.tensor(labels),
            )
            for name, (paths, labels) in found.items()
        }
        return Splits(splits["train"], splits.get("val"), splits.get("test"), classes)

    def list_files(self) -> tuple[dict[str, tuple[list[Path], list[int] | None]], list[str]]:
        """Paths and labels (None without classes) of each existing split, and the class names.

        Raises:
            InputError: If there are no images, or only some are in class folders.
        """
        if not self.root.is_dir():
            raise InputError(Key("root"), f"={self.root} is not a folder of images.")
        folders = {
            name: next((self.root / n for n in names if (self.root / n).is_dir()), None)
            for name, names in (
                ("train", ("train",)),
                ("val", ("val", "valid")),
                ("test", ("test",)),
            )
        }
        if folders["train"] is None:
            folders = {"train": self.root, "val": None, "test": None}
        classes = sorted(
            {
                path.name
                for folder in folders.values()
                if folder
                for path in _list_class_folders(folder)
            }
        )
        return {
            name: self._list(folder, classes) for name, folder in folders.items() if folder
        }, classes

    def _list(self, folder: Path, classes: list[str]) -> tuple[list[Path], list[int] | None]:
        paths = _list_images(folder)
        if not paths:
            raise InputError(
                Key("root"),
                f"={self.root}: no images in {folder}; looked for {', '.join(sorted(SUFFIXES))}.",
            )
        inside = [path.relative_to(folder).parts[0] for path in paths]
        if classes and not set(inside) <= set(classes):
            stray = next(p for p, part in zip(paths, inside, strict=True) if part not in classes)
            raise InputError(f"{stray} is not in a class folder: move it into one.")
        return paths, [classes.index(part) for part in inside] if classes else None

    def _read(self, name: str, paths: list[Path], allocate: Allocate) -> Tensor:
        with show_progress(f"reading {name}", len(paths)) as advance:
            return fill_array(name, len(paths), self._decode_each(paths, advance), allocate)

    def _decode_each(self, paths: list[Path], advance: Callable[[int], None]) -> Iterator[Tensor]:
        first: tuple[int, ...] | None = None
        for path in paths:
            image = resize(decode(path, self.grey, str(path)), self.size)
            first = first or tuple(image.shape)
            if image.shape != first:
                raise InputError(
                    f"{path} has {tuple(image.shape[2:])} pixels, the first image {first[2:]}: "
                    "set ",
                    Key("size"),
                    " to bring them to one size.",
                )
            yield image
            advance(1)


def decode(file: Path | BinaryIO, grey: bool, name: str) -> Tensor:
    """An image file as (1, C, H, W) uint8, grey or RGB.

    Args:
        file: Path of the file, or the open file.
        grey: Whether to convert to grey instead of RGB.
        name: Name of the image for an error message.

    Raises:
        InputError: If the file is not a readable image.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            whole: Image.Image = image
            if image.mode.startswith("I;16"):  # convert() would clip these at 255
                whole = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            array = np.array(whole.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:  # SyntaxError: a broken PNG
        raise InputError(f"{name} is not a readable image: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)[None]


def _list_class_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and _list_images(path)]


def _list_images(folder: Path) -> list[Path]:
    """Sorted paths of the images below `folder`, without hidden files and folders."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [p for p in paths if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
