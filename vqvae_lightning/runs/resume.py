"""Start a run or resume one: which config a command works with."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vqvae_lightning.configs import read_trusted, record_foreign
from vqvae_lightning.errors import InputError, check_range
from vqvae_lightning.trust import list_packages


def begin_or_resume(name: str, cfg: Any) -> Any:
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

    from vqvae_lightning.runs.results import checkout_commit
    from vqvae_lightning.runs.stopwatch import SECONDS

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
        record_foreign(cfg)
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
    stored = stored_config(Path(cfg.folder), Path(cfg.folder), list_packages(cfg.trust))
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
    value.setdefault("kind", _derive_kind(value))
    old = Path(value["folder"])
    for _ in folder.relative_to(run).parts:
        old = old.parent
    renewed = OmegaConf.create(_moved(value, str(old), str(run.absolute())))
    OmegaConf.set_struct(renewed, True)
    return renewed


def _derive_kind(config: dict[str, Any]) -> str:
    """The `kind` of a run that was stored before configs had this key."""
    marks = {
        "prior": "pipeline",
        "classifier": "evaluation",
        "completions": "samples",
        "count": "reconstructions",
        "output": "shards",
        "vqvae_checkpoint": "prior",
    }
    return next((kind for key, kind in marks.items() if key in config), "vqvae")


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(child, old, new) for key, child in value.items()}
    if isinstance(value, list):
        return [_moved(child, old, new) for child in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value
