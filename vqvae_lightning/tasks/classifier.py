"""Train the classifier that judges samples, on real training images only."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.data.images import Batch
from vqvae_lightning.networks.classifier import Classifier
from vqvae_lightning.tasks.optimization import (
    OptimizerFactory,
    WarmupCosine,
    configure_optimizer,
)


class ClassifierTask(pl.LightningModule):
    """Trains a classifier with the cross-entropy of the labels.

    Args:
        net: Network to train.
        optimizer: Builds the optimizer from the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
    """

    def __init__(
        self, net: Classifier, optimizer: OptimizerFactory, schedule: WarmupCosine | None = None
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.optimizer_factory = optimizer
        self.schedule = schedule

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images in [-1, 1]."""
        assert batch.labels is not None
        loss = F.cross_entropy(self.net(batch.data).float(), batch.labels)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        return configure_optimizer(
            self.net.parameters(),
            self.optimizer_factory,
            self.schedule,
            float(self.trainer.estimated_stepping_batches),
        )
