"""Both tasks learn, log the right values, and resume exactly."""

import csv
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VQVAE, compose

from vqvae_lightning.checkpoints import hash_weights, load, load_pair
from vqvae_lightning.configs import build
from vqvae_lightning.data import Batch
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer
from vqvae_lightning.stages.training import train
from vqvae_lightning.tasks import PriorTask, VQVAETask, WarmupCosine

TINY_PRIOR = (
    "trainer=debug",
    "model.net.channels=8",
    "model.net.layers=3",
    "model.net.first_kernel=3",
    "batch_size=32",
)


def minimal_trainer(steps, **options):
    import pytorch_lightning as pl

    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_val_batches": 0, **options},
    )


class OneBatch(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


def overfit(task, batch, steps, **attributes):
    import pytorch_lightning as pl

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(OneBatch(batch), batch_size=None)

    data = Data()
    for name, value in attributes.items():
        setattr(data, name, value)
    minimal_trainer(steps).fit(task, datamodule=data)


@pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])
def test_vqvae_overfits_one_batch(make):
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    net = VQVAE(make(64, 8, warmup_steps=20), 1, hidden=32, downsamplings=1, residual_hidden=16)
    task = VQVAETask(net, lambda p: torch.optim.Adam(p, 4e-3), WarmupCosine(5))
    overfit(task, Batch(images, None), 300, pixel_variance=float(images.var() / 4))
    with torch.no_grad():
        error = (net.eval()(images).reconstruction - images).square().mean() / images.var()
    assert error < 0.2  # a constant image scores 1, and noise cannot be compressed


def test_lightnings_sanity_check_does_not_set_the_codebook():
    # It once started the library's k-means.
    import pytorch_lightning as pl

    quantizer = EMAQuantizer(8, 4, init="data", warmup_steps=0)
    task = VQVAETask(VQVAE(quantizer, 1, 8, residual_hidden=4), torch.optim.Adam)
    batch = Batch(torch.rand(4, 1, 8, 8) * 2 - 1, None)
    seen = {}

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen["after the check"] = quantizer.initialised

        def on_train_batch_end(self, *_):
            seen["after a step"] = quantizer.initialised

    class Data(pl.LightningDataModule):
        pixel_variance = 0.1

        def train_dataloader(self):
            return torch.utils.data.DataLoader(OneBatch(batch), batch_size=None)

        val_dataloader = train_dataloader

    options = {"limit_val_batches": None, "num_sanity_val_steps": 2, "callbacks": [Watch()]}
    trainer = minimal_trainer(1, **options)
    trainer.fit(task, datamodule=Data())
    assert seen == {"after the check": False, "after a step": True}


def test_prior_overfits_one_batch():
    codes, labels = torch.randint(0, 16, (8, 4, 4)), torch.arange(8) % 2
    net = PixelCNN(16, 4, 4, 2, channels=32, layers=4, first_kernel=3, dropout=0.0)
    task = PriorTask(net, lambda p: torch.optim.AdamW(p, 5e-3))
    attributes = {
        "histogram": lambda: codes.flatten().bincount(minlength=16),
        "grid": (4, 4),
        "images": SimpleNamespace(image_shape=(1, 16, 16)),
    }
    overfit(task, Batch(codes, labels), 200, **attributes)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(net.eval()(codes, labels), codes)
    # The first of 16 codes cannot be predicted. With 4 images per class it costs log 4 at best.
    assert loss < 0.25


def test_schedule_rises_and_falls_along_a_cosine():
    schedule = WarmupCosine(warmup_steps=10, final=0.1)
    values = [schedule(step, 110) for step in range(111)]
    assert values[:10] == sorted(values[:10])
    assert values[10] == 1.0
    assert values[60] == pytest.approx(0.55)
    assert values[110] == pytest.approx(0.1)


@pytest.fixture
def trained(toy, tmp_path):
    """A tiny VQ-VAE and its prior, trained for a few steps."""
    vqvae = compose("vqvae", *toy, *TINY_VQVAE, folder=tmp_path / "vqvae")
    train(vqvae)
    path = tmp_path / "vqvae/checkpoints/best.ckpt"
    prior = compose(
        "prior", *toy, *TINY_PRIOR, f"vqvae_checkpoint={path}", folder=tmp_path / "prior"
    )
    # Steps so large that the average and the last weights score differently.
    prior.model.optimizer.lr, prior.model.schedule, prior.trainer.max_steps = 0.05, None, 6
    train(prior)
    return tmp_path


