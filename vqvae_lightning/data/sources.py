"""Where images come from: a source gives its splits as uint8 arrays."""

import gzip
import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.progress import progress_bar

# Not all that Pillow reads: it runs Ghostscript on an EPS, whatever the file's name.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


class Split(NamedTuple):
    """Images of one split."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor | None
    """(N,) int64, or None where the set has none."""


class Splits(NamedTuple):
    """All of a data set; `val` and `test` are None where the set defines none."""

    train: Split
    val: Split | None
    test: Split | None
    class_names: list[str]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any pixel, label or class name."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in (self.train, self.val, self.test):
            for tensor in split or ():
                if tensor is not None:
                    digest.update(str(tuple(tensor.shape)).encode())
                    digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


class Source(Protocol):
    """A data set that can be brought here and read."""

    def prepare(self) -> None:
        """Download what is missing; called by one process per node."""

    def load(self) -> Splits:
        """Read everything.

        Raises:
            InputError: If something is missing or malformed, with what to do about it.
        """


class TorchvisionSource:
    """A data set of torchvision, downloaded on first use.

    Args:
        dataset: A class of `torchvision.datasets` (or a partial of it) that takes `root`,
            `download` and either `train` or `split`.
        root: Folder under which torchvision keeps its files.
        mirror: Folder that may hold the packed files already, such as the one of Debian's package
            dataset-fashion-mnist; they are unpacked from there instead of being downloaded.
        val_split: The name of its validation split, where it has one.
        size: Side, or [height, width], to resize (shorter side) and centre-crop to; None keeps the
            images.
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
        """Unpack from the mirror or download."""
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
                    f"({error}): put "
                    f"{self._wanted()}, or set data_dir (or VQVAE_DATA_DIR) to the folder that has "
                    "them."
                ) from error

    def load(self) -> Splits:
        """The train and test split, and the validation split where the set has one."""
        train, test = self._open("train"), self._open("test")
        val = self._read(self._open(self.val_split)) if self.val_split else None
        names = [str(name) for name in getattr(train, "classes", [])]
        read = self._read(train)
        if not names and read.labels is not None:
            names = [str(number) for number in range(int(read.labels.max()) + 1)]
        return Splits(read, val, self._read(test), names)

    def _open(self, split: str, download: bool = False) -> Any:
        key: dict[str, Any] = {"split": split}
        if "train" in inspect.signature(self.type).parameters:
            key = {"train": split == "train"}
        return self.dataset(root=str(self.root), download=download, **key)

    def _read(self, opened: Any) -> Split:
        found = getattr(opened, "labels", getattr(opened, "targets", None))
        labels = None if found is None else torch.as_tensor(found).long()
        if hasattr(opened, "data"):
            array = torch.as_tensor(opened.data)
            if array.ndim == 3:
                array = array[:, None]
            elif array.shape[-1] in (1, 3):
                array = array.movedim(-1, 1)
            return Split(resize(array.contiguous(), self.size), labels)
        arrays = []
        with progress_bar(f"reading {self.type.__name__}", len(opened)) as advance:
            for index in range(len(opened)):
                image = torch.from_numpy(np.array(opened[index][0])).movedim(-1, 0)
                arrays.append(resize(image[None], self.size))
                advance(1)
        return Split(torch.cat(arrays), None)

    def _wanted(self) -> str:
        folder = self.root / getattr(self.type, "base_folder", f"{self.type.__name__}/raw")
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


