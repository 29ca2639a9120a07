"""Measure reconstructions on a split."""

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

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
from vqvae_lightning.randomness import derive_seed

HIGHEST_PSNR = 100.0
"""PSNR in dB that counts for an image without any error, whose own is infinite."""

if TYPE_CHECKING:
    from vqvae_lightning.networks.autoencoder import VQVAE


class ReconstructionErrors:
    """Errors of reconstructions over a split and all ranks.

    All but `mse_unrounded` are measured on images in [0, 1] that are rounded to uint8.

    Args:
        device: Device of the images.
    """

    def __init__(self, device: torch.device) -> None:
        self.squared = MeanSquaredError().to(device)
        self.unrounded = MeanSquaredError().to(device)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="none").to(device)
        # Sum of the PSNR of the images, and their number.
        self.psnr_sum = torch.zeros(2, dtype=torch.float64)

    def update(self, levels: Tensor, decoded: Tensor) -> None:
        """Add images (B, C, H, W) uint8 and their reconstructions in [-1, 1], float32."""
        rounded, truth = to_uint8(decoded).float() / 255, levels.float() / 255
        self.squared.update(rounded, truth)
        self.unrounded.update(((decoded + 1) / 2).contiguous(), truth)
        self.ssim.update(rounded, truth)
        psnr = self.psnr(rounded, truth).double().clamp(max=HIGHEST_PSNR)
        self.psnr_sum += torch.tensor([float(psnr.sum()), len(psnr)], dtype=torch.float64)

    def compute(self, pixel_variance: float) -> dict[str, float]:
        """Compute the errors; `pixel_variance` is that of the training pixels in [0, 1]."""
        error = float(self.squared.compute())
        psnr_sum, images = all_reduce(self.psnr_sum).tolist()
        return {
            "mse": error,
            "mse_unrounded": float(self.unrounded.compute()),
            "nmse": error / pixel_variance,
            "psnr_db": min(HIGHEST_PSNR, -10 * math.log10(error)) if error else HIGHEST_PSNR,
            "psnr_per_image_db": psnr_sum / images,
            "ssim": cast(Tensor, self.ssim.compute()).item(),
        }


@torch.inference_mode()
def measure_reconstruction(
    codes: CodesDataModule, split: SplitName, device: torch.device
) -> dict[str, float]:
    """Measure how well a split is reconstructed and how its codes use the codebook.

    Errors are measured on images in [0, 1] that are rounded to uint8, except for `mse_unrounded`.
    Those of an autoregressive decoder are the errors of one sample per image.

    `perplexity` is that of the histogram of the whole split. `perplexity_batch32`, the mean over
    batches of 32 images, is lower and serves only to compare with older work. `dead_codes` counts
    the codes that never occur in the training split. With several codes per position, perplexities
    and the entropy are means over the codebooks, as in `CodebookUsage`.
    """
    errors = ReconstructionErrors(device)
    usage = CodebookUsage(codes.num_codes, codes.codes_per_position).to(device)
    for levels, _, grid, decoded in pair_images_with_decoded(
        codes, split, device, "reconstructing"
    ):
        errors.update(levels, decoded)
        usage.update(grid)
    used = usage.compute()
    stored = codes.datasets[split].data
    batch_perplexities = [
        _compute_perplexity(
            codes.count_codes(torch.from_numpy(stored[start : start + 32].astype("int64")))
        )
        for start in range(0, len(stored) - 31, 32)
    ]
    return {
        **errors.compute(codes.images.pixel_variance),
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


def _compute_perplexity(counts: Tensor) -> float:
    """Compute the perplexity of `counts` (K,), or the mean of those of counts (Q, K)."""
    each = [entropy_nats(part).exp().item() for part in counts.view(-1, counts.shape[-1])]
    return sum(each) / len(each)


@torch.inference_mode()
def decode_images(vqvae: "VQVAE", codes: Tensor, seed: int = 0) -> Tensor:
    """Decode codes (N, h, w[, Q]), in batches, to images (N, C, H, W) uint8 on the CPU.

    `seed` is that of the samples of an autoregressive decoder.
    """
    noise = make_pixel_generator(seed)
    return torch.cat([to_uint8(vqvae.decode(part, noise)).cpu() for part in codes.split(256)])


def make_pixel_generator(seed: int) -> torch.Generator:
    """Make the generator of the images that an autoregressive decoder draws on this rank."""
    rank, _ = get_rank_and_world()
    return torch.Generator().manual_seed(derive_seed(seed, "pixels", rank))


def pair_images_with_decoded(
    codes: CodesDataModule, split: SplitName, device: torch.device, step: str
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """Iterate as `pair_images_with_codes` does, and decode the codes.

    An autoregressive decoder draws the same images in each call, but others if the number of ranks
    or the size of the batches changes.

    Yields:
        Images, labels and codes, and decoded images (B, C, H, W) float32, approximately in [-1, 1].
    """
    noise = make_pixel_generator(codes.seed)
    for levels, labels, grid in pair_images_with_codes(codes, split, device, step):
        yield levels, labels, grid, codes.vqvae.decode(grid, noise).float()


def pair_images_with_codes(
    codes: CodesDataModule,
    split: SplitName,
    device: torch.device,
    step: str,
    limit: int = sys.maxsize,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Iterate over the images of a split and their codes in batches, and show a progress bar.

    Images that worker processes read come in another order than the rows of the codes. The ranks
    share the split.

    Args:
        codes: Codes and their images.
        split: Split to read.
        device: Device of the batches.
        step: Name of the progress bar.
        limit: Number of rows at the start of the split to use.

    Yields:
        Images (B, C, H, W) uint8, labels (B,) or None, and codes (B, h, w[, Q]) int64.
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
