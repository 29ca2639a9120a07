"""Bad input ends a command with one clear line, before any training."""

import numpy as np
import pytest
import torch
from conftest import TINY_VQVAE

from vqvae_lightning.checkpoints import load
from vqvae_lightning.errors import InputError
from vqvae_lightning.tasks import VQVAETask


@pytest.fixture
def _no_training(monkeypatch):
    monkeypatch.setattr(VQVAETask, "training_step", lambda *_: pytest.fail("it trained"))


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.net.hiden=3"], ["unknown key model.net.hiden", "hidden", "downsamplings"]),
        (["colour=red"], ["unknown key colour", "dataset", "trainer"]),
        (["quantizer=emma"], ["quantizer/emma", "ema", "loss"]),
        (["dataset=npz"], ["dataset.source.path", "must be given"]),
        (["dataset=npz", "dataset.source.path=/nowhere.npz"], ["/nowhere.npz"]),
        (["dataset=image_folder", "dataset.source.root=/nowhere"], ["/nowhere", "root"]),
        (["model.net.downsamplings=3"], ["28x28", "dataset.source.size=[32,32]", "at most 2"]),
        (["model.net.quantizer.num_codes=1"], ["model.net.quantizer", "num_codes=1"]),
        (["model.net.quantizer.commitment=-1"], ["model.net.quantizer", "commitment=-1"]),
        (["quantizer=loss", "model.net.quantizer.codebook=-1"], ["codebook=-1"]),
        (["dataset.batch_size=0"], ["dataset.batch_size=0", "at least 1"]),
        (["dataset.batch_size=99999"], ["dataset.batch_size=99999", "9500"]),
        (["dataset.batch_size=many"], ["dataset.batch_size=many"]),
        (["trainer.max_steps=-1"], ["trainer.max_steps"]),
        (["callbacks.last.signals=[SIGNOTHING]"], ["SIGNOTHING", "callbacks.last"]),
        (["resume=/nowhere"], ["resume=/nowhere", "config.yaml"]),
        (["trainer.accelerator=warp"], ["warp"]),
        (["+model.net._target_2=1"], ["_target_2"]),
        (["model.optimizer._target_=os.system"], ["model.optimizer", "os.system", "blocklisted"]),
    ],
)
def test_vqvae_train_says_what_is_wrong(overrides, words, command):
    outcome = command("vqvae-train", *overrides)
    lines = outcome.err.strip().splitlines()
    assert outcome.status == 1
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prior.model.net.kernel=4"], ["prior.model.net", "kernel=4", "odd"]),
        (["prior.model.net.dropout=2"], ["prior.model.net", "dropout=2"]),
        (["prior.batch_size=0"], ["prior.batch_size=0"]),
        (["prior.batch_size=99999"], ["prior.batch_size=99999", "9500"]),
        (["evaluation.split=holdout"], ["evaluation.split=holdout", "train, val, test"]),
        (["evaluation.num_samples=0"], ["evaluation.num_samples=0"]),
        (["sampling.temperature=-1"], ["sampling.temperature=-1"]),
        (["sampling.devices=0"], ["sampling.devices=0"]),
    ],
)
def test_the_pipeline_checks_later_stages_before_the_first_trains(overrides, words, command):
    outcome = command("vqvae-pipeline", *overrides)
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_the_traceback_is_there_for_those_who_ask(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError):
        command("vqvae-train", "dataset.batch_size=0")


@pytest.mark.usefixtures("_no_training")
def test_an_output_folder_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = command("vqvae-train", *TINY_VQVAE, folder=tmp_path / "file" / "run")
    assert outcome.status == 1
    assert str(tmp_path / "file") in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("name", ["vqvae-sample", "vqvae-evaluate"])
def test_a_prior_with_another_vqvae_is_refused(name, checkpoints, command):
    outcome = command(
        name,
        f"prior_checkpoint={checkpoints}/prior/checkpoints/best.ckpt",
        f"vqvae_checkpoint={checkpoints}/vqvae1/checkpoints/best.ckpt",
    )
    assert outcome.status == 1
    assert "was trained on the codes of VQ-VAE" in outcome.err
    assert "vqvae1" in outcome.err


