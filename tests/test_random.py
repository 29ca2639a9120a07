"""Random streams are distinct, and any number of ranks divides the same noise."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vqvae_lightning import randomness
from vqvae_lightning.callbacks.reproducibility import SeedSteps
from vqvae_lightning.data.images import Batch, ImageDataModule, set_aside
from vqvae_lightning.data.sources.npz import NpzSource
from vqvae_lightning.networks.dropout import BatchDropout
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import GaussianBottleneck
from vqvae_lightning.randomness import PURPOSES, derive_seed, draw_for_batch


@pytest.fixture
def ranks(monkeypatch):
    """Run a function on the part of each of `world` simulated ranks and join the results.

    Each rank starts with the default generator in the same state, as `SeedSteps` sets it.
    """

    def run(world, function, *tensors):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(randomness, "get_rank_and_world", lambda rank=rank: (rank, world))
            torch.manual_seed(7)
            parts.append(function(*(tensor.tensor_split(world)[rank] for tensor in tensors)))
        return torch.cat(parts)

    return run


def test_no_two_streams_coincide():
    # This includes the lower 32 bits, which torch's CPU generator uses.
    seeds = [0, 1, 2, 3, 1024, 2**32, 2**32 + 1]
    numbers = [(), *itertools.product(range(24)), *itertools.product(range(4), range(4))]
    found = [
        derive_seed(seed, purpose, *number)
        for seed, purpose, number in itertools.product(seeds, PURPOSES, numbers)
    ]
    assert len(set(found)) == len({seed % 2**32 for seed in found}) == len(found) > 3000
    assert max(found) > 2**63
    assert len(set(PURPOSES.values())) == len(PURPOSES)


def test_a_stream_is_the_same_each_time():
    # If this number changes, so do the results for every seed.
    assert derive_seed(3, "flip", 5) == derive_seed(3, "flip", 5) == 14870470482761412428
    assert derive_seed(-1, "order") == derive_seed(2**64 - 1, "order")


def flips(data, number):
    """Return which of 64 images the training batch `number` mirrors."""
    loop = SimpleNamespace(total_batch_idx=number - 1)  # its value in Lightning during the transfer
    data.trainer = SimpleNamespace(training=True, fit_loop=loop)
    images = torch.arange(2, dtype=torch.uint8).expand(64, 1, 1, 2)
    return data.on_after_batch_transfer(Batch(images, None), 0).data[:, 0, 0, 0] > -1


def noise(seed, number):
    """Return the first 64 uniform numbers that a network draws in the training batch `number`."""
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=number), global_rank=0)
    SeedSteps(seed).on_train_batch_start(trainer, None, None, 0)
    return torch.rand(64)


def test_flips_and_noise_of_neighbouring_batches_and_seeds_all_differ(toy_npz):
    # If flips and noise shared a stream, what is mirrored would decide what is dropped.
    grid = list(itertools.product(range(3), range(1, 5)))
    drawn = []
    for seed, number in grid:
        data = ImageDataModule(NpzSource(str(toy_npz)), flip=True, seed=seed)
        drawn += [flips(data, number), noise(seed, number) < 0.5]
        assert torch.equal(flips(data, number), drawn[-2])
        assert torch.equal(noise(seed, number) < 0.5, drawn[-1])
    agreeing = [(one == other).float().mean() for one, other in itertools.combinations(drawn, 2)]
    assert 0.2 < min(agreeing) <= max(agreeing) < 0.8, "half of 64 agree by chance, sd 0.06"


def test_the_images_set_aside_for_a_seed_never_change():
    rest, aside = set_aside(20, 0.25, seed=0)
    assert aside.tolist() == [4, 5, 7, 13, 19]
    assert sorted([*rest.tolist(), *aside.tolist()]) == list(range(20))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_divide_the_mask_of_one_process(world, ranks):
    dropout = BatchDropout(0.3)
    x = torch.randn(8, 5, 3, 3)  # 45 values per image, not a multiple of the four of one draw
    expected = ranks(1, dropout, x)
    assert torch.equal(ranks(world, dropout, x), expected)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(ranks(world, dropout, last), expected), (
        "the mask depends on the memory format"
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"dropout": 0, "null_label_rate": 0.5}])
def test_ranks_divide_the_noise_of_a_prior(world, options, ranks):
    net = PixelCNN(7, 4, 3, num_classes=3, channels=8, layers=3, **options).train()
    codes, labels = torch.randint(7, (8, 4, 3)), torch.arange(8) % 3
    expected = ranks(1, net, codes, labels)
    assert not torch.allclose(net.eval()(codes, labels), expected)
    torch.testing.assert_close(ranks(world, net.train(), codes, labels), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_the_noise_of_gaussian_latents(world, ranks):
    bottleneck = GaussianBottleneck(3).train()
    z = torch.randn(8, 6, 4, 5)

    def vectors(part):
        return bottleneck(part).vectors

    expected = ranks(1, vectors, z)
    assert not torch.allclose(expected, z[:, :3])
    assert torch.equal(ranks(world, vectors, z), expected)


def test_ranks_divide_the_flips_of_one_process(toy_npz, ranks):
    data = ImageDataModule(NpzSource(str(toy_npz)), flip=True, batch_size=16)
    data.trainer = SimpleNamespace(training=True, fit_loop=SimpleNamespace(total_batch_idx=3))
    images = torch.randint(255, (16, 3, 4, 5), dtype=torch.uint8)

    def mirrored(part):
        return data.on_after_batch_transfer(Batch(part, None), 0).data

    assert torch.equal(ranks(4, mirrored, images), ranks(1, mirrored, images))


def test_parts_of_several_sizes_get_noise_for_each_image(ranks):
    x = torch.ones(7, 4, 2, 2)
    found = ranks(3, BatchDropout(0.5), x)
    assert found.shape == x.shape
    assert set(found.unique().tolist()) == {0.0, 2.0}


def test_a_part_does_not_keep_the_noise_of_all_ranks_in_memory(monkeypatch):
    monkeypatch.setattr(randomness, "get_rank_and_world", lambda: (3, 8))
    assert draw_for_batch(torch.rand, 5).untyped_storage().nbytes() == 5 * 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_expected_value_and_passes_the_gradient(share, dtype):
    x = torch.randn(64, 16, 8, 8).to(dtype).requires_grad_()
    output = BatchDropout(share)(x)
    assert output.dtype == dtype
    kept = output != 0
    torch.testing.assert_close(kept.float().mean().item(), 1 - share, atol=0.005, rtol=0)
    for dim in range(4):  # no image, channel, row or column is favoured
        others = [other for other in range(4) if other != dim]
        torch.testing.assert_close(
            kept.float().mean(others), torch.full((x.shape[dim],), 1 - share), atol=0.06, rtol=0
        )
    scale = 1 / (1 - share) if share < 1 else 0.0
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5  # the share is rounded to 1/65536
    torch.testing.assert_close(output, x * kept * scale, rtol=tolerance, atol=1e-5)
    output.sum().backward()
    torch.testing.assert_close(x.grad, kept.to(dtype) * scale, rtol=tolerance, atol=1e-5)


def test_in_evaluation_nothing_is_drawn_or_dropped():
    before = torch.random.get_rng_state()
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert BatchDropout(0.5).eval()(x) is x
    net = PixelCNN(7, 4, 3, num_classes=3, null_label_rate=0.5, channels=8, layers=2).eval()
    after_building = torch.random.get_rng_state()
    net(torch.zeros(2, 4, 3, dtype=torch.long), torch.tensor([0, 1]))
    assert torch.equal(torch.random.get_rng_state(), after_building)
    assert not torch.equal(before, after_building)


def test_a_prior_has_the_weights_it_had_with_the_dropout_of_torch():
    net = PixelCNN(7, 4, 3, channels=8, layers=2)
    assert not BatchDropout(0.1).state_dict()
    names = net.state_dict().keys()
    for layer in net.layers:
        layer.dropout = nn.Dropout(0.1)
    assert net.state_dict().keys() == names


def test_a_prior_with_noise_compiles_as_one_graph():
    torch.compiler.reset()
    net = PixelCNN(7, 4, 3, num_classes=3, null_label_rate=0.5, channels=8, layers=1).train()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    codes, labels = torch.randint(7, (6, 4, 3)), torch.arange(6) % 3
    outputs = []
    for module in (net, compiled):
        torch.manual_seed(7)
        outputs.append(module(codes, labels))
    torch.testing.assert_close(outputs[1], outputs[0])
    outputs[1].sum().backward()
