"""The pipeline and the commands on its runs, from start to end with a few steps."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae_lightning.checkpoints import load_pair
from vqvae_lightning.commands import pipeline
from vqvae_lightning.configs import build
from vqvae_lightning.pixels import from_uint8, to_uint8
from vqvae_lightning.runs.folder import STAGES
from vqvae_lightning.units import UNITS

SMOKE = ("experiment=smoke", "evaluation.num_samples=12", "sampling.num_samples=6")


@pytest.fixture(scope="module")
def finished(toy_npz, tmp_path_factory):
    """Folder of a finished run on the toy data, made by the command itself."""
    import sys

    folder = tmp_path_factory.mktemp("pipeline") / "run"
    data = ("dataset=npz", f"dataset.source.path={toy_npz}")
    before = sys.argv
    sys.argv = ["vqvae-pipeline", *SMOKE, *data, f"hydra.run.dir={folder}"]
    try:
        pipeline.main()
    finally:
        sys.argv = before
    return folder


def test_a_run_writes_what_it_promises(finished):
    for name in (
        "config.yaml",
        "result.json",
        "report.html",
        "reconstructions.png",
        "samples.png",
        "vqvae/checkpoints/best.ckpt",
        "vqvae/checkpoints/last.ckpt",
        "vqvae/metrics.csv",
        "vqvae/pictures/reconstructions_0000006.png",
        "prior/checkpoints/best.ckpt",
        "prior/metrics.csv",
        "prior/pictures/samples_0000004.png",
        "samples/samples.npz",
    ):
        assert (finished / name).is_file(), name
    assert not list(finished.rglob(".*")), "half-written files"


def test_result_has_units_seed_split_versions_and_times(finished):
    result = json.loads((finished / "result.json").read_text())
    assert all(entry["unit"] for entry in result["metrics"].values())
    assert set(result["seconds"]) == {*STAGES, "report"}
    assert (result["seed"], result["split"], result["images"]) == (0, "test", 30)
    assert torch.__version__.startswith(result["versions"]["torch"].split("+")[0])
    assert result["command"].startswith("vqvae-pipeline experiment=smoke")
    assert {key.rpartition("/")[2] for key in result["metrics"]} <= set(UNITS)


def test_reported_metrics_are_those_of_the_saved_networks(finished):
    prior, vqvae = load_pair(finished / "prior/checkpoints/best.ckpt")
    data = build(vqvae.config["dataset"])
    data.setup()
    images = data.datasets["test"].data
    codes = vqvae.net.encode(from_uint8(images))
    decoded = to_uint8(vqvae.net.decode(codes)).double() / 255
    error = ((decoded - images.double() / 255) ** 2).mean().item()
    counts = codes.flatten().bincount(minlength=512).double()
    share = counts[counts > 0] / counts.sum()
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    value = {key.rpartition("/")[2]: entry["value"] for key, entry in metrics.items()}
    assert value["mse"] == pytest.approx(error, rel=1e-4)
    assert value["psnr_db"] == pytest.approx(-10 * math.log10(error), rel=1e-4)
    assert value["perplexity"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)
    nats = torch.nn.functional.cross_entropy(
        prior.net(codes, data.datasets["test"].labels), codes
    ).item()
    assert value["nats_per_code"] == pytest.approx(nats, rel=1e-4)
    # bits = nats / ln 2, and bits/dim = codes * bits / values: 3 x 2 codes for 12 x 8 x 3 values.
    assert value["prior_bits_per_dim"] == pytest.approx(nats / math.log(2) * 6 / 288, rel=1e-4)
    assert value["uniform_bits_per_dim"] == pytest.approx(9 * 6 / 288)
    total = value["reconstruction_bits_per_dim"] + value["prior_bits_per_dim"]
    assert value["total_bits_per_dim"] == pytest.approx(total)


def read_tiles(path, count, columns):
    """Read the first images (count, 12, 8, 3) of a picture of the toy data."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    # Each image is enlarged 8 times, with 2 white pixels around it.
    assert pixels.shape[1] == columns * 66 + 2
    found = []
    for number in range(count):
        top, left = 2 + number // columns * 98, 2 + number % columns * 66
        tile = pixels[top : top + 96, left : left + 64]
        assert (tile == np.kron(tile[::8, ::8], np.ones((8, 8, 1)))).all()
        assert (pixels[top - 2 : top, left - 2 : left + 66] == 255).all()
        found.append(tile[::8, ::8])
    return np.stack(found)


