"""Each metric of an evaluation is recomputed from arrays with a few lines of numpy."""

import math
from types import SimpleNamespace

import evaluated
import numpy as np
import pytest
import torch
from evaluated import CPU, NUM_CODES, SIZES

from vqvae_lightning.data import Batch
from vqvae_lightning.evaluation import likelihood
from vqvae_lightning.evaluation.classifier import measure_with_classifier, train_classifier
from vqvae_lightning.evaluation.drawing import find_nearest_images
from vqvae_lightning.evaluation.reconstruction import (
    HIGHEST_PSNR,
    ReconstructionErrors,
    measure_reconstruction,
)
from vqvae_lightning.networks.classifier import Classifier
from vqvae_lightning.pixels import from_uint8
from vqvae_lightning.stages.evaluating import Subject
from vqvae_lightning.stages.evaluating import measure as measure_as_command
from vqvae_lightning.tasks import ClassifierTask, PriorTask, VQVAETask, WarmupCosine

DIMS = 3 * 16 * 20
POSITIONS = 4 * 5


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return evaluated.make_codes_data(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def prior(codes):
    return evaluated.make_prior(codes)


@pytest.fixture(scope="module")
def measured(codes, prior):
    """Metrics of the validation images and of the test images."""
    return {
        split: {
            **measure_reconstruction(codes, split, CPU),
            **likelihood.measure_likelihood(codes, prior, split, CPU),
        }
        for split in ("val", "test")
    }


def read_arrays(codes, split):
    """Images, codes and decoder outputs (0 to 255) of a split as numpy arrays."""
    grid = torch.from_numpy(np.array(codes.datasets[split].data).astype(np.int64))
    with torch.no_grad():
        decoded = codes.vqvae.decode(grid)
    images = evaluated.make_images(split).images.numpy().astype(np.float64)
    return images, grid.numpy(), (decoded.double().numpy() + 1) / 2 * 255


def round_levels(levels):
    return np.clip(np.rint(levels), 0, 255)


def compute_entropy(counts):
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log(share)).sum()


