"""Writing tar shards."""

import io
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from PIL import Image
from torch import Tensor

from vqvae_lightning.files import replace_file


def write_shards(
    samples: Iterable[tuple[str, bytes, int | None]],
    folder: Path,
    name: str,
    per_shard: int,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the images of a split to `NAME-000000.tar`, `NAME-000001.tar`, ...

    Args:
        samples: Ending (such as `png`), contents and label (or None) of each image, in order.
        folder: Folder to write to.
        name: Name of the split.
        per_shard: Number of images in each shard except the last.
        advance: Function that is called with the number of images just written.

    Returns:
        The number of shards.
    """
    from webdataset.writer import TarWriter

    shards = 0
    for number, part in groupby(enumerate(samples), lambda item: item[0] // per_shard):
        with (
            replace_file(folder / f"{name}-{number:06d}.tar") as path,
            open(path, "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,  # the time would change the bytes
        ):
            for key, (ending, contents, label) in part:
                cls = {} if label is None else {"cls": str(label).encode()}
                tar.write({"__key__": f"{name}-{key:09d}", ending: contents, **cls})
                advance(1)
        shards += 1
    return shards


def encode_png(image: Tensor) -> bytes:
    """The bytes of a PNG file of an image (C, H, W) uint8."""
    file = io.BytesIO()
    array = image.movedim(0, -1).numpy()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()
