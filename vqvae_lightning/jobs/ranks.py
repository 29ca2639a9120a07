"""Several devices: every rank of a job runs on the job's own, resolved config.

Lightning would start the other ranks by running the command line again. In a Hydra sweep, each of
them would then start a sweep of its own and draw other random values than its job. It would also
keep its rank in the environment, so that the next job would train on a part of its data.

On one machine the command therefore starts the other ranks itself, and each reads the config from a
file. Where torchrun, srun or submitit started all ranks, rank 0 composes the configs, runs the
command and sends the other ranks the config of each job.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig

from vqvae_lightning.errors import InputError, Key, check_positive, prefix_keys
from vqvae_lightning.jobs.launched_ranks import (
    WAIT,
    LaunchedRanks,
    choose_backend,
    detect_launcher,
)
from vqvae_lightning.jobs.local_ranks import STARTED_HERE, start_local_ranks

if TYPE_CHECKING:
    from lightning_fabric.plugins import ClusterEnvironment

T = TypeVar("T")

_launched: LaunchedRanks | None = None


def lead_ranks(work: Callable[[], T]) -> T | None:
    """Do `work`; if a launcher started several ranks, on rank 0, which the others follow.

    Args:
        work: Composes a config and runs a command on it.

    Returns:
        Result of `work`; None on the other ranks.
    """
    global _launched

    environment = detect_launcher() if _launched is None else None
    if environment is None:
        return work()
    _launched = LaunchedRanks(environment)
    try:
        if _launched.rank:
            _launched.follow()
        try:
            return work()
        finally:
            _launched.dismiss()
    finally:
        _launched = None


def connection_lost() -> bool:
    """Whether a job failed on ranks of a launcher, so that they can run no other job."""
    return _launched is not None and _launched.broken


def get_environment() -> "ClusterEnvironment":
    """Cluster environment for Lightning's Trainer; Lightning never requeues a job in it."""
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    return LightningEnvironment() if _launched is None else _launched.environment


def get_local_rank() -> int:
    """Rank of this process on its machine."""
    if _launched is not None:
        return _launched.environment.local_rank()
    return int(os.environ["LOCAL_RANK"]) if STARTED_HERE in os.environ else 0


def join_ranks(accelerator: str) -> None:
    """Form the process group of a job that has no Trainer to form it."""
    import torch.distributed as dist

    if dist.is_initialized() or STARTED_HERE not in os.environ:
        return
    rank, world = get_local_rank(), int(os.environ["WORLD_SIZE"])
    backend = choose_backend(accelerator, rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=WAIT)


def count_ranks(trainer: DictConfig) -> int:
    """Count the ranks per machine that the config of a trainer asks for.

    Raises:
        InputError: If `devices` is no number of devices, or `accelerator` is unknown or missing.
    """
    import torch

    from vqvae_lightning.devices import choose_device

    with prefix_keys("trainer"):
        device = choose_device(trainer.accelerator)
    devices = trainer.devices
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        return devices
    if devices in ("auto", -1):
        return torch.cuda.device_count() if device.type == "cuda" else 1
    raise InputError(Key("trainer.devices"), f"={devices} must be a number of devices, or auto.")


@contextmanager
def start_ranks(cfg: DictConfig, folder: Path, module: str) -> Iterator[None]:
    """Run a job on all its ranks; the block is rank 0's part.

    Ranks that a launcher started get the config sent. Otherwise the other ranks are started here,
    and none is running when the block ends.

    Args:
        cfg: Config of the stage, resolvable.
        folder: Folder of the job; local ranks write their output to `ranks/rank1.log` and so on.
        module: Module of the other ranks. A local rank runs it as a program with the path of the
            config and the packages that `cfg` trusts; a launched rank calls its function `run`.

    Raises:
        InputError: If the launcher started other ranks than the trainer needs, or the trainer
            needs several machines and there is no launcher.
        RankError: If another rank failed, with the last line of its output.
    """
    count = count_ranks(cfg.trainer)
    nodes = check_positive("trainer.num_nodes", cfg.trainer.num_nodes)
    if _launched is not None:
        _launched.check(count, nodes)
        with _launched.share_job(cfg, module):
            yield
        return
    if nodes > 1:
        raise InputError(
            f"trainer.num_nodes={nodes}: one command cannot start the ranks of several machines; "
            f"use hydra/launcher=slurm, or start on each machine torchrun --nnodes {nodes} "
            f"--nproc-per-node {count} --rdzv-backend c10d --rdzv-endpoint HOST:PORT --no-python "
            "COMMAND, such as vqvae-train with its options."
        )
    if count == 1:
        yield
        return
    with start_local_ranks(cfg, folder, module, count):
        yield
