"""Honest figures for a trained VQ-VAE and its prior, on images that neither has seen."""

import copy
import math
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from vqvae_lightning.callbacks import SeedSteps, StepProgress
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, SplitName
from vqvae_lightning.distributed import all_reduce, gathered, rank_and_world
from vqvae_lightning.metrics import CodebookUsage, entropy_nats, unigram_log_probabilities
from vqvae_lightning.networks.autoencoder import from_uint8, to_uint8
from vqvae_lightning.networks.likelihoods import discretised_logistic, fit_log_scale
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import Drawn, batch_that_fits, sample_batches, score
from vqvae_lightning.progress import progress_bar
from vqvae_lightning.randomness import stream_seed
from vqvae_lightning.tasks.classifier import ClassifierTask

SCALE_VALUES = 2**23  # pixel values of validation images that the decoder's scale is fitted on
LN2 = math.log(2)


@torch.inference_mode()
def reconstruction_metrics(
    codes: CodesDataModule, split: SplitName, device: torch.device
) -> dict[str, float]:
    """How well a split is reconstructed and how its codes use the codebook.

    Errors are measured on uint8-rounded images in [0, 1], `mse_unrounded` apart. `perplexity` is of
    the whole split's histogram; `perplexity_batch32`, the mean over batches of 32 images, is lower
    and only there to compare with older work. `dead_codes` never occur in the training split.
    """
    squared, unrounded = MeanSquaredError().to(device), MeanSquaredError().to(device)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
    psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean").to(
        device
    )
    usage = CodebookUsage(codes.num_codes).to(device)
    psnr_sum = torch.zeros((), dtype=torch.float64)
    for levels, _, grid in _pairs(codes, split, device, "reconstructing"):
        decoded = codes.vqvae.decode(grid).float()
        rounded, truth = to_uint8(decoded).float() / 255, levels.float() / 255
        squared.update(rounded, truth)
        unrounded.update(((decoded + 1) / 2).contiguous(), truth)
        ssim.update(rounded, truth)
        psnr_sum += psnr(rounded, truth).item() * len(levels)
        usage.update(grid)
    error, used = float(squared.compute()), usage.compute()
    stored = codes.datasets[split].data
    batch_perplexities = [
        entropy_nats(
            torch.from_numpy(stored[start : start + 32].astype("int64"))
            .flatten()
            .bincount(minlength=codes.num_codes)
        )
        .exp()
        .item()
        for start in range(0, len(stored) - 31, 32)
    ]
    return {
        "mse": error,
        "mse_unrounded": float(unrounded.compute()),
        "nmse": error / codes.images.pixel_variance,
        "psnr_db": -10 * math.log10(error),
        "psnr_per_image_db": float(all_reduce(psnr_sum)) / len(codes.datasets[split]),
        "ssim": cast(Tensor, ssim.compute()).item(),
        "perplexity": float(used["perplexity"]),
        **(
            {"perplexity_batch32": sum(batch_perplexities) / len(batch_perplexities)}
            if batch_perplexities
            else {}
        ),
        "code_entropy_bits": float(used["entropy_bits"]),
        "codebook_use": float(used["use"]),
        "dead_codes": float((codes.histogram() == 0).sum()),
    }


