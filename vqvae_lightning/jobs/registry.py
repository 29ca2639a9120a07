"""Makes the launchers known to Hydra."""

from vqvae_lightning.jobs.launcher import _PLACE
from vqvae_lightning.jobs.parallel import JoblibLauncher
from vqvae_lightning.jobs.slurm import SlurmLauncher


def register_launchers() -> None:
    """Let `_target_` name them; Hydra would find them only in a package `hydra_plugins`."""
    from hydra.core.plugins import Plugins

    for launcher in (SlurmLauncher, JoblibLauncher):
        Plugins.instance().class_name_to_class[f"{_PLACE}.{launcher.__name__}"] = launcher