def test_pictures_show_the_samples_and_images_above_their_reconstructions(finished):
    with np.load(finished / "samples/samples.npz") as arrays:
        assert (read_tiles(finished / "samples.png", 6, 3) == arrays["images"]).all()
    vqvae = load_pair(finished / "prior/checkpoints/best.ckpt")[1]
    data = build(vqvae.config["dataset"])
    data.setup()
    images = data.datasets["test"].data[:10]
    decoded = to_uint8(vqvae.net(from_uint8(images)).reconstruction)
    rows = read_tiles(finished / "reconstructions.png", 20, 10)
    assert (rows[:10] == images.movedim(1, -1).numpy()).all()
    # Another batch size may round to the next level.
    assert np.abs(rows[10:] - decoded.movedim(1, -1).numpy().astype(float)).max() <= 1
    validated = read_tiles(finished / "vqvae/pictures/reconstructions_0000006.png", 20, 10)
    assert (validated[:10] == data.datasets["val"].data[:10].movedim(1, -1).numpy()).all()
    assert validated[10:].std() > 1


def test_a_finished_run_resumes_without_work(finished, command, monkeypatch):
    monkeypatch.setattr(
        "vqvae_lightning.networks.sampling._draw_batch",
        lambda *_: pytest.fail("drew samples"),
    )
    before = (finished / "vqvae/checkpoints/best.ckpt").stat().st_mtime_ns
    outcome = command("vqvae-pipeline", f"resume={finished}")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("done before") == 4
    assert (finished / "vqvae/checkpoints/best.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["prior", "evaluation", "samples", "report"])
def test_a_broken_run_resumes_after_its_last_finished_stage(
    stage, toy, tmp_path, command, monkeypatch
):
    places = {
        "prior": "vqvae_lightning.tasks.PriorTask.training_step",
        "evaluation": "vqvae_lightning.stages.evaluating.measure_reconstruction",
        "samples": "vqvae_lightning.stages.pipeline.draw_samples",
        "report": "vqvae_lightning.stages.pipeline.write_report",
    }

    def fail(*arguments, **options):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(places[stage], fail)
        assert command("vqvae-pipeline", *SMOKE, *toy).status == 1
    folder = tmp_path / "run"
    # A run may be moved before it resumes.
    moved = folder.rename(tmp_path / "moved")
    outcome = command("vqvae-pipeline", f"resume={moved}")
    assert outcome.status == 0, outcome.err
    order = list(STAGES)
    done = order.index(stage) if stage in order else len(order)
    assert outcome.out.count("done before") == done
    assert (moved / "report.html").is_file()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        (
            "vqvae_lightning.tasks.prior.compute_loss",
            None,
            "Lower prior.model.optimizer.lr, or set prior.trainer.gradient_clip_val.",
        ),
        (
            "vqvae_lightning.data.codes.CodesDataModule._encode_part",
            OSError("no space"),
            "no space; set prior.codes_dir.",
        ),
    ],
    ids=["divergence", "codes"],
)
def test_an_error_while_the_prior_trains_names_its_keys(
    place, error, words, toy, command, monkeypatch
):
    def fail(*_):
        if error is not None:
            raise error
        return torch.tensor(math.nan)

    monkeypatch.setattr(place, fail)
    outcome = command("vqvae-pipeline", *SMOKE, *toy)
    assert outcome.status == 1
    assert outcome.err.rstrip().endswith(words)


def test_data_without_labels_give_an_unconditional_prior(toy_npz, tmp_path, command):
    with np.load(toy_npz) as arrays:
        bare = {name: array for name, array in arrays.items() if name.endswith("images")}
    np.savez(tmp_path / "bare.npz", **bare)
    data = ("dataset=npz", f"dataset.source.path={tmp_path}/bare.npz")
    outcome = command("vqvae-pipeline", *SMOKE, *data)
    assert outcome.status == 0, outcome.err
    assert "sample_accuracy" not in outcome.out
    assert "nats_per_code" in outcome.out


