"""`hydra/sweeper=optuna`: Optuna suggests the values of a sweep's jobs, in a study that resumes.

Each trial is one job. Its number in the study is the name of the job's folder, so an interrupted
trial is rerun in its own folder and resumes from its checkpoint.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import InstantiationException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from vqvae_lightning.errors import InputError, check_positive, check_range, join_lines
from vqvae_lightning.files import write_text
from vqvae_lightning.runs.folder import RunFolder

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

BEST = "optimization_results.yaml"


class Suggestion(NamedTuple):
    """One trial of the study, as a job.

    Attributes:
        number: Trial's number in the study, and the name of its job's folder.
        values: Suggested value of each searched key.
    """

    number: int
    values: dict[str, Any]


class OptunaSweeper(Sweeper):
    """Run jobs with suggested values until the study has `n_trials` finished trials.

    A study resumes when a command uses its storage and name again: finished trials count,
    interrupted trials run again with their own values, and new trials replace the failed ones.

    Args:
        sampler: Config of a class of `optuna.samplers`. Its seed is combined with the number of
            trials in the study, because a resumed study would otherwise repeat its first values.
        direction: `minimize` or `maximize` the objective of the jobs.
        storage: Database URL; None keeps the study in memory, so that it cannot resume.
        study_name: Name of the study in the storage.
        n_trials: Finished trials that the study shall have, including those of earlier starts.
        n_jobs: Trials passed to the launcher at a time.
        max_failure_rate: Share of failed jobs among `n_jobs` above which the sweep ends.
        custom_search_space: Import path of a function `(config, trial) -> None` that calls
            `trial.suggest_*` for further keys; None for none.
        params: Search space: each key's `interval(...)`, `range(...)` or `choice(...)`. Overrides
            on the command line replace these. A single value fixes its key.
    """

    def __init__(
        self,
        *,
        sampler: DictConfig,
        direction: Literal["minimize", "maximize"],
        storage: str | None,
        study_name: str | None,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        custom_search_space: str | None,
        params: DictConfig,
    ) -> None:
        self.sampler = sampler
        self.direction = direction
        self.storage = storage
        self.study_name = study_name
        self.n_trials = check_positive("hydra.sweeper.n_trials", n_trials)
        self.n_jobs = check_positive("hydra.sweeper.n_jobs", n_jobs)
        self.max_failure_rate = check_range(
            "hydra.sweeper.max_failure_rate", max_failure_rate, 0, 1
        )
        try:
            self.suggest = None if custom_search_space is None else get_method(custom_search_space)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"hydra.sweeper.custom_search_space={custom_search_space} must be the import path "
                f"of a function: {join_lines(error)}"
            ) from error
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Instantiate the launcher that runs the jobs."""
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the missing trials, interrupted ones first, and write the best one's values.

        Args:
            arguments: Overrides on the command line.

        Raises:
            InputError: If Optuna is not installed, or the search space or another option cannot
                work with Optuna or with this study.
        """
        try:
            import optuna
        except ImportError as error:
            raise InputError(
                f"hydra/sweeper=optuna needs the extra optuna (uv sync --extra optuna): {error}"
            ) from error
        optuna.logging.set_verbosity(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # creates the database's tables
        space, fixed = read_space([*(f"{k!s}={v}" for k, v in self.params.items()), *arguments])
        study = self._open_study()
        for trial in study.trials:
            _check_space(self.folder, trial.distributions, space)
        interrupted = self._find_interrupted(study, fixed)
        states = [trial.state for trial in study.trials]
        missing = self.n_trials - states.count(optuna.trial.TrialState.COMPLETE)
        while missing > 0:
            count = min(self.n_jobs, missing)
            batch, interrupted = interrupted[:count], interrupted[count:]
            while len(batch) < count:
                batch.append(self._ask(study, space, fixed))
            self._run(study, batch, fixed)
            missing -= count
        self._write_best(study)

    def _open_study(self) -> "Study":
        """Load the study, or create it.

        Raises:
            InputError: If Optuna refuses the sampler, the storage or the direction.
        """
        import optuna

        if self.direction not in ("minimize", "maximize"):
            raise InputError(
                f"hydra.sweeper.direction={self.direction} must be minimize or maximize."
            )
        self.folder.mkdir(parents=True, exist_ok=True)  # SQLite creates no folders
        try:
            study = optuna.create_study(
                study_name=self.study_name,
                storage=self.storage,
                direction=self.direction,
                load_if_exists=True,
            )
        except Exception as error:  # raised by Optuna, SQLAlchemy or the database's driver
            raise InputError(
                f"hydra.sweeper.storage={self.storage} cannot be used: {join_lines(error)}"
            ) from error
        known = study.direction.name.lower()
        if known != self.direction:
            raise InputError(
                f"hydra.sweeper.direction={self.direction} must be {known}, as in the earlier "
                f"trials of the study in {self.folder}: choose another hydra.sweep.dir or "
                "hydra.sweeper.study_name."
            )
        # Not at the top: it imports torch, and every command's --help imports this module.
        from vqvae_lightning.randomness import derive_seed

        options = dict(self.sampler)
        if options.get("seed") is not None:
            check_range("hydra.sweeper.sampler.seed", options["seed"], 0)
            options["seed"] = derive_seed(options["seed"], "trials", len(study.trials)) % 2**32
        try:
            study.sampler = instantiate(options)
        except InstantiationException as error:
            raise InputError(f"hydra.sweeper.sampler: {join_lines(error)}") from error
        return study

    def _find_interrupted(self, study: "Study", fixed: dict[str, Override]) -> list[Suggestion]:
        """Trials of earlier starts that began and neither finished nor failed.

        A trial whose job never wrote its config is marked as failed: what stopped it, such as
        values that do not compose, could stop every later start as well.

        Raises:
            InputError: If a fixed key has another value in an interrupted trial.
        """
        from optuna.trial import TrialState

        found = []
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            if not RunFolder(self.folder / str(trial.number)).is_begun:
                study.tell(trial.number, state=TrialState.FAIL)
                continue
            for key in fixed.keys() & trial.params.keys():
                raise InputError(
                    f"{key} is searched by the study in {self.folder}, whose trial "
                    f"{trial.number} was interrupted: let it finish, or choose another "
                    "hydra.sweep.dir or hydra.sweeper.study_name."
                )
            found.append(Suggestion(trial.number, trial.params))
        return found

    def _ask(
        self, study: "Study", space: dict[str, "BaseDistribution"], fixed: dict[str, Override]
    ) -> Suggestion:
        """Create a trial, with the fixed values as its user attributes.

        Raises:
            InputError: If `custom_search_space` suggests a fixed key.
        """
        trial = study.ask(space)
        for key, override in fixed.items():
            trial.set_user_attr(key, override.get_value_element_as_str())
        if self.suggest is not None:
            self.suggest(self.config, trial)
        for key in fixed.keys() & trial.params.keys():
            raise InputError(
                f"{key}: hydra.sweeper.custom_search_space suggests it, but it has a fixed value."
            )
        return Suggestion(trial.number, trial.params)

    def _run(self, study: "Study", batch: Sequence[Suggestion], fixed: dict[str, Override]) -> None:
        """Run trials through the launcher, and report their objectives to the study.

        Raises:
            Exception: That of the first failed job, if more than `max_failure_rate` have failed.
        """
        common = [str(override.input_line) for override in fixed.values()]
        if "resume" not in fixed:
            common.append("resume=auto")
        jobs = [
            [
                *(f"{key}={value}" for key, value in trial.values.items()),
                *common,
                f"hydra.sweep.subdir={trial.number}",
            ]
            for trial in batch
        ]
        assert self.launcher is not None
        results = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
        failures = []
        for trial, result in zip(batch, results, strict=True):
            failure = _report_objective(study, trial, result)
            if failure is not None:
                log.warning(f"trial {trial.number} failed: {join_lines(failure)}")
                failures.append(failure)
        if len(failures) > self.max_failure_rate * len(batch):
            raise failures[0]

    def _write_best(self, study: "Study") -> None:
        """Write the best trial's values and objective into the sweep's folder.

        Raises:
            InputError: If no trial has finished.
        """
        try:
            best = study.best_trial
        except ValueError as error:
            raise InputError(f"no trial of the study in {self.folder} has finished.") from error
        log.info(f"best trial {best.number}: objective {best.value}, {best.params}")
        entries = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        write_text(self.folder / BEST, OmegaConf.to_yaml(OmegaConf.create(entries)))


def read_space(
    texts: Sequence[str],
) -> tuple[dict[str, "BaseDistribution"], dict[str, Override]]:
    """Read overrides as a search space and fixed values; the last override of a key counts.

    Args:
        texts: Overrides in Hydra's syntax.

    Returns:
        Distribution of each searched key, and the override of each fixed key.

    Raises:
        InputError: If Optuna cannot search the values of an override.
    """
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, Override] = {}
    for override in OverridesParser.create().parse_overrides(list(texts)):
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = override
            continue
        try:
            space[key] = _make_distribution(override)
        except ValueError as error:
            raise InputError(f"{override.input_line}: {join_lines(error)}") from error
    return space, fixed


def _make_distribution(override: Override) -> "BaseDistribution":
    """Optuna's distribution for `choice(...)`, `range(...)` or `interval(...)`.

    Both ends of a range and of an interval belong to it. Two integers make an interval of integers.

    Raises:
        ValueError: If the override has other values, or Optuna refuses them.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, RangeSweep) and not value.shuffle:
        assert value.start is not None
        assert value.stop is not None
        limits = (value.start, value.stop, value.step)
        if all(isinstance(limit, int) for limit in limits):
            return IntDistribution(int(value.start), int(value.stop), step=int(value.step))
        return FloatDistribution(value.start, value.stop, step=value.step)
    if isinstance(value, ChoiceSweep | RangeSweep):
        choices: list[Any] = list(override.sweep_iterator(transformer=Transformer.encode))
        return CategoricalDistribution(choices)
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        logarithmic = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=logarithmic)
        return FloatDistribution(value.start, value.end, log=logarithmic)
    raise ValueError("Optuna searches choice(...), range(...) and interval(...).")


def _check_space(
    folder: Path, known: dict[str, "BaseDistribution"], space: dict[str, "BaseDistribution"]
) -> None:
    """Refuse a search space of another kind than an earlier trial had.

    Optuna accepts other limits of a range or an interval, but no other choices.

    Raises:
        InputError: With the key.
    """
    from optuna.distributions import check_distribution_compatibility

    for key in known.keys() & space.keys():
        try:
            check_distribution_compatibility(known[key], space[key])
        except ValueError as error:
            raise InputError(
                f"{key}: the study in {folder} searches other values: choose another "
                f"hydra.sweep.dir or hydra.sweeper.study_name ({join_lines(error)})"
            ) from error


def _report_objective(study: "Study", trial: Suggestion, result: JobReturn) -> Exception | None:
    """Report a job's objective to the study.

    Returns:
        The job's error, with which the trial is marked as failed; None if it has an objective.
    """
    from optuna.trial import TrialState

    try:
        returned = result.return_value
        if not isinstance(returned, int | float) or math.isnan(returned):
            raise InputError(f"the job's objective is {returned}, which is no number.")
    except Exception as error:
        study.tell(trial.number, state=TrialState.FAIL)
        return error
    study.tell(trial.number, float(returned))
    return None
