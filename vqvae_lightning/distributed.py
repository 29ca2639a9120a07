"""Collectives that also work in a single process."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def get_rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks.

    Call it when needed, because Lightning joins the ranks only after the program has started.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave(together: bool) -> None:
    """End the connection to the other ranks, if there is one.

    Args:
        together: Whether all ranks leave now, as at the end of a job. NCCL then waits for all of
            them. After a failure some ranks never get here, so the connection is aborted without
            waiting.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if together:
        dist.destroy_process_group()
    else:
        # torch has no public function that aborts and also forgets the group.
        dist.distributed_c10d._abort_process_group()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place."""
    if get_rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value: T) -> T:
    """Return rank 0's `value` on all ranks."""
    if get_rank_and_world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: T) -> list[T]:
    """Return the `value` of each rank on all ranks, which wait for each other here."""
    world = get_rank_and_world()[1]
    if world == 1:
        return [value]
    values: list[T] = [value] * world
    dist.all_gather_object(values, value)
    return values
