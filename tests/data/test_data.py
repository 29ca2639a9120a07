"""Sources, splits, batches and stored codes."""

import gzip
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import vqvae_lightning
from vqvae_lightning.data import (
    BundledSource,
    CodesDataModule,
    ImageDataModule,
    ImageFolderSource,
    NpzSource,
    TorchvisionSource,
)
from vqvae_lightning.data.images import EpochBatches
from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer


def module(source, **options):
    data = ImageDataModule(source, **{"batch_size": 8, **options})
    data.prepare_data()
    data.setup()
    return data


def write_npz(path, **changes):
    arrays = {
        "train_images": np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8),
        "train_labels": np.arange(40) % 4,
        "test_images": np.zeros((6, 8, 8), dtype=np.uint8),
        "test_labels": np.arange(6)[:, None] % 4,
    }
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return str(path)


def test_the_bundled_data_set_has_ten_equal_classes_and_is_small():
    source = BundledSource()
    splits = source.load()
    assert splits.train.labels.bincount().tolist() == [1000] * 10
    assert splits.test.labels.bincount().tolist() == [200] * 10
    assert splits.train.images.shape == (10_000, 1, 28, 28)
    assert splits.class_names[9] == "Ankle boot"
    assert source.path.stat().st_size < 6e6
    assert (source.path.parent / "LICENSE-fashion-mnist").read_text().count("MIT License")


def test_bundled_test_images_are_not_training_images():
    splits = BundledSource().load()
    train = {row.tobytes() for row in splits.train.images.numpy()}
    assert sum(row.tobytes() in train for row in splits.test.images.numpy()) <= 2


def test_validation_images_are_set_aside_from_training_images(toy_npz, tmp_path):
    path = write_npz(
        tmp_path / "a.npz", train_images=np.arange(40 * 64).reshape(40, 8, 8).astype(np.uint8)
    )
    data = module(NpzSource(path), val_share=0.25)
    sizes = {name: len(split) for name, split in data.datasets.items()}
    assert sizes == {"train": 30, "val": 10, "test": 6}
    rows = [row.tobytes() for name in ("train", "val") for row in data.datasets[name].data.numpy()]
    with np.load(path) as arrays:
        assert sorted(rows) == sorted(row.tobytes() for row in arrays["train_images"])
    again = module(NpzSource(path), val_share=0.25, seed=9)
    assert torch.equal(again.datasets["val"].data, data.datasets["val"].data)
    given = module(NpzSource(str(toy_npz)))
    assert len(given.datasets["val"]) == 24


def test_predicting_the_training_mean_has_an_nmse_of_one(tmp_path):
    data = module(NpzSource(write_npz(tmp_path / "a.npz")))
    pixels = data.datasets["train"].data.double() / 255
    assert ((pixels - pixels.mean()) ** 2).mean().item() / data.pixel_variance == pytest.approx(1)


def test_each_epoch_has_its_own_order_that_the_seed_repeats():
    def epoch(number, seed=5):
        batches = EpochBatches(50, 8, seed)
        batches.set_epoch(number)
        return torch.cat(list(batches))

    first = epoch(0)
    assert len(first) == 48
    assert len(first.unique()) == 48
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(0, seed=6))


def test_ranks_share_one_global_batch():
    whole = EpochBatches(50, 8, 5)
    parts = []
    for rank in range(2):
        part = EpochBatches(50, 8, 5)
        part.rank, part.world = rank, 2
        parts.append(list(part))
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat(halves))


def test_evaluation_sees_each_image_once_over_all_ranks():
    rows = []
    for rank in range(3):
        part = EpochBatches(50, 9, None)
        part.rank, part.world = rank, 3
        batches = list(part)
        assert len(batches) == len(part)
        rows += torch.cat(batches).tolist()
    assert sorted(rows) == list(range(50))


def test_a_batch_is_one_indexing_operation(tmp_path):
    data = module(NpzSource(write_npz(tmp_path / "a.npz")))
    calls = []

    class Watched:
        def __init__(self, array):
            self.array = array

        def __len__(self):
            return len(self.array)

        def __getitem__(self, rows):
            calls.append(len(rows))
            return self.array[rows]

    data.datasets["train"].array = Watched(data.datasets["train"].array)
    next(iter(data.train_dataloader()))
    assert calls == [8]


def test_images_may_be_grey_or_colour_not_square_and_without_labels(toy_npz, tmp_path):
    colour = module(NpzSource(str(toy_npz)))
    assert colour.image_shape == (3, 12, 8)
    assert colour.num_classes == 3
    bare = write_npz(tmp_path / "a.npz", train_labels=None, test_labels=None)
    grey = module(NpzSource(bare))
    assert grey.image_shape == (1, 8, 8)
    assert grey.num_classes == 0
    assert next(iter(grey.train_dataloader())).labels is None


