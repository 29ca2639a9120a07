"""Every config option composes and builds, and every preset runs."""

import csv
import json
import math
import shutil

import pytest
from conftest import TINY_VQVAE, compose
from omegaconf import OmegaConf

from vqvae_lightning.configs import CONF_DIR, build, to_plain
from vqvae_lightning.errors import InputError


def options(group):
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


GIVEN = {
    "npz": ["dataset.source.path=x.npz"],
    "image_folder": ["dataset.source.root=x"],
    "shards": ["dataset.root=x"],
}


BASES = ("default", "torchvision")


@pytest.mark.parametrize("dataset", [name for name in options("dataset") if name not in BASES])
def test_every_dataset_builds(dataset, tmp_path):
    cfg = compose("vqvae", f"dataset={dataset}", *GIVEN.get(dataset, []), folder=tmp_path)
    data = build(cfg.dataset)
    assert data.batch_size == 32
    to_plain(cfg.dataset)


def test_the_base_of_the_torchvision_data_sets_asks_for_a_class(command):
    outcome = command("vqvae-train", "dataset=torchvision")
    assert outcome.status == 1
    assert outcome.err.startswith("error: dataset.source.dataset._target_ must be given")


@pytest.mark.parametrize("quantizer", options("quantizer"))
def test_every_quantizer_builds(quantizer, tmp_path):
    cfg = compose("vqvae", f"quantizer={quantizer}", "model.net.channels=1", folder=tmp_path)
    task = build(cfg.model)
    continuous = quantizer == "none" or quantizer.startswith("gaussian")
    expected = 4096 if quantizer.endswith("_4096") else 8 if quantizer.endswith("x8") else 512
    assert task.net.quantizer.num_codes == (0 if continuous else expected)


@pytest.mark.parametrize("decoder", options("model/decoder"))
def test_every_decoder_builds(decoder, tmp_path):
    cfg = compose("vqvae", f"model/decoder={decoder}", "model.net.channels=1", folder=tmp_path)
    assert build(cfg.model).net.autoregressive == (decoder != "convolutional")


