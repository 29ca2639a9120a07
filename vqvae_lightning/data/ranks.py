"""The ranks of a distributed run, or the one process there is."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; decided now, as Lightning starts them late."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all ranks."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def agreed(value: T) -> T:
    """The first rank's `value`, on all of them."""
    if rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