def test_a_checkpoint_alone_restores_the_network(trained):
    prior, vqvae = load_pair(trained / "prior/checkpoints/best.ckpt")
    assert prior.net.num_codes == vqvae.net.quantizer.num_codes == 16
    assert (prior.net.height, prior.net.width, prior.net.num_classes) == (3, 2, 3)
    assert not prior.net.training
    assert not any(p.requires_grad for p in vqvae.net.parameters())
    assert prior.config["vqvae_hash"] == hash_weights(vqvae.net)
    assert vqvae.config["model"]["net"]["channels"] == 3


def test_a_prior_is_tested_with_the_averaged_weights_it_saves(trained):
    prior, _ = load_pair(trained / "prior/checkpoints/best.ckpt")
    raw = torch.load(trained / "prior/checkpoints/best.ckpt", weights_only=True)
    last = raw["current_model_state"]["net.embedding.weight"]
    assert not torch.equal(prior.net.embedding.weight, last)
    task = build(prior.config["model"])
    task.load_state_dict(raw["state_dict"])
    from vqvae_lightning.runs.results import read_result
    from vqvae_lightning.stages.inputs import build_codes

    cfg = compose(
        "prior",
        "dataset=npz",
        f"dataset.source.path={prior.config['dataset']['source']['path']}",
        f"vqvae_checkpoint={trained}/vqvae/checkpoints/best.ckpt",
    )
    images = build(cfg.dataset)
    images.setup()
    path = trained / "vqvae/checkpoints/best.ckpt"
    codes = build_codes(images, load(path).net, path, cfg, cfg.batch_size)
    codes.setup()
    rows = torch.tensor(codes.datasets["test"].data).long()
    nats = torch.nn.functional.cross_entropy(prior.net(rows, codes.datasets["test"].labels), rows)
    stored = read_result(trained / "prior")["metrics"]["test/nats_per_code"]["value"]
    assert stored == pytest.approx(nats.item(), rel=1e-4)


