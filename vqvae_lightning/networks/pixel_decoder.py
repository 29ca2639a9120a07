"""Autoregressive decoder: a PixelCNN over the pixels of an image, given its latents."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqvae_lightning.likelihoods.protocol import LEVELS
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import sample


class PixelCNNDecoder(nn.Module):
    """Gated PixelCNN over pixels, p(x | z) as a product over pixels and channels in raster order.

    A convolutional decoder enlarges the latents to a map of the size of the image, which shifts the
    gates at each pixel (Gulrajani et al. 2017, arXiv:1611.05013, section 2). The logits of a pixel
    therefore depend on the latents that the convolutional decoder would use there, on all earlier
    pixels within reach of the layers, and on the pixel's earlier channels. With so strong a
    decoder, a variational autoencoder can ignore its latents (van den Oord et al. 2017,
    arXiv:1711.00937, section 1).

    Args:
        upsampler: Makes the module that maps latents to maps (B, outputs, H, W), for a number of
            outputs.
        image_channels: Channels of the images (C).
        channels: Channels of the stacks, and of the map.
        layers: Number of gated layers, including the first.
        first_kernel: Kernel of the first layer, odd.
        kernel: Kernel of the other layers, odd.
        dropout: Share of gate outputs dropped in training.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(
        self,
        upsampler: Callable[[int], nn.Module],
        image_channels: int,
        channels: int = 32,
        layers: int = 6,
        first_kernel: int = 7,
        kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pixelcnn = PixelCNN(
            LEVELS,
            height=1,  # of no effect: it runs on any size
            width=1,
            context_channels=channels,
            channels=channels,
            layers=layers,
            first_kernel=first_kernel,
            kernel=kernel,
            dropout=dropout,
            codes_per_position=image_channels,
        )
        self.upsampler = upsampler(channels)

    def forward(self, vectors: Tensor, levels: Tensor) -> Tensor:
        """Compute the logits of each level given the earlier pixels, in one pass.

        Args:
            vectors: Latents (B, D, h, w).
            levels: Images (B, C, H, W), 0 to 255, of any integer type.

        Returns:
            (B, C * 256, H, W), as `Categorical` expects them.
        """
        context = self.upsampler(vectors)
        if levels.shape[1] == 1:
            return self.pixelcnn(levels[:, 0].long(), context=context)  # type: ignore[no-any-return]
        logits = self.pixelcnn(levels.long().movedim(1, -1), context=context)
        return logits.movedim(-1, 1).flatten(1, 2)  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw images (B, C, H, W) uint8 given latents (B, D, h, w), in evaluation mode.

        Args:
            vectors: Latents.
            generator: CPU generator; None for torch's default generator.
        """
        context = self.upsampler(vectors)
        shape = (len(context), *context.shape[2:])
        drawn = sample(self.pixelcnn, shape, generator=generator, context=context)
        pixels = drawn[:, None] if drawn.ndim == 3 else drawn.movedim(-1, 1)
        return pixels.to(torch.uint8)
