"""The study of autoencoders runs from its preset to its tables, whose numbers are right."""

import csv
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMANDS
from PIL import Image
from test_configs import read_preset, shrink

STUDY = Path(__file__).parents[2] / "experiments/traditional_autoencoders"
SEEDS = (0, 1)
LARGEST = 400_000  # bytes of a picture
spec = importlib.util.spec_from_file_location("autoencoders", STUDY / "analysis.py")
analysis = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = analysis
spec.loader.exec_module(analysis)


def run(patch, main, *arguments):
    patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    main()


def read_prior_options():
    """Options of the prior's command in the study's README that are not places or the seed."""
    (line,) = re.findall(r"vqvae-train --config-name prior (.*)", (STUDY / "README.md").read_text())
    return [option for option in line.split() if "$" not in option]


@pytest.fixture(scope="module")
def study(toy_npz, tmp_path_factory):
    """Folder with the sweep in `sweep` and the results of its analysis in `results`."""
    place = tmp_path_factory.mktemp("study")
    toy = ("dataset=npz", f"dataset.source.path={toy_npz}")
    name, params = read_preset("traditional_autoencoders")
    small = shrink(name, toy)
    few = f"hydra.sweeper.params.seed='{','.join(map(str, SEEDS))}'"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train = COMMANDS[name]
        run(patch, train, "sweep=traditional_autoencoders", *small, few, "hydra.sweep.dir=sweep")
        first = params["quantizer"].index("ema") * len(SEEDS)
        for seed in SEEDS:
            job = f"sweep/{first + seed}"
            places = [f"vqvae_checkpoint={job}/checkpoints/best.ckpt", f"hydra.run.dir={job}/prior"]
            options = [*read_prior_options(), "model.net.channels=8", "batch_size=8", *toy]
            short = [option for option in small if option.startswith("trainer.")]
            given = ["--config-name", "prior", *places, *options, *short, f"seed={seed}"]
            run(patch, train, *given)
        output = ["--output", "results", "--classifier-steps", 2, "--seeds", *SEEDS]
        run(patch, analysis.main, "sweep", *output)
    return place


def read_rows(study):
    with (study / "results/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_job_has_a_row_with_the_metrics_of_its_model(study):
    rows = read_rows(study)
    assert [(row["model"], int(row["seed"])) for row in rows] == [
        (model, seed) for model in ("AE", "VAE", "VAE (ELBO)", "VQ-VAE") for seed in SEEDS
    ]
    sources = {
        "AE": {"fitted"},
        "VAE": {"fitted", "normal"},
        "VAE (ELBO)": {"fitted", "normal"},
        "VQ-VAE": {"uniform", "histogram", "prior"},
    }
    for row in rows:
        filled = {name for name, cell in row.items() if cell}
        assert {n.removesuffix("_fid") for n in filled if n.endswith("_fid")} == {
            *sources[row["model"]],
            *("real", "reconstruction"),
        }
        assert ("perplexity" in filled) == (row["model"] == "VQ-VAE")
        assert ("active_dims" in filled) == row["model"].startswith("VAE")
        assert float(row["nmse"]) > 0
        assert 0 < float(row["principal_share"]) <= 1
        assert 0 <= float(row["probe_accuracy"]) <= 1


def test_the_tables_hold_mean_and_deviation_of_the_rows(study):
    rows = read_rows(study)
    text = (study / "results/results.md").read_text()
    table = {}
    for line in text.splitlines():
        title, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[title] = cells
    for model in ("AE", "VAE", "VAE (ELBO)", "VQ-VAE"):
        values = np.array([float(row["nmse"]) for row in rows if row["model"] == model])
        spread = np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1))
        assert table[model][0] == f"{values.mean():.4f} ± {spread:.4f}"
    used = [float(row["perplexity"]) for row in rows if row["perplexity"]]
    assert table["VQ-VAE"][3] == f"{np.mean(used):.0f} ± {np.std(used, ddof=1):.0f}"
    assert table["AE"][3] == "-"
    drawn = [float(row["prior_fid"]) for row in rows if row["prior_fid"]]
    assert table["VQ-VAE, PixelCNN"][0] == f"{np.mean(drawn):.2f} ± {np.std(drawn, ddof=1):.2f}"


