"""Folders of image files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vqvae_lightning.console import progress_bar
from vqvae_lightning.data.sources.arrays import (
    Allocate,
    Split,
    Splits,
    Stamp,
    _filled,
    _stamp,
    _view,
    check_size,
    in_memory,
    resize,
)
from vqvae_lightning.errors import InputError, Key

# Not all that Pillow reads: it runs Ghostscript on an EPS, whatever the file's name.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


class ImageFolderSource:
    """Any folder of images.

    Subfolders `train`, `val` (or `valid`) and `test` are the splits where they exist; otherwise all
    images are training images, from which validation and test images are carved. Inside a split,
    subfolders are classes.

    Args:
        root: The folder.
        size: Side, or [height, width]: the shorter side is resized and the centre cropped. None if
            all images have one size already.
        grey: Whether to read grey images instead of RGB.
    """

    def __init__(
        self, root: str, size: int | Sequence[int] | None = None, grey: bool = False
    ) -> None:
        self.root = Path(root)
        self.size = check_size(size)
        self.grey = grey

    def prepare(self) -> None:
        """Nothing to download."""

    def stamp(self) -> Stamp:
        """Of all files of images."""
        paths = [path for listed, _ in self.files()[0].values() for path in listed]
        view = f"{_view(self.size)}-{'grey' if self.grey else 'rgb'}"
        return _stamp(self.root, self.root.resolve().name, view, paths)

    def load(self, allocate: Allocate = in_memory) -> Splits:
        """Decode all images."""
        found, classes = self.files()
        splits = {
            name: Split(
                self._read(name, paths, allocate),
                None if labels is None else torch.tensor(labels),
            )
            for name, (paths, labels) in found.items()
        }
        return Splits(splits["train"], splits.get("val"), splits.get("test"), classes)

    def files(self) -> tuple[dict[str, tuple[list[Path], list[int] | None]], list[str]]:
        """Paths and labels (None without classes) of each split there is, and the classes' names.

        Raises:
            InputError: If there are no images, or some lie beside the classes' folders.
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
            {path.name for folder in folders.values() if folder for path in _class_folders(folder)}
        )
        return {
            name: self._list(folder, classes) for name, folder in folders.items() if folder
        }, classes

    def _list(self, folder: Path, classes: list[str]) -> tuple[list[Path], list[int] | None]:
        paths = _images(folder)
        if not paths:
            raise InputError(
                Key("root"),
                f"={self.root}: no images in {folder}; looked for {', '.join(sorted(SUFFIXES))}.",
            )
        inside = [path.relative_to(folder).parts[0] for path in paths]
        if classes and not set(inside) <= set(classes):
            stray = next(p for p, part in zip(paths, inside, strict=True) if part not in classes)
            raise InputError(f"{stray} lies beside class folders: move it into one of them.")
        return paths, [classes.index(part) for part in inside] if classes else None

    def _read(self, name: str, paths: list[Path], allocate: Allocate) -> Tensor:
        with progress_bar(f"reading {name}", len(paths)) as advance:
            return _filled(name, len(paths), self._singles(paths, advance), allocate)

    def _singles(self, paths: list[Path], advance: Callable[[int], None]) -> Iterator[Tensor]:
        first: tuple[int, ...] | None = None
        for path in paths:
            image = resize(decode(path, self.grey, str(path)), self.size)
            first = first or tuple(image.shape)
            if image.shape != first:
                raise InputError(
                    f"{path} is {tuple(image.shape[2:])} and the first image {first[2:]} pixels: "
                    "set ",
                    Key("size"),
                    " to bring them to one size.",
                )
            yield image
            advance(1)


def decode(file: Path | BinaryIO, grey: bool, name: str) -> Tensor:
    """An image file as (1, C, H, W) uint8: grey, or RGB.

    Raises:
        InputError: If it is none, with `name`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            whole: Image.Image = image
            if image.mode.startswith("I;16"):  # which convert() would clip at 255
                whole = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            array = np.array(whole.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:  # a broken PNG is bad syntax
        raise InputError(f"{name} is not a readable image: {error}") from error
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)[None]


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and _images(path)]


def _images(folder: Path) -> list[Path]:
    """Images below `folder`, in order; what a name with a dot hides is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [p for p in paths if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
