"""The README: its commands run, at toy size, and its names are those that runs log."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMANDS, TINY_VQVAE, compose
from PIL import Image

from vqvae_lightning.commands import pipeline, report, shards
from vqvae_lightning.units import UNITS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def shell_lines():
    """Name and arguments of each command in the README's blocks, and its starter if any."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines() if language == "bash" else ():
            found = re.search(
                r"(torchrun|srun)?[^#]*?\b(vqvae[-_]\w+(?:\.\w+)?)((?: [^#&|]*)?)", line
            )
            if found:
                starter, name, rest = found.groups()
                name = name.replace("vqvae_lightning.", "vqvae-")
                yield pytest.param(name, rest.split(), starter, id=line.partition("  #")[0].strip())


@pytest.fixture(scope="module")
def work(toy_npz, tmp_path_factory):
    """A folder with what the README's commands name: images, shards, a run, a study."""
    place = tmp_path_factory.mktemp("work")
    shutil.copy(toy_npz, place / "bloodmnist.npz")
    (place / "photos").mkdir()
    for number in range(40):
        levels = np.full((12, 8, 3), 6 * number, dtype=np.uint8)
        Image.fromarray(levels).save(place / "photos" / f"{number}.png")
    run = place / "runs/pipeline/2026-01-31_12-00-00"
    data = ["dataset=npz", f"dataset.source.path={toy_npz}"]
    given = ["experiment=smoke", "evaluation.num_samples=12", "sampling.num_samples=6"]
    folder = ["dataset=image_folder", f"dataset.source.root={place}/photos"]
    before = sys.argv
    try:
        # With all that a prior can log: the loss, which label smoothing sets apart from the nats.
        given += ["prior.model.net.null_label_rate=0.1", "prior.model.label_smoothing=0.1"]
        sys.argv = ["vqvae-pipeline", *data, *given, f"hydra.run.dir={run}"]
        pipeline.main()
        size = "dataset.source.size=[64,64]"
        sys.argv = ["vqvae-shards", *folder, size, f"output={place}/shards"]
        shards.main()
    finally:
        sys.argv = before
    shutil.copytree(run, place / "runs/study/0")
    return place


def at_toy_size(name, given):
    """A README's arguments, and after them, where they win, those that make the command small."""
    own = [a for a in given if not a.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    # Other processes: see test_launchers.py.
    arguments = ["-m" if a == "hydra/launcher=joblib" else a for a in own]
    # The first two values of a swept key stand for the others.
    arguments = [re.sub(r"=([^\[(,]+,[^,]+),.*", r"=\1", a) for a in arguments]
    if "-m" in arguments or "hydra/launcher=slurm" in own:
        arguments.append("hydra.sweep.dir=sweep")
    if "--help" in own or any(a.startswith("resume=runs") for a in own):
        return own
    if name == "vqvae-sample":
        small = [
            "num_samples=4",
            "devices=1",
            *["labels=[0,2]" for a in own if a == "labels=[0,3]"],
        ]
    elif name == "vqvae-evaluate":
        small = ["num_samples=6", "classifier_steps=2", "trainer.devices=1"]
    elif name in ("vqvae-train", "vqvae-pipeline"):
        small = ["--dry-run"] if "hydra/launcher=slurm" in own else ["preflight=true"]
        if "hydra/sweeper=optuna" in own:  # which wants figures
            small = ["trainer=debug", "hydra.sweeper.n_trials=1"]
        if not any(a in own for a in ("dataset=image_folder", "dataset=shards", "dataset=npz")):
            small += ["dataset=npz", "dataset.source.path=bloodmnist.npz"]
        if "trainer=ddp" in own and "--dry-run" not in small:
            small += ["trainer.accelerator=cpu", "trainer.devices=2"]
        small.append("dataset.batch_size=8")
        if "prior" not in own:
            small.append("model.net.hidden=8")
        if "prior" in own or name == "vqvae-pipeline":
            place = "prior." if name == "vqvae-pipeline" else ""
            small += [f"{place}{key}" for key in ("model.net.channels=8", "batch_size=8")]
    else:
        small = []
    return [*arguments, *small]


@pytest.mark.parametrize(("name", "given", "starter"), list(shell_lines()))
def test_each_command_in_the_readme_runs(
    name, given, starter, work, command, tmp_path, monkeypatch
):
    if starter:  # see test_launchers.py
        compose("vqvae", *[a for a in given if not a.startswith("hydra.")], folder=tmp_path)
        return
    for path in work.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if name == "vqvae-report":
        monkeypatch.setattr(sys, "argv", [name, *[str(tmp_path / part) for part in given]])
        report.main()
        assert (work / "runs/study/report.html").is_file()
        return
    stage = "prior" if any(a.startswith("prior_checkpoint=") for a in given) else "vqvae"
    run = work / "runs/pipeline/2026-01-31_12-00-00"
    (tmp_path / "best.ckpt").symlink_to(run / stage / "checkpoints/best.ckpt")
    arguments = at_toy_size(name, given)
    outcome = command(name, *arguments)
    assert outcome.status == 0, outcome.err
    assert outcome.out.strip()
    assert "Traceback" not in outcome.err


def test_the_blocks_hold_every_command():
    assert {parameters.values[0] for parameters in shell_lines()} == {*COMMANDS, "vqvae-report"}
    assert len(list(shell_lines())) > 30


def logged_in(folder):
    """The last parts of the names in each `metrics.csv` and `result.json` below `folder`."""
    names = set()
    for path in folder.rglob("metrics.csv"):
        with path.open() as file:
            names |= set(next(csv.reader(file))) - {"epoch", "step"}
    for path in folder.rglob("result.json"):
        names |= set(json.loads(path.read_text())["metrics"])
    # The number of a channel is no part of a name.
    return {re.sub(r"(?<=_dim)\d+$", "", name.rpartition("/")[2]) for name in names}


def test_every_documented_name_is_logged_and_every_logged_name_is_documented(
    work, toy, command, tmp_path
):
    run = work / "runs/pipeline/2026-01-31_12-00-00"
    tiny = [option for option in TINY_VQVAE if "quantizer" not in option]
    kinds = (
        ("loss", "warmup_steps=1", "revive_every=1", "num_codes=16"),
        ("gaussian",),
        ("gaussian", "free_bits=0.1"),
        ("lfq",),
    )
    for number, (quantizer, *options) in enumerate(kinds):
        given = [f"quantizer={quantizer}", *[f"model.net.quantizer.{o}" for o in options]]
        steps = ("trainer.max_steps=6", "trainer.val_check_interval=2")
        folder = tmp_path / str(number)
        outcome = command("vqvae-train", *toy, *tiny, *given, *steps, folder=folder)
        assert outcome.status == 0, outcome.err
    prior, vqvae = (run / stage / "checkpoints/best.ckpt" for stage in ("prior", "vqvae"))
    # Training images, since only they fill the batches of 32 of one of the perplexities.
    whole = (f"prior_checkpoint={prior}", "split=train", "num_samples=6", "classifier_steps=2")
    assert command("vqvae-evaluate", *whole, folder=tmp_path / "evaluation").status == 0
    again = f"vqvae_checkpoint={vqvae}"
    assert command("vqvae-reconstruct", again, folder=tmp_path / "reconstructed").status == 0
    logged = logged_in(run) | logged_in(tmp_path)
    table = dict(re.findall(r"^\| `([a-z_0-9]+)` \| ([^|]+?) \|", README, re.MULTILINE))
    assert set(table) == logged
    assert table == UNITS


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:vqvae_lightning|conf|experiments|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
