"""Measures that hold over a whole epoch and over all ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

ACTIVE_VARIANCE = 0.01  # of the posterior means over the data (Burda et al., arXiv:1509.00519)


def entropy_nats(counts: Tensor) -> Tensor:
    """Entropy in nats of the histogram `counts` (K,); 0 for an empty one."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy: Tensor = -torch.special.xlogy(share, share).sum()
    return entropy


def unigram_log_probabilities(counts: Tensor) -> Tensor:
    """Natural log p of each code (K,) under the histogram `counts` (K,) with one added to each."""
    smoothed = counts.float() + 1
    return torch.log(smoothed / smoothed.sum())


class CodebookUsage(Metric):
    """How the codebook is used, by the histogram of all codes of all batches and ranks.

    `compute` returns, each () but the last:
        perplexity: exp(entropy), the effective number of codes in use, 1 to K.
        entropy_bits: Entropy of the histogram; log2 K when all codes are used equally.
        use: Share of the codes with at least one hit, 0 to 1.
        dead_codes: Codes without a hit.
        counts: (K,) hits of each code.

    The mean of batch perplexities is something else and too low: 8 images of 8x8 codes read 289
    where equal use of 512 codes gives 512.

    Args:
        num_codes: K.
        **options: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_codes = num_codes
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add codes of any shape."""
        # Not `bincount`, which waits for a GPU to learn the largest code.
        flat = codes.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))

    def compute(self) -> dict[str, Tensor]:
        """Compute the code usage over all batches and ranks."""
        nats = entropy_nats(self.counts)
        used = (self.counts > 0).sum()
        return {
            "perplexity": nats.exp().float() * (used > 0),
            "entropy_bits": (nats / torch.log(torch.tensor(2.0))).float(),
            "use": used / self.num_codes,
            "dead_codes": (self.num_codes - used).float(),
            "counts": self.counts,
        }


class LatentUsage(Metric):
    """How the latents of a variational autoencoder are used: posterior collapse made visible.

    `compute` returns:
        kl_nats: (D,) KL divergence from the standard normal per latent value, mean over the data.
        active: (D,) bool: whether the channel's posterior mean varies over the data, by more than
            0.01 in the mean over its positions (Burda et al. 2015, arXiv:1509.00519, section 5.2):
            one that does not has collapsed onto the prior and tells the decoder nothing.

    Exact over batches, partial batches and ranks.

    Args:
        channels: D.
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
        """Compute the KL divergences and the active channels over all batches and ranks."""
        images = self.images.clamp(min=1)
        variance = self.squares / images - (self.means / images).square()
        return {
            "kl_nats": (self.kl / images).mean((1, 2)).float(),
            "active": variance.mean((1, 2)) > ACTIVE_VARIANCE,
        }
