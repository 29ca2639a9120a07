"""From images to new images: every stage in turn, each resumable."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from vqvae_lightning.errors import rename_keys
from vqvae_lightning.runs.folder import STAGES
from vqvae_lightning.runs.resume import stored_config
from vqvae_lightning.stages.inputs import load_images, print_survey


def stage_configs(cfg: Any) -> dict[str, Any]:
    """The config of each stage, as its own command would compose it, in a folder of its own.

    Stages that have begun keep the config that they left in their folder.
    """
    from omegaconf import OmegaConf

    folder = Path(cfg.folder)
    common = (
        "study",
        "seed",
        "data_dir",
        "resume",
        "preflight",
        "compile",
        "command",
        "commit",
        "folder",
        "trust",
        "foreign",
    )
    training = ("dataset", "data_fingerprint", "logger", "model", "trainer", "callbacks", "monitor")
    configs: dict[str, Any] = {}
    for name in STAGES:
        if (folder / name / "config.yaml").is_file():
            configs[name] = stored_config(folder / name, folder, cfg.trust)
            continue
        # Resolved with `folder` at its place in the tree, so that every path below it is the
        # stage's.
        placed = cfg.copy()
        placed.folder = str(folder / name)
        if name == "prior":
            placed.prior.vqvae_checkpoint = str(folder / "vqvae" / "checkpoints" / "best.ckpt")
        whole = OmegaConf.to_container(placed, resolve=True)
        assert isinstance(whole, dict)
        stage = {key: whole[key] for key in common}
        if name in ("vqvae", "prior"):
            stage |= {key: whole[key] for key in training if key in whole}
            stage |= whole["prior"] if name == "prior" else {}
            stage["kind"] = name
        else:
            stage |= {
                "kind": name,
                "prior_checkpoint": str(folder / "prior" / "checkpoints" / "best.ckpt"),
                "vqvae_checkpoint": str(folder / "vqvae" / "checkpoints" / "best.ckpt"),
                "dataset": None,
                "codes_dir": whole["prior"]["codes_dir"],
                "accelerator": whole["trainer"]["accelerator"],
                "trainer": {
                    "accelerator": whole["trainer"]["accelerator"],
                    "devices": whole["trainer"]["devices"],
                    "num_nodes": whole["trainer"]["num_nodes"],
                    "precision": whole["trainer"]["precision"],
                },
                **whole["evaluation" if name == "evaluation" else "sampling"],
            }
            if name == "evaluation":  # its figures are in result.json
                stage["logger"] = {k: v for k, v in whole["logger"].items() if k != "csv"}
        configs[name] = OmegaConf.create(stage)
        OmegaConf.set_struct(configs[name], True)
    return configs


def prefix_stage_keys(cfg: Any, place: str) -> AbstractContextManager[None]:
    """Name the keys of an error in a stage as the pipeline's config has them.

    Args:
        cfg: The pipeline's.
        place: `prior`, `evaluation` or `sampling`; what is not below it, the stages share.
    """

    def rename(key: str) -> str:
        return f"{place}.{key}" if key.partition(".")[0] in set(cfg[place]) else key

    return rename_keys(rename)


def check_stages(cfg: Any, configs: dict[str, Any], images: Any) -> dict[str, Any]:
    """Find what is wrong with a later stage before the first one trains.

    Args:
        cfg: The pipeline's config.
        configs: Those of its stages.
        images: The `PixelDataModule`, set up.

    Returns:
        The `preflight.Survey` of both training stages.

    Raises:
        InputError: Naming the key as the pipeline's config has it.
    """
    from vqvae_lightning.configs import build
    from vqvae_lightning.data import CodesDataModule
    from vqvae_lightning.data.codes import require_codes
    from vqvae_lightning.devices import choose_devices
    from vqvae_lightning.errors import prefix_keys
    from vqvae_lightning.jobs.ranks import count_ranks
    from vqvae_lightning.stages.evaluating import build_classifier, check_evaluation
    from vqvae_lightning.stages.sampling import check_sampling
    from vqvae_lightning.stages.training import check_stage, prepare, set_sizes

    require_codes(build(configs["vqvae"].model.net.quantizer))
    judge, drawing = configs["evaluation"], configs["samples"]
    prior = configs["prior"].copy()
    first = prepare(configs["vqvae"].copy(), images)
    with prefix_stage_keys(cfg, "prior"):
        # Of an untrained VQ-VAE: the sizes are those of the trained one.
        codes = CodesDataModule(images, first.task.net.eval(), "", prior.folder, prior.batch_size)
        set_sizes(prior, codes)
        _, second = check_stage(prior, codes)
    with prefix_stage_keys(cfg, "evaluation"):
        check_evaluation(judge)
        build_classifier(judge, images)
        with prefix_keys("trainer"):
            choose_devices(judge.trainer.accelerator, count_ranks(judge.trainer))
    with prefix_stage_keys(cfg, "sampling"):
        choose_devices(drawing.accelerator, drawing.devices)
        net = prior.model.net
        check_sampling(drawing, net.num_classes, net.height, net.null_label_rate)
    return {"vqvae": first.survey, "prior": second}


def run_pipeline(cfg: Any) -> dict[str, Any]:
    """Run what is left of the pipeline.

    Args:
        cfg: The composed config `conf/pipeline.yaml`, or that of the run to go on with.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: As the stages do, before any of them has begun where that can be known.
    """
    from vqvae_lightning.configs import record_foreign
    from vqvae_lightning.console import console
    from vqvae_lightning.runs.results import read_result, write_config
    from vqvae_lightning.runs.stopwatch import time_stage
    from vqvae_lightning.stages.evaluating import evaluate
    from vqvae_lightning.stages.sampling import draw_samples
    from vqvae_lightning.stages.training import keep_fingerprint, train

    folder = Path(cfg.folder)
    record_foreign(cfg)
    configs = stage_configs(cfg)
    images = None
    if any(read_result(folder / name) is None for name in ("vqvae", "prior", "evaluation")):
        images = load_images(configs["vqvae"].dataset)
        keep_fingerprint(cfg, images)
        surveys = check_stages(cfg, configs, images)
        if cfg.preflight:
            for name, found in surveys.items():
                print_survey(name, found)
            return {}
    if not (folder / "config.yaml").is_file():
        write_config(cfg, folder)
    places = {"prior": "prior", "evaluation": "evaluation", "samples": "sampling"}
    runs: dict[str, Callable[[Any], dict[str, Any]]] = {
        "vqvae": lambda stage: train(stage, images),
        "prior": lambda stage: train(stage, images),
        "evaluation": lambda stage: evaluate(stage, images),
        "samples": draw_samples,
    }
    results = {}
    for name, run in runs.items():
        known = read_result(folder / name) is not None
        with prefix_stage_keys(cfg, places[name]) if name in places else nullcontext():
            results[name] = run(configs[name])
        console.print(_describe(name, results[name], known), highlight=False, soft_wrap=True)
    with time_stage(folder) as watch:  # its own part: the report
        return _write_report(cfg, results, watch)


def _write_report(cfg: Any, results: dict[str, dict[str, Any]], watch: Any) -> dict[str, Any]:
    """Write the report and `result.json` out of the stages' results, timed by a `Stopwatch`."""
    from vqvae_lightning.files import replace_file
    from vqvae_lightning.report.run import write_report
    from vqvae_lightning.runs.results import write_result

    folder = Path(cfg.folder)
    for stage, picture in (("evaluation", "reconstructions.png"), ("samples", "samples.png")):
        with replace_file(folder / picture) as partial:
            shutil.copyfile(folder / stage / picture, partial)
    seconds = {name: result["seconds"] for name, result in results.items()}
    metrics = {k: v["value"] for k, v in results["evaluation"]["metrics"].items()}
    facts = {
        "seed": cfg.seed,
        "commit": cfg.commit,
        "split": results["evaluation"]["split"],
        "images": results["evaluation"]["images"],
        "samples": results["evaluation"]["samples"],
        "command": cfg.command,
        # Chosen on validation images: a sweep must not see the test split.
        "monitor": results["vqvae"]["monitor"],
        "objective": results["vqvae"]["objective"],
        "data_fingerprint": results["evaluation"]["data_fingerprint"],
    }
    # Written before the report, which shows it, and again with the report's own time.
    write_result(folder, metrics, seconds=seconds, **facts)
    write_report(folder)
    seconds["report"] = watch.seconds
    return write_result(folder, metrics, seconds=seconds, **facts)


def _describe(name: str, result: dict[str, Any], known: bool) -> str:
    """One line for a finished stage."""
    shown = {
        "vqvae": ("nmse", "perplexity", "codebook_use"),
        "prior": ("nats_per_code", "unigram_nats_per_code"),
        "evaluation": ("total_bits_per_dim", "real_accuracy", "sample_accuracy"),
        "samples": ("images",),
    }[name]
    values = {key.rpartition("/")[2]: entry for key, entry in result["metrics"].items()}
    figures = "  ".join(f"{key} {values[key]['value']:.4g}" for key in shown if key in values)
    when = "done before" if known else f"{result['seconds']:.0f} s"
    return f"[bold]{name}[/bold]  {when}  {figures}"
