"""What both tasks share: stop a run whose loss or weights are NaN or infinite, and evaluate."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vqvae_lightning.data.images import Batch
from vqvae_lightning.devices import Reading, reads_late
from vqvae_lightning.errors import DivergenceError, Key
from vqvae_lightning.metrics import EpochMeans

REMEDY = ("Lower ", Key("model.optimizer.lr"), ", or set ", Key("trainer.gradient_clip_val"), ".")


class LossWatch:
    """Checks each loss, and stops the run if one is NaN or infinite.

    On a CPU each loss is checked at once, before the optimizer changes the weights. On a GPU that
    would make each step wait for the GPU. There a loss is checked when the next one arrives, and
    before anything is validated or saved.
    """

    def __init__(self) -> None:
        self._last: tuple[int, tuple[str, ...], Reading] | None = None

    def add(self, step: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Record the loss of a step and its terms by name, each of shape ().

        Raises:
            DivergenceError: If the previous loss, or on a CPU this one, is not finite.
        """
        self.check()
        values = torch.stack([value.detach().float() for value in (loss, *terms.values())])
        self._last = step, tuple(terms), Reading(values)
        if not reads_late(loss.device):
            self.check("before it reached the weights")

    def check(self, when: str = "one step later, before anything was saved") -> None:
        """Check the last loss, unless it has been checked.

        Args:
            when: When the run stops, for the error message.

        Raises:
            DivergenceError: If the loss is not finite; names the step and the terms.
        """
        last, self._last = self._last, None
        if last is None:
            return
        step, names, reading = last
        loss, *values = reading.wait()
        if math.isfinite(loss):
            return
        pairs = zip(names, values, strict=True)
        bad = ", ".join(f"{name}={value}" for name, value in pairs if not math.isfinite(value))
        raise DivergenceError(
            f"step {step}: the loss is {loss} ({bad or 'the sum of its terms'}); stopped {when}. ",
            *REMEDY,
        )


class WatchedTask(pl.LightningModule):
    """What both tasks share: a stop before NaN or infinite values are validated or saved.

    It also decides which steps are logged, and evaluates both splits alike.

    Attributes:
        losses: Checks the loss of each training step.
        means: Means over the images of the split that is evaluated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses = LossWatch()
        self.means = EpochMeans()

    @property
    def step_is_logged(self) -> bool:
        """Whether the current step is logged: every `log_every_n_steps`, and the last one.

        Without the last one, Lightning would log the values of an earlier step again.
        """
        step = self.global_step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step % every == 0 or step >= self.trainer.estimated_stepping_batches

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the split."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the split."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_epoch("test")

    def _evaluate(self, batch: Batch) -> None:
        """Add a batch to the metrics of a split."""
        raise NotImplementedError

    def _log_epoch(self, split: str) -> None:
        """Log the metrics of a split, and start anew."""
        raise NotImplementedError

    def on_validation_start(self) -> None:
        """Check the last loss."""
        self.losses.check()

    def on_train_end(self) -> None:
        """Check the last loss."""
        self.losses.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the last loss and all weights, because a finite loss can have infinite gradients.

        Raises:
            DivergenceError: If a value is not finite. Nothing is saved.
        """
        self.losses.check()
        states = checkpoint["state_dict"], checkpoint.get("current_model_state", {})
        finite = [
            value.isfinite().all()
            for state in states
            for value in state.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if finite and not torch.stack(finite).all():
            raise DivergenceError(
                f"step {checkpoint['global_step']}: weights are NaN or infinite; stopped before "
                "they were saved. ",
                *REMEDY,
            )
