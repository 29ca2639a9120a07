"""Reconstruction metrics on a split."""

import math
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import SplitName
from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.metrics import CodebookUsage, entropy_nats
from vqvae_lightning.pixels import to_uint8


@torch.inference_mode()
def reconstruction_metrics(
    codes: CodesDataModule, split: SplitName, device: torch.device
) -> dict[str, float]:
    """How well a split is reconstructed and how its codes use the codebook.

    Errors are measured on uint8-rounded images in [0, 1], `mse_unrounded` apart. `perplexity` is of
    the whole split's histogram; `perplexity_batch32`, the mean over batches of 32 images, is lower
    and only there to compare with older work. `dead_codes` never occur in the training split.
    """
    squared, unrounded = MeanSquaredError().to(device), MeanSquaredError().to(device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean").to(
        device
    )
    usage = CodebookUsage(codes.num_codes).to(device)
    psnr_sum = torch.zeros((), dtype=torch.float64)
    for levels, _, grid in _pairs(codes, split, device, "reconstructing"):
        decoded = codes.vqvae.decode(grid).float()
        rounded, truth = to_uint8(decoded).float() / 255, levels.float() / 255
        squared.update(rounded, truth)
        unrounded.update(((decoded + 1) / 2).contiguous(), truth)
        ssim.update(rounded, truth)
        psnr_sum += psnr(rounded, truth).item() * len(levels)
        usage.update(grid)
    error, used = float(squared.compute()), usage.compute()
    stored = codes.datasets[split].data
    batch_perplexities = [
        entropy_nats(
            torch.from_numpy(stored[start : start + 32].astype("int64"))
            .flatten()
            .bincount(minlength=codes.num_codes)
        )
        .exp()
        .item()
        for start in range(0, len(stored) - 31, 32)
    ]
    return {
        "mse": error,
        "mse_unrounded": float(unrounded.compute()),
        "nmse": error / codes.images.pixel_variance,
        "psnr_db": -10 * math.log10(error),
        "psnr_per_image_db": float(all_reduce(psnr_sum)) / len(codes.datasets[split]),
        "ssim": cast(Tensor, ssim.compute()).item(),
        "perplexity": float(used["perplexity"]),
        **(
            {"perplexity_batch32": sum(batch_perplexities) / len(batch_perplexities)}
            if batch_perplexities
            else {}
        ),
        "code_entropy_bits": float(used["entropy_bits"]),
        "codebook_use": float(used["use"]),
        "dead_codes": float((codes.histogram() == 0).sum()),
    }


@torch.inference_mode()
def decode_images(vqvae: Any, codes: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 on the CPU of codes (N, h, w), in batches."""
    return torch.cat([to_uint8(vqvae.decode(part)).cpu() for part in codes.split(256)])


def _pairs(
    codes: CodesDataModule,
    split: SplitName,
    device: torch.device,
    step: str,
    limit: int = sys.maxsize,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Images (B, C, H, W) uint8, labels (B,) and codes (B, h, w) in batches, under a progress bar.

    Images that workers read come in another order than the rows of the codes. Several ranks divide
    the split; only its first `limit` rows come.
    """
    codes.vqvae.to(device)
    stored, loader = codes.datasets[split], codes.images.batches(split)
    with show_progress(step, len(stored)) as advance:
        for rows, images in zip(loader.rows(), loader, strict=True):
            here = rows < limit
            if here.any():
                grid = stored.__getitems__(rows[here]).data
                labels = None if images.labels is None else images.labels[here].to(device)
                yield images.data[here].to(device), labels, grid.to(device).long()
            advance(len(images.data) * get_rank_and_world()[1])
