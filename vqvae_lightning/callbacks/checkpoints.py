"""Checkpoints: the best one, and the last one that a resumed run starts from."""

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
from vqvae_lightning.runs.stopwatch import Stopwatch
from vqvae_lightning.units import direction

NOT_ON_WINDOWS = ("SIGUSR1", "SIGUSR2")
AGREE_EVERY = 10  # steps after which several ranks ask each other whether to stop


class KeepTime(Callback):
    """Keep with each checkpoint how long the stage has taken, for the run that resumes from it.

    Args:
        watch: Stopwatch of the stage.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep."""
        self.watch.keep()


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best score, made to remember it when its folder was moved.

    Args:
        monitor: Name of the score; whether higher is better follows from it.
        **options: As for `ModelCheckpoint`.
    """

    def __init__(self, monitor: str, **options: Any) -> None:
        super().__init__(monitor=monitor, mode=direction(monitor) or "min", **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore score and paths, with the paths in today's folder."""
        folder = Path(str(self.dirpath))

        def here(path: str) -> str:
            # Lightning removes, with all below it, what a better checkpoint replaces.
            name = Path(path).name
            return str(folder / name) if name.endswith(".ckpt") else ""

        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        scores.pop("", None)
        moved = {"dirpath": self.dirpath, "best_k_models": scores}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[name] = here(state_dict[name])
        super().load_state_dict({**state_dict, **moved})


class LastCheckpoint(Checkpoint):
    """`last.ckpt`, what `resume` goes on from: every so often, and when the run is told to stop.

    Ctrl-C, or a scheduler's signal, finishes the step, saves and stops; a second Ctrl-C stops at
    once. Nothing is requeued here: that is for whoever reads the exit status. But submitit, which
    requeues in its own handler of a signal, has this called after saving.

    The checkpoint before is kept as `previous.ckpt`, should the disk have damaged the last. Nothing
    is saved after the very last step, before its validation: resuming would take training for
    finished and never validate. A `Checkpoint`, so that Lightning calls it last: what is saved has
    this step's averages.

    Args:
        path: The checkpoint to write.
        every_n_steps: Optimizer steps between two checkpoints.
        signals: Names of the signals to stop at. Windows lacks SIGUSR1 and SIGUSR2, which are
            ignored there.

    Raises:
        InputError: If `path` does not end in .ckpt, `every_n_steps` is below 1, or there is no
            signal of a name.
    """

    def __init__(
        self,
        path: str,
        every_n_steps: int = 500,
        signals: Sequence[str] = ("SIGINT", "SIGTERM", "SIGUSR2"),
    ) -> None:
        if not path.endswith(".ckpt"):  # a config in a file may not have other files overwritten
            raise InputError(f"path={path} must end in .ckpt.")
        self.path = path
        self.every_n_steps = check_positive("every_n_steps", every_n_steps)
        known = signal.Signals.__members__
        unknown = [name for name in signals if name not in known and name not in NOT_ON_WINDOWS]
        if unknown:
            said = f"={unknown} must be names of signals, such as SIGUSR1."
            raise InputError(Key("signals"), said)
        self.signals = [known[name] for name in signals if name in known]
        self._asked = 0  # the signal's number
        self._agreed = False  # that all ranks stop now
        self._answer: Reading | None = None  # of all ranks, on its way
        self._step = 0
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch for the signals."""
        self._step, self._answer = trainer.global_step, None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in self.signals}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to or if asked to; never between accumulated batches."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if trainer.world_size == 1:
            self._agreed = bool(self._asked)
        elif stepped:
            self._agree(trainer)
        due = self._agreed or trainer.global_step % self.every_n_steps == 0
        if not stepped or not due or trainer.global_step >= trainer.estimated_stepping_batches:
            return
        self._save(trainer)
        if self._agreed:
            self._stop(f"after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the last validation, if asked to during it."""
        if trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False):
            self._save(trainer)
            self._stop("after the last step")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _agree(self, trainer: pl.Trainer) -> None:
        """Ask all ranks every so often; on GPUs the answer is read one step later."""
        device = trainer.strategy.root_device
        if trainer.global_step % AGREE_EVERY == 0:
            asked = torch.full((1,), float(bool(self._asked)), device=device)
            self._answer = Reading(all_reduce(asked))
            if reads_late(device):
                return
        if self._answer is not None:
            self._agreed, self._answer = any(self._answer.numbers()), None

    def _ask(self, number: int, frame: Any) -> None:
        # A scheduler may repeat its signal, or send another one, while the step is finished.
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked or self._requeues(number):
            self._asked = number

    def _stop(self, when: str) -> None:
        """End the run on all ranks, also those that the signal did not reach.

        Raises:
            Interrupted: Unless submitit says that a run must go on after this signal.
        """
        number = max(gather(self._asked), key=lambda asked: (self._requeues(asked), asked))
        self._asked, self._agreed = 0, False
        handler = self._previous.get(signal.Signals(number))
        status = 130 if number == signal.SIGINT else 75
        if "SUBMITIT_EXECUTOR" in os.environ:
            if number == signal.SIGTERM:
                return  # a warning only: its own signal is still to come
            if self._requeues(number):
                try:
                    handler(number, None)  # type: ignore[misc]
                except SystemExit as stop:  # the first rank has requeued the job
                    status = int(stop.code or 0)
        name = signal.Signals(number).name
        said = "Interrupted" if number == signal.SIGINT else f"Stopped by {name}"
        raise Interrupted(f"{said} {when}; saved {self.path}.", status, agreed=True)

    def _requeues(self, number: int) -> bool:
        """Whether submitit, if it runs this job, requeues it at this signal."""
        handler = self._previous.get(signal.Signals(number)) if number else None
        under_submitit = "SUBMITIT_EXECUTOR" in os.environ
        return under_submitit and getattr(handler, "__module__", "").startswith("submitit.")

    def _save(self, trainer: pl.Trainer) -> None:
        # Written first: a run that stops over what it would save keeps the last checkpoint.
        path = Path(self.path)
        partial = path.with_name("partial.ckpt")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if path.is_file():
                path.replace(path.with_name("previous.ckpt"))
            partial.replace(path)