@torch.inference_mode()
def likelihood_metrics(
    codes: CodesDataModule, prior: PixelCNN | None, split: SplitName, device: torch.device
) -> dict[str, float]:
    """An upper bound on bits per dimension, term by term: -log2 p(x | z) - log2 p(z).

    p(x | z) is a discretised logistic around the reconstruction with one scale per channel, fitted
    on validation images; the bound holds because the encoder is deterministic. p(z) is uniform, the
    histogram of the training codes, or the prior; given the label where the prior is conditional,
    so the total is then -log2 p(x | y).
    """
    dims = math.prod(codes.images.image_shape)
    positions = math.prod(codes.grid)
    unigram = unigram_log_probabilities(codes.histogram()).to(device)
    by_position = _position_log_probabilities(codes).to(device)
    log_scale = _scale(codes, device)
    sums = {
        name: torch.zeros((), dtype=torch.float64)
        for name in ("pixels", "unigram", "position", "prior")
    }
    total = len(codes.datasets[split])
    for levels, labels, grid in _pairs(codes, split, device, "scoring"):
        mean = (codes.vqvae.decode(grid).float() + 1) * 127.5
        sums["pixels"] -= discretised_logistic(levels, mean, log_scale).double().sum().cpu()
        sums["unigram"] -= unigram[grid].double().sum().cpu()
        chosen = by_position.expand(len(grid), -1, -1, -1).gather(1, grid[:, None])
        sums["position"] -= chosen.double().sum().cpu()
        if prior is not None:
            own = labels if prior.num_classes else None
            sums["prior"] -= score(prior, grid, own).double().sum().cpu()
    summed = {name: float(all_reduce(value)) for name, value in sums.items()}
    per_code = {name: value / (total * positions) for name, value in summed.items()}
    pixels = summed["pixels"] / (LN2 * total * dims)
    rate = positions / (LN2 * dims)
    metrics = {
        "unigram_nats_per_code": per_code["unigram"],
        "position_nats_per_code": per_code["position"],
        "reconstruction_bits_per_dim": pixels,
        "uniform_bits_per_dim": rate * math.log(codes.num_codes),
        "histogram_bits_per_dim": rate * per_code["unigram"],
    }
    if prior is not None:
        nats = per_code["prior"]
        metrics = {"nats_per_code": nats, "bits_per_code": nats / LN2, **metrics}
        metrics["prior_bits_per_dim"] = rate * nats
        metrics["total_bits_per_dim"] = pixels + rate * nats
    return metrics


