"""Runs are compared in one table, which is recomputed with numpy."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml

from vqvae_lightning.commands.report import main as report_command

METRICS = {
    "mse": [0.004, 0.005, 0.0045, 0.003],
    "perplexity": [2900.0, 3100.0, 3000.0, 2788.0],
    "sample_fid": [1.5, 2.0, 1.0, 9.0],
}


def make_run(folder, number, seed, codes, **facts):
    """An evaluation of a VQ-VAE of `codes` codes, in the folders that the commands would write."""
    vqvae = folder / f"vqvae{number}"
    config = {
        "kind": "vqvae",
        "seed": seed,
        "folder": str(vqvae),
        "dataset": {"seed": seed, "split_seed": 0},
        "model": {"codes": codes, "place": f"{vqvae}/x"},
    }
    (vqvae / "checkpoints").mkdir(parents=True)
    (vqvae / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / f"run{number}"
    path.mkdir()
    checkpoint = str(vqvae / "checkpoints/best.ckpt")
    config = {"kind": "evaluation", "seed": 0, "folder": str(path), "vqvae_checkpoint": checkpoint}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    split = facts.pop("split", "test")
    metrics = {
        f"{split}/{name}": {"value": values[number], "unit": "1"}
        for name, values in METRICS.items()
    }
    result = {
        "metrics": metrics,
        "data_fingerprint": "abc",
        "images": 100,
        "samples": 10,
        "classifier": "one",
        **facts,
    }
    (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    def run(*folders):
        output = tmp_path / "out"
        arguments = ["vqvae-report", *map(str, folders), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        report_command()
        with (output / "comparison.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return rows, (output / "comparison.html").read_text(), capsys.readouterr().out

    return run


def test_differences_means_and_deviations_are_those_of_numpy(tmp_path, compare):
    kinds = [(0, 16), (1, 16), (2, 16), (0, 32)]
    runs = [make_run(tmp_path, n, seed, codes) for n, (seed, codes) in enumerate(kinds)]
    rows, page, out = compare(*runs)
    assert [row["seeds"] for row in rows] == ["0", "1", "2", "0", "0 1 2"]
    assert [row["run"] for row in rows[:4]] == [str(run) for run in runs]
    assert rows[4]["run"] == ", ".join(map(str, runs[:3]))
    for name, values in METRICS.items():
        column = f"test/{name}"
        assert [float(row[column]) for row in rows[:4]] == values
        given = [float(row[f"{column} minus first"]) for row in rows[1:4]]
        np.testing.assert_allclose(given, np.array(values[1:]) - values[0])
        assert rows[0][f"{column} minus first"] == rows[4][f"{column} minus first"] == ""
        assert float(rows[4][column]) == pytest.approx(np.mean(values[:3]))
        spread = float(rows[4][f"{column} standard deviation"])
        assert spread == pytest.approx(np.std(values[:3], ddof=1))
    assert "squared pixel value in [0, 1]" in page
    assert "0.005 (+0.001)" in page
    assert "0.005 (+0.001)" in out
    assert "0.0045 ± 0.0005" in page
    assert "3100 (+200)" in page
    assert "2788 (-112)" in page
    assert "3000 ± 100" in page
    assert "warning" not in out


def test_a_repeated_seed_counts_once(tmp_path, compare):
    runs = [make_run(tmp_path, n, seed, 16) for n, seed in enumerate((0, 1, 1))]
    rows, *_ = compare(*runs)
    assert rows[3]["seeds"] == "0 1"
    assert float(rows[3]["test/mse"]) == pytest.approx(0.0045)


def test_runs_without_other_seeds_are_not_grouped(tmp_path, compare):
    rows, *_ = compare(make_run(tmp_path, 0, 0, 16), make_run(tmp_path, 1, 1, 32))
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ({"data_fingerprint": "xyz"}, ["data fingerprint abc", "xyz"]),
        ({"split": "val"}, ["split test", "val"]),
    ],
)
def test_runs_on_other_images_are_refused(facts, parts, tmp_path, compare):
    runs = make_run(tmp_path, 0, 0, 16), make_run(tmp_path, 1, 0, 16, **facts)
    with pytest.raises(SystemExit) as stop:
        compare(*runs)
    assert all(part in str(stop.value) for part in [*parts, *map(str, runs)])
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_metrics_that_do_not_compare_are_named(tmp_path, compare):
    other = make_run(tmp_path, 1, 0, 16, classifier="two", samples=20)
    _, page, out = compare(make_run(tmp_path, 0, 0, 16), other)
    for text in (page, out):
        assert "*_accuracy, reconstruction_fid, sample_fid come from different" in text
        assert "classifier_seed=0" in text
        assert "numbers of samples: 10, 20" in text


def test_only_weights_that_differ_are_named(tmp_path, compare):
    first = make_run(tmp_path, 0, 0, 16, weights={"inception": "6726825d", "lpips": "7be5be79"})
    other = make_run(tmp_path, 1, 0, 16, weights={"inception": "6726825d", "lpips": "00000000"})
    without = make_run(tmp_path, 2, 0, 16, weights={})
    _, page, out = compare(first, other, without)
    for text in (page, " ".join(out.split())):
        assert "*lpips* come from different weights: 00000000, 7be5be79" in text
        assert "weights.lpips" in text
        assert "weights.inception" not in text
    *_, out = compare(first, without)
    assert "warning" not in out


@pytest.mark.parametrize(
    ("name", "text"), [("config.yaml", "no config.yaml"), ("result.json", "not finished")]
)
def test_a_folder_without_a_result_is_refused(name, text, tmp_path, compare):
    runs = make_run(tmp_path, 0, 0, 16), make_run(tmp_path, 1, 0, 16)
    (runs[1] / name).unlink()
    with pytest.raises(SystemExit, match=text):
        compare(*runs)
