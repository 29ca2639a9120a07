"""vqvae-train: train one stage, test its best checkpoint, return the objective of a sweep."""

import shlex
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from vqvae_lightning.callbacks.checkpoints import TimeKeeper
from vqvae_lightning.callbacks.counting import count_images
from vqvae_lightning.callbacks.reproducibility import ConfigComparison, FinalValidation
from vqvae_lightning.checkpoints import hash_weights, load
from vqvae_lightning.configs import build, build_parts, record_foreign, to_plain
from vqvae_lightning.console import console
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, StageDataModule
from vqvae_lightning.errors import InputError, Interrupted, Key, prefix_keys
from vqvae_lightning.jobs.ranks import get_environment, get_local_rank, start_ranks
from vqvae_lightning.loggers.wandb import Input, WandbRun, name_run
from vqvae_lightning.randomness import derive_seed
from vqvae_lightning.runs.folder import PREVIOUS_CHECKPOINT, RunFolder
from vqvae_lightning.runs.results import read_result, write_config, write_result
from vqvae_lightning.runs.stopwatch import Stopwatch, time_stage
from vqvae_lightning.stages.inputs import (
    build_codes,
    load_images,
    print_survey,
    print_warnings,
    require_same_data,
)
from vqvae_lightning.stages.preflight import (
    Survey,
    check_monitor,
    check_trainer,
    has_end,
    survey,
)
from vqvae_lightning.tasks.optimization import check_end, check_optimizer
from vqvae_lightning.trust import DATA, Trust


def train(
    cfg: DictConfig, images: PixelDataModule | None = None, known: Survey | None = None
) -> dict[str, Any]:
    """Train a stage, or resume its training, and test its best checkpoint.

    The stage runs on as many devices as `cfg.trainer` asks for; this process is rank 0.

    Args:
        cfg: Config of the stage (`conf/vqvae.yaml` or `conf/prior.yaml`). What the data decide,
            such as the number of channels, is filled in.
        images: Data of `cfg.dataset`, if they are set up already.
        known: Survey of the stage, if it was made already.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: If the config, the data or a checkpoint cannot work; before any training.
        RankError: If another rank failed.
    """
    # Resolved once: a resolver that draws at random must give all ranks the same value.
    OmegaConf.resolve(cfg)
    keep_dataset(cfg)
    record_foreign(cfg)
    folder = Path(cfg.folder)
    finished = read_result(folder)
    if finished is not None:
        return finished
    # Done before the other ranks start, so that one process downloads and one reports an error.
    data = load_data(cfg, images)
    complete_config(cfg, data)
    warn_other_data(cfg)
    task = build_task(cfg)
    found = known or survey_stage(cfg, task, data)
    if cfg.preflight:
        print_survey(cfg.kind, found)
        return {}
    console.print(f"[bold]{cfg.kind}[/bold]  {found.line}", highlight=False)
    print_warnings(found)
    name_run(cfg, cfg.kind)
    with time_stage(folder) as watch, start_ranks(cfg, folder, "vqvae_lightning.commands.worker"):
        return fit(cfg, task, data, watch)


def keep_dataset(cfg: DictConfig) -> None:
    """Fill in the data that the VQ-VAE of a prior was trained on, unless `cfg` names others.

    Raises:
        InputError: If the checkpoint cannot be loaded, or names no data or untrusted code.
    """
    if cfg.dataset is not None:
        return
    config = load(cfg.vqvae_checkpoint, "vqvae", cfg.trust).config
    if config.get("dataset") is None:
        raise InputError(f"{cfg.vqvae_checkpoint} names no data: give dataset=NAME.")
    Trust(f"checkpoint {cfg.vqvae_checkpoint}", cfg.trust, DATA).read(config["dataset"], "dataset")
    cfg.dataset = OmegaConf.create(config["dataset"])


