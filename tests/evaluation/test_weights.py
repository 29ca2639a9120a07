"""FID, KID and LPIPS with random weights equal torchmetrics', and bad files are refused."""

import hashlib

import evaluated
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from evaluated import CPU, TinyFeatures, compute_coverage, compute_frechet
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity, fid
from torchmetrics.image.kid import KernelInceptionDistance

from vqvae_lightning.errors import InputError
from vqvae_lightning.evaluation import features, inception, lpips
from vqvae_lightning.pixels import to_uint8
from vqvae_lightning.runs.results import read_result


def compute_kernel_distance(one, other):
    """Unbiased squared discrepancy (arXiv:1801.01401, equation 4), pair by pair."""

    def compute_mean(rows, others, same):
        values = [
            (row @ column / len(row) + 1) ** 3
            for i, row in enumerate(rows)
            for j, column in enumerate(others)
            if not (same and i == j)
        ]
        return np.mean(values)

    within = compute_mean(one, one, True) + compute_mean(other, other, True)
    return within - 2 * compute_mean(one, other, False)


def read_pairs(codes, split):
    """Images of a split and their reconstructions, both uint8."""
    grid = torch.from_numpy(np.array(codes.datasets[split].data).astype(np.int64))
    return codes.images.datasets[split].data, to_uint8(codes.vqvae.decode(grid)).detach()


@pytest.fixture
def alexnet():
    return torchvision.models.alexnet(weights=None).eval()