@pytest.mark.parametrize("trainer", [t for t in options("trainer") if t != "as_stage_one"])
@pytest.mark.parametrize(("config", "budget"), [("vqvae", 4000), ("prior", 2400)])
def test_every_trainer_builds(trainer, config, budget, tmp_path):
    if trainer in ("gpu", "ddp", "multinode"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
    given = ["trainer.devices=1", "trainer.num_nodes=2"] if trainer == "multinode" else []
    cfg = compose(config, f"trainer={trainer}", *given, folder=tmp_path)
    assert build(cfg.trainer).max_steps == (2 if trainer == "debug" else budget)


@pytest.mark.parametrize("logger", options("logger"))
def test_every_logger_builds(logger, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = compose("vqvae", f"logger={logger}", folder=tmp_path)
    assert [build(part) for part in cfg.logger.values()]


@pytest.mark.parametrize("config", ["vqvae", "prior"])
def test_every_callback_builds_and_can_be_switched_off(config, tmp_path):
    cfg = compose(config, "callbacks.pictures=null", folder=tmp_path)
    built = [build(part) for part in cfg.callbacks.values() if part is not None]
    assert len(built) == len(cfg.callbacks) - 1


@pytest.mark.parametrize(
    "config", ["vqvae", "prior", "pipeline", "evaluate", "sample", "reconstruct", "shards"]
)
def test_every_primary_config_composes(config, tmp_path):
    cfg = compose(config, folder=tmp_path)
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_runs_two_batches(experiment, toy, tmp_path, command):
    short = [
        f"{stage}trainer.{key}=2"
        for stage in ("", "prior.")
        for key in ("max_steps", "limit_val_batches", "limit_test_batches")
    ]
    checks = [f"{stage}trainer.val_check_interval=2" for stage in ("", "prior.")]
    small = ["evaluation.num_samples=12", "evaluation.classifier_steps=2", "sampling.num_samples=6"]
    outcome = command("vqvae-pipeline", f"experiment={experiment}", *toy, *short, *checks, *small)
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "report.html").is_file()


def test_stage_two_follows_the_devices_of_stage_one(tmp_path):
    cfg = compose("pipeline", "trainer=debug", folder=tmp_path)
    assert cfg.prior.trainer.precision == cfg.trainer.precision == "32-true"
    assert cfg.prior.trainer.accelerator == "cpu"


def test_the_pipelines_stages_are_configured_as_their_own_commands_would(tmp_path):
    from vqvae_lightning.stages.pipeline import compose_stages

    stages = compose_stages(compose("pipeline", folder=tmp_path))
    for name in ("vqvae", "prior"):
        given = ["vqvae_checkpoint=x"] if name == "prior" else []
        alone = compose(name, *given, folder=tmp_path / name)
        assert set(stages[name]) == set(alone), name
        assert stages[name].callbacks.best.dirpath == str(tmp_path / name / "checkpoints")
        assert stages[name].callbacks.best.monitor == alone.callbacks.best.monitor
    for name, config in (("evaluation", "evaluate"), ("samples", "sample")):
        needed = set(compose(config, folder=tmp_path)) - {"hydra"}
        assert needed <= set(stages[name]), name


def test_the_pipelines_stages_take_its_values_and_their_own(tmp_path):
    from vqvae_lightning.stages.pipeline import compose_stages

    options = ("seed=3", "trainer=debug", "logger=wandb", "evaluation.split=val", "study=mine")
    more = (
        "prior.batch_size=9",
        "prior.codes_dir=c",
        "sampling.num_samples=5",
        "dataset.flip=true",
    )
    cfg = compose("pipeline", *options, *more, folder=tmp_path)
    stages = compose_stages(cfg)
    best = {name: str(tmp_path / name / "checkpoints" / "best.ckpt") for name in stages}
    for name, stage in stages.items():
        assert stage.kind == name
        assert (stage.seed, stage.study, stage.folder) == (3, "mine", str(tmp_path / name))
    vqvae, prior, judge, samples = stages.values()
    assert vqvae.dataset == prior.dataset == cfg.dataset
    assert vqvae.logger.wandb.save_dir == str(tmp_path / "vqvae")
    assert prior.logger.wandb.save_dir == str(tmp_path / "prior")
    assert set(judge.logger) == {"wandb"}, "its metrics are in result.json"
    assert (vqvae.monitor, prior.monitor) == ("val/nmse", "val/nats_per_code")
    assert (prior.batch_size, prior.trainer.accelerator) == (9, "cpu")
    assert prior.vqvae_checkpoint == judge.vqvae_checkpoint == best["vqvae"]
    assert judge.prior_checkpoint == samples.prior_checkpoint == best["prior"]
    assert (judge.split, judge.codes_dir, judge.dataset) == ("val", "c", None)
    assert judge.trainer == {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "precision": "32-true",
    }
    assert (samples.num_samples, samples.accelerator) == (5, "cpu")


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.run"])
def test_targets_that_hydra_blocks_are_refused_in_one_line(target):
    with pytest.raises(InputError, match=target) as caught:
        build({"_target_": "vqvae_lightning.tasks.WarmupCosine", "inner": [{"_target_": target}]})
    assert "\n" not in str(caught.value)


def test_configs_hold_plain_data_once_resolved(tmp_path):
    cfg = compose("vqvae", *TINY_VQVAE, folder=tmp_path)

    def walk(value):
        assert isinstance(value, dict | list | str | int | float | bool | None.__class__)
        for child in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            walk(child)

    walk(to_plain(cfg))


def read_preset(sweep):
    """Command in the first comment of a sweep's preset, and the values of each swept key."""
    path = CONF_DIR / "sweep" / f"{sweep}.yaml"
    name, preset = path.read_text().splitlines()[1].removeprefix("# ").split()
    assert preset == f"sweep={sweep}"
    params = OmegaConf.load(path).hydra.sweeper.params
    return name, {key: str(values).split(",") for key, values in params.items()}


def shrink(name, toy):
    """Overrides that make one job of a preset small; swept keys keep the preset's values."""
    stages = ("", "prior.") if name == "vqvae-pipeline" else ("",)
    options = [
        f"{stage}trainer.{key}=2"
        for stage in stages
        for key in ("max_steps", "val_check_interval", "limit_val_batches", "limit_test_batches")
    ]
    if name == "vqvae-pipeline":
        options += [
            *("evaluation.num_samples=12", "evaluation.classifier_steps=2"),
            *("sampling.num_samples=6", "prior.model.net.channels=8"),
        ]
    return [*toy, "model.net.hidden=8", "model.net.residual_hidden=4", *options]


@pytest.mark.parametrize(
    "sweep",
    # One in the quick step, all in CI: they differ in the values alone.
    [n if n == "commitment" else pytest.param(n, marks=pytest.mark.slow) for n in options("sweep")],
)
def test_every_sweep_can_start_all_its_jobs(sweep, toy, command):
    name, params = read_preset(sweep)
    outcome = command(name, f"sweep={sweep}", *shrink(name, toy), "preflight=true")
    assert outcome.status == 0, outcome.err
    stages = 2 if name == "vqvae-pipeline" else 1
    assert outcome.out.count("parameters") == stages * math.prod(map(len, params.values()))


@pytest.mark.parametrize("sweep", options("sweep"))
def test_a_job_of_every_sweep_trains(sweep, toy, command):
    name, params = read_preset(sweep)
    first = [f"{key}={values[0]}" for key, values in params.items()]
    outcome = command(name, f"sweep={sweep}", "hydra.mode=RUN", *first, *shrink(name, toy))
    assert outcome.status == 0, outcome.err
    assert json.loads((outcome.folder / "result.json").read_text())["objective"] > 0


QUANTIZER_SWEEPS = {  # bits per position
    "quantizers": 9,
    "quantizers_cifar10": 9,
    "quantizers_4096": 12,
    "quantizers_cifar10_4096": 12,
}


@pytest.mark.parametrize("sweep", QUANTIZER_SWEEPS)
def test_quantizers_are_compared_without_guidance(sweep, tmp_path):
    prior = compose("pipeline", f"sweep={sweep}", folder=tmp_path).prior
    assert prior.model.net.null_label_rate == 0


@pytest.mark.parametrize(("sweep", "bits"), QUANTIZER_SWEEPS.items())
def test_compared_quantizers_have_equal_bits_per_position(sweep, bits, tmp_path):
    for quantizer in read_preset(sweep)[1]["quantizer"]:
        cfg = compose("vqvae", f"quantizer={quantizer}", "model.net.channels=1", folder=tmp_path)
        found = build(cfg.model).net.quantizer
        assert found.num_codes**found.codes_per_position == 2**bits, quantizer


def test_a_sweep_of_pipelines_lists_the_metrics_of_the_samples(toy, command):
    few = ["hydra.sweeper.params.quantizer='ema,residual_3x8'", "hydra.sweeper.params.seed='0'"]
    small = shrink("vqvae-pipeline", toy)
    outcome = command(
        "vqvae-pipeline", "sweep=quantizers", *few, *small, "hydra.sweep.dir=pipelines"
    )
    assert outcome.status == 0, outcome.err
    with (outcome.folder.parent / "pipelines/jobs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["quantizer"] for row in rows) == ["ema", "residual_3x8"]
    for row in rows:
        for metric in ("nmse", "perplexity", "nats_per_code", "prior_bits_per_dim"):
            assert float(row[f"test/{metric}"]) > 0
        assert 0 <= float(row["test/sample_accuracy"]) <= 1


def test_a_sweep_repeats_only_the_jobs_that_are_missing(toy, command):
    options = (
        *("sweep=commitment", "hydra.sweeper.params.seed='0'", *shrink("vqvae-train", toy)),
        *("resume=auto", "hydra.sweep.dir=jobs"),
    )
    outcome = command("vqvae-train", *options)
    assert outcome.status == 0, outcome.err
    jobs = outcome.folder.parent / "jobs"
    results = sorted(jobs.glob("*/result.json"))
    assert len(results) == 4
    commands = [OmegaConf.load(path.with_name("config.yaml")).command for path in results]
    assert len(set(commands)) == len(results)
    assert not any("sweep=" in text for text in commands)
    before = [path.stat().st_mtime_ns for path in results]
    shutil.rmtree(results[1].parent)
    again = command("vqvae-train", *options)
    assert again.status == 0, again.err
    after = [path.stat().st_mtime_ns for path in results]
    assert [one == other for one, other in zip(before, after, strict=True)] == [
        number != 1 for number in range(len(results))
    ]
    assert json.loads(results[1].read_text())["objective"] > 0
