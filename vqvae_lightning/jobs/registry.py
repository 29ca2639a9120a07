"""Makes the launchers and the sweeper of this package known to Hydra."""

from vqvae_lightning.jobs.launcher import _PLACE
from vqvae_lightning.jobs.parallel import JoblibLauncher
from vqvae_lightning.jobs.slurm import SlurmLauncher
from vqvae_lightning.jobs.study import OptunaSweeper


def register_plugins() -> None:
    """Let `_target_` name them: Hydra itself finds plugins only in a package `hydra_plugins`."""
    from hydra.core.plugins import Plugins

    for plugin in (SlurmLauncher, JoblibLauncher, OptunaSweeper):
        Plugins.instance().class_name_to_class[f"{_PLACE}.{plugin.__name__}"] = plugin
