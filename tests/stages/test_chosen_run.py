"""An evaluation of a run's folder is that of the best checkpoints in it."""

import shutil

import pytest

from vqvae_lightning.runs.results import read_result

SMALL = ("num_samples=12", "classifier_steps=2", "split=val")


@pytest.fixture
def pipeline(checkpoints, tmp_path):
    """The folder of a pipeline, made of the folders of its stages."""
    folder = tmp_path / "pipeline"
    for name, place in (("vqvae", "vqvae0"), ("prior", "prior")):
        shutil.copytree(checkpoints / place, folder / name)
    (folder / "config.yaml").write_text("kind: pipeline\n")
    return folder


def test_a_folder_gives_its_best_checkpoints(pipeline, checkpoints, command, tmp_path):
    results = {}
    for name, options in {
        "pair": [f"prior_checkpoint={checkpoints / 'prior/checkpoints/best.ckpt'}"],
        "pipeline": [f"run={pipeline}"],
        "prior": [f"run={checkpoints / 'prior'}"],
        "vqvae": [f"run={checkpoints / 'vqvae0'}"],
    }.items():
        folder = tmp_path / name if name != "pipeline" else tmp_path / "whole"
        assert command("vqvae-evaluate", *options, *SMALL, folder=folder).status == 0
        results[name] = read_result(folder)
    assert results["pair"]["metrics"] == results["prior"]["metrics"]
    # The codes are stored with each VQ-VAE, so those of the copy are encoded, and the data loader
    # of that encoding moves the random stream of the classifier.
    for name, entry in results["pair"]["metrics"].items():
        if "accuracy" not in name and "fid" not in name:
            assert results["pipeline"]["metrics"][name] == entry
    assert results["pipeline"]["prior_checkpoint"] == str(pipeline / "prior/checkpoints/best.ckpt")
    assert results["vqvae"]["vqvae_checkpoint"].endswith("vqvae0/checkpoints/best.ckpt")
    assert "val/mse" in results["vqvae"]["metrics"]
    assert "val/nats_per_code" not in results["vqvae"]["metrics"]


def test_a_pipeline_without_a_prior_says_so(pipeline, command):
    (pipeline / "prior/checkpoints/best.ckpt").unlink()
    found = command("vqvae-evaluate", f"run={pipeline}", *SMALL)
    assert found.status == 0
    assert "has no prior yet: the vqvae alone is evaluated" in found.out
    assert read_result(found.folder)["samples"] == 0


@pytest.mark.parametrize(
    ("damage", "options", "parts"),
    [
        ("config.yaml", [], ["run=", "no config.yaml"]),
        ("vqvae/checkpoints/best.ckpt", [], ["run=", "best.ckpt yet"]),
        (None, ["vqvae_checkpoint=other.ckpt"], ["vqvae_checkpoint=other.ckpt", "one of them"]),
        ("kind", [], ["of kind samples", "pipeline, vqvae, prior"]),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_refused(damage, options, parts, pipeline, command):
    if damage == "kind":
        (pipeline / "config.yaml").write_text("kind: samples\n")
    elif damage:
        (pipeline / damage).unlink()
    found = command("vqvae-evaluate", f"run={pipeline}", *options)
    assert found.status == 1
    assert all(part in found.err for part in parts), found.err
    assert len(found.err.splitlines()) == 1
    assert not (found.folder / "config.yaml").exists()
