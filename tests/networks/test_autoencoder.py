"""Shapes and sizes of the autoencoder, and the range of its pixels."""

import pytest
import torch

from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.autoencoder import VQVAE, ResidualStack
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.quantizers import EMAQuantizer


def make(downsamplings=2, channels=3):
    quantizer = EMAQuantizer(8, 4, init="uniform", warmup_steps=0)
    return VQVAE(quantizer, channels, hidden=8, downsamplings=downsamplings, residual_hidden=4)


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_in_their_size(downsamplings, height, width, channels):
    net = make(downsamplings, channels)
    images = torch.rand(2, channels, height, width) * 2 - 1
    output = net(images)
    assert output.reconstruction.shape == images.shape
    grid = (height // 2**downsamplings, width // 2**downsamplings)
    assert net.compute_grid(height, width) == grid
    assert output.quantized.codes.shape == (2, *grid)


def test_decoded_codes_are_the_reconstruction():
    net = make().eval()
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(net.decode(net.encode(images)), net(images).reconstruction)


@pytest.mark.parametrize(
    ("downsamplings", "size", "near", "most"),
    [
        (3, (28, 28), r"\[32,32\]", ", or train with model.net.downsamplings of at most 2."),
        (2, (30, 33), r"\[32,32\]", "."),
        (2, (2, 2), r"\[4,4\]", ", or train with model.net.downsamplings of at most 1."),
    ],
)
def test_a_size_that_does_not_divide_names_one_that_does(downsamplings, size, near, most):
    with pytest.raises(InputError, match=rf"set size={near}{most}$"):
        make(downsamplings).compute_grid(*size)


def test_sonnet_size_has_sonnets_parameters():
    # Counted by hand from sonnet's example: 128 hidden, 2 blocks of 32, D=64, colour.
    net = VQVAE(EMAQuantizer(512, 64), channels=3)
    stack = 2 * (128 * 32 * 9 + 32 + 32 * 128 + 128)
    encoder = (3 * 64 * 16 + 64) + (64 * 128 * 16 + 128) + (128 * 128 * 9 + 128)
    decoder = (64 * 128 * 9 + 128) + (128 * 64 * 16 + 64) + (64 * 3 * 16 + 3)
    expected = encoder + stack + (128 * 64 + 64) + decoder + stack
    assert sum(p.numel() for p in net.parameters()) == expected


def test_pixels_survive_the_way_to_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


@pytest.mark.parametrize("name", ["channels", "hidden", "downsamplings"])
def test_sizes_below_one_are_named(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        VQVAE(EMAQuantizer(8, 4), **{"channels": 1, name: 0})


def test_a_residual_stack_adds_to_what_it_is_given():
    stack, maps = ResidualStack(3, 2, 4), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = maps
        for block in stack.blocks:
            expected = expected + block(expected)
        assert torch.equal(stack(maps), expected.clamp(min=0))
        for parameter in stack.parameters():
            parameter.zero_()
        assert torch.equal(stack(maps), maps.clamp(min=0))