def test_flips_mirror_about_half_of_the_training_images(toy_npz):
    class Trainer:
        training, global_rank = True, 0
        fit_loop = SimpleNamespace(total_batch_idx=3)

    data = module(NpzSource(str(toy_npz)), flip=True, batch_size=96)
    data.trainer = Trainer()
    batch = next(iter(data.train_dataloader()))
    straight = from_uint8(batch.data)
    flipped = data.on_after_batch_transfer(batch, 0).data
    same = (flipped == straight).flatten(1).all(1)
    mirrored = (flipped == straight.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 20 < mirrored.sum() < 76
    assert torch.equal(data.on_after_batch_transfer(batch, 0).data, flipped)
    Trainer.training = False
    assert torch.equal(data.on_after_batch_transfer(batch, 0).data, straight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "no array test_images"),
        ({"train_images": np.zeros((40, 8), dtype=np.uint8)}, "train_images has shape"),
        ({"train_images": np.zeros((40, 8, 8), dtype=np.float32)}, "float32, it must be uint8"),
        ({"train_images": np.zeros((40, 8, 8, 4), dtype=np.uint8)}, "train_images has shape"),
        ({"train_labels": np.zeros(39, dtype=np.int64)}, "train_labels has shape"),
        ({"train_labels": np.zeros((40, 14), dtype=np.int64)}, "train_labels has shape"),
        ({"train_labels": np.full(40, 0.5)}, "train_labels must be integers"),
        ({"train_labels": None}, "some splits have labels"),
        ({"test_images": np.zeros((6, 9, 8), dtype=np.uint8)}, "differ in shape"),
        ({"class_names": np.array(["a", "b"])}, "no entry in class_names"),
        ({"test_images": np.zeros((0, 8, 8), dtype=np.uint8)}, "test_images is empty"),
    ],
)
def test_malformed_arrays_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        NpzSource(write_npz(tmp_path / "a.npz", **changes)).load()


def test_a_missing_or_broken_npz_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        NpzSource(str(tmp_path / "none.npz")).load()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match="not a readable"):
        NpzSource(str(tmp_path / "broken.npz")).load()


