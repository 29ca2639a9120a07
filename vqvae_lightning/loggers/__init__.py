"""Loggers: `metrics.csv`, TensorBoard and Weights & Biases."""

from vqvae_lightning.loggers.csv import MetricsFile
from vqvae_lightning.loggers.media import log_histogram, log_picture, log_result
from vqvae_lightning.loggers.wandb import Input, WandbRun, name_run

__all__ = [
    "Input",
    "MetricsFile",
    "WandbRun",
    "log_histogram",
    "log_picture",
    "log_result",
    "name_run",
]
