"""How several codes describe one position: one code per group of channels, or one per stage.

A position has Q codes, each from a codebook of K rows with D' channels. Both arrangements describe
one vector of D channels by Q vectors of D', the parts, and look each part up in its own codebook.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.quantizers.lookup import find_nearest_codes

Choose = Callable[[Tensor, slice], Tensor]
"""Chooses K rows (..., K, D') from vectors (..., N, D'). The slice selects vectors that are given
to no other codebook, for a choice that takes vectors as they are."""


class Arrangement(Protocol):
    """What the codebooks need to know about the codes of one position."""

    stages: int
    """Look-ups that follow each other."""
    row_dim: int
    """Channels of a codebook row (D')."""
    rows_have_unit_length: bool
    """Whether `normalize` applies to the rows and not only to the vectors."""

    def normalize(self, vectors: Tensor) -> Tensor:
        """Scale vectors (..., D) to unit length."""

    def split(self, vectors: Tensor, table: Tensor) -> Tensor:
        """Return the parts (..., Q, D') of vectors (..., D), for the rows `table` (Q, K, D')."""

    def assign(self, vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts (..., Q, D') of vectors (..., D) and the codes (..., Q) of the parts."""

    def join(self, chosen: Tensor) -> Tensor:
        """Return the vectors (..., D) that the rows (..., Q, D') describe."""

    def estimate(self, estimator: Any, vectors: Tensor, parts: Tensor, chosen: Tensor) -> Tensor:
        """Apply an estimator of `gradients` to vectors (..., D), their parts and their rows."""

    def choose_rows(self, vectors: Tensor, choose: Choose) -> Tensor:
        """Choose the first rows (Q, K, D') from vectors (N, D)."""


class ProductCodes:
    """Each codebook quantizes its own group of channels (product quantization).

    The D channels are divided into Q equal groups in their order, so that D' = D / Q. Source: Jegou
    et al. 2011, Product quantization for nearest neighbor search, section II.B. With Q = 1, this is
    the quantizer of van den Oord et al. 2017 (arXiv:1711.00937).

    Args:
        codes_per_position: Number of codebooks (Q).
        code_dim: Channels of the vectors (D).

    Raises:
        InputError: If Q does not divide D.
    """

    stages = 1
    rows_have_unit_length = True

    def __init__(self, codes_per_position: int, code_dim: int) -> None:
        if code_dim % codes_per_position:
            divisors = [str(n) for n in range(1, code_dim + 1) if code_dim % n == 0]
            raise InputError(
                Key("codes_per_position"),
                f"={codes_per_position} must divide ",
                Key("code_dim"),
                f"={code_dim} with arrangement=product: choose one of {', '.join(divisors)}.",
            )
        self.row_dim = code_dim // codes_per_position

    def normalize(self, vectors: Tensor) -> Tensor:
        """Scale each group of channels of the vectors (..., D) to unit length."""
        return self.join(F.normalize(self._group(vectors), dim=-1))

    def split(self, vectors: Tensor, table: Tensor) -> Tensor:
        """Return the groups (..., Q, D') of vectors (..., D); they do not depend on `table`."""
        return self._group(vectors)

    def assign(self, vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the groups (..., Q, D') of vectors (..., D) and their codes (..., Q)."""
        parts = self._group(vectors)
        flat = parts.detach().reshape(-1, *parts.shape[-2:])
        codes = find_nearest_codes(flat.transpose(0, 1), table)
        return parts, codes.t().contiguous().view(parts.shape[:-1])

    def join(self, chosen: Tensor) -> Tensor:
        """Concatenate the rows (..., Q, D') of each position to (..., D)."""
        return chosen.flatten(-2)

    def estimate(self, estimator: Any, vectors: Tensor, parts: Tensor, chosen: Tensor) -> Tensor:
        """Apply the estimator to each group by itself and return (..., D)."""
        estimated: Tensor = estimator.apply(parts, chosen)
        return self.join(estimated)

    def choose_rows(self, vectors: Tensor, choose: Choose) -> Tensor:
        """Choose the rows (Q, K, D') of all codebooks at once, from groups of `vectors` (N, D)."""
        return choose(self._group(vectors).transpose(0, 1).contiguous(), slice(None))

    def _group(self, vectors: Tensor) -> Tensor:
        parts: Tensor = vectors.unflatten(-1, (-1, self.row_dim))
        return parts


class ResidualCodes:
    """Each codebook quantizes what the earlier ones have left (residual quantization).

    The first part is the vector itself. Each later one is the part before it minus its row, so that
    the sum of all rows approximates the vector and D' = D. Source: Zeghidour et al. 2021
    (arXiv:2107.03312), algorithm 1; Lee et al. 2022 (arXiv:2203.01941), equations 2 and 3.

    The gradient estimator replaces the vector by the sum of all rows. The rows that are subtracted
    count as constants, so that the commitment term of a stage pulls the vector towards the sum of
    the rows up to that stage (arXiv:2203.01941, equation 6), and the codebook term of a stage moves
    its own rows only. With `normalize`, the vector has unit length but the rows have not, because
    the length of a residual is information.

    Args:
        codes_per_position: Number of stages (Q).
        code_dim: Channels of the vectors (D).
    """

    rows_have_unit_length = False

    def __init__(self, codes_per_position: int, code_dim: int) -> None:
        self.stages = codes_per_position
        self.row_dim = code_dim

    def normalize(self, vectors: Tensor) -> Tensor:
        """Scale vectors (..., D) to unit length."""
        return F.normalize(vectors, dim=-1)

    def split(self, vectors: Tensor, table: Tensor) -> Tensor:
        """Return the residuals (..., Q, D) of vectors (..., D) before each stage."""
        return self.assign(vectors, table)[0]

    def assign(self, vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residuals (..., Q, D) before each stage and their codes (..., Q)."""
        parts, codes = [vectors], []
        for rows in table:
            flat = parts[-1].detach().reshape(-1, self.row_dim)
            codes.append(find_nearest_codes(flat, rows).view(vectors.shape[:-1]))
            if len(codes) < self.stages:
                parts.append(parts[-1] - F.embedding(codes[-1], rows))
        return torch.stack(parts, dim=-2), torch.stack(codes, dim=-1)

    def join(self, chosen: Tensor) -> Tensor:
        """Add up the rows (..., Q, D) of each position, stage by stage."""
        # Not `sum`, whose order could depend on the memory layout: decoded codes must equal the
        # output of `forward` bit for bit.
        return reduce(torch.add, chosen.unbind(-2))

    def estimate(self, estimator: Any, vectors: Tensor, parts: Tensor, chosen: Tensor) -> Tensor:
        """Apply the estimator to the vectors (..., D) and the sums of their rows."""
        estimated: Tensor = estimator.apply(vectors, self.join(chosen))
        return estimated

    def choose_rows(self, vectors: Tensor, choose: Choose) -> Tensor:
        """Choose the rows (Q, K, D) of each stage from the residuals of the earlier stages."""
        chosen = []
        for stage in range(self.stages):
            rows = choose(vectors, slice(stage, None, self.stages))
            chosen.append(rows)
            vectors = vectors - F.embedding(find_nearest_codes(vectors, rows), rows)
        return torch.stack(chosen)


ARRANGEMENTS: dict[str, Callable[[int, int], Arrangement]] = {
    "product": ProductCodes,
    "residual": ResidualCodes,
}
