"""Compare images in the features of Inception v3."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import SplitName
from vqvae_lightning.evaluation.perceptual import (
    BATCH,
    compute_sample_features,
    measure_frechet_distance,
    measure_neighbours,
)
from vqvae_lightning.evaluation.reconstruction import pair_images_with_decoded
from vqvae_lightning.pixels import to_uint8

SUBSET = 1000  # images per subset of the kernel distance, or all if there are fewer
SUBSETS = 100


@torch.inference_mode()
def measure_with_inception(
    net: nn.Module,
    codes: CodesDataModule,
    split: SplitName,
    samples: Tensor | None,
    device: torch.device,
) -> dict[str, float]:
    """Compare reconstructions and samples with the real images of a split.

    Args:
        net: Network that maps RGB images (B, 3, H, W) uint8 to features (B, D).
        codes: Codes and their images, grey or RGB. Grey images are repeated to three channels.
        split: Split whose images are compared with the reconstructions and samples.
        samples: Samples (N, C, H, W) uint8; None to leave out their metrics.
        device: Device to compute on.

    Returns:
        Fréchet distance (FID, arXiv:1706.08500, equation 6) and kernel distance (KID,
        `measure_kernel_distance`) of reconstructions and samples to the real images; precision and
        recall of the samples (`measure_neighbours`).
    """
    net = net.to(device)
    real: list[Tensor] = []
    decoded: list[Tensor] = []
    for levels, _, _, images in pair_images_with_decoded(
        codes, split, device, "comparing with Inception"
    ):
        for parts, batch in ((real, levels), (decoded, to_uint8(images))):
            parts += [_compute_features(net, part) for part in batch.split(BATCH)]
    truth, others = torch.cat(real), torch.cat(decoded)
    metrics = {
        "reconstruction_inception_fid": measure_frechet_distance(truth, others),
        "reconstruction_inception_kid": measure_kernel_distance(truth, others),
    }
    if samples is None:
        return metrics
    features = compute_sample_features(
        partial(_compute_features, net), samples, device, "comparing with Inception"
    )
    found = measure_neighbours(truth, features)
    return {
        **metrics,
        "sample_inception_fid": measure_frechet_distance(truth, features),
        "sample_inception_kid": measure_kernel_distance(truth, features),
        "sample_inception_precision": found.precision,
        "sample_inception_recall": found.recall,
    }


def _compute_features(net: nn.Module, levels: Tensor) -> Tensor:
    features: Tensor = net(levels.expand(-1, 3, -1, -1))
    return features


def measure_kernel_distance(real: Tensor, other: Tensor) -> float:
    """Measure the kernel Inception distance (arXiv:1801.01401, section 4).

    It is the unbiased estimate of the squared maximum mean discrepancy (equation 4 there) with the
    kernel (x y / D + 1)^3, averaged over `SUBSETS` random subsets of `SUBSET` images each, or of as
    many as the smaller set has. It can be negative. The subsets are the same in each run.

    Args:
        real: Features (N, D).
        other: Features (M, D).
    """
    size = min(len(real), len(other), SUBSET)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*save all extracted features")  # they are in memory
        distance = KernelInceptionDistance(nn.Identity(), subsets=SUBSETS, subset_size=size)
    # In double precision, because the estimate is a small difference of large sums.
    distance.update(real.double(), real=True)
    distance.update(other.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = distance.compute()
    return float(mean)
