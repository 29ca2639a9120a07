"""Samples are evaluated as vqvae-sample draws them."""

import inspect

import numpy as np
import pytest
from conftest import compose
from omegaconf import OmegaConf

from vqvae_lightning.configs import CONF_DIR
from vqvae_lightning.networks.sampling import sample_batches
from vqvae_lightning.runs.results import read_result
from vqvae_lightning.stages import evaluating
from vqvae_lightning.stages.sampling import choose_drawing
from vqvae_lightning.stages.training import train

OPTIONS = {"temperature": 0.3, "top_k": 4, "top_p": 0.5, "guidance": 3}


@pytest.fixture(scope="module")
def guided(checkpoints, toy_npz, tmp_path_factory):
    """A prior that some training samples hid their class from."""
    folder = tmp_path_factory.mktemp("guided")
    given = ("dataset=npz", f"dataset.source.path={toy_npz}", "trainer=debug", "batch_size=8")
    small = ("model.net.channels=8", "model.net.layers=2", "model.net.null_label_rate=0.3")
    vqvae = f"vqvae_checkpoint={checkpoints / 'vqvae0/checkpoints/best.ckpt'}"
    train(compose("prior", *given, *small, vqvae, folder=folder))
    return f"prior_checkpoint={folder / 'checkpoints/best.ckpt'}"


def test_the_evaluated_samples_are_those_of_vqvae_sample(guided, command, tmp_path, monkeypatch):
    drawn = []

    def find(images, samples):
        drawn.append(samples.numpy())
        return samples

    monkeypatch.setattr(evaluating, "find_nearest_images", find)
    small = ("num_samples=9", "classifier_steps=2", "trainer.precision=32-true")
    options = {name: f"{name}={value}" for name, value in OPTIONS.items()}
    folder = tmp_path / "evaluated"
    found = command("vqvae-evaluate", guided, *small, *options.values(), folder=folder)
    assert found.status == 0, found.err
    assert read_result(folder)["drawing"] == OPTIONS
    for left_out in (None, *options):
        given = [text for name, text in options.items() if name != left_out]
        folder = tmp_path / str(left_out)
        found = command("vqvae-sample", guided, "num_samples=9", *given, folder=folder)
        assert found.status == 0, found.err
        assert (read_result(folder)["drawing"] == OPTIONS) == (left_out is None), left_out
        with np.load(folder / "samples.npz") as arrays:
            images = np.moveaxis(arrays["images"], -1, 1)
        assert np.array_equal(drawn[0], images) == (left_out is None), left_out


def test_an_evaluation_of_an_older_run_draws_with_the_defaults():
    chosen = choose_drawing(OmegaConf.create({"temperature": 1.0}), 3, 0.1)
    parameters = inspect.signature(sample_batches).parameters
    assert chosen == {name: parameters[name].default for name in OPTIONS}


@pytest.mark.parametrize(
    ("num_classes", "null_label_rate", "guidance"),
    [(3, 0.1, 1.5), (3, 0.0, 1), (0, 0.1, 1)],
)
@pytest.mark.parametrize("group", ["evaluation", "sampling"])
def test_samples_are_guided_by_default_where_the_prior_allows_it(
    group, num_classes, null_label_rate, guidance
):
    cfg = OmegaConf.load(CONF_DIR / f"{group}/default.yaml")
    assert choose_drawing(cfg, num_classes, null_label_rate)["guidance"] == guidance


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("temperature=-1", "temperature=-1 must be a number at least 0"),
        ("top_k=0", "top_k=0"),
        ("top_p=0", "top_p=0 leaves no code"),
        ("guidance=-1", "guidance=-1"),
    ],
)
def test_a_bad_option_is_refused_even_without_a_prior(override, says, checkpoints, command):
    vqvae = f"vqvae_checkpoint={checkpoints / 'vqvae0/checkpoints/best.ckpt'}"
    outcome = command("vqvae-evaluate", vqvae, override)
    assert outcome.status == 1
    assert says in outcome.err


def test_guidance_is_refused_for_a_prior_that_always_saw_the_class(checkpoints, command):
    prior = f"prior_checkpoint={checkpoints / 'prior/checkpoints/best.ckpt'}"
    outcome = command("vqvae-evaluate", prior, "guidance=2")
    assert outcome.status == 1
    assert "guidance=2 needs a prior" in outcome.err
