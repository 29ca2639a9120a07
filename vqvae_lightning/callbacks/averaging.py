"""Exponential moving average of the weights."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging

from vqvae_lightning.errors import check_range


class AveragedWeights(WeightAveraging):
    """Averages the weights; the average is validated, saved, tested and sampled.

    This is Lightning's callback with two changes. The decay after n steps is at most
    (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that the random initial
    weights lose their influence early. A checkpoint is tested with the averaged weights rather than
    the last ones.

    Args:
        decay: Share of the old average that is kept per step.

    Raises:
        InputError: If `decay` is outside [0, 1].
    """

    def __init__(self, decay: float = 0.998) -> None:
        self.decay = check_range("decay", decay, 0, 1)
        super().__init__(use_buffers=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the weights. The number of steps stays on the CPU, because each step reads it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            self._average_model.n_averaged = torch.zeros((), dtype=torch.int64)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to the device, because Lightning copies the module before moving it."""
        if self._average_model is not None:
            steps = self._average_model.n_averaged
            self._average_model.to(pl_module.device)
            self._average_model.n_averaged = steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimizer step."""
        if trainer.global_step > self._latest_update_step:
            self._average(pl_module)
            self._latest_update_step = trainer.global_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both averaged and last weights to resume training; only the average to test."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @torch.no_grad()
    def _average(self, pl_module: pl.LightningModule) -> None:
        # Like `AveragedModel.update_parameters`, but never copies the number of steps to the GPU.
        assert self._average_model is not None
        steps = int(self._average_model.n_averaged)
        kept = min(self.decay, (1 + steps) / (10 + steps)) if steps else 0.0
        averaged = self._average_model.module
        torch._foreach_lerp_(list(averaged.parameters()), list(pl_module.parameters()), 1 - kept)
        for own, current in zip(averaged.buffers(), pl_module.buffers(), strict=True):
            own.copy_(current)
        self._average_model.n_averaged += 1
