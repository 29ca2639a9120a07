"""What a sweep has beside its jobs: a study that goes on, failures told at its end, a report."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback

from vqvae_lightning.errors import Failed, InputError
from vqvae_lightning.runs.claims import SWEEP_CLAIM, claim_folder, new_folder
from vqvae_lightning.runs.failures import FAILURE

OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"

# What Optuna says of a key that had another kind of interval, or other choices.
OTHER_SPACE = (
    "Cannot set different distribution",
    "CategoricalDistribution does not support dynamic",
)


class Sweep(Callback):
    """Hydra's callback of every command: folders of their own, and a study that is continued.

    Attributes:
        folder: Of the sweep that this process has begun; None if it has not.
        failed_before: What failed jobs of an earlier start left there, and when.
        held: Releases the claim on the sweep's folder.
    """

    folder: ClassVar[Path | None] = None
    failed_before: ClassVar[set[tuple[Path, int]]] = set()
    held: ClassVar[ExitStack] = ExitStack()

    @classmethod
    def forget(cls) -> None:
        """Before and after a command, because one process may run several."""
        cls.folder, cls.failed_before = None, set()
        cls.held.close()

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """Choose the folder of a single run.

        Raises:
            Failed: If it cannot be made.
        """
        try:
            _choose_folder(config, "run")
        except Exception as error:
            raise Failed(error) from error

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Choose and claim the folder of a sweep, and look at it before its first job.

        Raises:
            Failed: If another command holds the folder, or the sweeper is Optuna's and is not
                installed; Hydra would only warn of another exception.
        """
        from vqvae_lightning.report.sweep import job_folders

        try:
            _choose_folder(config, "sweep")
            folder = Path(config.hydra.sweep.dir).absolute()
            Sweep.held.enter_context(claim_folder(folder, name=SWEEP_CLAIM))
            Sweep.folder = folder
            Sweep.failed_before = {mark for job in job_folders(folder) for mark in _failed(job)}
            if config.hydra.sweeper._target_ == OPTUNA:
                continue_study(config)
        except Exception as error:
            raise Failed(error) from error


def _choose_folder(config: Any, kind: str) -> None:
    """Make the default folder of a new run or sweep; a second one in the same second gets another.

    Args:
        config: Config of the command, with its `hydra` node; changed in place.
        kind: `run` or `sweep`.
    """
    from omegaconf import OmegaConf, read_write

    place = config.hydra[kind]
    written = OmegaConf.to_container(place, resolve=False)
    assert isinstance(written, dict)
    # A folder that the user names may be one that a run is in.
    if not written["dir"].startswith("${run_folder:") or config.resume not in (None, "auto"):
        return
    chosen = str(new_folder(Path(place.dir)))
    with read_write(config):
        place.dir = chosen
        # The config of a sweep's job is composed from these.
        quoted = chosen.replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.overrides.hydra.append(f"hydra.{kind}.dir='{quoted}'")


