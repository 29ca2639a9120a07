"""The study of posterior collapse: its numbers are right, and it runs from the sweep's folder."""

import csv
import importlib.util
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMANDS
from PIL import Image
from test_configs import shrink
from torch.distributions import Normal, kl_divergence

from vqvae_lightning.likelihoods import Categorical
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixel_decoder import PixelCNNDecoder
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.quantizers import EMAQuantizer, GaussianBottleneck

STUDY = Path(__file__).parents[2] / "experiments/posterior_collapse"
spec = importlib.util.spec_from_file_location("posterior_collapse", STUDY / "analysis.py")
analysis = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = analysis
spec.loader.exec_module(analysis)

PIXELS = 2 * 8 * 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches for a few images."""
    monkeypatch.setattr(analysis, "BATCH", 4)


def build(quantizer, decoder=None):
    sizes = {"channels": 2, "hidden": 4, "residual_blocks": 0, "residual_hidden": 2}
    net = VQVAE(quantizer, likelihood=Categorical, decoder=decoder, **sizes).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=0.3)
    return net


def draw_levels(count=6):
    return torch.randint(256, (count, 2, 8, 8), dtype=torch.uint8)


def score_by_hand(net, vectors, levels):
    """Mean of -log2 p(x | z) per dimension, by a cross entropy over 256 levels."""
    output = net.compute_output(vectors, levels)
    logits = output.unflatten(1, (2, 256)).movedim(2, 1)
    return float(F.cross_entropy(logits, levels.long())) / math.log(2)


def test_a_vqvae_is_scored_by_a_cross_entropy_and_pays_log_k_per_code():
    quantizer = EMAQuantizer(9, 3, init="uniform", warmup_steps=0)
    net, levels = build(quantizer), draw_levels()
    with torch.no_grad():
        quantizer.codebook.normal_()
        found = analysis.measure(net, levels, seed=0)
        vectors = net.quantizer.decode(net.encode(from_uint8(levels)))
        own = score_by_hand(net, vectors, levels)
    assert found["own"] == pytest.approx(own, rel=1e-5)
    assert found["rate"] == pytest.approx(4 * math.log2(9) / PIXELS)


def test_the_other_latents_are_those_of_another_image():
    quantizer = EMAQuantizer(9, 3, init="uniform", warmup_steps=0)
    net, levels = build(quantizer), draw_levels(2)
    with torch.no_grad():
        quantizer.codebook.normal_()
        vectors = net.quantizer.decode(net.encode(from_uint8(levels)))
        swapped = score_by_hand(net, vectors.flip(0), levels)
        found = analysis.measure(net, levels, seed=3)
    assert found["other"] == pytest.approx(swapped, rel=1e-5)
    assert abs(found["other"] - found["own"]) > 1e-3


def test_a_gaussian_is_scored_by_draws_and_pays_its_divergence():
    net, levels = build(GaussianBottleneck(3)), draw_levels()
    with torch.no_grad():
        mean, log_variance = net.quantizer.split_posterior(net.encoder(from_uint8(levels)))
        posterior = Normal(mean, (log_variance / 2).exp())
        nats = kl_divergence(posterior, Normal(0.0, 1.0)).flatten(1).sum(1).mean()
        draws = [analysis.measure(net, levels, seed)["own"] for seed in range(40)]
        expected = [score_by_hand(net, posterior.sample(), levels) for _ in range(40)]
        found = analysis.measure(net, levels, seed=1)
    assert found["rate"] == pytest.approx(float(nats) / math.log(2) / PIXELS, rel=1e-5)
    spread = torch.tensor(expected).std()
    assert abs(sum(draws) - sum(expected)) / 40 < 4 * spread / 40**0.5
    assert torch.tensor(draws).std() > 0.2 * spread  # the mean alone would always give one value


def test_a_decoder_that_ignores_its_latents_gains_nothing_from_them():
    decoder = partial(PixelCNNDecoder, channels=4, layers=1, first_kernel=3)
    net, levels = build(GaussianBottleneck(3), decoder), draw_levels()
    with torch.no_grad():
        assert analysis.measure(net, levels, 0)["other"] != analysis.measure(net, levels, 0)["own"]
        for weight in net.decoder.upsampler.parameters():
            weight.zero_()
    found = analysis.measure(net, levels, seed=0)
    assert found["other"] == pytest.approx(found["own"], abs=1e-6)


@pytest.mark.parametrize(
    ("key", "values", "names"),
    [
        ("quantizer", ("ema", "gaussian"), ["ema", "ema", "gaussian", "gaussian"]),
        ("model.net.quantizer.beta", (0.4, 0.04), ["beta=0.4", "beta=0.4", "beta=0.04"]),
    ],
)
def test_a_setting_is_named_by_what_the_sweep_varies(key, values, names):
    common = {"data_dir": "/data", "trainer": "cpu"}
    decoders = ("convolutional", "pixelcnn")
    jobs = [
        SimpleNamespace(
            chosen={**common, key: value, "seed": seed, "model/decoder": decoders[seed]}, config={}
        )
        for value in values
        for seed in (0, 1)
    ]
    assert analysis.name_settings(jobs)[: len(names)] == names


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    main()


@pytest.mark.slow
def test_the_study_runs_from_the_sweep_to_its_picture(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [o for o in shrink("vqvae-train", toy) if "hidden" not in o or "residual" in o]
    few = ["hydra.sweeper.params.quantizer='gaussian_elbo,ema'", "hydra.sweeper.params.seed='0'"]
    few += ["model.net.hidden=4"]
    train = COMMANDS["vqvae-train"]
    run(monkeypatch, train, "sweep=posterior_collapse", *small, *few, "hydra.sweep.dir=sweep")
    (tmp_path / "results").mkdir()
    run(monkeypatch, analysis.main, "sweep", "--output", "results", "--images", "14")
    with (tmp_path / "results/posterior_collapse_latents.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["folder"] for row in rows] == ["0", "1", "2", "3"]
    codes = [row for row in rows if row["folder"] in ("1", "3")]  # ema: 3x2 codes of 512
    for row in codes:
        assert float(row["rate"]) == pytest.approx(6 * 9 / (3 * 12 * 8), rel=1e-5)
    assert all(6 < float(row["own"]) < 9 for row in rows)  # barely trained: about 8 bits
    with Image.open(tmp_path / "results/posterior_collapse_samples.png") as picture:
        assert min(picture.size) > 500
    (tmp_path / "sweep/2/result.json").unlink()
    with pytest.raises(SystemExit, match="error: sweep/2 is unfinished"):
        run(monkeypatch, analysis.main, "sweep", "--output", "results")
