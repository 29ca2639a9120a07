"""Stage 1: train a VQ-VAE."""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from vqvae_lightning.data.images import Batch, PixelDataModule
from vqvae_lightning.distributed import all_reduce
from vqvae_lightning.metrics import CodebookUsage, LatentUsage
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.pixels import to_uint8
from vqvae_lightning.quantizers import GaussianBottleneck, QuantizerOutput
from vqvae_lightning.tasks.optimization import (
    OptimizerFactory,
    WarmupCosine,
    WatchedTask,
    compile_once,
    optimization,
)


class VQVAETask(WatchedTask):
    """Reconstruction and quantizer losses of a VQ-VAE (arXiv:1711.00937, equation 3).

    The reconstruction term is the squared error over the variance of the training pixels (NMSE), so
    that it weighs against the quantizer's terms alike on every data set.

    Args:
        net: The network.
        optimizer: Makes the optimizer out of the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
        channels_last: Store images and weights with the channels innermost, as convolutions on a
            CPU and on tensor cores read them; the quantizer's rows are then contiguous.
        compile: Compile encoder and decoder with `torch.compile`; the quantizer, which talks to
            other ranks, stays as it is.
    """

    pixel_variance: Tensor

    def __init__(
        self,
        net: VQVAE,
        optimizer: OptimizerFactory,
        schedule: WarmupCosine | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.parts_to_compile: list[nn.Module] = [net.encoder, net.decoder] if compile else []
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.total_steps = float("inf")
        self.since_logged: dict[str, float] = {}
        self.register_buffer("pixel_variance", torch.ones(()), persistent=False)
        quantizer = net.quantizer
        rows = quantizer.num_codes * quantizer.codes_per_position
        self.codebook_usage = CodebookUsage(rows) if rows else None
        self.code_counts: Tensor | None = None  # hits of each code when last logged
        self.latent_usage: LatentUsage | None = None
        self.squared_error = MeanSquaredError()

    def setup(self, stage: str) -> None:
        """Take the variance of the training pixels, and the size of the grid, from the data."""
        data: PixelDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.pixel_variance.fill_(data.pixel_variance)
        compile_once(self.parts_to_compile)
        if isinstance(self.net.quantizer, GaussianBottleneck):
            grid = self.net.grid(*data.image_shape[1:])
            self.latent_usage = LatentUsage(self.net.quantizer.code_dim, *grid).to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on images in [-1, 1]; logs every `trainer.log_every_n_steps`."""
        loss, terms, _, quantized = self._losses(batch.data)
        self._use(quantized)
        self.losses.add(self.global_step, loss, terms)
        # Of accumulated batches the last one speaks for all.
        accumulated = (batch_idx + 1) % self.trainer.accumulate_grad_batches
        steps = not accumulated or self.trainer.is_last_batch
        if steps and (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            logged: dict[str, Any] = {f"train/{name}": v for name, v in terms.items()}
            for name, weight in self.net.quantizer.weights.items():
                if name in terms:
                    logged[f"train/{name}_weighted"] = weight * terms[name]
            self.log("train/loss", loss, prog_bar=True)
            logged |= {f"train/{name}": value for name, value in self.since_logged.items()}
            self.since_logged = {}
            self.log_dict(logged)
            self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
            self._log_use("train")
        return loss * self._share(len(batch.data))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the epoch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics of the epoch."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Start the epoch's histogram: training has been filling it."""
        self._reset_use()

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

    @torch.no_grad()
    def validated(self, grid: tuple[int, int]) -> set[str]:
        """Names that each validation logs, for latents of `grid` rows and columns."""
        # Asked rather than listed, as any quantizer has terms of its own; and a copy is asked, as
        # those of the library set their codebook at the first call.
        quantizer: Any = copy.deepcopy(cast(Any, self.net.quantizer)).eval()
        with torch.random.fork_rng(devices=[]):
            terms = quantizer(torch.zeros(1, quantizer.encoder_channels, *grid)).terms
        names = {"loss", "mse", "nmse", "psnr_db", *terms}
        if self.codebook_usage is not None:
            names |= {"perplexity", "codebook_use"}
        if isinstance(quantizer, GaussianBottleneck):
            names |= {"active_dims", *(f"kl_nats_dim{i}" for i in range(quantizer.code_dim))}
        return {f"val/{name}" for name in names}

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        self.total_steps = float(self.trainer.estimated_stepping_batches)
        return optimization(
            self.net.parameters(), self.optimizer_factory, self.schedule, self.total_steps
        )

    def _losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, QuantizerOutput]:
        output = self.net(images)
        squared_error = F.mse_loss(output.reconstruction.float(), images)
        # 4: pixels in [-1, 1] vary by four times their variance in [0, 1].
        nmse = squared_error / (4 * self.pixel_variance)
        loss = nmse + output.quantized.loss
        terms = {"nmse": nmse, **output.quantized.terms}
        return loss, terms, output.reconstruction, output.quantized

    def _share(self, images: int) -> float | Tensor:
        """This rank's part of the step's images, times the ranks: 1 where all have as many.

        DistributedDataParallel averages the ranks' gradients as if their batches were of one size.
        """
        if self.trainer.world_size == 1:
            return 1.0
        # Filled there: a copy of a number from here would wait for a GPU.
        total = all_reduce(torch.full((), float(images), device=self.device))
        return images * self.trainer.world_size / total

    def _use(self, quantized: QuantizerOutput) -> None:
        if self.codebook_usage is not None and quantized.codes is not None:
            codes = quantized.codes
            if codes.ndim > 3:  # several codebooks: a row of each is a code of its own
                steps = torch.arange(codes.shape[-1], device=codes.device)
                codes = codes + steps * self.net.quantizer.num_codes
            self.codebook_usage.update(codes)
        if self.latent_usage is not None and quantized.posterior is not None:
            self.latent_usage.update(*quantized.posterior)

    def _log_use(self, split: str) -> None:
        """Log how codebook or latents were used since the last time, and start anew."""
        # Decided alike on all ranks: `compute` waits for them. A warm-up gives no codes to count.
        if self.codebook_usage is not None and (
            split != "train" or self.codebook_usage.update_called
        ):
            usage = self.codebook_usage.compute()
            self.log(f"{split}/perplexity", usage["perplexity"], prog_bar=split == "train")
            self.log(f"{split}/codebook_use", usage["use"])
            self.code_counts = usage["counts"]
        if self.latent_usage is not None:
            kl, active = self.latent_usage.compute().values()
            self.log(f"{split}/active_dims", active.sum().float(), prog_bar=split == "train")
            if split != "train":
                self.log_dict({f"{split}/kl_nats_dim{i}": nats for i, nats in enumerate(kl)})
        self._reset_use()

    def _reset_use(self) -> None:
        for metric in (self.codebook_usage, self.latent_usage):
            if metric is not None:
                metric.reset()

    def _evaluate(self, batch: Batch, split: str) -> None:
        loss, terms, reconstruction, quantized = self._losses(batch.data)
        self._use(quantized)
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
        error = self.squared_error.compute()
        self.log_dict({f"{split}/mse": error, f"{split}/psnr_db": -10 * torch.log10(error)})
        self.log(f"{split}/nmse", error / self.pixel_variance, prog_bar=True)
        self.squared_error.reset()
        self._log_use(split)
