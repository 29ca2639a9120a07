"""Stage 1: train a VQ-VAE."""

import copy
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from vqvae_lightning.data.images import Batch, PixelDataModule
from vqvae_lightning.distributed import all_reduce, get_rank_and_world
from vqvae_lightning.likelihoods import Likelihood, PixelDistribution
from vqvae_lightning.metrics import CodebookUsage, LatentUsage
from vqvae_lightning.networks.autoencoder import VQVAE, VQVAEOutput
from vqvae_lightning.pixels import to_uint8
from vqvae_lightning.quantizers import GaussianBottleneck, QuantizerOutput
from vqvae_lightning.tasks.compilation import compile_once
from vqvae_lightning.tasks.divergence import WatchedTask
from vqvae_lightning.tasks.optimization import (
    OptimizerFactory,
    WarmupCosine,
    configure_optimizer,
)


def compute_loss(
    images: Tensor, output: VQVAEOutput, pixel_variance: Tensor, likelihood: Likelihood
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the training loss of a VQ-VAE (arXiv:1711.00937, equation 3).

    The reconstruction term is the squared error divided by the variance of the training pixels
    (NMSE), so that its weight relative to the quantizer's terms is the same on every data set. With
    a likelihood, the term is its negative log in nats per dimension, times its weight. NMSE is then
    only logged. An autoregressive decoder has none: it sees the earlier pixels of the image itself,
    so the mean of its distributions is no reconstruction.

    Args:
        images: (B, C, H, W) in [-1, 1].
        output: What the network computes for `images`.
        pixel_variance: () variance of the training pixels in [0, 1].
        likelihood: Likelihood of the network.

    Returns:
        The loss (), and its terms by name, each () and unweighted.
    """
    terms = dict(output.quantized.terms)
    if output.reconstruction is not None:
        squared_error = F.mse_loss(output.reconstruction.float(), images)
        # Pixels in [-1, 1] have 4 times the variance of pixels in [0, 1].
        terms = {"nmse": squared_error / (4 * pixel_variance), **terms}
    if not isinstance(likelihood, PixelDistribution):
        return terms["nmse"] + output.quantized.loss, terms
    nats = likelihood.compute_loss(output.output, to_uint8(images))
    terms["nll_nats_per_dim"] = nats
    return likelihood.weight * nats + output.quantized.loss, terms


class VQVAETask(WatchedTask):
    """Trains a VQ-VAE, and measures reconstructions and the use of the codebook.

    Args:
        net: Network to train.
        optimizer: Builds the optimizer from the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
        channels_last: Store weights, and so the outputs of convolutions, with the channels
            innermost. Convolutions are faster on CPUs and tensor cores, and the quantizer's rows
            are contiguous.
        compile: Compile encoder and decoder with `torch.compile`. The quantizer communicates with
            other ranks and is not compiled.
    """

    pixel_variance: Tensor
    codes_kept = False

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
        books = quantizer.num_codes, quantizer.codes_per_position
        # Apart, because a validation may come between two logged steps.
        self.codebook_usage, self.latent_usage = nn.ModuleDict(), nn.ModuleDict()
        if quantizer.num_codes:
            for part in ("fit", "evaluation"):
                self.codebook_usage[part] = CodebookUsage(*books)
        self.code_counts: Tensor | None = None  # hits of each code, as last logged
        self.squared_error = MeanSquaredError()

    def keep_codes(self, source: VQVAE) -> None:
        """Copy the weights of `source` and train only the decoder and the likelihood.

        The last layer of the decoder keeps its initial weights if the likelihoods differ in their
        number of outputs, and a decoder of another kind keeps all of them. Codes stay those of
        `source`, so a prior on them stays valid.
        """
        self.codes_kept = True
        own, given = self.net.state_dict(), source.state_dict()
        fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
        extra = {k: v for k, v in given.items() if "extra_state" in k or ".pool" in k}
        self.net.load_state_dict({**own, **fits, **extra})
        self.net.encoder.requires_grad_(False)
        cast(nn.Module, self.net.quantizer).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; kept codes stay in evaluation mode, so that the quantizer never learns."""
        super().train(mode)
        if self.codes_kept:
            self.net.encoder.eval()
            # A continuous bottleneck learns nothing, and its decoder trains on samples.
            quantizer = cast(nn.Module, self.net.quantizer)
            quantizer.train(mode and self.net.quantizer.num_codes == 0)
        return self

    def setup(self, stage: str) -> None:
        """Read the variance of the training pixels and the size of the grid from the data."""
        data: PixelDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.pixel_variance.fill_(data.pixel_variance)
        compile_once(self.parts_to_compile)
        if isinstance(self.net.quantizer, GaussianBottleneck):
            grid = self.net.compute_grid(*data.image_shape[1:])
            for part in ("fit", "evaluation"):
                usage = LatentUsage(self.net.quantizer.code_dim, *grid)
                self.latent_usage[part] = usage.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of images in [-1, 1]; log every `trainer.log_every_n_steps`.

        Logged losses are means over the images of all ranks.
        """
        output = self.net(batch.data)
        loss, terms = compute_loss(batch.data, output, self.pixel_variance, self.net.likelihood)
        self._count_use(output.quantized, "fit")
        share = self._compute_share(len(batch.data))
        self.losses.add(self.global_step, loss, terms)
        # Only the last of the accumulated batches is logged.
        accumulated = (batch_idx + 1) % self.trainer.accumulate_grad_batches
        steps = not accumulated or self.trainer.is_last_batch
        if steps and self.step_is_logged:
            logged: dict[str, Any] = {f"train/{name}": share * v for name, v in terms.items()}
            for name, weight in self._list_weights().items():
                if name in terms:
                    logged[f"train/{name}_weighted"] = weight * share * terms[name]
            self.log("train/loss", share * loss, prog_bar=True, sync_dist=True)
            self.log_dict(logged, sync_dist=True)
            self.log_dict({f"train/{name}": value for name, value in self.since_logged.items()})
            # Zeros, because Lightning writes the last value of a missing name again.
            self.since_logged = dict.fromkeys(self.since_logged, 0.0)
            self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
            self._log_use("train")
        return share * loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Step the optimizer, then update the quantizer from the batches of this step."""
        super().optimizer_step(*args, **options)
        progress = (self.global_step + 1) / self.total_steps
        for name, value in self.net.quantizer.update(progress).items():
            self.since_logged[name] = self.since_logged.get(name, 0.0) + value

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what was counted since the last logged step, summed over the ranks."""
        super().on_save_checkpoint(checkpoint)
        device = self.trainer.strategy.root_device  # the module is on the CPU after training
        counted = {
            name: all_reduce(value.clone().to(device))
            for name, value in self._list_train_counts().items()
        }
        checkpoint["since_logged"] = {"sums": self.since_logged, "counted": counted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting on rank 0, which has the counts of all ranks."""
        stored = checkpoint.get("since_logged")  # none in the checkpoints of earlier versions
        if stored is None:
            return
        self.since_logged = dict(stored["sums"])
        if get_rank_and_world()[0] == 0:
            for name, value in self._list_train_counts().items():
                value.copy_(stored["counted"][name])

    @torch.no_grad()
    def list_validation_metrics(self, grid: tuple[int, int]) -> set[str]:
        """List the names that each validation logs, for latents of `grid` rows and columns."""
        # The quantizer is called, because each one has its own terms. A copy is called, because a
        # quantizer of the library sets its codebook in the first call.
        quantizer: Any = copy.deepcopy(cast(Any, self.net.quantizer)).eval()
        with torch.random.fork_rng(devices=[]):
            terms = quantizer(torch.zeros(1, quantizer.encoder_channels, *grid)).terms
        names = {"loss", *terms}
        if not self.net.autoregressive:
            names |= {"mse", "nmse", "psnr_db"}
        if isinstance(self.net.likelihood, PixelDistribution):
            names.add("nll_nats_per_dim")
        if self.codebook_usage:
            names |= {"perplexity", "codebook_use"}
        if isinstance(quantizer, GaussianBottleneck):
            names |= {"active_dims", *(f"kl_nats_dim{i}" for i in range(quantizer.code_dim))}
        return {f"val/{name}" for name in names}

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        self.total_steps = float(self.trainer.estimated_stepping_batches)
        return configure_optimizer(
            self.net.parameters(), self.optimizer_factory, self.schedule, self.total_steps
        )

    def _list_weights(self) -> dict[str, float]:
        """List the weight of each weighted term of the loss, by name."""
        weights = dict(self.net.quantizer.weights)
        if isinstance(self.net.likelihood, PixelDistribution):
            weights["nll_nats_per_dim"] = self.net.likelihood.weight
        return weights

    def _compute_share(self, images: int) -> float | Tensor:
        """Compute this rank's share of the step's images, times the number of ranks.

        It is 1 if all ranks have equally many images. DistributedDataParallel averages the ranks'
        gradients as if they had.
        """
        if self.trainer.world_size == 1:
            return 1.0
        # Created on the device, because copying a number there would wait for the GPU.
        total = all_reduce(torch.full((), float(images), device=self.device))
        return images * self.trainer.world_size / total

    def _list_train_counts(self) -> dict[str, Tensor]:
        """List the states of the metrics that count the use in training, by name."""
        metrics = [usage["fit"] for usage in (self.codebook_usage, self.latent_usage) if usage]
        return {name: value for one in metrics for name, value in one.metric_state.items()}  # type: ignore[union-attr, operator]

    def _count_use(self, quantized: QuantizerOutput, part: str) -> None:
        """Add a batch to the use of the codebook or of the latents."""
        if self.codebook_usage and quantized.codes is not None:
            self.codebook_usage[part].update(quantized.codes)  # type: ignore[operator]
        if self.latent_usage and quantized.posterior is not None:
            self.latent_usage[part].update(*quantized.posterior)  # type: ignore[operator]

    def _log_use(self, split: str) -> None:
        """Log how the codebook or the latents were used since the last call, and reset."""
        part = "fit" if split == "train" else "evaluation"
        codes: Any = self.codebook_usage[part] if self.codebook_usage else None
        latents: Any = self.latent_usage[part] if self.latent_usage else None
        # All ranks must decide alike, because `compute` waits for all. A warm-up has no codes.
        if codes is not None and (split != "train" or codes.update_called):
            usage = codes.compute()
            self.log(f"{split}/perplexity", usage["perplexity"], prog_bar=split == "train")
            self.log(f"{split}/codebook_use", usage["use"])
            self.code_counts = usage["counts"]
            codes.reset()
        if latents is not None:
            kl, active = latents.compute().values()
            self.log(f"{split}/active_dims", active.sum().float(), prog_bar=split == "train")
            if split != "train":
                self.log_dict({f"{split}/kl_nats_dim{i}": nats for i, nats in enumerate(kl)})
            latents.reset()

    def _evaluate(self, batch: Batch) -> None:
        output = self.net(batch.data)
        loss, terms = compute_loss(batch.data, output, self.pixel_variance, self.net.likelihood)
        self._count_use(output.quantized, "evaluation")
        if output.reconstruction is not None:
            self.squared_error.update(
                to_uint8(output.reconstruction).float() / 255, to_uint8(batch.data).float() / 255
            )
        means = {name: value for name, value in terms.items() if name != "nmse"}
        self.means.add({"loss": loss, **means}, len(batch.data))

    def _log_epoch(self, split: str) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in self.means.compute().items()})
        if not self.net.autoregressive:
            error = self.squared_error.compute()
            self.log_dict({f"{split}/mse": error, f"{split}/psnr_db": -10 * torch.log10(error)})
            self.log(f"{split}/nmse", error / self.pixel_variance, prog_bar=True)
            self.squared_error.reset()
        self._log_use(split)
