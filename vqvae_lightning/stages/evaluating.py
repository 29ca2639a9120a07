"""vqvae-evaluate: evaluate finished checkpoints on a held-out split."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from vqvae_lightning.checkpoints import hash_weights, load, load_pair
from vqvae_lightning.configs import build, build_parts, to_plain
from vqvae_lightning.console import print_line
from vqvae_lightning.data import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.devices import choose_devices
from vqvae_lightning.errors import InputError, Key, check_positive, check_range, prefix_keys
from vqvae_lightning.evaluation.bounds import (
    measure_bounds,
    reconstruct_preview,
    require_posterior,
)
from vqvae_lightning.evaluation.classifier import measure_with_classifier
from vqvae_lightning.evaluation.classifier_cache import fetch_classifier
from vqvae_lightning.evaluation.drawing import draw_images, find_nearest_images
from vqvae_lightning.evaluation.features import PUBLISHED, load_networks
from vqvae_lightning.evaluation.inception import measure_with_inception
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.evaluation.lpips import measure_lpips
from vqvae_lightning.evaluation.perceptual import measure_perceptually
from vqvae_lightning.evaluation.reconstruction import decode_images, measure_reconstruction
from vqvae_lightning.files import replace_file
from vqvae_lightning.jobs.launched_ranks import detect_launcher
from vqvae_lightning.jobs.ranks import (
    count_ranks,
    get_local_rank,
    join_ranks,
    start_ranks,
)
from vqvae_lightning.loggers.media import log_result
from vqvae_lightning.loggers.wandb import name_run
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.pictures import arrange_pairs, save_png
from vqvae_lightning.randomness import derive_seed
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_result, write_config, write_result
from vqvae_lightning.runs.stopwatch import Stopwatch, time_stage
from vqvae_lightning.stages.chosen_run import choose_checkpoints
from vqvae_lightning.stages.inputs import build_codes, load_checkpoint_images, load_images
from vqvae_lightning.stages.sampling import check_drawing, choose_drawing
from vqvae_lightning.tasks import ClassifierTask
from vqvae_lightning.tasks.optimization import check_optimizer


def check_evaluation(cfg: DictConfig) -> None:
    """Check the settings in `conf/evaluation`, except those of the classifier.

    Raises:
        InputError: If a setting cannot work; it names the key.
    """
    if cfg.split not in ("train", "val", "test"):
        raise InputError(Key("split"), f"={cfg.split} must be one of train, val, test.")
    for name in ("pictured", "num_samples", "classifier_steps", "classifier_batch_size"):
        check_positive(name, cfg[name])
    check_positive("importance_samples", cfg.get("importance_samples", 1))  # missing in older runs
    if cfg.num_samples < 2:
        raise InputError(Key("num_samples"), f"={cfg.num_samples} must be at least 2.")
    # Configs of older runs lack some of the keys.
    if cfg.num_samples < 4 and (
        cfg.get("perceptual") or (cfg.get("weights") or {}).get("inception")
    ):
        raise InputError(
            Key("num_samples"), f"={cfg.num_samples} must be at least 4 for precision and recall."
        )
    check_drawing(cfg)
    if cfg.get("classifier_seed") is not None:
        check_range("classifier_seed", cfg.classifier_seed, 0)


def build_classifier(cfg: DictConfig, images: PixelDataModule) -> ClassifierTask | None:
    """Build the untrained classifier that evaluates samples; None if the data have no classes.

    Raises:
        InputError: If the settings of the classifier cannot work.
    """
    if images.num_classes < 2:
        return None
    config = cfg.classifier.copy()
    config.net.channels, config.net.num_classes = images.image_shape[0], images.num_classes
    task: ClassifierTask = build(config)
    with prefix_keys("classifier"):
        check_optimizer(task.optimizer_factory)
    return task


class Subject(NamedTuple):
    """A VQ-VAE, and the prior and data that it is evaluated with."""

    codes: CodesDataModule
    """The data and their codes under the VQ-VAE; not set up yet."""
    prior: PixelCNN | None
    vqvae_path: Path


class VariationalSubject(NamedTuple):
    """A variational autoencoder, and the data that it is evaluated on."""

    vqvae: VQVAE
    images: PixelDataModule
    vqvae_path: Path


def load_subject(
    cfg: DictConfig, images: PixelDataModule | None = None
) -> Subject | VariationalSubject:
    """Load the checkpoints and the data that `cfg` names.

    Raises:
        InputError: If they cannot be used, or do not belong together.
    """
    prior = None
    if cfg.prior_checkpoint is None:
        if cfg.vqvae_checkpoint is None:
            raise InputError(
                "give run=PATH, vqvae_checkpoint=PATH, prior_checkpoint=PATH, or both of these."
            )
        vqvae = load(cfg.vqvae_checkpoint, "vqvae", cfg.trust)
        require_posterior(vqvae.net.quantizer)
        vqvae_path = Path(cfg.vqvae_checkpoint)
    else:
        loaded, vqvae = load_pair(cfg.prior_checkpoint, cfg.vqvae_checkpoint, cfg.trust)
        prior = loaded.net
        vqvae_path = Path(cfg.vqvae_checkpoint or loaded.config["vqvae_checkpoint"])
    if images is None:
        way_out = "restore the data, or name with dataset= those to evaluate on"
        images = (
            load_images(cfg.dataset)
            if cfg.dataset
            else load_checkpoint_images(vqvae, cfg.trust, way_out)
        )
    if prior is not None and prior.num_classes and prior.num_classes < images.num_classes:
        raise InputError(
            f"the data have {images.num_classes} classes and the prior {prior.num_classes}: choose "
            "the dataset that it was trained on."
        )
    if vqvae.net.quantizer.num_codes == 0:
        return VariationalSubject(vqvae.net, images, vqvae_path)
    return Subject(build_codes(images, vqvae.net, vqvae_path, cfg, 1), prior, vqvae_path)


def measure(cfg: DictConfig, found: Subject | VariationalSubject) -> dict[str, float]:
    """Measure errors and likelihoods on the split.

    The ranks divide the split between them. Each rank returns the metrics of the whole split.
    """
    join_ranks(cfg.trainer.accelerator)
    count = count_ranks(cfg.trainer)
    with prefix_keys("trainer"):
        device = choose_devices(cfg.trainer.accelerator, count)[get_local_rank()]
    if isinstance(found, VariationalSubject):
        return measure_bounds(
            found.vqvae, found.images, cfg.split, cfg.importance_samples, cfg.seed, device
        )
    found.codes.encode(device)
    found.codes.setup()
    if found.prior is not None:
        found.prior.to(device)
    return {
        **measure_reconstruction(found.codes, cfg.split, device),
        **measure_likelihood(found.codes, found.prior, cfg.split, device),
    }


def evaluate(cfg: DictConfig, images: PixelDataModule | None = None) -> dict[str, Any]:
    """Evaluate a VQ-VAE, and its prior if there is one, or a variational autoencoder.

    Several devices divide the split and the samples between them. The classifier is trained on one
    device, because it is small and has batch norm.

    Writes `reconstructions.png`, `codes.npz` (histogram of the training codes, codes of the
    pictured images) and, with a prior, `nearest.png`.

    Args:
        cfg: The composed config `conf/evaluate.yaml`.
        images: Data to evaluate on, if they are set up already.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: If a checkpoint or the data cannot be used, or the prior was trained with
            another VQ-VAE.
    """
    folder = Path(cfg.folder)
    finished = read_result(folder)
    if finished is not None:
        return finished
    with time_stage(folder) as watch:
        return _evaluate(cfg, images, watch)


def _evaluate(cfg: DictConfig, images: PixelDataModule | None, watch: Stopwatch) -> dict[str, Any]:
    folder, run = Path(cfg.folder), RunFolder(cfg.folder)
    check_evaluation(cfg)
    choose_checkpoints(cfg)
    pl.seed_everything(derive_seed(cfg.seed, "judge") % 2**32, workers=True, verbose=False)
    found = load_subject(cfg, images)
    if isinstance(found, VariationalSubject):
        return _evaluate_bounds(cfg, found, watch)
    codes, prior, vqvae_path = found
    images = codes.images
    if prior is not None:
        with torch.random.fork_rng(devices=[]):
            build_classifier(cfg, images)  # raises before anything is measured
        drawing = choose_drawing(cfg, prior.num_classes, prior.null_label_rate)
    nets = load_networks(bool(cfg.get("perceptual")), cfg.get("weights") or {}, images)
    if nets.missing is not None:
        print_line(nets.missing)
    for key, found_hash in nets.hashes.items():
        if found_hash != PUBLISHED[key].sha256:
            print_line(
                f"warning: weights.{key}={cfg.weights[key]} is not {PUBLISHED[key].url}, so its "
                "metrics do not compare with published values."
            )
    name_run(cfg, "evaluation")
    with start_ranks(cfg, folder, "vqvae_lightning.commands.worker"):
        metrics = measure(cfg, found)
    write_config(cfg, folder)

    # The rest runs on rank 0, which has all devices unless a launcher started the ranks.
    count = 1 if detect_launcher() else count_ranks(cfg.trainer)
    devices = choose_devices(cfg.trainer.accelerator, count)
    device = devices[0]
    options = {**to_plain(cfg.trainer), "devices": 1, "num_nodes": 1}
    shown = images.datasets[cfg.split].preview(cfg.pictured).data
    shown_codes = torch.tensor(codes.datasets[cfg.split].data[: cfg.pictured]).long()
    decoded = decode_images(codes.vqvae, shown_codes.to(device), cfg.seed)
    picture = arrange_pairs(shown, decoded)
    save_png(picture, run.reconstructions_picture)
    arrays: dict[str, Any] = {"histogram": codes.histogram(), "codes": shown_codes, "images": shown}
    with replace_file(run.codes) as partial, partial.open("wb") as file:
        np.savez(file, **{k: v.numpy() for k, v in arrays.items()})
    classifier, drawn = None, None
    if prior is not None:
        labels = None
        if prior.num_classes:
            # The prior has not learnt classes without training images.
            trained = codes.datasets["train"].labels
            assert trained is not None
            present = trained.unique()
            labels = present[torch.arange(cfg.num_samples) % len(present)]
        drawn = draw_images(
            codes.vqvae,
            prior,
            cfg.num_samples,
            labels,
            cfg.seed,
            devices,
            **drawing,
        ).images
        nearest = find_nearest_images(images, drawn[:10])
        save_png(arrange_pairs(drawn[:10], nearest), run.nearest_picture)
        judged, seed = images, cfg.seed
        if cfg.get("classifier_seed") is not None:  # configs of older runs lack these keys
            judged, seed = copy.copy(images), cfg.classifier_seed
            judged.seed = seed
        # Here, because the steps before draw more or fewer random numbers, for example to encode
        # the images.
        torch.manual_seed(derive_seed(seed, "judge"))
        task = build_classifier(cfg, judged)
        if task is not None:
            judge = fetch_classifier(
                task,
                judged,
                to_plain(cfg.classifier),
                {**options, "max_steps": cfg.classifier_steps},
                cfg.classifier_batch_size,
                cfg.get("classifier_cache"),
                device,
            )
            classifier = hash_weights(judge)
            metrics |= measure_with_classifier(judge, codes, cfg.split, drawn, labels, device)
    if nets.efficientnet is not None:
        metrics |= measure_perceptually(nets.efficientnet, codes, cfg.split, drawn, device)
    if nets.inception is not None:
        metrics |= measure_with_inception(nets.inception, codes, cfg.split, drawn, device)
    if nets.lpips is not None:
        metrics |= measure_lpips(nets.lpips, codes, cfg.split, device)
    named = {f"{cfg.split}/{name}": value for name, value in metrics.items()}
    pictures = [run.reconstructions_picture, run.nearest_picture]
    log_result(
        build_parts(cfg.logger or {}),
        to_plain(cfg),
        named,
        [path for path in pictures if path.is_file()],
    )
    return write_result(
        folder,
        named,
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=watch.seconds,
        split=cfg.split,
        images=len(codes.datasets[cfg.split]),
        samples=0 if prior is None else cfg.num_samples,
        drawing=None if prior is None else drawing,
        vqvae_checkpoint=str(vqvae_path),
        prior_checkpoint=cfg.prior_checkpoint,
        data_fingerprint=images.fingerprint,
        classifier=classifier,
        weights=dict(nets.hashes),
        missing=nets.missing,
        class_names=images.class_names,
    )


def _evaluate_bounds(
    cfg: DictConfig, found: VariationalSubject, watch: Stopwatch
) -> dict[str, Any]:
    """Evaluate a variational autoencoder, which has neither codes nor a prior over them."""
    folder, run = Path(cfg.folder), RunFolder(cfg.folder)
    missing = None
    if cfg.get("perceptual") or any((cfg.get("weights") or {}).values()):
        missing = "perceptual metrics are left out: a variational autoencoder has no codes"
        print_line(missing)
    name_run(cfg, "evaluation")
    with start_ranks(cfg, folder, "vqvae_lightning.commands.worker"):
        metrics = measure(cfg, found)
    write_config(cfg, folder)
    device = choose_devices(cfg.trainer.accelerator, 1)[0]
    shown, decoded = reconstruct_preview(
        found.vqvae, found.images, cfg.split, cfg.pictured, cfg.seed, device
    )
    save_png(arrange_pairs(shown, decoded), run.reconstructions_picture)
    named = {f"{cfg.split}/{name}": value for name, value in metrics.items()}
    log_result(build_parts(cfg.logger or {}), to_plain(cfg), named, [run.reconstructions_picture])
    return write_result(
        folder,
        named,
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=watch.seconds,
        split=cfg.split,
        images=len(found.images.datasets[cfg.split]),
        importance_samples=cfg.importance_samples,
        vqvae_checkpoint=str(found.vqvae_path),
        data_fingerprint=found.images.fingerprint,
        missing=missing,
        class_names=found.images.class_names,
    )