def train_classifier(
    task: ClassifierTask, images: PixelDataModule, trainer_options: dict[str, Any], batch_size: int
) -> nn.Module:
    """The network of `task`, trained on the real training images.

    Args:
        task: Untrained.
        images: Set up.
        trainer_options: Of Lightning's Trainer; `max_steps` among them.
        batch_size: Images per step.

    Returns:
        In evaluation mode, without gradients.
    """
    data = copy.copy(images)
    data.batch_size = min(batch_size, len(data.datasets["train"]))
    trainer = pl.Trainer(
        callbacks=[StepProgress(), SeedSteps(images.seed)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        plugins=[LightningEnvironment()],  # alone, whatever scheduler there is
        **trainer_options,
    )
    trainer.fit(task, datamodule=data)
    return task.net.eval().requires_grad_(False).to(trainer.strategy.root_device)


@torch.inference_mode()
def classifier_metrics(
    classifier: Any,
    codes: CodesDataModule,
    split: SplitName,
    samples: Tensor,
    labels: Tensor | None,
    device: torch.device,
) -> dict[str, float]:
    """What a classifier of real images makes of reconstructions and samples.

    Args:
        classifier: Trained on real training images.
        codes: Codes and images.
        split: Real images to compare with.
        samples: (N, C, H, W) uint8.
        labels: (N,) classes that the samples were drawn for; None for an unconditional prior.
        device: To compute on.

    Returns:
        Share of real images, reconstructions and samples that are recognised as their class, and
        the Fréchet distance (arXiv:1706.08500, equation 6) between real images and reconstructions,
        and samples, in the classifier's features. The distance depends on the classifier: compare
        it within a run only.
    """
    distance = FrechetInceptionDistance(
        feature=_Features(classifier),
        reset_real_features=False,  # the real images serve both distances
        input_img_size=codes.images.image_shape,
    ).to(device)
    right = {"real": 0, "reconstruction": 0, "sample": 0}
    done = 0
    for levels, truth, grid in _pairs(codes, split, device, "judging"):
        assert truth is not None
        decoded = to_uint8(codes.vqvae.decode(grid))
        done += len(levels)
        for name, batch in (("real", levels), ("reconstruction", decoded)):
            right[name] += int((classifier(from_uint8(batch)).argmax(1) == truth).sum())
        distance.update(levels, real=True)
        distance.update(decoded, real=False)
    distances = {"reconstruction_fid": float(distance.compute())}
    distance.reset()
    for start in range(0, len(samples), 256):
        batch = samples[start : start + 256].to(device)
        distance.update(batch, real=False)
        if labels is not None:
            guess = classifier(from_uint8(batch)).argmax(1)
            right["sample"] += int((guess == labels[start : start + 256].to(device)).sum())
    metrics = {
        "real_accuracy": right["real"] / done,
        "reconstruction_accuracy": right["reconstruction"] / done,
    }
    if labels is not None:
        metrics["sample_accuracy"] = right["sample"] / len(samples)
    return {**metrics, **distances, "sample_fid": float(distance.compute())}


class _Features(nn.Module):
    """uint8 images to the classifier's features, as torchmetrics' FID calls its network."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        # Or torchmetrics finds it out with an image on the CPU, wherever the classifier is.
        self.num_features = classifier.head.in_features

    def forward(self, levels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, features)."""
        return self.classifier.features(from_uint8(levels))  # type: ignore[no-any-return]


class Samples(NamedTuple):
    """New images, on the CPU."""

    images: Tensor
    """(N, C, H, W) uint8."""
    codes: Tensor
    """(N, h, w) int64."""
    nats: Tensor
    """(N,) entropy of the distributions that were drawn from, summed over the drawn positions."""


def draw_images(
    vqvae: Any,
    prior: PixelCNN,
    count: int,
    labels: Tensor | None,
    seed: int,
    devices: Sequence[torch.device],
    keep_finished: bool = False,
    **options: Any,
) -> Samples:
    """New images, under a progress bar.

    Args:
        vqvae: The decoder of the prior's codes.
        prior: In evaluation mode.
        count: Images to draw.
        labels: (count,) classes to draw; None for an unconditional prior.
        seed: Of the draw.
        devices: To share the batches between, a process each; the samples are the same for any
            number of them.
        keep_finished: Whether Ctrl-C returns the batches finished so far, if there are any.
        **options: Of `sample_batches`.
    """
    device = devices[0]
    draw = _Draw(prior, (count, prior.height, prior.width), labels, seed, options)
    drawn: list[Drawn] = []
    with progress_bar("sampling", count) as advance:
        try:
            for batch in draw.batches(device) if len(devices) == 1 else draw.shared(devices):
                drawn.append(batch)
                advance(len(batch.codes))
        except KeyboardInterrupt:
            if not (keep_finished and drawn):
                raise
    codes, nats = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Samples(decode_images(vqvae.to(device), codes.to(device)), codes, nats)


class _Draw(NamedTuple):
    """What a draw needs, to be sent to other processes."""

    prior: PixelCNN
    shape: tuple[int, int, int]
    labels: Tensor | None
    seed: int
    options: dict[str, Any]

    def batches(self, device: torch.device, only: slice | None = None) -> Iterator[Drawn]:
        """Draw here; the batches come to the CPU."""
        prior = self.prior.to(device)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "samples"))
        batches = sample_batches(
            prior, self.shape, self.labels, generator=generator, only=only, **self.options
        )
        for batch in batches:
            yield Drawn(*(part.cpu() for part in batch))

    def on_cpu(self) -> "_Draw":
        """Itself, with the prior and all tensors on the CPU.

        A tensor of a GPU is sent as a handle of its memory: each receiving process would open that
        GPU too, besides its own, and this one would have to keep the memory.
        """
        labels = None if self.labels is None else self.labels.cpu()
        options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return self._replace(prior=self.prior.cpu(), labels=labels, options=options)

    def shared(self, devices: Sequence[torch.device]) -> Iterator[Drawn]:
        """Draw in a process per device, batch by batch, in order.

        Each process moves the prior, which comes to the CPU, to its own device.
        """
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for place in devices:
            places.put((place, max(1, torch.get_num_threads() // len(devices))))
        size = self.options.get("batch_size") or batch_that_fits(
            self.prior,
            *self.shape[1:],
            devices[0],
            self.options.get("guidance", 1) not in (0, 1),
            len(devices),
        )
        # No larger than a device's share, or some would have nothing to do.
        size = min(size, -(-self.shape[0] // len(devices)))
        sent = (places, self.on_cpu())
        with ProcessPoolExecutor(len(devices), context, _start_drawing, sent) as pool:
            starts = range(0, self.shape[0], size)
            jobs = [pool.submit(_draw_part, slice(start, start + size)) for start in starts]
            try:
                for job in jobs:
                    codes, nats = job.result()
                    yield Drawn(torch.from_numpy(codes), torch.from_numpy(nats))
            finally:
                pool.shutdown(cancel_futures=True)


_drawing: tuple[_Draw, torch.device]


def _start_drawing(places: Any, draw: _Draw) -> None:
    """In a process of its own: take one of the devices."""
    global _drawing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and keeps what is finished
    device, threads = places.get()
    torch.set_num_threads(threads)
    _drawing = draw, device


def _draw_part(only: slice) -> tuple[Any, Any]:
    """In a process of its own: a batch, as arrays, which need no file descriptors to be sent."""
    draw, device = _drawing
    (batch,) = draw._replace(
        options={**draw.options, "batch_size": only.stop - only.start}
    ).batches(device, only)
    return batch.codes.numpy(), batch.nats.numpy()


@torch.inference_mode()
def decode_images(vqvae: Any, codes: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 on the CPU of codes (N, h, w), in batches."""
    return torch.cat([to_uint8(vqvae.decode(part)).cpu() for part in codes.split(256)])


def nearest_training_images(images: PixelDataModule, samples: Tensor) -> Tensor:
    """For each sample (N, C, H, W) uint8, the training image at the smallest Euclidean distance."""
    flat = samples.flatten(1).float()
    best = torch.full((len(samples),), math.inf)
    nearest = torch.zeros_like(samples)
    with progress_bar("searching", len(images.datasets["train"])) as advance:
        for part, _ in images.batches("train"):
            distance, row = torch.cdist(flat, part.flatten(1).float()).min(1)
            closer = distance < best
            best[closer] = distance[closer]
            nearest[closer] = part[row[closer]]
            advance(len(part))
    return nearest


def _pairs(
    codes: CodesDataModule,
    split: SplitName,
    device: torch.device,
    step: str,
    limit: int = sys.maxsize,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Images (B, C, H, W) uint8, labels (B,) and codes (B, h, w) in batches, under a progress bar.

    Images that workers read come in another order than the rows of the codes. Several ranks divide
    the split; only its first `limit` rows come.
    """
    codes.vqvae.to(device)
    stored, loader = codes.datasets[split], codes.images.batches(split)
    with progress_bar(step, len(stored)) as advance:
        for rows, images in zip(loader.rows(), loader, strict=True):
            here = rows < limit
            if here.any():
                grid = stored.__getitems__(rows[here]).data
                labels = None if images.labels is None else images.labels[here].to(device)
                yield images.data[here].to(device), labels, grid.to(device).long()
            advance(len(images.data) * rank_and_world()[1])


def _scale(codes: CodesDataModule, device: torch.device) -> Tensor:
    limit = -(-SCALE_VALUES // math.prod(codes.images.image_shape))
    means, levels = [], []
    for images, _, grid in _pairs(codes, "val", device, "fitting the scale", limit):
        means.append(((codes.vqvae.decode(grid).float() + 1) * 127.5).cpu())
        levels.append(images.cpu())
    # Each rank fits to the images of all, and finds the same.
    parts = [part for rank in gathered((levels, means)) for part in zip(*rank, strict=True)]
    every = [torch.cat(column).to(device) for column in zip(*parts, strict=True)]
    return fit_log_scale(*every)


def _position_log_probabilities(codes: CodesDataModule) -> Tensor:
    """(1, K, h, w) log p of each code at each position: the training histogram, one added."""
    counts = torch.zeros(math.prod(codes.grid), codes.num_codes)
    for batch in codes.batches("train"):
        flat = batch.data.long().flatten(1).t()
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    counts = all_reduce(counts) + 1
    shares = torch.log(counts / counts.sum(1, keepdim=True))
    return shares.t().reshape(1, codes.num_codes, *codes.grid)
