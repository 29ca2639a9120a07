"""Pictures, histograms and results for every logger of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from vqvae_lightning.loggers.tensorboard import TensorBoardMedia
from vqvae_lightning.loggers.wandb import WandbMedia, WandbRun
from vqvae_lightning.loggers.writer import Array, MediaWriter, build_histogram
from vqvae_lightning.pictures import save_png


def log_picture(
    trainer: pl.Trainer,
    name: str,
    picture: Tensor,
    folder: Path,
    parts: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a picture as a PNG, and log it with every logger that shows pictures.

    Args:
        trainer: Trainer with the loggers and the step.
        name: Name of the picture and of its file.
        picture: (3, H, W) uint8.
        folder: Folder for the PNG.
        parts: The same picture in parts, by caption, for loggers that show captions.
    """
    save_png(picture, folder / f"{name}_{trainer.global_step:07d}.png")
    whole = _to_array(picture)
    arrays = {caption: _to_array(part) for caption, part in (parts or {}).items()}
    for writer in _list_writers(trainer.loggers):
        writer.write_picture(f"val/{name}", whole, _get_step(trainer), arrays)


def log_histogram(trainer: pl.Trainer, name: str, counts: Tensor) -> None:
    """Log the hits (K,) of each code, the most used first, with every logger that shows histograms.

    Args:
        trainer: Trainer with the loggers and the step.
        name: Logged name.
        counts: (K,) hits.
    """
    histogram = build_histogram(counts)
    for writer in _list_writers(trainer.loggers):
        writer.write_histogram(name, histogram, _get_step(trainer))


def log_result(
    loggers: Sequence[Logger],
    config: dict[str, Any],
    metrics: dict[str, float],
    pictures: list[Path],
) -> None:
    """Log the metrics and pictures of a finished evaluation, and end the loggers' runs.

    Args:
        loggers: Lightning's loggers.
        config: The whole resolved config.
        metrics: Logged name to value.
        pictures: PNG files, logged under their names.
    """
    for logger in loggers:
        logger.log_hyperparams(config)
        logger.log_metrics(metrics, 0)
        for writer in _list_writers([logger]):
            for path in pictures:
                writer.write_picture(path.stem, np.asarray(Image.open(path)), 0)
        if isinstance(logger, WandbRun):
            logger.finish(0)
        else:
            logger.save()


def _list_writers(loggers: Sequence[Logger]) -> list[MediaWriter]:
    """List a writer for each logger that shows pictures."""
    writers: list[MediaWriter] = []
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            writers.append(TensorBoardMedia(logger))
        elif isinstance(logger, WandbLogger):
            writers.append(WandbMedia(logger))
    return writers


def _get_step(trainer: pl.Trainer) -> int:
    """Get the step under which Lightning logs the metrics of the current validation."""
    return trainer.global_step - 1


def _to_array(picture: Tensor) -> Array:
    return picture.movedim(0, -1).numpy()
