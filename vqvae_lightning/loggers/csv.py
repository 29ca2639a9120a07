"""`metrics.csv`: one row per logged step."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, which writes `metrics.csv` in the run folder and keeps it on resume.

    Args:
        save_dir: Run folder.
        flush_logs_every_n_steps: As in `CSVLogger`.
    """

    def __init__(self, save_dir: str, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(
            save_dir, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps
        )
        path = Path(save_dir) / "metrics.csv"
        self._earlier: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self._earlier = [
                    {key: value for key, value in row.items() if value}
                    for row in csv.DictReader(file)
                ]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log a row. In a resumed run, the first call restores the rows of earlier steps."""
        if self._earlier and step is not None:
            rows = [row for row in self._earlier if int(row["step"]) < step]
            self._earlier = []
            self.experiment.metrics = rows
            self.save()
        super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing, because `config.yaml` contains the hyperparameters."""
