"""vqvae-sample: draw images from a prior, or complete given images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from vqvae_lightning.checkpoints import Loaded, load_pair
from vqvae_lightning.data import ImageFolderSource
from vqvae_lightning.devices import choose_devices
from vqvae_lightning.errors import (
    InputError,
    Interrupted,
    Key,
    check_positive,
    check_range,
    rename_keys,
)
from vqvae_lightning.evaluation.drawing import draw_images
from vqvae_lightning.files import replace_file
from vqvae_lightning.jobs.launched_ranks import detect_launcher
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import allows_guidance, check_guidance, check_top_p
from vqvae_lightning.pictures import arrange_grid, save_png
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_result, write_config, write_result
from vqvae_lightning.runs.stopwatch import Stopwatch, time_stage
from vqvae_lightning.stages.inputs import load_checkpoint_images

GUIDANCE = 1.5
"""Default for priors that allow guidance: experiments/reference_settings."""


def check_drawing(cfg: DictConfig) -> None:
    """Check how codes are to be drawn, without the prior.

    Raises:
        InputError: If a value is out of range; it names the key.
    """
    choose_drawing(cfg, num_classes=1, null_label_rate=1.0)  # of a prior that allows guidance


def choose_drawing(cfg: DictConfig, num_classes: int, null_label_rate: float) -> dict[str, Any]:
    """Choose how a prior draws codes.

    Args:
        cfg: Config with `temperature`, and optionally `top_k`, `top_p` and `guidance`, which the
            evaluations of older runs lack: they drew without guidance.
        num_classes: Classes of the prior; 0 for an unconditional prior.
        null_label_rate: Share of the training samples whose class was hidden from the prior.

    Returns:
        These arguments of `sample_batches`.

    Raises:
        InputError: If a value cannot work; it names the key.
    """
    top_k, guidance = cfg.get("top_k"), cfg.get("guidance", 1.0)
    if guidance is None:
        guidance = GUIDANCE if allows_guidance(num_classes, null_label_rate) else 1.0
    check_guidance(check_range("guidance", guidance, 0), num_classes, null_label_rate)
    return {
        "temperature": check_range("temperature", cfg.temperature, 0),
        "top_k": None if top_k is None else check_positive("top_k", top_k),
        "top_p": check_top_p(cfg.get("top_p", 1.0)),
        "guidance": guidance,
    }


def check_sampling(cfg: DictConfig, num_classes: int, height: int, null_label_rate: float) -> None:
    """Check the settings in `conf/sampling` against a prior.

    Args:
        cfg: Config with these settings.
        num_classes: Classes of the prior; 0 for an unconditional prior.
        height: Rows of the prior's grid.
        null_label_rate: Share of the training samples whose class was hidden from the prior.

    Raises:
        InputError: If a setting cannot work; it names the key.
    """
    for name in ("num_samples", "completions"):
        check_positive(name, cfg[name])
    if cfg.batch_size is not None:
        check_positive("batch_size", cfg.batch_size)
    check_range("keep_rows", cfg.keep_rows, 0, 1)
    choose_drawing(cfg, num_classes, null_label_rate)
    if cfg.complete is not None:
        if round(cfg.keep_rows * height) >= height:
            raise InputError(
                Key("keep_rows"), f"={cfg.keep_rows} of {height} rows of codes leaves none to draw."
            )
        if cfg.complete == "test" and cfg.labels is not None:
            raise InputError(
                Key("labels"),
                f"={cfg.labels}: test images are completed with their own classes; drop labels.",
            )
        if cfg.complete != "test" and not Path(cfg.complete).is_dir():
            raise InputError(
                Key("complete"), f"={cfg.complete} must be a folder of images, or test."
            )
        if cfg.complete != "test" and cfg.labels is None and num_classes:
            raise InputError(
                Key("complete"),
                f"={cfg.complete}: this prior has classes; give those of the images in order of "
                "their names, as in ",
                Key("labels"),
                "=[0,3]; a list that is too short is repeated.",
            )
    if cfg.labels is None:
        return
    if not num_classes:
        said = f"={cfg.labels}: this prior has no classes; drop labels."
        raise InputError(Key("labels"), said)
    if not isinstance(cfg.labels, ListConfig) or not cfg.labels:
        raise InputError(Key("labels"), f"={cfg.labels} must be a list, such as [0,3].")
    bad = [label for label in cfg.labels if label not in range(num_classes)]
    if bad:
        raise InputError(Key("labels"), f"={bad} must be among 0 to {num_classes - 1}.")


def draw_samples(cfg: DictConfig) -> dict[str, Any]:
    """Draw images, or complete given images.

    Writes `samples.png` (a column per class, or rows of originals, what is kept of them and their
    completions) and `samples.npz` (images (N, H, W, C) uint8, codes and labels).

    Args:
        cfg: The composed config `conf/sample.yaml`.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: If a checkpoint cannot be used, or a setting cannot work.
        Interrupted: After Ctrl-C; `samples.npz` has the samples that were finished.
    """
    folder = Path(cfg.folder)
    finished = read_result(folder)
    if finished is not None:
        return finished
    with time_stage(folder) as watch:
        return _draw_samples(cfg, watch)


def _draw_samples(cfg: DictConfig, watch: Stopwatch) -> dict[str, Any]:
    folder, run = Path(cfg.folder), RunFolder(cfg.folder)
    loaded, vqvae = load_pair(cfg.prior_checkpoint, cfg.vqvae_checkpoint, cfg.trust)
    prior = loaded.net
    check_sampling(cfg, prior.num_classes, prior.height, prior.null_label_rate)
    drawing = choose_drawing(cfg, prior.num_classes, prior.null_label_rate)
    # Each rank of a launcher has a device of its own.
    devices = choose_devices(cfg.accelerator, 1 if detect_launcher() else cfg.devices)
    labels, chosen, columns = None, [], 10
    known = originals = None
    count = cfg.num_samples
    if cfg.complete is None:
        if prior.num_classes:
            chosen = list(range(prior.num_classes) if cfg.labels is None else cfg.labels)
            labels = torch.tensor(chosen)[torch.arange(count) % len(chosen)]
            # A column per class where they fit; more classes follow each other in rows.
            columns = len(chosen) if len(chosen) <= 20 else 10
    else:
        originals, labels = load_originals(cfg, prior, vqvae)
        known = encode_kept(vqvae.net.to(devices[0]), originals, cfg.keep_rows)
        known = known.repeat(cfg.completions, *[1] * (known.ndim - 1))
        labels = None if labels is None else labels.repeat(cfg.completions)
        count = len(known)
    write_config(cfg, folder)
    samples = draw_images(
        vqvae.net,
        prior,
        count,
        labels,
        cfg.seed,
        devices,
        keep_finished=True,
        known=known,
        batch_size=cfg.batch_size,
        **drawing,
    )
    done = len(samples.images)
    if originals is None:
        save_png(arrange_grid(samples.images[: 10 * columns], columns), run.samples_picture)
    else:
        kept = round(cfg.keep_rows * prior.height) * originals.shape[2] // prior.height
        save_png(show_completions(originals, samples.images, kept), run.samples_picture)
    arrays: dict[str, Any] = {"images": samples.images.movedim(1, -1), "codes": samples.codes}
    if labels is not None:
        arrays["labels"] = labels[:done]
    with replace_file(run.samples) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in arrays.items()})
    if done < count:
        raise Interrupted(f"Interrupted: {done} of {count} samples are in {run.samples}.")
    per_image = samples.codes[0].numel() if known is None else int((known[0] < 0).sum())
    return write_result(
        folder,
        {"images": float(count), "entropy_nats_per_code": float(samples.nats.mean()) / per_image},
        seed=cfg.seed,
        commit=cfg.commit,
        seconds=watch.seconds,
        drawing=drawing,
        prior_checkpoint=str(cfg.prior_checkpoint),
        column_classes=chosen if len(chosen) == columns <= count else [],
    )


def load_originals(cfg: DictConfig, prior: PixelCNN, vqvae: Loaded) -> tuple[Tensor, Tensor | None]:
    """Load images (N, C, H, W) uint8 to complete, and their classes (N,) for a conditional prior.

    Raises:
        InputError: If there are no images, or they do not fit the VQ-VAE.
    """
    if cfg.complete == "test":
        first = load_checkpoint_images(vqvae, cfg.trust).datasets["test"].preview(cfg.num_samples)
        return first.data, first.labels if prior.num_classes else None
    # The prior has a fixed grid, so the images get the size that it was trained on.
    factor = 2**vqvae.net.downsamplings
    size = [prior.height * factor, prior.width * factor]
    with rename_keys(lambda key: {"root": "complete"}.get(key, key)):
        source = ImageFolderSource(cfg.complete, size=size, grey=vqvae.net.channels == 1)
        images = source.load().train.images[: cfg.num_samples]
    if not prior.num_classes:
        return images, None
    return images, torch.tensor(list(cfg.labels))[torch.arange(len(images)) % len(cfg.labels)]


def encode_kept(vqvae: VQVAE, images: Tensor, keep_rows: float) -> Tensor:
    """Encode images (N, C, H, W) uint8 to codes (N, h, w), with -1 below the rows to keep.

    A quantizer with several codes per position gives codes (N, h, w, Q).
    """
    device = next(vqvae.parameters()).device
    with torch.inference_mode():
        parts = [vqvae.encode(from_uint8(part.to(device))).cpu() for part in images.split(256)]
    codes = torch.cat(parts).clone()
    codes[:, round(keep_rows * codes.shape[1]) :] = -1
    return codes


def show_completions(originals: Tensor, drawn: Tensor, kept_rows: int) -> Tensor:
    """Arrange ten originals, their `kept_rows` rows of pixels and their completions in rows."""
    shown = originals[:10]
    kept = shown.clone()
    kept[:, :, kept_rows:] = 128
    rows = [shown, kept]
    for first in range(0, len(drawn) - len(shown) + 1, len(originals)):
        rows.append(drawn[first : first + len(shown)])
    return arrange_grid(rows, len(shown))
