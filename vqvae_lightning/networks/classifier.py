"""A small image classifier that judges class-conditional samples."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.errors import check_positive


class Classifier(nn.Module):
    """Three convolutions with batch norm and max pooling, then a linear layer.

    Args:
        channels: Channels of the images.
        num_classes: Number of classes.
        hidden: Width of the first layer. The second is twice, the third four times as wide.

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
        """Compute logits (B, num_classes) for images (B, C, H, W) in [-1, 1]."""
        features = F.dropout(self.features(images), 0.2, self.training)
        return self.head(features)  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """Compute the input (B, 4 * hidden) of the linear layer, averaged over positions."""
        return self.layers(images).mean((2, 3))  # type: ignore[no-any-return]
