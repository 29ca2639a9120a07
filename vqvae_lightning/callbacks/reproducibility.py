"""The same seed and config give the same run, on every rank and after every interruption."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from vqvae_lightning.configs import to_plain
from vqvae_lightning.distributed import gather
from vqvae_lightning.errors import RankError
from vqvae_lightning.randomness import stream_seed


class SeedSteps(Callback):
    """Seed torch before each training batch with the run's seed and the number of the batch.

    Dropout and noise are then a function of the step: a resumed run draws what an uninterrupted one
    would have, and neither pictures nor validation change what follows. All ranks get one seed, so
    that `draw_for_batch` can give each its part of one draw. A module that draws for its own images
    only, such as `nn.Dropout`, draws the same on each rank.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed."""
        number = trainer.fit_loop.total_batch_idx
        torch.manual_seed(stream_seed(self.seed, "noise", number))


class SameConfig(Callback):
    """See that all ranks train with one config: another learning rate on one would not show.

    Args:
        cfg: The resolvable config of the run, complete when training starts.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, now that the ranks are connected.

        Raises:
            RankError: Naming the first rank that differs, and the keys.
        """
        if stage != "fit":
            return
        first, *others = gather(_flat(to_plain(self.cfg)))
        for rank, config in enumerate(others, 1):
            differing = sorted(dict(first.items() ^ config.items()))
            if differing:
                raise RankError(
                    f"rank {rank} has another config than rank 0: {', '.join(differing)}"
                )


def _flat(value: Any, place: str = "") -> dict[str, str]:
    """A config's leaves by their full keys."""
    if not isinstance(value, dict):
        return {place: repr(value)}
    children = ((f"{place}.{key}".lstrip("."), child) for key, child in value.items())
    return {k: v for place, child in children for k, v in _flat(child, place).items()}


class FinalValidation(Callback):
    """Validate after the last step, also where `val_check_interval` does not divide `max_steps`.

    So the last weights always have a score, and the best checkpoint is chosen by one.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for the end, at which Lightning validates; once, if validation is due anyway."""
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True
