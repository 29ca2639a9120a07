"""Stage 2: train a prior over the codes of a VQ-VAE."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import Batch
from vqvae_lightning.errors import InputError, Key, check_range
from vqvae_lightning.metrics import look_up_codes, unigram_log_probabilities
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers.protocol import Quantizer
from vqvae_lightning.tasks.compilation import compile_once
from vqvae_lightning.tasks.divergence import WatchedTask
from vqvae_lightning.tasks.optimization import (
    OptimizerFactory,
    WarmupCosine,
    configure_optimizer,
)

STARTS = ("codebook", "random")


def compute_loss(logits: Tensor, codes: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy of the codes in nats.

    Args:
        logits: (B, K, h, w) scores of each code, or (B, K, h, w, Q).
        codes: (B, h, w) targets, or (B, h, w, Q).
        label_smoothing: Share of the target that is spread over all codes (Szegedy et al. 2015,
            arXiv:1512.00567, section 7).
    """
    # With the scores of a code side by side, as channels_last stores them, the softmax needs no
    # copy.
    scores = logits.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(scores, codes.flatten(), label_smoothing=label_smoothing)


def decode_each_code(quantizer: Quantizer) -> Tensor:
    """Decode each code of each codebook on its own, as (Q, K, D).

    With several codes per position, the other codes of the position are 0. They add the same to the
    vectors of all codes of a codebook, in whose differences it cancels.
    """
    each, num_codes = quantizer.codes_per_position, quantizer.num_codes
    tables = []
    for book in range(each):
        codes = torch.zeros(num_codes, 1, 1, each, dtype=torch.long)
        codes[:, 0, 0, book] = torch.arange(num_codes)
        vectors = quantizer.decode(codes if each > 1 else codes[..., 0])
        tables.append(vectors.flatten(1))
    return torch.stack(tables)


class PriorTask(WatchedTask):
    """Trains a PixelCNN by maximum likelihood (van den Oord et al. 2016, arXiv:1606.05328).

    Each validation also logs the nats per code of two baselines: the uniform model, log K, and the
    unigram model, which is the histogram of the training codes with one added to each count. With
    several codes per position, each codebook has its own histogram, and nats per code are the mean
    over all codes. A prior that beats the unigram model has learnt how codes depend on each other.

    Args:
        net: Network to train.
        optimizer: Builds the optimizer from the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
        label_smoothing: As in `compute_loss`. Logged nats per code are never smoothed.
        start: First weights. With `codebook`, similar codes start alike and layers start with
            larger weights (`PixelCNN.start_from`). `random` has the usual weights of torch.
        channels_last: Store maps and weights with the channels innermost.
        compile: Compile the network with `torch.compile`.

    Raises:
        InputError: If `label_smoothing` is outside [0, 1], or `start` is unknown.
    """

    unigram: Tensor

    def __init__(
        self,
        net: PixelCNN,
        optimizer: OptimizerFactory,
        schedule: WarmupCosine | None = None,
        label_smoothing: float = 0.0,
        start: Literal["codebook", "random"] = "random",
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise InputError(Key("start"), f"={start} must be one of {', '.join(STARTS)}.")
        self.start = start
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.parts_to_compile: list[nn.Module] = [net] if compile else []
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.label_smoothing = check_range("label_smoothing", label_smoothing, 0, 1)
        self.codes_per_dim = 0.0
        each = net.codes_per_position
        shape = (each, net.num_codes) if each > 1 else (net.num_codes,)
        self.register_buffer("unigram", torch.zeros(shape), persistent=False)

    def start_from(self, quantizer: Quantizer, generator: torch.Generator) -> None:
        """Set the first weights, before the first step of a training.

        Args:
            quantizer: Quantizer of the VQ-VAE, trained.
            generator: CPU generator, equal on all ranks.
        """
        if self.start == "codebook":
            self.net.start_from(decode_each_code(quantizer), generator)

    def setup(self, stage: str) -> None:
        """Compute the unigram model from the training codes."""
        data: CodesDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        compile_once(self.parts_to_compile)
        self.unigram.copy_(unigram_log_probabilities(data.histogram()))
        codes = math.prod(data.grid) * self.net.codes_per_position
        self.codes_per_dim = codes / math.prod(data.images.image_shape)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of codes; log every `trainer.log_every_n_steps`.

        Logged values are means over all ranks, which have equal parts of the batch.
        """
        logits, codes = self._compute_logits(batch), batch.data
        loss = compute_loss(logits, codes, self.label_smoothing)
        self.losses.add(self.global_step, loss, {"loss": loss})
        if self.step_is_logged:
            with torch.no_grad():
                nats = compute_loss(logits, codes)
                accuracy = (logits.argmax(1) == codes).float().mean()
            self.log("train/nats_per_code", nats, prog_bar=True, sync_dist=True)
            self.log("train/bits_per_code", nats / math.log(2), sync_dist=True)
            self.log("train/accuracy", accuracy, sync_dist=True)
            if self.label_smoothing:
                self.log("train/loss", loss, sync_dist=True)
            self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def list_validation_metrics(self, grid: tuple[int, int]) -> set[str]:
        """List the names that each validation logs, the same for every grid of codes."""
        return {
            "val/accuracy",
            "val/bits_per_code",
            "val/nats_per_code",
            "val/prior_bits_per_dim",
            "val/unigram_nats_per_code",
            "val/uniform_nats_per_code",
        }

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        return configure_optimizer(
            self.net.parameters(),
            self.optimizer_factory,
            self.schedule,
            float(self.trainer.estimated_stepping_batches),
        )

    def _compute_logits(self, batch: Batch) -> Tensor:
        labels = batch.labels if self.net.num_classes else None
        return self.net(batch.data, labels).float()  # type: ignore[no-any-return]

    def _evaluate(self, batch: Batch) -> None:
        logits, codes = self._compute_logits(batch), batch.data
        means = {
            "nats_per_code": compute_loss(logits, codes),
            "accuracy": (logits.argmax(1) == codes).float().mean(),
            "unigram_nats_per_code": -look_up_codes(self.unigram, codes).mean(),
        }
        self.means.add(means, len(codes))

    def _log_epoch(self, split: str) -> None:
        means = self.means.compute()
        nats = means.pop("nats_per_code")
        bits = nats / math.log(2)
        self.log(f"{split}/nats_per_code", nats, prog_bar=True)
        logged = {
            **means,
            "bits_per_code": bits,
            "prior_bits_per_dim": bits * self.codes_per_dim,
            "uniform_nats_per_code": math.log(self.net.num_codes),
        }
        self.log_dict({f"{split}/{name}": value for name, value in logged.items()})