def test_logged_terms_add_up(toy, tmp_path):
    overrides = (
        *TINY_VQVAE,
        "trainer.max_steps=6",
        "quantizer=loss",
        "model.net.quantizer.commitment=0.3",
    )
    train(compose("vqvae", *toy, *overrides, folder=tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/codebook"]]
    assert len(rows) >= 4
    for row in rows:
        terms = {k: float(v) for k, v in row.items() if v and k.startswith("train/")}
        assert terms["train/commitment_weighted"] == pytest.approx(
            0.3 * terms["train/commitment"], rel=1e-4
        )
        total = (
            terms["train/nmse"]
            + terms["train/commitment_weighted"]
            + terms["train/codebook_weighted"]
        )
        assert terms["train/loss"] == pytest.approx(total, rel=1e-4)


def test_each_revived_code_is_logged_once(toy, tmp_path, monkeypatch):
    returned = []
    update = EMAQuantizer.update

    def spy(self, progress=0.0):
        logs = update(self, progress)
        returned.append(logs.get("revived_codes", 0.0))
        return logs

    monkeypatch.setattr(EMAQuantizer, "update", spy)
    revival = ("model.net.quantizer.revive_every=2", "model.net.quantizer.revive_below=1")
    options = ("trainer.max_steps=12", "trainer.log_every_n_steps=1")
    train(compose("vqvae", *toy, *TINY_VQVAE, *revival, *options, folder=tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == len(returned) == 12
    assert sum(value > 0 for value in returned) >= 3
    # The codebook is updated after a step is logged.
    assert [float(row["train/revived_codes"] or 0) for row in rows] == [0.0, *returned[:-1]]


def interrupt(monkeypatch, task, step, how):
    method = "validation_step" if how == "crash in validation" else "training_step"
    original = getattr(task, method)

    def stopped(self, batch, batch_idx):
        if self.global_step == step:
            if how.startswith("crash"):
                raise OSError("power cut")
            signal.raise_signal(signal.SIGTERM if how == "sigterm" else signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(task, method, stopped)


def read_rows(folder, name):
    """Rows of `metrics.csv` that have `name`, without empty values."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [{key: value for key, value in row.items() if value} for row in rows]


def trained_steps(monkeypatch, task):
    """Record the steps that `task` trains from now on.

    The weights do not show whether a run resumed, because one that starts over ends with the same.
    """
    original, steps = task.training_step, []

    def step(self, batch, batch_idx):
        steps.append(self.global_step)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", step)
    return steps


# An epoch has three steps, or two: stop within it, at its end, and after it. Every second step is
# validated: stop there, at the end of an epoch too, and while validating.
@pytest.mark.parametrize(
    ("how", "step", "epoch"),
    [
        ("crash", 2, 3),
        ("crash", 3, 3),
        ("crash", 2, 2),
        ("ctrl-c", 4, 3),
        ("ctrl-c", 3, 3),
        ("ctrl-c", 5, 3),
        ("crash in validation", 4, 3),
        ("crash in validation", 6, 3),
    ],
)
@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_resume_equals_uninterrupted(stage, step, how, epoch, toy, tmp_path, command, monkeypatch):
    options = [*toy, "callbacks.last.every_n_steps=1", "dataset.flip=true"]
    options += [f"trainer.limit_train_batches={epoch}"]
    if stage == "vqvae":
        options = [*options, *TINY_VQVAE, "model.net.quantizer.revive_every=2"]
    else:
        assert command("vqvae-train", *toy, *TINY_VQVAE, folder=tmp_path / "first").status == 0
        path = tmp_path / "first/checkpoints/best.ckpt"
        options = [
            "--config-name",
            "prior",
            *options,
            *TINY_PRIOR,
            f"vqvae_checkpoint={path}",
            "model.net.dropout=0.5",
        ]
    options = [*options, "trainer.max_steps=8"]
    whole = command("vqvae-train", *options, folder=tmp_path / "whole")
    assert whole.status == 0, whole.err
    with monkeypatch.context() as patch:
        interrupt(patch, VQVAETask if stage == "vqvae" else PriorTask, step, how)
        broken = command("vqvae-train", *options, folder=tmp_path / "broken")
    if how == "ctrl-c":
        assert broken.status == 130
        assert f"vqvae-train resume={tmp_path}/broken" in broken.err
        assert f"after step {step + 1}" in broken.err
    else:
        assert broken.status == 1
    assert not (tmp_path / "broken/result.json").exists()
    trained = trained_steps(monkeypatch, VQVAETask if stage == "vqvae" else PriorTask)
    resumed = command("vqvae-train", f"resume={tmp_path}/broken")
    assert resumed.status == 0, resumed.err
    saved = {"crash": step, "ctrl-c": step + 1, "crash in validation": step - 1}[how]
    assert trained == list(range(saved, 8))
    for kind in ("last", "best"):
        one, other = (
            torch.load(tmp_path / name / f"checkpoints/{kind}.ckpt", weights_only=True)
            for name in ("whole", "broken")
        )
        assert one["global_step"] == other["global_step"]
        assert kind == "best" or one["global_step"] == 8
        for name, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name
    one, other = (tmp_path / name for name in ("whole", "broken"))
    monitor = "val/nmse" if stage == "vqvae" else "val/nats_per_code"
    assert [int(row["step"]) for row in read_rows(one, monitor)] == [1, 3, 5, 7]
    assert read_rows(other, monitor) == read_rows(one, monitor)
    # The step of Ctrl-C is saved, but if it is not validated the run stops before its row is
    # written.
    lost = {str(step)} if how == "ctrl-c" and saved % 2 else set()
    expected = [r for r in read_rows(one, "train/learning_rate") if r["step"] not in lost]
    assert read_rows(other, "train/learning_rate") == expected


COUNTED = ("trainer.max_steps=7", "trainer.log_every_n_steps=3", "callbacks.pictures=null")
REVIVAL = ("model.net.quantizer.revive_every=1", "model.net.quantizer.revive_below=1")


def test_the_last_step_is_logged_with_its_own_values(toy, tmp_path):
    options = (*toy, *TINY_VQVAE, *COUNTED)
    for every in (1, 3):
        given = (*options, f"trainer.log_every_n_steps={every}")
        train(compose("vqvae", *given, folder=tmp_path / str(every)))
    each, some = (read_rows(tmp_path / str(every), "train/loss") for every in (1, 3))
    assert [row["step"] for row in some] == ["2", "5", "6"]
    for row in some:
        (same,) = [one for one in each if one["step"] == row["step"]]
        for name in ("train/loss", "train/commitment", "train/learning_rate"):
            assert row[name] == same[name]


def test_a_validation_does_not_reset_what_training_counts(toy, tmp_path):
    for interval in (2, 100):
        options = (*COUNTED, f"trainer.val_check_interval={interval}")
        train(compose("vqvae", *toy, *TINY_VQVAE, *options, folder=tmp_path / str(interval)))
    often, never = (read_rows(tmp_path / str(interval), "train/loss") for interval in (2, 100))
    assert len(often) == 3
    assert often == never


@pytest.mark.parametrize("quantizer", ["ema", "gaussian"])
def test_a_resumed_run_logs_what_the_interrupted_one_counted(
    quantizer, toy, tmp_path, command, monkeypatch
):
    # An interval of validations that is never reached, so that the last step is the only one.
    options = [*toy, f"quantizer={quantizer}", *COUNTED, "trainer.val_check_interval=100"]
    if quantizer == "ema":
        options += [*TINY_VQVAE, *REVIVAL]
    else:
        options += [o for o in TINY_VQVAE if "num_codes" not in o and "warmup" not in o]
    options += COUNTED
    assert command("vqvae-train", *options, folder=tmp_path / "whole").status == 0
    with monkeypatch.context() as patch:
        interrupt(patch, VQVAETask, 3, "ctrl-c")
        assert command("vqvae-train", *options, folder=tmp_path / "broken").status == 130
    resumed = command("vqvae-train", f"resume={tmp_path}/broken")
    assert resumed.status == 0, resumed.err
    whole, broken = (read_rows(tmp_path / name, "train/loss") for name in ("whole", "broken"))
    assert [row["step"] for row in whole] == ["2", "5", "6"]
    assert broken == whole
    if quantizer == "ema":
        assert float(whole[1]["train/revived_codes"]) > 0


def checkpoints_of(*folders):
    return [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders]


def test_a_killed_run_resumes_with_resume_auto(toy, tmp_path, command, monkeypatch):
    # A requeued cluster job runs the same command in the same folder.
    steps = ("trainer.max_steps=200", "trainer.val_check_interval=100", "resume=auto")
    options = (*toy, *TINY_VQVAE, *steps, "callbacks.last.every_n_steps=10", "dataset.flip=true")
    whole = command("vqvae-train", *options, folder=tmp_path / "whole")
    assert whole.status == 0, whole.err
    folder = tmp_path / "killed"
    process = [
        sys.executable,
        "-m",
        "vqvae_lightning.train",
        *options,
        f"hydra.run.dir={folder}",
    ]
    with subprocess.Popen(process, stdout=subprocess.DEVNULL, cwd=tmp_path) as running:
        last, end = folder / "checkpoints/last.ckpt", time.monotonic() + 300
        while not last.is_file() and time.monotonic() < end:
            time.sleep(0.01)
        running.kill()
    assert not (folder / "result.json").exists()
    (killed,) = checkpoints_of(folder)
    assert 10 <= killed["global_step"] < 200
    trained = trained_steps(monkeypatch, VQVAETask)
    again = command("vqvae-train", *options, folder=folder)
    assert again.status == 0, again.err
    assert trained == list(range(killed["global_step"], 200))
    one, other = checkpoints_of(whole.folder, folder)
    assert one["global_step"] == other["global_step"] == 200
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


@pytest.mark.parametrize("requeued", [False, True], ids=["resume=auto", "requeued by Slurm"])
def test_the_same_command_resumes_an_unfinished_run(requeued, toy, command, monkeypatch):
    options = [*toy, *TINY_VQVAE, "trainer.max_steps=6", "callbacks.last.every_n_steps=1"]
    if not requeued:
        options.append("resume=auto")
    with monkeypatch.context() as patch:
        interrupt(patch, VQVAETask, 4, "crash")
        assert command("vqvae-train", *options).status == 1
    if requeued:
        refused = command("vqvae-train", *options)
        assert refused.status == 1
        assert "already holds a run" in refused.err
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    other = command("vqvae-train", *options, "seed=3")
    assert other.status == 1
    assert "another command" in other.err
    trained = trained_steps(monkeypatch, VQVAETask)
    again = command("vqvae-train", *options)
    assert again.status == 0, again.err
    assert trained == [4, 5]


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(toy, tmp_path, command, monkeypatch):
    options = (*toy, *TINY_VQVAE, "trainer.max_steps=8", "callbacks.last.every_n_steps=1")
    whole = command("vqvae-train", *options, folder=tmp_path / "whole")
    assert whole.status == 0, whole.err
    with monkeypatch.context() as patch:
        interrupt(patch, VQVAETask, 4, "crash")
        command("vqvae-train", *options, folder=tmp_path / "broken")
    last = tmp_path / "broken/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    trained = trained_steps(monkeypatch, VQVAETask)
    resumed = command("vqvae-train", f"resume={tmp_path}/broken")
    assert resumed.status == 0, resumed.err
    assert trained == list(range(3, 8))
    assert "last.ckpt is damaged" in resumed.out.replace("\n", " ")
    one, other = checkpoints_of(tmp_path / "whole", tmp_path / "broken")
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


def test_a_schedulers_signal_saves_and_asks_to_be_rerun(toy, tmp_path, command, monkeypatch):
    options = (*toy, *TINY_VQVAE, "trainer.max_steps=8")
    interrupt(monkeypatch, VQVAETask, 4, "sigterm")
    outcome = command("vqvae-train", *options)
    assert outcome.status == 75
    assert "Stopped by SIGTERM after step 5" in outcome.err
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


def test_a_finished_run_is_not_trained_again(toy, tmp_path, command, monkeypatch):
    folder = tmp_path / "run"
    assert command("vqvae-train", *toy, *TINY_VQVAE).status == 0
    interrupt(monkeypatch, VQVAETask, 0, "crash")
    assert command("vqvae-train", f"resume={folder}").status == 0


def test_a_nan_loss_stops_before_the_weights_and_keeps_the_last_checkpoint(toy, tmp_path, command):
    options = (*toy, *TINY_VQVAE, "trainer.max_steps=50", "callbacks.last.every_n_steps=1")
    options = (*options, "model.optimizer.lr=1e20", "model.schedule=null")
    outcome = command("vqvae-train", *[o for o in options if o != "trainer.max_steps=2"])
    assert outcome.status == 1
    assert "the loss is" in outcome.err
    assert "nmse=" in outcome.err
    assert "Traceback" not in outcome.err
    net = load(tmp_path / "run/checkpoints/last.ckpt").net
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_the_same_seed_gives_the_same_weights(toy, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(compose("vqvae", *toy, *TINY_VQVAE, f"seed={seed}", folder=tmp_path / name))
        states.append(load(tmp_path / name / "checkpoints/best.ckpt").net.state_dict())
    first, same, other = (state["encoder.layers.0.weight"] for state in states)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_validation_and_pictures_change_no_weight(toy, tmp_path):
    # Sanity checks, validation and pictures must not learn, so that it does not matter how many
    # there are.
    states = []
    for name, every in (("often", 1), ("never", 6)):
        options = (*TINY_VQVAE, "trainer.max_steps=6", f"trainer.val_check_interval={every}")
        train(compose("vqvae", *toy, *options, folder=tmp_path / name))
        raw = torch.load(tmp_path / name / "checkpoints/best.ckpt", weights_only=True)
        states.append((raw["global_step"], raw["state_dict"]))
    last = [s for step, s in states if step == 6]
    if len(last) == 2:
        for key, value in last[0].items():
            assert torch.equal(value, last[1][key]), key
    else:
        pytest.fail("the best checkpoint is not the last; lengthen the run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_schedulers_signal_stops_every_phase(number, toy, tmp_path, command, monkeypatch):
    from vqvae_lightning.stages import evaluating

    def stopped(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = signal.getsignal(number)
    smoke = ("experiment=smoke", "evaluation.num_samples=12", "sampling.num_samples=6", *toy)
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "fetch_classifier", stopped)
        outcome = command("vqvae-pipeline", *smoke)
    assert outcome.status == 75
    assert f"Stopped by {signal.Signals(number).name}" in outcome.err
    assert "vqvae-pipeline resume=" in outcome.err
    assert signal.getsignal(number) == before
    assert command("vqvae-pipeline", f"resume={tmp_path}/run").status == 0
