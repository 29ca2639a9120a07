"""Each image of a shard comes once per epoch, and results equal those from memory."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from conftest import TINY_VQVAE, compose
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqvae_lightning.configs import build
from vqvae_lightning.data import CodesDataModule, ImageDataModule, NpzSource, ShardDataModule
from vqvae_lightning.data import images as images_module
from vqvae_lightning.data.images import EpochBatches
from vqvae_lightning.data.shards import index, stream
from vqvae_lightning.data.shards.stream import ShardBatches
from vqvae_lightning.data.shards.write import encode_png, write_shards
from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation.drawing import find_nearest_images
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.evaluation.reconstruction import measure_reconstruction, pair_images_with_codes
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer
from vqvae_lightning.stages.training import train
from vqvae_lightning.tasks import VQVAETask

SPLITS = ("train", "val", "test")


def write_numbered(folder, count=103, per_shard=17):
    """Write seven shards, the last with one image; each image holds its row number."""
    rows = torch.arange(count)
    images = rows.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    samples = (("png", encode_png(image), row % 3) for row, image in enumerate(images))
    assert write_shards(samples, folder, "train", per_shard) == -(-count // per_shard)
    for name in ("val", "test"):
        write_shards(
            [("png", encode_png(images[9]), 0), ("png", encode_png(images[5]), 1)], folder, name, 10
        )
    return str(folder)


def module(root, **options):
    data = ShardDataModule(root, **{"grey": True, "num_workers": 0, "batch_size": 8, **options})
    data.setup()
    return data


def values(batch):
    assert (batch.data == batch.data[:, :1, :1, :1]).all()
    assert torch.equal(batch.labels, batch.data[:, 0, 0, 0].long() % 3)
    return batch.data[:, 0, 0, 0].tolist()


def on_ranks(monkeypatch, count):
    for rank in range(count):
        monkeypatch.setattr(images_module, "get_rank_and_world", lambda r=rank: (r, count))
        yield rank


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    world=st.integers(1, 3),
    workers=st.integers(0, 3),
    local=st.integers(1, 4),
    buffer=st.integers(1, 12),
    epoch=st.integers(0, 2),
)
def test_each_row_comes_once_over_ranks_and_workers(sizes, world, workers, local, buffer, epoch):
    for seed in (3, None):
        steps, seen = set(), []
        for rank in range(world):
            plan = ShardBatches(sizes, local * world, seed, workers, buffer)
            plan.rank, plan.world = rank, world
            plan.set_epoch(epoch)
            rows = plan.rows()
            assert list(plan) == [(epoch, n) for n in range(len(rows))]
            steps.add(len(rows))
            if seed is not None:
                assert all(len(part) == local for part in rows)
            seen += [row for part in rows for row in part.tolist()]
        assert len(set(seen)) == len(seen)
        if seed is None:
            assert sorted(seen) == list(range(sum(sizes)))
        else:
            assert len(steps) == 1
            assert len(seen) == sum(sizes) // (local * world) * local * world


def test_two_ranks_of_two_workers_see_each_image_once(tmp_path, monkeypatch):
    data = module(write_numbered(tmp_path), num_workers=2, shuffle=10, eval_batch_size=6)
    given: dict[tuple[str, int], list[int]] = {}
    for _ in on_ranks(monkeypatch, 2):
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch)
            batches = []
            for number, batch in enumerate(loader):
                batches.append(values(batch))
                if number == 2:  # a scheduler may signal all processes of a job
                    pids = [str(worker.pid) for worker in loader._iterator._workers]
                    subprocess.run(["kill", "-TERM", *pids], check=True)
            assert [len(batch) for batch in batches] == [4] * 12
            assert batches == [part.tolist() for part in loader.rows()]
            given.setdefault(("train", epoch), []).extend(chain(*batches))
        loader = data.batches("train")
        batches = [values(batch) for batch in loader]
        assert batches == [part.tolist() for part in loader.rows()]
        given.setdefault(("all", 0), []).extend(chain(*batches))
        (worker, _) = loader._iterator._workers
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
    assert sorted(given["all", 0]) == list(range(103))
    first, second = given["train", 0], given["train", 1]
    assert len(set(first)) == len(first) == len(set(second)) == len(second) == 96
    assert set(first) != set(second), "each epoch drops the same images"
    assert first != second
    # The buffer shuffles.
    assert sum(abs(one - other) > 1 for one, other in pairwise(first)) > 60


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_continues_after_its_last_batch(workers, tmp_path, monkeypatch):
    data = module(write_numbered(tmp_path), num_workers=workers, shuffle=20)
    whole = data.train_dataloader()
    whole.batch_sampler.set_epoch(4)
    batches = [values(batch) for batch in whole]
    broken = data.train_dataloader()
    broken.batch_sampler.set_epoch(4)
    running = iter(broken)
    # An odd number, so that the two workers swap.
    assert [values(next(running)) for _ in range(5)] == batches[:5]
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(4)
    running = iter(resumed)
    assert values(next(running)) == batches[5]
    assert resumed.state_dict() == {"epoch": 4, "batches": 6}
    assert [values(batch) for batch in running] == batches[6:]
    resumed.batch_sampler.set_epoch(5)
    assert len([values(batch) for batch in resumed]) == 12, "the next epoch is whole"
    resumed.load_state_dict(state)  # an epoch that ended early, at its last batch
    resumed.batch_sampler.set_epoch(5)
    assert len([values(batch) for batch in resumed]) == 12, "the next epoch is whole"
    opened = []
    read = stream.read_shard
    monkeypatch.setattr(stream, "read_shard", lambda url: opened.append(url) or read(url))
    late = module(str(tmp_path), shuffle=1).train_dataloader()
    late.load_state_dict({"epoch": 0, "batches": 11})
    assert len(list(late)) == 1
    assert len(opened) <= 2, "finished shards are read again"


@pytest.fixture(scope="module")
def toy_shards(toy_npz, tmp_path_factory):
    """The toy data in shards of unequal sizes, in the order of the arrays."""
    folder = tmp_path_factory.mktemp("shards")
    source = NpzSource(str(toy_npz)).load()
    for name, per_shard in (("train", 22), ("val", 9), ("test", 40)):
        split = getattr(source, name)
        samples = zip(split.images, split.labels.tolist(), strict=True)
        write_shards(
            (("png", encode_png(i), label) for i, label in samples), folder, name, per_shard
        )
    return folder


def load_both(toy_npz, toy_shards, workers=2, **options):
    """The same data from memory and from shards."""
    memory = ImageDataModule(NpzSource(str(toy_npz)), **options)
    shards = ShardDataModule(str(toy_shards), num_workers=workers, shuffle=7, **options)
    memory.setup()
    shards.setup()
    return memory, shards


def test_training_on_shards_gives_the_model_of_training_from_memory(
    toy_npz, toy_shards, tmp_path, monkeypatch
):
    memory, shards = load_both(toy_npz, toy_shards, batch_size=32, eval_batch_size=10, flip=True)
    plan = shards.train_dataloader().batches

    class SameOrder(EpochBatches):
        def __iter__(self):
            if self.seed is None:
                yield from super().__iter__()
                return
            plan.set_epoch(self.epoch)
            yield from plan.rows()

    monkeypatch.setattr(images_module, "EpochBatches", SameOrder)
    ended = {}
    for name, data in (("memory", memory), ("shards", shards)):
        folder = tmp_path / name
        limits = [f"trainer.limit_{split}_batches=null" for split in ("val", "test")]
        options = ("trainer.max_steps=8", *limits)
        cfg = compose("vqvae", *TINY_VQVAE, *options, "dataset.flip=true", folder=folder)
        result = train(cfg, data)
        last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        ended[name] = last["state_dict"], result["metrics"]
    for name, value in ended["memory"][0].items():
        assert torch.equal(value, ended["shards"][0][name]), name
    for name, entry in ended["memory"][1].items():
        assert ended["shards"][1][name]["value"] == pytest.approx(entry["value"], rel=1e-5), name


def test_codes_and_metrics_of_shards_are_those_from_memory(toy_npz, toy_shards, tmp_path):
    torch.manual_seed(0)
    quantizer = EMAQuantizer(300, 4, init="uniform", warmup_steps=0)
    net = VQVAE(quantizer, 3, hidden=8, residual_hidden=4).eval()
    device, found = torch.device("cpu"), {}
    pair = load_both(toy_npz, toy_shards, batch_size=8, eval_batch_size=10)
    with torch.no_grad():  # encoder vectors as rows, otherwise all images would have one code
        z = net.encoder(from_uint8(pair[0].datasets["train"].data))
        quantizer.codebook.copy_(z.movedim(1, -1).reshape(-1, 4)[:300])
    for name, images in zip(("memory", "shards"), pair, strict=True):
        codes = CodesDataModule(images, net, "hash", str(tmp_path / name), 8)
        codes.encode(device)
        codes.setup()
        metrics = measure_reconstruction(codes, "train", device)
        metrics |= measure_likelihood(codes, None, "train", device)
        seen = 0
        for levels, labels, grid in pair_images_with_codes(codes, "train", device, "pairing"):
            with torch.no_grad():
                assert torch.equal(net.encode(from_uint8(levels)), grid)
            # The class is the position of a bright bar.
            bars = levels.unflatten(2, (3, 4)).amax(1).float().mean((2, 3))
            assert torch.equal(bars.argmax(1), labels)
            seen += len(levels)
        assert seen == 96
        samples = images.datasets["test"].preview(5).data
        found[name] = images, codes, metrics, find_nearest_images(images, samples)
    (memory, one, metrics, nearest), (shards, other, shard_metrics, nearest_) = found.values()
    for split in SPLITS:
        assert np.array_equal(one.datasets[split].data, other.datasets[split].data), split
        assert torch.equal(one.datasets[split].labels, other.datasets[split].labels)
        for ours, theirs in zip(
            memory.datasets[split].preview(9), shards.datasets[split].preview(9), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert shard_metrics == pytest.approx(metrics, rel=1e-5)
    assert torch.equal(nearest, nearest_)
    assert memory.image_shape == shards.image_shape == (3, 12, 8)
    assert memory.class_names == shards.class_names == ["0", "1", "2"]
    assert memory.pixel_variance == shards.pixel_variance


@pytest.mark.slow
def test_the_pipeline_runs_on_shards_on_two_ranks(toy_shards, command):
    outcome = command(
        "vqvae-pipeline",
        "experiment=smoke",
        "dataset=shards",
        f"dataset.root={toy_shards}",
        "dataset.num_workers=1",
        "trainer.devices=2",
        "prior.trainer.devices=2",
        "evaluation.num_samples=12",
        "sampling.num_samples=6",
    )
    assert outcome.status == 0, outcome.err
    result = json.loads((outcome.folder / "result.json").read_text())
    assert result["images"] == 30
    assert {"test/nats_per_code", "test/sample_accuracy"} <= set(result["metrics"])
    checkpoint = outcome.folder / "prior/checkpoints/best.ckpt"
    for name, options in (
        ("vqvae-sample", [f"prior_checkpoint={checkpoint}", "complete=test", "num_samples=4"]),
        ("vqvae-reconstruct", [f"vqvae_checkpoint={outcome.folder}/vqvae/checkpoints/best.ckpt"]),
    ):
        outcome = command(name, *options, folder=outcome.folder / name)
        assert outcome.status == 0, outcome.err


def test_a_run_on_shards_resumes_exactly(toy_shards, tmp_path, command, monkeypatch):
    options = [
        *TINY_VQVAE,
        "dataset=shards",
        f"dataset.root={toy_shards}",
        "dataset.num_workers=1",
        "dataset.shuffle=30",
        "dataset.flip=true",
        "trainer.max_steps=6",
        "callbacks.last.every_n_steps=1",
    ]
    assert command("vqvae-train", *options, folder=tmp_path / "whole").status == 0
    original = VQVAETask.training_step

    def fails(self, batch, batch_idx):
        if self.global_step == 4:  # the second epoch's second step
            raise OSError("power cut")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", fails)
        assert command("vqvae-train", *options, folder=tmp_path / "broken").status == 1
    resumed = command("vqvae-train", f"resume={tmp_path}/broken")
    assert resumed.status == 0, resumed.err
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "broken")
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("size", [None, [6, 6]])
def test_shards_of_a_folder_hold_its_images(size, tmp_path, command):
    generator = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for number in range(40):
        path = photos / f"{'ab'[number % 2]}/{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (12, 9 + (number % 3 if size else 0), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    common = ["dataset=image_folder", f"dataset.source.root={photos}", "dataset.val_share=0.1"]
    common += ["dataset.batch_size=8"]
    common += [f"dataset.source.size={size}".replace(" ", "")] if size else []
    (tmp_path / "made").mkdir()
    outcome = command("vqvae-shards", *common, f"output={tmp_path}/made", "per_shard=7")
    assert outcome.status == 0, outcome.err
    memory = build(compose("vqvae", *common, folder=tmp_path).dataset)
    memory.setup()
    made = outcome.folder
    shards = ShardDataModule(str(made), num_workers=0, batch_size=8)
    shards.setup()
    assert [len(shards.datasets[name]) for name in SPLITS] == [32, 4, 4]
    assert memory.class_names == shards.class_names == ["a", "b"]
    for name in SPLITS:
        ours, theirs = (data.datasets[name].preview(99) for data in (memory, shards))
        rows = [
            sorted(
                (image.numpy().tobytes(), int(label)) for image, label in zip(*part, strict=True)
            )
            for part in (ours, theirs)
        ]
        assert rows[0] == rows[1]
        assert torch.equal(ours.data, theirs.data) == (name != "train"), (
            "training images are shuffled"
        )
    with tarfile.open(made / "train-000000.tar") as tar:
        endings = {name.rpartition(".")[2] for name in tar.getnames()}
    assert endings == {"png" if size else "jpg", "cls"}
    assert f"dataset=shards dataset.root={made}" in outcome.out
    again = command("vqvae-shards", *common, f"output={made}", folder=made)
    assert again.status == 1


def test_missing_splits_are_the_last_training_shards(tmp_path):
    write_numbered(tmp_path)
    for name in ("val", "test"):
        (tmp_path / f"{name}-000000.tar").unlink()
    data = module(str(tmp_path), val_share=0.1)
    sizes = {name: len(data.datasets[name]) for name in SPLITS}
    assert sizes == {"train": 68, "val": 17, "test": 18}
    assert data.datasets["test"].preview(99).data[:, 0, 0, 0].tolist() == list(range(85, 103))
    with pytest.raises(InputError, match=r"^test=null .* there are only 1"):
        module(None, train=str(tmp_path / "train-000000.tar"))
    grouped = tmp_path / "grouped"
    samples = [
        ("png", encode_png(torch.full((1, 4, 4), n * 9, dtype=torch.uint8)), n // 5)
        for n in range(20)
    ]
    write_shards(samples, grouped, "train", 5)
    with pytest.raises(InputError, match=r"of class 3: the shards were written class by class"):
        module(str(grouped), batch_size=2)


def test_shards_are_given_as_ranges_lists_or_globs(tmp_path):
    root = write_numbered(tmp_path)
    held_out = {"val": f"{root}/val-000000.tar", "test": [f"{root}/test-*.tar"]}
    ranged = module(None, train=f"{root}/train-{{000000..000006}}.tar", **held_out)
    listed = module(
        None, train=[f"{root}/train-000000.tar", f"{root}/train-00000[1-6].tar"], **held_out
    )
    assert ranged.fingerprint == listed.fingerprint == module(root).fingerprint
    fewer = module(None, train=f"{root}/train-{{000000..000005}}.tar", **held_out)
    assert len(fewer.datasets["train"]) == 102
    assert fewer.fingerprint != ranged.fingerprint


def test_only_new_and_changed_shards_are_indexed(tmp_path, monkeypatch):
    root = write_numbered(tmp_path)
    scanned = []
    scan = index.scan_shard
    monkeypatch.setattr(
        index, "scan_shard", lambda url, view: scanned.append(url) or scan(url, view)
    )
    first = module(root)
    assert len(scanned) == 9
    assert module(root).fingerprint == first.fingerprint
    assert len(scanned) == 9
    changed = tmp_path / "train-000003.tar"
    shutil.copyfile(tmp_path / "train-000002.tar", changed)
    assert module(root).fingerprint != first.fingerprint
    assert scanned[9:] == [str(changed)]
    (tmp_path / "index-whole-grey.json").write_text("{")
    module(root)
    assert len(scanned) == 19
    # The folder of the shards cannot be written to.
    (tmp_path / "index-whole-grey.json").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    for _ in range(2):
        module(root, index_dir=str(tmp_path / "elsewhere"))
    assert len(scanned) == 28
    assert not (tmp_path / "index-whole-grey.json").exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs with curl")
def test_shards_behind_a_url_are_read(tmp_path):
    root = write_numbered(tmp_path / "served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = {"train": url + "/train-{000000..000006}.tar", "val": f"{url}/val-000000.tar"}
        options |= {"test": f"{url}/test-000000.tar", "index_dir": str(tmp_path / "index")}
        data = module(None, **options)
        seen = [row for batch in data.batches("train") for row in values(batch)]
        assert seen == list(range(103))
        assert len(data.datasets["train"].preview(3).data) == 3  # leaves the stream early
        with pytest.raises(InputError, match=r"none\.tar cannot be read at its start"):
            module(None, **{**options, "train": f"{url}/none.tar"})
        server.shutdown()


def pack(path, *files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, contents in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))


GOOD = encode_png(torch.arange(48, dtype=torch.uint8).view(3, 4, 4))
WIDE = encode_png(torch.zeros(3, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [("a.png", GOOD), ("b.png", GOOD[:50])],
            r"sample b of shard \S+bad.tar is not a readable",
        ),
        ([("a.png", GOOD), ("b.txt", b"")], r"sample b of .*bad.tar has no image .*\(txt\)"),
        ([("a.png", GOOD), ("a.jpg", GOOD)], r"sample a of .*bad.tar has png, jpg among"),
        ([("a.png", GOOD), ("a.png", GOOD)], r"bad.tar cannot be read at its start: .*duplicate"),
        ([("a.png", GOOD), ("a.cls", b"cat")], r"sample a of .*bad.tar: its .cls holds 'cat'"),
        ([("a.png", GOOD), ("a.cls", b"-1")], r"its .cls holds '-1', it must be a class number"),
        ([("a.png", GOOD), ("a.cls", b"1")], r"images of shard .*test.tar have no .cls, unlike"),
        ([("a.png", GOOD), ("a.cls", b"7")], r"class 7 of a .cls is above the number of images"),
        (
            [("a.png", GOOD), ("a.cls", b"0"), ("b.png", GOOD)],
            r"sample b of .*bad.tar has no .cls, unlike",
        ),
        ([("a.png", GOOD), ("b.png", WIDE)], r"sample b of .*bad.tar has .*set size"),
        ([("readme", b"")], r"bad.tar holds no samples"),
    ],
)
def test_bad_samples_are_named(files, message, tmp_path):
    pack(tmp_path / "bad.tar", *files)
    held_out = {}
    for name in ("val", "test"):
        label = [("x.cls", b"0")] if name == "val" or b"7" in files[-1] else []
        pack(tmp_path / f"{name}.tar", ("x.png", GOOD), *label)
        held_out[name] = str(tmp_path / f"{name}.tar")
    with pytest.raises(InputError, match=message):
        module(None, train=str(tmp_path / "bad.tar"), batch_size=1, grey=False, **held_out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000], r"train-000001.tar cannot be read after sample train-0000"),
        (lambda data: data[: 8 * 512], r"train-000001.tar cannot be read after .*it is cut off"),
        (lambda data: data[: 4 * 512] + b"?" * 512 + data[5 * 512 :], r"after .*it is damaged"),
        (lambda data: b"", r"train-000001.tar cannot be read at its start"),
        (lambda data: b"no tar" * 999, r"train-000001.tar cannot be read at its start"),
    ],
)
def test_damaged_shards_are_named(damage, message, tmp_path):
    root = write_numbered(tmp_path)
    file = tmp_path / "train-000001.tar"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message):
        module(root)


def test_shards_that_change_during_use_are_named(tmp_path):
    root = write_numbered(tmp_path)
    data = module(root, num_workers=1)
    shutil.copyfile(tmp_path / "train-000006.tar", tmp_path / "train-000002.tar")
    with pytest.raises(InputError, match=r"^shard \S+train-000002.tar has fewer samples"):
        list(data.batches("train"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, r"^root=None, train=None: give one of them"),
        ({"train": "x.tar"}, "give one of them"),
        ({"root": "nowhere"}, r"^root=nowhere: there is no file nowhere/train-\*\.tar"),
        ({"val": "{root}/val-{000000..000003}.tar"}, r"^val=.*no file .*val-000001\.tar"),
        ({"val": "{root}/train-000001.tar"}, r"train-000001\.tar is given twice"),
        ({"val": "pipe:rm -rf x"}, r"^val=.*there is no file pipe:rm"),
        ({"val": "s3://bucket/x.tar"}, r"must be a path, or start with one of http://"),
        ({"val": "http://host/x-*.tar"}, r"URLs cannot be listed; give a range"),
        ({"val": "{root}/{{0..1"}, r"^val="),
        ({"size": 0}, r"^size=0"),
        ({"num_workers": -1}, r"^num_workers=-1"),
        ({"shuffle": 0}, r"^shuffle=0"),
        ({"batch_size": 104}, r"^batch_size=104 is larger than the training split"),
        ({"classes": "{root}/names"}, r"^classes=\S+names cannot be read"),
        ({"classes": "{root}/two.txt"}, r"sample train-000000002 of .*class 2 has no name in"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    root = write_numbered(tmp_path)
    (tmp_path / "two.txt").write_text("zero\none\n")
    filled = {
        key: value.replace("{root}", root) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with pytest.raises(InputError, match=message):
        module(**{"root": root, **filled})
