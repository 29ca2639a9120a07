"""Stage 1: train a VQ-VAE."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanSquaredError

from vqvae_lightning.data.images import Batch
from vqvae_lightning.metrics import CodebookUsage
from vqvae_lightning.networks.autoencoder import VQVAE, to_uint8
from vqvae_lightning.tasks.optimization import (
    OptimizerFactory,
    WarmupCosine,
    optimization,
    require_finite,
)


class VQVAETask(pl.LightningModule):
    """Reconstruction and quantizer losses of a VQ-VAE (arXiv:1711.00937, equation 3).

    The reconstruction term is the squared error over the variance of the training pixels (NMSE), so
    that it weighs against the quantizer's terms alike on every data set.

    Args:
        net: The network.
        optimizer: Makes the optimizer out of the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
    """

    pixel_variance: Tensor

    def __init__(
        self, net: VQVAE, optimizer: OptimizerFactory, schedule: WarmupCosine | None = None
    ) -> None:
        super().__init__()
        # Convolutions on a CPU and on tensor cores read channels last; the quantizer's rows are
        # then contiguous.
        self.net = net.to(memory_format=torch.channels_last)
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.total_steps = float("inf")
        self.since_logged: dict[str, float] = {}
        self.register_buffer("pixel_variance", torch.ones(()), persistent=False)
        self.codebook_usage = CodebookUsage(net.quantizer.num_codes)
        self.squared_error = MeanSquaredError()

    def setup(self, stage: str) -> None:
        """Take the variance of the training pixels from the data."""
        self.pixel_variance.fill_(self.trainer.datamodule.pixel_variance)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on images in [-1, 1]; logs every `trainer.log_every_n_steps`."""
        loss, terms, _ = self._losses(batch.data)
        require_finite(self.global_step, loss, terms)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            logged: dict[str, Any] = {f"train/{name}": v for name, v in terms.items()}
            for name, weight in self.net.quantizer.weights.items():
                if name in terms:
                    logged[f"train/{name}_weighted"] = weight * terms[name]
            self.log("train/loss", loss, prog_bar=True)
            logged |= {f"train/{name}": value for name, value in self.since_logged.items()}
            self.since_logged = {}
            self.log_dict(logged)
            self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
            if self.codebook_usage.update_called:
                usage = self.codebook_usage.compute()
                self.log("train/perplexity", usage["perplexity"], prog_bar=True)
                self.log("train/codebook_use", usage["use"])
                self.codebook_usage.reset()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the epoch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the epoch."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's histogram: training has been filling it."""
        self.codebook_usage.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole split."""
        self._log_epoch("test")

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Step the optimizer, then let the quantizer learn from the batches of this step."""
        super().optimizer_step(*args, **options)
        progress = (self.global_step + 1) / self.total_steps
        for name, value in self.net.quantizer.update(progress).items():
            self.since_logged[name] = self.since_logged.get(name, 0.0) + value

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        self.total_steps = float(self.trainer.estimated_stepping_batches)
        return optimization(
            self.net.parameters(), self.optimizer_factory, self.schedule, self.total_steps
        )

    def _losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        output = self.net(images)
        squared_error = F.mse_loss(output.reconstruction.float(), images)
        # 4: pixels in [-1, 1] vary by four times their variance in [0, 1].
        nmse = squared_error / (4 * self.pixel_variance)
        loss = nmse + output.quantized.loss
        if output.quantized.codes is not None:
            self.codebook_usage.update(output.quantized.codes)
        return loss, {"nmse": nmse, **output.quantized.terms}, output.reconstruction

    def _evaluate(self, batch: Batch, split: str) -> None:
        loss, terms, reconstruction = self._losses(batch.data)
        self.squared_error.update(
            to_uint8(reconstruction).float() / 255, to_uint8(batch.data).float() / 255
        )
        logged = {f"{split}/{name}": value for name, value in terms.items() if name != "nmse"}
        self.log_dict(
            {f"{split}/loss": loss, **logged},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.data),
        )

    def _log_epoch(self, split: str) -> None:
        error, usage = self.squared_error.compute(), self.codebook_usage.compute()
        self.log_dict(
            {
                f"{split}/mse": error,
                f"{split}/psnr_db": -10 * torch.log10(error),
                f"{split}/perplexity": usage["perplexity"],
                f"{split}/codebook_use": usage["use"],
            }
        )
        self.log(f"{split}/nmse", error / self.pixel_variance, prog_bar=True)
        self.squared_error.reset()
        self.codebook_usage.reset()
