"""The monitored metric of a run: its name, its direction, and when it is logged."""

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VQVAE, compose, prepare

from vqvae_lightning import callbacks, console, units
from vqvae_lightning.callbacks.checkpoints import BestCheckpoint
from vqvae_lightning.callbacks.pruning import MedianPruning
from vqvae_lightning.checkpoints import load
from vqvae_lightning.errors import InputError
from vqvae_lightning.report.jobs import read_jobs
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.training import train
from vqvae_lightning.units import get_direction

NETWORK = [text for text in TINY_VQVAE if ".quantizer." not in text]
CODES = ["model.net.quantizer.code_dim=4"]
QUANTIZERS = {
    "ema": [*CODES, "model.net.quantizer.num_codes=16", "model.net.quantizer.warmup_steps=1"],
    "loss": [*CODES, "model.net.quantizer.num_codes=16", "model.net.quantizer.warmup_steps=1"],
    "none": CODES,
    "gaussian": CODES,
    "fsq": [*CODES, "model.net.quantizer.options.levels=[3,3]"],
    "residual_vq": [*CODES, "model.net.quantizer.options.codebook_size=8"],
}


def read_logged(folder: Path) -> set[str]:
    """Names in `metrics.csv` with a value in each validation."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    validations = [row for row in rows if row["val/loss" if "val/loss" in row else "val/accuracy"]]
    assert len(validations) == 2
    return {
        name
        for name in rows[0]
        if name.startswith("val/") and all(row[name] for row in validations)
    }


@pytest.mark.parametrize("extra", [[], ["model.net.quantizer.free_bits=0.1"]])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_vqvae_lists_what_its_validation_logs(quantizer, extra, toy, tmp_path):
    if extra and quantizer != "gaussian":
        return
    if quantizer in ("fsq", "residual_vq"):
        pytest.importorskip("vector_quantize_pytorch")
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=1"]
    options = [f"quantizer={quantizer}", *NETWORK, *QUANTIZERS[quantizer], *extra, *steps]
    cfg = compose("vqvae", *toy, *options, folder=tmp_path)
    images = load_images(cfg.dataset)
    task = prepare(cfg.copy(), images).task
    said = task.list_validation_metrics(task.net.compute_grid(*images.image_shape[1:]))
    train(cfg, images)
    assert said == read_logged(tmp_path)


@pytest.fixture(scope="module")
def vqvae(toy_npz, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vqvae")
    toy = ("dataset=npz", f"dataset.source.path={toy_npz}")
    train(compose("vqvae", *toy, *TINY_VQVAE, folder=folder))
    return folder / "checkpoints" / "best.ckpt"


PRIOR = ("trainer=debug", "model.net.channels=8", "model.net.layers=2", "batch_size=8")


def test_a_prior_lists_what_its_validation_logs(vqvae, toy, tmp_path):
    steps = ("trainer.val_check_interval=1", "model.optimizer.lr=0.1")
    cfg = compose("prior", *toy, *PRIOR, *steps, f"vqvae_checkpoint={vqvae}", folder=tmp_path)
    images = load_images(cfg.dataset)
    task = prepare(cfg.copy(), images).task
    train(cfg, images)
    assert task.list_validation_metrics((3, 2)) == read_logged(tmp_path)


def test_every_name_with_a_direction_has_a_unit():
    assert set(units.UNITS) >= units.HIGHER | units.LOWER
    assert not units.HIGHER & units.LOWER


@pytest.mark.parametrize(
    ("overrides", "names", "missing"),
    [
        (["monitor=val/ssim"], ["val/nmse (min)", "val/psnr_db (max)"], "val/ssim (m"),
        (["monitor=val/learning_rate"], ["val/perplexity (max)"], "rate ("),
        (["monitor=nmse"], ["val/nmse (min)"], "val/kl"),
        (["quantizer=none", "monitor=val/perplexity"], ["val/mse (min)"], "val/perplexity ("),
        (["quantizer=gaussian", "monitor=val/commitment"], ["val/kl (min)"], "val/commitment ("),
    ],
)
def test_a_name_that_this_stage_does_not_log_is_refused(overrides, names, missing, toy, tmp_path):
    cfg = compose("vqvae", *toy, "trainer=debug", *overrides, folder=tmp_path)
    with pytest.raises(InputError, match=r"^monitor=") as caught:
        prepare(cfg, load_images(cfg.dataset))
    assert all(name in str(caught.value) for name in names)
    assert missing not in str(caught.value)


def test_the_pipeline_checks_both_monitors_before_it_trains(toy, command):
    outcome = command("vqvae-pipeline", "experiment=smoke", *toy, "prior.monitor=val/nmse")
    assert outcome.status == 1
    assert outcome.err.startswith("error: prior.monitor=val/nmse must be one of val/accuracy (max)")
    assert not (outcome.folder / "vqvae").exists()


def test_the_best_checkpoint_has_the_highest_psnr(toy, tmp_path, monkeypatch):
    # Lightning assumes that lower is better unless the mode is set.
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=1", "model.optimizer.lr=0.05")
    weights = []
    monkeypatch.setattr(
        callbacks.ReconstructionPictures,
        "on_validation_end",
        lambda _, trainer, module: weights.append(
            (
                float(trainer.callback_metrics["val/psnr_db"]),
                module.net.encoder.layers[0].weight + 0,
            )
        ),
    )
    cfg = compose("vqvae", *toy, *TINY_VQVAE, *steps, "monitor=val/psnr_db", folder=tmp_path)
    result = train(cfg)
    scores = [score for score, _ in weights]
    assert len(set(scores)) == 4
    assert result["objective"] == pytest.approx(max(scores))
    kept = load(tmp_path / "checkpoints" / "best.ckpt").net.encoder.layers[0].weight
    assert torch.equal(kept, weights[scores.index(max(scores))][1])


@pytest.mark.parametrize(("monitor", "best"), [("val/nmse", "1"), ("val/psnr_db", "2")])
def test_the_best_job_of_a_sweep_comes_first(monitor, best, tmp_path):
    for name, objective in (("1", 0.1), ("2", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(f"command: vqvae-train\nfolder: {folder}\n")
        result = {"metrics": {}, "monitor": monitor, "objective": objective, "seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(result))
    assert read_jobs(tmp_path)[0].name == best


@pytest.mark.parametrize(
    ("monitor", "score", "pruned"),
    [
        ("val/nmse", 0.3, True),
        ("val/nmse", 0.1, False),
        ("val/psnr_db", 0.3, False),
        ("val/psnr_db", 0.1, True),
    ],
)
def test_a_job_on_the_worse_side_of_the_median_is_stopped(monitor, score, pruned, tmp_path):
    for name in ("1", "2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"step,{monitor}\n0,0.2\n")
        (folder / "result.json").write_text("{}")
    pruning = MedianPruning(str(tmp_path / "3"), monitor, min_jobs=2, warmup=1)
    trainer = SimpleNamespace(
        sanity_checking=False,
        callback_metrics={monitor: torch.tensor(score)},
        is_global_zero=True,
        global_step=5,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        should_stop=False,
    )
    for _ in range(2):
        pruning.on_validation_end(trainer, None)
    assert pruning.pruned == trainer.should_stop == pruned


@pytest.mark.parametrize(
    ("monitor", "wanted"), [("val/nmse", "minimize"), ("val/psnr_db", "maximize")]
)
def test_a_study_follows_the_direction_of_the_monitor(monitor, wanted, tmp_path):
    from omegaconf import OmegaConf

    path = Path(__file__).parents[2] / "conf/hydra/sweeper/optuna.yaml"
    text = OmegaConf.load(path)
    cfg = OmegaConf.create({"monitor": monitor, "sweeper": {"direction": None}})
    compose("vqvae", folder=tmp_path)  # registers the resolvers
    OmegaConf.update(cfg, "sweeper.direction", text._get_node("direction")._value())
    assert cfg.sweeper.direction == wanted


def test_the_direction_of_a_checkpoint_is_that_of_its_name(tmp_path):
    modes = {
        name: BestCheckpoint(name, dirpath=tmp_path).mode for name in ("val/mse", "val/accuracy")
    }
    assert modes == {"val/mse": "min", "val/accuracy": "max"}
    assert get_direction("val/uniform_nats_per_code") is None, "a constant has no best value"


@pytest.mark.parametrize(
    ("steps", "validated"),
    [
        (["trainer.max_steps=3", "trainer.val_check_interval=50"], [3]),
        (["trainer.max_steps=5", "trainer.val_check_interval=2"], [2, 4, 5]),
        (["trainer.max_steps=4", "trainer.val_check_interval=2"], [2, 4]),
        # 96 images are 3 batches, so that an epoch ends within a step.
        (
            [
                "trainer.max_steps=3",
                "trainer.val_check_interval=3",
                "trainer.accumulate_grad_batches=2",
            ],
            [2, 3],
        ),
        (
            [
                "trainer.max_steps=-1",
                "trainer.max_epochs=2",
                "trainer.val_check_interval=50",
                "trainer.limit_train_batches=2",
            ],
            [4],
        ),
    ],
)
def test_the_last_step_is_always_validated_and_only_once(steps, validated, toy, tmp_path):
    cfg = compose("vqvae", *toy, *TINY_VQVAE, *steps, folder=tmp_path)
    result = train(cfg)
    rows = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert [int(row["step"]) + 1 for row in rows if row["val/nmse"]] == validated
    assert result["objective"] is not None


def test_a_resumed_run_validates_its_last_step_too(toy, tmp_path, command, monkeypatch):
    short = (
        "trainer.max_steps=5",
        "trainer.val_check_interval=50",
        "callbacks.last.every_n_steps=2",
    )
    save = callbacks.LastCheckpoint._save

    def stop(self, trainer):
        save(self, trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.LastCheckpoint, "_save", stop)
        assert command("vqvae-train", *toy, *TINY_VQVAE, *short).status == 130
    outcome = command("vqvae-train", f"resume={tmp_path}/run")
    assert outcome.status == 0, outcome.err
    rows = csv.DictReader((outcome.folder / "metrics.csv").read_text().splitlines())
    assert [int(row["step"]) + 1 for row in rows if row["val/nmse"]] == [5]


def test_without_a_terminal_each_status_is_one_line(toy, tmp_path, monkeypatch):
    # Without a terminal, rich breaks lines at 80 columns.
    file = io.StringIO()
    monkeypatch.setattr(console.console, "_file", file)  # setting `file` could not be undone
    long = f"warning: {'word ' * 60}end"
    console.console.print(long)
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=2")
    train(compose("vqvae", *toy, *TINY_VQVAE, *steps, folder=tmp_path / ("deep/" * 20)))
    lines = file.getvalue().splitlines()
    assert lines[0] == long
    assert [line.split()[:2] for line in lines if "images/s" in line] == [
        ["step", "2/4"],
        ["step", "4/4"],
    ]
    assert all(line.startswith(("warning: ", "vqvae ", "step ")) for line in lines)
