"""Commands on two ranks: one process per rank on the CPU, started by the commands themselves."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY_VQVAE
from omegaconf import OmegaConf

from vqvae_lightning.checkpoints import load
from vqvae_lightning.tasks import VQVAETask

VQVAE = (
    *[option for option in TINY_VQVAE if not option.startswith("trainer=")],
    "trainer=ddp_cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=5",
    "dataset.batch_size=8",
    "dataset.flip=true",
    "model.net.quantizer.warmup_steps=4",
    "model.net.quantizer.revive_every=3",
)
GAUSSIAN = [o for o in VQVAE if not any(k in o for k in ("num_codes", "warmup", "revive"))]
PRIOR = (
    "trainer=ddp_cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=10",
    "trainer.val_check_interval=5",
    "model.net.channels=8",
    "model.net.layers=3",
    "model.net.first_kernel=3",
    "model.net.null_label_rate=0.3",
    "batch_size=8",
)


def metrics(folder):
    return json.loads((folder / "result.json").read_text())["metrics"]


def assert_equal(one, other):
    """Compare weights and metrics, with a tolerance for the order of sums."""
    nets = [load(folder / "checkpoints/best.ckpt").net.state_dict() for folder in (one, other)]
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    for name, entry in metrics(one).items():
        assert metrics(other)[name]["value"] == pytest.approx(entry["value"], rel=2e-3), name


@pytest.fixture(scope="module")
def pairs(toy_npz, tmp_path_factory):
    """Folders of each stage on one rank and on two, from sweeps over the number of devices."""
    folder = tmp_path_factory.mktemp("devices")
    arrays = dict(np.load(toy_npz))
    for name in arrays:  # odd numbers of images, so that the ranks have unequal parts
        if not name.startswith("train"):
            arrays[name] = arrays[name][:-1]
    np.savez(folder / "odd.npz", **arrays)
    data = ("dataset=npz", f"dataset.source.path={folder}/odd.npz", "dataset.eval_batch_size=10")
    train = [sys.executable, "-m", "vqvae_lightning.train", "-m"]
    sweeps = {
        "vqvae": ["quantizer=ema,loss", "trainer.devices=1,2", *VQVAE],
        "gaussian": ["quantizer=gaussian", "trainer.devices=1,2", *GAUSSIAN],
        "prior": [
            "--config-name",
            "prior",
            f"vqvae_checkpoint={folder}/vqvae/0/checkpoints/best.ckpt",
            "trainer.devices=1,2",
            *PRIOR,
        ],
    }
    for name, options in sweeps.items():
        command = [*train, *options, f"hydra.sweep.dir={folder / name}", *data]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
    return {
        "ema": (folder / "vqvae/0", folder / "vqvae/1"),
        "loss": (folder / "vqvae/2", folder / "vqvae/3"),
        "gaussian": (folder / "gaussian/0", folder / "gaussian/1"),
        "prior": (folder / "prior/0", folder / "prior/1"),
    }


@pytest.mark.parametrize("stage", ["ema", "loss", "gaussian", "prior"])
def test_two_ranks_end_with_the_weights_and_metrics_of_one(stage, pairs):
    one, two = pairs[stage]
    assert_equal(one, two)
    devices = [json.loads((folder / "result.json").read_text())["devices"] for folder in (one, two)]
    assert devices == [1, 2]


@pytest.mark.parametrize("stage", ["ema", "prior"])
def test_each_rank_has_the_config_of_its_job(stage, pairs):
    two = pairs[stage][1]
    given = OmegaConf.load(two / "ranks" / "config.yaml")
    assert given.folder == str(two)
    assert given.trainer.devices == 2
    assert OmegaConf.load(two / "config.yaml").model.optimizer == given.model.optimizer


@pytest.mark.parametrize("stage", ["ema", "loss", "gaussian", "prior"])
def test_the_curves_of_two_ranks_are_those_of_one(stage, pairs):
    rows = []
    for folder in pairs[stage]:
        with (folder / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == len(rows[1]), "only rank 0 writes"
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        values = [[float(value or "nan") for value in row.values()] for row in (first, second)]
        assert values[1] == pytest.approx(values[0], rel=2e-3, abs=1e-6, nan_ok=True)


def test_an_evaluation_on_two_ranks_gives_the_metrics_of_one(pairs, command, tmp_path):
    prior = pairs["prior"][0] / "checkpoints" / "best.ckpt"
    options = (f"prior_checkpoint={prior}", "num_samples=6", "classifier_steps=2")
    for devices in (1, 2):
        given = (f"trainer.devices={devices}", f"codes_dir={tmp_path}/codes{devices}")
        outcome = command("vqvae-evaluate", *options, *given, folder=tmp_path / str(devices))
        assert outcome.status == 0, outcome.err
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name, entry in one.items():
        assert two[name]["value"] == pytest.approx(entry["value"], rel=1e-4, abs=1e-9), name


def start(folder, *options):
    command = [sys.executable, "-m", "vqvae_lightning.train", *options]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def find_ranks(process):
    """Process ids of the other ranks."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)