def compute_ssim(one, other):
    """SSIM (Wang et al. 2004): 11x11 window, standard deviation 1.5, images mirrored at edges."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(values):
        values = np.pad(values, [(0, 0), (0, 0), (5, 5), (5, 5)], mode="reflect")
        patches = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(2, 3))
        return (patches * window).sum((-1, -2))

    mu, nu = mean(one), mean(other)
    covariance = mean(one * other) - mu * nu
    variances = mean(one**2) - mu**2 + mean(other**2) - nu**2
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mu * nu + c1) * (2 * covariance + c2) / ((mu**2 + nu**2 + c1) * (variances + c2))
    return index.mean()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def compute_log_mass(levels, mean, scale):
    """Log of the mass of a logistic distribution from x - 1/2 to x + 1/2, open at levels 0 and 255.

    It is a difference of the distribution function, taken on the side where that is not near 1.
    """
    upper, lower = (levels + 0.5 - mean) / scale, (levels - 0.5 - mean) / scale
    upper, lower = np.where(levels == 255, np.inf, upper), np.where(levels == 0, -np.inf, lower)
    flipped = levels > mean
    upper, lower = np.where(flipped, -lower, upper), np.where(flipped, -upper, lower)
    return np.log(sigmoid(upper) - sigmoid(lower))


def fit_scale(levels, mean):
    """The scale of highest likelihood per channel, from a search with ever finer grids."""
    scales = []
    for channel in range(levels.shape[1]):
        x, m = levels[:, channel], mean[:, channel]
        low, high = 0.0, 6.0
        for _ in range(5):
            tried = np.linspace(low, high, 9)
            best = tried[np.argmax([compute_log_mass(x, m, np.exp(log)).sum() for log in tried])]
            low, high = best - (tried[1] - tried[0]), best + (tried[1] - tried[0])
        scales.append(np.exp(best))
    return np.array(scales)[:, None, None]


def compute_nats(prior, grid, labels):
    """-ln p of each code, from one full pass per position, with all later codes set to 0."""
    flat = torch.from_numpy(grid).flatten(1)
    nats = np.zeros(flat.shape)
    for position in range(flat.shape[1]):
        seen = torch.where(torch.arange(flat.shape[1]) < position, flat, 0).view(grid.shape)
        with torch.no_grad():
            logits = prior(seen, labels).flatten(2)[:, :, position].double().numpy()
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        nats[:, position] = -np.log(share[np.arange(len(flat)), flat[:, position]])
    return nats


@pytest.mark.parametrize("split", ["val", "test"])
def test_errors_are_those_of_the_rounded_images(split, codes, measured):
    images, _, decoded = read_arrays(codes, split)
    squared = ((round_levels(decoded) - images) / 255) ** 2
    train = evaluated.make_images("train").images.numpy() / 255
    expected = {
        "mse": squared.mean(),
        "mse_unrounded": (((decoded - images) / 255) ** 2).mean(),
        "nmse": squared.mean() / train.var(),
        "psnr_db": -10 * np.log10(squared.mean()),
        "psnr_per_image_db": (-10 * np.log10(squared.mean((1, 2, 3)))).mean(),
        "ssim": compute_ssim(round_levels(decoded) / 255, images / 255),
    }
    assert expected["mse"] != pytest.approx(expected["mse_unrounded"], rel=1e-3)
    for name, value in expected.items():
        # In float32 the variances of nearly uniform patches have only three correct digits.
        tolerance = 1e-3 if name == "ssim" else 2e-5
        assert measured[split][name] == pytest.approx(value, rel=tolerance), name


def test_an_image_without_error_counts_with_the_highest_psnr():
    levels = torch.randint(0, 255, (4, 1, 12, 12), dtype=torch.uint8)
    wrong = levels.clone()
    wrong[1:] += 1
    errors = ReconstructionErrors(CPU)
    errors.update(levels, from_uint8(wrong))
    expected = (HIGHEST_PSNR + 3 * 20 * math.log10(255)) / 4
    assert errors.compute(1.0)["psnr_per_image_db"] == pytest.approx(expected)
    perfect = ReconstructionErrors(CPU)
    perfect.update(levels, from_uint8(levels))
    found = perfect.compute(1.0)
    assert found["psnr_db"] == found["psnr_per_image_db"] == HIGHEST_PSNR


@pytest.mark.parametrize("split", ["val", "test"])
def test_use_of_the_codebook_is_that_of_the_histograms(split, codes, measured):
    _, grid, _ = read_arrays(codes, split)
    _, train, _ = read_arrays(codes, "train")
    counts, trained = (np.bincount(part.ravel(), minlength=NUM_CODES) for part in (grid, train))
    expected = {
        "perplexity": np.exp(compute_entropy(counts)),
        "code_entropy_bits": compute_entropy(counts) / np.log(2),
        "codebook_use": (counts > 0).mean(),
        "dead_codes": (trained == 0).sum(),
    }
    # The numbers of unused codes differ between the splits, so none can pass for another.
    assert 0 < (counts == 0).sum() < expected["dead_codes"]
    whole = [grid[start : start + 32] for start in range(0, len(grid) - 31, 32)]
    if whole:  # the 70 test images are two batches; the remaining 6 images are not used
        each = [np.exp(compute_entropy(np.bincount(part.ravel()))) for part in whole]
        expected["perplexity_batch32"] = np.mean(each)
    assert ("perplexity_batch32" in measured[split]) == (split == "test")
    for name, value in expected.items():
        assert measured[split][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("split", ["val", "test"])
def test_bits_per_dim_are_summed_from_masses_and_softmaxes(split, codes, prior, measured):
    images, grid, decoded = read_arrays(codes, split)
    _, train, _ = read_arrays(codes, "train")
    # The scale is always fitted on validation images; on test images it would differ.
    validated, _, validated_mean = read_arrays(codes, "val")
    scale = fit_scale(validated, validated_mean)
    pixels = -compute_log_mass(images, decoded, scale).sum() / (len(images) * DIMS * np.log(2))
    share = (np.bincount(train.ravel(), minlength=NUM_CODES) + 1) / (train.size + NUM_CODES)
    hits = (train[..., None] == np.arange(NUM_CODES)).sum(0) + 1
    by_position = hits / hits.sum(-1, keepdims=True)
    rows, columns = np.indices(grid.shape[1:])
    unigram = -np.log(share[grid]).mean()
    nats = compute_nats(prior, grid, evaluated.make_images(split).labels).mean()
    rate = POSITIONS / (DIMS * np.log(2))
    expected = {
        "unigram_nats_per_code": unigram,
        "position_nats_per_code": -np.log(by_position[rows, columns, grid]).mean(),
        "nats_per_code": nats,
        "bits_per_code": nats / np.log(2),
        "reconstruction_bits_per_dim": pixels,
        "uniform_bits_per_dim": rate * np.log(NUM_CODES),
        "histogram_bits_per_dim": rate * unigram,
        "prior_bits_per_dim": rate * nats,
        "total_bits_per_dim": pixels + rate * nats,
    }
    for name, value in expected.items():
        assert measured[split][name] == pytest.approx(value, rel=2e-5), name
    # Each measured metric is recomputed in this file.
    names = set(expected) | {"mse", "mse_unrounded", "nmse", "psnr_db", "psnr_per_image_db", "ssim"}
    names |= {"perplexity", "perplexity_batch32", "code_entropy_bits", "codebook_use", "dead_codes"}
    assert set(measured["test"]) == names


def test_a_scale_fitted_on_test_images_would_differ(codes, measured):
    images, _, decoded = read_arrays(codes, "test")
    own = -compute_log_mass(images, decoded, fit_scale(images, decoded)).mean() / np.log(2)
    assert own < 0.9998 * measured["test"]["reconstruction_bits_per_dim"]


def test_the_scale_is_fitted_on_the_first_values_up_to_a_limit(codes, monkeypatch):
    monkeypatch.setattr(likelihood, "SCALE_VALUES", 9 * DIMS - 1)
    images, _, decoded = read_arrays(codes, "val")
    scale = fit_scale(images[:9], decoded[:9])
    found = likelihood.measure_likelihood(codes, None, "test", CPU)["reconstruction_bits_per_dim"]
    images, _, decoded = read_arrays(codes, "test")
    expected = -compute_log_mass(images, decoded, scale).mean() / np.log(2)
    assert found == pytest.approx(expected, rel=1e-5)
    other = -compute_log_mass(images, decoded, scale * 1.01).mean() / np.log(2)
    assert found != pytest.approx(other, rel=1e-5)


def test_without_a_prior_its_metrics_are_left_out(codes, measured):
    alone = likelihood.measure_likelihood(codes, None, "test", CPU)
    of_a_prior = ("nats_per_code", "bits_per_code", "prior_bits_per_dim", "total_bits_per_dim")
    expected = {name: measured["test"][name] for name in measured["test"] if name in alone}
    assert alone == expected
    assert not set(alone) & set(of_a_prior)


def test_the_command_measures_the_split_it_names(codes, prior, measured):
    trainer = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1)
    for split in ("val", "test"):
        cfg = SimpleNamespace(trainer=trainer, split=split)
        assert measure_as_command(cfg, Subject(codes, prior, None)) == measured[split]


def compute_frechet_distance(one, other):
    """Two sets of features (N, D): |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    a, b = np.cov(one.T), np.cov(other.T)
    between = root(root(a) @ b @ root(a))
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a + b - 2 * between)