def continue_study(config: Any) -> None:
    """Make Optuna's sweeper go on with the study that is in the sweep's folder, if there is one.

    The plugin would begin again: with its first draws, in the folders of the first jobs. Here the
    trials that an interruption left come first, with their values and in their folders, and only
    what is missing of `n_trials` is drawn. A trial's number is its job's folder. One process at a
    time may work on a study.

    Args:
        config: The sweep's, with its `hydra` node; changed in place.

    Raises:
        InputError: If the plugin is not installed, or a value is given for what the interrupted
            trial has drawn.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf, open_dict, read_write

    from vqvae_lightning.randomness import derive_seed

    logging.getLogger("alembic").setLevel(logging.WARNING)  # of the study's tables
    # About Optuna's use of SQLAlchemy, which the version that it needs still allows.
    os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
        import optuna
        from optuna.trial import TrialState
    except ImportError as error:
        raise InputError(
            f"hydra/sweeper=optuna needs the extra optuna (uv sync --extra optuna): {error}"
        ) from error
    hydra = config.hydra
    Path(hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(
        study_name=hydra.sweeper.study_name,
        storage=hydra.sweeper.storage,
        direction=hydra.sweeper.direction,
        load_if_exists=True,
    )
    trials = study.trials
    waiting = []
    given = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    fixed = {text.get_key_element() for text in given if not text.is_sweep_override()}
    for trial in (trial for trial in trials if not trial.state.is_finished()):
        # One that was drawn but never composed would stop each sweep again.
        begun = (Path(hydra.sweep.dir) / str(trial.number) / "config.yaml").is_file()
        for key in fixed & set(trial.params) if begun else ():
            raise InputError(
                f"{key} is searched by the study in {hydra.sweep.dir}, whose trial "
                f"{trial.number} was interrupted: let it finish, or choose another "
                "hydra.sweep.dir or hydra.sweeper.study_name."
            )
        state = TrialState.WAITING if begun else TrialState.FAIL
        study._storage.set_trial_state(trial._trial_id, state)
        waiting += [trial.number] if begun else []
    finished = sum(trial.state == TrialState.COMPLETE for trial in trials)
    with read_write(config), open_dict(config):
        hydra.sweeper.n_trials = max(0, hydra.sweeper.n_trials - finished)
        seed = OmegaConf.select(hydra.sweeper, "sampler.seed")
        if seed is not None:
            # Or it would repeat its first draws.
            hydra.sweeper.sampler.seed = derive_seed(seed, "trials", len(trials)) % 2**32
        # Also in the config of each job, which Hydra composes from these lists.
        number = f"${{trial_number:${{hydra.job.num}},{waiting},{len(trials)}}}"
        hydra.overrides.hydra.append(f"hydra.sweep.subdir='{number}'")
        if not any(text.startswith("resume=") for text in hydra.overrides.task):
            hydra.overrides.task.append("resume=auto")


@contextmanager
def report_sweep(one_line: Callable[[BaseException], str], full: bool) -> Iterator[None]:
    """End a sweep with its report and a line for each failed job; nothing after a single run.

    Args:
        one_line: Makes one line of an error.
        full: Raise the error with which Hydra ends the sweep, even if it has been told.

    Raises:
        SystemExit: With status 1, if all there is to say of the error has been told.
    """
    Sweep.forget()
    try:
        yield
    except Exception as error:
        if Sweep.folder is None:
            raise
        if isinstance(error, ValueError) and str(error).startswith(OTHER_SPACE):
            raise InputError(
                f"the study in {Sweep.folder} searches other values: choose another "
                f"hydra.sweep.dir, or hydra.sweeper.study_name ({error})"
            ) from error
        told = _tell(Sweep.folder, one_line(error))
        _report(Sweep.folder)
        if full or not told:
            raise
        sys.exit(1)
    else:
        if Sweep.folder is not None:
            _tell(Sweep.folder, None)
            _report(Sweep.folder)
    finally:
        Sweep.forget()


def _tell(folder: Path, error: str | None) -> bool:
    """List the jobs that failed in this sweep; True if nothing of `error` is left to say."""
    from vqvae_lightning.report.sweep import job_folders
    from vqvae_lightning.runs.failures import read_failure
    from vqvae_lightning.runs.results import read_result

    jobs = list(job_folders(folder))
    failures = {job: read_failure(job) for job in jobs if _failed(job) - Sweep.failed_before}
    finished = sum(read_result(job) is not None for job in jobs)
    if not failures:
        return False
    sys.stderr.write(f"{finished} jobs finished, {len(failures)} failed:\n")
    for job, failure in failures.items():
        assert failure is not None
        chosen = " ".join(failure.overrides)
        sys.stderr.write(f"  job {job.relative_to(folder)} ({chosen}): {failure.error}\n")
    sys.stderr.write(f"Where in the code: {FAILURE} in the folder of each, below {folder}\n")
    return not finished or error in [failure.error for failure in failures.values() if failure]


def _failed(job: Path) -> set[tuple[Path, int]]:
    path = job / FAILURE
    return {(path, path.stat().st_mtime_ns)} if path.is_file() else set()


def _report(folder: Path) -> None:
    """Write the sweep's report; a sweep does not fail for want of it."""
    from vqvae_lightning.console import console
    from vqvae_lightning.report.sweep import job_folders, write_sweep_report

    if not any(job_folders(folder)):
        return
    try:
        paths = write_sweep_report(folder)
    except Exception as error:
        message = f"warning: no report of the sweep: {type(error).__name__}: {error}"
        console.print(message, highlight=False, markup=False)
        return
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
