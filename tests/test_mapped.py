"""Images are read once, into a file that processes share; what they are, does not change."""

import errno
import gc
import hashlib
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import idx_files

from vqvae_lightning.data import ImageDataModule, ImageFolderSource, NpzSource, TorchvisionSource
from vqvae_lightning.data.mapped import BESIDE
from vqvae_lightning.data.sources.arrays import Split, Splits
from vqvae_lightning.errors import InputError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def module(source, cache_dir=None, **options):
    data = ImageDataModule(
        source, **{"batch_size": 8, "val_share": 0.25, **options}, cache_dir=cache_dir
    )
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def photos(tmp_path):
    """A folder of 24 images in two classes, without splits."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@contextmanager
def without_reading(monkeypatch):
    """A part of a test in which no image is decoded, and not all bytes are read."""
    with monkeypatch.context() as patch:
        for name in (
            "sources.folder.decode",
            "sources.npz.NpzSource.load",
            "sources.torchvision.TorchvisionSource._open",
        ):
            patch.setattr(f"vqvae_lightning.data.{name}", lambda *_, **__: pytest.fail("read"))
        patch.setattr(Splits, "fingerprint", lambda _: pytest.fail("all bytes were read"))
        patch.setattr(
            "vqvae_lightning.data.images._levels", lambda *_: pytest.fail("all bytes were read")
        )
        yield


def stored(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def assert_equal(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.pixel_variance == other.pixel_variance
    assert one.class_names == other.class_names
    for name in ("train", "val", "test"):
        for ours, theirs in zip(
            one.datasets[name].preview(999), other.datasets[name].preview(999), strict=True
        ):
            assert torch.equal(ours, theirs), name


def copied(images, labels, share, seed):
    """Images set aside as they were before they were rows of one array: as copies."""
    taken = round(len(images) * share)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    rest, aside = np.sort(order[taken:]), np.sort(order[:taken])
    return (images[rest], labels[rest]), (images[aside], labels[aside])


@pytest.mark.parametrize("split_seed", [0, 3])
def test_carved_splits_fingerprint_and_variance_are_those_of_copies(photos, split_seed):
    paths = sorted(photos.rglob("*.png"))
    images = np.stack([np.moveaxis(np.asarray(Image.open(path)), -1, 0) for path in paths])
    labels = np.array(["ab".index(path.parent.name) for path in paths])
    data = module(ImageFolderSource(str(photos)), split_seed=split_seed)
    train, test = copied(images, labels, 0.25, split_seed + 1)
    train, val = copied(*train, 0.25, split_seed)
    for name, (rows, numbers) in {"train": train, "val": val, "test": test}.items():
        assert np.array_equal(data.datasets[name].data, rows), name
        assert np.array_equal(data.datasets[name].labels, numbers), name
    assert data.pixel_variance == pytest.approx((train[0] / 255).var(), abs=1e-12)
    digest = hashlib.sha256(repr(["a", "b", f"0.25 {split_seed}"]).encode())
    for array in (images, labels):
        digest.update(str(array.shape).encode() + array.tobytes())
    assert data.fingerprint == digest.hexdigest()[:16]


def test_a_batch_of_a_carved_split_has_its_rows(photos):
    data = module(ImageFolderSource(str(photos)))
    train = data.datasets["train"]
    batches = list(data.batches("train"))
    assert torch.equal(torch.cat([batch.data for batch in batches]), train.data)
    (first, labels), order = next(iter(data.train_dataloader())), data.train_dataloader()
    chosen = next(iter(order.batches))
    assert torch.equal(first, train.data[chosen])
    assert torch.equal(labels, train.labels[chosen])


@pytest.mark.parametrize("kind", ["folder", "npz", "torchvision"])
def test_a_second_start_reads_nothing(kind, photos, toy_npz, tmp_path, monkeypatch):
    if kind == "folder":
        source, place = ImageFolderSource(str(photos), size=6), photos
    elif kind == "npz":
        place = tmp_path
        (tmp_path / "toy.npz").write_bytes(toy_npz.read_bytes())
        source = NpzSource(str(tmp_path / "toy.npz"), size=[4, 6])
    else:
        idx_files(tmp_path / "MNIST" / "raw", packed=False)
        source, place = TorchvisionSource(torchvision.datasets.MNIST, str(tmp_path)), tmp_path
    first = module(source)
    (folder,) = (place / BESIDE).iterdir()
    assert first.mapped == sum(d.nbytes for d in source.load()[:3] if d for d in [d.images])
    with without_reading(monkeypatch):
        again = module(source)
    assert_equal(first, again)
    # Another choice of validation images needs the bytes once more, but no decoding.
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "load", lambda *_: pytest.fail("read"))
        module(source, split_seed=7)
    with without_reading(monkeypatch):
        module(source, split_seed=7)
    assert stored(place / BESIDE) == [folder.name]


@LINUX
def test_processes_share_the_pages_of_one_file(photos):
    data = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / BESIDE).iterdir()
    address = data.datasets["train"].array.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(side, 16) for side in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith(str(folder / "train.npy"))
    assert data.memory == 0


def change(path, value=9):
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


@pytest.mark.parametrize("how", ["other pixels", "same size", "renamed", "removed", "added"])
def test_files_that_change_are_read_again(how, photos):
    before = module(ImageFolderSource(str(photos)))
    names = stored(photos / BESIDE)
    path = photos / "a" / "00.png"
    if how == "other pixels":
        change(path)
    elif how == "same size":
        contents = bytearray(path.read_bytes())
        Image.new("RGB", (8, 8)).save(path)
        path.write_bytes(path.read_bytes().ljust(len(contents), b"\0"))
        assert path.stat().st_size == len(contents)
    elif how == "renamed":
        path.rename(photos / "b" / "00.png")
    elif how == "removed":
        path.unlink()
    else:
        change(photos / "a" / "99.png")
    after = module(ImageFolderSource(str(photos)))
    assert after.fingerprint != before.fingerprint
    assert len(stored(photos / BESIDE)) == 1, "the images of the old files are left"
    assert stored(photos / BESIDE) != names


def test_each_view_of_a_folder_has_its_own_images(photos):
    views = [{}, {"grey": True}, {"size": 4}, {"size": [4, 6]}]
    for _ in range(2):
        shapes = [module(ImageFolderSource(str(photos), **view)).image_shape for view in views]
        assert shapes == [(3, 8, 8), (1, 8, 8), (3, 4, 4), (3, 4, 6)]
    assert len(stored(photos / BESIDE)) == 4


@pytest.mark.parametrize("damage", ["truncated", "missing", "header", "labels", "dtype"])
def test_damaged_images_are_read_again(damage, photos):
    before = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / BESIDE).iterdir()
    del before.datasets["train"].array
    if damage == "truncated":
        os.truncate(folder / "train.npy", 300)
    elif damage == "missing":
        (folder / "train.npy").unlink()
    elif damage == "header":
        (folder / "header.json").write_text("{")
    elif damage == "labels":
        np.save(folder / "train_labels.npy", np.zeros(3, dtype=np.int64))
    else:
        np.save(folder / "train.npy", np.zeros((24, 3, 8, 8), dtype=np.int8))
    assert_equal(module(ImageFolderSource(str(photos))), module(ImageFolderSource(str(photos))))
    assert module(ImageFolderSource(str(photos))).fingerprint == before.fingerprint


def refuse(folder):
    """Let nothing be written into `folder`; root may write where permissions forbid it."""
    folder.write_text("a file, where a folder would have to be")


def test_data_in_a_read_only_folder_are_stored_elsewhere(photos, tmp_path, monkeypatch, capsys):
    refuse(photos / BESIDE)
    source, elsewhere = ImageFolderSource(str(photos)), tmp_path / "images"
    first = module(source, str(elsewhere))
    assert len(stored(elsewhere)) == 1
    with without_reading(monkeypatch):
        assert_equal(first, module(source, str(elsewhere)))
    assert "warning" not in capsys.readouterr().out


def test_without_a_place_to_write_images_are_held_in_memory_with_a_warning(
    photos, tmp_path, capsys
):
    kept = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / BESIDE).iterdir()
    copy = tmp_path / "copy"
    photos.rename(copy)
    folder = copy / BESIDE
    folder.rename(tmp_path / "aside")
    refuse(folder)
    refuse(tmp_path / "images")
    assert capsys.readouterr().out == ""
    held = module(ImageFolderSource(str(copy)), str(tmp_path / "images"))
    said = capsys.readouterr().out
    assert said.count("warning") == 1
    assert "dataset.cache_dir" in said
    assert (held.mapped, held.memory) == (0, kept.mapped)
    kept = module(ImageFolderSource(str(copy)), str(tmp_path / "other"))
    assert_equal(held, kept)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="cannot reserve space")
def test_a_full_disk_is_found_before_anything_is_written(photos, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = module(ImageFolderSource(str(photos)))
    assert data.mapped == 0
    assert "No space left" in capsys.readouterr().out
    assert stored(photos / BESIDE) == []


def test_an_interrupted_reading_leaves_nothing_behind(photos, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqvae_lightning.data.sources.folder.decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(ImageFolderSource(str(photos)))
    assert stored(photos / BESIDE) == []


def test_two_processes_that_read_at_once_do_not_harm_each_other(photos, monkeypatch):
    whole = ImageFolderSource._read
    others = []

    def meanwhile(self, *arguments):
        # In the middle of the first one's reading the second, another process, does all of its own.
        if not others:
            others.append(None)
            others[0] = module(ImageFolderSource(str(photos)))
        return whole(self, *arguments)

    monkeypatch.setattr(ImageFolderSource, "_read", meanwhile)
    first = module(ImageFolderSource(str(photos)))
    assert_equal(first, others[0])
    assert len(stored(photos / BESIDE)) == 1


def test_files_that_change_while_they_are_read_are_an_error(photos, monkeypatch):
    whole = ImageFolderSource._read

    def meanwhile(self, *arguments):
        change(photos / "a" / "00.png", time.time_ns() % 200)
        return whole(self, *arguments)

    monkeypatch.setattr(ImageFolderSource, "_read", meanwhile)
    with pytest.raises(InputError, match="changed while they were read"):
        module(ImageFolderSource(str(photos)))
    assert stored(photos / BESIDE) == []


def test_a_source_of_ones_own_needs_no_stamp():
    class Own:
        def prepare(self):
            pass

        def load(self):
            images = torch.arange(20 * 64).view(20, 1, 8, 8).byte()
            return Splits(Split(images, None), None, None, [])

    data = module(Own())
    assert (data.mapped, data.memory) == (0, 20 * 64)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_that_is_unpacked_in_blocks_is_what_numpy_reads(
    order, save, toy_npz, tmp_path, monkeypatch
):
    monkeypatch.setattr("vqvae_lightning.data.sources.arrays.BLOCK", 7 * 12 * 8 * 3)
    with np.load(toy_npz) as archive:
        arrays = {name: np.asarray(archive[name], order=order) for name in archive.files}
    save(tmp_path / "a.npz", **arrays)
    splits = NpzSource(str(tmp_path / "a.npz")).load()
    for name, split in zip(("train", "val", "test"), splits[:3], strict=True):
        assert np.array_equal(split.images, np.moveaxis(arrays[f"{name}_images"], -1, 1)), name


@contextmanager
def anonymous_memory():
    """Most bytes that the block needs at a time, without the pages of files that it maps."""

    def now():
        (line,) = (
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        )
        return int(line.split()[1]) * 1024

    def watch():
        while not over.wait(0.002):
            seen.append(now())

    gc.collect()  # or memory of earlier tests would be freed meanwhile
    before, seen, over = now(), [now()], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    needed = []
    try:
        yield needed
    finally:
        over.set()
        thread.join()
        needed.append(max(seen) - before)


@LINUX
@pytest.mark.parametrize("carved", [True, False])
def test_loading_takes_memory_for_one_array_and_mapping_for_none(carved, tmp_path):
    # It took four times the images, in each rank.
    names = ("train", "test") if carved else ("train", "val", "test")
    images = np.random.default_rng(0).integers(0, 256, (40_000, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{name}_images": images[:: 1 if name == "train" else 2] for name in names}
    size = sum(array.nbytes for array in arrays.values())
    np.savez(tmp_path / "big.npz", **arrays)
    del images, arrays
    source = NpzSource(str(tmp_path / "big.npz"))
    refuse(tmp_path / BESIDE)
    with anonymous_memory() as needed:
        held = module(source)
    assert 0.9 * size < needed[0] < 1.3 * size
    fingerprint = held.fingerprint
    del held
    (tmp_path / BESIDE).unlink()
    for _ in range(2):  # when the file is made, and later
        with anonymous_memory() as needed:
            data = module(source)
        assert needed[0] < 0.3 * size
        assert data.fingerprint == fingerprint
        del data