def test_accuracies_and_distances_are_those_of_logits_and_features(codes):
    torch.manual_seed(5)
    judge = Classifier(3, 3, hidden=2)
    # Set the statistics of batch norm, so that features and predictions differ between images.
    with torch.no_grad():
        judge(from_uint8(evaluated.make_images("train").images))
        judge.eval()
        judge.head.weight.mul_(20)
    images, _, decoded = read_arrays(codes, "test")
    truth = evaluated.make_images("test").labels
    generator = np.random.default_rng(0)
    samples = torch.from_numpy(generator.integers(0, 256, (300, 3, 16, 20), dtype=np.uint8))
    samples[::2] = samples[::2] // 4  # two kinds, in two batches of at most 256
    labels = torch.arange(300) % 3
    found = measure_with_classifier(judge, codes, "test", samples, labels, CPU)
    levels = {
        "real": torch.from_numpy(images),
        "reconstruction": torch.from_numpy(round_levels(decoded)),
        "sample": samples,
    }
    with torch.no_grad():
        inputs = {name: part.float() / 127.5 - 1 for name, part in levels.items()}
        guesses = {name: judge(part).argmax(1) for name, part in inputs.items()}
        features = {name: judge.features(part).double().numpy() for name, part in inputs.items()}
    expected = {
        "real_accuracy": (guesses["real"] == truth).double().mean(),
        "reconstruction_accuracy": (guesses["reconstruction"] == truth).double().mean(),
        "sample_accuracy": (guesses["sample"] == labels).double().mean(),
        "reconstruction_fid": compute_frechet_distance(
            features["real"], features["reconstruction"]
        ),
        "sample_fid": compute_frechet_distance(features["real"], features["sample"]),
    }
    assert len({round(float(value), 3) for value in expected.values()}) == 5
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-3), name
    unconditional = measure_with_classifier(judge, codes, "test", samples, None, CPU)
    del expected["sample_accuracy"]
    assert set(unconditional) == set(expected)


