"""Bounds of a variational autoencoder, against an integral over its one latent value."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_VQVAE

from vqvae_lightning.data import ImageDataModule
from vqvae_lightning.data.sources import Split, Splits
from vqvae_lightning.evaluation.bounds import measure_bounds
from vqvae_lightning.likelihoods import Categorical, LogisticMixture, SquaredError
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixel_decoder import PixelCNNDecoder
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import GaussianBottleneck

CPU = torch.device("cpu")


def make_data(batch_size=5):
    generator = torch.Generator().manual_seed(0)
    splits = [
        Split(torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8), None)
        for n in (16, 9, 12)
    ]
    source = SimpleNamespace(load=lambda: Splits(*splits, []), prepare=lambda: None)
    data = ImageDataModule(source, batch_size=4, eval_batch_size=batch_size)
    data.setup()
    return data


def make_vae(likelihood, scale=4.0, decoder=None):
    torch.manual_seed(5)
    net = VQVAE(
        GaussianBottleneck(1),
        1,
        hidden=4,
        downsamplings=3,
        residual_blocks=0,
        residual_hidden=2,
        likelihood=likelihood,
        decoder=decoder,
    )
    for parameter in net.decoder.parameters():
        parameter.data.mul_(scale)
    return net.eval().requires_grad_(False)


def integrate(net, levels, points=4001):
    """Log p(x) by a sum over a fine grid of the one latent value."""
    z = torch.linspace(-8, 8, points, dtype=torch.float32)
    vectors = z.view(-1, 1, 1, 1)
    output = None if net.autoregressive else net.decoder(vectors)
    logs = []
    for image in levels:
        images = image.expand(len(z), -1, -1, -1)
        given = net.decoder(vectors, images) if output is None else output
        pixels = net.likelihood.log_prob(given, images)
        joint = pixels.flatten(1).double().sum(1) - z.double() ** 2 / 2
        logs.append(torch.logsumexp(joint, 0) - math.log(math.sqrt(2 * math.pi) / (z[1] - z[0])))
    return torch.stack(logs)


@pytest.mark.parametrize("likelihood", [Categorical, partial(LogisticMixture, components=2)])
def test_many_draws_find_the_likelihood_and_few_bound_it(likelihood):
    net, data = make_vae(likelihood), make_data()
    levels = data.datasets["test"].data
    exact = -integrate(net, levels).mean().item() / (64 * math.log(2))
    many = measure_bounds(net, data, "test", 1000, 0, CPU)
    assert many["importance_bits_per_dim"] == pytest.approx(exact, abs=4e-3)
    assert many["elbo_bits_per_dim"] > exact + 1e-3
    # One draw has no second to compete with: its weight is one estimate of the ELBO.
    one = measure_bounds(net, data, "test", 1, 0, CPU)
    assert one["importance_bits_per_dim"] > many["importance_bits_per_dim"]


def test_the_bounds_hold_for_an_autoregressive_decoder():
    decoder = partial(PixelCNNDecoder, channels=8, layers=2, first_kernel=3)
    net, data = make_vae(Categorical, 2.0, decoder), make_data()
    for parameter in net.decoder.upsampler.parameters():
        parameter.mul_(8)  # otherwise an untrained decoder ignores its latents
    exact = -integrate(net, data.datasets["test"].data, 161).mean().item() / (64 * math.log(2))
    many = measure_bounds(net, data, "test", 200, 0, CPU)
    assert many["importance_bits_per_dim"] == pytest.approx(exact, abs=4e-3)
    assert many["elbo_bits_per_dim"] > exact + 1e-3


def test_the_evidence_bound_is_its_formula_by_quadrature():
    net, data = make_vae(Categorical), make_data()
    levels = data.datasets["test"].data
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    nats = []
    for image in levels:
        z = net.encoder(from_uint8(image[None])).double().flatten()
        mean, log_variance = z[0].item(), z[1].item()
        draws = torch.tensor(mean + math.exp(log_variance / 2) * nodes, dtype=torch.float32)
        output = net.decoder(draws.view(-1, 1, 1, 1))
        logs = net.likelihood.log_prob(output, image.expand(60, -1, -1, -1)).flatten(1).sum(1)
        pixels = -(logs.double().numpy() * weights).sum() / weights.sum()
        kl = (mean**2 + math.exp(log_variance) - log_variance - 1) / 2
        nats.append((pixels, kl))
    pixels, kl = np.mean(nats, 0) / (64 * math.log(2))
    found = measure_bounds(net, data, "test", 800, 0, CPU)
    assert found["kl_bits_per_dim"] == pytest.approx(kl, rel=1e-5)
    assert found["reconstruction_bits_per_dim"] == pytest.approx(pixels, abs=0.03)
    total = found["reconstruction_bits_per_dim"] + found["kl_bits_per_dim"]
    assert found["elbo_bits_per_dim"] == pytest.approx(total)


@pytest.mark.parametrize("likelihood", [Categorical, SquaredError])
def test_the_batch_size_changes_nothing_and_the_seed_does(likelihood):
    net = make_vae(likelihood)
    one = measure_bounds(net, make_data(5), "test", 3, 0, CPU)
    other = measure_bounds(net, make_data(12), "test", 3, 0, CPU)
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-5), name
    again = measure_bounds(net, make_data(5), "test", 3, 1, CPU)
    assert again["importance_bits_per_dim"] != one["importance_bits_per_dim"]


def test_the_command_bounds_a_vae_and_refuses_a_plain_autoencoder(toy, command, tmp_path):
    sizes = [o for o in TINY_VQVAE if "num_codes" not in o and "warmup" not in o]
    for kind in ("gaussian", "none"):
        trained = command("vqvae-train", *toy, *sizes, f"quantizer={kind}", folder=tmp_path / kind)
        assert trained.status == 0, trained.err
    bounded = command(
        "vqvae-evaluate",
        f"vqvae_checkpoint={tmp_path}/gaussian/checkpoints/best.ckpt",
        "importance_samples=2",
        "perceptual=true",
        folder=tmp_path / "bounded",
    )
    assert bounded.status == 0, bounded.err
    result = json.loads((tmp_path / "bounded/result.json").read_text())
    tested = json.loads((tmp_path / "gaussian/result.json").read_text())["metrics"]
    found, expected = result["metrics"]["test/mse"]["value"], tested["test/mse"]["value"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert "test/importance_bits_per_dim" in result["metrics"]
    assert result["missing"] in bounded.out
    assert "a variational autoencoder has no codes" in result["missing"]
    assert (tmp_path / "bounded/reconstructions.png").is_file()
    refused = command(
        "vqvae-evaluate",
        f"vqvae_checkpoint={tmp_path}/none/checkpoints/best.ckpt",
        folder=tmp_path / "refused",
    )
    assert refused.status == 1
    assert refused.err.startswith("error: NoQuantizer assigns no probability to its latents")
    assert len(refused.err.strip().splitlines()) == 1