def test_missing_truncated_and_foreign_checkpoints_are_named(checkpoints, command, tmp_path):
    good = checkpoints / "prior/checkpoints/best.ckpt"
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(good.read_bytes()[:5000])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": 1}, foreign)
    other = checkpoints / "vqvae0/checkpoints/best.ckpt"
    for path, words in (
        (tmp_path / "none.ckpt", "does not exist"),
        (truncated, "damaged"),
        (foreign, "not written by vqvae_lightning"),
        (other, "holds a vqvae, not a prior"),
    ):
        outcome = command("vqvae-sample", f"prior_checkpoint={path}")
        assert outcome.status == 1
        assert str(path) in outcome.err
        assert words in outcome.err
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "pytorch_lightning.Trainer"])
def test_a_checkpoint_may_only_name_our_own_classes(target, checkpoints, tmp_path):
    # Instantiating a foreign _target_ would undo weights_only=True.
    raw = torch.load(checkpoints / "vqvae0/checkpoints/best.ckpt", weights_only=True)
    raw["hyper_parameters"]["model"]["net"]["quantizer"]["_target_"] = target
    torch.save(raw, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match=target):
        load(tmp_path / "evil.ckpt")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_samples=0"], "num_samples=0"),
        (["temperature=-1"], "temperature=-1"),
        (["labels=[0,7]"], "labels=[7] must be among 0 to 2"),
        (["accelerator=warp"], "cpu, gpu, cuda"),
        (["top_p=0"], "top_p=0"),
        (["guidance=2"], "null_label_rate"),
        (["complete=nowhere"], "complete=nowhere"),
        (["complete=test", "keep_rows=1"], "keep_rows=1"),
        (["complete=test", "labels=[1]"], "drop labels"),
        (["devices=0"], "devices=0"),
    ],
)
def test_vqvae_sample_says_what_is_wrong(overrides, words, checkpoints, command):
    path = checkpoints / "prior/checkpoints/best.ckpt"
    outcome = command("vqvae-sample", f"prior_checkpoint={path}", *overrides)
    assert outcome.status == 1
    assert words in outcome.err
    assert not (outcome.folder / "config.yaml").exists(), "the folder can be used again"


@pytest.mark.parametrize("stage", ["sampling", "evaluation"])
def test_guidance_that_cannot_be_is_found_before_anything_trains(stage, toy, command):
    never = "prior.model.net.null_label_rate=0"
    outcome = command("vqvae-pipeline", *toy, "experiment=smoke", never, f"{stage}.guidance=2")
    assert outcome.status == 1
    assert f"{stage}.guidance=2 needs a prior" in outcome.err
    assert not (outcome.folder / "vqvae" / "checkpoints").exists()


def test_resume_with_other_overrides_is_refused(checkpoints, command):
    outcome = command("vqvae-train", f"resume={checkpoints}/vqvae0", "seed=3")
    assert outcome.status == 1
    assert "drop seed=3" in outcome.err


