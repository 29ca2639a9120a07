"""Callbacks that watch the codebook."""

import csv
import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VQVAE, compose

from vqvae_lightning.callbacks import counting, progress
from vqvae_lightning.callbacks.codebook import CodebookDrift, CollapseWarning
from vqvae_lightning.data.images import Batch
from vqvae_lightning.quantizers import EMAQuantizer, GaussianBottleneck, SonnetEMAQuantizer
from vqvae_lightning.stages.training import train


def watch(callback, quantizer, values, name="val/codebook_use", images=100, batches=50):
    trainer = SimpleNamespace(
        sanity_checking=False,
        is_global_zero=True,
        callback_metrics={},
        datamodule=SimpleNamespace(image_shape=(1, 8, 8)),
        val_dataloaders=SimpleNamespace(rows=lambda: torch.arange(images).split(2)),
        num_val_batches=[batches],
    )
    net = SimpleNamespace(quantizer=quantizer, compute_grid=lambda height, width: (2, 2))
    module = SimpleNamespace(net=net)
    for value in values:
        trainer.callback_metrics[name] = torch.tensor(value)
        callback.on_validation_end(trainer, module)


def test_collapse_is_reported_once_after_patience_with_suggestions(capsys):
    quantizer = EMAQuantizer(50, 3, init="uniform", warmup_steps=0, revive_below=0)
    watch(CollapseWarning(0.3, 2), quantizer, [0.1, 0.5, 0.1])
    assert capsys.readouterr().out == ""
    watch(CollapseWarning(0.3, 2), quantizer, [0.1, 0.1, 0.1])
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("warning") == 1
    assert "10.0% of the 50 codes" in said
    for key in ("revive_below=0.03", "init=kmeans", "warmup_steps=200", "collapse.threshold=0.3"):
        assert key in said


def test_collapse_is_not_reported_before_the_codebook_is_set(capsys):
    watch(CollapseWarning(0.3, 1), EMAQuantizer(50, 3, warmup_steps=10), [0.0, 0.0])
    assert capsys.readouterr().out == ""


def test_few_validation_images_are_no_collapse(capsys):
    # 3 images of 2x2 codes can use 12 codes of 50 at most.
    quantizer = EMAQuantizer(50, 3, init="uniform", warmup_steps=0)
    watch(CollapseWarning(0.3, 1), quantizer, [11 / 50], images=3)
    assert capsys.readouterr().out == ""
    watch(CollapseWarning(0.3, 1), quantizer, [2 / 50], images=3)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "16.7% of the 12 codes that the validation images could have" in said


def test_images_beyond_limit_val_batches_could_have_no_codes(capsys):
    quantizer = EMAQuantizer(50, 3, init="uniform", warmup_steps=0)
    watch(CollapseWarning(0.3, 1), quantizer, [11 / 50], images=100, batches=2)
    assert capsys.readouterr().out == ""
    watch(CollapseWarning(0.3, 1), quantizer, [4 / 50], images=100, batches=2)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "25.0% of the 16 codes that the validation images could have" in said


def test_the_bar_of_a_test_counts_the_images_of_all_ranks(monkeypatch):
    shown = []

    class Bar(SimpleNamespace):
        def advance(self, images):
            self.done = getattr(self, "done", 0) + images

    def make_bar(description, images):
        shown.append(Bar(images=images))
        return shown[0]

    monkeypatch.setattr(progress, "ImageProgress", make_bar)
    monkeypatch.setattr(counting, "gather", lambda value: [value, value])  # two ranks
    # Of 12 images of this rank in batches of 4, 8 are tested.
    trainer = SimpleNamespace(
        world_size=2,
        num_test_batches=[2],
        test_dataloaders=SimpleNamespace(rows=lambda: torch.arange(12).split(4)),
    )
    callback = progress.StepProgress()
    callback.on_test_start(trainer, None)
    for number in range(2):
        callback.on_test_batch_end(trainer, None, None, Batch(torch.zeros(4), None), number)
    (bar,) = shown
    assert bar.images == bar.done == 16


