"""Ranks that a command starts itself, on its own machine."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vqvae_lightning.errors import DivergenceError, InputError, Interrupted, RankError
from vqvae_lightning.files import write_text
from vqvae_lightning.runs.failures import write_failure
from vqvae_lightning.runs.folder import RunFolder

PATIENCE = 30.0  # seconds for the other ranks to end by themselves after one has died
STARTED_HERE = "VQVAE_LIGHTNING_RANKS"  # marks LOCAL_RANK and WORLD_SIZE as set by this module


@contextmanager
def start_local_ranks(cfg: DictConfig, folder: Path, module: str, count: int) -> Iterator[None]:
    """Start ranks 1 to `count` - 1 as processes; the block is rank 0.

    Args:
        cfg: Config of the job, resolvable; each rank reads it from `ranks/config.yaml`.
        folder: Folder of the job; the ranks write their output to `ranks/rank1.log` and so on.
        module: Module that a process runs with the path of the config and the trusted packages.
        count: Number of ranks, including rank 0.

    Raises:
        RankError: If another rank failed or did not end, with the last line of its output.
    """
    import torch

    from vqvae_lightning.distributed import leave

    place = RunFolder(folder).ranks
    config = RunFolder(place).config
    write_text(config, OmegaConf.to_yaml(cfg, resolve=True))
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    common = {
        STARTED_HERE: "1",
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_find_free_port()),
    }
    processes = []
    for rank in range(1, count):
        environment = {"OMP_NUM_THREADS": str(share), **os.environ, **common}
        # Trusted packages are passed as arguments, because a file cannot vouch for itself.
        command = [sys.executable, "-m", module, str(config), *cfg.trust]
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
    watchdog = _Watchdog(processes, place)
    try:
        yield
        # Leave before waiting for the other ranks, because all ranks leave together.
        leave(together=True)
        watchdog.finish()
    except Interrupted as stop:
        leave(together=stop.agreed)
        raise
    except (InputError, DivergenceError):
        raise
    except Exception as error:
        # This may be a broken connection, which only follows from another rank's error.
        time.sleep(1)
        failure = watchdog.find_failure()
        if failure is None:
            raise
        raise RankError(failure) from error
    finally:
        leave(together=False)  # does nothing unless the block failed
        watchdog.stop()
        for process in processes:
            process.kill()
            process.wait()
        for name in (*common, "LOCAL_RANK"):
            os.environ.pop(name, None)
        torch.set_num_threads(threads)


class _Watchdog:
    """Ends a job whose other ranks would wait forever for one that died.

    Args:
        processes: Processes of ranks 1, 2 and so on.
        place: Folder of their output.
    """

    def __init__(self, processes: list["subprocess.Popen[bytes]"], place: Path) -> None:
        self.processes, self.place = processes, place
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def find_failure(self) -> str | None:
        """Return the last line of the lowest rank that failed; None if none has failed."""
        for rank, process in enumerate(self.processes, 1):
            if process.poll():
                log = self._log(rank)
                lines = log.read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else f"exit status {process.returncode}"
                return f"rank {rank} failed: {last} (its output: {log})"
        return None

    def finish(self) -> None:
        """Wait for the other ranks, which end when rank 0 does.

        Raises:
            RankError: If one of them failed or does not end.
        """
        for rank, process in enumerate(self.processes, 1):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise RankError(
                    f"rank {rank} was still running {PATIENCE:.0f} s after the job had ended "
                    f"(its output: {self._log(rank)})"
                ) from error
        failure = self.find_failure()
        if failure:
            raise RankError(failure)

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def _log(self, rank: int) -> Path:
        return self.place / f"rank{rank}.log"

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            failure = self.find_failure()
            if failure and not self._over.wait(PATIENCE):
                # The main thread hangs in a collective and cannot receive an exception.
                sys.stderr.write(f"error: {failure}\n")
                sys.stderr.flush()
                write_failure(self.place.parent, failure, [], "")
                for process in self.processes:
                    process.kill()
                os._exit(1)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
