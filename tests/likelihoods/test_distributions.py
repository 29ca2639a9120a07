"""Each likelihood sums to 1, agrees with an independent formula, and samples what it scores."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from vqvae_lightning.likelihoods import Categorical, Gaussian, Logistic, LogisticMixture

GREY = {
    "gaussian": Gaussian,
    "logistic": Logistic,
    "mixture of 1": partial(LogisticMixture, components=1),
    "mixture of 5": partial(LogisticMixture, components=5),
    "mixture of 10": partial(LogisticMixture, components=10),
    "categorical": Categorical,
}


def outputs_of(likelihood, batch=3, spread=2.0):
    return spread * torch.randn(batch, likelihood.outputs, 2, 2)


def every_level(likelihood, output):
    """log p of each of the 256 levels at each pixel of grey images: (256, B, H, W)."""
    shape = (len(output), 1, *output.shape[2:])
    return torch.stack(
        [
            likelihood.log_prob(output, torch.full(shape, level, dtype=torch.uint8))
            for level in range(256)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GREY)
def test_the_probabilities_of_the_levels_sum_to_one(name, dtype):
    likelihood = GREY[name](channels=1)
    for spread in (0.01, 1.0, 8.0):
        output = outputs_of(likelihood, spread=spread).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = every_level(likelihood, output).double().exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["gaussian", "logistic"])
@pytest.mark.parametrize("log_scale", [-9.0, -3.0, 0.0, 3.0, 9.0])
def test_they_sum_to_one_at_any_scale(name, log_scale):
    likelihood = GREY[name](channels=1)
    likelihood.log_scale.data.fill_(log_scale)
    output = torch.tensor([-40.0, -1.5, -1.0, 0.0, 0.37, 1.0, 2.0]).view(1, 1, 1, 7)
    total = every_level(likelihood, output).double().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), atol=2e-5, rtol=0)


def test_a_colour_mixture_sums_to_one_over_the_colours():
    # Two channels: 65 536 values of one pixel, all of them.
    likelihood = LogisticMixture(channels=2, components=3)
    output = 2 * torch.randn(1, likelihood.outputs, 1, 1)
    first, second = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    levels = torch.stack([first.flatten(), second.flatten()], 1)[:, :, None, None]
    logs = likelihood.log_prob(output.expand(256 * 256, -1, -1, -1), levels)
    assert logs.double().exp().sum().item() == pytest.approx(1, abs=2e-5)


def test_the_gaussian_is_the_mass_of_its_bins():
    likelihood = Gaussian(channels=1)
    likelihood.log_scale.data.fill_(math.log(5.0))
    output = torch.tensor(100.0 / 127.5 - 1).view(1, 1, 1, 1)
    edges = np.array([99.5, 100.5, 102.5, 103.5]) - 100
    below = [0.5 * (1 + math.erf(edge / (5 * math.sqrt(2)))) for edge in edges]
    logs = every_level(likelihood, output).exp().flatten()
    assert logs[100].item() == pytest.approx(below[1] - below[0], rel=1e-5)
    assert logs[103].item() == pytest.approx(below[3] - below[2], rel=1e-5)


def test_the_gaussians_loss_is_the_expected_density_of_noisy_levels():
    likelihood = Gaussian(channels=1)
    likelihood.log_scale.data.fill_(math.log(4.0))
    output = torch.tensor([0.1, -0.4]).view(1, 1, 1, 2)
    levels = torch.tensor([140, 70]).view(1, 1, 1, 2)
    noise = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000 - 0.5
    mean = (output.double() + 1) * 127.5
    expected = torch.distributions.Normal(mean, 4.0).log_prob(levels + noise.view(-1, 1, 1, 1))
    assert likelihood.compute_loss(output, levels).item() == pytest.approx(-expected.mean().item())
    bits = -likelihood.log_prob(output, levels).mean().item()
    assert bits < likelihood.compute_loss(output, levels).item(), "a bound on the bins' mass"


def naive_mixture(output, levels, channels, components):
    """PixelCNN++'s mixture for one pixel in float64: explicit loops, differences of sigmoids."""
    values = output.double().view(components, -1)
    pixel = levels.double() / 127.5 - 1
    weights = values[:, 0].softmax(0)
    total = 0.0
    for part, weight in zip(values, weights, strict=True):
        means = part[1 : 1 + channels].clone()
        scales = (part[1 + channels : 1 + 2 * channels] + math.log(20.0)).exp()
        coefficients = iter(part[1 + 2 * channels :].tanh())
        mass = weight
        for channel in range(channels):
            mean = means[channel] + sum(next(coefficients) * pixel[c] for c in range(channel))
            centre, x = (mean + 1) * 127.5, levels[channel].double()
            upper = torch.sigmoid((x + 0.5 - centre) / scales[channel]) if x < 255 else 1.0
            lower = torch.sigmoid((x - 0.5 - centre) / scales[channel]) if x > 0 else 0.0
            mass = mass * (upper - lower)
        total = total + mass
    return torch.log(torch.as_tensor(total))


