"""The codebook that learns by gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.distributed import all_reduce
from vqvae_lightning.errors import check_range
from vqvae_lightning.quantizers.codebook import VectorQuantizer


class LossQuantizer(VectorQuantizer):
    """Vector quantizer whose codebook is a parameter that the optimizer moves.

    The codebook term pulls each chosen row towards its encoder vectors and has no gradient for the
    encoder. The commitment term pulls the vectors towards their row and has no gradient for the
    codebook. Source: van den Oord et al. 2017 (arXiv:1711.00937), equation 3. Average hits per code
    serve only to find dead codes.

    Args:
        num_codes: Rows of the codebook, or of each codebook (K in the paper).
        code_dim: Channels of `z` (D).
        codebook: Weight of the codebook term; 1 in the paper.
        **options: Arguments of `VectorQuantizer`.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(
        self, num_codes: int, code_dim: int, codebook: float = 1.0, **options: Any
    ) -> None:
        super().__init__(num_codes, code_dim, **options)
        self.weights["codebook"] = check_range("codebook", codebook, 0)
        self.codebook = nn.Parameter(self.draw_first_rows())

    def compute_losses(self, parts: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        """Compute |sg[z] - e|^2 and |z - sg[e]|^2, each as the mean over all elements."""
        return {
            "codebook": F.mse_loss(chosen, parts.detach()),
            "commitment": F.mse_loss(parts, chosen.detach()),
        }

    def table(self) -> Tensor:
        """Return the rows ([Q,] K, D'), rescaled because the optimizer changes their length."""
        return self.scale(self.codebook)

    def learn(self) -> None:
        """Average the hits per code. The optimizer has already moved the rows."""
        self.counts.lerp_(all_reduce(self.new_counts), 1 - self.decay)
        self.new_counts.zero_()

    def set_rows(self, rows: Tensor, where: Tensor, count: Tensor) -> None:
        """Replace rows and set their counts."""
        self.codebook.copy_(torch.where(where[..., None], rows, self.codebook))
        self.counts.copy_(torch.where(where, count, self.counts))
