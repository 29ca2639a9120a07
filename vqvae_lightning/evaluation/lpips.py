"""Compare images with LPIPS."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import SplitName
from vqvae_lightning.evaluation.perceptual import BATCH
from vqvae_lightning.evaluation.reconstruction import pair_images_with_decoded
from vqvae_lightning.pixels import to_uint8

SIDE = 64  # least height and width; LPIPS was fitted to patches of this size


@torch.inference_mode()
def measure_lpips(
    net: nn.Module, codes: CodesDataModule, split: SplitName, device: torch.device
) -> dict[str, float]:
    """Measure LPIPS (arXiv:1801.03924, equation 1) between images and reconstructions.

    Args:
        net: Network that maps two batches (B, 3, H, W) in [0, 1] to distances, given `normalize`.
        codes: Codes and their images, grey or RGB. Grey images are repeated to three channels.
        split: Split to measure.
        device: Device to compute on.

    Returns:
        Mean of the distances over the images, in which reconstructions are rounded to uint8.
    """
    net = net.to(device)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for levels, _, _, images in pair_images_with_decoded(codes, split, device, "measuring LPIPS"):
        for one, other in zip(levels.split(BATCH), to_uint8(images).split(BATCH), strict=True):
            distances = net(_prepare(one), _prepare(other), normalize=True)
            total += distances.double().sum().cpu()
            count += len(one)
    return {"lpips_alex": float(total) / count}


def _prepare(levels: Tensor) -> Tensor:
    """Convert images (B, 1 or 3, H, W) uint8 to RGB in [0, 1].

    Images with a side below `SIDE` are enlarged, because AlexNet divides height and width by 16.
    """
    images = levels.expand(-1, 3, -1, -1).float() / 255
    height, width = images.shape[2:]
    scale = SIDE / min(height, width)
    if scale <= 1:
        return images
    size = (round(height * scale), round(width * scale))
    return F.interpolate(images, size, mode="bilinear").clamp(0, 1)
