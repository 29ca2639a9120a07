"""Images in `.npz` files, and the bundled Fashion-MNIST subset."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    StorageError,
    allocate_in_memory,
    stamp_files,
)
from vqvae_lightning.errors import InputError, Key


class NpzSource:
    """Arrays in MedMNIST's layout, in one `.npz` file.

    `train_images` and `test_images` are required; `val_images` and the labels of all splits, such
    as `train_labels`, are optional. Images are uint8, (N, H, W) grey or (N, H, W, C) with 1 or 3
    channels. Labels are integers (N,) or (N, 1). An optional `class_names` holds strings.

    Args:
        path: Path of the file.
        size: Side, or [height, width], to resize and centre-crop to; None keeps the images' size.
    """

    def __init__(self, path: str, size: int | Sequence[int] | None = None) -> None:
        self.path = Path(path)
        self.size = check_size(size)

    def prepare(self) -> None:
        """Do nothing: there is nothing to download."""

    def stamp(self) -> Stamp | None:
        """The stamp of the file; None if it is missing."""
        if not self.path.is_file():
            return None
        return stamp_files(self.path.parent, self.path.name, describe_size(self.size), [self.path])

    def load(self, allocate: Allocate = allocate_in_memory) -> Splits:
        """Read all splits of the file."""
        if not self.path.is_file():
            raise InputError(Key("path"), f"={self.path} is not a file: give an .npz file.")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return self._read_splits(archive, allocate)
        except (InputError, StorageError):
            raise
        except Exception as error:  # numpy raises many types for a broken archive
            raise InputError(
                Key("path"), f"={self.path} is not a readable .npz: {error}"
            ) from error

    def _read_splits(self, archive: Any, allocate: Allocate) -> Splits:
        names = [name for name in ("train", "val", "test") if f"{name}_images" in archive.files]
        for name in ("train", "test"):
            if name not in names:
                raise InputError(
                    f"{self.path} has no array {name}_images; it has "
                    f"{', '.join(sorted(archive.files)) or 'none'}."
                )
        # All splits are checked before the images of any are read.
        shapes = {name: self._check_images(archive, name) for name in names}
        kinds = {
            name: (shape[3:] or (1,)) + (self.size or shape[1:3]) for name, shape in shapes.items()
        }
        if len(set(kinds.values())) > 1:
            raise InputError(f"{self.path}: the splits' images differ in shape: {kinds}.")
        labels = {name: self._read_labels(archive, name, shapes[name][0]) for name in names}
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
                f"{self.path}: label {top} is above the number of training images: labels are "
                "classes numbered from 0."
            )
        class_names = class_names or [str(number) for number in range(top + 1)]
        read = {
            name: Split(
                fill_array(name, shapes[name][0], self._read_blocks(archive, name), allocate),
                labels[name],
            )
            for name in names
        }
        return Splits(read["train"], read.get("val"), read["test"], class_names)

    def _check_images(self, archive: Any, name: str) -> tuple[int, ...]:
        """The shape of a split's array of images, checked without reading the values."""
        with _open_array(archive, f"{name}_images") as (_, shape, dtype, _):
            pass
        if dtype.hasobject:
            archive[f"{name}_images"]  # raises numpy's error
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

    def _read_blocks(self, archive: Any, name: str) -> Iterator[Tensor]:
        """The images of a split, unpacked and resized in blocks (n, C, H, W)."""
        with _open_array(archive, f"{name}_images") as (file, shape, _, fortran_order):
            total, each = shape[0], math.prod(shape[1:])
            rows = rows_per_block(shape)
            # In Fortran order every image is spread over the whole file.
            whole = archive[f"{name}_images"] if fortran_order else None
            for start in range(0, total, rows):
                count = min(rows, total - start)
                if whole is None:
                    block = np.frombuffer(bytearray(file.read(count * each)), np.uint8)
                else:
                    block = whole[start : start + count]
                images = torch.from_numpy(block.reshape(count, *shape[1:3], -1)).movedim(-1, 1)
                yield resize(images.contiguous(), self.size)

    def _read_labels(self, archive: Any, name: str, total: int) -> Tensor | None:
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
def _open_array(
    archive: Any, name: str
) -> Iterator[tuple[Any, tuple[int, ...], np.dtype[Any], bool]]:
    """Open an array of an .npz file.

    Yields:
        The open file at the first value, and the array's shape, type and whether it is in Fortran
        order.

    Raises:
        ValueError: If it is not an array.
    """
    with archive.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:  # version 3 is for the names of fields, which images do not have
            raise ValueError(f"{name} has format version {version}, arrays of numbers 1.0 or 2.0")
        shape, fortran_order, dtype = read(file)
        yield file, shape, dtype, fortran_order


class BundledSource(NpzSource):
    """10 000 training and 2 000 test images of Fashion-MNIST, shipped with the package."""

    def __init__(self, size: int | Sequence[int] | None = None) -> None:
        inside = files("vqvae_lightning.data") / "bundled" / "fashion_mnist_mini.npz"
        super().__init__(str(inside), size)

    def stamp(self) -> None:
        """None: 9 MB need not be shared, and the package's folder should not be written to."""