def test_a_rank_that_dies_ends_the_job_and_is_named(toy, tmp_path, cold):
    endless = ("trainer.max_steps=1000000", "trainer.val_check_interval=500", "hydra.run.dir=run")
    process = start(tmp_path, *VQVAE, *toy, *endless)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").is_file())
    (rank,) = find_ranks(process)
    os.kill(rank, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "rank 1 failed" in err


def test_ctrl_c_stops_all_ranks_and_the_run_can_resume(toy, tmp_path, cold):
    endless = ("trainer.max_steps=100000", "trainer.val_check_interval=500", "hydra.run.dir=run")
    process = start(tmp_path, *VQVAE, *toy, *endless)
    wait_for(lambda: (tmp_path / "run" / "metrics.csv").is_file())
    ranks = find_ranks(process)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err + out
    assert "resume=" in err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def test_two_ranks_resume_as_if_they_had_not_been_stopped(toy, tmp_path, command, monkeypatch):
    # The run is stopped within the warm-up, when each rank holds its own vectors for initializing
    # the codebook. The signal reaches only rank 0.
    steps = ("trainer.max_steps=150", "trainer.val_check_interval=75", "resume=auto")
    options = [*VQVAE, *toy, *steps, "model.net.quantizer.warmup_steps=14"]
    whole = command("vqvae-train", *options, folder=tmp_path / "whole")
    assert whole.status == 0, whole.err
    original = VQVAETask.training_step

    def signalled(self, batch, batch_idx):
        if self.global_step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", signalled)
        stopped = command("vqvae-train", *options)
    assert stopped.status == 75, stopped.err
    assert "Stopped by SIGTERM after step 10" in stopped.err
    # A run from scratch would end with the same weights, so count the trained steps too.
    trained = []

    def counted(self, batch, batch_idx):
        trained.append(self.global_step)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(VQVAETask, "training_step", counted)
    again = command("vqvae-train", *options)
    assert again.status == 0, again.err
    assert trained == list(range(10, 150))
    one, other = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (whole.folder, again.folder)
    )
    assert one["global_step"] == other["global_step"] == 150
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


def test_the_whole_pipeline_runs_on_two_ranks(toy, command):
    two = ("trainer.devices=2",)  # no other number is needed
    small = ("evaluation.num_samples=12", "sampling.num_samples=6")
    outcome = command("vqvae-pipeline", "experiment=smoke", *toy, *two, *small)
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "report.html").is_file()
    for stage in ("vqvae", "prior"):
        assert json.loads((outcome.folder / stage / "result.json").read_text())["devices"] == 2
    assert OmegaConf.load(outcome.folder / "samples" / "config.yaml").devices == 2
    assert (outcome.folder / "evaluation" / "ranks" / "rank1.log").is_file()
    # The ranks leave no state for the next job of this process.
    assert "LOCAL_RANK" not in os.environ
    assert not torch.distributed.is_initialized()
