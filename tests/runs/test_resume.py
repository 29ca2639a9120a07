"""A resumed run uses the data that it began with, and adds up the time of all its parts."""

import numpy as np
import pytest
from conftest import TINY_VQVAE, compose
from omegaconf import OmegaConf

from vqvae_lightning.configs import to_plain
from vqvae_lightning.errors import InputError, Interrupted
from vqvae_lightning.runs import stopwatch
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_result
from vqvae_lightning.runs.resume import read_run_config
from vqvae_lightning.runs.stopwatch import Stopwatch, time_stage
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.pipeline import compose_stages
from vqvae_lightning.stages.training import train
from vqvae_lightning.tasks import PriorTask, VQVAETask

SMOKE = ("experiment=smoke", "evaluation.num_samples=12", "sampling.num_samples=6")


@pytest.fixture
def data(toy_npz, tmp_path):
    """A copy of the toy data: its overrides, its file, its fingerprint, and how to change it."""
    path = tmp_path / "data.npz"
    path.write_bytes(toy_npz.read_bytes())
    overrides = ("dataset=npz", f"dataset.source.path={path}")

    def fingerprint():
        return load_images(compose("vqvae", *overrides).dataset).fingerprint

    def replace():
        with np.load(path) as arrays:
            changed = dict(arrays)
        changed["train_images"] = 255 - changed["train_images"]
        np.savez(path, **changed)

    return overrides, path, fingerprint, replace


def test_a_run_does_not_go_on_with_other_data(data, command):
    overrides, path, fingerprint, replace = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", _stop)
        first = command("vqvae-train", *TINY_VQVAE, *overrides)
    assert first.status == 130, first.err
    before = fingerprint()
    replace()
    second = command("vqvae-train", f"resume={first.folder}")
    assert second.status == 1
    assert second.err == (
        f"error: the run in {first.folder} began on data with fingerprint {before}, but "
        f"dataset.source.path={path} now has {fingerprint()}: restore the data, or begin another "
        "run.\n"
    )


def test_the_stages_of_a_pipeline_see_the_same_data(data, command, tmp_path):
    overrides, path, fingerprint, replace = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PriorTask, "training_step", _stop)
        assert command("vqvae-pipeline", *SMOKE, *overrides).status == 130
    before = fingerprint()
    replace()
    outcome = command("vqvae-pipeline", f"resume={tmp_path}/run")
    assert outcome.status == 1
    assert "done before" not in outcome.out
    for word in (before, fingerprint(), f"dataset.source.path={path}", f"{tmp_path}/run began"):
        assert word in outcome.err

    checkpoint = f"vqvae_checkpoint={tmp_path}/run/vqvae/checkpoints/best.ckpt"
    for number, name in enumerate(("vqvae-evaluate", "vqvae-reconstruct")):
        outcome = command(name, checkpoint, folder=tmp_path / str(number))
        assert outcome.status == 1
        assert len(outcome.err.splitlines()) == 1
        for word in (
            before,
            fingerprint(),
            f"dataset.source.path={path}",
            "checkpoint was trained on",
        ):
            assert word in outcome.err
    # On purpose.
    outcome = command("vqvae-evaluate", checkpoint, *overrides, folder=tmp_path / "other")
    assert outcome.status == 0, outcome.err


def test_stages_that_had_not_begun_are_resumed_in_their_own_folders(toy, command, tmp_path):
    # The prior's best checkpoint was written into the pipeline's folder, and its last one tested.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", _stop)
        assert command("vqvae-pipeline", *SMOKE, *toy).status == 130
    run = (tmp_path / "run").rename(tmp_path / "moved")
    before = compose_stages(compose("pipeline", *SMOKE, *toy, folder=run))
    resumed = compose_stages(read_run_config(run, run, []))
    filled_in = ("command", "commit", "data_fingerprint")
    for name in ("prior", "evaluation", "samples"):
        for key in set(before[name]) - set(filled_in):
            assert resumed[name][key] == before[name][key], (name, key)
    assert command("vqvae-pipeline", f"resume={run}").status == 0
    assert (run / "prior/checkpoints/best.ckpt").is_file()
    assert not (run / "checkpoints").exists()


