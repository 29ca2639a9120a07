"""The nearest codebook row of each vector."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.devices import exact_products

SCORES = 2**21  # scores held at a time by `find_nearest_codes`: 8 MiB, which a CPU's caches hold
GPU_SCORES = 2**26  # on a GPU: 256 MiB, as small blocks would be thousands of short kernels
GPU_SHARE = 64  # of a GPU's memory they take at most 1 / GPU_SHARE
COLUMNS = 2**12  # codes compared at a time, so that a block keeps enough rows for a large codebook
CHUNK = 64  # neighbouring scores of which the largest is found first


def find_nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row (Euclidean) for each vector.

    The distances are float32 and never held all at once: blocks go through one reused buffer, which
    is several times faster than an N x K matrix of fresh memory. argmin |z - e|^2 = argmax z.e -
    |e|^2 / 2, with both moved by the mean row: far from the origin the terms would cancel to noise.
    The products are exact, whatever precision is set for float32 matrices.

    Args:
        vectors: (N, D).
        codebook: (K, D).

    Returns:
        (N,) int64 in [0, K); the lowest of codes at the same distance.
    """
    return torch.ops.vqvae_lightning.nearest_codes(vectors.detach(), codebook.detach())  # type: ignore[no-any-return]


def limit_scores(device: torch.device) -> int:
    """Scores (float32) that `find_nearest_codes` holds at a time on `device`."""
    if device.type != "cuda":
        return SCORES
    # Of the whole memory, not of the free one: it never changes, and asking for it is free.
    total = torch.cuda.get_device_properties(device).total_memory
    return min(GPU_SCORES, total // (4 * GPU_SHARE))


def _nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    # float32 even under autocast: in bfloat16 near-equal distances tie and 1 to 3 % of the codes
    # change. TF32 and oneDNN's bfloat16 products do the same, to 0.4 % of them.
    with torch.autocast(vectors.device.type, enabled=False), exact_products():
        centre = codebook.float().mean(0)
        table = codebook.float() - centre
        bias = table.square().sum(1).mul_(-0.5)
        padding = -len(table) % CHUNK  # never chosen
        table = F.pad(table, (0, 0, 0, padding))
        bias = F.pad(bias, (0, padding), value=-torch.inf)
        budget = limit_scores(vectors.device)
        # Where few vectors leave room, more columns than that.
        columns = max(COLUMNS, budget // max(1, len(vectors)) // CHUNK * CHUNK)
        tiles = list(zip(table.split(columns), bias.split(columns), strict=True))
        width = min(len(table), columns)
        height = max(1, min(len(vectors), budget // width))
        buffer = table.new_empty(height * width)
        numbers = torch.arange(height, device=vectors.device)
        codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for rows, out in zip(vectors.split(height), codes.split(height), strict=True):
            centred = rows.float() - centre
            each = numbers[: len(rows)]
            best: Tensor | None = None
            for number, (tile, offset) in enumerate(tiles):
                scores = buffer[: len(rows) * len(tile)].view(len(rows), len(tile))
                torch.addmm(offset, centred, tile.t(), out=scores)
                # The largest of each chunk, then the place within the best chunk: a maximum alone
                # is vectorised, one with its index is not.
                chunks = scores.view(len(rows), len(tile) // CHUNK, CHUNK)
                tops = chunks.amax(2)
                which = tops.argmax(1)
                found = which * CHUNK + chunks[each, which].argmax(1)
                top = tops[each, which]
                if best is None:
                    best = top
                    out.copy_(found)
                else:
                    better = top > best
                    best = torch.where(better, top, best)
                    out.copy_(torch.where(better, found + number * columns, out))
        # Vectors that are not finite find the padding; what stops such a run is its loss.
        return codes.clamp_(max=len(codebook) - 1)


# An operator of its own, so that `torch.compile` takes it as it is. Not `torch.library.custom_op`,
# whose first call imports the compiler: 160 MB and seconds that an uncompiled run has no use for.
_operators = torch.library.Library("vqvae_lightning", "DEF")
