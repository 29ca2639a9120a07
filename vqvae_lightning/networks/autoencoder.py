"""Encoder, decoder and the VQ-VAE that joins them through a quantizer."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae_lightning.errors import InputError, Key, check_positive, check_range, prefix_keys
from vqvae_lightning.likelihoods.categorical import Categorical
from vqvae_lightning.likelihoods.protocol import Likelihood, SquaredError
from vqvae_lightning.networks.pixel_decoder import PixelCNNDecoder
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers.protocol import Quantizer, QuantizerOutput


class ResidualStack(nn.Module):
    """Residual blocks (ReLU, 3x3, ReLU, 1x1) and a final ReLU, as in sonnet's example.

    Args:
        channels: Input and output channels.
        blocks: Number of blocks. With 0, only the final ReLU remains.
        hidden: Channels inside a block.
    """

    def __init__(self, channels: int, blocks: int, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, hidden, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)


class Encoder(nn.Module):
    """Maps images (B, channels, H, W) to vectors (B, code_dim, H / f, W / f), f = 2**downsamplings.

    Each downsampling is a 4x4 convolution of stride 2. The first of several has half the channels.
    A 3x3 convolution, the residual stack and a 1x1 convolution to `code_dim` follow. Source: van
    den Oord et al. 2017 (arXiv:1711.00937), section 4.1, in the layout of sonnet's example.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        code_dim: int,
        downsamplings: int,
        residual_blocks: int,
        residual_hidden: int,
    ) -> None:
        super().__init__()
        widths = [channels, *_list_widths(hidden, downsamplings)]
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers,
            nn.Conv2d(widths[-1], hidden, 3, padding=1),
            ResidualStack(hidden, residual_blocks, residual_hidden),
            nn.Conv2d(hidden, code_dim, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, channels, H, W) as vectors (B, code_dim, H / f, W / f)."""
        return self.layers(images)  # type: ignore[no-any-return]

    @property
    def receptive_field(self) -> int:
        """Height and width in pixels of the window that a code away from the borders depends on."""
        seen = stride = 1
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                seen += (part.kernel_size[0] - 1) * stride
                stride *= part.stride[0]
        return seen


class Decoder(nn.Module):
    """Maps vectors (B, code_dim, H, W) to images (B, channels, H * f, W * f), f = 2**downsamplings.

    Mirrors the encoder: a 3x3 convolution, the residual stack and 4x4 transposed convolutions of
    stride 2.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        code_dim: int,
        downsamplings: int,
        residual_blocks: int,
        residual_hidden: int,
    ) -> None:
        super().__init__()
        widths = [hidden, *_list_widths(hidden, downsamplings)[-2::-1]]
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(inside, outside, 4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(
            nn.Conv2d(code_dim, hidden, 3, padding=1),
            ResidualStack(hidden, residual_blocks, residual_hidden),
            *layers,
            nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1),
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """Decode vectors (B, code_dim, H, W) to images (B, channels, H * f, W * f)."""
        return self.layers(vectors)  # type: ignore[no-any-return]


def _list_widths(hidden: int, downsamplings: int) -> list[int]:
    """List the channels after each downsampling.

    The first of several has half of them, because its feature maps are the largest.
    """
    return [hidden // 2, *[hidden] * (downsamplings - 1)] if downsamplings > 1 else [hidden]


class VQVAEOutput(NamedTuple):
    """Output of `VQVAE` for images (B, C, H, W)."""

    reconstruction: Tensor | None
    """(B, C, H, W), in the range of the images: the mean of the likelihood. None from an
    autoregressive decoder, which draws images pixel by pixel (`VQVAE.decode_vectors`)."""
    quantized: QuantizerOutput
    output: Tensor
    """(B, outputs, H, W) from the decoder: the parameters of the likelihood."""


class VQVAE(nn.Module):
    """Autoencoder with a discrete bottleneck (van den Oord et al. 2017, arXiv:1711.00937).

    Args:
        quantizer: Quantizer that turns vectors into codes. A continuous bottleneck makes this a
            plain or a variational autoencoder. The encoder ends in a 1x1 convolution to the
            quantizer's channels. With a small `code_dim`, it is a learnt projection to a
            low-dimensional look-up, which keeps large codebooks in use (Yu et al. 2021,
            arXiv:2110.04627, section 3.2).
        channels: Channels of the images.
        hidden: Width of encoder and decoder, an even number.
        downsamplings: Number of times that height and width are halved. Both sides of an image must
            be multiples of 2**downsamplings.
        residual_blocks: Residual blocks on each side.
        residual_hidden: Width inside a residual block.
        likelihood: Makes the likelihood for a number of channels.
        decoder: Makes an autoregressive decoder over pixels, for a function that makes a `Decoder`
            with a number of outputs, and the channels of the images. None for that `Decoder`
            itself, given which the pixels are independent.

    Raises:
        InputError: If a size is out of range, `hidden` is odd, or the decoder and the likelihood do
            not fit.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        channels: int,
        hidden: int = 128,
        downsamplings: int = 2,
        residual_blocks: int = 2,
        residual_hidden: int = 32,
        likelihood: Callable[[int], Likelihood] = SquaredError,
        decoder: Callable[[Callable[[int], Decoder], int], PixelCNNDecoder] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels),
            ("hidden", hidden),
            ("downsamplings", downsamplings),
            ("residual_hidden", residual_hidden),
        ):
            check_positive(name, value)
        check_range("residual_blocks", residual_blocks, 0)
        if hidden % 2:
            raise InputError(
                Key("hidden"), f"={hidden} must be even: the first layer has half as many channels."
            )
        self.channels = channels
        self.downsamplings = downsamplings
        self.quantizer = quantizer
        inner = (downsamplings, residual_blocks, residual_hidden)
        self.encoder = Encoder(channels, hidden, quantizer.encoder_channels, *inner)
        with prefix_keys("likelihood"):
            self.likelihood = likelihood(channels)

        def make_decoder(outputs: int) -> Decoder:
            return Decoder(outputs, hidden, quantizer.code_dim, *inner)

        self.decoder: Decoder | PixelCNNDecoder
        if decoder is None:
            self.decoder = make_decoder(self.likelihood.outputs)
        elif isinstance(self.likelihood, Categorical):
            with prefix_keys("decoder"):
                self.decoder = decoder(make_decoder, channels)
        else:
            raise InputError(
                Key("likelihood"),
                f"={type(self.likelihood).__name__} must be Categorical (likelihood=categorical): "
                "an autoregressive decoder computes a probability for each level.",
            )

    @property
    def autoregressive(self) -> bool:
        """Whether the decoder scores each pixel given the earlier ones."""
        return isinstance(self.decoder, PixelCNNDecoder)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Reconstruct images (B, C, H, W) in [-1, 1]. In training mode the quantizer learns too."""
        quantized = self.quantize(images)
        levels = to_uint8(images) if self.autoregressive else None
        output = self.compute_output(quantized.vectors, levels)
        mean = None if self.autoregressive else self.likelihood.mean(output)
        return VQVAEOutput(mean, quantized, output)

    def quantize(self, images: Tensor) -> QuantizerOutput:
        """Encode and quantize images (B, C, H, W). In training mode the quantizer learns too."""
        self.compute_grid(images.shape[-2], images.shape[-1])
        return self.quantizer(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as codes (B, h, w) int64, without learning."""
        self.compute_grid(images.shape[-2], images.shape[-1])
        return self.quantizer.encode(self.encoder(images))

    def decode(self, codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode codes (B, h, w) to images (B, C, H, W), as `decode_vectors` does."""
        return self.decode_vectors(self.quantizer.decode(codes), generator)

    def decode_vectors(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode vectors (B, code_dim, h, w) to images (B, C, H, W), approximately in [-1, 1].

        They are the mean of the likelihood or, from an autoregressive decoder, samples.

        Args:
            vectors: Quantized vectors.
            generator: CPU generator of the samples; None for torch's default generator.
        """
        if isinstance(self.decoder, PixelCNNDecoder):
            return from_uint8(self.decoder.sample(vectors, generator))
        return self.likelihood.mean(self.decoder(vectors))

    def decode_output(self, codes: Tensor, levels: Tensor | None = None) -> Tensor:
        """Decode codes (B, h, w) to the likelihood's parameters, as `compute_output` does."""
        return self.compute_output(self.quantizer.decode(codes), levels)

    def compute_output(self, vectors: Tensor, levels: Tensor | None = None) -> Tensor:
        """Compute the likelihood's parameters (B, outputs, H, W).

        Args:
            vectors: Quantized vectors (B, code_dim, h, w).
            levels: Images (B, C, H, W) uint8 whose likelihood is wanted. An autoregressive decoder
                needs the earlier pixels at each pixel; another does not look at them.

        Raises:
            InputError: If an autoregressive decoder gets no images.
        """
        if not isinstance(self.decoder, PixelCNNDecoder):
            return self.decoder(vectors)  # type: ignore[no-any-return]
        if levels is None:
            raise InputError("an autoregressive decoder scores given images: pass their levels.")
        return self.decoder(vectors, levels)  # type: ignore[no-any-return]

    def compute_grid(self, height: int, width: int) -> tuple[int, int]:
        """Compute the rows and columns of codes for images of this size.

        Raises:
            InputError: If a side is not a multiple of 2**downsamplings. The key is `size`.
        """
        factor = 2**self.downsamplings
        if height % factor or width % factor:
            near = [max(factor, round(side / factor) * factor) for side in (height, width)]
            most = next(d for d in range(self.downsamplings, -1, -1) if not (height | width) % 2**d)
            fewer = f", or train with model.net.downsamplings of at most {most}" if most else ""
            raise InputError(
                f"image size {height}x{width} is not a multiple of "
                f"2**downsamplings = {factor}: set ",
                Key("size"),
                f"=[{near[0]},{near[1]}]{fewer}.",
            )
        return height // factor, width // factor
