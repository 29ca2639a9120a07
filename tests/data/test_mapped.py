"""Images are decoded once, into a file that processes share; their values do not change."""

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
from vqvae_lightning.data.mapped import FOLDER
from vqvae_lightning.data.sources import Split, Splits
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
    """Fails the test if the block decodes an image, or reads all bytes of stored images."""
    with monkeypatch.context() as patch:
        for name in (
            "sources.folder.decode",
            "sources.npz.NpzSource.load",
            "sources.torchvision.TorchvisionSource._open",
        ):
            patch.setattr(f"vqvae_lightning.data.{name}", lambda *_, **__: pytest.fail("read"))
        patch.setattr(Splits, "fingerprint", lambda _: pytest.fail("all bytes were read"))
        patch.setattr(
            "vqvae_lightning.data.images._count_levels",
            lambda *_: pytest.fail("all bytes were read"),
        )
        yield


def list_folder(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def assert_equal(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.pixel_variance == other.pixel_variance
    assert one.class_names == other.class_names
    for name in ("train", "val", "test"):
        pairs = zip(one.datasets[name].preview(999), other.datasets[name].preview(999), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


def copy_splits(images, labels, share, seed):
    """Split the images as before splits were rows of one array: as copies."""
    taken = round(len(images) * share)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    rest, aside = np.sort(order[taken:]), np.sort(order[:taken])
    return (images[rest], labels[rest]), (images[aside], labels[aside])


@pytest.mark.parametrize("split_seed", [0, 3])
def test_splits_set_aside_have_the_images_fingerprint_and_variance_of_copies(photos, split_seed):
    paths = sorted(photos.rglob("*.png"))
    images = np.stack([np.moveaxis(np.asarray(Image.open(path)), -1, 0) for path in paths])
    labels = np.array(["ab".index(path.parent.name) for path in paths])
    data = module(ImageFolderSource(str(photos)), split_seed=split_seed)
    train, test = copy_splits(images, labels, 0.25, split_seed + 1)
    train, val = copy_splits(*train, 0.25, split_seed)
    for name, (rows, numbers) in {"train": train, "val": val, "test": test}.items():
        assert np.array_equal(data.datasets[name].data, rows), name
        assert np.array_equal(data.datasets[name].labels, numbers), name
    assert data.pixel_variance == pytest.approx((train[0] / 255).var(), abs=1e-12)
    digest = hashlib.sha256(repr(["a", "b", f"0.25 {split_seed}"]).encode())
    for array in (images, labels):
        digest.update(str(array.shape).encode() + array.tobytes())
    assert data.fingerprint == digest.hexdigest()[:16]


def test_a_batch_has_the_rows_of_its_split(photos):
    data = module(ImageFolderSource(str(photos)))
    train = data.datasets["train"]
    batches = list(data.batches("train"))
    assert torch.equal(torch.cat([batch.data for batch in batches]), train.data)
    (first, labels), order = next(iter(data.train_dataloader())), data.train_dataloader()
    chosen = next(iter(order.batches))
    assert torch.equal(first, train.data[chosen])
    assert torch.equal(labels, train.labels[chosen])


@pytest.mark.parametrize("kind", ["folder", "npz", "torchvision"])
def test_a_second_run_decodes_nothing(kind, photos, toy_npz, tmp_path, monkeypatch):
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
    (folder,) = (place / FOLDER).iterdir()
    assert first.mapped == sum(d.nbytes for d in source.load()[:3] if d for d in [d.images])
    with without_reading(monkeypatch):
        again = module(source)
    assert_equal(first, again)
    # Other validation images need one pass over the bytes, but no decoding.
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "load", lambda *_: pytest.fail("read"))
        module(source, split_seed=7)
    with without_reading(monkeypatch):
        module(source, split_seed=7)
    assert list_folder(place / FOLDER) == [folder.name]


@LINUX
def test_processes_share_the_pages_of_one_file(photos):
    data = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / FOLDER).iterdir()
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
    names = list_folder(photos / FOLDER)
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
    assert len(list_folder(photos / FOLDER)) == 1, "images of the old files remain"
    assert list_folder(photos / FOLDER) != names


def test_each_view_of_a_folder_has_its_own_images(photos):
    views = [{}, {"grey": True}, {"size": 4}, {"size": [4, 6]}]
    for _ in range(2):
        shapes = [module(ImageFolderSource(str(photos), **view)).image_shape for view in views]
        assert shapes == [(3, 8, 8), (1, 8, 8), (3, 4, 4), (3, 4, 6)]
    assert len(list_folder(photos / FOLDER)) == 4


@pytest.mark.parametrize("damage", ["truncated", "missing", "header", "labels", "dtype"])
def test_damaged_images_are_read_again(damage, photos):
    before = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / FOLDER).iterdir()
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
    """Make `folder` unwritable by a file of its name, because root ignores permissions."""
    folder.write_text("a file instead of the folder")


