"""A value that cannot work is named by its key, in one line, before anything trains."""

from pathlib import Path

import pytest
from conftest import TINY_VQVAE, compose, prepare

from vqvae_lightning.errors import (
    DivergenceError,
    InputError,
    Key,
    Message,
    check_positive,
    prefix_keys,
    rename_keys,
)
from vqvae_lightning.stages.evaluating import build_classifier, check_evaluation
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.pipeline import check_stages, compose_stages
from vqvae_lightning.stages.training import train


def test_keys_of_an_error_grow_on_its_way_up():
    with pytest.raises(InputError) as caught, prefix_keys("model"), prefix_keys("net"):
        check_positive("hidden", 0)
    assert str(caught.value) == "model.net.hidden=0 must be an integer of at least 1."
    with (
        pytest.raises(InputError, match=r"^a\.labels=5: drop a\.labels, not labels\.$"),
        rename_keys(lambda key: f"a.{key}"),
    ):
        raise InputError(Key("labels"), "=5: drop ", Key("labels"), ", not labels.")


@pytest.mark.parametrize("kind", [InputError, DivergenceError, Message])
def test_the_keys_of_every_message_can_be_renamed(kind):
    renamed = kind("lower ", Key("lr"), ", not lr").rename_keys("prior.{}".format)
    assert type(renamed) is kind
    assert str(renamed.rename_keys(str.upper)) == "lower PRIOR.LR, not lr"


def test_an_error_with_keys_can_be_sent_to_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(InputError(Key("size"), "=0 is bad.")))
    with pytest.raises(InputError, match=r"^dataset\.size=0 is bad\.$"), prefix_keys("dataset"):
        raise error


