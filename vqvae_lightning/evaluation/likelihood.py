"""Measure likelihoods on a split, in nats per code and bits/dim."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import SplitName
from vqvae_lightning.distributed import all_reduce, gather
from vqvae_lightning.evaluation.reconstruction import pair_images_with_codes
from vqvae_lightning.likelihoods import Likelihood, PixelDistribution
from vqvae_lightning.likelihoods.logistic import discretised_logistic, fit_log_scale
from vqvae_lightning.likelihoods.protocol import to_levels
from vqvae_lightning.metrics import look_up_codes, unigram_log_probabilities
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import score

SCALE_VALUES = 2**23  # number of pixel values that the decoder's scale is fitted to
LN2 = math.log(2)
PixelScore = Callable[[Tensor, Tensor], Tensor]


@torch.inference_mode()
def measure_likelihood(
    codes: CodesDataModule, prior: PixelCNN | None, split: SplitName, device: torch.device
) -> dict[str, float]:
    """Measure the terms of an upper bound on bits per dimension, -log2 p(x | z) - log2 p(z).

    p(x | z) is the likelihood that the decoder was trained with. After training with a squared
    error, it is a discretised logistic distribution around the reconstruction, whose scale per
    channel is fitted on validation images. The bound holds because the encoder is deterministic.
    p(z) is uniform, the histogram of the training codes, or the prior. A conditional prior is given
    the label, so the total is then a bound on -log2 p(x | y).

    Args:
        codes: Codes and their images.
        prior: Prior in evaluation mode; None to leave out its metrics.
        split: Split to measure.
        device: Device to compute on.
    """
    dims = math.prod(codes.images.image_shape)
    per_image = math.prod(codes.code_shape)
    unigram = unigram_log_probabilities(codes.histogram()).to(device)
    by_position = _compute_position_log_probabilities(codes).to(device)

    def decode_validation(limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        step = "fitting the scale"
        for levels, _, grid in pair_images_with_codes(codes, "val", device, step, limit):
            yield levels, codes.vqvae.decode_output(grid, levels)

    score_pixels = build_pixel_score(
        codes.vqvae.likelihood, codes.images.image_shape, decode_validation, device
    )
    sums = {
        name: torch.zeros((), dtype=torch.float64)
        for name in ("pixels", "unigram", "position", "prior")
    }
    total = len(codes.datasets[split])
    for levels, labels, grid in pair_images_with_codes(codes, split, device, "scoring"):
        output = codes.vqvae.decode_output(grid, levels)
        sums["pixels"] -= score_pixels(output, levels).double().sum().cpu()
        sums["unigram"] -= look_up_codes(unigram, grid).double().sum().cpu()
        chosen = by_position.expand(len(grid), *by_position.shape[1:]).gather(1, grid[:, None])
        sums["position"] -= chosen.double().sum().cpu()
        if prior is not None:
            own = labels if prior.num_classes else None
            sums["prior"] -= score(prior, grid, own).double().sum().cpu()
    summed = {name: float(all_reduce(value)) for name, value in sums.items()}
    per_code = {name: value / (total * per_image) for name, value in summed.items()}
    pixels = summed["pixels"] / (LN2 * total * dims)
    rate = per_image / (LN2 * dims)
    metrics = {
        "unigram_nats_per_code": per_code["unigram"],
        "position_nats_per_code": per_code["position"],
        "reconstruction_bits_per_dim": pixels,
        "uniform_bits_per_dim": rate * math.log(codes.num_codes),
        "histogram_bits_per_dim": rate * per_code["unigram"],
    }
    if prior is not None:
        nats = per_code["prior"]
        metrics = {"nats_per_code": nats, "bits_per_code": nats / LN2, **metrics}
        metrics["prior_bits_per_dim"] = rate * nats
        metrics["total_bits_per_dim"] = pixels + rate * nats
    return metrics


def build_pixel_score(
    likelihood: Likelihood,
    image_shape: tuple[int, int, int],
    decode_validation: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    device: torch.device,
) -> PixelScore:
    """Build the function that maps decoder outputs and levels to log p(x | z), in nats.

    Args:
        likelihood: Likelihood that the decoder was trained with. Without a distribution, a
            discretised logistic is fitted, with one scale per channel.
        image_shape: Shape (C, H, W) of the images.
        decode_validation: Function that maps a number of validation images to this rank's part of
            them, in batches of levels (B, C, H, W) and decoder outputs (B, outputs, H, W). The part
            may be empty.
        device: Device to compute on.
    """
    if isinstance(likelihood, PixelDistribution):
        return likelihood.log_prob
    means, levels = [], []
    for images, output in decode_validation(-(-SCALE_VALUES // math.prod(image_shape))):
        means.append(to_levels(likelihood.mean(output)).cpu())
        levels.append(images.cpu())
    # Each rank fits to the images of all ranks, so that all find the same scale.
    parts = [part for rank in gather((levels, means)) for part in zip(*rank, strict=True)]
    every = [torch.cat(column).to(device) for column in zip(*parts, strict=True)]
    log_scale = fit_log_scale(*every)

    def score_pixels(output: Tensor, levels: Tensor) -> Tensor:
        return discretised_logistic(levels, to_levels(likelihood.mean(output)), log_scale)

    return score_pixels


def _compute_position_log_probabilities(codes: CodesDataModule) -> Tensor:
    """Compute log p (1, K, h, w), or (1, K, h, w, Q), of each code at each position.

    p is the histogram of the training codes, with one added to each count.
    """
    counts = torch.zeros(math.prod(codes.code_shape), codes.num_codes)
    for batch in codes.batches("train"):
        flat = batch.data.long().flatten(1).t()
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    counts = all_reduce(counts) + 1
    shares = torch.log(counts / counts.sum(1, keepdim=True))
    return shares.t().reshape(1, codes.num_codes, *codes.code_shape)
