"""The data of a stage that starts from a finished VQ-VAE."""

import numpy as np
import pytest
import torch

from vqvae_lightning import load

PRIOR = ("--config-name=prior", "trainer=debug", "model.net.channels=8", "model.net.layers=2")


@pytest.fixture
def vqvae(checkpoints):
    return checkpoints / "vqvae0/checkpoints/best.ckpt"


@pytest.fixture
def others(toy_npz, tmp_path):
    """Overrides that choose inverted images of the same size."""
    arrays = dict(np.load(toy_npz))
    inverted = {k: 255 - v if k.endswith("images") else v for k, v in arrays.items()}
    np.savez(tmp_path / "others.npz", **inverted)
    return "dataset=npz", f"dataset.source.path={tmp_path / 'others.npz'}"


def test_a_prior_learns_the_codes_of_the_images_that_its_vqvae_learnt(vqvae, command):
    outcome = command("vqvae-train", *PRIOR, f"vqvae_checkpoint={vqvae}")
    assert outcome.status == 0, outcome.err
    assert "warning" not in outcome.out
    own = load(outcome.folder / "checkpoints/best.ckpt").config
    theirs = load(vqvae).config
    assert own["dataset"] == theirs["dataset"]
    assert own["data_fingerprint"] == theirs["data_fingerprint"]
    again = command("vqvae-train", f"resume={outcome.folder}")
    assert again.status == 0, again.err


@pytest.mark.parametrize("stage", [PRIOR, ("trainer=debug", "likelihood=mixture")])
def test_other_images_give_a_warning(stage, vqvae, others, command):
    outcome = command("vqvae-train", *stage, *others, f"vqvae_checkpoint={vqvae}")
    assert outcome.status == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if "trained on data" in line)
    used = load(outcome.folder / "checkpoints/best.ckpt").config["data_fingerprint"]
    assert line.startswith("warning: ")
    assert used != load(vqvae).config["data_fingerprint"]
    assert used in line
    assert load(vqvae).config["data_fingerprint"] in line


def test_a_checkpoint_without_data_gives_an_error(vqvae, tmp_path, command):
    raw = torch.load(vqvae, weights_only=True)
    del raw["hyper_parameters"]["dataset"]
    torch.save(raw, tmp_path / "bare.ckpt")
    outcome = command("vqvae-train", *PRIOR, f"vqvae_checkpoint={tmp_path / 'bare.ckpt'}")
    assert outcome.status == 1
    assert "bare.ckpt names no data: give dataset=NAME." in outcome.err
