"""Ranks that torchrun, srun or submitit started, of which this process is one."""

import datetime
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from vqvae_lightning.errors import DivergenceError, InputError, Interrupted, RankError, join_lines

if TYPE_CHECKING:
    from lightning_fabric.plugins import ClusterEnvironment

WAIT = datetime.timedelta(minutes=30)  # for the other ranks to start or answer; torch's default
IDLE = datetime.timedelta(days=30)  # while rank 0 downloads, evaluates or trains a classifier
FAREWELL = datetime.timedelta(seconds=30)  # for the other ranks to end


class LaunchedRanks:
    """All ranks that a launcher started, seen from this one.

    Rank 0 sends the other ranks messages through a key-value store. The ranks form a process group
    only while they share a job, because an evaluation that rank 0 does alone would otherwise wait
    for the others.

    Args:
        environment: Lightning's description of the launcher.

    Attributes:
        broken: Whether a job failed while all ranks took part. The other ranks may then wait for
            this one in a collective and cannot receive messages.

    Raises:
        RankError: If a rank has not started within half an hour.
    """

    def __init__(self, environment: "ClusterEnvironment") -> None:
        from torch.distributed.rendezvous import rendezvous

        self.environment = environment
        self.rank = environment.global_rank()
        self.world = environment.world_size()
        self.broken = False
        self._sent = 0
        address = f"{environment.main_address}:{environment.main_port}"  # also sets MASTER_*
        try:
            meeting = rendezvous("env://", self.rank, self.world, timeout=WAIT)
            self._store = next(iter(meeting))[0]
            self._store.set(f"here{self.rank}", "")
            self._store.wait([f"here{rank}" for rank in range(self.world)], WAIT)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}: the {self.world} ranks did not find each other at {address}; "
                f"was the command started only once, without srun or torchrun? ({error})"
            ) from error

    def check(self, devices: int, nodes: int) -> None:
        """Refuse a trainer that needs other ranks than the launcher started.

        Raises:
            InputError: With `trainer.devices` and `trainer.num_nodes`.
        """
        names = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
        per_node = [int(os.environ[name]) for name in names if name in os.environ][:1] or [devices]
        if devices * nodes != self.world or per_node != [devices]:
            raise InputError(
                f"trainer.devices={devices} and trainer.num_nodes={nodes} ask for "
                f"{devices * nodes} ranks, {devices} per node, but {self.world} were started, "
                f"{per_node[0]} per node."
            )

    @contextmanager
    def share_job(self, cfg: DictConfig, module: str) -> Iterator[None]:
        """Have the other ranks run `module` on `cfg` while rank 0 runs the block.

        Raises:
            RankError: If an earlier job broke the connection.
        """
        if self.broken:
            raise RankError("an earlier job failed on several ranks: start the command again.")
        self._send([module, OmegaConf.to_yaml(cfg, resolve=True)])
        with self._connect(cfg.trainer.accelerator):
            yield

    def follow(self) -> None:
        """Run the jobs that rank 0 sends until rank 0 dismisses this rank.

        Raises:
            RankError: If a job failed or rank 0 died.
            SystemExit: When rank 0 dismisses this rank, with the status of a stopped job if any.
        """
        status = 0
        while True:
            message = self._receive()
            if message is None:
                self._store.set(f"gone{self.rank}", "")
                sys.exit(status)
            module, text = message
            cfg = OmegaConf.create(text)
            try:
                with self._connect(cfg.trainer.accelerator):
                    import_module(module).run(cfg)
            except Interrupted as stop:
                # Wait for rank 0's dismissal. Rank 0 may still be requesting a requeue, and the
                # launcher would end rank 0 as soon as this rank exits.
                status = stop.status
                if self.broken:  # the signal reached only this rank, so rank 0 cannot dismiss it
                    sys.exit(status)
            except (InputError, DivergenceError, RankError) as error:
                raise RankError(f"rank {self.rank}: {error}") from error

    def dismiss(self) -> None:
        """Let the other ranks end, and wait for them, because this process may host the store."""
        if not self.broken:
            self._send(None)
            with suppress(RuntimeError):  # a dead rank never answers
                self._store.wait([f"gone{rank}" for rank in range(1, self.world)], FAREWELL)

    @contextmanager
    def _connect(self, accelerator: str) -> Iterator[None]:
        """Form a process group for one job; Lightning uses an existing group.

        Raises:
            RankError: If the connection broke because another rank failed.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        from vqvae_lightning.distributed import leave

        backend = choose_backend(accelerator, self.environment.local_rank())
        store = PrefixStore(f"job{self._sent}", self._store)
        together = False
        try:
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=WAIT
            )
            yield
            together = True
        except Interrupted as stop:
            together = stop.agreed
            raise
        except RuntimeError as error:
            if "gloo" in str(error) or isinstance(error, dist.DistError):
                raise RankError("another rank failed; its own message says why.") from error
            raise
        finally:
            self.broken = not together
            leave(together)

    def _send(self, message: list[str] | None) -> None:
        self._sent += 1
        self._store.set(f"message{self._sent}", json.dumps(message))

    def _receive(self) -> list[str] | None:
        self._sent += 1
        key = f"message{self._sent}"
        try:
            self._store.wait([key], IDLE)
            message: list[str] | None = json.loads(self._store.get(key))
        except RuntimeError as error:
            raise RankError(f"rank {self.rank}: rank 0 died ({error})") from error
        return message


def detect_launcher() -> "ClusterEnvironment | None":
    """Lightning's environment for the launcher that started this process; None without a launcher.

    Raises:
        InputError: If Slurm's variables contradict each other.
    """
    # Return before the imports: every command comes here, even with --help.
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_NTASKS" not in os.environ:
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    # Check torchrun first, because it may run within a Slurm job.
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # Only srun starts ranks. In a job script, SLURM_NTASKS counts tasks that srun could start.
    if not SLURMEnvironment.detect() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    try:
        # Not Lightning but submitit requeues, or the job script at exit status 75.
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise InputError(join_lines(error)) from error


def choose_backend(accelerator: str, local_rank: int) -> str:
    """Choose the backend of a process group, and make this rank's GPU the current one.

    A job on the CPU uses no GPU, because it may have more ranks than the machine has GPUs.

    Args:
        accelerator: Accelerator of the trainer.
        local_rank: Rank of this process on its machine.
    """
    import torch

    if accelerator == "cpu":
        return "gloo"
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return "cpu:gloo,cuda:nccl"  # NCCL sends tensors, gloo sends Python objects
