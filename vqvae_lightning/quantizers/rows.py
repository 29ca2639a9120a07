"""Draw encoder vectors over all ranks, as codebook rows or as input of k-means."""

import torch
from torch import Tensor

from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.quantizers.lookup import find_nearest_codes

KMEANS_STEPS = 10


def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Cluster `vectors` (..., N, D) into K centres (..., K, D) by Lloyd's algorithm.

    It starts from K random vectors. A centre without vectors is moved onto a random vector. The
    result depends only on the vectors and the state of the generator. The sets of a batch are
    clustered independently, each as if it were alone; all use the same random numbers.
    """
    centres = vectors[..., draw_rows(vectors.shape[-2], num_codes, generator), :].clone()
    sets = vectors.shape[:-2].numel()
    first = torch.arange(sets, device=vectors.device)[:, None] * num_codes  # row of each set
    for _ in range(KMEANS_STEPS):
        codes = find_nearest_codes(vectors, centres)
        places = (codes.view(sets, -1) + first).flatten()
        counts = torch.zeros(centres.shape[:-1], dtype=torch.int64, device=codes.device)
        counts.view(-1).scatter_add_(0, places, torch.ones_like(places))
        sums = torch.zeros_like(centres)
        sums.view(-1, sums.shape[-1]).index_add_(0, places, vectors.flatten(0, -2))
        fresh = vectors[..., draw_rows(vectors.shape[-2], num_codes, generator), :]
        means = sums / counts.clamp(min=1)[..., None]
        centres = torch.where((counts > 0)[..., None], means, fresh)
    return centres


def draw_rows(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` row numbers below `total` (int64, CPU), repeated only if `count` > `total`."""
    rounds = -(-count // total)
    order = [torch.randperm(total, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:count]


def draw_over_ranks(part: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most `count` random rows from the vectors of all ranks, equal on every rank.

    Rows are numbered rank by rank, so that N ranks draw the rows that one process with the
    concatenated batch would draw. The call makes two collectives, whose sizes are equal on all
    ranks.

    Args:
        part: Vectors (n, D) of this rank; n may differ between ranks.
        count: Rows to draw. If there are fewer vectors, all are returned.
        generator: CPU generator, in the same state on every rank.

    Returns:
        (min(count, number of vectors), D).
    """
    first, total = count_rows_before(part)
    return gather_rows(part, first, draw_rows(total, min(count, total), generator))


def gather_rows(part: Tensor, first: int, numbers: Tensor) -> Tensor:
    """Gather chosen rows from the vectors of all ranks, equal on every rank.

    Args:
        part: Vectors (n, D) of this rank.
        first: Number of its first row, counted over all ranks.
        numbers: Rows to take (m,) int64 on the CPU, the same on every rank.

    Returns:
        (m, D).
    """
    own = numbers - first
    places = ((own >= 0) & (own < len(part))).nonzero()[:, 0]
    chosen = part.new_zeros(len(numbers), part.shape[1])
    chosen[places.to(part.device)] = part[own[places].to(part.device)]
    return all_reduce(chosen)


def count_rows_before(part: Tensor) -> tuple[int, int]:
    """Return the number of rows on lower ranks and the total number of rows on all ranks."""
    rank, world = get_rank_and_world()
    if world == 1:
        return 0, len(part)
    sizes = torch.zeros(world, dtype=torch.int64, device=part.device)
    sizes[rank] = len(part)
    ends = all_reduce(sizes).cumsum(0).tolist()
    return ends[rank] - len(part), ends[-1]


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows (..., count, D) by cycling through `rows` (..., n, D)."""
    return rows[..., torch.arange(count, device=rows.device) % rows.shape[-2], :]
