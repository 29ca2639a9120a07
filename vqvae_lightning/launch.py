"""Several devices on one machine: a process for each further rank, with the job's own config.

Lightning starts ranks by running the command line again. In a Hydra sweep that line is the whole
sweep: a rank would start a sweep of its own, draw other random values than its job has, and leave
its rank behind in the environment for the next job, which then trains on a part of its data. Here
each rank gets the resolved config of its job from a file, and nothing outlives the job.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqvae_lightning.errors import DivergenceError, InputError, RankError

PATIENCE = 30.0  # seconds that the others have, after a rank has died, to notice by themselves


def ranks_wanted(trainer: Any) -> int:
    """Processes on this machine that a trainer's config asks for.

    Raises:
        InputError: If `devices` is no number of devices.
    """
    import torch

    devices = trainer.devices
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        return devices
    on_gpu = trainer.accelerator in ("gpu", "cuda")
    if devices in ("auto", -1):
        return torch.cuda.device_count() if on_gpu else 1
    raise InputError(f"trainer.devices={devices} must be a number of devices, or auto.")


@contextmanager
def launched(cfg: Any, folder: Path, module: str) -> Iterator[None]:
    """Start the further ranks of a job, and see that none is left when it ends.

    Nothing to do for one device, or where a launcher (torchrun, a cluster's) has started them.

    Args:
        cfg: The config of the stage, resolvable.
        folder: Where the ranks' output goes: `ranks/rank1.log` and on.
        module: Run with the path of the config by each further rank.

    Raises:
        RankError: If a further rank failed, with the end of its output.
    """
    from omegaconf import OmegaConf

    from vqvae_lightning.results import write_text

    count = ranks_wanted(cfg.trainer)
    if count == 1 or "LOCAL_RANK" in os.environ:
        yield
        return
    import torch

    place = folder / "ranks"
    write_text(place / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    common = {
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    processes = []
    for rank in range(1, count):
        environment = {"OMP_NUM_THREADS": str(share), **os.environ, **common}
        command = [sys.executable, "-m", module, str(place / "config.yaml")]
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
        watch.finish()
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
        watch.stop()
        for process in processes:
            process.kill()
            process.wait()
        for name in (*common, "LOCAL_RANK"):
            os.environ.pop(name, None)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
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
                log = self.place / f"rank{rank}.log"
                lines = log.read_text(errors="replace").strip().splitlines()
                said = lines[-1] if lines else f"exit status {process.returncode}"
                return f"rank {rank} failed: {said} (its output: {log})"
        return None

    def finish(self) -> None:
        """Wait for the further ranks, which end with the first.

        Raises:
            RankError: If one of them failed.
        """
        for process in self.processes:
            process.wait(PATIENCE)
        failed = self.failed()
        if failed:
            raise RankError(failed)

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            failed = self.failed()
            if failed and not self._over.wait(PATIENCE):
                # The main thread hangs in a collective, where no exception reaches it.
                sys.stderr.write(f"error: {failed}\n")
                sys.stderr.flush()
                for process in self.processes:
                    process.kill()
                os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
