"""The progress bar of training and testing."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor

from vqvae_lightning.callbacks.counting import count_images
from vqvae_lightning.console import ImageProgress
from vqvae_lightning.data.images import StageDataModule

UPDATE_EVERY = 10  # steps between two updates, because drawing the bar takes time


class StepProgress(ProgressBar):
    """One bar for the whole training, with images per second and the latest losses.

    Without a terminal, each validation prints one line instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: ImageProgress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing. Lightning calls this on all ranks except rank 0."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, starting at the first step of this run."""
        if not self._enabled:
            return
        data: StageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._images_per_step = data.batch_size * trainer.accumulate_grad_batches
        steps = trainer.estimated_stepping_batches
        self._bar = ImageProgress(
            type(pl_module).__name__.removesuffix("Task").lower(),
            None if steps == float("inf") else int(steps) * self._images_per_step,
            self._images_per_step,
            trainer.global_step * self._images_per_step,
        )
        self._metrics = ""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar every few steps, and read the losses in the steps that log them."""
        step = trainer.global_step
        logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._bar is None or not (logged or step % UPDATE_EVERY == 0):
            return
        # In a step that does not log, reading a loss would wait for the GPU.
        if logged and self._bar.on_terminal:
            self._metrics = _format_metrics(trainer)
        self._bar.update(step * self._images_per_step, self._metrics)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show why the bar stands still."""
        if self._bar is not None:
            self._bar.note("validating ...")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation's metrics; without a terminal, print them."""
        if self._bar is not None and not trainer.sanity_checking:
            self._metrics = _format_metrics(trainer)
            self._bar.report(trainer.global_step * self._images_per_step, self._metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._remove()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show a bar for the test images."""
        images = count_images(trainer, "test")  # on all ranks, because they wait for each other
        if self._enabled:
            self._bar = ImageProgress("testing", images)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance the bar by the images of the batch on all ranks."""
        if self._bar is not None:
            self._bar.advance(len(batch.data) * trainer.world_size)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._remove()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, so that it does not overwrite the error message."""
        self._remove()

    def _remove(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _format_metrics(trainer: pl.Trainer) -> str:
    metrics: Mapping[str, Tensor] = trainer.progress_bar_metrics  # type: ignore[assignment]
    return "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
