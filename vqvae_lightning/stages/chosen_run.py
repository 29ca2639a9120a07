"""Find the checkpoints of a run's folder."""

from omegaconf import DictConfig

from vqvae_lightning.configs import read_config
from vqvae_lightning.console import print_line
from vqvae_lightning.errors import InputError, Key
from vqvae_lightning.runs.folder import RunFolder

KEYS = {"vqvae": "vqvae_checkpoint", "prior": "prior_checkpoint"}


def choose_checkpoints(cfg: DictConfig) -> None:
    """Set the checkpoints in `cfg` to the best ones of the folder `cfg.run`, if it is given.

    Args:
        cfg: Config with `run`, the folder of a pipeline, a VQ-VAE or a prior; changed in place.

    Raises:
        InputError: If the folder is not of such a run, has no checkpoint yet, or is given together
            with other checkpoints.
    """
    if cfg.get("run") is None:
        return
    folder = RunFolder(cfg.run)
    given = Key("run")
    if not folder.is_begun:
        raise InputError(given, f"={cfg.run} is not the folder of a run: it has no config.yaml.")
    kind = read_config(folder.config).get("kind")
    if kind == "pipeline":
        places = {name: folder.stage(name) for name in KEYS}
    elif kind in KEYS:
        places = {str(kind): folder}
    else:
        raise InputError(
            given,
            f"={cfg.run} is the folder of a run of kind {kind}: it must be one of pipeline, "
            f"{', '.join(KEYS)}.",
        )
    found = {name: place.best_checkpoint for name, place in places.items()}
    first, *others = found
    if not found[first].is_file():
        raise InputError(given, f"={cfg.run} has no {found[first]} yet: finish its training first.")
    for name in others:
        if not found[name].is_file():
            print_line(f"run={cfg.run} has no {name} yet: the {first} alone is evaluated.")
            del found[name]
    for name, path in found.items():
        key = KEYS[name]
        if cfg[key] not in (None, str(path)):
            raise InputError(given, f"={cfg.run} and ", Key(key), f"={cfg[key]}: give one of them.")
        cfg[key] = str(path)
