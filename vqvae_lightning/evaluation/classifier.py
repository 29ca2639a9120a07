"""Measure samples and reconstructions with a classifier."""

import copy
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from vqvae_lightning.callbacks.progress import StepProgress
from vqvae_lightning.callbacks.reproducibility import SeedSteps
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, SplitName
from vqvae_lightning.evaluation.reconstruction import pair_images_with_decoded
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.tasks.classifier import ClassifierTask

if TYPE_CHECKING:
    from vqvae_lightning.networks.classifier import Classifier


def train_classifier(
    task: ClassifierTask, images: PixelDataModule, trainer_options: dict[str, Any], batch_size: int
) -> "Classifier":
    """Train the network of `task` on the real training images.

    Args:
        task: Untrained task.
        images: Images, set up.
        trainer_options: Arguments of Lightning's Trainer, including `max_steps`.
        batch_size: Images per step.

    Returns:
        The network in evaluation mode; its parameters need no gradients.
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
        plugins=[LightningEnvironment()],  # one rank, even within the job of a scheduler
        **trainer_options,
    )
    trainer.fit(task, datamodule=data)
    return task.net.eval().requires_grad_(False).to(trainer.strategy.root_device)


@torch.inference_mode()
def measure_with_classifier(
    classifier: "Classifier",
    codes: CodesDataModule,
    split: SplitName,
    samples: Tensor,
    labels: Tensor | None,
    device: torch.device,
) -> dict[str, float]:
    """Measure reconstructions and samples with a classifier of real images.

    Args:
        classifier: Classifier trained on real training images.
        codes: Codes and their images.
        split: Split whose images are compared with the reconstructions and samples.
        samples: Samples (N, C, H, W) uint8.
        labels: Classes (N,) of the samples; None for an unconditional prior.
        device: Device to compute on.

    Returns:
        Accuracy of the classifier on real images, reconstructions and samples. Fréchet distances
        (arXiv:1706.08500, equation 6) of reconstructions and of samples to the real images, in the
        features of the classifier. They depend on the classifier, so compare them only within a
        run.
    """
    distance = FrechetInceptionDistance(
        feature=_Features(classifier),
        reset_real_features=False,  # both distances use the real images
        input_img_size=codes.images.image_shape,
    ).to(device)
    right = {"real": 0, "reconstruction": 0, "sample": 0}
    done = 0
    for levels, truth, _, images in pair_images_with_decoded(codes, split, device, "judging"):
        assert truth is not None
        decoded = to_uint8(images)
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
    """The feature network of a classifier, with the interface that torchmetrics' FID expects."""

    def __init__(self, classifier: "Classifier") -> None:
        super().__init__()
        self.classifier = classifier
        # Without this, torchmetrics tries an image on the CPU, but the classifier may be on a GPU.
        self.num_features = classifier.head.in_features

    def forward(self, levels: Tensor) -> Tensor:
        """Compute the features (B, D) of images (B, C, H, W) uint8."""
        return self.classifier.features(from_uint8(levels))
