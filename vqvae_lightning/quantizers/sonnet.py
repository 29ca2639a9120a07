"""The EMA codebook of DeepMind's sonnet example, to repeat its published curves."""

import math

import torch
from torch import Tensor

from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.quantizers.ema import EMAQuantizer


class SonnetEMAQuantizer(EMAQuantizer):
    """EMA codebook as sonnet's `VectorQuantizerEMA` keeps it (sonnet 2, `nets/vqvae.py`).

    It differs from `EMAQuantizer` in three ways. The first rows are uniform noise of variance 1 / D
    that the data do not choose, without a warm-up. The averages of hits and vectors start at zero
    and are divided by 1 - decay^t after t steps. Every row follows its averages, also one that was
    never chosen: it becomes the zero vector, until encoder vectors come near. Dead codes are not
    revived. Use it for comparison; `EMAQuantizer` keeps more codes in use.

    Args:
        num_codes: Rows of the codebook (K).
        code_dim: Channels of `z` (D).
        commitment: Weight of the commitment term.
        decay: Share of the old average kept per optimizer step, in [0, 1).
        epsilon: Number of vectors added to each count, in the division only, above 0 (Laplace
            smoothing).

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment: float = 0.25,
        decay: float = 0.99,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(
            num_codes,
            code_dim,
            epsilon,
            commitment=commitment,
            decay=decay,
            init="uniform",
            warmup_steps=0,
            revive_below=0,
        )
        if epsilon == 0:
            raise InputError(
                Key("epsilon"), "=0 must be above 0: a code without hits would be 0 / 0."
            )
        self.counts.zero_()
        self.sums.zero_()

    def draw_first_rows(self) -> Tensor:
        """Draw rows (K, D) of variance 1 / D, as sonnet's `VarianceScaling` does."""
        limit = math.sqrt(3 / self.code_dim)
        return torch.empty(self.num_codes, self.code_dim).uniform_(-limit, limit)

    def learn(self) -> None:
        """Apply equations 6 to 8 of appendix A.1 to averages that are corrected for their start."""
        self.average()
        weight = 1 - self.decay**self.steps
        counts = self.counts / weight
        total = counts.sum()
        smooth = (counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        self.codebook.copy_(self.sums / weight / smooth[:, None])