def warn_other_data(cfg: DictConfig) -> None:
    """Warn if a stage trains on other data than the VQ-VAE that it starts from."""
    if cfg.get("vqvae_checkpoint") is None:  # configs of older runs lack the key
        return
    config = load(cfg.vqvae_checkpoint, "vqvae", cfg.trust).config
    known = config.get("data_fingerprint")  # older checkpoints have none
    if known not in (None, cfg.data_fingerprint):
        console.print(
            f"warning: vqvae_checkpoint={cfg.vqvae_checkpoint} was trained on data with "
            f"fingerprint {known}, and dataset= names others, {cfg.data_fingerprint}.",
            highlight=False,
        )


def load_data(cfg: DictConfig, images: PixelDataModule | None = None) -> StageDataModule:
    """Return the images of a VQ-VAE, or the codes of a prior.

    Args:
        cfg: Config of the stage.
        images: Data of `cfg.dataset`, if they are set up already.

    Raises:
        InputError: If they cannot be loaded, or are not those that the run began on.
    """
    images = images or load_images(cfg.dataset)
    check_fingerprint(cfg, images)
    if cfg.kind == "vqvae":
        return images
    path = Path(cfg.vqvae_checkpoint)
    codes: CodesDataModule = build_codes(
        images, load(path, "vqvae", cfg.trust).net, path, cfg, cfg.batch_size
    )
    keep_hash(cfg, codes.vqvae_hash)
    return codes


def keep_hash(cfg: DictConfig, vqvae_hash: str) -> None:
    """Fill in the hash of the VQ-VAE that a stage uses, and the absolute path of its checkpoint.

    Raises:
        InputError: If a resumed run began with another VQ-VAE.
    """
    if cfg.vqvae_hash not in (None, vqvae_hash):
        raise InputError(
            f"this {cfg.kind} began on the codes of VQ-VAE {cfg.vqvae_hash}, but vqvae_checkpoint="
            f"{cfg.vqvae_checkpoint} is now {vqvae_hash}: its codes mean something else."
        )
    cfg.vqvae_hash = vqvae_hash
    cfg.vqvae_checkpoint = str(Path(cfg.vqvae_checkpoint).absolute())


def keep_network(cfg: DictConfig) -> None:
    """Take the network of `vqvae_checkpoint`, except for the decoder to be trained.

    Raises:
        InputError: If the checkpoint cannot be loaded, or an override asks for another network.
    """
    if cfg.get("vqvae_checkpoint") is None:  # configs of older runs lack the key
        return
    for override in shlex.split(cfg.command or ""):
        key = override.lstrip("+").partition("=")[0]
        trained = key.startswith(("model.net.likelihood", "model.net.decoder"))
        if key in ("quantizer", "model") or (key.startswith("model.net.") and not trained):
            raise InputError(
                f"{override} has no effect with vqvae_checkpoint={cfg.vqvae_checkpoint}, whose "
                "network is kept: remove one of the two."
            )
    kept = load(cfg.vqvae_checkpoint, "vqvae", cfg.trust)
    keep_hash(cfg, hash_weights(kept.net))
    # Configs of older runs lack the key `decoder`.
    own = {name: part for name, part in cfg.model.net.items() if name in ("decoder", "likelihood")}
    settings = {**kept.config["model"]["net"], **own}
    cfg.model.net = OmegaConf.create(settings)


def check_fingerprint(cfg: DictConfig, images: PixelDataModule) -> None:
    """Check that the data are those that a run began on, if it is resumed.

    Raises:
        InputError: If they have changed.
    """
    began = f"the run in {cfg.folder} began on"
    way_out = "restore the data, or begin another run"
    require_same_data(images, cfg.get("data_fingerprint"), cfg.dataset, began, way_out)


def keep_fingerprint(cfg: DictConfig, images: PixelDataModule) -> None:
    """Fill in the fingerprint of the data that a run begins on."""
    with open_dict(cfg):  # configs of older runs lack the key
        cfg.data_fingerprint = images.fingerprint


