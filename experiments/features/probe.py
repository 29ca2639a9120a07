"""Check that the features of EfficientNet-Lite0 tell classes apart.

uv run python experiments/features/probe.py [FILE.npz]

A linear layer is fitted by least squares with a ridge on the features of training images, and its
accuracy measured on test images: on raw pixels, on features of random weights, and on features of
the ImageNet weights. Without a file, the images are the bundled ones of Fashion-MNIST.
"""

import sys
import time

import torch
from torch import Tensor

from vqvae_lightning.data import BundledSource, ImageDataModule, NpzSource
from vqvae_lightning.evaluation.features import load_efficientnet
from vqvae_lightning.networks.efficientnet import EfficientNetLite0

TRAIN, TEST = 200, 200  # images


def probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Return the share of test images that a linear layer on the features predicts."""
    mean, scale = train.mean(0), train.std(0).clamp_min(1e-6)
    rows, others = ((part - mean) / scale for part in (train, test))
    targets = torch.eye(int(labels.max()) + 1)[labels]
    gram = rows @ rows.t() + 0.1 * rows.shape[1] * torch.eye(len(rows))
    weights = rows.t() @ torch.linalg.solve(gram, targets - targets.mean(0))
    return float(((others @ weights + targets.mean(0)).argmax(1) == truth).float().mean())


@torch.inference_mode()
def main() -> None:
    """Print the accuracy of each kind of features."""
    source = NpzSource(sys.argv[1]) if len(sys.argv) > 1 else BundledSource()
    data = ImageDataModule(source)
    data.setup()
    (train, labels), (test, truth) = (
        data.datasets[split].preview(count) for split, count in (("train", TRAIN), ("test", TEST))
    )
    torch.manual_seed(0)
    nets = {"random weights": EfficientNetLite0().eval(), "ImageNet weights": load_efficientnet()}
    print(f"raw pixels: {probe(train.flatten(1).float(), labels, test.flatten(1).float(), truth)}")
    for name, net in nets.items():
        start = time.process_time()  # other work on the machine does not count
        features = [torch.cat([net(part) for part in images.split(50)]) for images in (train, test)]
        seconds = 1000 * (time.process_time() - start) / (TRAIN + TEST)
        print(
            f"{name}: {probe(features[0], labels, features[1], truth)} "
            f"({seconds:.0f} CPU seconds per 1000 images)"
        )


if __name__ == "__main__":
    main()
