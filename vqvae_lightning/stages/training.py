"""Train one stage: fit a task, test its best checkpoint, return the objective of a sweep."""

from pathlib import Path
from typing import Any, NamedTuple

from vqvae_lightning.stages.inputs import build_codes, load_images, print_survey, require_same_data


def train(cfg: Any, images: Any = None) -> dict[str, Any]:
    """Train the stage that `cfg` describes, or what is left of it, and test its best checkpoint.

    On as many devices as `cfg.trainer.devices` says: with several, this process is the first rank.

    Args:
        cfg: The composed config of a stage (`conf/vqvae.yaml` or `conf/prior.yaml`); what the data
            decide (channels, number of codes) is filled in.
        images: The `PixelDataModule` of `cfg.dataset`, if it is set up already.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: If the config, the data or a checkpoint cannot work; before any training.
        RankError: If another rank failed.
    """
    from omegaconf import OmegaConf

    from vqvae_lightning.configs import record_foreign
    from vqvae_lightning.jobs.ranks import start_ranks
    from vqvae_lightning.loggers.wandb import name_run
    from vqvae_lightning.runs.results import read_result
    from vqvae_lightning.runs.stopwatch import time_stage

    # Once, and not at each access: a value that is drawn at random must be the same on all ranks.
    OmegaConf.resolve(cfg)
    record_foreign(cfg)
    folder = Path(cfg.folder)
    finished = read_result(folder)
    if finished is not None:
        return finished
    # Before the ranks start, so that only one process downloads.
    images = images or load_images(cfg.dataset)
    if cfg.preflight:
        print_survey(cfg.kind, prepare(cfg, images).survey)
        return {}
    name_run(cfg, cfg.kind)
    with time_stage(folder) as watch, start_ranks(cfg, folder, "vqvae_lightning.commands.worker"):
        return fit(cfg, images, watch)


class Stage(NamedTuple):
    """What a config turns into, before a Trainer is there."""

    task: Any
    data: Any
    made_from: Any
    """The `loggers.Input` of its checkpoint."""
    survey: Any
    """The `preflight.Survey`."""


def prepare(cfg: Any, images: Any) -> Stage:
    """Build the stage that `cfg` describes, fill in what the data decide, and look it over.

    Raises:
        InputError: If it cannot work.
    """
    import pytorch_lightning as pl

    from vqvae_lightning.checkpoints import load
    from vqvae_lightning.errors import InputError
    from vqvae_lightning.loggers.wandb import Input
    from vqvae_lightning.randomness import stream_seed

    keep_fingerprint(cfg, images)
    data = images
    facts = {"data_fingerprint": images.fingerprint}
    made_from = Input(f"data-{images.fingerprint}", "dataset", facts)
    if cfg.kind == "prior":
        path = Path(cfg.vqvae_checkpoint)
        data = build_codes(images, load(path, "vqvae", cfg.trust).net, path, cfg, cfg.batch_size)
        if cfg.vqvae_hash not in (None, data.vqvae_hash):
            raise InputError(
                f"this prior began on the codes of VQ-VAE {cfg.vqvae_hash}, but vqvae_checkpoint="
                f"{cfg.vqvae_checkpoint} is now {data.vqvae_hash}: its codes mean something else."
            )
        cfg.vqvae_hash = data.vqvae_hash
        set_sizes(cfg, data)
        facts = {**facts, "vqvae_hash": data.vqvae_hash}
        made_from = Input(f"vqvae-{data.vqvae_hash}", "vqvae", facts, path)
        cfg.vqvae_checkpoint = str(Path(cfg.vqvae_checkpoint).absolute())
    else:
        set_size(cfg, "channels", images.image_shape[0])
    pl.seed_everything(stream_seed(cfg.seed, "init") % 2**32, workers=True, verbose=False)
    task, found = check_stage(cfg, data)
    return Stage(task, data, made_from, found)


def check_stage(cfg: Any, data: Any) -> tuple[Any, Any]:
    """Build the task of a stage, and check everything that its training would stumble over.

    Args:
        cfg: The config of the stage, filled in.
        data: Its data; the codes of a prior may not be made yet.

    Returns:
        The task and the `preflight.Survey`.

    Raises:
        InputError: If the stage cannot work.
    """
    from vqvae_lightning.configs import build
    from vqvae_lightning.errors import prefix_keys
    from vqvae_lightning.stages.preflight import check_monitor, check_trainer, survey
    from vqvae_lightning.tasks.optimization import check_optimizer

    check_trainer(cfg.trainer)
    task = build(cfg.model)
    with prefix_keys("model"):
        states = check_optimizer(task.optimizer_factory)
    found = survey(cfg, task.net, data, states)
    check_monitor(cfg.monitor, task, data)
    for part in cfg.callbacks.values():
        if part is not None:
            build(part)
    return task, found


def keep_fingerprint(cfg: Any, images: Any) -> None:
    """Fill in which data a run begins on; when it is resumed, see that they are the same.

    Raises:
        InputError: If they have changed.
    """
    from omegaconf import open_dict

    way_out = "restore the data, or begin another run"
    require_same_data(
        images,
        cfg.get("data_fingerprint"),
        cfg.dataset,
        f"the run in {cfg.folder} began on",
        way_out,
    )
    with open_dict(cfg):  # the config of an older run lacks the key
        cfg.data_fingerprint = images.fingerprint


