"""A classifier that judges samples."""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from vqvae_lightning.callbacks.progress import StepProgress
from vqvae_lightning.callbacks.reproducibility import SeedSteps
from vqvae_lightning.data.codes import CodesDataModule
from vqvae_lightning.data.images import PixelDataModule, SplitName
from vqvae_lightning.evaluation.reconstruction import _pairs
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.tasks.classifier import ClassifierTask


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
