"""Where the configs are, and the only place that turns a config into objects."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vqvae_lightning.checks import check_types
from vqvae_lightning.errors import InputError, Key, join_lines
from vqvae_lightning.trust import Trust, find_foreign, list_packages
from vqvae_lightning.units import get_direction

_PACKAGE = Path(__file__).parent
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The configs: inside the package in a wheel, next to it in a checkout."""


def build(config: Any, **arguments: Any) -> Any:
    """Instantiate the `_target_` of `config`, its nested ones first.

    Args:
        config: An OmegaConf node or plain dictionary that the user has typed, or that
            `read_trusted` has read; containers reach the constructors as plain Python.
        **arguments: Constructor arguments that are objects, or known only at run time.

    Raises:
        InputError: If a constructor refuses its arguments, or Hydra a `_target_`.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check_types(config)
    try:
        return instantiate(config, _convert_="all", **arguments)
    except InstantiationException as error:
        key = re.search(r"full_key: (\S+)", str(error))
        place = key.group(1) if key else ""
        cause = error.__cause__
        if isinstance(cause, InputError):
            # Made again: `cause` raised from `error` would have itself for a cause.
            raise cause.rename_keys(lambda key: f"{place}.{key}" if place else key) from error
        if cause is None:  # Hydra's own refusal, in several lines
            said = join_lines(str(error).partition("full_key:")[0])
        else:
            said = f"{type(cause).__name__}: {join_lines(cause)}"
        raise InputError(*([Key(place), ": "] if place else []), said) from error


def build_parts(config: Mapping[Any, Any]) -> list[Any]:
    """Build the named parts of a config, such as callbacks or loggers; null switches one off."""
    return [build(part) for part in config.values() if part is not None]


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file as plain data: interpolations stay text, and only YAML's own tags count.

    Raises:
        InputError: If it cannot be read.
    """
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of the file system, of YAML, of OmegaConf
        raise InputError(f"{path} cannot be read: {join_lines(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not the config of a run.")
    return {str(key): value for key, value in config.items()}


def read_trusted(path: Path, trust: Iterable[str]) -> dict[str, Any]:
    """The config in a file, of which nothing but what `Trust` allows will be built.

    Args:
        path: A `config.yaml`.
        trust: Packages that the user trusts.

    Returns:
        Plain data. Its `trust` is the given one: a file cannot vouch for itself.

    Raises:
        InputError: If it cannot be read, or names code that it may not.
    """
    config = read_config(path)
    Trust(str(path), trust).read(config)
    return {**config, "trust": sorted(trust), "foreign": find_foreign(config)}


def record_foreign(cfg: Any) -> None:
    """Trust what the user has typed, and name it in `cfg` for those who will load the run.

    Args:
        cfg: A composed config, or one that `read_trusted` has read; changed in place.
    """
    cfg.foreign = find_foreign(to_plain(cfg, missing=True))
    cfg.trust = sorted({*list_packages(cfg.trust), *cfg.foreign})


def to_plain(config: Any, missing: bool = False) -> dict[str, Any]:
    """`config` resolved, as plain Python data that a checkpoint may hold.

    Args:
        config: An OmegaConf node.
        missing: Whether values may still be `???`.

    Raises:
        omegaconf.MissingMandatoryValue: If one is and may not.
    """
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def register_resolvers() -> None:
    """Register the interpolations of `conf/`, such as `run_folder`, and its own `hydra/` files."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    # Hydra refuses a plugin's config and a file of the same name, so the plugin's is removed.
    Plugins.instance()
    for path in (CONF_DIR / "hydra").rglob("*.yaml"):
        group = ConfigStore.instance().repo
        for part in path.relative_to(CONF_DIR).parent.parts:
            group = group.get(part, {})
        group.pop(path.name, None)

    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("without", _without, replace=True)
    OmegaConf.register_new_resolver("cuda_or_cpu", _cuda_or_cpu, replace=True)
    OmegaConf.register_new_resolver("fast_precision", _fast_precision, replace=True)
    OmegaConf.register_new_resolver("study_direction", _study_direction, replace=True)


def _run_folder(resume: str | None, fresh: str) -> str:
    """`resume` if it is a folder, else `fresh`; checked here, before Hydra makes the folder."""
    if resume in (None, "auto"):
        return fresh
    assert resume is not None
    if not (Path(resume) / "config.yaml").is_file():
        raise InputError(f"resume={resume} is not the folder of a run: it has no config.yaml.")
    return resume


def _without(node: Any, *keys: str) -> dict[str, Any]:
    """The resolved `node` without these keys."""
    return {key: value for key, value in to_plain(node, missing=True).items() if key not in keys}


def _cuda_or_cpu() -> str:
    """`gpu` where there is a CUDA device; never Apple's, which has no float64."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _fast_precision(accelerator: str) -> str:
    """bf16-mixed where the device multiplies bfloat16 in hardware, else 32-true."""
    import torch

    if accelerator in ("gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "32-true"
    flags = Path("/proc/cpuinfo")
    native = flags.is_file() and re.search(r"\b(amx|avx512)_bf16\b", flags.read_text())
    return "bf16-mixed" if accelerator == "cpu" and native else "32-true"


def _study_direction(monitor: str | None) -> str:
    """What a study does with the objective of its jobs: `minimize` or `maximize`."""
    return "maximize" if monitor is not None and get_direction(monitor) == "max" else "minimize"
