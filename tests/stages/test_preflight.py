"""What preflight reports about a run, compared with the run."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VQVAE, compose, prepare
from torch import nn

from vqvae_lightning.errors import InputError
from vqvae_lightning.networks.autoencoder import Encoder
from vqvae_lightning.stages import preflight, training
from vqvae_lightning.stages.inputs import load_images
from vqvae_lightning.stages.pipeline import check_stages, compose_stages
from vqvae_lightning.tasks.optimization import check_optimizer

SMALL = [option for option in TINY_VQVAE if not option.startswith("trainer=")]


def survey_vqvae(folder, *overrides):
    cfg = compose("vqvae", *overrides, folder=folder)
    return prepare(cfg, load_images(cfg.dataset)).survey


def parse_bytes(text):
    number, unit = re.match(r"([\d.]+) (kB|MB|GB)", text).groups()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_preflight_prints_everything_and_writes_nothing(toy, command):
    outcome = command("vqvae-pipeline", "experiment=smoke", "preflight=true", *toy)
    assert outcome.status == 0, outcome.err
    for words in ("1 x cpu, 32-true", "3x2 codes of 512", "96 train, 24 val, 30 test", "GB free"):
        assert words in outcome.out
    assert not outcome.folder.exists()


def test_a_run_prints_its_facts_first_and_its_checkpoints_have_the_reported_size(toy, command):
    small = ("experiment=smoke", "model.net.hidden=64", "prior.model.net.channels=32", *toy)
    outcome = command("vqvae-pipeline", *small)
    assert outcome.status == 0, outcome.err
    text = " ".join(outcome.out.split())
    for stage in ("vqvae", "prior"):
        reported = re.search(rf"{stage} 1 x cpu.*?checkpoints of ([\d.]+ [kMG]B)", text).group(1)
        written = (outcome.folder / stage / "checkpoints" / "last.ckpt").stat().st_size
        assert parse_bytes(reported) == pytest.approx(written, rel=0.1), stage


def test_a_pipeline_surveys_each_training_stage_once(toy, command, monkeypatch):
    seen = []
    survey = preflight.survey
    monkeypatch.setattr(
        training, "survey", lambda cfg, *rest: seen.append(cfg.kind) or survey(cfg, *rest)
    )
    assert command("vqvae-pipeline", "experiment=smoke", *toy).status == 0
    assert seen == ["vqvae", "prior"]


def test_activations_are_the_bytes_kept_for_the_backward_pass():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    data = SimpleNamespace(image_shape=(1, 8, 8))
    # The first convolution keeps its input. The second and the ReLU keep the ReLU's output.
    assert preflight._measure_activations(net, data, "32-true") == 4 * 64 * (1 + 4)


def test_a_survey_does_not_change_the_network(toy, tmp_path):
    cfg = compose("vqvae", *SMALL, *toy, folder=tmp_path)
    images = load_images(cfg.dataset)
    task = prepare(cfg, images).task
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    state = torch.get_rng_state()
    preflight.survey(cfg, task.net, images, 2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.net.training
    assert task.net.quantizer.update(0.5) == {}, "vectors were gathered"
    for name, value in task.net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("downsamplings", "blocks"), [(1, 0), (2, 2), (3, 1)])
def test_the_receptive_field_is_what_a_code_depends_on(downsamplings, blocks):
    encoder = Encoder(1, 4, 3, downsamplings, blocks, 2)
    for parameter in encoder.parameters():
        nn.init.constant_(parameter, 0.1)
    images = torch.ones(1, 1, 128, 128, requires_grad=True)
    vectors = encoder(images)
    middle = vectors.shape[-1] // 2
    vectors[0, :, middle, middle].sum().backward()
    seen = (images.grad[0, 0] != 0).any(0).sum()
    assert encoder.receptive_field == seen


@pytest.mark.parametrize(
    ("optimizer", "values"), [(torch.optim.Adam, 2), (torch.optim.AdamW, 2), (torch.optim.SGD, 0)]
)
def test_the_state_of_the_optimizer_is_counted(optimizer, values):
    assert check_optimizer(lambda parameters: optimizer(parameters, lr=0.1)) == values


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("trainer.devices=3", "dataset.batch_size=8"),
            r"dataset\.batch_size=8 does not divide over 3 devices.*6 and 9",
        ),
        (
            ("trainer.devices=4", "dataset.batch_size=3"),
            r"Nearest that do: 4\.",
        ),
        (("trainer.accelerator=auto",), r"trainer\.accelerator=auto must be one of cpu, gpu, cuda"),
        (("trainer.precision=16-mixed",), r"precision=16-mixed: accelerator cpu has no float16"),
    ],
)
def test_combinations_that_cannot_work_are_errors(overrides, words, toy, tmp_path):
    with pytest.raises(InputError, match=words):
        survey_vqvae(tmp_path, *SMALL, *toy, *overrides)


def test_a_model_larger_than_memory_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"take \d+ kB, but this machine .* has 100 kB"):
        survey_vqvae(tmp_path, *SMALL, *toy, "model.net.hidden=20")


def test_the_memory_of_a_prior_is_reduced_by_its_own_keys(toy, tmp_path, monkeypatch):
    wide = ("experiment=smoke", *SMALL, *toy, "prior.model.net.channels=64")
    cfg = compose("pipeline", *wide, folder=tmp_path)
    configs = compose_stages(cfg)
    images = load_images(configs["vqvae"].dataset)
    survey = check_stages(cfg, configs, images)["prior"]
    needed = parse_bytes(survey.facts["memory"])
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: round(needed * 0.95))
    (warning,) = check_stages(cfg, configs, images)["prior"].warnings
    assert "choose a smaller prior.batch_size, or more devices" in warning
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: round(needed * 0.1))
    smaller = r"choose a smaller prior\.model\.net\.channels or prior\.model\.net\.layers\.$"
    with pytest.raises(InputError, match=smaller):
        check_stages(cfg, configs, images)


def test_a_stage_without_an_end_says_so(toy, tmp_path):
    endless = ("model.schedule=null", "trainer.max_steps=-1")
    assert survey_vqvae(tmp_path, *SMALL, *toy, *endless).facts["length"] == "no end"
    epochs = ("trainer.max_steps=-1", "trainer.max_epochs=3")
    assert survey_vqvae(tmp_path, *SMALL, *toy, *epochs).facts["length"] == "3 epochs"


def test_activations_that_do_not_fit_are_a_warning(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "measure_available_memory", lambda: 120_000)
    (warning,) = survey_vqvae(tmp_path, *SMALL, *toy).warnings
    assert "smaller dataset.batch_size" in warning


def test_a_full_disk_is_found_before_training(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"do not fit into the 1 kB .*hydra\.run\.dir"):
        survey_vqvae(tmp_path, *SMALL, *toy)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.net.quantizer.num_codes=577",), "the 96 training images have 576 codes"),
        (("dataset.batch_size=1", "model.net.quantizer.num_codes=64"), "hit every 11 steps"),
    ],
)
def test_what_is_probably_not_intended_is_a_warning(overrides, words, toy, tmp_path):
    assert any(
        words in warning for warning in survey_vqvae(tmp_path, *SMALL, *toy, *overrides).warnings
    )


def test_a_prior_whose_layers_do_not_cover_the_grid_is_a_warning(command):
    short = ("experiment=smoke", "prior.model.net.layers=1", "prior.model.net.first_kernel=3")
    outcome = command("vqvae-pipeline", *short, "preflight=true")
    words = (
        "with prior.model.net.layers=1 the receptive field does not cover the 7x7 codes; "
        "6 layers cover"
    )
    assert words in " ".join(outcome.out.split())


def test_a_resumed_run_needs_no_disk_space_for_the_checkpoints_it_has(toy, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"x" * 10_000_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1 kB free" in survey_vqvae(tmp_path, *SMALL, *toy).facts["checkpoints"]


def test_accumulated_batches_count_as_epochs(toy, tmp_path):
    steps = ("trainer.max_steps=3", "dataset.batch_size=32", "trainer.accumulate_grad_batches=2")
    assert survey_vqvae(tmp_path, *SMALL, *toy, *steps).facts["length"] == "3 steps, 2.0 epochs"
