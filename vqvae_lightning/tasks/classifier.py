"""Train the classifier that judges samples; on real training images only."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae_lightning.data.images import Batch
from vqvae_lightning.networks.classifier import Classifier
from vqvae_lightning.tasks.optimization import OptimizerFactory, WarmupCosine, optimization


class ClassifierTask(pl.LightningModule):
    """Cross-entropy of the labels.

    Args:
        net: The network.
        optimizer: Makes the optimizer out of the parameters.
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
        """One step on images in [-1, 1]."""
        assert batch.labels is not None
        loss = F.cross_entropy(self.net(batch.data).float(), batch.labels)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        total = float(self.trainer.estimated_stepping_batches)
        return optimization(self.net.parameters(), self.optimizer_factory, self.schedule, total)