def complete_config(cfg: DictConfig, data: StageDataModule) -> None:
    """Fill in what the data decide: their fingerprint, and sizes of the network.

    Raises:
        InputError: If the config has other sizes.
    """
    if isinstance(data, CodesDataModule):
        keep_fingerprint(cfg, data.images)
        set_sizes(cfg, data)
    else:
        assert isinstance(data, PixelDataModule)
        keep_fingerprint(cfg, data)
        keep_network(cfg)
        set_size(cfg, "channels", data.image_shape[0])


def set_sizes(cfg: DictConfig, codes: CodesDataModule) -> None:
    """Fill in a prior's sizes, which the VQ-VAE and the data decide.

    Raises:
        InputError: If the config has others.
    """
    height, width = codes.grid
    set_size(cfg, "num_codes", codes.num_codes)
    # Configs of older runs lack the key, and their priors have one code per position.
    if "codes_per_position" in cfg.model.net or codes.codes_per_position != 1:
        set_size(cfg, "codes_per_position", codes.codes_per_position)
    set_size(cfg, "height", height)
    set_size(cfg, "width", width)
    if cfg.model.net.num_classes != 0:  # 0 asks for a prior that ignores the classes
        set_size(cfg, "num_classes", codes.images.num_classes)


def set_size(cfg: DictConfig, name: str, value: int) -> None:
    """Set the size `name` of a network to what the data decide.

    Raises:
        InputError: If the config has another.
    """
    given = cfg.model.net[name]
    if given is not None and given != value:
        unconditional = ", or to 0 for a prior without classes" if name == "num_classes" else ""
        raise InputError(
            Key(f"model.net.{name}"),
            f"={given}: the data have {value}; set it to null, which takes that{unconditional}.",
        )
    cfg.model.net[name] = value


def build_task(cfg: DictConfig) -> Any:
    """Build the untrained `VQVAETask` or `PriorTask`, with the initial weights of the seed."""
    pl.seed_everything(derive_seed(cfg.seed, "init") % 2**32, workers=True, verbose=False)
    task = build(cfg.model)
    if cfg.kind == "vqvae" and cfg.get("vqvae_checkpoint"):
        task.keep_codes(load(cfg.vqvae_checkpoint, "vqvae", cfg.trust).net)
    return task


def survey_stage(cfg: DictConfig, task: Any, data: StageDataModule) -> Survey:
    """Check all settings of a stage before it trains, and survey its sizes.

    Args:
        cfg: Config of the stage, complete.
        task: Task built from it.
        data: Data of the stage; the codes of a prior need not be encoded yet.

    Raises:
        InputError: If the stage cannot work.
    """
    check_trainer(cfg.trainer)
    check_end(task.schedule, has_end(cfg.trainer))
    with prefix_keys("model"):
        states = check_optimizer(task.optimizer_factory)
    found = survey(cfg, task.net, data, states)
    check_monitor(cfg.monitor, task, data)
    build_parts(cfg.callbacks)
    return found


