"""Metrics over a whole epoch and all ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vqvae_lightning.distributed import gather

ACTIVE_VARIANCE = 0.01  # of the posterior means over the data (Burda et al., arXiv:1509.00519)


def entropy_nats(counts: Tensor) -> Tensor:
    """Compute the entropy in nats of the histogram `counts` (K,), 0 if it is empty."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy: Tensor = -torch.special.xlogy(share, share).sum()
    return entropy


def unigram_log_probabilities(counts: Tensor) -> Tensor:
    """Compute log p in nats of each code from `counts`, with one added to each count.

    Both are (K,), or (Q, K) for the histograms of Q codebooks.
    """
    smoothed = counts.float() + 1
    return torch.log(smoothed / smoothed.sum(-1, keepdim=True))


def look_up_codes(values: Tensor, codes: Tensor) -> Tensor:
    """Look up the value of each code in a table per codebook.

    Args:
        values: Values (K,), or (Q, K) for several codes per position.
        codes: Codes (B, H, W), or (B, H, W, Q).

    Returns:
        Values of the same shape as `codes`.
    """
    if values.ndim == 1:
        return values[codes]
    return values[torch.arange(len(values), device=codes.device), codes]


class EpochMeans:
    """Means over all images of an epoch, of values that are means over the images of a batch.

    Lightning's own mean over ranks is wrong if they have unequal numbers of images: it truncates
    the mean number to an integer.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def add(self, means: dict[str, Tensor], images: int) -> None:
        """Add the means () of a batch of `images` images, by name."""
        for name, mean in means.items():
            # Summed on the device, because reading a number would wait for the GPU.
            weighted = mean.detach().double() * images
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._images += images

    def compute(self) -> dict[str, float]:
        """Compute the means over all ranks, which wait for each other here, and start anew."""
        parts = gather((self._images, {name: float(value) for name, value in self._sums.items()}))
        self._sums, self._images = {}, 0
        images = sum(number for number, _ in parts)
        names = dict.fromkeys(name for _, sums in parts for name in sums)
        return {name: sum(sums.get(name, 0.0) for _, sums in parts) / images for name in names}


class CodebookUsage(Metric):
    """Codebook usage, from the histogram of the codes of all batches and ranks.

    `compute` returns scalars and one histogram:
        perplexity: exp(entropy), the effective number of codes in use, 1 to K.
        entropy_bits: Entropy of the histogram, log2 K if all codes are used equally.
        use: Share of the codes that are used at least once, 0 to 1.
        dead_codes: Number of codes that are never used.
        counts: Number of uses of each code (K,).

    With Q codes per position, each codebook has its own histogram. `perplexity` and `entropy_bits`
    are then means over the codebooks, so that they remain comparable with K and log2 K. `use`,
    `dead_codes` and `counts` (Q K,), codebook by codebook, are those of all rows together.

    The mean of the perplexities of the batches is too low. For batches of 8 images of 8x8 codes, it
    is 289 when 512 codes are used equally.

    Args:
        num_codes: Number of codes (K), of each codebook.
        codes_per_position: Number of codebooks (Q).
        **options: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int, codes_per_position: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.num_codes = num_codes
        self.codes_per_position = codes_per_position
        counts = torch.zeros(codes_per_position * num_codes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add codes of any shape; with Q > 1, the last dimension is Q."""
        if self.codes_per_position > 1:
            books = torch.arange(self.codes_per_position, device=codes.device)
            codes = codes + books * self.num_codes
        # `bincount` would wait for the GPU to find the largest code.
        flat = codes.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics listed in the class's docstring."""
        nats = torch.stack([entropy_nats(part) for part in self.counts.split(self.num_codes)])
        used = (self.counts > 0).sum()
        return {
            "perplexity": nats.exp().mean().float() * (used > 0),
            "entropy_bits": (nats.mean() / torch.log(torch.tensor(2.0))).float(),
            "use": used / len(self.counts),
            "dead_codes": (len(self.counts) - used).float(),
            "counts": self.counts,
        }


class LatentUsage(Metric):
    """Usage of the latents of a variational autoencoder, which reveals posterior collapse.

    `compute` returns:
        kl_nats: KL divergence (D,) from the standard normal per latent value, mean over the data.
        active: Whether each channel is active (D,), bool. A channel is active if the variance of
            its posterior mean over the data, averaged over positions, exceeds 0.01 (Burda et al.
            2015, arXiv:1509.00519, section 5.2). An inactive channel has collapsed to the prior and
            carries no information.

    The result does not depend on how the data are divided into batches and ranks.

    Args:
        channels: Number of channels (D).
        height: Rows of latents.
        width: Columns of latents.
        **options: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    images: Tensor
    kl: Tensor
    means: Tensor
    squares: Tensor

    def __init__(self, channels: int, height: int, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("kl", "means", "squares"):
            zeros = torch.zeros(channels, height, width, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, mean: Tensor, kl: Tensor) -> None:
        """Add the posterior means and divergences (B, D, H, W) of a batch."""
        self.images += len(mean)
        self.kl += kl.double().sum(0)
        self.means += mean.double().sum(0)
        self.squares += mean.double().square().sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics listed in the class's docstring."""
        images = self.images.clamp(min=1)
        variance = self.squares / images - (self.means / images).square()
        return {
            "kl_nats": (self.kl / images).mean((1, 2)).float(),
            "active": variance.mean((1, 2)) > ACTIVE_VARIANCE,
        }
