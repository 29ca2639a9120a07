"""A small image classifier: the judge of class-conditional samples."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.errors import check_positive


class Classifier(nn.Module):
    """Three convolutions with batch norm, each followed by a halving, and a linear layer.

    Args:
        channels: Of the images.
        num_classes: Classes to tell apart.
        hidden: Width of the first layer; the others have twice and four times as many.

    Raises:
        InputError: If a size is not a positive integer.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 32) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("num_classes", num_classes)
        check_positive("hidden", hidden)
        widths = [channels, hidden, 2 * hidden, 4 * hidden]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inside, outside, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outside),
                    nn.ReLU(),
                    nn.MaxPool2d(2, ceil_mode=True),
                )
                for inside, outside in itertools.pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [-1, 1]."""
        features = F.dropout(self.features(images), 0.2, self.training)
        return self.head(features)  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """(B, 4 * hidden) what the last layer sees: the mean over positions."""
        return self.layers(images).mean((2, 3))  # type: ignore[no-any-return]
