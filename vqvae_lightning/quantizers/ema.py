"""The codebook that follows the encoder by exponential moving averages (EMA)."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.distributed import all_reduce
from vqvae_lightning.errors import check_range
from vqvae_lightning.quantizers.codebook import VectorQuantizer


class EMAQuantizer(VectorQuantizer):
    """Vector quantizer whose codebook follows the encoder by moving averages.

    Each of the B*H*W vectors of `z` is replaced by its nearest codebook row (Euclidean). After each
    optimizer step, `update` moves the rows towards the mean of the vectors assigned to them on all
    ranks and in all accumulated batches. The rows receive no gradient. Source: van den Oord et al.
    2017 (arXiv:1711.00937), appendix A.1.

    The averages start from the codebook with one hit per code, so that a code without hits stays
    where it is. Counts that start at zero, with sums that start at the rows, throw unused rows far
    away and collapse the codebook.

    Args:
        num_codes: Rows of the codebook, or of each codebook (K in the paper).
        code_dim: Channels of `z` (D).
        epsilon: Number of vectors added to each count, in the division only (Laplace smoothing).
        **options: Arguments of `VectorQuantizer`.

    Raises:
        InputError: If a value is outside its range.
    """

    sums: Tensor

    def __init__(
        self, num_codes: int, code_dim: int, epsilon: float = 1e-5, **options: Any
    ) -> None:
        super().__init__(num_codes, code_dim, **options)
        self.epsilon = check_range("epsilon", epsilon, 0)
        rows = self.draw_first_rows()
        self.register_buffer("codebook", rows)
        self.register_buffer("sums", rows.clone())
        self.new_sums = torch.zeros_like(rows)

    def compute_losses(self, parts: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Compute the commitment |z - sg[e]|^2 as the mean over all elements."""
        return {"commitment": F.mse_loss(parts, chosen.detach())}

    def observe(self, parts: Tensor, places: Tensor) -> None:
        """Add one batch to the hits and to the sums of vectors per code."""
        super().observe(parts, places)
        self.new_sums.view(-1, parts.shape[1]).index_add_(0, places, parts)

    def learn(self) -> None:
        """Apply equations 6 to 8 of appendix A.1 to the statistics of all ranks."""
        hits = self.average()
        total = self.counts.sum(-1, keepdim=True)
        share = (self.counts + self.epsilon) / (total + self.num_codes * self.epsilon)
        rows = self.scale(self.sums / (share * total)[..., None])
        # Only rows with hits: smoothing would shrink the others as their counts decay.
        self.codebook.copy_(torch.where(hits[..., None] > 0, rows, self.codebook))

    def average(self) -> Tensor:
        """Move counts and sums by the statistics of all ranks (equations 6 and 7).

        Returns:
            The hits ([Q,] K) of each code since the last call, on all ranks.
        """
        fresh = all_reduce(torch.cat([self.new_counts[..., None], self.new_sums], dim=-1))
        self.counts.lerp_(fresh[..., 0], 1 - self.decay)
        self.sums.lerp_(fresh[..., 1:], 1 - self.decay)
        self.new_counts.zero_()
        self.new_sums.zero_()
        return fresh[..., 0]

    def set_rows(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Replace rows, and set counts and sums to match so that the next update keeps them."""
        rows = self.scale(rows)
        self.codebook.copy_(torch.where(where[..., None], rows, self.codebook))
        self.counts.copy_(torch.where(where, count, self.counts))
        self.sums.copy_(torch.where(where[..., None], rows * count[..., None], self.sums))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.new_sums = fn(self.new_sums)
        return self
