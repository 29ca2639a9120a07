"""How every command starts and ends: configs found, warnings silenced, errors in one line."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqvae_lightning.configs import CONF_DIR, register_resolvers
from vqvae_lightning.errors import DivergenceError, Failed, InputError, Interrupted, RankError
from vqvae_lightning.jobs.ranks import connection_lost, lead_ranks
from vqvae_lightning.runs.claims import claim_folder

# Lightning's and torch's notices about choices that are right here and that a user can do nothing
# about.
QUIET = (
    ".*does not have many workers.*",  # images are in memory: a worker would only copy them
    ".*exists and is not empty.*",  # checkpoints of the run that is being resumed
    ".*log directory.*",
    ".*isinstance.treespec, LeafSpec.*",  # torch's own deprecation, met inside Lightning
    ".*in eval mode at the start of training.*",  # the averaged weights, or a frozen network
    ".*Trainer already configured with model summary.*",
    ".*You are resuming from a checkpoint that was saved before the epoch ended.*",  # ours can
    ".*lr_scheduler.step.*",  # first step after resuming: the schedule was restored before it
    ".*GPU available but not used.*",
    ".*smaller than the logging interval.*",  # the curve is over steps, not within an epoch
    ".*no `validation_step`.*",  # the classifier is judged on test images
    ".*sync_dist=True.*",  # torchmetrics has reduced over the ranks already
)


def app(
    config_name: str, parts: Sequence[str] = ()
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Make a command out of a function of the composed config.

    Args:
        config_name: Primary config in `conf/`; `--config-name` chooses another.
        parts: Folders below the run's that no other command may use while this one runs.

    Returns:
        A decorator. What the function returns is the objective of a sweep.
    """

    def decorate(function: Callable[[Any], Any]) -> Callable[[], None]:
        def command() -> None:
            import hydra

            from vqvae_lightning.jobs.registry import register_launchers
            from vqvae_lightning.jobs.sweeps import report_sweep

            register_resolvers()
            register_launchers()
            full = os.environ.get("HYDRA_FULL_ERROR")
            # Hydra prints its own account of an error unless this is set; `_explain` makes one line
            # of it.
            os.environ["HYDRA_FULL_ERROR"] = full or "1"
            main = hydra.main(
                version_base="1.3", config_path=str(CONF_DIR), config_name=config_name
            )
            try:
                sys.argv[1:] = _arguments(sys.argv[1:])
                with report_sweep(_one_line, full is not None):
                    lead_ranks(main(_guard(function, parts)))
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

        command.__doc__ = function.__doc__
        return command

    return decorate


def _arguments(given: list[str]) -> list[str]:
    """The command line in Hydra's words, which knows no --dry-run and launchers in sweeps only."""
    arguments = list(given)
    if "--dry-run" in arguments:
        if "hydra/launcher=slurm" not in arguments:
            raise InputError("--dry-run shows what hydra/launcher=slurm would submit: add that.")
        arguments[arguments.index("--dry-run")] = "hydra.launcher.dry_run=true"
    if {"hydra/launcher=slurm", "hydra/launcher=joblib"} & set(arguments):
        for text in arguments:
            if text.startswith("resume=") and text != "resume=auto":
                raise InputError(
                    f"{text}: a launcher starts a sweep; go on with one by the same command, "
                    "resume=auto and hydra.sweep.dir=FOLDER."
                )
        arguments.append("hydra.mode=MULTIRUN")
    return arguments


def silence_warnings() -> None:
    """Silence notices that a user can do nothing about."""
    import pytorch_lightning as pl

    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    # After its import, which sets a level of its own.
    logging.getLogger(pl.__name__).setLevel(logging.WARNING)


def print_result(title: str, result: dict[str, Any], paths: list[Path]) -> None:
    """End a command: a short table of its figures and where things lie."""
    from rich.table import Table

    from vqvae_lightning.console import console

    table = Table(title=title, title_justify="left")
    for column, side in (("figure", "left"), ("value", "right"), ("unit", "left")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for key, entry in result["metrics"].items():
        table.add_row(key, f"{entry['value']:.5g}", entry["unit"])
    console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)


def _guard(function: Callable[[Any], Any], parts: Sequence[str]) -> Callable[[Any], Any]:
    """`function`, run while this process alone holds the folder, with its failure kept there."""

    def run(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            with claim_folder(Path(cfg.folder), parts):
                result = _attempt(function, cfg)
        except Exception as error:
            # In a sweep Hydra goes on with the next job and raises at the end.
            if HydraConfig.get().mode == RunMode.MULTIRUN and not connection_lost():
                raise
            raise Failed(error) from error
        if cfg.get("preflight"):
            _leave_nothing(Path(cfg.folder))
        return result

    return run


def _attempt(function: Callable[[Any], Any], cfg: Any) -> Any:
    """Run one command; in a sweep, write `failure.txt` if it fails."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from vqvae_lightning.runs.failures import FAILURE, write_failure

    silence_warnings()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        return function(cfg)
    except Exception as error:
        if hydra.mode == RunMode.MULTIRUN and not connection_lost():
            trace = "".join(traceback.format_exception(error))
            write_failure(folder, _one_line(error), list(hydra.overrides.task), trace)
        raise


def _leave_nothing(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that was only checked."""
    if not any(folder.iterdir()):
        folder.rmdir()


def _one_line(error: BaseException) -> str:
    return _explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"


def _explain(error: BaseException) -> str | None:
    """The error in one line for a user, or None for one that is ours to mend."""
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
        return " ".join(str(error).split())
    return None