def test_the_pictures_are_readable_and_small(study):
    for name in ("reconstructions", "samples", "interpolation", "neighbours"):
        path = study / f"results/{name}.png"
        assert path.stat().st_size < LARGEST
        assert Image.open(path).width > 1200
    assert analysis.LARGE >= 14


def test_no_label_of_a_picture_is_cut_off(tmp_path):
    images = torch.zeros(10, 1, 28, 28, dtype=torch.uint8)
    rows = {f"VAE (ELBO)\nfitted Gaussian {n}": images for n in range(9)}
    analysis.save_rows(tmp_path / "rows.png", "Title", rows)
    pixels = np.asarray(Image.open(tmp_path / "rows.png").convert("L"))
    assert pixels[:, 0].min() == pixels[:, -1].min() == 255


def test_the_analysis_repeats_bit_for_bit(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no trained classifier is stored
    analysis.analyse(study / "sweep", tmp_path, SEEDS, 2)
    for name in ("results.csv", "results.md"):
        assert (tmp_path / name).read_bytes() == (study / "results" / name).read_bytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("1", "AE with seed 1 is missing in"),
        ("2/result.json", "VAE with seed 0 is unfinished after"),
        ("7/prior", "VQ-VAE with seed 1 has no finished prior: train it with vqvae-train"),
        ("4/checkpoints/best.ckpt", "checkpoint "),
    ],
)
def test_a_missing_or_unfinished_job_is_one_line(broken, message, study, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    shutil.copytree(study / "sweep", folder)
    path = folder / broken
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, analysis.main, folder, "--output", tmp_path / "out", "--seeds", *SEEDS)
    assert str(stopped.value).startswith(f"error: {message}")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def subjects(study):
    return {s.model: s for s in analysis.load_subjects(study / "sweep", SEEDS[:1])}


@pytest.fixture
def decoded(subjects):
    """Inputs of the decoders in the order of their calls."""
    inputs = []
    hooks = [
        subject.vqvae.net.decoder.register_forward_pre_hook(
            lambda _, given: inputs.append(given[0])
        )
        for subject in subjects.values()
    ]
    yield inputs
    for hook in hooks:
        hook.remove()


@pytest.fixture
def judge(subjects):
    """A judge whose features are a few pixels, and whose reference is the training images."""
    images = analysis.load_checkpoint_images(subjects["AE"].vqvae, ())
    real = images.datasets["train"].preview(96).data

    def features(levels):
        return levels[:, :, ::6, ::4].flatten(1).float()

    return analysis.Judge(features, images, features(real), real)


def test_images_compared_with_themselves_have_no_distance(judge):
    found = judge.measure(judge.others, "own")
    assert found["own_fid"] == pytest.approx(0, abs=1e-2)
    assert (found["own_precision"], found["own_recall"], found["own_nearest"]) == (1, 1, 0)
    inverted = judge.measure(255 - judge.others, "other")
    shift = judge.features(255 - judge.others).mean(0) - judge.real.mean(0)
    assert inverted["other_fid"] == pytest.approx(float(shift.square().sum()), rel=1e-3)
    assert inverted["other_nearest"] > 0.3


def make_latents(count, labels, noise=0.01):
    """Latents (count, 2, 2, 2) whose first value tells the class."""
    vectors = noise * torch.randn(count, 2, 2, 2)
    vectors[:, 0, 0, 0] += labels
    return analysis.Latents(vectors, None, labels)


def test_the_probe_finds_separable_classes_and_nothing_in_noise():
    splits = [make_latents(count, torch.arange(count) % 2) for count in (80, 20, 40)]
    assert analysis.probe(*splits) == 1
    blank = [part._replace(vectors=torch.randn(part.vectors.shape)) for part in splits]
    assert 0.2 < analysis.probe(*blank) < 0.8


