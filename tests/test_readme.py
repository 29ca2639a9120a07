"""The pages: their commands run, at toy size; their names are logged; their links resolve."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import evaluated
import numpy as np
import pytest
from conftest import COMMANDS, TINY_VQVAE, compose
from PIL import Image
from torchmetrics.functional.image.lpips import _NoTrainLpips

from vqvae_lightning.commands import pipeline, report, shards
from vqvae_lightning.evaluation import features
from vqvae_lightning.stages import evaluating
from vqvae_lightning.units import UNITS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MOST_WORDS = 1500
PAGES = [
    README,
    *sorted(path for part in ("conf", "vqvae_lightning") for path in (ROOT / part).rglob("*.md")),
]
STUDIES = sorted((ROOT / "experiments").rglob("*.md"))
LOGGED_NAMES = ROOT / "vqvae_lightning/loggers/README.md"


def shell_lines():
    """Name, arguments and starter (torchrun, srun or None) of each command in the pages' blocks."""
    seen = set()
    for page in PAGES:
        for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines() if language == "bash" else ():
                found = re.search(r"(torchrun|srun)?[^#]*?\b(vqvae-\w+)((?: [^#&|]*)?)", line)
                if found and found.groups() not in seen:
                    seen.add(found.groups())
                    starter, name, rest = found.groups()
                    command = line.partition("  #")[0].strip()
                    yield pytest.param(name, rest.split(), starter, id=command)


@pytest.fixture(scope="module")
def work(toy_npz, tmp_path_factory):
    """A folder with what the pages' commands name: images, shards, a run, a study."""
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
        # Label smoothing makes the loss differ from the nats, so that a prior logs both.
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
    """A page's arguments, followed by overrides that make the command small."""
    own = [a for a in given if not a.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    # The launchers' own processes are tested with the launchers.
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
        if "hydra/sweeper=optuna" in own:  # it needs the metrics of a finished job
            small = ["trainer=debug", "hydra.sweeper.n_trials=1"]
        if not any(a in own for a in ("dataset=image_folder", "dataset=shards", "dataset=npz")):
            small += ["dataset=npz", "dataset.source.path=bloodmnist.npz"]
        if "trainer=ddp" in own and "--dry-run" not in small:
            small += ["trainer.accelerator=cpu", "trainer.devices=2"]
        small.append("dataset.batch_size=8")
        # A decoder on kept codes has the sizes of the finished one.
        if "prior" not in own and "vqvae_checkpoint=vqvae.ckpt" not in own:
            small.append("model.net.hidden=8")
        if "prior" in own or name == "vqvae-pipeline":
            place = "prior." if name == "vqvae-pipeline" else ""
            small += [f"{place}{key}" for key in ("model.net.channels=8", "batch_size=8")]
    else:
        small = []
    return [*arguments, *small]


@pytest.mark.parametrize(("name", "given", "starter"), list(shell_lines()))
def test_each_documented_command_runs(name, given, starter, work, command, tmp_path, monkeypatch):
    if starter:  # ranks started from outside are tested with the launchers
        compose("vqvae", *[a for a in given if not a.startswith("hydra.")], folder=tmp_path)
        return
    for path in work.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if name == "vqvae-report":
        monkeypatch.setattr(sys, "argv", [name, *[str(tmp_path / part) for part in given]])
        monkeypatch.chdir(tmp_path)
        report.main()
        written = "runs/study/report.html" if len(given) == 1 else "comparison.html"
        assert (tmp_path / written).is_file()
        return
    for stage in ("vqvae", "prior"):
        path = work / "runs/pipeline/2026-01-31_12-00-00" / stage / "checkpoints/best.ckpt"
        (tmp_path / f"{stage}.ckpt").symlink_to(path)
    arguments = at_toy_size(name, given)
    outcome = command(name, *arguments)
    assert outcome.status == 0, outcome.err
    assert outcome.out.strip()
    assert "Traceback" not in outcome.err


def test_the_pages_show_every_command():
    assert {parameters.values[0] for parameters in shell_lines()} == {*COMMANDS, "vqvae-report"}
    assert len(list(shell_lines())) > 40


def logged_in(folder):
    """Last parts of the names in each `metrics.csv` and `result.json` under `folder`."""
    names = set()
    for path in folder.rglob("metrics.csv"):
        with path.open() as file:
            names |= set(next(csv.reader(file))) - {"epoch", "step"}
    for path in folder.rglob("result.json"):
        names |= set(json.loads(path.read_text())["metrics"])
    # A channel's number is not part of the name.
    return {re.sub(r"(?<=_dim)\d+$", "", name.rpartition("/")[2]) for name in names}


def test_every_documented_name_is_logged_and_every_logged_name_is_documented(
    work, toy, command, tmp_path, monkeypatch
):
    net, lpips = evaluated.TinyFeatures(), _NoTrainLpips(net="alex", pnet_rand=True)
    networks = features.Networks(net, net, lpips)
    monkeypatch.setattr(evaluating, "load_networks", lambda *_: networks)
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
    # Training images, because `perplexity_batch32` needs full batches of 32.
    whole = (f"prior_checkpoint={prior}", "split=train", "num_samples=6", "classifier_steps=2")
    assert command("vqvae-evaluate", *whole, folder=tmp_path / "evaluation").status == 0
    outcome = command(
        "vqvae-train", *toy, *tiny, "likelihood=logistic", folder=tmp_path / "likelihood"
    )
    assert outcome.status == 0, outcome.err
    bounded = (f"vqvae_checkpoint={tmp_path}/1/checkpoints/best.ckpt", "importance_samples=2")
    assert command("vqvae-evaluate", *bounded, folder=tmp_path / "bounded").status == 0
    again = f"vqvae_checkpoint={vqvae}"
    assert command("vqvae-reconstruct", again, folder=tmp_path / "reconstructed").status == 0
    logged = logged_in(run) | logged_in(tmp_path)
    table = dict(
        re.findall(r"^\| `([a-z_0-9]+)` \| ([^|]+?) \|", LOGGED_NAMES.read_text(), re.MULTILINE)
    )
    assert set(table) == logged
    assert table == UNITS


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


def test_the_readme_links_each_page():
    linked = {(ROOT / target).resolve() for target, _ in links(README)}
    assert {*PAGES[1:], ROOT / "experiments/README.md"} <= linked


def links(page):
    """Target, relative to the page's folder and empty for the page itself, and anchor."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target.partition("#")[::2]


def anchors(page):
    """What GitHub makes of a page's headings."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: str(page.relative_to(ROOT)))
def test_each_relative_link_resolves(page):
    for target, anchor in links(page):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: str(page.relative_to(ROOT)))
def test_each_path_of_the_repository_exists(page):
    text = page.read_text()
    inside = r"(?<![\w./-])((?:vqvae_lightning|conf|experiments|tests|\.ci|\.github)/[\w./-]*)"
    for path in re.findall(inside, text):
        assert (ROOT / path.rstrip(".")).exists(), path
    modules = {
        path.name
        for part in ("vqvae_lightning", "experiments", "tests")
        for path in (ROOT / part).rglob("*.py")
    }
    for name in re.findall(r"`([\w-]+\.py)`", text):
        assert name in modules, name