def test_scalars_pictures_and_histograms_reach_tensorboard(toy, tmp_path, command):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = command("vqvae-pipeline", *SMOKE, *toy, "logger=tensorboard")
    assert outcome.status == 0, outcome.err
    tags = {}
    for stage in ("vqvae", "prior", "evaluation"):
        events = EventAccumulator(str(tmp_path / "run" / stage / "tensorboard"))
        events.Reload()
        tags[stage] = events.Tags()
    assert "val/nmse" in tags["vqvae"]["scalars"]
    assert {"val/reconstructions", "val/codes"} <= set(tags["vqvae"]["images"])
    assert "val/codebook_histogram" in tags["vqvae"]["histograms"]
    assert "val/samples" in tags["prior"]["images"]
    assert "test/total_bits_per_dim" in tags["evaluation"]["scalars"]
    assert "nearest" in tags["evaluation"]["images"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_pipeline_runs_on_a_gpu(toy, command):
    on_gpu = ("trainer.accelerator=gpu", "prior.trainer.accelerator=gpu")
    outcome = command("vqvae-pipeline", *SMOKE, *toy, *on_gpu)
    assert outcome.status == 0, outcome.err
    assert "sample_accuracy" in outcome.out


def test_completions_keep_the_upper_codes_of_each_image(finished, command):
    prior = f"prior_checkpoint={finished}/prior/checkpoints/best.ckpt"
    options = ("complete=test", "num_samples=5", "completions=2", "keep_rows=0.67", "batch_size=3")
    outcome = command("vqvae-sample", prior, *options)
    assert outcome.status == 0, outcome.err
    with np.load(outcome.folder / "samples.npz") as arrays:
        drawn, labels = arrays["codes"], arrays["labels"]
    _, vqvae = load_pair(finished / "prior/checkpoints/best.ckpt")
    data = build(vqvae.config["dataset"])
    data.setup()
    codes = vqvae.net.encode(from_uint8(data.datasets["test"].data[:5])).numpy()
    assert drawn.shape == (10, 3, 2)
    for copy in (drawn[:5], drawn[5:]):
        assert (copy[:, :2] == codes[:, :2]).all()
    assert (drawn[:5, 2] != drawn[5:, 2]).any(), "completions of an image are equal"
    assert (labels == np.tile(data.datasets["test"].labels[:5].numpy(), 2)).all()
    # Rows of 5 originals, kept parts and two completions, 96x64 pixels each, with margins.
    with Image.open(outcome.folder / "samples.png") as picture:
        assert picture.size == (5 * 66 + 2, 4 * 98 + 2)


def test_a_folder_of_images_is_completed(finished, command, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        levels = np.full((24, 16, 3), 80 * number, dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
    prior = f"prior_checkpoint={finished}/prior/checkpoints/best.ckpt"
    refused = command("vqvae-sample", prior, f"complete={folder}")
    assert refused.status == 1
    assert "labels=" in refused.err
    outcome = command("vqvae-sample", prior, f"complete={folder}", "labels=[2,0]")
    assert outcome.status == 0, outcome.err
    with np.load(outcome.folder / "samples.npz") as arrays:
        assert arrays["labels"].tolist() == [2, 0, 2] * 3
        assert arrays["images"].shape == (9, 12, 8, 3)


def test_ctrl_c_keeps_finished_samples(finished, command, monkeypatch):
    from vqvae_lightning.evaluation import drawing

    whole = drawing.sample_batches

    def interrupted(*arguments, **options):
        for number, batch in enumerate(whole(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(drawing, "sample_batches", interrupted)
    prior = f"prior_checkpoint={finished}/prior/checkpoints/best.ckpt"
    outcome = command("vqvae-sample", prior, "num_samples=20", "batch_size=4")
    assert outcome.status == 130
    assert "8 of 20" in outcome.err
    assert not (outcome.folder / "result.json").exists()
    with np.load(outcome.folder / "samples.npz") as arrays:
        assert len(arrays["images"]) == len(arrays["labels"]) == 8


def test_images_are_reconstructed_through_a_continuous_bottleneck(command, toy, tmp_path):
    first = command(
        "vqvae-train", "quantizer=gaussian", "trainer=debug", "model.net.hidden=8", *toy
    )
    assert first.status == 0, first.err
    path = first.folder / "checkpoints" / "best.ckpt"
    outcome = command("vqvae-reconstruct", f"vqvae_checkpoint={path}", folder=tmp_path / "r")
    assert outcome.status == 0, outcome.err
    with np.load(outcome.folder / "reconstructions.npz") as arrays:
        assert set(arrays) == {"images", "reconstructions"}
    options = ("--config-name=prior", f"vqvae_checkpoint={path}", *toy)
    refused = command("vqvae-train", *options, folder=tmp_path / "e")
    assert refused.status == 1
    assert "is continuous" in refused.err


def test_samples_do_not_depend_on_the_number_of_devices(finished, command, tmp_path):
    prior = f"prior_checkpoint={finished}/prior/checkpoints/best.ckpt"
    drawn = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        options = (f"devices={devices}", "accelerator=cpu", "num_samples=7")
        outcome = command("vqvae-sample", prior, *options, folder=folder)
        assert outcome.status == 0, outcome.err
        with np.load(folder / "samples.npz") as arrays:
            drawn.append(arrays["codes"])
    assert (drawn[0] == drawn[1]).all()
