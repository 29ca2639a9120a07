"""`hydra/launcher=joblib`: run jobs of a sweep in parallel on one machine, each on its own GPUs."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from hydra.core.utils import JobReturn

from vqvae_lightning.errors import InputError, Interrupted, RankError, check_positive
from vqvae_lightning.jobs.launcher import Job, JobLauncher


class JoblibLauncher(JobLauncher):
    """Run jobs in parallel processes, each with its share of the threads and its own GPU.

    Args:
        n_jobs: Number of jobs at a time; None for one per GPU, or per CPU core without GPUs.
    """

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs.

        Raises:
            InputError: If joblib is not installed, or there are fewer GPUs than jobs at a time.
            Interrupted: If the sweep was requested to stop.
            RankError: If a worker was killed.
        """
        import tempfile

        try:
            import joblib
            from joblib.externals.loky.process_executor import TerminatedWorkerError
        except ModuleNotFoundError as error:
            raise InputError(
                "hydra/launcher=joblib needs joblib: uv run --extra joblib COMMAND."
            ) from error

        gpus = list_visible_gpus()
        count = self.n_jobs
        if count is None:
            count = len(gpus) or _count_cores()
        check_positive("hydra.launcher.n_jobs", count)
        if gpus and count > len(gpus):
            raise InputError(
                f"hydra.launcher.n_jobs={count} must be at most {len(gpus)}, the GPUs of this "
                "machine, because each job has its own."
            )
        count = min(count, len(job_overrides))
        jobs = self.make_jobs(job_overrides, initial_job_idx)
        share = [gpus[number::count] for number in range(count)] if gpus else []
        with tempfile.TemporaryDirectory() as place, forward_signals(Path(place)) as received:
            pool = joblib.Parallel(
                n_jobs=count,
                backend="loky",
                batch_size=1,
                pre_dispatch=count,  # so that no job waits in a worker when the sweep stops
                initializer=_start_worker,
                initargs=(place, share),
            )
            remaining = (job for job in jobs if not received)
            try:
                done = list(pool(joblib.delayed(_run_job)(job) for job in remaining))
            except TerminatedWorkerError as error:
                if not received:
                    raise RankError(
                        "a process that ran a job was killed, perhaps because memory ran out, and "
                        "joblib ended the others: start the same command again with resume=auto."
                    ) from error
                done = []
        stops = [result for result in done if isinstance(result, Interrupted)]
        if received or stops:
            status = next((stop.status for stop in stops), 130)
            raise Interrupted(
                "Interrupted; the jobs have saved their state. Resume with the same command, "
                "resume=auto and hydra.sweep.dir=FOLDER.",
                status,
            )
        return done


def _run_job(job: Job) -> JobReturn | Interrupted:
    """Run a job in a worker; return `Interrupted`, because joblib ends all jobs if one raises."""
    try:
        return job.run()
    except Interrupted as stop:
        return stop


@contextmanager
def forward_signals(place: Path) -> Iterator[list[int]]:
    """Forward signals to the workers, which save their state and stop.

    A second Ctrl-C ends this process at once.

    Args:
        place: Folder with one file per worker, named by the worker's process id.

    Yields:
        Signals received so far.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        for worker in place.glob("*.worker"):
            with suppress(ProcessLookupError):
                # SIGTERM, because the terminal sends SIGINT to the workers itself.
                os.kill(int(worker.stem), signal.SIGTERM)

    names = ("SIGINT", "SIGTERM", "SIGUSR2")  # Windows has no SIGUSR2
    wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_worker(place: str, shares: list[list[str]]) -> None:
    Path(place, f"{os.getpid()}.worker").touch()
    take_gpus(place, shares)


def list_visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[: torch.cuda.device_count()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]


def _count_cores() -> int:
    """Count the CPU cores that this process may use; macOS reports only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_held: list[IO[str]] = []  # keeps the lock files of this process open


def _lock(file: IO[str]) -> None:
    """Lock an open file until this process ends.

    Raises:
        OSError: If another process has locked it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def take_gpus(locks: str, shares: list[list[str]]) -> None:
    """Restrict this process to one of the `shares` of GPUs that no other living process holds.

    Each share is a locked file. The lock is released when a process ends, so the worker with which
    joblib replaces another one can take its share.

    Args:
        locks: Folder of the lock files, common to all workers.
        shares: Names of the GPUs in each share; without shares, nothing changes.

    Raises:
        RankError: If other processes hold all shares.
    """
    for number, share in enumerate(shares):
        file = Path(locks, str(number)).open("w")  # noqa: SIM115  (closed when the process ends)
        try:
            _lock(file)
        except OSError:
            file.close()
            continue
        _held.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        return
    if shares:
        raise RankError("other jobs of the sweep use all GPUs.")
