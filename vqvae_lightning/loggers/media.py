"""Pictures, histograms and results for every logger of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from vqvae_lightning.loggers.wandb import HISTOGRAM_BINS, WandbRun
from vqvae_lightning.pictures import save_png


def log_picture(
    trainer: pl.Trainer,
    name: str,
    picture: Tensor,
    folder: Path,
    parts: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a picture (3, H, W) uint8 to `folder` and to every logger that takes pictures.

    Args:
        trainer: Whose loggers and step.
        name: Of the picture.
        picture: The whole.
        folder: For the PNG.
        parts: The same in captioned parts, for loggers that show captions.
    """
    save_png(picture, folder / f"{name}_{trainer.global_step:07d}.png")
    step = trainer.global_step - 1  # as Lightning numbers the figures of this validation
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"val/{name}", picture, step)
        elif isinstance(logger, WandbLogger):
            images = [part.movedim(0, -1).numpy() for part in (parts or {"": picture}).values()]
            captions = {"caption": list(parts)} if parts else {}
            logger.log_image(f"val/{name}", images, step=step, **captions)


def log_histogram(trainer: pl.Trainer, name: str, counts: Tensor) -> None:
    """Give a histogram, the hits (K,) of each code, most used first, to loggers that take one.

    Above 512 codes neighbours share a bar.
    """
    heights = counts.sort(descending=True).values.cpu().double().numpy()
    edges = np.linspace(0, len(heights), min(len(heights), HISTOGRAM_BINS) + 1)
    bars, _ = np.histogram(np.arange(len(heights)), edges, weights=heights)
    places = np.arange(len(heights))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram_raw(
                name,
                min=0.0,
                max=float(len(heights)),
                num=float(heights.sum()),
                sum=float((heights * places).sum()),
                sum_squares=float((heights * places**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=bars.tolist(),
                global_step=trainer.global_step - 1,
            )
        elif isinstance(logger, WandbLogger):
            import wandb

            histogram = wandb.Histogram(np_histogram=(bars.tolist(), edges.tolist()))
            logger.log_metrics({name: histogram}, trainer.global_step - 1)  # type: ignore[dict-item]


def log_result(
    loggers: Sequence[Any], config: dict[str, Any], metrics: dict[str, float], pictures: list[Path]
) -> None:
    """Give the figures and PNG files of a finished evaluation to loggers, and end their runs.

    Args:
        loggers: Lightning's loggers.
        config: The whole resolved config.
        metrics: By logged name.
        pictures: Named by their files.
    """
    for logger in loggers:
        logger.log_hyperparams(config)
        logger.log_metrics(metrics, 0)
        for path in pictures:
            picture = np.asarray(Image.open(path))
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(path.stem, picture, 0, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(path.stem, [picture], step=0)
        if isinstance(logger, WandbRun):
            logger.finish(0)
        else:
            logger.save()