def test_images_of_a_read_only_folder_are_stored_in_the_cache_dir(
    photos, tmp_path, monkeypatch, capsys
):
    refuse(photos / FOLDER)
    source, elsewhere = ImageFolderSource(str(photos)), tmp_path / "images"
    first = module(source, str(elsewhere))
    assert len(list_folder(elsewhere)) == 1
    with without_reading(monkeypatch):
        assert_equal(first, module(source, str(elsewhere)))
    assert "warning" not in capsys.readouterr().out


def test_images_that_cannot_be_stored_are_held_in_memory_with_a_warning(photos, tmp_path, capsys):
    kept = module(ImageFolderSource(str(photos)))
    (folder,) = (photos / FOLDER).iterdir()
    copy = tmp_path / "copy"
    photos.rename(copy)
    folder = copy / FOLDER
    folder.rename(tmp_path / "aside")
    refuse(folder)
    refuse(tmp_path / "images")
    assert capsys.readouterr().out == ""
    held = module(ImageFolderSource(str(copy)), str(tmp_path / "images"))
    printed = capsys.readouterr().out
    assert printed.count("warning") == 1
    assert "dataset.cache_dir" in printed
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
    assert list_folder(photos / FOLDER) == []


def test_an_interrupted_reading_leaves_nothing_behind(photos, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqvae_lightning.data.sources.folder.decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(ImageFolderSource(str(photos)))
    assert list_folder(photos / FOLDER) == []


def test_two_processes_can_read_at_the_same_time(photos, monkeypatch):
    whole = ImageFolderSource._read
    others = []

    def meanwhile(self, *arguments):
        # The second process reads everything while the first is still reading.
        if not others:
            others.append(None)
            others[0] = module(ImageFolderSource(str(photos)))
        return whole(self, *arguments)

    monkeypatch.setattr(ImageFolderSource, "_read", meanwhile)
    first = module(ImageFolderSource(str(photos)))
    assert_equal(first, others[0])
    assert len(list_folder(photos / FOLDER)) == 1


def test_files_that_change_while_they_are_read_are_an_error(photos, monkeypatch):
    whole = ImageFolderSource._read

    def meanwhile(self, *arguments):
        change(photos / "a" / "00.png", time.time_ns() % 200)
        return whole(self, *arguments)

    monkeypatch.setattr(ImageFolderSource, "_read", meanwhile)
    with pytest.raises(InputError, match="changed while they were read"):
        module(ImageFolderSource(str(photos)))
    assert list_folder(photos / FOLDER) == []


def test_a_users_source_needs_no_stamp():
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
def test_an_npz_unpacked_in_blocks_equals_what_numpy_reads(
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
    """Yields a list that gets the peak memory of the block in bytes, without mapped files."""

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

    gc.collect()  # otherwise memory of earlier tests might be freed within the block
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
@pytest.mark.parametrize("set_aside", [True, False])
def test_loading_takes_memory_for_one_array_and_mapping_for_none(set_aside, tmp_path):
    # It once took four times the size of the images, in each rank.
    names = ("train", "test") if set_aside else ("train", "val", "test")
    images = np.random.default_rng(0).integers(0, 256, (40_000, 32, 32, 3), dtype=np.uint8)
    arrays = {f"{name}_images": images[:: 1 if name == "train" else 2] for name in names}
    size = sum(array.nbytes for array in arrays.values())
    np.savez(tmp_path / "big.npz", **arrays)
    del images, arrays
    source = NpzSource(str(tmp_path / "big.npz"))
    refuse(tmp_path / FOLDER)
    with anonymous_memory() as needed:
        held = module(source)
    assert 0.9 * size < needed[0] < 1.3 * size
    fingerprint = held.fingerprint
    del held
    (tmp_path / FOLDER).unlink()
    for _ in range(2):  # when the file is written, and later
        with anonymous_memory() as needed:
            data = module(source)
        assert needed[0] < 0.3 * size
        assert data.fingerprint == fingerprint
        del data
