"""The LightningModules: losses, logged metrics and optimizers."""

from vqvae_lightning.tasks.classifier import ClassifierTask
from vqvae_lightning.tasks.optimization import WarmupCosine
from vqvae_lightning.tasks.prior import PriorTask
from vqvae_lightning.tasks.vqvae import VQVAETask

__all__ = ["ClassifierTask", "PriorTask", "VQVAETask", "WarmupCosine"]
