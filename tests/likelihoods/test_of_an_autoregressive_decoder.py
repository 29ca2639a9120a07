"""An autoregressive decoder as a part of a VQ-VAE: trained, stored, evaluated."""

import csv
import json
import math
from functools import partial

import pytest
import torch
from conftest import TINY_VQVAE
from evaluated import CPU, make_codes_data

from vqvae_lightning import load
from vqvae_lightning.checkpoints import hash_weights
from vqvae_lightning.evaluation.likelihood import measure_likelihood
from vqvae_lightning.evaluation.reconstruction import decode_images, measure_reconstruction
from vqvae_lightning.likelihoods import Categorical
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixel_decoder import PixelCNNDecoder
from vqvae_lightning.pixels import to_uint8
from vqvae_lightning.randomness import derive_seed

SIZES = [option for option in TINY_VQVAE if "num_codes" not in option and "warmup" not in option]
DECODER = (
    "model/decoder=pixelcnn",
    "model.net.decoder.channels=8",
    "model.net.decoder.layers=2",
    "model.net.decoder.first_kernel=3",
)


def read_metrics(folder):
    return {
        k: e["value"]
        for k, e in json.loads((folder / "result.json").read_text())["metrics"].items()
    }


@pytest.mark.parametrize(
    ("quantizer", "options"),
    [
        ("ema", ["model.net.quantizer.warmup_steps=1"]),
        ("loss", ["model.net.quantizer.warmup_steps=1"]),
        ("none", []),
        ("gaussian", ["model.net.quantizer.beta=0.001", "model.net.quantizer.free_bits=0.1"]),
    ],
)
def test_it_trains_with_every_quantizer_and_is_stored_and_evaluated(
    quantizer, options, toy, command
):
    trained = command(
        "vqvae-train",
        *(*toy, *SIZES, *DECODER, f"quantizer={quantizer}", *options),
        *("trainer.max_steps=30", "trainer.val_check_interval=15", "model.optimizer.lr=0.02"),
        *("model.schedule.warmup_steps=5",),
    )
    assert trained.status == 0, trained.err
    with (trained.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name.rpartition("/")[2] for name in rows[0]}
    assert not logged & {"mse", "nmse", "psnr_db"}, "errors of what is no reconstruction"
    nats = [float(row["train/nll_nats_per_dim"]) for row in rows if row["train/nll_nats_per_dim"]]
    assert sum(nats[-5:]) < 0.9 * sum(nats[:5])
    for row in rows[5:]:
        if row["train/loss"]:
            weights = [float(v) for name, v in row.items() if name.endswith("_weighted") and v]
            assert float(row["train/loss"]) == pytest.approx(sum(weights), rel=1e-4)
    assert len(list((trained.folder / "pictures").glob("*reconstructions*.png"))) == 2
    best = trained.folder / "checkpoints/best.ckpt"
    net, config = load(best)
    assert net.autoregressive
    assert config["model"]["net"]["decoder"]["channels"] == 8
    if quantizer == "none":
        return
    evaluated = command(
        "vqvae-evaluate",
        *(f"vqvae_checkpoint={best}", "importance_samples=2"),
        folder=trained.folder.with_name("evaluated"),
    )
    assert evaluated.status == 0, evaluated.err
    found, tested = read_metrics(evaluated.folder), read_metrics(trained.folder)
    if quantizer == "gaussian":
        total = found["test/reconstruction_bits_per_dim"] + found["test/kl_bits_per_dim"]
        assert found["test/elbo_bits_per_dim"] == pytest.approx(total)
        assert found["test/kl_bits_per_dim"] > 0
    else:
        bits = tested["test/nll_nats_per_dim"] / math.log(2)
        assert found["test/reconstruction_bits_per_dim"] == pytest.approx(bits, rel=1e-4)


def test_it_learns_on_kept_codes_and_the_samples_are_seeded(toy, command, tmp_path):
    first = command("vqvae-train", *toy, *TINY_VQVAE, folder=tmp_path / "first")
    assert first.status == 0, first.err
    checkpoint = first.folder / "checkpoints/best.ckpt"
    kept = ("trainer=debug", *DECODER, f"vqvae_checkpoint={checkpoint}")
    second = command("vqvae-train", *toy, *kept, folder=tmp_path / "second")
    assert second.status == 0, second.err
    old = load(checkpoint).net
    path = second.folder / "checkpoints/best.ckpt"
    new, config = load(path)
    assert new.autoregressive
    assert config["vqvae_hash"] == hash_weights(old)
    images = torch.rand(4, 3, 12, 8) * 2 - 1
    assert torch.equal(old.encode(images), new.encode(images))
    pictures = []
    for number, seed in enumerate((0, 0, 1)):
        outcome = command(
            "vqvae-reconstruct",
            *(f"vqvae_checkpoint={path}", "count=4", f"seed={seed}"),
            folder=tmp_path / f"reconstructed{number}",
        )
        assert outcome.status == 0, outcome.err
        pictures.append((outcome.folder / "reconstructions.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_an_evaluation_scores_the_images_and_measures_samples(tmp_path):
    codes = make_codes_data(tmp_path)
    torch.manual_seed(3)
    decoder = partial(PixelCNNDecoder, channels=8, layers=2, first_kernel=3)
    sizes = {"hidden": 8, "residual_blocks": 1, "residual_hidden": 4}
    net = VQVAE(codes.vqvae.quantizer, 3, likelihood=Categorical, decoder=decoder, **sizes).eval()
    codes.vqvae = net
    images = codes.images.datasets["val"].data
    grid = torch.tensor(codes.datasets["val"].data).long()
    with torch.no_grad():
        logits = net.decoder(net.quantizer.decode(grid), images).unflatten(1, (3, 256))
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), images.long())
    bits = measure_likelihood(codes, None, "val", CPU)["reconstruction_bits_per_dim"]
    assert bits == pytest.approx(nats.item() / math.log(2), rel=1e-5)

    drawn = []
    draw = net.decoder.sample
    net.decoder.sample = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    first = measure_reconstruction(codes, "val", CPU)
    samples = torch.cat(drawn)
    net.decoder.sample = draw
    # An evaluation has batches of 8 images, which share a generator but no random numbers.
    generator = torch.Generator().manual_seed(derive_seed(codes.seed, "pixels", 0))
    parts = [net.decode(part, generator) for part in grid.split(8)]
    assert torch.equal(samples, to_uint8(torch.cat(parts)))
    expected = ((samples.double() - images.double()) / 255).square().mean().item()
    assert first["mse"] == first["mse_unrounded"] == pytest.approx(expected, rel=1e-5)
    assert measure_reconstruction(codes, "val", CPU) == first
    assert torch.equal(decode_images(net, grid[:8], codes.seed), samples[:8])
    assert not torch.equal(decode_images(net, grid[:8], 1), samples[:8])