def fit(
    cfg: DictConfig, task: Any, data: StageDataModule, watch: Stopwatch | None = None
) -> dict[str, Any]:
    """Train and test on one rank; rank 0 writes.

    Args:
        cfg: Config of the stage, resolved and complete.
        task: Untrained task.
        data: Data of the stage, set up.
        watch: Stopwatch of the stage; None on other ranks than 0.

    Returns:
        The contents of `result.json`; empty on other ranks than 0.
    """
    folder = Path(cfg.folder)
    best, last = RunFolder(folder).best_checkpoint, RunFolder(folder).last_checkpoint
    on_gpu = cfg.trainer.accelerator != "cpu"
    if on_gpu:
        # Otherwise all ranks would use memory of the first GPU.
        torch.cuda.set_device(get_local_rank())
        torch.cuda.reset_peak_memory_stats()

    if isinstance(data, CodesDataModule):
        stream = torch.Generator().manual_seed(derive_seed(cfg.seed, "init", 1))
        task.start_from(data.vqvae.quantizer, stream)
    task.save_hyperparameters(to_plain(cfg))
    callbacks = [ConfigComparison(cfg), FinalValidation(), *build_parts(cfg.callbacks)]
    if watch is not None:
        callbacks.insert(2, TimeKeeper(watch))
    trainer = build(
        cfg.trainer,
        callbacks=callbacks,
        plugins=[get_environment()],
        logger=build_parts(cfg.logger),
        enable_progress_bar=cfg.callbacks.progress is not None,
    )
    if trainer.is_global_zero:
        write_config(cfg, folder)
    with log_to_wandb(trainer, task, cfg) as keep_artifact:
        trainer.fit(task, datamodule=data, ckpt_path=find_checkpoint(last))
        trainer.save_checkpoint(last, weights_only=False)
        warn_uninitialised(task, trainer.global_step)
        if not best.is_file():
            trainer.save_checkpoint(best, weights_only=False)
        scores = trainer.test(task, datamodule=data, ckpt_path=str(best), verbose=False)[0]
        tested = count_images(trainer, "test")
        keep_artifact(best)

    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    if watch is None:
        return {}
    return write_result(
        folder,
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=watch.seconds,
        metrics={k: float(v) for k, v in scores.items()},
        split="test",
        images=tested,
        monitor=cfg.monitor,
        objective=None if score is None else float(score),
        steps=trainer.global_step,
        pruned=any(getattr(part, "pruned", False) for part in trainer.callbacks),
        checkpoint=str(best),
        devices=trainer.world_size,
        peak_gpu_bytes=peak,
    )


@contextmanager
def log_to_wandb(
    trainer: pl.Trainer, task: Any, cfg: DictConfig
) -> Iterator[Callable[[Path], None]]:
    """Keep the Weights & Biases runs of a stage open during the block, if it has any.

    Yields:
        A function that logs a checkpoint as an artifact, with what it was made from.
    """
    runs = [run for run in trainer.loggers if isinstance(run, WandbRun)]
    if not trainer.is_global_zero:
        runs = []
    made_from = describe_input(cfg)

    def keep_artifact(checkpoint: Path) -> None:
        for run in runs:
            name = f"{cfg.kind}-{hash_weights(load(checkpoint, trust=cfg.trust).net)}"
            run.keep(cfg.kind, name, checkpoint, made_from)

    status = 1
    try:
        for run in runs:
            run.begin(task.net, trainer.log_every_n_steps, made_from.facts)  # type: ignore[attr-defined]
        yield keep_artifact
        status = 0
    except Interrupted as stop:
        status = stop.status
        raise
    finally:
        # Otherwise the run would stay open during the next jobs of this process.
        for run in runs:
            run.finish(status)


def describe_input(cfg: DictConfig) -> Input:
    """Describe what the checkpoints of a stage are made from: the data, or the VQ-VAE."""
    facts = {"data_fingerprint": cfg.data_fingerprint}
    if cfg.kind == "vqvae":
        return Input(f"data-{cfg.data_fingerprint}", "dataset", facts)
    facts["vqvae_hash"] = cfg.vqvae_hash
    return Input(f"vqvae-{cfg.vqvae_hash}", "vqvae", facts, Path(cfg.vqvae_checkpoint))


def warn_uninitialised(task: Any, steps: int) -> None:
    """Warn if training ended before the codebook was initialised."""
    if not getattr(getattr(task.net, "quantizer", None), "initialised", True):
        console.print(
            f"warning: training ended after {steps} steps, within the quantizer's warmup_steps: "
            "the codebook was never set.",
            highlight=False,
        )


def find_checkpoint(last: Path) -> str | None:
    """Return `last`, or the previous checkpoint if `last` is damaged; None if there is neither."""
    for path in (last, last.with_name(PREVIOUS_CHECKPOINT)):
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
