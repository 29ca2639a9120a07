"""The LightningDataModule over tar shards."""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.data.shards.index import Shard, index_folder
from vqvae_lightning.data.shards.read import (
    View,
    describe_sample,
    is_remote,
    list_shards,
    parse_label,
    read_shard,
)
from vqvae_lightning.data.shards.stream import ShardDataset
from vqvae_lightning.data.sources.arrays import check_size
from vqvae_lightning.errors import InputError, Key, check_positive, check_range


class ShardDataModule(PixelDataModule):
    """Images streamed from tar shards, for data sets that do not fit in memory.

    A shard is a tar file of samples in WebDataset's layout: `KEY.png` (or another image format)
    and, for classes, `KEY.cls` with a number from 0. `vqvae-shards` writes such shards. For a
    missing split the last training shards are set aside as a whole, so the training images should
    have been written in a random order.

    When shards are first used, one pass over them makes an index of their images, sizes, classes
    and pixel values. It is stored in their folder, or in `index_dir` if that folder cannot be
    written to. Changed files are indexed again. Remote files are assumed not to change.

    Args:
        root: Folder with `train-*.tar` and optionally `val-*.tar` and `test-*.tar`; None if `train`
            is given.
        train: Training shards: path, glob or URL, with ranges such as `{000000..000146}`; or a list
            of them.
        val: Validation shards, likewise; None for those in `root`, or to set some aside.
        test: Test shards, likewise.
        size: Side, or [height, width]: images are resized to cover it and centre-cropped. None if
            all images already have the same size.
        grey: Whether to read the images as grey instead of RGB.
        classes: File with one class name per line; None for `classes.txt` in the folder of the
            training shards, or the class numbers if there is no such file.
        index_dir: Folder for the index if the folder of the shards cannot be written to.
        num_workers: Processes per rank that read and decode; 0 reads in the training process.
        shuffle: Number of encoded images in each worker's shuffle buffer. Each epoch shuffles the
            shards, and the images within the buffer.
        batch_size: Images per optimizer step, over all ranks together.
        eval_batch_size: Images per batch in validation, testing and encoding, over all ranks
            together.
        flip: Mirror each training image left to right with probability 1/2.
        val_share: Smallest share of the training images to set aside for each missing split.
        seed: Seed of the order of training batches and of the flips.
    """

    size_key = "dataset.size"

    def __init__(
        self,
        root: str | None = None,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        size: int | Sequence[int] | None = None,
        grey: bool = False,
        classes: str | None = None,
        index_dir: str = "data/shards",
        num_workers: int = 4,
        shuffle: int = 5000,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        flip: bool = False,
        val_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, flip, val_share, seed)
        if (root is None) == (train is None):
            raise InputError(
                Key("root"),
                f"={root}, ",
                Key("train"),
                f"={train}: give one of them, the folder of the shards or the shards themselves.",
            )
        self.root = root
        self.given = {"train": train, "val": val, "test": test}
        self.view = View(check_size(size), grey)
        self.classes = classes
        self.index_dir = Path(index_dir)
        self.num_workers = int(check_range("num_workers", num_workers, 0))
        self.shuffle = check_positive("shuffle", shuffle)

    def prepare_data(self) -> None:
        """Index the shards, unless they are indexed."""
        self._index_splits()

    def setup(self, stage: str | None = None) -> None:
        """Load the splits from the index, which is made first if it is missing."""
        if self.datasets:
            return
        splits = self._index_splits()
        for name in ("test", "val"):
            if name not in splits:
                splits["train"], splits[name] = self._set_aside(name, splits["train"])
        self._check_train(sum(shard.images for shard in splits["train"]))
        everything = [shard for name in ("train", "val", "test") for shard in splits[name]]
        self.image_shape = everything[0].shape
        for shard in everything:
            if shard.shape != self.image_shape:
                raise InputError(
                    f"the images of shard {shard.url} have {shard.shape[1:]} pixels, those of "
                    f"{everything[0].url} {self.image_shape[1:]}: set ",
                    Key("size"),
                    " to bring them to one size.",
                )
        self.class_names = self._name_classes(everything)
        self._set_pixel_variance(torch.tensor([shard.levels for shard in splits["train"]]).sum(0))
        digests = {name: [shard.digest for shard in shards] for name, shards in splits.items()}
        facts = [sorted(digests.items()), self.view, self.class_names]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.datasets = {
            name: ShardDataset(splits[name], self.view, self.num_workers, self.shuffle)
            for name in ("train", "val", "test")
        }

    def _index_splits(self) -> dict[str, list[Shard]]:
        """The index entries of each split that has shards."""
        listed = {name: self._list_split(name) for name in self.given}
        urls = {name: found for name, found in listed.items() if found}
        together = [url for listed in urls.values() for url in listed]
        twice = [url for url, count in Counter(together).items() if count > 1]
        if twice:
            raise InputError(f"shard {twice[0]} is given twice: an image belongs to one split.")
        found: dict[str, Shard] = {}
        for folder in sorted({url.rpartition("/")[0] for url in together}):
            inside = [url for url in together if url.rpartition("/")[0] == folder]
            found |= index_folder(folder, inside, self.view, self.index_dir, self.num_workers)
        return {name: [found[url] for url in listed] for name, listed in urls.items()}

    def _list_split(self, name: str) -> list[str]:
        """Paths or URLs of a split, given or in `root`; empty if it must be set aside."""
        given = self.given[name]
        if given or self.root is None:
            return list_shards(name, given) if given else []
        if is_remote(self.root):
            raise InputError(
                Key("root"),
                f"={self.root}: URLs cannot be listed; give ",
                Key("train"),
                " with a range such as {000..146}.",
            )
        # The folder's name may contain characters of glob patterns.
        found = sorted(glob.glob(f"{glob.escape(self.root)}/{name}-*.tar"))
        if name == "train" and not found:
            raise InputError(
                Key("root"), f"={self.root}: there is no file {self.root}/train-*.tar."
            )
        return found

    def _set_aside(self, name: str, shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
        """Split off the last training shards: the remaining shards, and those set aside."""
        wanted = sum(shard.images for shard in shards) * self.val_share
        taken = count = 0
        while count < wanted:
            taken += 1
            count += shards[-taken].images
        if taken == len(shards):
            raise InputError(
                Key(name),
                f"=null sets whole training shards aside, but there are only {len(shards)}: give ",
                Key(name),
                ", or write smaller shards.",
            )
        aside = shards[-taken:]
        classes = [{label for s in part for label in s.labels or ()} for part in (shards, aside)]
        if len(classes[1]) == 1 < len(classes[0]):
            raise InputError(
                Key(name),
                "=null sets the last training shards aside, but all their images are of class "
                f"{classes[1].pop()}: the shards were written class by class; give ",
                Key(name),
                ", or write them in a random order.",
            )
        return shards[:-taken], aside

    def _name_classes(self, shards: list[Shard]) -> list[str]:
        """The names of the classes; empty without labels."""
        labelled = [shard for shard in shards if shard.labels is not None]
        if not labelled:
            return []
        bare = next((shard for shard in shards if shard.labels is None), None)
        if bare is not None:
            raise InputError(f"the images of shard {bare.url} have no .cls, unlike others.")
        top = max(int(label) for shard in shards for label in shard.labels or ())
        if top >= (total := sum(shard.images for shard in shards)):
            raise InputError(
                f"class {top} of a .cls is above the number of images ({total}): classes are "
                "numbered from 0."
            )
        default = Path(shards[0].url).with_name("classes.txt")
        path = Path(self.classes) if self.classes is not None else default
        if self.classes is None and (is_remote(shards[0].url) or not default.is_file()):
            return [str(number) for number in range(top + 1)]
        try:
            names = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(Key("classes"), f"={path} cannot be read: {error}") from error
        names = [name.strip() for name in names if name.strip()]
        if top >= len(names):
            shard = next(s for s in labelled if any(int(n) >= len(names) for n in s.labels or ()))
            sample = next(s for s in read_shard(shard.url) if (parse_label(s) or 0) >= len(names))
            raise InputError(
                f"{describe_sample(sample)}: class {parse_label(sample)} has no name in {path}, "
                f"which has {len(names)}."
            )
        return names
