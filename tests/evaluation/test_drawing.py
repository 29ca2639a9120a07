"""Samples are evaluated as vqvae-sample draws them."""

import numpy as np
import pytest
from conftest import compose

from vqvae_lightning.stages import evaluating
from vqvae_lightning.stages.training import train

OPTIONS = ("temperature=0.3", "top_k=4", "top_p=0.5", "guidance=3")


@pytest.fixture(scope="module")
def guided(checkpoints, toy_npz, tmp_path_factory):
    """A prior that some training samples hid their class from."""
    folder = tmp_path_factory.mktemp("guided")
    given = ("dataset=npz", f"dataset.source.path={toy_npz}", "trainer=debug", "batch_size=8")
    small = ("model.net.channels=8", "model.net.layers=2", "model.net.null_label_rate=0.3")
    vqvae = f"vqvae_checkpoint={checkpoints / 'vqvae0/checkpoints/best.ckpt'}"
    train(compose("prior", *given, *small, vqvae, folder=folder))
    return f"prior_checkpoint={folder / 'checkpoints/best.ckpt'}"


@pytest.mark.parametrize("left_out", [None, *OPTIONS])
def test_the_evaluated_samples_are_those_of_vqvae_sample(
    left_out, guided, command, tmp_path, monkeypatch
):
    drawn = []

    def find(images, samples):
        drawn.append(samples)
        return samples

    monkeypatch.setattr(evaluating, "find_nearest_images", find)
    exact = "trainer.precision=32-true"
    small = ("num_samples=9", "classifier_steps=2", exact)
    found = command("vqvae-evaluate", guided, *small, *OPTIONS, folder=tmp_path / "e")
    assert found.status == 0, found.err
    options = [option for option in OPTIONS if option != left_out]
    sampled = command("vqvae-sample", guided, "num_samples=9", *options, folder=tmp_path / "s")
    assert sampled.status == 0, sampled.err
    with np.load(tmp_path / "s/samples.npz") as arrays:
        images = np.moveaxis(arrays["images"], -1, 1)
    assert np.array_equal(drawn[0].numpy(), images) == (left_out is None)