def set_sizes(cfg: Any, codes: Any) -> None:
    """Fill in a prior's sizes, which the VQ-VAE and the data decide.

    Raises:
        InputError: If the config has others.
    """
    height, width = codes.grid
    set_size(cfg, "num_codes", codes.num_codes)
    set_size(cfg, "height", height)
    set_size(cfg, "width", width)
    if cfg.model.net.num_classes != 0:  # else a prior that takes no notice of the classes
        set_size(cfg, "num_classes", codes.images.num_classes)


def set_size(cfg: Any, name: str, value: int) -> None:
    """Set the size `name` of a network to what the data decide.

    Raises:
        InputError: If the config has another.
    """
    from vqvae_lightning.errors import InputError, Key

    given = cfg.model.net[name]
    if given is not None and given != value:
        unconditional = ", or to 0 for a prior without classes" if name == "num_classes" else ""
        raise InputError(
            Key(f"model.net.{name}"),
            f"={given}: the data have {value}; set it to null, which takes that{unconditional}.",
        )
    cfg.model.net[name] = value


def fit(cfg: Any, images: Any = None, watch: Any = None) -> dict[str, Any]:
    """One rank's part of `train`; rank 0 writes.

    Args:
        cfg: Resolved config of the stage.
        images: The `PixelDataModule` of `cfg.dataset`, if it is set up already.
        watch: The `results.Stopwatch` of the stage, on rank 0.

    Returns:
        The contents of `result.json`; empty on the other ranks.
    """
    import torch

    from vqvae_lightning.callbacks.checkpoints import TimeKeeper
    from vqvae_lightning.callbacks.reproducibility import ConfigComparison, FinalValidation
    from vqvae_lightning.checkpoints import load, weights_hash
    from vqvae_lightning.configs import build, to_plain
    from vqvae_lightning.console import console
    from vqvae_lightning.errors import Interrupted
    from vqvae_lightning.jobs.ranks import environment, local_rank
    from vqvae_lightning.loggers.wandb import WandbRun
    from vqvae_lightning.runs.results import write_config, write_result

    folder = Path(cfg.folder)
    images = images or load_images(cfg.dataset)
    trainer = build(
        cfg.trainer,
        callbacks=[
            ConfigComparison(cfg),
            FinalValidation(),
            *([] if watch is None else [TimeKeeper(watch)]),
            *[build(part) for part in cfg.callbacks.values() if part is not None],
        ],
        plugins=[environment()],
        logger=[build(part) for part in cfg.logger.values() if part is not None],
        enable_progress_bar=cfg.callbacks.progress is not None,
    )
    on_gpu = cfg.trainer.accelerator != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank())  # or what follows would take memory of the first GPU
        torch.cuda.reset_peak_memory_stats()
    task, data, made_from, survey = prepare(cfg, images)
    if trainer.is_global_zero:
        console.print(f"[bold]{cfg.kind}[/bold]  {survey.line}", highlight=False)
        for warning in survey.warnings:
            console.print(f"warning: {warning}", highlight=False)
    task.save_hyperparameters(to_plain(cfg))
    if trainer.is_global_zero:
        write_config(cfg, folder)

    wandb_runs = [run for run in trainer.loggers if isinstance(run, WandbRun)]
    if not trainer.is_global_zero:
        wandb_runs = []
    checkpoints = folder / "checkpoints"
    best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
    scores = None
    status = 1
    try:
        for run in wandb_runs:
            run.begin(task.net, trainer.log_every_n_steps, made_from.facts)
        trainer.fit(task, datamodule=data, ckpt_path=whole_checkpoint(last))
        trainer.save_checkpoint(last, weights_only=False)
        if not getattr(getattr(task.net, "quantizer", None), "initialised", True):
            console.print(
                f"warning: training ended after {trainer.global_step} steps, within the "
                "quantizer's warmup_steps: the codebook was never set.",
                highlight=False,
            )
        if not best.is_file():
            trainer.save_checkpoint(best, weights_only=False)
        scores = trainer.test(task, datamodule=data, ckpt_path=str(best), verbose=False)[0]
        for run in wandb_runs:
            name = f"{cfg.kind}-{weights_hash(load(best, trust=cfg.trust).net)}"
            run.keep(cfg.kind, name, best, made_from)
        status = 0
    except Interrupted as stop:
        status = stop.status
        raise
    finally:
        # Or the run would stay open beside those of the jobs that follow in this process.
        for run in wandb_runs:
            run.finish(status)
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    if not trainer.is_global_zero:
        return {}
    return write_result(
        folder,
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=watch.seconds,
        metrics={k: float(v) for k, v in scores.items()},
        split="test",
        images=len(data.datasets["test"]),
        monitor=cfg.monitor,
        objective=None if score is None else float(score),
        steps=trainer.global_step,
        pruned=any(getattr(part, "pruned", False) for part in trainer.callbacks),
        checkpoint=str(best),
        devices=trainer.world_size,
        peak_gpu_bytes=peak,
    )


def whole_checkpoint(last: Path) -> str | None:
    """`last`, or the one before it if the file is damaged; None if there is neither."""
    import zipfile

    from vqvae_lightning.console import console

    for path in (last, last.with_name("previous.ckpt")):
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError) as error:
                damaged = str(error)
            if damaged is None:
                return str(path)
            console.print(f"warning: {path} is damaged ({damaged}).", highlight=False)
    return None