@pytest.fixture
def lpips_path(alexnet, tmp_path):
    """A file with the convolutions of AlexNet; its large last layers are not needed."""
    path = tmp_path / "alexnet.pth"
    convolutions = {k: v for k, v in alexnet.state_dict().items() if k.startswith("features.")}
    torch.save(convolutions, path)
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_those_of_the_features(channels, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "BATCH", 3)
    codes = evaluated.make_codes_data(tmp_path)
    images, decoded = (part[:, :channels] for part in read_pairs(codes, "val"))
    pairs = inception.pair_images_with_decoded

    def cut(*given):
        for levels, *rest, decoded in pairs(*given):
            yield levels[:, :channels], *rest, decoded[:, :channels]

    monkeypatch.setattr(inception, "pair_images_with_decoded", cut)
    noise = 5 * torch.randn(len(images), channels, 16, 20)
    samples = (images.float() * 0.9 + noise).clamp(0, 255).byte()
    net = TinyFeatures()
    found = inception.measure_with_inception(net, codes, "val", samples, CPU)
    real, other, drawn = (
        net(part.repeat(1, 3 // channels, 1, 1)).double().numpy()
        for part in (images, decoded, samples)
    )
    expected = {
        "reconstruction_inception_fid": compute_frechet(real, other),
        "reconstruction_inception_kid": compute_kernel_distance(real, other),
        "sample_inception_fid": compute_frechet(real, drawn),
        "sample_inception_kid": compute_kernel_distance(real, drawn),
        "sample_inception_precision": compute_coverage(drawn, real),
        "sample_inception_recall": compute_coverage(real, drawn),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name
    without = inception.measure_with_inception(net, codes, "val", None, CPU)
    assert set(without) == {name for name in expected if name.startswith("reconstruction")}


def test_the_kernel_distance_of_subsets_is_repeatable_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(90, 4, generator=generator)
    other = torch.randn(30, 4, generator=generator) + 0.8
    before = torch.get_rng_state()
    found = inception.measure_kernel_distance(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert inception.measure_kernel_distance(one, other) == found
    whole = compute_kernel_distance(one.double().numpy(), other.double().numpy())
    assert found == pytest.approx(whole, rel=0.1)
    # The biased estimate, with the pairs of an image with itself, would be positive.
    same = [torch.randn(40, 4, generator=generator) for _ in range(20)]
    distances = [
        inception.measure_kernel_distance(*pair) for pair in zip(same[::2], same[1::2], strict=True)
    ]
    assert min(distances) < 0 < max(distances)


@pytest.mark.parametrize("split", ["val", "test"])
def test_lpips_is_that_of_torchmetrics(split, alexnet, lpips_path, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "BATCH", 3)
    codes = evaluated.make_codes_data(tmp_path / "codes")
    found = lpips.measure_lpips(features.load_lpips(lpips_path), codes, split, CPU)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: alexnet.features)
    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    images, decoded = (
        F.interpolate(part.float() / 255, (64, 80), mode="bilinear")
        for part in read_pairs(codes, split)
    )
    metric.update(images, decoded)
    assert found == {"lpips_alex": pytest.approx(float(metric.compute()), rel=1e-4)}
    assert found["lpips_alex"] > 0


def test_lpips_enlarges_small_images_and_repeats_grey_ones():
    grey = torch.randint(0, 256, (2, 1, 28, 56), dtype=torch.uint8)
    seen = lpips._prepare(grey)
    assert seen.shape == (2, 3, 64, 128)
    assert torch.equal(seen[:, 0], seen[:, 2])
    large = torch.randint(0, 256, (2, 3, 64, 70), dtype=torch.uint8)
    assert torch.equal(lpips._prepare(large), large.float() / 255)


def damage(path):
    path.write_bytes(path.read_bytes()[:-2000])


def write_text(path):
    path.write_text("not weights")


def write_code(path):
    torch.save({"features.0.weight": print}, path)


def write_tensor(path):
    torch.save(torch.zeros(3), path)


def write_other_names(path):
    torch.save({"conv.weight": torch.zeros(3)}, path)


def write_other_shapes(path):
    first = {"inception": "Conv2d_1a_3x3.conv.weight", "lpips": "features.0.weight"}
    weights = torch.load(path)
    torch.save({**weights, **dict.fromkeys(first.values(), torch.zeros(5, 5))}, path)


@pytest.mark.parametrize("key", ["inception", "lpips"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "is not a file: download https://"),
        (damage, "is damaged"),
        (write_text, "is damaged"),
        (write_code, "is damaged or not a file of plain weights"),
        (write_tensor, "is not a state dict"),
        (write_other_names, "has other weights than"),
        (write_other_shapes, "has other weights than"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(key, spoil, says, lpips_path, tmp_path):
    spoil(tmp_path / "alexnet.pth")
    images = evaluated.make_image_data()
    with pytest.raises(InputError) as caught:
        features.load_networks(False, {"inception": None, "lpips": None, key: lpips_path}, images)
    line = str(caught.value)
    assert line.startswith(f"weights.{key}={lpips_path} {says}"), line
    assert "\n" not in line
    assert len(line) < 450


def test_what_is_not_asked_for_is_not_loaded_and_what_is_missing_is_named(lpips_path, monkeypatch):
    images = evaluated.make_image_data()
    nothing = {"inception": None, "lpips": None}
    assert features.load_networks(False, nothing, images) == (None, None, None, None, {})
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    before = torch.get_rng_state()
    found = features.load_networks(False, {"inception": lpips_path, "lpips": lpips_path}, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.inception is None
    assert found.lpips is not None
    assert found.missing == (
        "Inception metrics are left out: pip install 'vqvae-lightning[perceptual]'"
    )
    images.image_shape = (4, 16, 20)
    assert "4 channels" in features.load_networks(False, {"lpips": lpips_path}, images).missing
    assert features.load_networks(False, nothing, images).missing is None


def test_an_evaluation_measures_lpips_and_names_its_file(checkpoints, command, lpips_path):
    vqvae = f"vqvae_checkpoint={checkpoints / 'vqvae0/checkpoints/best.ckpt'}"
    found = command("vqvae-evaluate", vqvae, f"weights.lpips={lpips_path}")
    assert found.status == 0, found.err
    result = read_result(found.folder)
    assert result["metrics"]["test/lpips_alex"]["value"] > 0
    with open(lpips_path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert result["weights"] == {"lpips": digest[:8]}
    assert result["missing"] is None
    assert f"warning: weights.lpips={lpips_path} is not https://" in found.out
    assert not any("inception" in name for name in result["metrics"])


@pytest.mark.slow  # half a minute
def test_inception_is_that_of_torchmetrics(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    path = str(tmp_path / "inception.pth")
    with monkeypatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(fid.NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        random = fid.NoTrainInceptionV3("random", ["2048"])
    for layer in random.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(random.state_dict(), path)
    codes = evaluated.make_codes_data(tmp_path / "codes")
    networks = features.load_networks(False, {"inception": path}, codes.images)
    found = inception.measure_with_inception(networks.inception, codes, "val", None, CPU)
    distance = fid.FrechetInceptionDistance(2048, feature_extractor_weights_path=path)
    with pytest.warns(UserWarning, match="save all extracted features"):
        kernel = KernelInceptionDistance(random, subsets=1, subset_size=21)
    for real, images in zip((True, False), read_pairs(codes, "val"), strict=True):
        distance.update(images, real=real)
        kernel.update(images, real=real)
    assert found == {
        "reconstruction_inception_fid": pytest.approx(float(distance.compute()), rel=1e-3),
        "reconstruction_inception_kid": pytest.approx(float(kernel.compute()[0]), rel=1e-3),
    }
    assert found["reconstruction_inception_fid"] > 0
