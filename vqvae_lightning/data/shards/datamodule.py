"""The LightningDataModule over tar shards."""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from vqvae_lightning.console import progress_bar
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.data.shards.index import (
    Shard,
    View,
    _is_remote,
    _scanned,
    _stamp,
    _stored,
    _where,
    label_of,
    read_shard,
    shard_urls,
)
from vqvae_lightning.data.shards.stream import ShardDataset
from vqvae_lightning.data.sources.arrays import check_size
from vqvae_lightning.errors import InputError, Key, check_positive, check_range
from vqvae_lightning.files import write_text


class ShardDataModule(PixelDataModule):
    """Images out of tar shards, for sets that do not fit in memory.

    A shard is a tar file of samples in WebDataset's layout: `KEY.png` (or another image) and, for
    classes, `KEY.cls` with a number from 0. `vqvae-shards` writes them. Where a split is not given,
    whole shards at the end of the training shards are set aside, so these should have been written
    in a random order.

    An index (how many images, of which size and classes, the values of their pixels) is made in one
    pass over all shards when they are first used. It is kept beside them, or in `index_dir` where
    nothing can be written there, and made anew for files that changed; files behind a URL are taken
    never to.

    Args:
        root: Folder with `train-*.tar` and, if there are, `val-*.tar` and `test-*.tar`; null if
            `train` is given.
        train: Shards: paths or URLs, with `{000000..000146}` for a range or `*`; or a list of them.
        val: Likewise.
        test: Likewise.
        size: Side, or [height, width]: the shorter side is resized and the centre cropped. None if
            all images have one size already.
        grey: Whether to read grey images instead of RGB.
        classes: File with the name of a class on each line; null: `classes.txt` beside the training
            shards, or else the classes are called by their numbers.
        index_dir: For indexes that cannot be kept beside the shards.
        num_workers: Processes that read and decode, for each rank; 0 to do without.
        shuffle: Images that each of them holds, still packed, to draw the next one from. The order
            of an epoch is that of the shards, drawn anew, and this drawing.
        batch_size: Images per optimizer step, over all ranks together.
        eval_batch_size: Images per batch in validation, testing and encoding, over all ranks
            together.
        flip: Mirror each training image left to right with probability 1/2.
        val_share: Share of the training images set aside, at least, for each split not given.
        seed: Order of the training batches and flips.
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
                f"={train}: give one of them, the folder of the shards or the shards.",
            )
        self.root = root
        self.given = {"train": train, "val": val, "test": test}
        self.view = View(check_size(size), grey)
        self.classes = classes
        self.index_dir = Path(index_dir)
        self.num_workers = int(check_range("num_workers", num_workers, 0))
        self.shuffle = check_positive("shuffle", shuffle)

    def prepare_data(self) -> None:
        """Make the index, unless it is there."""
        self._indexed()

    def setup(self, stage: str | None = None) -> None:
        """Read the index, and make it first if need be."""
        if self.datasets:
            return
        splits = self._indexed()
        for name in ("test", "val"):
            if name not in splits:
                splits["train"], splits[name] = self._set_aside(name, splits["train"])
        self._check_train(sum(shard.images for shard in splits["train"]))
        everything = [shard for name in ("train", "val", "test") for shard in splits[name]]
        self.image_shape = everything[0].shape
        for shard in everything:
            if shard.shape != self.image_shape:
                raise InputError(
                    f"the images of shard {shard.url} are {shard.shape[1:]} pixels, those of "
                    f"{everything[0].url} {self.image_shape[1:]}: set ",
                    Key("size"),
                    " to bring them to one size.",
                )
        self.class_names = self._names(everything)
        self._take_levels(torch.tensor([shard.levels for shard in splits["train"]]).sum(0))
        digests = {name: [shard.digest for shard in shards] for name, shards in splits.items()}
        facts = [sorted(digests.items()), self.view, self.class_names]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.datasets = {
            name: ShardDataset(splits[name], self.view, self.num_workers, self.shuffle)
            for name in ("train", "val", "test")
        }

    def _indexed(self) -> dict[str, list[Shard]]:
        """The shards of each split that is given."""
        listed = {name: self._listed(name) for name in self.given}
        urls = {name: found for name, found in listed.items() if found}
        together = [url for listed in urls.values() for url in listed]
        twice = [url for url, count in Counter(together).items() if count > 1]
        if twice:
            raise InputError(f"shard {twice[0]} is given twice: an image belongs to one split.")
        found: dict[str, Shard] = {}
        for folder in sorted({url.rpartition("/")[0] for url in together}):
            inside = [url for url in together if url.rpartition("/")[0] == folder]
            found |= self._index(folder, inside)
        return {name: [found[url] for url in listed] for name, listed in urls.items()}

    def _listed(self, name: str) -> list[str]:
        """The shards of a split, given or in `root`; none if it must be set aside."""
        given = self.given[name]
        if given or self.root is None:
            return shard_urls(name, given) if given else []
        if _is_remote(self.root):
            said = f"={self.root}: nothing lists URLs; give "
            raise InputError(Key("root"), said, Key("train"), " with a range, {000..146}.")
        # The folder's name is no pattern, whatever characters it has.
        found = sorted(glob.glob(f"{glob.escape(self.root)}/{name}-*.tar"))
        if name == "train" and not found:
            said = f"={self.root}: there is no file {self.root}/train-*.tar."
            raise InputError(Key("root"), said)
        return found

    def _index(self, folder: str, urls: list[str]) -> dict[str, Shard]:
        """The index of the shards of a folder, completed."""
        file = f"index-{self.view.name}.json"
        own = self.index_dir / hashlib.sha256(folder.encode()).hexdigest()[:16] / file
        beside = None if _is_remote(folder) else Path(folder or ".") / file
        stored = {**_stored(beside), **_stored(own)}
        stamps = {url: _stamp(url) for url in urls}
        known: dict[str, Shard] = {}
        for url in urls:
            entry = stored.get(url.rpartition("/")[2])
            # One of other fields, as another version may have written, is made anew.
            whole = {*Shard._fields, "stamp"} - {"url"}
            if entry is None or entry.keys() != whole:
                continue
            if entry["stamp"] == stamps[url]:
                fields = {**entry, "url": url, "shape": tuple(entry["shape"])}
                del fields["stamp"]
                known[url] = Shard(**fields)
        missing = [url for url in urls if url not in known]
        if not missing:
            return known
        try:
            with progress_bar("indexing the shards", None) as advance:
                for shard in _scanned(missing, self.view, self.num_workers):
                    known[shard.url] = shard
                    advance(shard.images)
        finally:
            # After an interruption too: what has been read need not be read again.
            entries = dict(stored)
            for url, shard in known.items():
                entry = {**shard._asdict(), "stamp": stamps[url]}
                del entry["url"]
                entries[url.rpartition("/")[2]] = entry
            writable = beside is not None and os.access(beside.parent, os.W_OK)
            write_text(beside if beside is not None and writable else own, json.dumps(entries))
        return known

    def _set_aside(self, name: str, shards: list[Shard]) -> tuple[list[Shard], list[Shard]]:
        """The training shards without the last ones, and these."""
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

    def _names(self, shards: list[Shard]) -> list[str]:
        """Names of the classes; empty without labels."""
        labelled = [shard for shard in shards if shard.labels is not None]
        if not labelled:
            return []
        bare = next((shard for shard in shards if shard.labels is None), None)
        if bare is not None:
            raise InputError(f"the images of shard {bare.url} have no .cls, unlike others.")
        top = max(int(label) for shard in shards for label in shard.labels or ())
        if top >= (total := sum(shard.images for shard in shards)):
            raise InputError(
                f"class {top} of a .cls is above the number of images ({total}): classes count "
                "from 0."
            )
        beside = Path(shards[0].url).with_name("classes.txt")
        path = Path(self.classes) if self.classes is not None else beside
        if self.classes is None and (_is_remote(shards[0].url) or not beside.is_file()):
            return [str(number) for number in range(top + 1)]
        try:
            names = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(Key("classes"), f"={path} cannot be read: {error}") from error
        names = [name.strip() for name in names if name.strip()]
        if top >= len(names):
            shard = next(s for s in labelled if any(int(n) >= len(names) for n in s.labels or ()))
            sample = next(s for s in read_shard(shard.url) if (label_of(s) or 0) >= len(names))
            raise InputError(
                f"{_where(sample)}: class {label_of(sample)} has no name in {path}, which has "
                f"{len(names)}."
            )
        return names
