"""`hydra/launcher=joblib`: jobs of a sweep side by side on one machine, each with its own GPUs."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from vqvae_lightning.errors import InputError, Interrupted, RankError, check_positive
from vqvae_lightning.jobs.launcher import Job, _JobLauncher


class JoblibLauncher(_JobLauncher):
    """Run jobs side by side, each in a process with a share of the threads and a GPU of its own.

    Args:
        n_jobs: Jobs at a time; None for one per GPU, or per CPU core where there is no GPU.
    """

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run them all.

        Raises:
            InputError: If there are fewer GPUs than jobs at a time.
            Interrupted: If the sweep was told to stop.
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

        gpus = visible_gpus()
        count = self.n_jobs
        if count is None:
            count = len(gpus) or _usable_cores()
        check_positive("hydra.launcher.n_jobs", count)
        if gpus and count > len(gpus):
            raise InputError(
                f"hydra.launcher.n_jobs={count} must be at most {len(gpus)}, the GPUs of this "
                "machine: each job has its own."
            )
        count = min(count, len(job_overrides))
        jobs = self.jobs(job_overrides, initial_job_idx)
        share = [gpus[number::count] for number in range(count)] if gpus else []
        with tempfile.TemporaryDirectory() as place, _pass_signals_on(Path(place)) as asked:
            pool = joblib.Parallel(
                n_jobs=count,
                backend="loky",
                batch_size=1,
                pre_dispatch=count,  # so that none waits in a worker when the sweep is to stop
                initializer=_start_worker,
                initargs=(place, share),
            )
            todo = (job for job in jobs if not asked)
            try:
                done = list(pool(joblib.delayed(_end)(job) for job in todo))
            except TerminatedWorkerError as error:
                if not asked:
                    raise RankError(
                        "a process that ran a job was killed, for want of memory perhaps, and the "
                        "others with it: start the same command again with resume=auto."
                    ) from error
                done = []
        stops = [end for end in done if isinstance(end, Interrupted)]
        if asked or stops:
            status = next((stop.status for stop in stops), 130)
            raise Interrupted(
                "Interrupted; the jobs have saved what they had. Go on with the same command, "
                "resume=auto and hydra.sweep.dir=FOLDER.",
                status,
            )
        return done


def _end(job: Job) -> JobReturn | Interrupted:
    """Run a job in a worker; being told to stop is no error, or joblib would kill the others."""
    try:
        return job.run()
    except Interrupted as stop:
        return stop


@contextmanager
def _pass_signals_on(place: Path) -> Iterator[list[int]]:
    """Pass signals to stop on to the workers, which save, instead of dying of them.

    Args:
        place: The folder with a file for each worker, named by its process.

    Yields:
        The signals that have come. At a second Ctrl-C all ends at once.
    """
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)
        for worker in place.glob("*.worker"):
            with suppress(ProcessLookupError):
                # Not SIGINT, which the terminal has sent to them already.
                os.kill(int(worker.stem), signal.SIGTERM)

    names = ("SIGINT", "SIGTERM", "SIGUSR2")  # Windows lacks the last one
    wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_worker(place: str, shares: list[list[str]]) -> None:
    Path(place, f"{os.getpid()}.worker").touch()
    take_gpus(place, shares)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[: torch.cuda.device_count()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]


def _usable_cores() -> int:
    """Cores that this process may use; all of them where, as on macOS, the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_taken: list[Any] = []


def _lock(file: Any) -> None:
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
    """Make this process see one of the `shares` of GPUs, which no other living process has.

    Locks on files, and not a queue: a worker that joblib replaces gives its share back.

    Args:
        locks: A folder that the processes share.
        shares: Names of GPUs; none to leave everything as it is.

    Raises:
        RankError: If all are taken.
    """
    for number, share in enumerate(shares):
        file = Path(locks, str(number)).open("w")  # noqa: SIM115  (closed with the process)
        try:
            _lock(file)
        except OSError:
            file.close()
            continue
        _taken.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        return
    if shares:
        raise RankError("every GPU is taken by another job of the sweep.")
