"""Several devices: each rank of a job gets the job's own, resolved config.

Lightning starts ranks by running the command line again. In a Hydra sweep that line is the whole
sweep: a rank would start a sweep of its own, draw other random values than its job has, and leave
its rank behind in the environment for the next job, which then trains on a part of its data.

On one machine a command starts its further ranks itself (`start_ranks`): each reads the
config from a file, and nothing outlives the job. Where torchrun, srun or submitit has started all
ranks, only rank 0 composes configs and runs the command (`lead_ranks`); the others wait for what it
sends them.
"""

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from vqvae_lightning.errors import (
    DivergenceError,
    InputError,
    Interrupted,
    Key,
    RankError,
    check_positive,
    prefix_keys,
)
from vqvae_lightning.files import write_text
from vqvae_lightning.runs.failures import write_failure

PATIENCE = 30.0  # seconds that the others have, after a rank has died, to notice by themselves
WAIT = datetime.timedelta(minutes=30)  # for other ranks, at the start too; torch's own default
IDLE = datetime.timedelta(days=30)  # while the first rank downloads, evaluates, trains a classifier

STARTED_HERE = "VQVAE_LIGHTNING_RANKS"  # set where LOCAL_RANK and WORLD_SIZE are ours

T = TypeVar("T")


class Outside:
    """The ranks that torchrun or Slurm started, of which this process is one.

    They talk through a store of keys. Only while they share a job are they connected as a process
    group, or the evaluation that the first rank does alone would wait for the others.

    Args:
        environment: Lightning's `ClusterEnvironment` for the launcher.

    Attributes:
        broken: That a job has failed while all ranks took part: the others may wait in a collective
            for this one, so that nothing can be sent to them any more.

    Raises:
        RankError: If not all ranks have come within half an hour.
    """

    def __init__(self, environment: Any) -> None:
        from torch.distributed.rendezvous import rendezvous

        self.environment = environment
        self.rank: int = environment.global_rank()
        self.world: int = environment.world_size()
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
                f"was the command started once only, without srun or torchrun? ({error})"
            ) from error

    def check(self, devices: int, nodes: int) -> None:
        """Refuse a trainer that counts other ranks than were started.

        Raises:
            InputError: Naming `trainer.devices` and `trainer.num_nodes`.
        """
        names = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
        per_node = [int(os.environ[name]) for name in names if name in os.environ][:1] or [devices]
        if devices * nodes != self.world or per_node != [devices]:
            raise InputError(
                f"trainer.devices={devices} and trainer.num_nodes={nodes} ask for "
                f"{devices * nodes} ranks, {devices} on a node, but {self.world} were started, "
                f"{per_node[0]} on a node."
            )

    @contextmanager
    def sharing(self, cfg: Any, module: str) -> Iterator[None]:
        """Let the other ranks run `module` on `cfg` while this one runs the block."""
        from omegaconf import OmegaConf

        if self.broken:
            raise RankError("an earlier job failed on several ranks: start the command again.")
        self._send([module, OmegaConf.to_yaml(cfg, resolve=True)])
        with self._connected(cfg.trainer.accelerator):
            yield

    def follow(self) -> None:
        """Run what the first rank sends, until it needs this one no more.

        Raises:
            RankError: If a job failed, or the first rank has died.
            SystemExit: With the job's status, if it was stopped.
        """
        from omegaconf import OmegaConf

        status = 0
        while True:
            message = self._received()
            if message is None:
                self._store.set(f"gone{self.rank}", "")
                sys.exit(status)
            module, text = message
            cfg = OmegaConf.create(text)
            try:
                with self._connected(cfg.trainer.accelerator):
                    import_module(module).run(cfg)
            except Interrupted as stop:
                # The first rank may be asking for another start: ended before it, this one would
                # have the launcher end that too.
                status = stop.status
                if self.broken:  # a signal to this rank alone: the first one waits in vain
                    sys.exit(status)
            except (InputError, DivergenceError, RankError) as error:
                raise RankError(f"rank {self.rank}: {error}") from error

    def dismiss(self) -> None:
        """Let the other ranks end, and wait for them: the store may end with this process."""
        if not self.broken:
            self._send(None)
            with suppress(RuntimeError):  # one has died: nobody is left to wait for it
                gone = [f"gone{rank}" for rank in range(1, self.world)]
                self._store.wait(gone, datetime.timedelta(seconds=PATIENCE))

    @contextmanager
    def _connected(self, accelerator: str) -> Iterator[None]:
        """A process group while the ranks share a job; Lightning keeps one that is there."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        from vqvae_lightning.distributed import leave

        backend = _backend(accelerator, self.environment.local_rank())
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
                raise RankError("another rank has failed; its own message says why.") from error
            raise
        finally:
            self.broken = not together
            leave(together)

    def _send(self, message: Any) -> None:
        self._sent += 1
        self._store.set(f"message{self._sent}", json.dumps(message))

    def _received(self) -> Any:
        self._sent += 1
        key = f"message{self._sent}"
        try:
            self._store.wait([key], IDLE)
            return json.loads(self._store.get(key))
        except RuntimeError as error:
            raise RankError(f"rank {self.rank}: the first rank has died ({error})") from error


_outside: Outside | None = None


def detect_launcher() -> Any:
    """Lightning's environment for the launcher that started this process and others; or None.

    Raises:
        InputError: If Slurm's variables contradict each other.
    """
    # Nothing is imported on the way of every command's --help.
    if "TORCHELASTIC_RUN_ID" not in os.environ and "SLURM_NTASKS" not in os.environ:
        return None
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    # torchrun first: it may run within a Slurm job.
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # Only srun starts ranks; a job script counts those that it could start, too.
    if not SLURMEnvironment.detect() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    try:
        # Requeued by submitit, or by the job script at exit status 75: see LastCheckpoint.
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise InputError(" ".join(str(error).split())) from error


def lead_ranks(work: Callable[[], T]) -> T | None:
    """Do `work` on the first rank, which the others follow, if a launcher started several.

    Args:
        work: Composes a config and runs a command on it.

    Returns:
        What `work` does; None on the other ranks.
    """
    global _outside

    environment = detect_launcher() if _outside is None else None
    if environment is None:
        return work()
    _outside = Outside(environment)
    try:
        if _outside.rank:
            _outside.follow()
        try:
            return work()
        finally:
            _outside.dismiss()
    finally:
        _outside = None


def connection_lost() -> bool:
    """Whether a job failed that other processes took part in, so that none can follow it here."""
    return _outside is not None and _outside.broken


def environment() -> Any:
    """What tells Lightning's Trainer which rank it is; never a scheduler that it would requeue."""
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    return LightningEnvironment() if _outside is None else _outside.environment


