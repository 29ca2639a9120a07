"""The same seed and config give the same run, on every rank and after every interruption."""

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from vqvae_lightning.configs import to_plain
from vqvae_lightning.distributed import gather
from vqvae_lightning.errors import RankError
from vqvae_lightning.randomness import derive_seed

if TYPE_CHECKING:
    from omegaconf import DictConfig


class SeedSteps(Callback):
    """Seeds torch before each training batch with the run's seed and the number of the batch.

    Dropout and noise then depend on the step only. A resumed run draws the same values as an
    uninterrupted one, and neither pictures nor validation change later draws. All ranks get the
    same seed, so that `draw_for_batch` can give each rank its part of one draw. A module that draws
    for its own images only, such as `nn.Dropout`, draws the same values on each rank.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch."""
        number = trainer.fit_loop.total_batch_idx
        torch.manual_seed(derive_seed(self.seed, "noise", number))


class ConfigComparison(Callback):
    """Checks that all ranks train with the same config.

    A rank with another learning rate, for example, would cause no error.

    Args:
        cfg: Config of the run, complete when training starts.
    """

    def __init__(self, cfg: "DictConfig") -> None:
        self.cfg = cfg

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the configs of all ranks, which are connected by now.

        Raises:
            RankError: If a rank differs from rank 0; names the rank and the keys.
        """
        if stage != "fit":
            return
        first, *others = gather(_flatten(to_plain(self.cfg)))
        for rank, config in enumerate(others, 1):
            differing = sorted(dict(first.items() ^ config.items()))
            if differing:
                raise RankError(
                    f"rank {rank} has another config than rank 0: {', '.join(differing)}"
                )


def _flatten(value: Any, place: str = "") -> dict[str, str]:
    """Map the full keys of a config to its values, as text."""
    if not isinstance(value, dict):
        return {place: repr(value)}
    children = ((f"{place}.{key}".lstrip("."), child) for key, child in value.items())
    return {k: v for place, child in children for k, v in _flatten(child, place).items()}


class FinalValidation(Callback):
    """Validates after the last step, even if `val_check_interval` does not divide `max_steps`.

    The last weights then always have a score, and can become the best checkpoint.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a stop, before which Lightning validates once."""
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True
