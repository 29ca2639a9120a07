"""What happens around the steps: progress, pictures, seeds, a clean stop."""

import hashlib
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vqvae_lightning.configs import plain
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, StageDataModule
from vqvae_lightning.devices import Reading, reads_late
from vqvae_lightning.distributed import all_reduce, gathered
from vqvae_lightning.errors import (
    DivergenceError,
    InputError,
    Interrupted,
    Key,
    RankError,
    check_positive,
    check_range,
)
from vqvae_lightning.loggers import log_histogram, log_picture
from vqvae_lightning.networks.autoencoder import from_uint8
from vqvae_lightning.networks.sampling import sample
from vqvae_lightning.pictures import code_maps, grid, pairs
from vqvae_lightning.progress import RateColumn, console
from vqvae_lightning.quantizers import GaussianBottleneck, VectorQuantizer
from vqvae_lightning.randomness import stream_seed
from vqvae_lightning.results import Stopwatch, direction, read_curves, read_result

NOT_ON_WINDOWS = ("SIGUSR1", "SIGUSR2")
PICTURED = 20  # images in a picture of reconstructions
AGREE_EVERY = 10  # steps after which several ranks ask each other whether to stop


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
        first, *others = gathered(_flat(plain(self.cfg)))
        for rank, config in enumerate(others, 1):
            differing = sorted(dict(first.items() ^ config.items()))
            if differing:
                raise RankError(
                    f"rank {rank} has another config than rank 0: {', '.join(differing)}"
                )


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


