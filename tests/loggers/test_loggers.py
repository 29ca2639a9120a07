"""Weights & Biases, read back with wandb's own reader; what happens without its server."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from conftest import TINY_VQVAE
from omegaconf import OmegaConf

from vqvae_lightning.checkpoints import hash_weights, load
from vqvae_lightning.errors import InputError
from vqvae_lightning.loggers.media import log_histogram
from vqvae_lightning.loggers.wandb import Input, WandbRun
from vqvae_lightning.units import UNITS

TINY = [option for option in TINY_VQVAE if not option.startswith("trainer=")]
sys.path.append(str(Path(__file__).parents[2] / "experiments"))
import dashboard  # noqa: E402

OFFLINE = ("logger=wandb", "logger.wandb.offline=true")


def records(folder: Path) -> list[dict]:
    """Every record of the one run below `folder`, as `wandb leet inspect` reads it."""
    (log,) = folder.rglob("offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in run.stdout.splitlines()]


def history(read: list[dict]) -> list[dict]:
    return [record["history"]["item"] for record in read if record["type"] == "history"]


def config(read: list[dict]) -> dict:
    merged: dict = {}
    for record in read:
        if record["type"] == "config":
            merged |= record["config"]["update"]
    return merged


def only(read: list[dict], kind: str) -> dict:
    (record,) = [record for record in read if record["type"] == kind]
    return record[kind]


@pytest.fixture(autouse=True)
def _fresh_service():
    """Restart wandb's service, because it reads the environment once per process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def sweep(toy_npz, tmp_path_factory) -> Path:
    """Two jobs of two ranks each, logged offline."""
    folder = tmp_path_factory.mktemp("wandb")
    command = [
        *(sys.executable, "-m", "vqvae_lightning.train", "-m"),
        *("dataset=npz", f"dataset.source.path={toy_npz}", "dataset.batch_size=8"),
        *("trainer=ddp_cpu", "trainer.max_steps=6", "trainer.val_check_interval=3"),
        *("trainer.log_every_n_steps=2", "trainer.precision=32-true", "study=trial"),
        *("model.optimizer.lr=1e-3,2e-3", f"hydra.sweep.dir={folder}/sweep"),
        *(*OFFLINE, "logger.wandb.watch=gradients", "logger.wandb.artifacts=true"),
        *TINY,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "sweep"


def test_a_sweep_over_two_ranks_writes_one_run_per_job(sweep):
    assert len(list(sweep.rglob("run-*.wandb"))) == 2
    seen = set()
    for job in ("0", "1"):
        read = records(sweep / job)
        run = only(read, "run")
        assert run["run_group"] == "trial"
        assert run["job_type"] == "vqvae"
        assert run["display_name"] == f"sweep/{job}"
        assert run["resume"]
        stored = OmegaConf.to_container(OmegaConf.load(sweep / job / "config.yaml"))
        given = config(read)
        assert {key: given[key] for key in stored} == stored
        assert only(read, "exit").get("exit_code", 0) == 0
        assert any(record["type"] == "stats" for record in read), "system metrics"
        seen.add(
            (run["run_id"], given["model"]["optimizer"]["lr"], stored["logger"]["wandb"]["id"])
        )
    assert {lr for _, lr, _ in seen} == {1e-3, 2e-3}
    assert all(run_id == stored for run_id, _, stored in seen)


def test_metrics_pictures_and_histograms_are_read_back_at_their_steps(sweep):
    rows = history(records(sweep / "0"))
    steps: dict[str, list[int]] = {}
    for row in rows:
        for name in row:
            if name.startswith(("train/", "val/", "test/")):
                steps.setdefault(name.partition("._type")[0], []).append(row["trainer/global_step"])
    assert steps["train/nmse"] == [1, 3, 5]
    for name in ("nmse", "psnr_db", "reconstructions", "codes", "codebook_histogram"):
        assert steps[f"val/{name}"] == [2, 5], name
    assert "test/nmse" in steps
    measured = json.loads((sweep / "0" / "result.json").read_text())["metrics"]["test/nmse"]
    logged = [row["test/nmse"] for row in rows if "test/nmse" in row]
    assert logged == [pytest.approx(measured["value"])]
    for name in ("reconstructions", "codes"):
        found = list((sweep / "0").rglob(f"files/media/images/val/{name}_*.png"))
        assert len(found) == 2, name
    (last,) = [row for row in rows if row.get("trainer/global_step") == 5 and hist(row)]
    assert sum(hist(last)) == 24 * 3 * 2, "a hit for each of 3x2 codes of 24 images"
    assert any(name.startswith("gradients/") for row in rows for name in row)


def hist(row):
    return row.get("val/codebook_histogram.values")


def test_units_and_the_data_are_in_the_config(sweep):
    given = config(records(sweep / "0"))
    assert given["units"]["psnr_db"] == "dB"
    assert len(given["facts"]["data_fingerprint"]) == 16


def test_the_best_checkpoint_is_an_artifact_that_names_its_data(sweep):
    read = records(sweep / "0")
    artifact = only(read, "artifact")
    best = load(sweep / "0/checkpoints/best.ckpt").net
    assert artifact["name"] == f"vqvae-{hash_weights(best)}"
    fingerprint = config(read)["facts"]["data_fingerprint"]
    assert f"data-{fingerprint}" in json.dumps(artifact)


class Online:
    """The part of a wandb run that `keep` uses when there is a server."""

    offline = False

    def __init__(self):
        self.used, self.logged = [], []

    def use_artifact(self, artifact):
        self.used.append(artifact)

    def log_artifact(self, artifact, aliases):
        self.logged.append(artifact)


def test_with_a_server_a_prior_has_its_vqvae_as_input(tmp_path):
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    logger = WandbRun(str(tmp_path), "p", artifacts=True)
    logger._experiment = run = Online()
    made_from = Input("vqvae-0123", "vqvae", {"data_fingerprint": "ab"}, checkpoint)
    logger.keep("prior", "prior-4567", checkpoint, made_from)
    assert [(a.name, a.type, a.metadata) for a in run.used] == [
        ("vqvae-0123", "vqvae", {"data_fingerprint": "ab"})
    ]
    assert run.logged[0].metadata == {"made_from": "vqvae-0123", "data_fingerprint": "ab"}
    # The same file, so that the server sees the artifact that the first stage logged.
    assert list(run.used[0].manifest.entries) == ["best.ckpt"]


def test_a_resumed_job_continues_its_run(toy, command, tmp_path):
    def run_ids():
        return {path.name for path in (tmp_path / "run").rglob("run-*.wandb")}

    options = (*TINY_VQVAE, *OFFLINE, *toy)
    with pytest.MonkeyPatch.context() as patch:

        def stop(*args, **kwargs):
            raise RuntimeError("the machine went away")

        patch.setattr("pytorch_lightning.Trainer.test", stop)
        assert command("vqvae-train", *options).status == 1
    before = run_ids()
    assert command("vqvae-train", "resume=auto", *options).status == 0
    assert run_ids() == before
    assert len(before) == 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2


def test_the_pipelines_runs_are_a_group_with_samples_by_class(toy, command, tmp_path):
    small = ("experiment=smoke", *OFFLINE, *toy)
    outcome = command("vqvae-pipeline", *small)
    assert outcome.status == 0, outcome.err
    types = {}
    for stage in ("vqvae", "prior", "evaluation"):
        read = records(tmp_path / "run" / stage)
        run = only(read, "run")
        types[stage] = run["job_type"], run["run_group"]
    assert types == {stage: (stage, "smoke") for stage in ("vqvae", "prior", "evaluation")}
    prior = history(records(tmp_path / "run" / "prior"))
    (captions, *_) = [row["val/samples.captions"] for row in prior if "val/samples.captions" in row]
    assert captions == ["0", "1", "2"]
    for name in ("val/samples", "val/codes", "val/reconstructions", "nearest"):
        assert name in dashboard.PICTURES
    evaluated = history(records(tmp_path / "run" / "evaluation"))
    assert any("test/sample_accuracy" in row for row in evaluated)
    assert any("nearest._type" in row for row in evaluated)


def test_the_dashboard_shows_names_that_are_logged():
    panels = [lines for section in dashboard.SECTIONS.values() for lines in section.values()]
    shown = [name for lines in panels for name in lines]
    for name in (*shown, *dashboard.METRICS):
        split, _, last = name.partition("/")
        assert split in ("train", "val", "test")
        assert last in UNITS
    titles = [panel.title for section in dashboard.sections() for panel in section.panels]
    assert len(titles) == len(set(titles))
    assert set(dashboard.PICTURES) < set(titles)


def test_disabled_needs_nothing(toy, command, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert command("vqvae-train", *TINY_VQVAE, "logger=wandb", *toy).status == 0
    assert not list((tmp_path / "run").rglob("*.wandb"))


def test_an_unreachable_server_is_a_warning(toy, command, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    options = ("logger=wandb", "logger.wandb.init_timeout=1", *toy)
    outcome = command("vqvae-train", *TINY_VQVAE, *options)
    assert outcome.status == 0, outcome.err
    assert "cannot be reached" in outcome.out
    assert any("test/nmse" in row for row in history(records(tmp_path / "run")))


def test_without_an_account_the_error_says_what_to_do(toy, command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    outcome = command("vqvae-train", *TINY_VQVAE, "logger=wandb", *toy)
    assert outcome.status == 1
    assert "logger.wandb.offline=true" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unknown_kind_of_histogram_is_refused(tmp_path):
    with pytest.raises(InputError, match="watch=weights must be one of"):
        WandbRun(str(tmp_path), "p", watch="weights")


def test_a_histogram_of_many_codes_keeps_its_hits():
    logged = {}
    logger = WandbRun(".", "p")
    logger.log_metrics = lambda metrics, step: logged.update(metrics)
    counts = torch.arange(1000)
    log_histogram(SimpleNamespace(global_step=1, loggers=[logger]), "h", counts)
    bars = logged["h"].histogram
    assert len(bars) == 512
    assert sum(bars) == counts.sum()
    assert bars[0] == 999 + 998
