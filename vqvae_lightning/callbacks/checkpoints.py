"""The best checkpoint, and the last one, from which a run resumes."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint

from vqvae_lightning.devices import Reading, reads_late
from vqvae_lightning.distributed import all_reduce, gather
from vqvae_lightning.errors import InputError, Interrupted, Key, check_positive
from vqvae_lightning.runs.folder import PREVIOUS_CHECKPOINT
from vqvae_lightning.runs.stopwatch import Stopwatch
from vqvae_lightning.units import get_direction

NOT_ON_WINDOWS = ("SIGUSR1", "SIGUSR2")
AGREE_EVERY = 10  # steps between two decisions of several ranks whether to stop


class TimeKeeper(Callback):
    """Saves the stage's duration so far with each checkpoint, for the run that resumes from it.

    Args:
        watch: Stopwatch of the stage.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the stopwatch."""
        self.watch.keep()


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best score, which also works after its folder has been moved.

    Args:
        monitor: Name of the score, from which follows whether higher is better.
        **options: Options of `ModelCheckpoint`.
    """

    def __init__(self, monitor: str, **options: Any) -> None:
        super().__init__(monitor=monitor, mode=get_direction(monitor) or "min", **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores, and the paths as paths in the current folder."""
        folder = Path(str(self.dirpath))

        def move_here(path: str) -> str:
            # Lightning deletes this path, even a folder, when a better checkpoint replaces it.
            name = Path(path).name
            return str(folder / name) if name.endswith(".ckpt") else ""

        scores = {move_here(path): score for path, score in state_dict["best_k_models"].items()}
        scores.pop("", None)
        moved = {"dirpath": self.dirpath, "best_k_models": scores}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[name] = move_here(state_dict[name])
        super().load_state_dict({**state_dict, **moved})


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt`, from which `resume` continues, regularly and when requested to stop.

    After Ctrl-C or a scheduler's signal, the run finishes the step, saves and stops. A second
    Ctrl-C stops at once. The exit status tells a scheduler whether to requeue. Submitit requeues in
    its own signal handler, which is called after saving.

    The previous checkpoint is kept as `previous.ckpt`, in case `last.ckpt` is damaged. A step after
    which Lightning validates is saved after the validation, because a resumed run would go on with
    the next step. If a stop is requested in such a step, it is saved before as well, in case the
    time does not suffice for the validation. Nothing is saved after the last step until it is
    validated, because a resumed run would treat training as finished. This class is a `Checkpoint`,
    which Lightning calls after other callbacks, so that the saved weights include this step's
    averages.

    Args:
        path: Checkpoint to write.
        every_n_steps: Optimizer steps between two checkpoints.
        signals: Names of the signals that request a stop. SIGUSR1 and SIGUSR2 are ignored on
            Windows, which lacks them.

    Raises:
        InputError: If `path` does not end in .ckpt, `every_n_steps` is below 1, or a signal is
            unknown.
    """

    def __init__(
        self,
        path: str,
        every_n_steps: int = 500,
        signals: Sequence[str] = ("SIGINT", "SIGTERM", "SIGUSR2"),
    ) -> None:
        if not path.endswith(".ckpt"):  # a config from a file must not overwrite other files
            raise InputError(f"path={path} must end in .ckpt.")
        self.path = path
        self.every_n_steps = check_positive("every_n_steps", every_n_steps)
        known = signal.Signals.__members__
        unknown = [name for name in signals if name not in known and name not in NOT_ON_WINDOWS]
        if unknown:
            raise InputError(
                Key("signals"), f"={unknown} must be names of signals, such as SIGUSR1."
            )
        self.signals = [known[name] for name in signals if name in known]
        self._requested = 0  # number of the signal that requested a stop
        self._agreed = False  # whether all ranks stop now
        self._waits = False  # whether the running validation is followed by a checkpoint
        self._answer: Reading | None = None  # whether any rank has a request
        self._step = 0
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Handle the signals."""
        self._step, self._answer, self._waits = trainer.global_step, None, False
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._request) for number in self.signals
            }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if one is due or a stop is requested, but never between accumulated batches."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if trainer.world_size == 1:
            self._agreed = bool(self._requested)
        elif stepped:
            self._agree(trainer)
        due = self._agreed or trainer.global_step % self.every_n_steps == 0
        if not stepped or not due or trainer.global_step >= trainer.estimated_stepping_batches:
            return
        self._waits = _validates_now(trainer)
        if not self._waits or self._agreed:
            self._save(trainer)
        if not self._waits:
            self._stop_if_agreed(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if one has waited for this validation."""
        if self._waits:
            self._waits = False
            self._save(trainer)
            self._stop_if_agreed(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the last validation, if a stop was requested during it."""
        if trainer.strategy.reduce_boolean_decision(bool(self._requested), all=False):
            self._save(trainer)
            self._stop("after the last step")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _agree(self, trainer: pl.Trainer) -> None:
        """Decide with all ranks whether to stop; on GPUs the answer is read one step later."""
        device = trainer.strategy.root_device
        if trainer.global_step % AGREE_EVERY == 0:
            requested = torch.full((1,), float(bool(self._requested)), device=device)
            self._answer = Reading(all_reduce(requested))
            if reads_late(device):
                return
        if self._answer is not None:
            self._agreed, self._answer = any(self._answer.wait()), None

    def _request(self, number: int, frame: Any) -> None:
        # A scheduler may repeat its signal or send another one before the step is finished.
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._requested or self._requeues(number):
            self._requested = number

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self._agreed:
            self._stop(f"after step {trainer.global_step}")

    def _stop(self, when: str) -> None:
        """End the run on all ranks, including those that did not receive the signal.

        Raises:
            Interrupted: Unless submitit ignores this signal.
        """
        number = max(gather(self._requested), key=lambda number: (self._requeues(number), number))
        self._requested, self._agreed = 0, False
        handler = self._previous.get(signal.Signals(number))
        status = 130 if number == signal.SIGINT else 75
        if "SUBMITIT_EXECUTOR" in os.environ:
            if number == signal.SIGTERM:
                return  # only a warning: submitit acts on its own signal, which follows
            if self._requeues(number):
                try:
                    handler(number, None)  # type: ignore[misc]
                except SystemExit as stop:  # on rank 0, after requeueing the job
                    status = int(stop.code or 0)
        name = signal.Signals(number).name
        event = "Interrupted" if number == signal.SIGINT else f"Stopped by {name}"
        raise Interrupted(f"{event} {when}; saved {self.path}.", status, agreed=True)

    def _requeues(self, number: int) -> bool:
        """Whether submitit runs this job and requeues it at this signal."""
        handler = self._previous.get(signal.Signals(number)) if number else None
        under_submitit = "SUBMITIT_EXECUTOR" in os.environ
        return under_submitit and getattr(handler, "__module__", "").startswith("submitit.")

    def _save(self, trainer: pl.Trainer) -> None:
        # Written to another file first, so that an error while saving keeps the last checkpoint.
        path = Path(self.path)
        partial = path.with_name("partial.ckpt")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if path.is_file():
                path.replace(path.with_name(PREVIOUS_CHECKPOINT))
            partial.replace(path)


def _validates_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after this batch; it has no public function for this."""
    every, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or batches is None:
        return False
    if every is None:  # the interval counts batches across epochs
        return (trainer.fit_loop.total_batch_idx + 1) % batches == 0
    if (trainer.current_epoch + 1) % every:
        return False
    return trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % batches == 0
