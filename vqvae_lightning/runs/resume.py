"""Start a run, or resume one with the config that it began with."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vqvae_lightning.configs import read_trusted, record_foreign
from vqvae_lightning.errors import InputError, check_range
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import find_commit
from vqvae_lightning.trust import list_packages


def begin_or_resume(name: str, cfg: DictConfig) -> DictConfig:
    """Return the config of the run that `cfg` starts or resumes.

    A job that Slurm has restarted resumes its own run, as with `resume=auto`.

    Args:
        name: The command, which is recorded in `config.yaml` as part of how to repeat the run.
        cfg: The composed config.

    Raises:
        InputError: If the folder holds another run, or `resume=FOLDER` comes with other overrides.
    """
    check_range("seed", cfg.seed, 0)
    if cfg.resume in (None, "auto"):
        return _begin_or_resume_own(name, cfg)
    return _resume_named(name, cfg)


def _begin_or_resume_own(name: str, cfg: DictConfig) -> DictConfig:
    """Start a run in the command's folder, or resume the same command's run there."""
    hydra = HydraConfig.get()
    run = RunFolder(cfg.folder)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    chosen = hydra.job.config_name
    config = "" if chosen in ("vqvae", "pipeline") else f"--config-name {chosen} "
    # To repeat one job of a preset sweep, record its own values instead of `sweep=`. Without
    # `resume=auto`, a later start of the command compares equal to the first.
    overrides = [t for t in hydra.overrides.task if not t.startswith(("sweep=", "resume="))]
    cfg.command = f"{name} {config}{shlex.join(overrides)}".strip()
    cfg.commit = find_commit()
    record_foreign(cfg)
    if not run.is_begun:
        # Written by a command that was interrupted before its run had begun.
        run.seconds.unlink(missing_ok=True)
        return cfg
    if cfg.resume is None and not requeued:
        raise InputError(
            f"{cfg.folder} already holds a run: resume it with resume={cfg.folder}, or choose "
            "another folder."
        )
    stored = read_run_config(run.path, run.path, cfg.trust)
    if _sort_words(stored.command) != _sort_words(cfg.command):
        raise InputError(
            f"resume=auto: {cfg.folder} holds a run of another command: {stored.command}"
        )
    return stored


def _resume_named(name: str, cfg: DictConfig) -> DictConfig:
    """Resume the run in the folder that the user named."""
    hydra = HydraConfig.get()
    run = RunFolder(cfg.folder)
    others = [t for t in hydra.overrides.task if not t.startswith(("resume=", "trust="))]
    if others:
        raise InputError(
            f"resume={cfg.resume} uses the config in that folder; drop {' '.join(others)}"
        )
    if hydra.mode == RunMode.MULTIRUN:
        raise InputError("resume continues one run: drop -m.")
    stored = read_run_config(run.path, run.path, list_packages(cfg.trust))
    if str(stored.command).split()[0] != name:
        raise InputError(f"resume={cfg.resume} is a run of another command: {stored.command}")
    return stored


def _sort_words(command: str) -> list[str]:
    """The words that two commands for one run share, sorted, because a study may reorder them."""
    return sorted(text for text in shlex.split(command) if not text.startswith("trust="))


def read_run_config(folder: Path, run: Path, trust: Iterable[str]) -> DictConfig:
    """Read the config in a folder; paths in it are corrected if the run was moved.

    Args:
        folder: Folder of the run, or of a stage in it.
        run: Folder of the run.
        trust: Packages that the user trusts.

    Raises:
        InputError: If it names code that is neither in this package nor in `trust`.
    """
    path = RunFolder(folder).config
    config = read_trusted(path, trust)
    if not isinstance(config.get("folder"), str):
        raise InputError(f"{path} is not the config of a run.")
    config.setdefault("kind", _derive_kind(config))
    old = Path(config["folder"])
    for _ in folder.relative_to(run).parts:
        old = old.parent
    moved = OmegaConf.create(move_paths(config, str(old), str(run.absolute())))
    assert isinstance(moved, DictConfig)
    OmegaConf.set_struct(moved, True)
    return moved


def _derive_kind(config: dict[str, Any]) -> str:
    """Find the `kind` of a run whose config was stored before configs had this key."""
    marks = {
        "prior": "pipeline",
        "classifier": "evaluation",
        "completions": "samples",
        "count": "reconstructions",
        "output": "shards",
        "batch_size": "prior",
    }
    return next((kind for key, kind in marks.items() if key in config), "vqvae")


def move_paths(value: Any, old: str, new: str) -> Any:
    """Return a config's plain data with the folder `old` replaced by `new` in every path."""
    if isinstance(value, dict):
        return {key: move_paths(child, old, new) for key, child in value.items()}
    if isinstance(value, list):
        return [move_paths(child, old, new) for child in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value