def local_rank() -> int:
    """This process's rank on its machine."""
    if _outside is not None:
        return int(_outside.environment.local_rank())
    return int(os.environ["LOCAL_RANK"]) if STARTED_HERE in os.environ else 0


def join_ranks(accelerator: str) -> None:
    """Join the ranks of a job that has no Trainer to do so."""
    import torch.distributed as dist

    if dist.is_initialized() or STARTED_HERE not in os.environ:
        return
    rank, world = local_rank(), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(_backend(accelerator, rank), rank=rank, world_size=world, timeout=WAIT)


def _backend(accelerator: str, place: int) -> str:
    """How the ranks of a job talk; each of a machine, by its `place` there, takes its GPU.

    A job on the CPU uses no GPU, even on a machine that has some: it may have more ranks than GPUs.
    """
    import torch

    if accelerator == "cpu":
        return "gloo"
    torch.cuda.set_device(place % torch.cuda.device_count())
    return "cpu:gloo,cuda:nccl"  # tensors go over NCCL, Python objects over gloo


def count_ranks(trainer: Any) -> int:
    """Processes on a machine that a trainer's config asks for.

    Raises:
        InputError: If `devices` is no number of devices, or `accelerator` is unknown or not there.
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
def start_ranks(cfg: Any, folder: Path, module: str) -> Iterator[None]:
    """Bring the further ranks of a job to it, and see that none is left in it when it ends.

    Those that torchrun or Slurm started are sent the config; else they are started here.

    Args:
        cfg: The config of the stage, resolvable.
        folder: Where the ranks' output goes: `ranks/rank1.log` and on.
        module: Run with the path of the config, and the packages that `cfg` trusts, by each further
            rank that is started here, and by its function `run` on one that was started outside.

    Raises:
        InputError: If there are other ranks than the trainer counts, or several machines' ranks
            were started by nobody.
        RankError: If a further rank failed, with the end of its output.
    """
    count = count_ranks(cfg.trainer)
    nodes = check_positive("trainer.num_nodes", cfg.trainer.num_nodes)
    if _outside is not None:
        _outside.check(count, nodes)
        with _outside.sharing(cfg, module):
            yield
        return
    if nodes > 1:
        raise InputError(
            f"trainer.num_nodes={nodes}: one command cannot start the ranks of several machines; "
            f"use hydra/launcher=slurm, or on each of them torchrun --nnodes {nodes} "
            f"--nproc-per-node {count} --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m MODULE."
        )
    if count == 1:
        yield
        return
    with _start_here(cfg, folder, module, count):
        yield


@contextmanager
def _start_here(cfg: Any, folder: Path, module: str, count: int) -> Iterator[None]:
    import torch
    from omegaconf import OmegaConf

    from vqvae_lightning.distributed import leave

    place = folder / "ranks"
    write_text(place / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    common = {
        STARTED_HERE: "1",
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    processes = []
    for rank in range(1, count):
        environment = {"OMP_NUM_THREADS": str(share), **os.environ, **common}
        # A file cannot vouch for itself: what this command trusts, it says on the command line.
        command = [sys.executable, "-m", module, str(place / "config.yaml"), *cfg.trust]
        with (place / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    os.environ.update({**common, "LOCAL_RANK": "0"})
    torch.set_num_threads(share)
    watch = _Watch(processes, place)
    try:
        yield
        # Before the others end, not after: all ranks leave together.
        leave(together=True)
        watch.finish()
    except Interrupted as stop:
        leave(together=stop.agreed)
        raise
    except (InputError, DivergenceError):
        raise
    except Exception as error:
        # A broken connection: but the echo of another rank's error.
        time.sleep(1)
        failed = watch.failed()
        if failed is None:
            raise
        raise RankError(failed) from error
    finally:
        leave(together=False)  # only after a failure is there still something to leave
        watch.stop()
        for process in processes:
            process.kill()
            process.wait()
        for name in (*common, "LOCAL_RANK"):
            os.environ.pop(name, None)
        torch.set_num_threads(threads)


class _Watch:
    """Ends a job of which one rank has died, when the others wait for it for ever."""

    def __init__(self, processes: list["subprocess.Popen[bytes]"], place: Path) -> None:
        self.processes, self.place = processes, place
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def failed(self) -> str | None:
        """What the first failed rank said last; None if none has failed."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll():
                log = self._log(rank)
                lines = log.read_text(errors="replace").strip().splitlines()
                said = lines[-1] if lines else f"exit status {process.returncode}"
                return f"rank {rank} failed: {said} (its output: {log})"
        return None

    def finish(self) -> None:
        """Wait for the further ranks, which end with the first.

        Raises:
            RankError: If one of them failed, or does not end.
        """
        for rank, process in enumerate(self.processes, 1):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise RankError(
                    f"rank {rank} still ran {PATIENCE:.0f} s after the job had ended "
                    f"(its output: {self._log(rank)})"
                ) from error
        failed = self.failed()
        if failed:
            raise RankError(failed)

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _log(self, rank: int) -> Path:
        return self.place / f"rank{rank}.log"

    def _run(self) -> None:
        while not self._over.wait(0.5):
            failed = self.failed()
            if failed and not self._over.wait(PATIENCE):
                # The main thread hangs in a collective, where no exception reaches it.
                sys.stderr.write(f"error: {failed}\n")
                sys.stderr.flush()
                write_failure(self.place.parent, failed, [], "")
                for process in self.processes:
                    process.kill()
                os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