def _stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: Clock.now)
    return Clock


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, Interrupted, SystemExit])
def test_the_parts_of_a_run_add_up(error, clock, tmp_path):
    def part():
        with time_stage(tmp_path):
            clock.now += 5
            raise error("stopped")

    for _ in range(2):
        with pytest.raises(error):
            part()
    with time_stage(tmp_path) as watch:
        clock.now += 2.5
        assert watch.seconds == 12.5
    assert not RunFolder(tmp_path).seconds.exists()


def test_refused_input_leaves_no_time(clock, tmp_path):
    def part():
        with time_stage(tmp_path):
            clock.now += 3
            raise InputError("no")

    with pytest.raises(InputError):
        part()
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").touch()  # a run that had begun: a file has changed under way
    with pytest.raises(InputError):
        part()
    assert Stopwatch(tmp_path).seconds == 3


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_a_resumed_stage_counts_the_seconds_of_all_its_parts(end, toy, clock, tmp_path):
    cfg = compose(
        "vqvae",
        *toy,
        *TINY_VQVAE,
        "callbacks.last.every_n_steps=2",
        "trainer.max_steps=5",
        "trainer.val_check_interval=5",
        folder=tmp_path,
    )
    whole, left = VQVAETask.training_step, []

    def training_step(self, batch, number):
        clock.now += 10
        if number == 2:
            left.append(RunFolder(tmp_path).seconds.read_text())
            raise OSError("power cut")
        return whole(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", training_step)
        with pytest.raises(OSError, match="power cut"):
            train(cfg.copy())
    if end == "killed":  # what had been written until then is all that there is
        RunFolder(tmp_path).seconds.write_text(left[0])

    def quicker(self, batch, number):
        clock.now += 1
        return whole(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQVAETask, "training_step", quicker)
        result = train(cfg)
    # Two steps were saved at 20 s, the third failed at 30 s, three steps were left.
    assert result["seconds"] == (20 if end == "killed" else 30) + 3
    assert read_result(tmp_path)["seconds"] == result["seconds"]
    assert not RunFolder(tmp_path).seconds.exists()


def test_a_pipeline_adds_up_the_parts_of_its_stages(toy, clock, command, tmp_path):
    from vqvae_lightning.stages import evaluating, pipeline

    def stopped(*_, **__):
        clock.now += 100
        raise KeyboardInterrupt

    places = [(PriorTask, "training_step"), (evaluating, "draw_images"), (pipeline, "write_report")]
    overrides = [*SMOKE, *toy]
    for place, name in places:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, stopped)
            assert command("vqvae-pipeline", *overrides).status == 130
        overrides = [f"resume={tmp_path}/run"]
    outcome = command("vqvae-pipeline", *overrides)
    assert outcome.status == 0, outcome.err
    seconds = {"vqvae": 0, "prior": 100, "evaluation": 100, "samples": 0, "report": 100}
    assert read_result(tmp_path / "run")["seconds"] == seconds
    assert "30 test images, 300 s" in outcome.out
    assert not list((tmp_path / "run").rglob("seconds.json"))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("vqvae", "vqvae"),
        ("prior", "prior"),
        ("pipeline", "pipeline"),
        ("evaluate", "evaluation"),
        ("sample", "samples"),
        ("reconstruct", "reconstructions"),
        ("shards", "shards"),
    ],
)
def test_a_config_stored_without_its_kind_is_recognised(config, kind, tmp_path):
    cfg = compose(config, folder=tmp_path)
    assert cfg.kind == kind
    stored = to_plain(cfg, missing=True)
    del stored["kind"]
    OmegaConf.save(stored, tmp_path / "config.yaml")
    assert read_run_config(tmp_path, tmp_path, []).kind == kind