class AveragedWeights(WeightAveraging):
    """Exponential moving average of the weights; it is what is validated, saved and sampled.

    Lightning's callback, with an average that starts short (the share kept after n steps is at most
    (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage), so that the random first
    weights are soon forgotten, and with the averaged weights, not the last ones, when a checkpoint
    is tested.

    Args:
        decay: Share of the old average kept per step.

    Raises:
        InputError: If it is outside [0, 1].
    """

    def __init__(self, decay: float = 0.998) -> None:
        self.decay = check_range("decay", decay, 0, 1)
        super().__init__(use_buffers=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the weights; the number of steps stays on the CPU, as each step reads it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            self._average_model.n_averaged = torch.zeros((), dtype=torch.int64)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the average to the device, which the module reaches after Lightning copies it."""
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
        """Restore the last weights beside the averaged ones, to train on; not to test."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @torch.no_grad()
    def _average(self, pl_module: pl.LightningModule) -> None:
        # `AveragedModel.update_parameters` without its copies of the number of steps to the GPU.
        assert self._average_model is not None
        steps = int(self._average_model.n_averaged)
        kept = min(self.decay, (1 + steps) / (10 + steps)) if steps else 0.0
        averaged = self._average_model.module
        torch._foreach_lerp_(list(averaged.parameters()), list(pl_module.parameters()), 1 - kept)
        for own, current in zip(averaged.buffers(), pl_module.buffers(), strict=True):
            own.copy_(current)
        self._average_model.n_averaged += 1


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
        number = max(gathered(self._asked), key=lambda asked: (self._requeues(asked), asked))
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


class CollapseWarning(Callback):
    """Say so, and what to change, when codes or latents go unused for several validations.

    Args:
        threshold: Share of the codes (of the latent channels of a variational autoencoder) below
            which use counts as collapsed.
        patience: Validations in a row below it before the warning.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, threshold: float = 0.3, patience: int = 2) -> None:
        self.threshold = check_range("threshold", threshold, 0, 1)
        self.patience = check_positive("patience", patience)
        self._below = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look at the figures of this validation."""
        quantizer = pl_module.net.quantizer
        if trainer.sanity_checking or not getattr(quantizer, "initialised", True):
            return
        metrics = trainer.callback_metrics
        if "val/codebook_use" in metrics:
            data: PixelDataModule = trainer.datamodule  # type: ignore[attr-defined]
            rows, columns = pl_module.net.grid(*data.image_shape[1:])
            total = quantizer.num_codes
            # Few validation images cannot use a large codebook up.
            seen = len(data.datasets["val"]) * rows * columns
            use = float(metrics["val/codebook_use"]) * total / min(total, seen)
            what = f"{total} codes are in use"
        elif "val/active_dims" in metrics:
            total = quantizer.code_dim
            use = float(metrics["val/active_dims"]) / total
            what = f"{total} latent channels are active"
        else:
            return
        self._below = self._below + 1 if use < self.threshold else 0
        if self._below == self.patience and trainer.is_global_zero:
            limit = f"callbacks.collapse.threshold={self.threshold:g}"
            console.print(
                f"warning: {use:.1%} of the {what}, below {limit} for {self.patience} "
                f"validations. Try {self._advice(quantizer)}",
                highlight=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """Validations in a row below the threshold."""
        return {"below": self._below}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._below = state_dict["below"]

    def _advice(self, quantizer: Any) -> str:
        key = "model.net.quantizer"
        if isinstance(quantizer, GaussianBottleneck):
            return f"a lower {key}.beta, or {key}.free_bits=0.05."
        if not isinstance(quantizer, VectorQuantizer):
            return f"other {key}.options, or quantizer=ema."
        advice = []
        if quantizer.revive_below == 0:
            advice.append(f"{key}.revive_below=0.03")
        if quantizer.init == "uniform":
            advice.append(f"{key}.init=kmeans")
        if quantizer.warmup_steps < 100:
            advice.append(f"{key}.warmup_steps=200")
        return " or ".join([*advice, f"a smaller {key}.code_dim or num_codes."])


class MedianPruning(Callback):
    """Stop a job whose best score lags behind the median of the finished jobs beside it.

    At each validation this job's best score so far is compared with what each finished job of the
    sweep had reached by the same step, as their `metrics.csv` tell: Optuna's median rule, for every
    sweeper and launcher. A stopped job ends as finished, is tested, and has `pruned: true` in its
    `result.json`; others are not compared with it. The stages of a pipeline have no jobs beside
    them and are never stopped.

    Args:
        folder: Of this job; its siblings are the other jobs.
        monitor: Name of the score; whether higher is better follows from it.
        min_jobs: Finished jobs that there must be to compare with; None never stops.
        warmup: Validations of this job before the first comparison.

    Raises:
        InputError: If `min_jobs` or `warmup` is below 1.

    Attributes:
        pruned: Whether this job was stopped.
    """

    def __init__(
        self, folder: str, monitor: str, min_jobs: int | None = None, warmup: int = 2
    ) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.min_jobs = None if min_jobs is None else check_positive("min_jobs", min_jobs)
        self.warmup = check_positive("warmup", warmup)
        self.pruned = False
        # Scores are compared with this sign, so that lower is better.
        self._sign = -1.0 if direction(monitor) == "max" else 1.0
        self._best = math.inf
        self._validations = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare; the first rank decides for all."""
        if self.min_jobs is None or trainer.sanity_checking:
            return
        self._validations += 1
        score = self._sign * float(trainer.callback_metrics[self.monitor])
        self._best = min(self._best, score)
        if self._validations <= self.warmup:
            return
        median = self._median(trainer.global_step) if trainer.is_global_zero else None
        median = trainer.strategy.broadcast(median)
        if median is None or self._best <= median:
            return
        self.pruned = trainer.should_stop = True
        if trainer.is_global_zero:
            console.print(
                f"stopped after step {trainer.global_step}: best {self.monitor} "
                f"{self._sign * self._best:.4g}, the median of the other jobs was "
                f"{self._sign * median:.4g} by then (callbacks.pruning).",
                highlight=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """The best score and how many there were."""
        return {"best": self._best, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._best, self._validations = state_dict["best"], state_dict["validations"]

    def _median(self, step: int) -> float | None:
        """Of what the finished jobs had reached by `step`, lower is better; None if too few."""
        assert self.min_jobs is not None
        reached = []
        for path in self.folder.parent.glob("*/metrics.csv"):
            result = read_result(path.parent)
            if result is None or result.get("pruned") or path.parent == self.folder:
                continue
            steps, values = read_curves(path).get(self.monitor, ([], []))
            so_far = [
                self._sign * value for at, value in zip(steps, values, strict=True) if at <= step
            ]
            if so_far:
                reached.append(min(so_far))
        return statistics.median(reached) if len(reached) >= self.min_jobs else None


class CodebookDrift(Callback):
    """Log how far the codebook moved since the last validation; see that all ranks have the same.

    `val/codebook_drift` is the mean distance that a row moved over the mean length of a row. A
    prior needs codes that stand still: it should fall towards 0.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compare with the rows of the last validation.

        Raises:
            DivergenceError: If the ranks' codebooks differ.
        """
        quantizer = pl_module.net.quantizer
        if trainer.sanity_checking or not isinstance(quantizer, VectorQuantizer):
            return
        rows = quantizer.table().detach().clone()
        # A digest of the bytes, which a sum is not: permuted rows have the same sum.
        digest = hashlib.sha256(rows.cpu().contiguous().numpy().data).hexdigest()
        if len(set(gathered(digest))) > 1:
            raise DivergenceError(
                f"step {trainer.global_step}: the ranks' codebooks differ; was the quantizer "
                "called, or updated, on some ranks only?"
            )
        if self._last is not None and quantizer.initialised:
            moved = (rows - self._last.to(rows)).norm(dim=1).mean()
            pl_module.log("val/codebook_drift", moved / rows.norm(dim=1).mean())
        self._last = rows if quantizer.initialised else None

    def state_dict(self) -> dict[str, Any]:
        """The rows of the last validation."""
        return {"rows": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._last = state_dict["rows"]


class ReconstructionPictures(Callback):
    """Validation images above their reconstructions and above their codes, after each validation.

    Loggers that take histograms also get the hits of each code in the validation split.

    Args:
        folder: Where the PNGs go; every logger gets them too.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw; in evaluation mode, so the codebook does not move."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        data: PixelDataModule = trainer.datamodule  # type: ignore[attr-defined]
        images = from_uint8(data.datasets["val"].preview(PICTURED).data.to(pl_module.device))
        with torch.no_grad():
            output = pl_module.net(images)
        log_picture(trainer, "reconstructions", pairs(images, output.reconstruction), self.folder)
        codes = output.quantized.codes
        if codes is not None:
            log_picture(trainer, "codes", code_maps(images, codes), self.folder)
        if pl_module.code_counts is not None:
            log_histogram(trainer, "val/codebook_histogram", pl_module.code_counts)


class SamplePictures(Callback):
    """Samples of the prior, decoded, after each validation; a column per class if there are any.

    Args:
        folder: Where the PNGs go; every logger gets them too.
        seed: Of the samples, the same each time, so that pictures can be compared.
        rows: Samples per class.
    """

    def __init__(self, folder: str, seed: int, rows: int = 4) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self.rows = rows

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw; before the averaged weights are swapped out again."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        net, data = pl_module.net, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CodesDataModule)
        columns = min(net.num_classes or 10, 10)
        count = columns * self.rows
        labels = torch.arange(count) % columns if net.num_classes else None
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "pictures"))
        codes = sample(net, (count, *data.grid), labels, generator=generator)
        with torch.no_grad():
            images = data.vqvae.to(codes.device).decode(codes)
        names = data.images.class_names[:columns] if net.num_classes else []
        parts = {name: grid(images[row::columns], 1) for row, name in enumerate(names)}
        log_picture(trainer, "samples", grid(images, columns), self.folder, parts)
