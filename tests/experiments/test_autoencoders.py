"""The study of autoencoders runs from its preset to its tables, and its numbers are what it says."""

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
        (model, seed) for model in ("AE", "VAE", "VQ-VAE") for seed in SEEDS
    ]
    sources = {
        "AE": {"fitted"},
        "VAE": {"fitted", "normal"},
        "VQ-VAE": {"uniform", "histogram", "prior"},
    }
    for row in rows:
        filled = {name for name, cell in row.items() if cell}
        assert {n.removesuffix("_fid") for n in filled if n.endswith("_fid")} == {
            *sources[row["model"]],
            *("real", "reconstruction"),
        }
        assert ("perplexity" in filled) == (row["model"] == "VQ-VAE")
        assert ("active_dims" in filled) == (row["model"] == "VAE")
        assert float(row["nmse"]) > 0
        assert 0 < float(row["principal_share"]) <= 1
        assert 0 <= float(row["probe_accuracy"]) <= 1