def test_the_classifier_learns_from_training_images_only():
    # The other splits have shifted labels, which a classifier that saw these splits would learn.
    data = evaluated.make_image_data()
    for split, shift in (("train", 0), ("val", 1), ("test", 1)):
        dataset = data.datasets[split]
        dataset.array = dataset.array.clone() // 4
        for number, label in enumerate(dataset.labels.tolist()):
            dataset.data[number, label] += 160
        dataset.labels = (dataset.labels + shift) % 3
    task = ClassifierTask(Classifier(3, 3, hidden=4), lambda p: torch.optim.Adam(p, 0.02))
    options = {"accelerator": "cpu", "max_steps": 30}
    judge = train_classifier(task, data, options, batch_size=20)
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    right = {}
    for split in SIZES:
        guesses = judge(from_uint8(data.datasets[split].data)).argmax(1)
        right[split] = float((guesses == data.datasets[split].labels).float().mean())
    assert right["train"] > 0.9
    assert right["val"] < 0.1
    assert right["test"] < 0.1


def test_the_nearest_image_is_that_of_a_full_search():
    data = evaluated.make_image_data()
    train = data.datasets["train"].data.numpy().astype(np.float64)
    generator = np.random.default_rng(0)
    noisy = train[[59, 3, 17]] + generator.normal(0, 5, (3, *train.shape[1:]))
    samples = np.concatenate([noisy, evaluated.make_images("test").images.numpy()[:9]])
    samples = samples.clip(0, 255).astype(np.uint8)
    distances = ((samples[:, None].astype(np.float64) - train[None]) ** 2).sum((2, 3, 4))
    found = find_nearest_images(data, torch.from_numpy(samples))
    assert (found.numpy() == train[distances.argmin(1)]).all()
    assert distances.argmin(1)[:3].tolist() == [59, 3, 17]


def make_trainer(**options):
    import pytorch_lightning as pl

    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def to_numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_prior_logs_its_likelihoods_in_nats_and_bits(split, codes, prior):
    task = PriorTask(prior, torch.optim.Adam, channels_last=False)
    run = {"val": make_trainer().validate, "test": make_trainer().test}[split]
    logged = to_numbers(run(task, datamodule=codes, verbose=False)[0])
    _, grid, _ = read_arrays(codes, split)
    _, train, _ = read_arrays(codes, "train")
    nats = compute_nats(prior, grid, evaluated.make_images(split).labels).mean()
    with torch.no_grad():
        logits = prior(torch.from_numpy(grid), evaluated.make_images(split).labels).numpy()
    share = (np.bincount(train.ravel(), minlength=NUM_CODES) + 1) / (train.size + NUM_CODES)
    expected = {
        "nats_per_code": nats,
        "bits_per_code": nats / np.log(2),
        "prior_bits_per_dim": nats / np.log(2) * POSITIONS / DIMS,
        "accuracy": (logits.argmax(1) == grid).mean(),
        "unigram_nats_per_code": -np.log(share[grid]).mean(),
        "uniform_nats_per_code": np.log(NUM_CODES),
    }
    assert set(logged) == {f"{split}/{name}" for name in expected}
    for name, value in expected.items():
        assert logged[f"{split}/{name}"] == pytest.approx(value, rel=1e-4), name


