"""Where images come from: a source gives its splits as uint8 arrays."""

import gzip
import hashlib
import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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


Array = np.ndarray[Any, np.dtype[np.uint8]]
Allocate = Callable[[str, tuple[int, ...]], Array]
"""Gives the array that the images of a split are read into, by the split's name and its shape."""
BLOCK = 2**20  # bytes of images that are handled at a time, where it makes copies


class StorageError(OSError):
    """An `Allocate` cannot give the array."""


def in_memory(split: str, shape: tuple[int, ...]) -> Array:
    """An `Allocate` of arrays that only this process has."""
    return np.empty(shape, np.uint8)


class Stamp(NamedTuple):
    """What tells one state of a source's files, and one way to read them, from all others."""

    place: Path
    """Folder of the files."""
    name: str
    """What people call the source."""
    view: str
    """Options that change the images."""
    files: list[tuple[str, int, int]]
    """Name within `place`, bytes and time of the last change in nanoseconds."""


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

    def load(self, allocate: Allocate = in_memory) -> Splits:
        """Read everything, into arrays from `allocate`.

        A source that has a method `stamp` besides is read once and then mapped from a file; see
        `data.mapped`. One that has none may leave `allocate` out.

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

    def stamp(self) -> Stamp | None:
        """Of the files below `root`; None of a class that is not torchvision's own, or of none."""
        options = getattr(self.dataset, "keywords", {})
        known = self.type.__module__.startswith("torchvision.datasets.")
        if not known or not all(isinstance(v, str | int | None) for v in options.values()):
            return None
        if hasattr(self.type, "split_list"):  # its files lie among those of other sets
            paths = [self.root / entry[1] for entry in self.type.split_list.values()]
        else:
            paths = sorted(self._unpacked().rglob("*"))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            return None
        view = f"{_view(self.size)} {sorted(options.items())} {self.val_split}"
        return _stamp(self.root, self.type.__name__, view, paths)

    def load(self, allocate: Allocate = in_memory) -> Splits:
        """The train and test split, and the validation split where the set has one."""
        opened = self._open("train")
        names = [str(name) for name in getattr(opened, "classes", [])]
        train = self._read(opened, "train", allocate)
        del opened  # one at a time in the library's memory
        val = self._read(self._open(self.val_split), "val", allocate) if self.val_split else None
        test = self._read(self._open("test"), "test", allocate)
        if not names and train.labels is not None:
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
            with progress_bar(f"reading {self.type.__name__}", len(opened)) as advance:
                read = _filled(split, len(opened), self._singles(opened, advance), allocate)
            return Split(read, None)
        images = torch.as_tensor(opened.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] in (1, 3):
            images = images.movedim(-1, 1)
        as_it_is = self.size in (None, tuple(images.shape[2:])) and images.is_contiguous()
        if as_it_is and allocate is in_memory:
            return Split(images, labels)
        blocks = images.split(rows_per_block(images.shape))
        resized = (resize(block, self.size) for block in blocks)
        return Split(_filled(split, len(images), resized, allocate), labels)

    def _singles(self, opened: Any, advance: Callable[[int], None]) -> Iterator[Tensor]:
        for index in range(len(opened)):
            yield resize(
                torch.from_numpy(np.array(opened[index][0])).movedim(-1, 0)[None], self.size
            )
            advance(1)

    def _unpacked(self) -> Path:
        """Folder of the unpacked files."""
        return self.root / getattr(self.type, "base_folder", f"{self.type.__name__}/raw")

    def _wanted(self) -> str:
        folder = self._unpacked()
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

    def stamp(self) -> Stamp | None:
        """Of the file; None if it is missing."""
        if not self.path.is_file():
            return None
        return _stamp(self.path.parent, self.path.name, _view(self.size), [self.path])

    def load(self, allocate: Allocate = in_memory) -> Splits:
        """All splits of the file."""
        if not self.path.is_file():
            raise InputError(Key("path"), f"={self.path} is not a file: give an .npz file.")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return self._splits(archive, allocate)
        except (InputError, StorageError):
            raise
        except Exception as error:  # numpy raises half a dozen types for a broken archive
            raise InputError(
                Key("path"), f"={self.path} is not a readable .npz: {error}"
            ) from error

    def _splits(self, archive: Any, allocate: Allocate) -> Splits:
        names = [name for name in ("train", "val", "test") if f"{name}_images" in archive.files]
        for name in ("train", "test"):
            if name not in names:
                raise InputError(
                    f"{self.path} has no array {name}_images; it has "
                    f"{', '.join(sorted(archive.files)) or 'none'}."
                )
        # What is wrong with a later split is found before the first one's images are read.
        shapes = {name: self._shape(archive, name) for name in names}
        kinds = {
            name: (shape[3:] or (1,)) + (self.size or shape[1:3]) for name, shape in shapes.items()
        }
        if len(set(kinds.values())) > 1:
            raise InputError(f"{self.path}: the splits' images differ in shape: {kinds}.")
        labels = {name: self._labels(archive, name, shapes[name][0]) for name in names}
        if len({numbers is None for numbers in labels.values()}) > 1:
            raise InputError(f"{self.path}: some splits have labels and others have none.")
        found = archive["class_names"] if "class_names" in archive.files else ()
        class_names = [str(name) for name in found]
        top = max((int(n.max()) for n in labels.values() if n is not None), default=-1)
        if class_names and top >= len(class_names):
            raise InputError(
                f"{self.path}: label {top} has no entry in class_names ({len(class_names)})."
            )
        if top >= shapes["train"][0]:
            raise InputError(
                f"{self.path}: label {top} is above the number of training images: labels count "
                "classes from 0."
            )
        class_names = class_names or [str(number) for number in range(top + 1)]
        read = {
            name: Split(
                _filled(name, shapes[name][0], self._blocks(archive, name), allocate), labels[name]
            )
            for name in names
        }
        return Splits(read["train"], read.get("val"), read["test"], class_names)

    def _shape(self, archive: Any, name: str) -> tuple[int, ...]:
        with _member(archive, f"{name}_images") as (_, shape, dtype, _):
            pass
        if dtype.hasobject:
            archive[f"{name}_images"]  # numpy's error
        if dtype != np.uint8:
            raise InputError(f"{self.path}: {name}_images is {dtype}, it must be uint8.")
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3)):
            raise InputError(
                f"{self.path}: {name}_images has shape {shape}, it must be (N, H, W) or "
                "(N, H, W, 1 or 3)."
            )
        if not shape[0]:
            raise InputError(f"{self.path}: {name}_images is empty.")
        return shape

    def _blocks(self, archive: Any, name: str) -> Iterator[Tensor]:
        """The images (n, C, H, W) of a split, resized; unpacked a block at a time."""
        with _member(archive, f"{name}_images") as (file, shape, _, by_columns):
            total, each = shape[0], math.prod(shape[1:])
            rows = rows_per_block(shape)
            # By columns, every image is scattered over the whole file.
            whole = archive[f"{name}_images"] if by_columns else None
            for start in range(0, total, rows):
                count = min(rows, total - start)
                if whole is None:
                    block = np.frombuffer(bytearray(file.read(count * each)), np.uint8)
                else:
                    block = whole[start : start + count]
                images = torch.from_numpy(block.reshape(count, *shape[1:3], -1)).movedim(-1, 1)
                yield resize(images.contiguous(), self.size)

    def _labels(self, archive: Any, name: str, total: int) -> Tensor | None:
        if f"{name}_labels" not in archive.files:
            return None
        labels = archive[f"{name}_labels"]
        if labels.shape not in ((total,), (total, 1)):
            raise InputError(
                f"{self.path}: {name}_labels has shape {labels.shape} for {total} images, "
                f"it must be ({total},) or ({total}, 1)."
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise InputError(f"{self.path}: {name}_labels must be integers of at least 0.")
        return torch.from_numpy(labels.reshape(-1).astype(np.int64))


@contextmanager
def _member(archive: Any, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype[Any], bool]]:
    """An array of an .npz: its open file, at the first value; shape, type, and whether by columns.

    Raises:
        ValueError: If it is not an array.
    """
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:  # used for names of fields only, which images have none of
            raise ValueError(f"{name} has the format {version}, which no array of numbers needs")
        shape, by_columns, dtype = read(file)
        yield file, shape, dtype, by_columns


