"""Tables and figures of the studies come from the raw results that are stored next to them."""

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_VQVAE, compose
from omegaconf import OmegaConf
from PIL import Image

from vqvae_lightning.configs import CONF_DIR

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import pages  # noqa: E402
import studies  # noqa: E402
from pages import figures, reference_settings, results, settings, tables  # noqa: E402

DONE = studies.list_stored()
LATENTS = [sweep for sweep, study in results.STUDIES.items() if study == "posterior_collapse"]


@pytest.mark.parametrize("study", [*DONE, "."])
def test_the_tables_of_a_page_are_those_of_its_raw_results(study):
    assert (EXPERIMENTS / study / "README.md").read_text() == studies.fill_tables(study)


@pytest.mark.parametrize("study", DONE)
def test_the_figures_show_the_stored_results(study):
    for name in pages.FIGURES[study]:
        with Image.open(EXPERIMENTS / study / f"{name}.png") as figure:
            assert figure.info["Source"] == figures.hash_data(study), name


@pytest.mark.parametrize("sweep", sorted(set(results.STUDIES)))
def test_every_setting_of_a_study_has_three_seeds(sweep):
    path = EXPERIMENTS / results.STUDIES[sweep] / f"{sweep}.csv"
    if results.STUDIES[sweep] not in DONE:
        assert not path.exists()
        return
    groups = results.group_sweep(sweep)
    assert all(sorted(row["seed"] for row in group.rows) == ["0", "1", "2"] for group in groups)
    preset = OmegaConf.load(CONF_DIR / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    values = [str(given).split(",") for key, given in preset.items() if key != "seed"]
    assert sorted(group.key for group in groups) == sorted(itertools.product(*values))


@pytest.mark.parametrize("sweep", sorted(results.BASELINES))
def test_other_rows_are_compared_with_the_default_recipe(sweep, tmp_path):
    keys = results.list_swept_keys(sweep)
    group = results.group_sweep(sweep)[results.BASELINES[sweep]]
    cfg = compose("vqvae", folder=tmp_path)
    assert group.key == tuple(str(OmegaConf.select(cfg, key)) for key in keys)


@pytest.mark.parametrize("sweep", sorted(pages.quantizers.DIMENSIONS))
def test_a_position_with_one_code_costs_what_the_code_costs(sweep):
    cost = pages.quantizers.nats_per_position(sweep)
    several = ("residual_3x8", "residual_4x8")
    rows = [row for row in results.read_rows(sweep) if row["quantizer"] not in several]
    assert rows
    for row in rows:
        assert cost(row) == pytest.approx(float(row["test/nats_per_code"]), rel=1e-5)


def make_group(name, values):
    rows = [{"folder": str(n), "test/nmse": str(value)} for n, value in enumerate(values)]
    return results.Group((name,), rows)


def test_a_table_has_the_mean_and_deviation_of_numpy():
    first, second = [0.04, 0.05, 0.045], [0.1, 0.2, 0.6]
    table = tables.format_table(
        ["name"], [make_group("a", first), make_group("b", second)], [tables.NMSE]
    )
    for name, values in (("a", first), ("b", second)):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in line


@pytest.mark.parametrize(
    ("second", "equal"),
    [
        ([1.0, 2.0, 3.0], True),  # the same
        ([2.9, 3.9, 4.9], True),  # 1.9 apart, and twice the deviation of 1 is 2
        ([3.1, 4.1, 5.1], False),  # 2.1 apart
        ([4.9, 5.0, 5.1], False),  # the larger deviation is that of the first row
    ],
)
def test_a_gap_within_twice_the_spread_is_marked_as_equal(second, equal):
    groups = [make_group("a", [1.0, 2.0, 3.0]), make_group("b", second)]
    lines = tables.format_table(["name"], groups, [tables.NMSE]).splitlines()
    assert lines[-1].endswith("= |") == equal
    assert "=" not in lines[-2]
    turned = tables.format_table(["name"], groups, [tables.NMSE], baseline=1).splitlines()
    assert turned[-2].endswith("= |") == equal
    assert "=" not in turned[-1]


def test_a_finished_sweep_becomes_a_table_and_curves(toy, command, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path / "studies")
    page = tmp_path / "studies/training_dynamics/README.md"
    page.parent.mkdir(parents=True)
    marks = [f"<!-- table {name} -->\nold\n<!-- end -->" for name in ("commitment",)]
    page.write_text("\n".join(["before", *marks, "after"]))
    weights = "model.net.quantizer.commitment=0.5,5"
    steps = ("trainer.max_steps=4", "trainer.log_every_n_steps=2")
    options = [*toy, *TINY_VQVAE, *steps, "study=commitment", "hydra.sweep.dir=sweep"]
    outcome = command("vqvae-train", "-m", *options, weights, "seed=0,1")
    assert outcome.status == 0, outcome.err
    folder = outcome.folder.parent / "sweep"
    with pytest.raises(SystemExit, match="needs a place for its table: <!-- table dynamics -->"):
        studies.collect(folder)
    assert not list(page.parent.glob("*.csv"))
    dynamics = pages.TABLES["training_dynamics"]
    monkeypatch.setitem(pages.TABLES, "training_dynamics", {"commitment": dynamics["commitment"]})
    assert studies.collect(folder) == "training_dynamics"
    text = studies.fill_tables("training_dynamics")
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    errors = {"0.5": [], "5": []}
    for path in sorted(folder.glob("*/metrics.csv")):
        with path.open(newline="") as file:
            logged = [row for row in csv.DictReader(file) if row["test/nmse"]]
        config = (path.parent / "config.yaml").read_text()
        errors["0.5" if "commitment: 0.5" in config else "5"].append(float(logged[-1]["test/nmse"]))
    for weight, values in errors.items():
        assert f"| `{weight}` | {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in text
    curves = results.read_curves_of("commitment")
    assert [len(rows) for rows in curves.values()] == [2] * 4


def test_a_stored_curve_has_the_means_of_whole_windows(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    lines = ["step,epoch,train/commitment,train/nmse,train/perplexity"]
    lines += [f"{step},0,{'' if step < 2 else 2 * step},{step},{step % 2}" for step in range(9)]
    (tmp_path / "0/metrics.csv").write_text("\n".join(lines) + "\n")
    points = list(studies.list_points(tmp_path / "0", tmp_path, 4))
    # Columns: folder, updates done, commitment, latent power, NMSE, perplexity. Steps count from 0.
    assert points == [
        ["0", "4", "5", "", "1.5", "0.5", *[""] * 4],
        ["0", "8", "11", "", "5.5", "0.5", *[""] * 4],
    ]


def test_sonnets_printed_numbers_stand_next_to_ours(invented):
    text = studies.fill_tables("reference_settings")
    assert "| sonnet's notebook, one run | 0.056 | 326 |" in text
    for sweep, title in reference_settings.REFERENCES.items():
        path = invented / f"reference_settings/{sweep}_curves.csv"
        with path.open(newline="") as file:
            ends = [
                float(row["train/nmse"]) for row in csv.DictReader(file) if row["step"] == "100"
            ]
        expected = f"| {title} | {np.mean(ends):.4f} ± {np.std(ends, ddof=1):.4f} |"
        assert expected in text


HOUR = {
    "metrics": {
        "test/nmse": {"value": 0.0625},
        "test/mse": {"value": 0.015625},
        "test/psnr_db": {"value": 18.0625},
        "test/codebook_use": {"value": 0.75},
        "test/perplexity": {"value": 300.5},
    },
    "seconds": 3540.0,
    "commit": "abcdefghij",
    "checkpoint": "/home/me/run/checkpoints/best.ckpt",
}
"""An invented result of a training, which has no metrics of samples."""


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """Raw results of every sweep, drawn at random, and a page for each study."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    numbers = np.random.default_rng(0)
    for sweep, study in results.STUDIES.items():
        path = tmp_path / study / f"{sweep}.csv"
        path.parent.mkdir(exist_ok=True)
        keys = [*results.list_swept_keys(sweep), "seed"]
        params = OmegaConf.load(CONF_DIR / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
        jobs = list(itertools.product(*(str(params[key]).split(",") for key in keys)))
        names = [*settings.METRICS, "uniform_bits_per_dim", "reconstruction_fid"]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            facts = ["folder", "state", "seconds", "commit"]
            writer.writerow([*facts, *keys, *(f"test/{name}" for name in names)])
            for number, values in enumerate(jobs):
                drawn = numbers.uniform(0.1, 1, len(names))
                writer.writerow([number, "finished", 9.5, "abcdefghij", *values, *drawn])
        with path.with_name(f"{sweep}_curves.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["folder", "step", *results.CURVES])
            for number, step in itertools.product(range(len(jobs)), (50, 100)):
                writer.writerow([number, step, *numbers.uniform(1, 2, len(results.CURVES))])
    for sweep in LATENTS:
        measured = tmp_path / f"posterior_collapse/{sweep}_latents.csv"
        with measured.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["folder", "rate", "own", "other"])
            for row in results.read_rows(sweep):
                writer.writerow([row["folder"], *numbers.uniform(0.1, 1, 3)])
    hour = tmp_path / results.RUNS["hour"]
    hour.mkdir()
    (hour / "cifar10.json").write_text(json.dumps(HOUR))
    (hour / "cifar10.csv").write_text("step,val/nmse\n500,0.25\n1000,0.125\n")
    for study, tabulated in pages.TABLES.items():
        marks = [f"<!-- table {name} -->\n<!-- end -->" for name in tabulated]
        (tmp_path / study).mkdir(exist_ok=True)
        (tmp_path / study / "README.md").write_text("\n".join(marks))
    return tmp_path


@pytest.mark.parametrize("sweep", sorted(results.STUDIES))
def test_tables_and_figures_show_all_settings_of_a_sweep(sweep, invented):
    study = results.STUDIES[sweep]
    text = studies.fill_tables(study)
    path, name, digits = invented / study / f"{sweep}.csv", "test/nmse", 4
    if sweep in LATENTS:  # an autoregressive decoder has no reconstruction
        path, name, digits = path.with_stem(f"{sweep}_latents"), "own", 3
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for start in range(0, len(rows), 3):  # the seeds vary fastest
        errors = [float(row[name]) for row in rows[start : start + 3]]
        mean, deviation = np.mean(errors), np.std(errors, ddof=1)
        assert f"{mean:.{digits}f} ± {deviation:.{digits}f}" in text
    for name, draw in pages.FIGURES[study].items():
        draw()
        with Image.open(invented / study / f"{name}.png") as figure:
            assert figure.info["Source"] == figures.hash_data(study)
            assert min(figure.size) > 500


def test_distances_of_reconstructions_stand_before_those_of_samples(invented):
    with (invented / "quantizers/quantizers_cifar10.csv").open(newline="") as file:
        first = list(csv.DictReader(file))[:3]  # seeds of the baseline, whose cells have no mark
    cells = []
    for name in ("reconstruction_fid", "sample_fid"):
        distances = [float(row[f"test/{name}"]) for row in first]
        cells.append(f"{np.mean(distances):.1f} ± {np.std(distances, ddof=1):.1f}")
    assert f"| {cells[0]} | {cells[1]} |" in studies.fill_tables("quantizers")


def test_the_table_of_all_settings_has_a_row_for_each(invented):
    lines = [line for line in studies.fill_tables(".").splitlines() if line.startswith("| [")]
    jobs = [row for sweep in results.STUDIES for row in results.read_rows(sweep)]
    assert len(lines) == len(jobs) / 3 + 1
    assert sum("| 3, abcdefg |" in line for line in lines) == len(jobs) / 3
    (hour,) = (line for line in lines if "`hour CIFAR-10` | 1, abcdefg |" in line)
    cells = [cell.strip() for cell in hour.split("|")[4:-1]]
    assert cells == ["0.0625", "0.75", "300.5", "", "", "", "", "", ""]


def test_a_finished_pipeline_becomes_a_table_without_folders_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "bits_per_dim").mkdir()
    (tmp_path / "bits_per_dim/README.md").write_text("<!-- table bits -->\n<!-- end -->")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "study: bits_per_dim\nfolder: /home/me/run\n"
        "dataset: {source: {path: /home/me/cifar10.npz}}\n"
        "command: vqvae-pipeline dataset=npz dataset.source.path=/home/me/cifar10.npz\n"
    )
    terms = {"reconstruction": 3.5, "uniform": 1.25, "histogram": 1.0, "prior": 0.75, "total": 4.25}
    metrics = {f"test/{name}_bits_per_dim": {"value": value} for name, value in terms.items()}
    others = ("nmse", "codebook_use", "perplexity", "nats_per_code")
    others += ("real_accuracy", "sample_accuracy")
    metrics |= {f"test/{name}": {"value": 0.5} for name in others}
    result = {
        "metrics": metrics,
        "seconds": {"vqvae": 60, "prior": 120, "evaluation": 180},
    }
    (run / "result.json").write_text(json.dumps(result))
    assert studies.collect(run) == "bits_per_dim"
    stored = (tmp_path / "bits_per_dim/cifar10.json").read_text()
    assert "dataset.source.path=cifar10.npz" in stored
    assert "home" not in stored
    text = studies.fill_tables("bits_per_dim")
    assert "| bits/dim, test images | CIFAR-10 |" in text
    assert "| **total with uniform codes** | 4.750 |" in text
    assert "| **total with the prior** | 4.250 |" in text
    assert "| minutes, prior | 2 |" in text


def test_a_finished_training_becomes_two_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "reference_settings").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "study: hour\nfolder: /home/me/run\ndataset: {source: {path: /home/me/cifar10.npz}}\n"
        "command: vqvae-train dataset.source.path=/home/me/cifar10.npz seed=3\n"
    )
    (run / "result.json").write_text(json.dumps(HOUR))
    (run / "metrics.csv").write_text(
        "epoch,step,train/nmse,val/nmse\n0,49,0.5,\n0,4749,,0.25\n0,4799,0.5,\n1,9499,,0.0625\n"
    )
    assert studies.collect(run) == "reference_settings"
    stored = json.loads((tmp_path / "reference_settings/hour/cifar10.json").read_text())
    assert stored["checkpoint"] == "checkpoints/best.ckpt"
    assert stored["command"] == "vqvae-train dataset.source.path=cifar10.npz seed=3"
    titles, _, errors = reference_settings.tabulate_validation().splitlines()
    assert titles == "| updates | 4 750 | 9 500 |"
    assert errors == "| validation NMSE | 0.2500 | 0.0625 |"
    _, _, *lines = reference_settings.tabulate_hour().splitlines()
    assert lines == [
        "| NMSE | 0.0625 |",
        "| squared error, pixels in [0, 1] | 0.01562 |",
        "| PSNR of the mean error | 18.06 dB |",
        "| codes in use | 75% |",
        "| perplexity | 300 |",
        "| minutes | 59 |",
    ]


def test_the_protocol_of_sqvae_sums_the_error_of_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "reference_settings").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    source = "{dataset: {_target_: torchvision.datasets.MNIST}}"
    (run / "config.yaml").write_text(
        f"study: sqvae\nfolder: /run\ncommand: vqvae-pipeline\ndataset: {{source: {source}}}\n"
    )
    names = ("nmse", "codebook_use", "perplexity", "nats_per_code", "real_accuracy")
    names += ("sample_accuracy", "sample_fid")
    metrics = {f"test/{name}": {"value": 0.5} for name in names}
    metrics |= {"test/mse_unrounded": {"value": 0.01}, "test/perplexity_batch32": {"value": 77.25}}
    seconds = {"vqvae": 60, "prior": 120, "evaluation": 180}
    result = {"metrics": metrics, "seconds": seconds}
    (run / "result.json").write_text(json.dumps(result))
    assert studies.collect(run) == "reference_settings"
    assert (tmp_path / "reference_settings/sqvae/MNIST.json").is_file()
    (line,) = reference_settings.tabulate_sqvae().splitlines()[2:]
    assert line.startswith("| MNIST | 7.84 | 0.5000 | 50.0% | 0.5 | 77.2 |")
    assert line.endswith(" 6 |")


def test_a_folder_of_another_study_is_refused(tmp_path, monkeypatch):
    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/0/config.yaml").write_text("study: mine\n")
    with pytest.raises(SystemExit, match="not a sweep of"):
        studies.collect(tmp_path / "sweep")
