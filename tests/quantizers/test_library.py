"""The library's quantizers train, log and feed a prior like those of this package."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VQVAE, compose

from vqvae_lightning.configs import build
from vqvae_lightning.errors import InputError
from vqvae_lightning.quantizers import LibraryQuantizer

OPTIONS = {
    "FSQ": {"levels": [5, 5]},
    "LFQ": {"codebook_size": 16},
    "SimVQ": {"codebook_size": 16},
    "VectorQuantize": {"codebook_size": 16},
    "ResidualVQ": {"codebook_size": 16, "num_quantizers": 3},
}
TINY = [o for o in TINY_VQVAE if "num_codes" not in o and "warmup_steps" not in o]


@pytest.mark.parametrize("name", OPTIONS)
def test_decoded_codes_equal_the_decoder_input(name):
    quantizer = LibraryQuantizer(name, 8, options=OPTIONS[name]).train()
    z = torch.randn(2, 8, 4, 5, requires_grad=True)
    trained = quantizer(z)
    (trained.vectors.square().mean() + trained.loss).backward()
    assert torch.isfinite(z.grad).all()
    output = quantizer.eval()(z)
    torch.testing.assert_close(quantizer.decode(output.codes), output.vectors, atol=1e-5, rtol=1e-5)
    several = (3,) if name == "ResidualVQ" else ()
    assert output.codes.shape == (2, 4, 5, *several)
    assert quantizer.codes_per_position == (several or (1,))[0]
    assert 0 <= int(output.codes.min()) <= int(output.codes.max()) < quantizer.num_codes


def test_codes_keep_their_place_in_the_grid():
    # A vector of a grid that is not square gets the same code as on its own.
    quantizer = LibraryQuantizer("FSQ", 8, options=OPTIONS["FSQ"]).eval()
    z = torch.randn(1, 8, 2, 3)
    codes = quantizer.encode(z)
    for row in range(2):
        for column in range(3):
            alone = z[:, :, row : row + 1, column : column + 1]
            assert codes[0, row, column] == quantizer.encode(alone).item()


def unquantized_fsq(quantizer, rows):
    """Apply FSQ (arXiv:2309.15505, section 3.1) without its rounding, for an even level."""
    inner = quantizer.quantizer
    half = (8 - 1) * (1 + 1e-3) / 2
    bounded = torch.tanh(inner.project_in(rows) + math.atanh(0.5 / half)) * half - 0.5
    return inner.project_out(bounded / 4)


def unquantized_lfq(quantizer, rows):
    """Apply spherical LFQ without taking signs."""
    inner = quantizer.quantizer
    return inner.project_out(F.normalize(inner.project_in(rows), dim=-1))


UNQUANTIZED = {
    "library": lambda quantizer, rows: rows,
    "simvq": lambda quantizer, rows: rows,
    "residual_vq": lambda quantizer, rows: 4 * rows,  # each of the four passes the gradient
    "fsq": unquantized_fsq,
    "lfq": unquantized_lfq,
}


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_every_config_uses_the_straight_through_gradient(name):
    # SimVQ, VectorQuantize and ResidualVQ rotate the gradient by default. A comparison with the
    # other quantizers would then compare estimators too.
    quantizer = build(compose("vqvae", f"quantizer={name}").model.net.quantizer).train()
    assert not any(getattr(part, "rotation_trick", False) for part in quantizer.modules())
    z = torch.randn(2, 64, 4, 5, requires_grad=True)
    weights = torch.randn(2, 64, 4, 5)
    (found,) = torch.autograd.grad((quantizer(z).vectors * weights).sum(), z)
    passed = UNQUANTIZED[name](quantizer, z.movedim(1, -1)).movedim(-1, 1)
    (expected,) = torch.autograd.grad((passed * weights).sum(), z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_encoding_never_learns():
    quantizer = LibraryQuantizer("VectorQuantize", 8, options=OPTIONS["VectorQuantize"]).train()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.encode(torch.randn(2, 8, 4, 5))
    assert quantizer.training
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("quantizer", ["library", "fsq", "lfq", "simvq", "residual_vq"])
def test_training_logs_the_metrics_of_codebook_use(quantizer, command, toy):
    outcome = command("vqvae-train", f"quantizer={quantizer}", *toy, *TINY)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((outcome.folder / "result.json").read_text())["metrics"]
    total = 512 * (4 if quantizer == "residual_vq" else 1)
    assert 0 < metrics["test/codebook_use"]["value"] <= 1
    assert 1 <= metrics["test/perplexity"]["value"] <= total
    logged = (outcome.folder / "metrics.csv").read_text().splitlines()[0]
    assert ("train/auxiliary" in logged) == (quantizer != "fsq")
    assert "test/auxiliary" not in metrics, "a zero is no metric"


@pytest.mark.parametrize("quantizer", ["fsq", "lfq", "simvq", "library"])
def test_a_prior_learns_their_codes(quantizer, command, toy):
    outcome = command("vqvae-pipeline", "experiment=smoke", f"quantizer={quantizer}", *toy)
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "samples.png").is_file()


def test_a_prior_learns_several_codes_per_position(command, toy, tmp_path):
    options = ("experiment=smoke", "quantizer=residual_vq")
    sizes = [f"model.net.quantizer.options.{o}" for o in ("codebook_size=16", "num_quantizers=2")]
    outcome = command("vqvae-pipeline", *options, *sizes, *toy)
    assert outcome.status == 0, outcome.err
    assert "3x2x2 codes of 16" in outcome.out
    report = (outcome.folder / "report.html").read_text()
    assert "codebook 1" in report
    assert "codebook 2" in report
    metrics = json.loads((outcome.folder / "result.json").read_text())["metrics"]
    # 3 * 2 * 2 codes of log2 16 bits for 12 * 8 * 3 values
    assert metrics["test/uniform_bits_per_dim"]["value"] == pytest.approx(12 * 4 / 288)
    with np.load(outcome.folder / "evaluation" / "codes.npz") as arrays:
        assert arrays["histogram"].shape == (2, 16)
        assert arrays["histogram"].sum(1).tolist() == [96 * 6, 96 * 6]
        assert arrays["codes"].shape[1:] == (3, 2, 2)
    prior = f"prior_checkpoint={outcome.folder}/prior/checkpoints/best.ckpt"
    keep = ("complete=test", "num_samples=4", "completions=2", "keep_rows=0.34")
    completed = command("vqvae-sample", prior, *keep, folder=tmp_path / "completed")
    assert completed.status == 0, completed.err
    with np.load(completed.folder / "samples.npz") as arrays:
        assert arrays["codes"].shape == (8, 3, 2, 2)
        assert (arrays["codes"][:4, 0] == arrays["codes"][4:, 0]).all()
    drawn = json.loads((completed.folder / "result.json").read_text())["metrics"]
    assert 0 < drawn["entropy_nats_per_code"]["value"] <= math.log(16)


@pytest.mark.parametrize("quantizer", ["none", "gaussian"])
def test_a_prior_on_a_continuous_bottleneck_is_refused_before_training(quantizer, command, toy):
    outcome = command("vqvae-pipeline", f"quantizer={quantizer}", *toy, "trainer=debug")
    assert outcome.status == 1
    assert "is continuous" in outcome.err
    assert not (outcome.folder / "vqvae" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Nothing", {}, "name=Nothing"),
        ("os", {}, "name=os"),
        ("FSQ", {"sizes": [5]}, "sizes"),
        ("SimVQ", {}, "SimVQ"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        LibraryQuantizer(name, 8, options=options)


def test_codebooks_that_would_drift_apart_over_ranks_are_refused(monkeypatch):
    monkeypatch.setattr("vqvae_lightning.quantizers.library.get_rank_and_world", lambda: (0, 2))
    with pytest.raises(InputError, match="sync_codebook"):
        LibraryQuantizer("VectorQuantize", 8, options=OPTIONS["VectorQuantize"]).update(0.0)
    synced = {**OPTIONS["VectorQuantize"], "sync_codebook": True}
    LibraryQuantizer("VectorQuantize", 8, options=synced).update(0.0)
    LibraryQuantizer("FSQ", 8, options=OPTIONS["FSQ"]).update(0.0)
