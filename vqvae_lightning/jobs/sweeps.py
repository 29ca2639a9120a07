"""What a sweep has in addition to its jobs: its folder, the list of failed jobs, and the report."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from vqvae_lightning.console import console
from vqvae_lightning.errors import Failed
from vqvae_lightning.report.jobs import list_job_folders
from vqvae_lightning.runs.claims import claim_folder, new_folder
from vqvae_lightning.runs.failures import read_failure
from vqvae_lightning.runs.folder import SWEEP_CLAIM, RunFolder
from vqvae_lightning.runs.results import read_result


class Sweep(Callback):
    """Hydra callback of every command: chooses the folder of a run or sweep, and claims a sweep's.

    Attributes:
        folder: Folder of the sweep that this process runs; None before it begins.
        failed_before: `failure.txt` of each job that failed in an earlier start, and its time.
        held: Releases the claim on the sweep's folder.
    """

    folder: ClassVar[Path | None] = None
    failed_before: ClassVar[set[tuple[Path, int]]] = set()
    held: ClassVar[ExitStack] = ExitStack()

    @classmethod
    def reset(cls) -> None:
        """Release the sweep's folder; one process may run several commands."""
        cls.folder, cls.failed_before = None, set()
        cls.held.close()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of a single run.

        Raises:
            Failed: If the folder cannot be made; Hydra would only warn of another exception.
        """
        try:
            _choose_folder(config, "run")
        except Exception as error:
            raise Failed(error) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose and claim the folder of a sweep, and list the jobs that have failed there.

        Raises:
            Failed: If another command holds the folder; Hydra would only warn of another exception.
        """
        try:
            _choose_folder(config, "sweep")
            folder = Path(config.hydra.sweep.dir).absolute()
            Sweep.held.enter_context(claim_folder(folder, name=SWEEP_CLAIM))
            Sweep.folder = folder
            Sweep.failed_before = {
                mark for job in list_job_folders(folder) for mark in _find_failure(job)
            }
        except Exception as error:
            raise Failed(error) from error


def _choose_folder(config: DictConfig, kind: str) -> None:
    """Make a new folder for a run or sweep, unless the user has named one.

    Commands that start in the same second get different folders.

    Args:
        config: Config of the command, with its `hydra` node; changed in place.
        kind: `run` or `sweep`.
    """
    place = config.hydra[kind]
    written = OmegaConf.to_container(place, resolve=False)
    assert isinstance(written, dict)
    # A folder that the user names may contain a run to resume.
    if not written["dir"].startswith("${run_folder:") or config.resume not in (None, "auto"):
        return
    chosen = str(new_folder(Path(place.dir)))
    with read_write(config):
        place.dir = chosen
        # Hydra composes the config of a sweep's job from these overrides.
        quoted = chosen.replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir='{quoted}'")


@contextmanager
def report_sweep(one_line: Callable[[BaseException], str], full: bool) -> Iterator[None]:
    """End a sweep with a line for each failed job and with its report; a single run with neither.

    Args:
        one_line: Turns an error into one line.
        full: Raise the error with which Hydra ends the sweep, even if its line is printed.

    Raises:
        SystemExit: With status 1, if the printed lines say all about the error.
    """
    Sweep.reset()
    try:
        yield
    except Exception as error:
        if Sweep.folder is None:
            raise
        reported = _report_failures(Sweep.folder, one_line(error))
        _write_report(Sweep.folder)
        if full or not reported:
            raise
        sys.exit(1)
    else:
        if Sweep.folder is not None:
            _report_failures(Sweep.folder, None)
            _write_report(Sweep.folder)
    finally:
        Sweep.reset()


def _report_failures(folder: Path, error: str | None) -> bool:
    """Print a line for each job that failed in this start; True if they include `error`."""
    jobs = list(list_job_folders(folder))
    failures = {job: read_failure(job) for job in jobs if _find_failure(job) - Sweep.failed_before}
    finished = sum(read_result(job) is not None for job in jobs)
    if not failures:
        return False
    sys.stderr.write(f"{finished} jobs finished, {len(failures)} failed:\n")
    for job, failure in failures.items():
        assert failure is not None
        chosen = " ".join(failure.overrides)
        sys.stderr.write(f"  job {job.relative_to(folder)} ({chosen}): {failure.error}\n")
    name = RunFolder(folder).failure.name
    sys.stderr.write(f"Details: {name} in the folder of each failed job in {folder}\n")
    return not finished or error in [failure.error for failure in failures.values() if failure]


def _find_failure(job: Path) -> set[tuple[Path, int]]:
    path = RunFolder(job).failure
    return {(path, path.stat().st_mtime_ns)} if path.is_file() else set()


def _write_report(folder: Path) -> None:
    """Write the sweep's report; the sweep succeeds even if the report fails."""
    if not any(list_job_folders(folder)):
        return
    # Imported here because it imports matplotlib, which most commands do not need.
    from vqvae_lightning.report.sweep import write_sweep_report

    try:
        paths = write_sweep_report(folder)
    except Exception as error:
        message = f"warning: no report of the sweep: {type(error).__name__}: {error}"
        console.print(message, highlight=False, markup=False)
        return
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
