"""What all commands share: from the composed config to the exit status.

A command's own file holds only its work. `command` claims the folder, starts or resumes the run,
handles signals, prints the result and reports an error in one line.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from vqvae_lightning.configs import CONF_DIR, register_resolvers
from vqvae_lightning.errors import (
    DivergenceError,
    Failed,
    InputError,
    Interrupted,
    RankError,
    join_lines,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Messages of Lightning and torch about choices that are intended here, or that no user can change.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # images are in memory: a worker would only copy them
    ".*exists and is not empty.*",  # checkpoints of the run that is being resumed
    ".*log directory.*",
    ".*isinstance.treespec, LeafSpec.*",  # a deprecation within torch, reached through Lightning
    ".*in eval mode at the start of training.*",  # the averaged weights, or a frozen network
    ".*Trainer already configured with model summary.*",
    ".*You are resuming from a checkpoint that was saved before the epoch ended.*",  # supported
    ".*lr_scheduler.step.*",  # first step after resuming: the schedule was restored before it
    ".*GPU available but not used.*",
    ".*smaller than the logging interval.*",  # curves are over steps, not within an epoch
    ".*no `validation_step`.*",  # the classifier is evaluated on test images
    ".*sync_dist=True.*",  # torchmetrics has already reduced over the ranks
)


class Outcome(NamedTuple):
    """What a command prints at its end, and what it returns to a sweep."""

    title: str = ""
    metrics: dict[str, dict[str, Any]] | None = None
    """Rows of the table, `{name: {value, unit}}` as in `result.json`; None for no table."""
    lines: Sequence[str | Path] = ()
    """Printed below the table, such as the paths of the output files."""
    objective: float | None = None
    """The objective of a sweep."""


def command(
    name: str, config: str, parts: Sequence[str] = ()
) -> Callable[[Callable[["DictConfig"], Outcome | None]], Callable[[], None]]:
    """Turn a function of a run's config into a command.

    The function gets the config of the run that was started or resumed. It returns None if there
    is nothing to print.

    Args:
        name: Name on the command line, such as `vqvae-train`.
        config: Primary config in `conf/`; `--config-name` chooses another.
        parts: Folders in the run's folder that no other command may use while this one runs.

    Returns:
        A decorator.
    """

    def decorate(work: Callable[["DictConfig"], Outcome | None]) -> Callable[[], None]:
        def main() -> None:
            # Launchers and the sweep's report are imported when a command starts, because
            # importing a command's module must cost little.
            from vqvae_lightning.jobs.ranks import lead_ranks
            from vqvae_lightning.jobs.registry import register_plugins
            from vqvae_lightning.jobs.sweeps import report_sweep

            register_resolvers()
            register_plugins()
            run = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config)(
                lambda cfg: _run(work, name, parts, cfg)
            )
            with _exit_with_one_line() as full:
                sys.argv[1:] = _translate_arguments(sys.argv[1:])
                with report_sweep(_one_line, full):
                    lead_ranks(run)

        main.__doc__ = work.__doc__
        return main

    return decorate


def silence_warnings() -> None:
    """Silence the warnings of Lightning and torch that no user can act on."""
    import pytorch_lightning as pl

    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Lightning sets a level when it is imported.
    logging.getLogger(pl.__name__).setLevel(logging.WARNING)


def _run(
    work: Callable[["DictConfig"], Outcome | None],
    name: str,
    parts: Sequence[str],
    cfg: "DictConfig",
) -> float | None:
    """Run a command on its composed config; returns the objective of a sweep."""
    from vqvae_lightning.jobs.ranks import connection_lost
    from vqvae_lightning.jobs.signals import handle_signals
    from vqvae_lightning.runs.claims import claim_folder
    from vqvae_lightning.runs.resume import begin_or_resume

    def sweep_continues() -> bool:
        return HydraConfig.get().mode == RunMode.MULTIRUN and not connection_lost()

    folder = Path(cfg.folder)
    outcome = None
    try:
        with (
            handle_signals(name, folder),
            claim_folder(folder, parts),
            _record_failure(sweep_continues),
        ):
            silence_warnings()
            outcome = work(begin_or_resume(name, cfg))
            if outcome is not None:
                _print_outcome(outcome)
    except Exception as error:
        # In a sweep, Hydra runs the remaining jobs and raises at the end.
        if sweep_continues():
            raise
        raise Failed(error) from error
    if cfg.get("preflight") and not any(folder.iterdir()):
        folder.rmdir()  # made by Hydra for a run that was only checked
    return None if outcome is None else outcome.objective


@contextmanager
def _record_failure(sweep_continues: Callable[[], bool]) -> Iterator[None]:
    """Write `failure.txt` into the folder of a sweep's job if the block fails."""
    from vqvae_lightning.runs.failures import write_failure
    from vqvae_lightning.runs.folder import RunFolder

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    RunFolder(folder).failure.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if sweep_continues():
            trace = "".join(traceback.format_exception(error))
            write_failure(folder, _one_line(error), list(hydra.overrides.task), trace)
        raise


