"""Stop jobs of a sweep that lag behind the others."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from vqvae_lightning.console import console
from vqvae_lightning.errors import check_positive
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_curves, read_result
from vqvae_lightning.units import get_direction


class MedianPruning(Callback):
    """Stops a job whose best score is worse than the median of the sweep's finished jobs.

    This is Optuna's median rule for every sweeper and launcher. Each validation compares this job's
    best score so far with the best score that each finished job had reached by the same step, read
    from its `metrics.csv`. A stopped job counts as finished, is tested, and has `pruned: true` in
    its `result.json`. Other jobs are not compared with a stopped job. The stages of a pipeline are
    never stopped, because they have no other jobs in the same folder.

    Args:
        folder: Folder of this job; the other jobs are in the same parent folder.
        monitor: Name of the score, from which follows whether higher is better.
        min_jobs: Number of finished jobs needed for a comparison; None never stops.
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
        self._sign = -1.0 if get_direction(monitor) == "max" else 1.0
        self._best = math.inf
        self._validations = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare on rank 0, which decides for all ranks."""
        if self.min_jobs is None or trainer.sanity_checking:
            return
        self._validations += 1
        score = self._sign * float(trainer.callback_metrics[self.monitor])
        self._best = min(self._best, score)
        if self._validations <= self.warmup:
            return
        median = self._compute_median(trainer.global_step) if trainer.is_global_zero else None
        median = trainer.strategy.broadcast(median)
        if median is None or self._best <= median:
            return
        self.pruned = trainer.should_stop = True
        if trainer.is_global_zero:
            console.print(
                f"stopped after step {trainer.global_step}: best {self.monitor} "
                f"{self._sign * self._best:.4g}; the median of the other jobs at that step was "
                f"{self._sign * median:.4g} (callbacks.pruning).",
                highlight=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """The best score, and the number of validations."""
        return {"best": self._best, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._best, self._validations = state_dict["best"], state_dict["validations"]

    def _compute_median(self, step: int) -> float | None:
        """Median of the finished jobs' best scores by `step`, lower is better; None if too few."""
        assert self.min_jobs is not None
        reached = []
        for path in self.folder.parent.iterdir():
            result = read_result(path)
            metrics = RunFolder(path).metrics
            if path == self.folder or result is None or result.get("pruned"):
                continue
            if not metrics.is_file():
                continue
            steps, values = read_curves(metrics).get(self.monitor, ([], []))
            so_far = [
                self._sign * value for at, value in zip(steps, values, strict=True) if at <= step
            ]
            if so_far:
                reached.append(min(so_far))
        return statistics.median(reached) if len(reached) >= self.min_jobs else None
