"""Registers the launchers and the sweeper of this package with Hydra."""

from vqvae_lightning.jobs.launcher import PLUGINS
from vqvae_lightning.jobs.parallel import JoblibLauncher
from vqvae_lightning.jobs.slurm import SlurmLauncher
from vqvae_lightning.jobs.study import OptunaSweeper


def register_plugins() -> None:
    """Register the plugins; Hydra itself searches only the package `hydra_plugins`."""
    from hydra.core.plugins import Plugins

    for plugin in (SlurmLauncher, JoblibLauncher, OptunaSweeper):
        Plugins.instance().class_name_to_class[f"{PLUGINS}.{plugin.__name__}"] = plugin
