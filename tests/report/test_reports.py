"""`report.html` of a run and of a sweep."""

import base64
import csv
import json
import re
import shutil
import sys

import pytest
from conftest import TINY_VQVAE
from matplotlib.figure import Figure

from vqvae_lightning.commands import pipeline
from vqvae_lightning.commands.report import main as report_command
from vqvae_lightning.report import plots
from vqvae_lightning.report.jobs import list_job_folders
from vqvae_lightning.report.run import write_report
from vqvae_lightning.report.sweep import write_sweep_report
from vqvae_lightning.runs.results import read_curves, read_result

SMOKE = ("experiment=smoke", "evaluation.num_samples=12", "sampling.num_samples=6")


@pytest.fixture(scope="module")
def finished(toy_npz, tmp_path_factory):
    """A finished pipeline on the toy data."""
    folder = tmp_path_factory.mktemp("report") / "run"
    data = ("dataset=npz", f"dataset.source.path={toy_npz}")
    drawing = ("evaluation.guidance=2", "sampling.temperature=0.9", "sampling.top_k=5")
    arguments = ["vqvae-pipeline", *SMOKE, *data, *drawing, "seed=3", f"hydra.run.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        pipeline.main()
    return folder


def test_report_stands_alone_and_shows_everything(finished):
    page = (finished / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) >= 3
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert page.count("<svg") == 6
    result = json.loads((finished / "result.json").read_text())
    for name in result["metrics"]:
        assert name in page
    assert result["command"].split("dataset.source")[0].strip() in page


def test_report_says_how_its_samples_were_drawn(finished):
    page = " ".join((finished / "report.html").read_text().split())
    assert "Drawn with temperature 0.9, top-k 5, guidance 1.5." in page
    assert "12 samples, drawn with temperature 1, guidance 2, as the intended class." in page


def test_report_names_the_likelihood_and_what_the_prior_was_given(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    pages = [(folder / "report.html").read_text()]
    for stage, old, new in (
        ("vqvae", "likelihoods.SquaredError", "likelihoods.LogisticMixture"),
        ("prior", "num_classes: 3", "num_classes: 0"),
    ):
        config = folder / stage / "config.yaml"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    result = (folder / "result.json").read_text()
    (folder / "result.json").write_text(result.replace('"test', '"train'))
    pages.append(write_report(folder).read_text())
    trained, changed = (" ".join(page.split()) for page in pages)
    assert "p(image | class): the cost of the pixels under a discretised logistic" in trained
    assert "p(image): the cost of the pixels under the likelihood" in changed
    assert "test images not used for training" in trained
    assert "train images · seed" in changed


def test_the_terms_that_the_loss_has_are_drawn(monkeypatch):
    def paint_only(_, columns, paint):
        axes = list(Figure().subplots(1, columns))
        paint(axes)
        return [line.get_ydata()[0] for line in axes[1].lines]

    monkeypatch.setattr(plots, "draw_svg", paint_only)
    curves = {
        name: ([1.0, 2.0], [value, value])
        for value, name in enumerate(
            ("train/nmse", "train/commitment_weighted", "train/codebook_weighted"), start=1
        )
    }
    curves["train/auxiliary_weighted"] = ([1.0, 2.0], [4, 4])
    assert plots.plot_losses(curves) == [1, 2, 3, 4]
    curves["train/nll_nats_per_dim_weighted"] = ([1.0, 2.0], [5, 5])
    assert plots.plot_losses(curves) == [5, 2, 3, 4]


def test_pipelines_and_unfinished_runs_are_compared(finished, tmp_path, capsys, monkeypatch):
    first = tmp_path / "sweep" / "2"
    shutil.copytree(finished, first)
    config = (first / "config.yaml").read_text().replace(str(finished), str(first))
    (first / "config.yaml").write_text(config)
    for name, seed, score in (("10", 4, 0.5), ("deeper/0", 5, None)):
        copy = tmp_path / "sweep" / name
        shutil.copytree(first, copy)
        config = (copy / "config.yaml").read_text().replace("seed: 3", f"seed: {seed}")
        (copy / "config.yaml").write_text(config.replace("seed=3", f"seed={seed}"))
        result = read_result(copy)
        result |= {"objective": score, "commit": f"abc{seed}"}
        (copy / "result.json").write_text(json.dumps(result))
        if score is None:
            (copy / "result.json").unlink()
    names = [
        str(path.relative_to(tmp_path / "sweep")) for path in list_job_folders(tmp_path / "sweep")
    ]
    assert names == ["2", "10", "deeper/0"]
    monkeypatch.setattr(sys, "argv", ["vqvae-report", str(tmp_path / "sweep")])
    report_command()
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "sweep" / name) for name in ("report.html", "jobs.csv")
    ]
    with (tmp_path / "sweep" / "jobs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["folder"], row["state"], row["seed"]) for row in rows] == [
        ("10", "finished", "4"),
        ("2", "finished", "3"),
        ("deeper/0", "unfinished", "5"),
    ]
    here = read_result(first)["commit"] or ""
    assert [row["commit"] for row in rows] == ["abc4", here, ""]
    best = read_result(first / "vqvae")["objective"]
    assert [row["objective"] for row in rows] == ["0.5", repr(best), ""]
    assert rows[0]["monitor"] == "val/nmse"
    assert float(rows[1]["seconds"]) == pytest.approx(sum(read_result(first)["seconds"].values()))
    page = (tmp_path / "sweep/report.html").read_text()
    assert "val/nats_per_code" in page
    assert 'alt="samples of job 10"' in page
    assert "Metrics are measured on the test images." in page
    for name in ("2", "10"):
        path = tmp_path / "sweep" / name / "result.json"
        path.write_text(path.read_text().replace('"test/', '"val/'))
    write_sweep_report(tmp_path / "sweep")
    page = (tmp_path / "sweep/report.html").read_text()
    assert "Metrics are measured on the val images." in page


def test_an_incomplete_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,val/nmse\n0,4,0.25\n0,9,0.1")
    assert read_curves(path) == {"val/nmse": ([5], [0.25])}


@pytest.mark.parametrize(("place", "message"), [("", "no job in it"), ("run", "of one run")])
def test_a_folder_without_a_sweep_is_refused(place, message, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    folder = tmp_path / place if place else tmp_path / "nothing"
    monkeypatch.setattr(sys, "argv", ["vqvae-report", str(folder)])
    with pytest.raises(SystemExit, match=message):
        report_command()


def test_markup_in_a_config_is_shown_as_text(toy, command, tmp_path):
    study = r"study='<script>$\frac$</script>'"  # markup in HTML and in matplotlib
    folder = tmp_path / "jobs" / "0"
    assert command("vqvae-train", *TINY_VQVAE, *toy, study, folder=folder).status == 0
    shutil.copytree(folder, folder.with_name("1"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("frac", "other"))
    write_sweep_report(folder.parent)
    page = (folder.parent / "report.html").read_text()
    assert page.count(r"study=&lt;script&gt;$\frac$") == 2, "in the curves and below the picture"
    assert "<script" not in page