@pytest.mark.parametrize(("channels", "components"), [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_the_mixture_equals_a_naive_one(channels, components):
    likelihood = LogisticMixture(channels=channels, components=components)
    output = torch.randn(20, likelihood.outputs, 1, 1)
    levels = torch.randint(0, 256, (20, channels, 1, 1))
    levels[0], levels[1] = 0, 255
    expected = torch.stack(
        [
            naive_mixture(values, pixel.flatten(), channels, components)
            for values, pixel in zip(output, levels, strict=True)
        ]
    )
    found = likelihood.log_prob(output, levels).flatten().double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", GREY)
def test_samples_come_as_often_as_their_probability(name):
    likelihood = GREY[name](channels=1)
    output = outputs_of(likelihood, batch=1, spread=0.7)[:, :, :1, :1]
    expected = every_level(likelihood, output).exp().flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = likelihood.sample(output.expand(200_000, -1, -1, -1), generator)
    found = drawn.flatten().bincount(minlength=256) / 200_000
    # Of levels in groups of 16: each share is known to 0.001 or so.
    assert (found.view(16, 16).sum(1) - expected.view(16, 16).sum(1)).abs().max() < 0.005
    mean = (likelihood.mean(output).item() + 1) * 127.5
    if name == "categorical":  # the others' mean does not see that samples end at 0 and 255
        assert mean == pytest.approx(drawn.float().mean().item(), abs=1.0)


def test_colours_of_samples_depend_on_each_other_as_scored():
    likelihood = LogisticMixture(channels=3, components=2)
    output = torch.zeros(1, likelihood.outputs, 1, 1)
    grouped = output.view(2, 10)  # 1 logit, 3 means, 3 scales, 3 coefficients
    grouped[:, 4:7] = -1.5
    grouped[:, 7:] = torch.tensor([3.0, -3.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    images = likelihood.sample(output.expand(20_000, -1, -1, -1), generator).float().view(-1, 3)
    red, green, blue = (images / 127.5 - 1).t()
    slope = math.tanh(3.0)
    spread = math.exp(math.log(20.0) - 1.5) / 127.5 * math.pi / math.sqrt(3)
    assert (green - slope * red).std().item() == pytest.approx(spread, rel=0.05)
    assert (blue - slope * (green - red)).std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mixtures_mean_is_the_mean_of_its_samples(channels):
    likelihood = LogisticMixture(channels=channels, components=3)
    output = 0.3 * torch.randn(1, likelihood.outputs, 1, 1)
    output.view(3, -1)[:, 1 + channels : 1 + 2 * channels] = -1.0  # far from the ends of the range
    generator = torch.Generator().manual_seed(0)
    drawn = likelihood.sample(output.expand(50_000, -1, -1, -1), generator).float().mean(0)
    torch.testing.assert_close((likelihood.mean(output)[0] + 1) * 127.5, drawn, atol=0.5, rtol=0)


def test_a_uniform_categorical_has_eight_bits_per_dimension():
    likelihood = Categorical(channels=3)
    output = torch.zeros(2, likelihood.outputs, 4, 4)
    levels = torch.randint(0, 256, (2, 3, 4, 4))
    assert likelihood.compute_loss(output, levels).item() / math.log(2) == pytest.approx(
        8.0, abs=1e-6
    )


@pytest.mark.parametrize("name", GREY)
def test_its_loss_falls_when_the_output_learns(name):
    likelihood = GREY[name](channels=1)
    levels = torch.randint(60, 200, (4, 1, 3, 3), dtype=torch.uint8)
    output = torch.nn.Parameter(0.1 * torch.randn(4, likelihood.outputs, 3, 3))
    optimizer = torch.optim.Adam([output, *likelihood.parameters()], 0.05)
    first = likelihood.compute_loss(output, levels).item()
    for _ in range(400):
        optimizer.zero_grad()
        loss = likelihood.compute_loss(output, levels)
        loss.backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in (output, *likelihood.parameters()))
    assert loss.item() < 0.6 * first
    assert (likelihood.mean(output).add(1).mul(127.5) - levels).abs().mean() < 10
