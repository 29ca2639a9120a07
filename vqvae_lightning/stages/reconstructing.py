"""vqvae-reconstruct: reconstruct images with a VQ-VAE."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from vqvae_lightning.checkpoints import load
from vqvae_lightning.console import show_progress
from vqvae_lightning.data import ImageFolderSource
from vqvae_lightning.devices import choose_device
from vqvae_lightning.errors import InputError, Key, check_positive, rename_keys
from vqvae_lightning.evaluation.reconstruction import make_pixel_generator
from vqvae_lightning.files import replace_file
from vqvae_lightning.pictures import arrange_pairs, save_png
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import write_config, write_result
from vqvae_lightning.stages.inputs import load_checkpoint_images


def reconstruct(cfg: DictConfig) -> dict[str, Any]:
    """Reconstruct images of a folder, or of the data set that the VQ-VAE was trained on.

    Writes `reconstructions.png` (originals, each row above the row of its reconstructions) and
    `reconstructions.npz` (images and reconstructions (N, H, W, C) uint8, and codes if the VQ-VAE
    has any).

    Args:
        cfg: The composed config `conf/reconstruct.yaml`.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: If the checkpoint or the images cannot be used.
    """
    folder = Path(cfg.folder)
    if cfg.input is None and cfg.size is not None:
        raise InputError(
            Key("size"),
            f"={cfg.size} resizes the images of a folder only: set ",
            Key("input"),
            " to one, or leave size out.",
        )
    vqvae = load(cfg.vqvae_checkpoint, "vqvae", cfg.trust)
    device = choose_device(cfg.accelerator)
    net = vqvae.net.to(device)
    count = check_positive("count", cfg.count)
    if cfg.input is None:
        data = load_checkpoint_images(vqvae, cfg.trust)
        images = data.datasets["test"].preview(count).data
    else:
        with rename_keys(lambda key: {"root": "input"}.get(key, key)):
            source = ImageFolderSource(cfg.input, size=cfg.size, grey=net.channels == 1)
            images = source.load().train.images
            net.compute_grid(*images.shape[2:])
    write_config(cfg, folder)
    codes, decoded = [], []
    noise = make_pixel_generator(cfg.seed)
    with show_progress("encoding", len(images)) as advance, torch.inference_mode():
        for part in images.split(256):
            quantized = net.quantize(from_uint8(part.to(device)))
            decoded.append(to_uint8(net.decode_vectors(quantized.vectors, noise)).cpu())
            if quantized.codes is not None:  # a continuous bottleneck has none
                codes.append(quantized.codes.cpu())
            advance(len(part))
    reconstructed = torch.cat(decoded)
    shown = arrange_pairs(images[:count], reconstructed[:count])
    save_png(shown, RunFolder(folder).reconstructions_picture)
    arrays: dict[str, Any] = {
        "images": images.movedim(1, -1),
        "reconstructions": reconstructed.movedim(1, -1),
        **({"codes": torch.cat(codes)} if codes else {}),
    }
    with replace_file(RunFolder(folder).reconstructions) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in arrays.items()})
    squared = float(((reconstructed.float() - images.float()) / 255).square().mean())
    metrics = {"images": float(len(images)), "mse": squared}
    return write_result(
        folder, metrics, commit=cfg.commit, vqvae_checkpoint=str(cfg.vqvae_checkpoint)
    )