class FirstBatch:
    """Keeps the first training batch as the task receives it."""

    def __init__(self):
        import pytorch_lightning as pl

        class Watch(pl.Callback):
            def on_train_batch_start(_, trainer, pl_module, batch, batch_idx):
                self.batch = Batch(*[part.clone() for part in batch])

        self.callback = Watch()


def test_a_step_of_the_prior_logs_unsmoothed_nats(codes):
    prior = evaluated.make_prior(codes)
    options = {"label_smoothing": 0.2, "channels_last": False, "schedule": WarmupCosine(4)}
    task = PriorTask(prior, lambda p: torch.optim.SGD(p, 0.5), **options)
    first = FirstBatch()
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[first.callback])
    before = evaluated.make_prior(codes)
    trainer.fit(task, datamodule=codes)
    logged = to_numbers(trainer.logged_metrics)
    with torch.no_grad():
        logits = before(first.batch.data, first.batch.labels).double().numpy()
    grid = first.batch.data.numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nats = -np.take_along_axis(logs, grid[:, None], 1).mean()
    expected = {
        "train/nats_per_code": nats,
        "train/bits_per_code": nats / np.log(2),
        "train/accuracy": (logits.argmax(1) == grid).mean(),
        "train/loss": 0.8 * nats - 0.2 * logs.mean(),
        "train/learning_rate": 0.5 / 5,
    }
    assert logged == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_vqvae_logs_errors_and_use_of_whole_splits(split, codes):
    data = codes.images
    net = evaluated.make_vqvae(data)
    task = VQVAETask(net, torch.optim.Adam, channels_last=False)
    run = {"val": make_trainer().validate, "test": make_trainer().test}[split]
    logged = to_numbers(run(task, datamodule=data, verbose=False)[0])
    images, grid, decoded = read_arrays(codes, split)
    error = (((round_levels(decoded) - images) / 255) ** 2).mean()
    variance = (evaluated.make_images("train").images.numpy() / 255).var()
    counts = np.bincount(grid.ravel(), minlength=NUM_CODES)
    with torch.no_grad():
        vectors = net.encoder(from_uint8(evaluated.make_images(split).images)).movedim(1, -1)
    commitment = ((vectors.numpy() - net.quantizer.codebook.numpy()[grid]) ** 2).mean()
    unrounded = (((decoded - images) / 255) ** 2).mean()
    expected = {
        "mse": error,
        "psnr_db": -10 * math.log10(error),
        "nmse": error / variance,
        "commitment": commitment,
        "latent_power": (vectors.numpy() ** 2).mean(),
        "loss": unrounded / variance + 0.25 * commitment,
        "perplexity": np.exp(compute_entropy(counts)),
        "codebook_use": (counts > 0).mean(),
    }
    assert set(logged) == {f"{split}/{name}" for name in expected}
    for name, value in expected.items():
        assert logged[f"{split}/{name}"] == pytest.approx(value, rel=1e-4), name


def test_a_step_of_the_vqvae_logs_its_terms_and_the_use_in_its_batch(codes):
    data, net = codes.images, evaluated.make_vqvae(codes.images)
    task = VQVAETask(net, lambda p: torch.optim.SGD(p, 0.01), channels_last=False)
    first = FirstBatch()
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[first.callback])
    before = evaluated.make_vqvae(data)
    trainer.fit(task, datamodule=data)
    logged = to_numbers(trainer.logged_metrics)
    images = first.batch.data
    with torch.no_grad():
        vectors, grid = before.encoder(images).movedim(1, -1), before.encode(images)
        error = (before.decode(grid) - images).double().square().mean().item() / 4
    variance = (evaluated.make_images("train").images.numpy() / 255).var()
    commitment = (vectors - before.quantizer.codebook[grid]).square().mean().item()
    counts = np.bincount(grid.flatten(), minlength=NUM_CODES)
    expected = {
        "train/loss": error / variance + 0.25 * commitment,
        "train/nmse": error / variance,
        "train/commitment": commitment,
        "train/commitment_weighted": 0.25 * commitment,
        "train/latent_power": vectors.square().mean().item(),
        "train/perplexity": np.exp(compute_entropy(counts)),
        "train/codebook_use": (counts > 0).mean(),
        "train/learning_rate": 0.01,
    }
    assert logged == pytest.approx(expected, rel=1e-4)