@pytest.mark.parametrize(("limit", "images"), [("null", 30), ("2", 16), ("0.5", 16), ("99", 30)])
def test_a_result_has_the_number_of_images_that_were_tested(limit, images, toy, tmp_path):
    small = ("dataset.eval_batch_size=8", f"trainer.limit_test_batches={limit}")
    assert train(compose("vqvae", *toy, *TINY_VQVAE, *small, folder=tmp_path))["images"] == images


def test_only_options_that_the_quantizer_has_are_suggested(capsys):
    watch(CollapseWarning(0.3, 1), SonnetEMAQuantizer(50, 3), [0.1])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "quantizer=ema" in said
    for name in ("revive_below", "init", "warmup_steps"):
        assert name not in inspect.signature(SonnetEMAQuantizer).parameters
        assert name not in said


def test_posterior_collapse_is_reported_too(capsys):
    watch(CollapseWarning(0.3, 1), GaussianBottleneck(10), [2.0], "val/active_dims")
    said = capsys.readouterr().out
    assert "20.0% of the 10 latent channels" in said
    assert "beta" in said


def drift(callback, quantizer):
    logged = {}
    trainer = SimpleNamespace(sanity_checking=False, global_step=7)
    module = SimpleNamespace(net=SimpleNamespace(quantizer=quantizer), log=logged.__setitem__)
    callback.on_validation_epoch_end(trainer, module)
    return logged


def test_drift_is_the_mean_distance_over_the_mean_length():
    quantizer = EMAQuantizer(2, 2, init="uniform", warmup_steps=0)
    quantizer.codebook.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    callback = CodebookDrift()
    assert drift(callback, quantizer) == {}
    restored = CodebookDrift()
    restored.load_state_dict(callback.state_dict())
    quantizer.codebook.copy_(torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
    # moved 3 and 1, lengths 4 and 2
    for one in (callback, restored):
        assert drift(one, quantizer)["val/codebook_drift"] == pytest.approx(4 / 6)


def test_training_logs_drift_and_reports_collapse(command, toy, tmp_path):
    # The codebook is far from the data, so that few codes are ever used.
    options = (*toy, *TINY_VQVAE, "trainer.max_steps=6", "model.net.quantizer.init=uniform")
    said = {}
    for threshold in (0.01, 0.9):
        limits = (f"callbacks.collapse.threshold={threshold}", "callbacks.collapse.patience=2")
        outcome = command("vqvae-train", *options, *limits, folder=tmp_path / str(threshold))
        assert outcome.status == 0, outcome.err
        said[threshold] = outcome.out.replace("\n", " ")
    with (outcome.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["val/codebook_drift"] for row in rows)
    use = [float(row["val/codebook_use"]) for row in rows if row["val/codebook_use"]]
    assert 0.01 < min(use[1:]) <= max(use) < 0.9
    assert "codes are in use" not in said[0.01], "there was no reason"
    assert said[0.9].count("codes are in use") == 1
    assert any(f"{share:.1%} of the 16 codes are in use" in said[0.9] for share in use[1:])
    assert "below callbacks.collapse.threshold=0.9 for 2 validations" in said[0.9]


def test_a_sweep_compares_the_traditional_autoencoders(command, toy):
    tiny = [o for o in TINY_VQVAE if "quantizer" not in o]
    outcome = command(
        "vqvae-train",
        "-m",
        "quantizer=none,gaussian,loss,ema",
        *toy,
        *tiny,
        "hydra.sweep.dir=sweep",
    )
    assert outcome.status == 0, outcome.err
    headers = [
        (path / "metrics.csv").read_text().splitlines()[0]
        for path in sorted((outcome.folder.parent / "sweep").iterdir())
        if path.is_dir()
    ]
    assert len(headers) == 4
    assert all("val/nmse" in header for header in headers)
    assert ["val/perplexity" in header for header in headers] == [False, False, True, True]
    assert "val/active_dims" in headers[1]
    assert "val/kl_nats_dim63" in headers[1]
