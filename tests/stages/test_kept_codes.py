"""A decoder trained alone, with another likelihood, on the codes of a finished VQ-VAE."""

import pytest
import torch
from conftest import TINY_VQVAE, compose

from vqvae_lightning import load
from vqvae_lightning.checkpoints import hash_weights
from vqvae_lightning.stages.training import build_task, complete_config, load_data

TINY = (*TINY_VQVAE, "trainer.max_steps=12", "trainer.val_check_interval=6")


@pytest.fixture(scope="module")
def finished(toy_npz, tmp_path_factory):
    """A pipeline's folder."""
    import sys

    from vqvae_lightning.commands import pipeline

    folder = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [
                "vqvae-pipeline",
                *("dataset=npz", f"dataset.source.path={toy_npz}", *TINY),
                *("prior.trainer.max_steps=4", "prior.trainer.val_check_interval=2"),
                *("prior.model.net.channels=8", "prior.model.net.layers=2", "prior.batch_size=8"),
                *("evaluation.classifier_steps=2", "evaluation.num_samples=6"),
                f"hydra.run.dir={folder}",
            ],
        )
        pipeline.main()
    return folder


def test_only_the_decoder_learns_and_the_prior_stays_valid(finished, toy, command):
    first = finished / "vqvae/checkpoints/best.ckpt"
    options = (*toy, "trainer=debug", "trainer.max_steps=12", "trainer.val_check_interval=6")
    outcome = command("vqvae-train", *options, "likelihood=mixture", f"vqvae_checkpoint={first}")
    assert outcome.status == 0, outcome.err
    second = outcome.folder / "checkpoints/best.ckpt"
    old, new = load(first).net, load(second).net
    assert load(second).config["vqvae_hash"] == hash_weights(old)
    images = torch.rand(4, 3, 12, 8) * 2 - 1
    assert torch.equal(old.encode(images), new.encode(images))
    for name, value in old.state_dict().items():
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(value, new.state_dict()[name]), name
    moved = (
        old.state_dict()["decoder.layers.0.weight"] - new.state_dict()["decoder.layers.0.weight"]
    )
    assert moved.abs().max() > 0
    prior = finished / "prior/checkpoints/best.ckpt"
    evaluated = command(
        "vqvae-evaluate",
        f"prior_checkpoint={prior}",
        f"vqvae_checkpoint={second}",
        "classifier_steps=2",
        "num_samples=6",
        folder=outcome.folder.with_name("evaluated"),
    )
    assert evaluated.status == 0, evaluated.err


def test_the_decoder_starts_from_the_finished_one(finished, toy):
    first = finished / "vqvae/checkpoints/best.ckpt"
    overrides = (*toy, *("likelihood=mixture", f"vqvae_checkpoint={first}"))
    cfg = compose("vqvae", *overrides, folder=finished.with_name("other"))
    complete_config(cfg, load_data(cfg))
    net, old = build_task(cfg).net, load(first).net
    last = f"decoder.layers.{len(net.decoder.layers) - 1}."
    same = {
        name: torch.equal(value, old.state_dict()[name])
        for name, value in net.state_dict().items()
        if name in old.state_dict() and not name.startswith(last) and "extra" not in name
    }
    assert same
    assert all(same.values())
    assert cfg.model.net.hidden == 8


def test_a_setting_of_another_network_is_refused(finished, toy, command):
    first = finished / "vqvae/checkpoints/best.ckpt"
    for override in ("model.net.hidden=16", "quantizer=loss"):
        outcome = command("vqvae-train", *toy, override, f"vqvae_checkpoint={first}")
        assert outcome.status == 1
        assert outcome.err.startswith(f"error: {override} has no effect with vqvae_checkpoint=")
        assert len(outcome.err.strip().splitlines()) == 1


def test_a_missing_checkpoint_is_refused(toy, command):
    outcome = command("vqvae-train", *toy, "likelihood=mixture", "vqvae_checkpoint=nowhere.ckpt")
    assert outcome.status == 1
    assert outcome.err.startswith("error: checkpoint nowhere.ckpt does not exist")
