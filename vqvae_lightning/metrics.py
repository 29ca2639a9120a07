"""Measures that hold over a whole epoch and over all ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


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

    `compute` returns, each ():
        perplexity: exp(entropy), the effective number of codes in use, 1 to K.
        entropy_bits: Entropy of the histogram; log2 K when all codes are used equally.
        use: Share of the codes with at least one hit, 0 to 1.
        dead_codes: Codes without a hit.

    The mean of batch perplexities is something else and too low: 8 images of 8x8 codes read 289
    where equal use of 512 codes gives 512.

    Args:
        num_codes: K.
        **options: Of `torchmetrics.Metric`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_codes = num_codes
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add codes of any shape."""
        self.counts += codes.flatten().bincount(minlength=self.num_codes)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        nats = entropy_nats(self.counts)
        used = (self.counts > 0).sum()
        return {
            "perplexity": nats.exp().float() * (used > 0),
            "entropy_bits": (nats / torch.log(torch.tensor(2.0))).float(),
            "use": used / self.num_codes,
            "dead_codes": (self.num_codes - used).float(),
        }
