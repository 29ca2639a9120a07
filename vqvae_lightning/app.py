"""How every command starts and how it ends: configs found, warnings quiet, errors in one line."""

import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqvae_lightning.claims import claimed
from vqvae_lightning.configs import CONF_DIR, note_foreign, read_trusted, register_resolvers
from vqvae_lightning.errors import (
    DivergenceError,
    Failed,
    InputError,
    Interrupted,
    RankError,
    below,
    check_range,
)
from vqvae_lightning.launch import beyond_repair, led
from vqvae_lightning.trust import DATA, Trust, names

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

            from vqvae_lightning.launchers import register_launchers
            from vqvae_lightning.sweeps import summed_up

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
                with summed_up(_one_line, full is not None):
                    led(main(_guarded(function, parts)))
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


def quiet() -> None:
    """Silence notices that a user can do nothing about."""
    import pytorch_lightning as pl

    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    # After its import, which sets a level of its own.
    logging.getLogger(pl.__name__).setLevel(logging.WARNING)


def started(name: str, cfg: Any) -> Any:
    """The config of the run that `cfg` starts, or of the one that it resumes.

    A job that Slurm has started again goes on with its own run, as with `resume=auto`.

    Args:
        name: The command, for `config.yaml` and for the line that says how to repeat the run.
        cfg: The composed config.

    Raises:
        InputError: If `resume` comes with other overrides than the run began with.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from vqvae_lightning.results import SECONDS, checkout_commit

    hydra = HydraConfig.get()
    check_range("seed", cfg.seed, 0)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if cfg.resume in (None, "auto"):
        chosen = hydra.job.config_name
        config = "" if chosen in ("vqvae", "pipeline") else f"--config-name {chosen} "
        # Of a preset sweep this job is one: what repeats it has the values, not the sweep. With
        # resume=auto a later start of a command is the same command.
        given = [t for t in hydra.overrides.task if not t.startswith(("sweep=", "resume="))]
        cfg.command = f"{name} {config}{shlex.join(given)}".strip()
        cfg.commit = checkout_commit()
        note_foreign(cfg)
        if not (Path(cfg.folder) / "config.yaml").is_file():
            # Left by a command that was interrupted before its run had begun.
            (Path(cfg.folder) / SECONDS).unlink(missing_ok=True)
            return cfg
        if cfg.resume is None and not requeued:
            raise InputError(
                f"{cfg.folder} holds a run already: go on with resume={cfg.folder}, or choose "
                "another folder."
            )
        stored = stored_config(Path(cfg.folder), Path(cfg.folder), cfg.trust)
        if _values(stored.command) != _values(cfg.command):
            raise InputError(
                f"resume=auto: {cfg.folder} holds a run of another command: {stored.command}"
            )
        return stored
    others = [t for t in hydra.overrides.task if not t.startswith(("resume=", "trust="))]
    if others:
        raise InputError(
            f"resume={cfg.resume} goes on with the config in that folder; drop {' '.join(others)}"
        )
    if hydra.mode == RunMode.MULTIRUN:
        raise InputError("resume goes on with one run: drop -m.")
    stored = stored_config(Path(cfg.folder), Path(cfg.folder), names(cfg.trust))
    if str(stored.command).split()[0] != name:
        raise InputError(f"resume={cfg.resume} is a run of another command: {stored.command}")
    return stored


def _values(command: str) -> list[str]:
    """What two commands for the same run share, in any order, as a study may have it."""
    return sorted(text for text in shlex.split(command) if not text.startswith("trust="))


def stored_config(folder: Path, run: Path, trust: Iterable[str]) -> Any:
    """The config left in `folder`, the run's or one below it; moved paths follow the run.

    Raises:
        InputError: If it names code outside of this package and of `trust`.
    """
    from omegaconf import OmegaConf

    value = read_trusted(folder / "config.yaml", trust)
    if not isinstance(value.get("folder"), str):
        raise InputError(f"{folder}/config.yaml is not the config of a run.")
    old = Path(value["folder"])
    for _ in folder.relative_to(run).parts:
        old = old.parent
    renewed = OmegaConf.create(_moved(value, str(old), str(run.absolute())))
    OmegaConf.set_struct(renewed, True)
    return renewed


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(child, old, new) for key, child in value.items()}
    if isinstance(value, list):
        return [_moved(child, old, new) for child in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


def load_images(config: Any) -> Any:
    """The `PixelDataModule` of a dataset config, downloaded and set up."""
    from vqvae_lightning.configs import build

    return _set_up(build(config))


def images_of(vqvae: Any, trust: Iterable[str], way_out: str = "restore the data") -> Any:
    """The `PixelDataModule` that a VQ-VAE was trained on, as its checkpoint describes it.

    Args:
        vqvae: A `checkpoints.Loaded`.
        trust: Packages that the user trusts.
        way_out: What the user can do if the data have changed, for the message.

    Raises:
        InputError: If the checkpoint names other code, or no data, or the data have changed since.
    """
    images = Trust("the VQ-VAE's checkpoint", trust, DATA).build(
        vqvae.config.get("dataset"), "dataset"
    )
    if not hasattr(images, "prepare_data"):
        raise InputError("the VQ-VAE's checkpoint names no data: give dataset=NAME.")
    _set_up(images)
    known = vqvae.config.get("data_fingerprint")  # older checkpoints have none
    what = "the VQ-VAE's checkpoint was trained on"
    require_same_data(images, known, vqvae.config["dataset"], what, way_out)
    return images


def _set_up(images: Any) -> Any:
    with below("dataset"):
        images.prepare_data()
        images.setup()
    return images


def require_same_data(
    images: Any, known: str | None, dataset: Any, what: str, way_out: str
) -> None:
    """Refuse data that have changed since a run or a checkpoint was made from them.

    Args:
        images: The `PixelDataModule` as it is now, set up.
        known: Fingerprint of the data then; None if it was not stored, as in older runs.
        dataset: Config of the data set.
        what: Start of the message: what was made from the data.
        way_out: What the user can do, for the message.

    Raises:
        InputError: If the fingerprints differ.
    """
    if known in (None, images.fingerprint):
        return
    source = dataset.get("source") or {}
    places = {
        **{f"dataset.source.{key}": source.get(key) for key in ("path", "root")},
        **{f"dataset.{key}": dataset.get(key) for key in ("root", "train")},
    }
    key, place = next(((k, v) for k, v in places.items() if v), ("dataset", "the bundled images"))
    raise InputError(
        f"{what} data with fingerprint {known}, but {key}={place} now has "
        f"{images.fingerprint}: {way_out}."
    )


def codes_of(images: Any, vqvae: Any, path: Path, cfg: Any, batch_size: int) -> Any:
    """The `CodesDataModule` of `images` under the VQ-VAE from `path`."""
    from vqvae_lightning.checkpoints import weights_hash
    from vqvae_lightning.data import CodesDataModule

    folder = cfg.codes_dir or path.parent.parent / "codes"
    return CodesDataModule(images, vqvae, weights_hash(vqvae), str(folder), batch_size)


@contextmanager
def stoppable(name: str, cfg: Any) -> Iterator[None]:
    """Let an interruption end with the command that goes on from it.

    A scheduler's signal counts also where `LastCheckpoint` does not watch for it: while data are
    read, a checkpoint is tested, or samples are judged.
    """
    with _told_to_stop():
        try:
            yield
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:  # Lightning exits on Ctrl-C
            begun = (Path(cfg.folder) / "config.yaml").is_file()
            hint = f" Go on with: {name} resume={cfg.folder}" if begun else ""
            if isinstance(stop, Interrupted):
                raise Interrupted(f"{stop}{hint}", stop.status) from stop
            # What Lightning makes of a SIGTERM during a test.
            if type(stop).__name__ == "SIGTERMException":
                raise Interrupted(f"Stopped by SIGTERM.{hint}", 75) from stop
            raise Interrupted(f"Interrupted.{hint}") from stop


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Make an `Interrupted` of the signals with which schedulers announce the end."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}.", 75)

    # submitit has handlers of its own, which requeue; and only the main thread may have any.
    if "SUBMITIT_EXECUTOR" in os.environ or threading.current_thread() != threading.main_thread():
        yield
        return
    # Windows has no SIGUSR2.
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_result(title: str, result: dict[str, Any], paths: list[Path]) -> None:
    """End a command: a short table of its figures and where things lie."""
    from rich.table import Table

    from vqvae_lightning.progress import console

    table = Table(title=title, title_justify="left")
    for column, side in (("figure", "left"), ("value", "right"), ("unit", "left")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for key, entry in result["metrics"].items():
        table.add_row(key, f"{entry['value']:.5g}", entry["unit"])
    console.print(table)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)


def print_survey(title: str, survey: Any) -> None:
    """Show all that a `preflight.Survey` found of a stage."""
    from rich.table import Table

    from vqvae_lightning.progress import console

    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in survey.facts.items():
        table.add_row(name, text)
    console.print(table)
    for warning in survey.warnings:
        console.print(f"warning: {warning}", highlight=False)


def _guarded(function: Callable[[Any], Any], parts: Sequence[str]) -> Callable[[Any], Any]:
    """`function`, run while this process alone holds the folder, with its failure kept there."""

    def run(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            with claimed(Path(cfg.folder), parts):
                result = _attempted(function, cfg)
        except Exception as error:
            # In a sweep Hydra goes on with the next job and raises at the end.
            if HydraConfig.get().mode == RunMode.MULTIRUN and not beyond_repair():
                raise
            raise Failed(error) from error
        if cfg.get("preflight"):
            _leave_nothing(Path(cfg.folder))
        return result

    return run


def _attempted(function: Callable[[Any], Any], cfg: Any) -> Any:
    """Run one command; in a sweep, write `failure.txt` if it fails."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from vqvae_lightning.results import FAILURE, write_failure

    quiet()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        return function(cfg)
    except Exception as error:
        if hydra.mode == RunMode.MULTIRUN and not beyond_repair():
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
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
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