@pytest.mark.parametrize("seed", range(8))
def test_the_probe_is_ridge_regression_with_the_penalty_of_the_validation_images(seed):
    torch.manual_seed(seed)
    train, val, test = (
        make_latents(count, torch.randint(0, 3, (count,)), noise=0.7) for count in (20, 30, 50)
    )
    rows = [part.vectors.flatten(1).double().numpy() for part in (train, val, test)]
    mean, scale = rows[0].mean(0), rows[0].std(0, ddof=1)
    train_x, val_x, test_x = ((part - mean) / scale for part in rows)
    targets = np.eye(3)[train.labels]
    scores = []
    for penalty in analysis.PENALTIES:
        # The penalty as further rows of a plain least-squares problem.
        extra = np.sqrt(penalty * len(train_x)) * np.eye(8)
        weights = np.linalg.lstsq(
            np.vstack([train_x, extra]),
            np.vstack([targets - targets.mean(0), np.zeros((8, 3))]),
            rcond=None,
        )[0]
        right = [
            float(((x @ weights + targets.mean(0)).argmax(1) == part.labels.numpy()).mean())
            for x, part in ((val_x, val), (test_x, test))
        ]
        scores.append(right)
    expected = max(scores, key=lambda pair: pair[0])[1]
    assert analysis.probe(train, val, test) == pytest.approx(expected)


def test_principal_components_are_counted():
    vectors = torch.zeros(500, 8, 2, 2)
    vectors[:, :3] = torch.randn(500, 3, 1, 1)  # whole images would need 3 of 32 components
    vectors[:, 3] = 0.01 * torch.randn(500, 2, 2)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    mixed = torch.einsum("ij,njhw->nihw", rotation, vectors)
    assert analysis.measure_principal_share(mixed) == 3 / 8


def test_fitted_draws_have_the_mean_and_the_covariance_of_the_latents():
    latents = torch.randn(30, 2, 1, 2) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]]) + 3
    drawn = analysis.draw_from_fitted(latents, 40_000, torch.Generator().manual_seed(0))
    expected, found = (part.flatten(1).numpy() for part in (latents, drawn))
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(found.T), np.cov(expected.T), atol=0.15)


def test_histogram_draws_use_the_codes_of_the_training_images_only(subjects):
    codes = torch.full((5, 3, 2), 7)
    train = analysis.Latents(torch.zeros(5, 64, 3, 2), codes, torch.zeros(5))
    net = subjects["VQ-VAE"].vqvae.net
    with torch.inference_mode():
        drawn = analysis.draw_samples(subjects["VQ-VAE"], train, 4)
        expected = analysis.to_uint8(net.decode(codes[:4]))
    assert torch.equal(drawn["histogram"], expected)
    assert not torch.equal(drawn["uniform"], expected)


def test_draws_of_the_vae_are_decoded_standard_normal_latents(subjects, decoded):
    train = analysis.Latents(100 + torch.randn(50, 64, 3, 2), None, torch.zeros(50))
    with torch.inference_mode():
        analysis.draw_samples(subjects["VAE"], train, 200)
    fitted, normal = decoded
    assert fitted.mean().item() == pytest.approx(100, abs=0.5)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("model", ["AE", "VAE", "VQ-VAE"])
def test_an_interpolation_begins_and_ends_at_latents_of_two_classes(
    model, subjects, judge, decoded
):
    images, labels = judge.images.datasets["test"].preview(2)
    assert labels[0] != labels[1]
    with torch.inference_mode():
        subjects[model].vqvae.net(analysis.from_uint8(images))
        analysis.collect_pictures(subjects[model], judge, {})
    ends, between = decoded[0], decoded[-1]
    assert len(between) == analysis.SHOWN
    torch.testing.assert_close(between[[0, -1]], ends)
    if model == "VQ-VAE":
        rows = subjects[model].vqvae.net.quantizer.codebook
        vectors = between.movedim(1, -1).flatten(0, 2)
        assert (vectors[:, None] - rows).abs().amax(2).amin(1).max() == 0
    else:
        torch.testing.assert_close(between[3], (2 * ends[0] + ends[1]) / 3)


def test_real_images_are_judged_against_other_real_images(study, subjects, monkeypatch):
    monkeypatch.chdir(study)
    images = analysis.load_checkpoint_images(subjects["AE"].vqvae, ())
    judge = analysis.prepare_judge(images, 2, study / "results")
    test = images.datasets["test"].preview(30).data
    assert torch.equal(judge.others, test[[n for n in range(30) if n % 2]])
    expected = judge.features(test[[n for n in range(30) if not n % 2]])
    torch.testing.assert_close(judge.real, expected)