class NpzSource:
    """Arrays in MedMNIST's layout: `train_images`, `test_images`; optional `val_images`, labels.

    Images are uint8, (N, H, W) grey or (N, H, W, C) with 1 or 3 channels; labels are integers (N,)
    or (N, 1). An optional `class_names` holds strings.

    Args:
        path: The .npz file.
        size: Side, or [height, width], to resize and centre-crop to; None keeps the images.
    """

    def __init__(self, path: str, size: int | Sequence[int] | None = None) -> None:
        self.path = Path(path)
        self.size = check_size(size)

    def prepare(self) -> None:
        """Nothing to download."""

    def load(self) -> Splits:
        """All splits of the file."""
        if not self.path.is_file():
            raise InputError(Key("path"), f"={self.path} is not a file: give an .npz file.")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # numpy raises half a dozen types for a broken archive
            raise InputError(
                Key("path"), f"={self.path} is not a readable .npz: {error}"
            ) from error
        splits = {}
        for name in ("train", "val", "test"):
            if f"{name}_images" in arrays:
                splits[name] = self._split(arrays, name)
            elif name != "val":
                raise InputError(
                    f"{self.path} has no array {name}_images; it has "
                    f"{', '.join(sorted(arrays)) or 'none'}."
                )
        shapes = {name: tuple(split.images.shape[1:]) for name, split in splits.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(f"{self.path}: the splits' images differ in shape: {shapes}.")
        if len({split.labels is None for split in splits.values()}) > 1:
            raise InputError(f"{self.path}: some splits have labels and others have none.")
        names = [str(name) for name in arrays.get("class_names", [])]
        top = max(
            (int(s.labels.max()) for s in splits.values() if s.labels is not None), default=-1
        )
        if names and top >= len(names):
            raise InputError(
                f"{self.path}: label {top} has no entry in class_names ({len(names)})."
            )
        if top >= len(splits["train"].images):
            raise InputError(
                f"{self.path}: label {top} is above the number of training images: labels count "
                "classes from 0."
            )
        names = names or [str(number) for number in range(top + 1)]
        return Splits(splits["train"], splits.get("val"), splits["test"], names)

    def _split(self, arrays: dict[str, np.ndarray], name: str) -> Split:
        images = arrays[f"{name}_images"]
        if images.dtype != np.uint8:
            raise InputError(f"{self.path}: {name}_images is {images.dtype}, it must be uint8.")
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
            raise InputError(
                f"{self.path}: {name}_images has shape {images.shape}, it must be (N, H, W) or "
                "(N, H, W, 1 or 3)."
            )
        if not len(images):
            raise InputError(f"{self.path}: {name}_images is empty.")
        tensor = torch.from_numpy(images if images.ndim == 4 else images[..., None]).movedim(-1, 1)
        labels = arrays.get(f"{name}_labels")
        if labels is None:
            return Split(resize(tensor.contiguous(), self.size), None)
        if labels.shape not in ((len(images),), (len(images), 1)):
            raise InputError(
                f"{self.path}: {name}_labels has shape {labels.shape} for {len(images)} images, "
                f"it must be ({len(images)},) or ({len(images)}, 1)."
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise InputError(f"{self.path}: {name}_labels must be integers of at least 0.")
        numbers = torch.from_numpy(labels.reshape(-1).astype(np.int64))
        return Split(resize(tensor.contiguous(), self.size), numbers)


class BundledSource(NpzSource):
    """10 000 training and 2 000 test images of Fashion-MNIST, shipped inside the package."""

    def __init__(self, size: int | Sequence[int] | None = None) -> None:
        inside = files("vqvae_lightning.data") / "bundled" / "fashion_mnist_mini.npz"
        super().__init__(str(inside), size)


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

    def load(self) -> Splits:
        """Decode all images."""
        found, classes = self.files()
        splits = {name: self._read(name, *listed) for name, listed in found.items()}
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

    def _read(self, name: str, paths: list[Path], labels: list[int] | None) -> Split:
        arrays: list[Tensor] = []
        with progress_bar(f"reading {name}", len(paths)) as advance:
            for path in paths:
                image = resize(decode(path, self.grey, str(path)), self.size)
                if arrays and image.shape != arrays[0].shape:
                    raise InputError(
                        f"{path} is {tuple(image.shape[2:])} and the first image "
                        f"{tuple(arrays[0].shape[2:])} pixels: set ",
                        Key("size"),
                        " to bring them to one size.",
                    )
                arrays.append(image)
                advance(1)
        return Split(torch.cat(arrays), None if labels is None else torch.tensor(labels))


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


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """`size` as (height, width).

    Raises:
        InputError: If it is neither None, a positive integer nor two of them.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(Key("size"), f"={size} must be a side or [height, width] in pixels.")
    return pair[0], pair[1]


def resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Scale uint8 images (N, C, H, W) to just cover `size`, then centre-crop them to it."""
    if size is None or tuple(images.shape[2:]) == size:
        return images
    scale = max(size[0] / images.shape[2], size[1] / images.shape[3])
    cover = [
        max(side, round(old * scale)) for side, old in zip(size, images.shape[2:], strict=True)
    ]
    parts = [transforms.resize(part, cover, antialias=True) for part in images.split(4096)]
    return torch.cat([transforms.center_crop(part, list(size)) for part in parts])
