"""Begin a run or resume one, which decides the config that a command works with."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqvae_lightning.configs import read_trusted, record_foreign
from vqvae_lightning.errors import InputError, check_range
from vqvae_lightning.trust import list_packages

if TYPE_CHECKING:
    from omegaconf import DictConfig


def begin_or_resume(name: str, cfg: "DictConfig") -> "DictConfig":
    """Return the config of the run that `cfg` begins or resumes.

    A job that Slurm has requeued resumes its own run, as with `resume=auto`.

    Args:
        name: Name of the command, for the line in `config.yaml` that says how to repeat the run.
        cfg: Composed config.

    Raises:
        InputError: If `resume` comes with other overrides than the run began with.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from vqvae_lightning.runs.results import read_commit
    from vqvae_lightning.runs.stopwatch import SECONDS

    hydra = HydraConfig.get()
    check_range("seed", cfg.seed, 0)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if cfg.resume in (None, "auto"):
        chosen = hydra.job.config_name
        config = "" if chosen in ("vqvae", "pipeline") else f"--config-name {chosen} "
        # To repeat one job of a preset sweep, record its own values instead of `sweep=`. `resume=`
        # is omitted, because a command and its restart with resume=auto are the same command.
        given = [t for t in hydra.overrides.task if not t.startswith(("sweep=", "resume="))]
        cfg.command = f"{name} {config}{shlex.join(given)}".strip()
        cfg.commit = read_commit()
        record_foreign(cfg)
        if not (Path(cfg.folder) / "config.yaml").is_file():
            # An earlier command was interrupted before its run had begun.
            (Path(cfg.folder) / SECONDS).unlink(missing_ok=True)
            return cfg
        if cfg.resume is None and not requeued:
            raise InputError(
                f"{cfg.folder} holds a run already: resume it with resume={cfg.folder}, or "
                "choose another folder."
            )
        stored = read_stored_config(Path(cfg.folder), Path(cfg.folder), cfg.trust)
        if _sort_words(stored.command) != _sort_words(cfg.command):
            raise InputError(
                f"resume=auto: {cfg.folder} holds a run of another command: {stored.command}"
            )
        return stored
    others = [t for t in hydra.overrides.task if not t.startswith(("resume=", "trust="))]
    if others:
        raise InputError(
            f"resume={cfg.resume} uses the config in that folder; drop {' '.join(others)}"
        )
    if hydra.mode == RunMode.MULTIRUN:
        raise InputError("resume=FOLDER resumes a single run: drop -m.")
    stored = read_stored_config(Path(cfg.folder), Path(cfg.folder), list_packages(cfg.trust))
    if str(stored.command).split()[0] != name:
        raise InputError(f"resume={cfg.resume} is a run of another command: {stored.command}")
    return stored


def _sort_words(command: str) -> list[str]:
    """Sort the words that commands of the same run share; a study may reorder them."""
    return sorted(text for text in shlex.split(command) if not text.startswith("trust="))


def read_stored_config(folder: Path, run: Path, trust: Iterable[str]) -> "DictConfig":
    """Read the config in a run's folder or a stage's, with the paths of a moved run corrected.

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
    renewed: DictConfig = OmegaConf.create(_move_paths(value, str(old), str(run.absolute())))
    OmegaConf.set_struct(renewed, True)
    return renewed


def _derive_kind(config: dict[str, Any]) -> str:
    """Derive the `kind` of a run that was stored before configs had this key."""
    marks = {
        "prior": "pipeline",
        "classifier": "evaluation",
        "completions": "samples",
        "count": "reconstructions",
        "output": "shards",
        "vqvae_checkpoint": "prior",
    }
    return next((kind for key, kind in marks.items() if key in config), "vqvae")


def _move_paths(value: Any, old: str, new: str) -> Any:
    """Replace the folder `old` by `new` in all paths of a config."""
    if isinstance(value, dict):
        return {key: _move_paths(child, old, new) for key, child in value.items()}
    if isinstance(value, list):
        return [_move_paths(child, old, new) for child in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value
