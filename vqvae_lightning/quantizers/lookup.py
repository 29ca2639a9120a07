"""Search for the nearest codebook row of each vector."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.devices import exact_products

SCORES = 2**21  # scores per block on a CPU: 8 MiB, which its caches can hold
GPU_SCORES = 2**26  # on a GPU: 256 MiB, because small blocks would need thousands of short kernels
GPU_SHARE = 64  # the scores take at most 1 / GPU_SHARE of a GPU's memory
COLUMNS = 2**12  # codes per block, so that a block has enough rows even for a large codebook
CHUNK = 64  # neighbouring scores that are reduced to their maximum first


def find_nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Find the nearest codebook row (Euclidean) of each vector.

    The search uses argmin |z - e|^2 = argmax z.e - |e|^2 / 2. The mean row is subtracted from
    vectors and rows first, because far from the origin the two terms would cancel to noise. Scores
    are float32 and computed in blocks in one reused buffer, which is several times faster than
    allocating an N x K matrix. The products are exact, whatever precision is set for float32
    matrices.

    Args:
        vectors: (N, D), or (Q, N, D) for Q codebooks that are searched together.
        codebook: (K, D), or (Q, K, D).

    Returns:
        (N,) or (Q, N) int64 in [0, K); the lowest code where several are at the same distance.
    """
    return torch.ops.vqvae_lightning.nearest_codes(vectors.detach(), codebook.detach())  # type: ignore[no-any-return]


def limit_scores(device: torch.device) -> int:
    """Return how many scores (float32) `find_nearest_codes` holds at a time on `device`."""
    if device.type != "cuda":
        return SCORES
    # The total memory never changes and costs nothing to read, unlike the free memory.
    total = torch.cuda.get_device_properties(device).total_memory
    return min(GPU_SCORES, total // (4 * GPU_SHARE))


def _nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    if vectors.ndim == 2:
        return _nearest_codes(vectors[None], codebook[None])[0]
    books, total, _ = vectors.shape
    # float32 even under autocast: in bfloat16, near-equal distances tie and 1 to 3 % of the codes
    # change. TF32 and oneDNN's bfloat16 products change 0.4 % of them.
    with torch.autocast(vectors.device.type, enabled=False), exact_products():
        centre = codebook.float().mean(1, keepdim=True)
        table = codebook.float() - centre
        bias = table.square().sum(2, keepdim=True).mul_(-0.5).transpose(1, 2)
        padding = -table.shape[1] % CHUNK  # never chosen
        table = F.pad(table, (0, 0, 0, padding))
        bias = F.pad(bias, (0, padding), value=-torch.inf)
        budget = limit_scores(vectors.device) // books
        # With few vectors, the buffer has room for more columns.
        columns = max(COLUMNS, budget // max(1, total) // CHUNK * CHUNK)
        tiles = list(zip(table.split(columns, 1), bias.split(columns, 2), strict=True))
        width = min(table.shape[1], columns)
        height = max(1, min(total, budget // width))
        buffer = table.new_empty(books * height * width)
        numbers = torch.arange(books * height, device=vectors.device)
        codes = torch.empty(books, total, dtype=torch.int64, device=vectors.device)
        for rows, out in zip(vectors.split(height, 1), codes.split(height, 1), strict=True):
            centred = rows.float() - centre
            each = numbers[: out.numel()]
            best: Tensor | None = None
            for number, (tile, offset) in enumerate(tiles):
                scores = buffer[: len(each) * tile.shape[1]].view(*out.shape, tile.shape[1])
                if books == 1:  # the product of a batch of one rounds differently
                    torch.addmm(offset[0], centred[0], tile[0].t(), out=scores[0])
                else:
                    torch.baddbmm(offset, centred, tile.transpose(1, 2), out=scores)
                # First the maximum of each chunk, then the index within the best chunk: torch
                # vectorises `amax` but not `argmax`.
                chunks = scores.view(len(each), tile.shape[1] // CHUNK, CHUNK)
                tops = chunks.amax(2)
                which = tops.argmax(1)
                found = which * CHUNK + chunks[each, which].argmax(1)
                top = tops[each, which]
                if best is None:
                    best = top
                    out.copy_(found.view(out.shape))
                else:
                    better = top > best
                    best = torch.where(better, top, best)
                    found = torch.where(better, found + number * columns, out.flatten())
                    out.copy_(found.view(out.shape))
        # Vectors that are not finite match the padding. Their loss stops the run.
        return codes.clamp_(max=codebook.shape[1] - 1)


# A custom operator, which `torch.compile` does not trace into. `torch.library.custom_op` would
# import the compiler on its first call, which costs an uncompiled run 160 MB and seconds.
_operators = torch.library.Library("vqvae_lightning", "DEF")
_operators.define("nearest_codes(Tensor vectors, Tensor codebook) -> Tensor")
_operators.impl("nearest_codes", _nearest_codes, "CompositeExplicitAutograd")
torch.library.register_fake(
    "vqvae_lightning::nearest_codes",
    lambda vectors, codebook: vectors.new_empty(vectors.shape[:-1], dtype=torch.int64),
    lib=_operators,
)
