"""The progress bar of a training run."""

import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vqvae_lightning.console import RateColumn, console
from vqvae_lightning.data.images import StageDataModule


class StepProgress(ProgressBar):
    """One bar over all of training, in images, with images per second and the newest losses.

    Without a terminal it prints a line after each validation instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing: called on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar at the step that training starts from."""
        if not self._enabled:
            return
        steps = trainer.estimated_stepping_batches
        datamodule: StageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._images = datamodule.batch_size * trainer.accumulate_grad_batches
        name = type(pl_module).__name__.removesuffix("Task").lower()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.fields[step]}/{task.fields[steps]}"),
            RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task(
            name,
            total=None if steps == float("inf") else steps * self._images,
            completed=trainer.global_step * self._images,
            step=trainer.global_step,
            steps=steps,
            metrics="",
        )
        self._progress.start()
        self._metrics = ""
        self._since = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance, once in ten steps: drawing is not free; read losses when they are logged."""
        step = trainer.global_step
        logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._progress is None or not (logged or step % 10 == 0):
            return
        if logged and console.is_terminal:  # in other steps it would make a GPU's work wait
            self._metrics = self._text(trainer)
        self._progress.update(
            self._task, completed=step * self._images, step=step, metrics=self._metrics
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say why the bar stands still."""
        if self._progress is not None:
            self._progress.update(self._task, metrics="validating ...", refresh=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show a bar over the images to test on."""
        if self._enabled:
            datamodule: StageDataModule = trainer.datamodule  # type: ignore[attr-defined]
            columns = (TextColumn("testing"), BarColumn(), RateColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            )
            self._task = self._progress.add_task("", total=len(datamodule.datasets["test"]))
            self._progress.start()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advance."""
        if self._progress is not None:
            self._progress.advance(self._task, len(batch.data))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self.on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line where a bar would not be seen."""
        if not self._enabled or trainer.sanity_checking or self._progress is None:
            return
        if console.is_terminal:
            self._metrics = self._text(trainer)
            return
        now, (then, first) = time.perf_counter(), self._since
        self._since = now, trainer.global_step
        speed = (trainer.global_step - first) * self._images / (now - then)
        console.print(
            f"step {trainer.global_step}/{trainer.estimated_stepping_batches}  "
            f"{speed:,.0f} images/s  "
            f"{self._text(trainer)}",
            highlight=False,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, so that the message is not drawn over."""
        self.on_train_end(trainer, pl_module)

    def _text(self, trainer: pl.Trainer) -> str:
        metrics: Mapping[str, Tensor] = trainer.progress_bar_metrics  # type: ignore[assignment]
        return "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