def test_finished_checkpoints_sample_evaluate_and_reconstruct(checkpoints, command, tmp_path):
    prior = f"prior_checkpoint={checkpoints}/prior/checkpoints/best.ckpt"
    drawn = command("vqvae-sample", prior, "num_samples=7", "labels=[2,0]", folder=tmp_path / "s")
    assert drawn.status == 0, drawn.err
    with np.load(tmp_path / "s/samples.npz") as arrays:
        assert arrays["images"].shape == (7, 12, 8, 3)
        assert arrays["labels"].tolist() == [2, 0, 2, 0, 2, 0, 2]
    again = command(
        "vqvae-sample",
        prior,
        "num_samples=7",
        "labels=[2,0]",
        "batch_size=3",
        folder=tmp_path / "t",
    )
    assert again.status == 0
    with np.load(tmp_path / "s/samples.npz") as one, np.load(tmp_path / "t/samples.npz") as other:
        assert np.array_equal(one["codes"], other["codes"])

    small = ("num_samples=9", "classifier_steps=2")
    judged = command("vqvae-evaluate", prior, *small, folder=tmp_path / "e")
    assert judged.status == 0, judged.err
    assert "sample_accuracy" in judged.out
    vqvae = f"vqvae_checkpoint={checkpoints}/vqvae0/checkpoints/best.ckpt"
    assert command("vqvae-evaluate", vqvae, folder=tmp_path / "v").status == 0

    rebuilt = command("vqvae-reconstruct", vqvae, "count=5", folder=tmp_path / "r")
    assert rebuilt.status == 0, rebuilt.err
    from PIL import Image

    (tmp_path / "mine").mkdir()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "mine/a.png")
    own = (f"input={tmp_path}/mine", "size=[16,24]")
    mine = command("vqvae-reconstruct", vqvae, *own, folder=tmp_path / "m")
    assert mine.status == 0, mine.err
    with np.load(tmp_path / "m/reconstructions.npz") as arrays:
        assert arrays["reconstructions"].shape == (1, 16, 24, 3)
    odd = command("vqvae-reconstruct", vqvae, f"input={tmp_path}/mine", folder=tmp_path / "o")
    assert odd.status == 1
    assert "30x40" in odd.err


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.optimizer.lr=-1"], ["model.optimizer", "-1"]),
        (["monitor=val/typo"], ["monitor=val/typo", "val/nmse"]),
        (["seed=-1"], ["seed=-1"]),
        (["model.net.residual_blocks=-1"], ["residual_blocks=-1"]),
        (["model.net.quantizer.epsilon=-1"], ["epsilon=-1"]),
        (["callbacks.last.every_n_steps=0"], ["every_n_steps=0"]),
    ],
)
def test_values_that_only_training_would_stumble_over_are_found_before(overrides, words, command):
    outcome = command("vqvae-train", *overrides)
    assert outcome.status == 1
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    "override",
    ["sampling.labels=[99]", "sampling.labels=3", "sampling.top_k=0", "evaluation.num_samples=1"],
)
def test_the_pipeline_checks_what_it_will_draw(override, command):
    outcome = command("vqvae-pipeline", override)
    assert outcome.status == 1
    assert override.partition("=")[0] in outcome.err
    assert "Traceback" not in outcome.err


def test_a_folder_holds_one_run(checkpoints, command):
    # The old result was printed as if it were the new one's.
    outcome = command("vqvae-train", "seed=5", folder=checkpoints / "vqvae0")
    assert outcome.status == 1
    assert f"resume={checkpoints}/vqvae0" in outcome.err


def test_resume_with_the_wrong_command_is_refused(toy, command, tmp_path):
    assert command("vqvae-train", *toy, *TINY_VQVAE).status == 0
    outcome = command("vqvae-pipeline", f"resume={tmp_path}/run")
    assert outcome.status == 1
    assert "another command: vqvae-train" in outcome.err


@pytest.mark.parametrize(
    "target",
    [
        "vqvae_lightning.commands.app.os.getcwd",
        "vqvae_lightning.files.write_text",
        "vqvae_lightning.configs.Path",
        "${oc.create:'{_target_: pathlib.PurePath}'}",
    ],
)
def test_a_checkpoint_cannot_reach_beyond_networks(target, checkpoints, tmp_path):
    raw = torch.load(checkpoints / "vqvae0/checkpoints/best.ckpt", weights_only=True)
    net = raw["hyper_parameters"]["model"]["net"]
    net["quantizer"] = target if target.startswith("${") else {"_target_": target}
    torch.save(raw, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="refused"):
        load(tmp_path / "evil.ckpt")


def test_a_prior_is_not_resumed_on_another_vqvae(toy, checkpoints, tmp_path, command):
    path = tmp_path / "vqvae.ckpt"
    path.write_bytes((checkpoints / "vqvae0/checkpoints/best.ckpt").read_bytes())
    prior = ("--config-name", "prior", "trainer=debug", "model.net.channels=8", "batch_size=8")
    begun = command("vqvae-train", *prior, *toy, f"vqvae_checkpoint={path}")
    assert begun.status == 0, begun.err
    (tmp_path / "run/result.json").unlink()
    path.write_bytes((checkpoints / "vqvae1/checkpoints/best.ckpt").read_bytes())
    outcome = command("vqvae-train", f"resume={tmp_path}/run")
    assert outcome.status == 1
    assert "its codes mean something else" in outcome.err


def test_data_that_do_not_fit_the_checkpoint_are_refused(checkpoints, command):
    outcome = command(
        "vqvae-evaluate",
        f"vqvae_checkpoint={checkpoints}/vqvae0/checkpoints/best.ckpt",
        "dataset=fashion_mnist_mini",
    )
    assert outcome.status == 1
    assert "1 channels, the VQ-VAE 3" in outcome.err
