"""vqvae-pipeline: all stages in turn, each resumable."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqvae_lightning.configs import CONF_DIR, build, record_foreign, to_plain
from vqvae_lightning.console import console
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.codes import require_codes
from vqvae_lightning.devices import choose_devices
from vqvae_lightning.errors import prefix_keys, rename_keys
from vqvae_lightning.evaluation.features import load_networks
from vqvae_lightning.files import replace_file
from vqvae_lightning.jobs.ranks import count_ranks
from vqvae_lightning.report.run import write_report
from vqvae_lightning.runs.folder import STAGES, RunFolder
from vqvae_lightning.runs.results import read_result, write_config, write_result
from vqvae_lightning.runs.resume import move_paths, read_run_config
from vqvae_lightning.runs.stopwatch import Stopwatch, time_stage
from vqvae_lightning.stages.evaluating import build_classifier, check_evaluation, evaluate
from vqvae_lightning.stages.inputs import load_images, print_survey
from vqvae_lightning.stages.sampling import check_sampling, choose_drawing, draw_samples
from vqvae_lightning.stages.training import (
    build_task,
    check_fingerprint,
    complete_config,
    keep_fingerprint,
    set_sizes,
    survey_stage,
    train,
)

if TYPE_CHECKING:
    from vqvae_lightning.data.images import PixelDataModule
    from vqvae_lightning.stages.preflight import Survey

OWN_KEYS = {"prior": "prior", "evaluation": "evaluation", "samples": "sampling"}
"""Node of the pipeline's config with a stage's own keys; those of stage 1 are at the top level."""


def compose_stages(cfg: DictConfig) -> dict[str, DictConfig]:
    """Compose the config of each stage as its own command would, with the stage's folder.

    A stage that has begun keeps the config in its folder. The others get what `stages` in
    `conf/pipeline.yaml` takes from the pipeline, and their own keys.

    Args:
        cfg: The pipeline's config, composed or stored.
    """
    folder = Path(cfg.folder)
    whole = cfg if "stages" in cfg else _recompose(cfg)
    configs: dict[str, DictConfig] = {}
    for name in STAGES:
        if RunFolder(folder).stage(name).is_begun:
            configs[name] = read_run_config(folder / name, folder, cfg.trust)
            continue
        # Paths in the config start with ${folder}: it is set first, so that they are the stage's.
        placed = whole.copy()
        placed.stages.folder = str(folder)
        placed.folder = str(folder / name)
        own = placed[OWN_KEYS[name]] if name in OWN_KEYS else {}
        configs[name] = OmegaConf.create({**_resolve(own), **_resolve(placed.stages[name])})
        OmegaConf.set_struct(configs[name], True)
    return configs


def _resolve(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _recompose(cfg: DictConfig) -> DictConfig:
    """A stored config as it was composed: with `stages`, and with paths that follow `folder`.

    Paths were resolved when the config was stored: they are in the pipeline's folder, and those of
    a stage that has not begun must be in the stage's.
    """
    folder = str(cfg.folder)
    plain = {"data_fingerprint": None, **to_plain(cfg)}  # older runs lack the key
    stages = OmegaConf.load(CONF_DIR / "pipeline.yaml").stages
    return OmegaConf.create(
        {**move_paths(plain, folder, "${folder}"), "stages": stages, "folder": folder}
    )


def name_stage_key(cfg: DictConfig, name: str, key: str) -> str:
    """Return a key of a stage as the pipeline's config has it.

    Args:
        cfg: The pipeline's config.
        name: The stage.
        key: The key in the stage's config.
    """
    place = OWN_KEYS.get(name)
    if place is not None and key.partition(".")[0] in set(cfg[place]):
        return f"{place}.{key}"
    return "prior.codes_dir" if key == "codes_dir" else key  # an evaluation has the prior's


def prefix_stage_keys(cfg: DictConfig, name: str) -> AbstractContextManager[None]:
    """Name the keys of an error in a stage as the pipeline's config has them.

    Args:
        cfg: The pipeline's config.
        name: The stage.
    """
    return rename_keys(lambda key: name_stage_key(cfg, name, key))


def check_stages(
    cfg: DictConfig, configs: dict[str, DictConfig], images: "PixelDataModule"
) -> dict[str, "Survey"]:
    """Check all stages before the first one trains.

    Args:
        cfg: The pipeline's config.
        configs: The config of each stage.
        images: The data, set up.

    Returns:
        The survey of both training stages, with the keys of the pipeline's config.

    Raises:
        InputError: Naming the key as the pipeline's config has it.
    """
    require_codes(build(configs["vqvae"].model.net.quantizer))
    judge, samples = configs["evaluation"], configs["samples"]
    vqvae, prior = configs["vqvae"].copy(), configs["prior"].copy()
    check_fingerprint(vqvae, images)
    complete_config(vqvae, images)
    task = build_task(vqvae)
    surveys = {"vqvae": survey_stage(vqvae, task, images)}
    with prefix_stage_keys(cfg, "prior"):
        # The VQ-VAE is untrained, but its sizes are those of the trained one.
        codes = CodesDataModule(images, task.net.eval(), "", prior.folder, prior.batch_size)
        set_sizes(prior, codes)
        found = survey_stage(prior, build_task(prior), codes)
        surveys["prior"] = found.rename_keys(lambda key: name_stage_key(cfg, "prior", key))
    with prefix_stage_keys(cfg, "evaluation"):
        check_evaluation(judge)
        net = prior.model.net
        choose_drawing(judge, net.num_classes, net.null_label_rate)
        build_classifier(judge, images)
        load_networks(bool(judge.get("perceptual")), judge.get("weights") or {}, images)
        with prefix_keys("trainer"):
            choose_devices(judge.trainer.accelerator, count_ranks(judge.trainer))
    with prefix_stage_keys(cfg, "samples"):
        choose_devices(samples.accelerator, samples.devices)
        check_sampling(samples, net.num_classes, net.height, net.null_label_rate)
    return surveys


def run_pipeline(cfg: DictConfig) -> dict[str, Any]:
    """Run the stages that are not finished, and write the report.

    Args:
        cfg: The composed config `conf/pipeline.yaml`, or the stored config of the run to resume.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: As the stages do; before any of them has begun where that can be known.
    """
    folder = Path(cfg.folder)
    record_foreign(cfg)
    configs = compose_stages(cfg)
    images, surveys = None, {}
    if any(read_result(folder / name) is None for name in ("vqvae", "prior", "evaluation")):
        images = load_images(configs["vqvae"].dataset)
        check_fingerprint(cfg, images)
        keep_fingerprint(cfg, images)
        surveys = check_stages(cfg, configs, images)
        if cfg.preflight:
            for name, survey in surveys.items():
                print_survey(name, survey)
            return {}
    if not RunFolder(folder).is_begun:
        stored = cfg.copy()
        with open_dict(stored):
            stored.pop("stages", None)
        write_config(stored, folder)
    runs: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
        "vqvae": lambda stage: train(stage, images, surveys.get("vqvae")),
        "prior": lambda stage: train(stage, images, surveys.get("prior")),
        "evaluation": lambda stage: evaluate(stage, images),
        "samples": draw_samples,
    }
    results = {}
    for name, run in runs.items():
        known = read_result(folder / name) is not None
        with prefix_stage_keys(cfg, name):
            results[name] = run(configs[name])
        console.print(_describe(name, results[name], known), highlight=False, soft_wrap=True)
    with time_stage(folder) as watch:  # the report alone: each stage is timed in its folder
        return _write_report(cfg, results, watch)


def _write_report(
    cfg: DictConfig, results: dict[str, dict[str, Any]], watch: Stopwatch
) -> dict[str, Any]:
    """Write the report and `result.json` from the results of the stages."""
    folder = Path(cfg.folder)
    run = RunFolder(folder)
    for copy, original in (
        (run.reconstructions_picture, run.stage("evaluation").reconstructions_picture),
        (run.samples_picture, run.stage("samples").samples_picture),
    ):
        with replace_file(copy) as partial:
            shutil.copyfile(original, partial)
    seconds = {name: result["seconds"] for name, result in results.items()}
    metrics = {k: v["value"] for k, v in results["evaluation"]["metrics"].items()}
    facts = {
        "seed": cfg.seed,
        "commit": cfg.commit,
        "split": results["evaluation"]["split"],
        "images": results["evaluation"]["images"],
        "samples": results["evaluation"]["samples"],
        "command": cfg.command,
        # Measured on validation images: a sweep must not see the test split.
        "monitor": results["vqvae"]["monitor"],
        "objective": results["vqvae"]["objective"],
        "data_fingerprint": results["evaluation"]["data_fingerprint"],
    }
    # Written before the report, which shows it, and again with the seconds of the report.
    write_result(folder, metrics, seconds=seconds, **facts)
    write_report(folder)
    seconds["report"] = watch.seconds
    return write_result(folder, metrics, seconds=seconds, **facts)


def _describe(name: str, result: dict[str, Any], known: bool) -> str:
    """One line for a finished stage."""
    shown = {
        "vqvae": ("nmse", "nll_nats_per_dim", "perplexity", "codebook_use"),
        "prior": ("nats_per_code", "unigram_nats_per_code"),
        "evaluation": ("total_bits_per_dim", "real_accuracy", "sample_accuracy"),
        "samples": ("images",),
    }[name]
    values = {key.rpartition("/")[2]: entry for key, entry in result["metrics"].items()}
    metrics = "  ".join(f"{key} {values[key]['value']:.4g}" for key in shown if key in values)
    when = "done before" if known else f"{result['seconds']:.0f} s"
    return f"[bold]{name}[/bold]  {when}  {metrics}"
