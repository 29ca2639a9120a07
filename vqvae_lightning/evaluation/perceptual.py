"""Compare images in the features of EfficientNet-Lite0."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import SplitName
from vqvae_lightning.evaluation.reconstruction import pair_images_with_decoded
from vqvae_lightning.pixels import to_uint8

if TYPE_CHECKING:
    from vqvae_lightning.networks.efficientnet import EfficientNetLite0

BATCH = 64  # images per pass of the network
BLOCK = 1024  # rows of a block of distances


@torch.inference_mode()
def measure_perceptually(
    net: "EfficientNetLite0",
    codes: CodesDataModule,
    split: SplitName,
    samples: Tensor | None,
    device: torch.device,
) -> dict[str, float]:
    """Compare reconstructions and samples with the real images of a split.

    Args:
        net: Network in evaluation mode.
        codes: Codes and their images, grey or RGB.
        split: Split whose images are compared with the reconstructions and samples.
        samples: Samples (N, C, H, W) uint8; None to leave out their metrics.
        device: Device to compute on.

    Returns:
        Distance of each reconstruction to its image (`compute_distances`), averaged over images;
        Fréchet distances of reconstructions and samples to the real images; precision and recall
        of the samples.
    """
    net = net.to(device)
    real, decoded = [], []
    total = torch.zeros((), dtype=torch.float64)
    for levels, _, _, images in pair_images_with_decoded(
        codes, split, device, "comparing features"
    ):
        pairs = zip(levels.split(BATCH), to_uint8(images).split(BATCH), strict=True)
        for one, other in pairs:
            (maps, features), (other_maps, other_features) = map(net.compute_features, (one, other))
            total += compute_distances(maps, other_maps).double().sum().cpu()
            real.append(features)
            decoded.append(other_features)
    truth = torch.cat(real)
    metrics = {
        "reconstruction_efficientnet_distance": float(total) / len(truth),
        "reconstruction_efficientnet_frechet": measure_frechet_distance(truth, torch.cat(decoded)),
    }
    if samples is None:
        return metrics
    features = compute_sample_features(net, samples, device, "comparing features")
    found = measure_neighbours(truth, features)
    return {
        **metrics,
        "sample_efficientnet_frechet": measure_frechet_distance(truth, features),
        "sample_efficientnet_precision": found.precision,
        "sample_efficientnet_recall": found.recall,
    }


def compute_sample_features(
    net: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device, step: str
) -> Tensor:
    """Compute the features (N, D) of samples (N, C, H, W) uint8, and show a progress bar.

    Args:
        net: Maps images (B, C, H, W) uint8 to features (B, D).
        samples: Samples, on any device.
        device: Device to compute on.
        step: Name of the progress bar.
    """
    features = []
    with show_progress(step, len(samples)) as advance:
        for part in samples.split(BATCH):
            features.append(net(part.to(device)))
            advance(len(part))
    return torch.cat(features)


def compute_distances(maps: list[Tensor], other_maps: list[Tensor]) -> Tensor:
    """Compute the perceptual distance of each pair of images: arXiv:1801.03924, equation 1, w = 1.

    Args:
        maps: Features (B, C, h, w) of the first images, at several depths.
        other_maps: Features of the second images.

    Returns:
        (B,) squared differences of the unit-normalised features, averaged over positions and
        summed over channels and depths.
    """
    squares = [
        (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean((1, 2))
        for one, other in zip(maps, other_maps, strict=True)
    ]
    return torch.stack(squares).sum(0)


def measure_frechet_distance(real: Tensor, other: Tensor) -> float:
    """Measure the Fréchet distance (arXiv:1706.08500, equation 6) of features (N, D)."""
    keep = nn.Identity()
    keep.num_features = real.shape[1]  # type: ignore[assignment]
    distance = FrechetInceptionDistance(feature=keep).to(real.device)
    distance.update(real, real=True)
    distance.update(other, real=False)
    return float(distance.compute())


class Neighbours(NamedTuple):
    """Precision and recall of samples, in [0, 1]."""

    precision: float
    recall: float


def measure_neighbours(real: Tensor, samples: Tensor, count: int = 3) -> Neighbours:
    """Measure precision and recall (arXiv:1904.06991, equations 1 and 2).

    Precision is the share of samples that are as near to a real image as its `count`-th nearest
    real neighbour is. Recall is the share of real images that are likewise near to a sample.

    Args:
        real: Features (N, D), N > count.
        samples: Features (M, D), M > count.
        count: Neighbours that set the radius of each image, k in the paper.
    """
    radii = [_compute_radii(features, count) for features in (real, samples)]
    return Neighbours(
        _measure_coverage(samples, real, radii[0]), _measure_coverage(real, samples, radii[1])
    )


def _compute_radii(features: Tensor, count: int) -> Tensor:
    """Distance (N,) of each row to its `count`-th nearest other row."""
    parts = [
        _compute_euclidean(part, features).kthvalue(count + 1).values  # the first is itself
        for part in features.split(BLOCK)
    ]
    return torch.cat(parts)


def _measure_coverage(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of `points` within the radius of at least one centre."""
    inside = [(_compute_euclidean(part, centres) <= radii).any(1) for part in points.split(BLOCK)]
    return float(torch.cat(inside).float().mean())


def _compute_euclidean(rows: Tensor, others: Tensor) -> Tensor:
    # By differences: by products, a row would not have the distance 0 to itself.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