def save_image(path, size=(20, 14), mode="RGB", value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


def test_a_folder_with_classes_and_splits_is_read(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                save_image(tmp_path / split / name / f"{number}.png", (20 + number, 14))
    splits = ImageFolderSource(str(tmp_path), size=[8, 12]).load()
    assert splits.class_names == ["cat", "dog"]
    assert splits.train.images.shape == (12, 3, 8, 12)
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert splits.val is None
    assert splits.train.images[:, 0].float().mean() == pytest.approx(128)


def test_a_flat_folder_is_split_without_overlap(tmp_path):
    for number in range(60):
        save_image(tmp_path / f"{number:02}.png", (8, 8), "L", number)
    data = module(ImageFolderSource(str(tmp_path), grey=True), val_share=0.1)
    values = {n: set(s.data.flatten().tolist()) for n, s in data.datasets.items()}
    assert data.num_classes == 0
    assert {n: len(v) for n, v in values.items()} == {"train": 49, "val": 5, "test": 6}
    assert set.union(*values.values()) == set(range(60))


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        ImageFolderSource(str(tmp_path / "none")).load()
    with pytest.raises(InputError, match="no images in"):
        ImageFolderSource(str(tmp_path)).load()
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png", (30, 30))
    with pytest.raises(InputError, match="set size to bring"):
        ImageFolderSource(str(tmp_path)).load()
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png is not a readable image"):
        ImageFolderSource(str(tmp_path)).load()


@pytest.mark.parametrize("size", [0, -3, [8], [8, 0], "big", [8.5, 8]])
def test_a_bad_size_is_named(size, tmp_path):
    with pytest.raises(InputError, match=r"^size="):
        ImageFolderSource(str(tmp_path), size=size)


def write_idx(path, array, packed):
    opener = gzip.open if packed else open
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


def idx_files(folder, packed):
    folder.mkdir(parents=True)
    for prefix, count in (("train", 50), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        ending = ".gz" if packed else ""
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", images, packed)
        write_idx(
            folder / f"{prefix}-labels-idx1-ubyte{ending}",
            np.arange(count, dtype=np.uint8) % 10,
            packed,
        )


@pytest.mark.parametrize("dataset", [torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST])
def test_torchvision_files_are_read_from_the_folders_of_torchvision(dataset, tmp_path):
    idx_files(tmp_path / dataset.__name__ / "raw", packed=False)
    data = module(TorchvisionSource(dataset, str(tmp_path)))
    assert data.image_shape == (1, 28, 28)
    assert len(data.datasets["test"]) == 10
    assert data.num_classes == 10


def test_packed_files_of_the_mirror_are_unpacked(tmp_path):
    idx_files(tmp_path / "mirror", packed=True)
    source = TorchvisionSource(
        torchvision.datasets.FashionMNIST, str(tmp_path / "data"), mirror=str(tmp_path / "mirror")
    )
    assert len(module(source).datasets["test"]) == 10


def test_the_layout_of_cifar_is_read(tmp_path):
    class Fake:
        classes = ("a", "b")

        def __init__(self, root, train=True, download=False):
            self.data = np.arange(30 * 72).reshape(30, 6, 4, 3).astype(np.uint8)
            self.targets = [0, 1] * 15

    data = module(TorchvisionSource(Fake, str(tmp_path)))
    assert data.image_shape == (3, 6, 4)
    assert data.class_names == ["a", "b"]
    assert data.datasets["test"].data[0, :, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("labelled", [True, False])
def test_sets_of_single_files_keep_their_labels_or_have_no_classes(labelled, tmp_path):
    class Fake:
        classes = ("a", "b")

        def __init__(self, root, split="train", download=False):
            if labelled:
                self.targets = [0, 1] * 15

        def __len__(self):
            return 30

        def __getitem__(self, index):
            return Image.new("RGB", (4, 6), (index, 0, 0)), index % 2

    data = module(TorchvisionSource(Fake, str(tmp_path)))
    assert data.datasets["test"].data[:, 0, 0, 0].tolist() == list(range(30))
    assert data.class_names == (["a", "b"] if labelled else [])
    labels = data.datasets["test"].labels
    assert labels is None if not labelled else labels.tolist() == [0, 1] * 15


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("FashionMNIST", "train-images-idx3-ubyte.gz"),
        ("KMNIST", "train-images-idx3-ubyte.gz"),
        ("CIFAR10", "cifar-10-python.tar.gz"),
        ("CIFAR100", "cifar-100-python.tar.gz"),
        ("SVHN", "train_32x32.mat"),
    ],
)
def test_a_failed_download_says_where_to_put_which_files(name, file, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    for place in (
        "torchvision.datasets.utils",
        "torchvision.datasets.mnist",
        "torchvision.datasets.cifar",
        "torchvision.datasets.svhn",
    ):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(f"{place}.{function}", refuse, raising=False)
    source = TorchvisionSource(getattr(torchvision.datasets, name), str(tmp_path))
    with pytest.raises(InputError) as caught:
        source.prepare()
    assert file in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "VQVAE_DATA_DIR" in str(caught.value)


@pytest.fixture
def codes(toy_npz, tmp_path):
    def make(seed=0, num_codes=300, folder=tmp_path):
        torch.manual_seed(seed)
        quantizer = EMAQuantizer(num_codes, 4, init="uniform", warmup_steps=0)
        net = VQVAE(quantizer, 3, hidden=8, residual_hidden=4).eval()
        return CodesDataModule(module(NpzSource(str(toy_npz))), net, f"hash{seed}", str(folder), 8)

    return make


def test_stored_codes_are_the_encoders_in_order(codes):
    data = codes()
    data.images.eval_batch_size = 7  # many batches, the last one smaller
    data.encode(torch.device("cpu"))
    data.setup()
    for split in ("train", "val", "test"):
        stored = data.datasets[split]
        images = data.images.datasets[split]
        with torch.no_grad():
            expected = data.vqvae.encode(from_uint8(images.data))
        assert torch.equal(torch.tensor(np.asarray(stored.data).astype(np.int64)), expected)
        assert torch.equal(stored.labels, images.labels)
        assert stored.data.dtype == np.uint16
    counts = data.histogram()
    assert counts.sum() == 96 * 3 * 2


def test_several_codes_per_position_are_stored_and_counted_per_codebook(codes, tmp_path):
    class Pair(torch.nn.Module):
        """Two quantizers with codebooks of their own, on the same vectors."""

        num_codes, codes_per_position, code_dim, encoder_channels = 300, 2, 4, 4

        def __init__(self):
            super().__init__()
            options = {"init": "uniform", "warmup_steps": 0}
            self.parts = torch.nn.ModuleList(EMAQuantizer(300, 4, **options) for _ in range(2))

        def encode(self, z):
            return torch.stack([part.encode(z) for part in self.parts], -1)

    data = codes()
    net = VQVAE(Pair(), 3, hidden=8, residual_hidden=4).eval()

    def make():
        return CodesDataModule(data.images, net, "pair", str(tmp_path), 8)

    pair = make()
    pair.encode(torch.device("cpu"))
    pair.setup()
    assert json.loads((pair.folder / "header.json").read_text())["codes_per_position"] == 2
    assert (pair.grid, pair.code_shape) == ((3, 2), (3, 2, 2))
    with torch.no_grad():
        expected = net.encode(from_uint8(data.images.datasets["train"].data)).numpy()
    stored = np.asarray(pair.datasets["train"].data)
    assert stored.dtype == np.uint16
    assert np.array_equal(stored, expected)
    assert not np.array_equal(stored[..., 0], stored[..., 1])
    counts = [np.bincount(expected[..., q].ravel(), minlength=300) for q in range(2)]
    assert np.array_equal(pair.histogram(), np.stack(counts))
    header = pair.folder / "header.json"
    header.write_text(header.read_text().replace('"codes_per_position": 2,', ""))
    with pytest.raises(InputError, match="codes_per_position=1, this run has 2"):
        make().setup()


def test_codes_stored_without_their_number_per_position_are_one_each(codes):
    data = codes()
    data.encode(torch.device("cpu"))
    header = data.folder / "header.json"
    header.write_text(header.read_text().replace('"codes_per_position": 1,', ""))
    assert "codes_per_position" not in header.read_text()
    data.setup()
    assert data.histogram().shape == (300,)


def test_a_batch_of_one_row_is_a_batch(codes):
    # numpy treats a tensor of one element as a number, so a last batch of one grid lost an axis.
    data = codes()
    data.encode(torch.device("cpu"))
    data.setup()
    for rows in ([5], [5, 7]):
        batch = data.datasets["train"].__getitems__(torch.tensor(rows))
        assert batch.data.shape == (len(rows), 3, 2)
        assert np.array_equal(batch.data, data.datasets["train"].data[rows])


def test_a_second_run_uses_the_stored_codes(codes, monkeypatch):
    codes().encode(torch.device("cpu"))
    again = codes()
    monkeypatch.setattr(again, "_encode", lambda *_: pytest.fail("encoded again"))
    again.encode(torch.device("cpu"))
    again.setup()


def test_an_interrupted_encoding_leaves_nothing_behind(codes, monkeypatch, tmp_path):
    data = codes()
    whole = data._encode
    calls = []

    def fails(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(data, "_encode", fails)
    with pytest.raises(KeyboardInterrupt):
        data.encode(torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "header", "foreign", "dtype", "list", "missing"])
def test_damaged_or_foreign_codes_are_refused(codes, damage):
    data = codes()
    data.encode(torch.device("cpu"))
    file = data.folder / "val.npy"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "header":
        header = data.folder / "header.json"
        header.write_text(header.read_text().replace('"num_codes": 300', '"num_codes": 301'))
    elif damage == "foreign":
        np.save(file, np.zeros((3, 3), dtype=np.uint8))
    elif damage == "list":
        (data.folder / "header.json").write_text("[]")
    elif damage == "dtype":
        np.save(file, np.load(file).astype(np.int64))
    else:
        file.unlink()
    with pytest.raises(InputError, match=str(data.folder)):
        codes().setup()


def test_two_runs_can_encode_at_the_same_time(codes, monkeypatch, tmp_path):
    first, second = codes(), codes()
    whole = first._encode

    def meanwhile(*arguments):
        # The second run encodes everything while the first is still encoding.
        if not second.folder.is_dir():
            second.encode(torch.device("cpu"))
        return whole(*arguments)

    monkeypatch.setattr(first, "_encode", meanwhile)
    first.encode(torch.device("cpu"))
    assert list(tmp_path.iterdir()) == [first.folder]
    for data in (first, second):
        data.setup()
    assert torch.equal(first.histogram(), second.histogram())


def test_the_header_describes_the_stored_codes(codes):
    data = codes()
    data.encode(torch.device("cpu"))
    header = json.loads((data.folder / "header.json").read_text())
    assert header["num_codes"] == 300
    assert header["integer"] == "uint16"
    assert header["grid"] == [3, 2]
    assert header["images"] == {"train": 96, "val": 24, "test": 30}
    assert header["vqvae_hash"] == "hash0"
    assert header["data_fingerprint"] == data.images.fingerprint
    assert header["version"] == vqvae_lightning.__version__
    labels = np.load(data.folder / "val_labels.npy")
    assert (labels == data.images.datasets["val"].labels.numpy()).all()


@pytest.mark.parametrize(("num_codes", "name"), [(256, "uint8"), (257, "uint16")])
def test_codes_are_stored_in_the_smallest_integer_that_holds_them(codes, num_codes, name):
    data = codes(num_codes=num_codes)
    data.encode(torch.device("cpu"))
    data.setup()
    assert data.datasets["train"].data.dtype == name


def test_another_vqvae_or_data_set_has_its_own_codes(codes):
    assert codes(seed=1).folder != codes(seed=2).folder
