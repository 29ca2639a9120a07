"""A likelihood as a part of a VQ-VAE: trained, stored, evaluated."""

import csv
import math
from functools import partial

import pytest
import torch
from conftest import TINY_VQVAE
from evaluated import CPU, make_codes_data

from vqvae_lightning import load
from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.likelihoods import Categorical, LogisticMixture, SquaredError
from vqvae_lightning.networks.autoencoder import VQVAE, Decoder
from vqvae_lightning.quantizers import EMAQuantizer

NAMES = ("gaussian", "logistic", "mixture", "categorical")


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_the_network_and_is_stored_with_it(name, toy, command):
    options = (*toy, *TINY_VQVAE, "trainer.max_steps=60", "trainer.val_check_interval=30")
    outcome = command("vqvae-train", *options, f"likelihood={name}", "monitor=val/nll_nats_per_dim")
    assert outcome.status == 0, outcome.err
    with (outcome.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/nll_nats_per_dim"]]
    nats = [float(row["train/nll_nats_per_dim"]) for row in rows]
    assert sum(nats[-5:]) < 0.9 * sum(nats[:5])
    for row in rows[5:]:
        weighted = float(row["train/nll_nats_per_dim_weighted"])
        assert weighted == pytest.approx(0.1 * float(row["train/nll_nats_per_dim"]), rel=1e-5)
        total = weighted + float(row["train/commitment_weighted"] or 0)
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    net, config = load(outcome.folder / "checkpoints/best.ckpt")
    assert config["model"]["net"]["likelihood"]["weight"] == 0.1
    codes = net.encode(torch.zeros(2, 3, 12, 8))
    drawn = net.likelihood.sample(net.decode_output(codes))
    assert drawn.shape == (2, 3, 12, 8)
    assert net.decode(codes).shape == (2, 3, 12, 8)


def test_without_one_the_network_is_what_it_was():
    plain = VQVAE(EMAQuantizer(8, 4), 3, hidden=8, residual_hidden=4).eval()
    assert isinstance(plain.likelihood, SquaredError)
    assert not [name for name in plain.state_dict() if name.startswith("likelihood")]
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = plain(images)
    decoder = Decoder(3, 8, 4, 2, 2, 4)
    decoder.load_state_dict(plain.decoder.state_dict())
    assert torch.equal(output.reconstruction, decoder(output.quantized.vectors))


@pytest.fixture
def codes(tmp_path):
    return make_codes_data(tmp_path)


def test_an_evaluation_scores_the_pixels_with_it(codes):
    torch.manual_seed(3)
    old = codes.vqvae
    new = VQVAE(
        old.quantizer,
        3,
        hidden=8,
        residual_blocks=1,
        residual_hidden=4,
        likelihood=partial(LogisticMixture, components=3),
    ).eval()
    codes.vqvae = new
    found = measure_likelihood(codes, None, "test", CPU)
    levels = codes.images.datasets["test"].data
    grid = torch.tensor(codes.datasets["test"].data).long()
    with torch.no_grad():
        logs = new.likelihood.log_prob(new.decoder(old.quantizer.decode(grid)), levels)
    expected = -logs.double().sum().item() / (levels.numel() * math.log(2))
    assert found["reconstruction_bits_per_dim"] == pytest.approx(expected, rel=1e-6)


def test_a_uniform_decoder_has_eight_bits_per_dimension(codes):
    likelihood = Categorical(3)
    decoder = Decoder(likelihood.outputs, 8, 4, 2, 1, 4)
    for parameter in decoder.parameters():
        parameter.data.zero_()
    codes.vqvae.likelihood, codes.vqvae.decoder = likelihood, decoder
    found = measure_likelihood(codes, None, "test", CPU)
    assert found["reconstruction_bits_per_dim"] == pytest.approx(8, abs=1e-5)


@pytest.mark.parametrize("components", [0, 11, 2.5])
def test_a_bad_number_of_components_is_refused_with_its_key(components, toy, command):
    with pytest.raises(InputError, match="components"):
        LogisticMixture(3, components)
    bad = f"model.net.likelihood.components={components}"
    outcome = command("vqvae-train", *toy, *TINY_VQVAE, "likelihood=mixture", bad)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: {bad} must be")
    assert len(outcome.err.strip().splitlines()) == 1