def _print_outcome(outcome: Outcome) -> None:
    from rich.table import Table

    from vqvae_lightning.console import console

    if outcome.metrics is not None:
        table = Table(title=outcome.title, title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("unit")
        for key, entry in outcome.metrics.items():
            table.add_row(key, f"{entry['value']:.5g}", entry["unit"])
        console.print(table)
    for line in outcome.lines:
        console.print(str(line), soft_wrap=True, highlight=False)


def _translate_arguments(given: list[str]) -> list[str]:
    """Translate a command line into overrides that Hydra accepts.

    Hydra has no `--dry-run`, and uses a launcher only for a sweep.

    Raises:
        InputError: If the arguments do not go together.
    """
    arguments = list(given)
    if "--dry-run" in arguments:
        if "hydra/launcher=slurm" not in arguments:
            raise InputError("--dry-run shows what hydra/launcher=slurm would submit: add that.")
        arguments[arguments.index("--dry-run")] = "hydra.launcher.dry_run=true"
    if {"hydra/launcher=slurm", "hydra/launcher=joblib"} & set(arguments):
        for text in arguments:
            if text.startswith("resume=") and text != "resume=auto":
                raise InputError(
                    f"{text}: a launcher starts a sweep; to resume one, repeat its command with "
                    "resume=auto and hydra.sweep.dir=FOLDER."
                )
        arguments.append("hydra.mode=MULTIRUN")
    return arguments


@contextmanager
def _exit_with_one_line() -> Iterator[bool]:
    """Exit with a status, and one line on stderr, if the block fails or is interrupted.

    Yields:
        Whether the user asked for tracebacks by setting HYDRA_FULL_ERROR.
    """
    full = os.environ.get("HYDRA_FULL_ERROR")
    # Without it, Hydra prints an error in its own words instead of raising it.
    os.environ["HYDRA_FULL_ERROR"] = full or "1"
    try:
        yield full is not None
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    except (Failed, Exception) as failure:
        error = failure.error if isinstance(failure, Failed) else failure
        if full:
            raise error from None
        line = _explain(error)
        if line is None:
            traceback.print_exception(error)
        else:
            sys.stderr.write(f"error: {line}\n")
        sys.exit(1)
    finally:
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _one_line(error: BaseException) -> str:
    return _explain(error) or f"{type(error).__name__}: {join_lines(error)}"


def _explain(error: BaseException) -> str | None:
    """Describe in one line an error that the user can fix; None if it is a bug of this package."""
    from hydra.errors import HydraException
    from omegaconf.errors import (
        ConfigAttributeError,
        ConfigKeyError,
        MissingMandatoryValue,
        OmegaConfBaseException,
    )

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, InputError | DivergenceError | RankError):
            return str(link)
    for link in chain:
        if isinstance(link, ConfigKeyError | ConfigAttributeError) and link.parent_node is not None:
            parent = link.full_key.rpartition(".")[0] if link.full_key else ""
            names = ", ".join(sorted(map(str, link.parent_node)))
            return f"unknown key {link.full_key}; accepted in {parent or 'the config'}: {names}"
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key} must be given: {link.full_key}=VALUE"
    if isinstance(error, HydraException | OmegaConfBaseException | PermissionError | OSError):
        return join_lines(error)
    return None