class BundledSource(NpzSource):
    """10 000 training and 2 000 test images of Fashion-MNIST, shipped inside the package."""

    def __init__(self, size: int | Sequence[int] | None = None) -> None:
        inside = files("vqvae_lightning.data") / "bundled" / "fashion_mnist_mini.npz"
        super().__init__(str(inside), size)

    def stamp(self) -> None:
        """None: 9 MB need not be shared, and the package's folder not be written to."""


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


def _filled(split: str, total: int, parts: Iterable[Tensor], allocate: Allocate) -> Tensor:
    """The images of `parts`, each (n, C, H, W) uint8, in one array (total, C, H, W)."""
    array: Array | None = None
    row = 0
    for part in parts:
        if array is None:
            array = allocate(split, (total, *part.shape[1:]))
        array[row : row + len(part)] = part.numpy()
        row += len(part)
    assert array is not None
    return torch.from_numpy(array)


def rows_per_block(shape: Sequence[int]) -> int:
    """Images of an array (N, ...) uint8 that a block of `BLOCK` bytes has."""
    return max(1, BLOCK // math.prod(shape[1:]))


def _stamp(place: Path, name: str, view: str, paths: list[Path]) -> Stamp:
    status = [(path, path.stat()) for path in paths]
    files = [(str(p.relative_to(place)), s.st_size, s.st_mtime_ns) for p, s in status]
    return Stamp(place, name, view, files)


def _view(size: tuple[int, int] | None) -> str:
    return "whole" if size is None else f"{size[0]}x{size[1]}"


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