VQVAE = [
    # override, what the message must begin with, what it must say
    ("model.optimizer.lr=abc", "model.optimizer.lr=abc", "0.001"),
    ("model.optimizer.lr=-1", "model.optimizer.lr=-1", "learning rate"),
    ("model.optimizer.fused=7", "model.optimizer.fused=7", "true or false"),
    ("+model.optimizer.momentun=1", "model.optimizer.momentun=1", "accepted are"),
    ("model.schedule.warmup_steps=-1", "model.schedule.warmup_steps=-1", "at least 0"),
    ("model.schedule.final=2", "model.schedule.final=2", "between 0 and 1"),
    ("model.net.hidden=abc", "model.net.hidden=abc", "integer"),
    ("model.net.hidden=7", "model.net.hidden=7", "even"),
    ("model.net.channels=2", "model.net.channels=2", "the data have 3"),
    ("model.channels_last=perhaps", "model.channels_last=perhaps", "true or false"),
    ("compile=perhaps", "model.compile=perhaps", "true or false"),
    ("model.net.quantizer.num_codes=0", "model.net.quantizer.num_codes=0", "at least 1"),
    ("model.net.quantizer.decay=1", "model.net.quantizer.decay=1", "below 1"),
    ("model.net.quantizer.init=x", "model.net.quantizer.init=x", "kmeans, data, uniform"),
    ("model.net.quantizer.normalize=2", "model.net.quantizer.normalize=2", "true or false"),
    ("dataset.batch_size=0", "dataset.batch_size=0", "at least 1"),
    ("dataset.batch_size=97", "dataset.batch_size=97", "96 images"),
    ("dataset.eval_batch_size=x", "dataset.eval_batch_size=x", "integer"),
    ("dataset.val_share=2", "dataset.val_share=2", "between 0 and 0.5"),
    ("dataset.flip=perhaps", "dataset.flip=perhaps", "true or false"),
    ("dataset.split_seed=abc", "dataset.split_seed=abc", "an integer"),
    ("dataset.source.size=[8,0]", "dataset.source.size=[8, 0]", "[height, width]"),
    ("dataset.source.path=/no/file", "dataset.source.path=/no/file", ".npz"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval=0", "at least 1"),
    ("trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5", "integer"),
    ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0", "at least 1"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0", "at least 1"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1", "at least 0"),
    ("trainer.max_steps=abc", "trainer.max_steps=abc", "an integer"),
    ("trainer.max_steps=-2", "trainer.max_steps=-2", "at least 1"),
    ("trainer.max_steps=-1", "model.schedule needs an end: set trainer.max_steps", "max_epochs"),
    ("trainer.precision=half", "trainer.precision=half", "bf16-mixed"),
    ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5", "share"),
    ("trainer.num_sanity_val_steps=-2", "trainer.num_sanity_val_steps=-2", "at least -1"),
    ("trainer.devices=0", "trainer.devices=0", "number of devices"),
    ("callbacks.last.every_n_steps=0", "callbacks.last.every_n_steps=0", "at least 1"),
    ("callbacks.last.signals=[X]", "callbacks.last.signals=['X']", "SIGUSR1"),
    ("callbacks.pruning.min_jobs=0", "callbacks.pruning.min_jobs=0", "at least 1"),
    ("callbacks.collapse.threshold=2", "callbacks.collapse.threshold=2", "between 0 and 1"),
    ("monitor=val/ssim", "monitor=val/ssim", "val/nmse (min)"),
]


@pytest.mark.parametrize(("override", "begins", "says"), VQVAE, ids=[row[0] for row in VQVAE])
def test_a_bad_value_of_a_vqvae_is_named(override, begins, says, toy, tmp_path):
    cfg = compose("vqvae", *toy, *TINY_VQVAE, override, folder=tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(cfg, load_images(cfg.dataset))
    line = str(caught.value)
    assert line.startswith(begins), line
    assert says in line, line
    assert "\n" not in line


PIPELINE = [
    ("prior.model.optimizer.lr=abc", "prior.model.optimizer.lr=abc", "0.001"),
    ("prior.model.net.kernel=4", "prior.model.net.kernel=4", "odd"),
    ("prior.model.net.num_classes=7", "prior.model.net.num_classes=7", "the data have 3"),
    ("prior.model.net.num_codes=7", "prior.model.net.num_codes=7", "the data have 16"),
    ("prior.batch_size=97", "prior.batch_size=97", "96 images"),
    ("prior.trainer.val_check_interval=0", "prior.trainer.val_check_interval=0", "at least 1"),
    ("prior.callbacks.average.decay=2", "prior.callbacks.average.decay=2", "between 0 and 1"),
    ("prior.callbacks.last.every_n_steps=0", "prior.callbacks.last.every_n_steps=0", "at least"),
    ("prior.trainer.max_steps=-1", "prior.model.schedule needs an end", "prior.trainer.max_epochs"),
    ("prior.monitor=val/nmse", "prior.monitor=val/nmse", "val/nats_per_code (min)"),
    ("evaluation.temperature=-1", "evaluation.temperature=-1", "at least 0"),
    ("evaluation.top_k=0", "evaluation.top_k=0", "at least 1"),
    ("evaluation.top_p=0", "evaluation.top_p=0", "(0, 1]"),
    ("evaluation.guidance=-1", "evaluation.guidance=-1", "at least 0"),
    ("evaluation.split=all", "evaluation.split=all", "train, val, test"),
    ("evaluation.weights.inception=no.pth", "evaluation.weights.inception=no.pth", "download"),
    ("evaluation.weights.lpips=no.pth", "evaluation.weights.lpips=no.pth", "download"),
    ("evaluation.classifier_steps=0", "evaluation.classifier_steps=0", "at least 1"),
    ("evaluation.classifier.net.hidden=0", "evaluation.classifier.net.hidden=0", "at least 1"),
    ("evaluation.classifier.optimizer.lr=x", "evaluation.classifier.optimizer.lr=x", "0.001"),
    (
        "evaluation.classifier.schedule.final=2",
        "evaluation.classifier.schedule.final=2",
        "between 0 and 1",
    ),
    ("sampling.temperature=-1", "sampling.temperature=-1", "at least 0"),
    ("sampling.top_k=0", "sampling.top_k=0", "at least 1"),
    ("sampling.top_p=0", "sampling.top_p=0", "(0, 1]"),
    ("sampling.devices=0", "sampling.devices=0", "at least 1"),
    ("sampling.labels=[3]", "sampling.labels=[3]", "0 to 2"),
    ("sampling.complete=nowhere", "sampling.complete=nowhere", "folder of images"),
]


@pytest.mark.parametrize(("override", "begins", "says"), PIPELINE, ids=[row[0] for row in PIPELINE])
def test_a_bad_value_of_a_later_stage_is_named_before_the_first(
    override, begins, says, toy, tmp_path
):
    options = [text for text in TINY_VQVAE if text != "trainer=debug"]
    cfg = compose("pipeline", *toy, "experiment=smoke", *options, override, folder=tmp_path)
    configs = compose_stages(cfg)
    with pytest.raises(InputError) as caught:
        check_stages(cfg, configs, load_images(configs["vqvae"].dataset))
    line = str(caught.value)
    assert line.startswith(begins), line
    assert says in line, line
    assert "\n" not in line


def test_an_evaluation_checks_its_classifier_with_its_own_keys(toy, tmp_path):
    cfg = compose("evaluate", *toy, "classifier.optimizer.lr=x", folder=tmp_path)
    check_evaluation(cfg)
    with pytest.raises(InputError, match=r"^classifier\.optimizer\.lr=x"):
        build_classifier(cfg, load_images(cfg.dataset))


@pytest.mark.parametrize("asked", ["perceptual=true", "weights.inception=any.pth"])
def test_precision_needs_four_samples(asked, tmp_path):
    check_evaluation(compose("evaluate", "num_samples=3", folder=tmp_path))
    check_evaluation(compose("evaluate", "num_samples=4", asked, folder=tmp_path))
    with pytest.raises(InputError, match=r"^num_samples=3 must be at least 4"):
        check_evaluation(compose("evaluate", "num_samples=3", asked, folder=tmp_path))


def test_a_prior_without_a_vqvae_asks_for_one(command):
    outcome = command("vqvae-train", "--config-name", "prior", "trainer=debug")
    assert outcome.status == 1
    assert outcome.err == "error: vqvae_checkpoint must be given: vqvae_checkpoint=VALUE\n"


def test_the_size_of_shards_is_named_by_their_own_key(toy, tmp_path):
    cfg = compose("vqvae", *toy, "trainer=debug", "model.net.downsamplings=3", folder=tmp_path)
    images = load_images(cfg.dataset)
    with pytest.raises(InputError, match=r"set dataset\.source\.size=\[16,8\]"):
        prepare(cfg.copy(), images)
    from vqvae_lightning.data import ShardDataModule

    images.size_key = ShardDataModule.size_key
    with pytest.raises(InputError, match=r"set dataset\.size=\[16,8\]"):
        prepare(cfg.copy(), images)


def test_reconstruct_and_sample_name_the_keys_that_they_have(toy, tmp_path, command, monkeypatch):
    from vqvae_lightning import checkpoints
    from vqvae_lightning.stages import reconstructing

    net = prepared_net(toy, tmp_path)
    monkeypatch.setattr(reconstructing, "load", lambda *_: checkpoints.Loaded(net, {}))
    outcome = command("vqvae-reconstruct", "vqvae_checkpoint=x.ckpt", "input=/nowhere")
    assert outcome.err == "error: input=/nowhere is not a folder of images.\n"


def test_reconstruct_refuses_a_size_that_nothing_would_have(command):
    # It was ignored.
    outcome = command("vqvae-reconstruct", "vqvae_checkpoint=x.ckpt", "size=[12,8]")
    assert outcome.status == 1
    assert outcome.err.startswith("error: size=[12, 8] resizes the images of a folder only: set i")


def prepared_net(toy, folder: Path):
    cfg = compose("vqvae", *toy, *TINY_VQVAE, folder=folder)
    return prepare(cfg, load_images(cfg.dataset)).task.net


def test_a_folder_of_shards_may_have_any_name(toy, tmp_path, command):
    # The brackets were read as a pattern, which found nothing.
    pytest.importorskip("webdataset")
    from vqvae_lightning.data import ShardDataModule

    folder = tmp_path / "sh[1] {a,b}"
    made = command("vqvae-shards", *toy, f"output={tmp_path}/plain", folder=tmp_path / "plain")
    assert made.status == 0, made.err
    made.folder.rename(folder)
    images = ShardDataModule(root=str(folder), num_workers=0)
    images.setup()
    assert {name: len(split) for name, split in images.datasets.items()} == {
        "train": 96,
        "val": 24,
        "test": 30,
    }
    with pytest.raises(InputError, match=r"root=.*empty: there is no file .*train-\*\.tar"):
        ShardDataModule(root=str(tmp_path / "empty")).setup()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_with_fewer_images_than_devices_is_refused(split, toy, tmp_path):
    # Lightning stopped at the first validation, of a loader of length zero.
    cfg = compose("vqvae", *toy, *TINY_VQVAE, "trainer.devices=4", folder=tmp_path)
    images = load_images(cfg.dataset)
    few = images.datasets[split]
    few.array, few.labels = few.array[:3], few.labels[:3]
    with pytest.raises(InputError, match=rf"^trainer\.devices=4: the {split} split has 3 images"):
        prepare(cfg, images)


def test_labelled_data_may_have_a_prior_without_classes(toy, tmp_path, command):
    # num_classes=0 was taken for "not given" and became the number of classes.
    small = [text for text in TINY_VQVAE if text != "trainer=debug"]
    options = ("experiment=smoke", *small, "prior.model.net.num_classes=0")
    outcome = command("vqvae-pipeline", *toy, *options, "sampling.labels=[1]")
    assert outcome.err.startswith("error: sampling.labels=[1]: this prior has no classes")
    outcome = command("vqvae-pipeline", *toy, *options)
    assert outcome.status == 0, outcome.err
    from vqvae_lightning import load
    from vqvae_lightning.runs.results import read_result

    prior = outcome.folder / "prior/checkpoints/best.ckpt"
    assert load(prior).net.num_classes == 0
    metrics = read_result(outcome.folder)["metrics"]
    assert "test/real_accuracy" in metrics
    assert "test/sample_fid" in metrics
    assert "test/sample_accuracy" not in metrics, "there is no class to be recognised"
    page = (outcome.folder / "report.html").read_text()
    assert "classified as their class" not in page
    for name, extra, words in (
        ("labels", ["labels=[1]"], "labels=[1]: this prior has no classes"),
        ("guidance", ["guidance=2"], "guidance=2 needs a prior that was trained with classes"),
        ("plain", ["num_samples=3"], ""),
        ("complete", ["complete=test", "num_samples=2", "completions=1"], ""),
    ):
        drawn = command("vqvae-sample", f"prior_checkpoint={prior}", *extra, folder=tmp_path / name)
        assert drawn.status == (1 if words else 0), drawn.err
        assert words in drawn.err


def test_a_resumed_prior_keeps_what_was_filled_in(toy, tmp_path):
    cfg = compose("vqvae", *toy, *TINY_VQVAE, folder=tmp_path)
    images = load_images(cfg.dataset)
    prepare(cfg, images)
    assert cfg.model.net.channels == 3
    prepare(cfg, images)
    assert train(cfg, images)["steps"] == 2
