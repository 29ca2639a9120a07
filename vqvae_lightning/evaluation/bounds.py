"""Bound the likelihood of a Gaussian variational autoencoder on a split, in bits/dim."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.images import PixelDataModule, SplitName
from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation.likelihood import LN2, PixelScore, build_pixel_score
from vqvae_lightning.evaluation.reconstruction import ReconstructionErrors, make_pixel_generator
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers import GaussianBottleneck
from vqvae_lightning.quantizers.protocol import Quantizer
from vqvae_lightning.randomness import derive_seed

if TYPE_CHECKING:
    from vqvae_lightning.networks.autoencoder import VQVAE


def require_posterior(quantizer: Quantizer) -> None:
    """Refuse a bottleneck without codes that has no distribution over its latents either.

    Raises:
        InputError: If the bottleneck has neither codes nor a Gaussian posterior.
    """
    if quantizer.num_codes == 0 and not isinstance(quantizer, GaussianBottleneck):
        raise InputError(
            f"{type(quantizer).__name__} assigns no probability to its latents, so an image has no "
            "likelihood: a plain autoencoder has no bits/dim. Its errors are in the result.json of "
            "its training; for a likelihood, train with quantizer=gaussian, ema or loss."
        )


@torch.inference_mode()
def measure_bounds(
    vqvae: "VQVAE",
    images: PixelDataModule,
    split: SplitName,
    samples: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Measure reconstruction errors and two upper bounds on -log2 p(x) per dimension.

    `elbo_bits_per_dim` is the negative evidence lower bound: the reconstruction term
    -E log2 p(x | z) under q(z | x), estimated with `samples` draws, plus the KL divergence of
    q(z | x) from N(0, I), which is exact (Kingma and Welling 2019, arXiv:1906.02691, section 2.2).
    `importance_bits_per_dim` is -log2 of the mean of p(x, z) / q(z | x) over the same draws. It is
    never above the estimate of the first bound in expectation, and approaches -log2 p(x) as
    `samples` grows (Burda et al. 2015, arXiv:1509.00519, equation 8).

    p(x | z) is the likelihood that the decoder was trained with, or, after training with a squared
    error, a discretised logistic whose scale per channel is fitted on validation images. Errors are
    those of decoded posterior means; an autoregressive decoder draws one sample for each.

    Args:
        vqvae: Variational autoencoder in evaluation mode.
        images: Data, set up.
        split: Split to measure.
        samples: Draws per image.
        seed: Seed for the draws. Each image has its own stream, so that the result depends neither
            on the batch size nor on the number of ranks.
        device: Device to compute on.
    """
    bottleneck = cast(GaussianBottleneck, vqvae.quantizer)
    vqvae.to(device)
    dims = math.prod(images.image_shape)
    total = len(images.datasets[split])

    def decode_draws(limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over validation images and decoder outputs for one draw of each."""
        for rows, levels in _iterate(images, "val", device, "fitting the scale"):
            here = rows < limit
            if here.any():
                mean, log_variance = bottleneck.split_posterior(vqvae.encoder(from_uint8(levels)))
                noise = _draw_noise(mean, 1, seed, rows)[:, 0]
                drawn = mean + (log_variance / 2).exp() * noise
                yield levels[here], vqvae.compute_output(drawn[here], levels[here])

    score_pixels = build_pixel_score(vqvae.likelihood, images.image_shape, decode_draws, device)
    errors = ReconstructionErrors(device)
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("pixels", "kl", "importance")}
    pixel_noise = make_pixel_generator(seed)
    for rows, levels in _iterate(images, split, device, "bounding"):
        mean, log_variance = bottleneck.split_posterior(vqvae.encoder(from_uint8(levels)))
        errors.update(levels, vqvae.decode_vectors(mean, pixel_noise).float())
        kl = bottleneck.compute_kl(mean, log_variance).flatten(1).double().sum(1)
        noise = _draw_noise(mean, samples, seed, rows)
        pixels, ratio = _score_draws(vqvae, score_pixels, levels, mean, log_variance, noise)
        sums["pixels"] -= pixels.mean(1).sum().cpu()
        sums["kl"] += kl.sum().cpu()
        weights = torch.logsumexp(pixels + ratio, 1) - math.log(samples)
        sums["importance"] -= weights.sum().cpu()
    bits = {name: float(all_reduce(value)) / (LN2 * total * dims) for name, value in sums.items()}
    return {
        **errors.compute(images.pixel_variance),
        "reconstruction_bits_per_dim": bits["pixels"],
        "kl_bits_per_dim": bits["kl"],
        "elbo_bits_per_dim": bits["pixels"] + bits["kl"],
        "importance_bits_per_dim": bits["importance"],
    }


def _score_draws(
    vqvae: "VQVAE",
    score_pixels: PixelScore,
    levels: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute log p(x | z) and log p(z) - log q(z | x), each (B, S) float64, for noise (B, S, ...).

    The normalising constants of the two Gaussians cancel.
    """
    pixels, ratios = [], []
    for eps in noise.unbind(1):
        z = mean + (log_variance / 2).exp() * eps
        ratio = (eps.square() + log_variance - z.square()) / 2
        ratios.append(ratio.flatten(1).double().sum(1))
        output = vqvae.compute_output(z, levels)
        pixels.append(score_pixels(output, levels).flatten(1).double().sum(1))
    return torch.stack(pixels, 1), torch.stack(ratios, 1)


def _draw_noise(mean: Tensor, samples: int, seed: int, rows: Tensor) -> Tensor:
    """Draw standard normal noise (B, S, D, H, W); each row of the split has its own stream."""
    drawn = torch.empty(len(mean), samples, *mean.shape[1:])
    for place, row in zip(drawn, rows.tolist(), strict=True):
        place.normal_(generator=torch.Generator().manual_seed(derive_seed(seed, "bound", row)))
    return drawn.to(mean.device)


def _iterate(
    images: PixelDataModule, split: SplitName, device: torch.device, step: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over this rank's rows (B,) and images (B, C, H, W) uint8, and show a progress bar."""
    loader = images.batches(split)
    with show_progress(step, len(images.datasets[split])) as advance:
        for rows, batch in zip(loader.rows(), loader, strict=True):
            yield torch.as_tensor(rows), batch.data.to(device)
            advance(len(batch.data) * get_rank_and_world()[1])


@torch.inference_mode()
def reconstruct_preview(
    vqvae: "VQVAE",
    images: PixelDataModule,
    split: SplitName,
    count: int,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the first images of a split and their reconstructions, (N, C, H, W) uint8 each.

    `seed` is that of the samples of an autoregressive decoder.
    """
    shown = images.datasets[split].preview(count).data
    vectors = vqvae.to(device).quantize(from_uint8(shown.to(device))).vectors
    return shown, to_uint8(vqvae.decode_vectors(vectors, make_pixel_generator(seed))).cpu()
