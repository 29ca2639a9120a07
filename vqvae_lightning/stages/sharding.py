"""Write a data set, or a folder of images, as tar shards."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from vqvae_lightning.configs import build
from vqvae_lightning.console import show_progress
from vqvae_lightning.data import ImageDataModule, ImageFolderSource, ShardDataModule
from vqvae_lightning.data.images import set_aside
from vqvae_lightning.data.shards.write import encode_png, write_shards
from vqvae_lightning.data.sources.arrays import resize
from vqvae_lightning.data.sources.folder import decode
from vqvae_lightning.errors import InputError, check_positive, prefix_keys
from vqvae_lightning.files import write_text
from vqvae_lightning.randomness import derive_seed
from vqvae_lightning.runs.results import write_config

Item = tuple[str, bytes, int | None]
"""Ending of the image's file, its contents and its class."""


class _Split(NamedTuple):
    name: str
    images: int
    items: Iterator[Item]


def make_shards(cfg: DictConfig) -> str:
    """Write the splits of `cfg.dataset`, with the training images in a random order.

    A folder of images is read file by file, because it may not fit in memory. Its files are stored
    unchanged or, with `dataset.source.size`, resized and as PNG.

    Args:
        cfg: Composed config `conf/shards.yaml`.

    Returns:
        The overrides that train on the shards.

    Raises:
        InputError: If the folder already contains shards, or the data cannot be used.
    """
    folder = Path(cfg.folder)
    per_shard = check_positive("per_shard", cfg.per_shard)
    if list(folder.glob("*.tar")):
        raise InputError(f"output={cfg.output} already contains shards: choose another folder.")
    images = build(cfg.dataset)
    if not isinstance(images, ImageDataModule):
        raise InputError("dataset=shards is stored as shards already: choose another dataset.")
    unchanged = isinstance(images.source, ImageFolderSource) and images.source.size is None
    if isinstance(images.source, ImageFolderSource):
        with prefix_keys("dataset"):
            splits, class_names = _read_files(images, images.source)
        grey = images.source.grey
    else:
        with prefix_keys("dataset"):
            images.prepare_data()
            images.setup()
        splits, class_names = _read_arrays(images), images.class_names
        grey = images.image_shape[0] == 1
    # A temporary folder until all shards are written. Otherwise an interruption would leave what
    # looks like a smaller data set.
    unfinished = folder / f".shards.{os.getpid()}"
    try:
        with show_progress("writing shards", sum(split.images for split in splits)) as advance:
            for split in splits:
                write_shards(split.items, unfinished, split.name, per_shard, advance)
        if class_names:
            write_text(unfinished / "classes.txt", "".join(f"{name}\n" for name in class_names))
        for path in sorted(unfinished.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not unchanged:  # otherwise the index depends on the size to train at
        ShardDataModule(root=str(folder), grey=grey).prepare_data()
    write_config(cfg, folder)
    options = [f"dataset=shards dataset.root={folder}"]
    options += ["dataset.grey=true"] if grey else []
    return " ".join(options + (["dataset.size=[HEIGHT,WIDTH]"] if unchanged else []))


def _read_arrays(images: ImageDataModule) -> list[_Split]:
    """The splits of a data set in arrays."""

    def items(name: str) -> Iterator[Item]:
        split = images.datasets[name]
        for row in _order_rows(name, len(split), images.split_seed):
            (image,), labels = split.__getitems__(torch.tensor([row]))
            yield "png", encode_png(image), None if labels is None else int(labels)

    return [_Split(name, len(split), items(name)) for name, split in images.datasets.items()]


def _read_files(
    images: ImageDataModule, source: ImageFolderSource
) -> tuple[list[_Split], list[str]]:
    """The splits of a folder of images, the same as in `images`, and the class names."""
    with prefix_keys("source"):
        found, class_names = source.list_files()
    # The order and the seeds of ImageDataModule.setup.
    for name, seed in (("test", images.split_seed + 1), ("val", images.split_seed)):
        if name not in found:
            paths, labels = found["train"]
            remaining, aside = (
                ([paths[row] for row in rows], labels and [labels[row] for row in rows])
                for rows in set_aside(len(paths), images.val_share, seed)
            )
            found["train"], found[name] = remaining, aside

    def items(name: str) -> Iterator[Item]:
        paths, labels = found[name]
        for row in _order_rows(name, len(paths), images.split_seed):
            label = None if labels is None else labels[row]
            if source.size is None:
                yield paths[row].suffix[1:].lower(), paths[row].read_bytes(), label
            else:
                image = resize(decode(paths[row], source.grey, str(paths[row])), source.size)
                yield "png", encode_png(image[0]), label

    return [
        _Split(name, len(paths), items(name)) for name, (paths, _) in found.items()
    ], class_names


def _order_rows(name: str, total: int, seed: int) -> list[int]:
    """Rows of a split in the order in which they are written; random for training images."""
    if name != "train":
        return list(range(total))
    # Readers shuffle within a buffer only, so the shards themselves must be in a random order.
    generator = torch.Generator().manual_seed(derive_seed(seed, "shards"))
    order: list[int] = torch.randperm(total, generator=generator).tolist()
    return order
