"""Small data, commands that run in this process, and a warm interpreter for other processes."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import warm_python

from vqvae_lightning.commands import evaluate, pipeline, reconstruct, sample, shards, train
from vqvae_lightning.configs import CONF_DIR, register_resolvers

COMMANDS = {
    "vqvae-train": train.main,
    "vqvae-pipeline": pipeline.main,
    "vqvae-sample": sample.main,
    "vqvae-evaluate": evaluate.main,
    "vqvae-reconstruct": reconstruct.main,
    "vqvae-shards": shards.main,
}
TINY_VQVAE = (
    "trainer=debug",
    "model.net.hidden=8",
    "model.net.residual_hidden=4",
    "model.net.quantizer.num_codes=16",
    "model.net.quantizer.code_dim=4",
    "model.net.quantizer.warmup_steps=1",
)

COLD, FOLDER = sys.executable, "WARM_PYTHON"  # the variable tells pytest's workers the folder


def pytest_xdist_auto_num_workers(config):
    """One process per core for the whole suite, and no extra process for chosen tests."""
    chosen = config.args_source is not config.ArgsSource.TESTPATHS
    return 0 if chosen else len(os.sched_getaffinity(0))


def keep_bytecode(config):
    """Keep bytecode even if Python writes none: compiling is two thirds of importing torch."""
    if sys.dont_write_bytecode:
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(config.rootpath / ".pytest_cache" / "bytecode")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure(config):
    keep_bytecode(config)
    if config.getoption("numprocesses", None):
        # Each process would start one thread per core. More threads than cores wait for each other
        # by spinning, which would double the time of the tests.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform != "linux" or "COLD_PYTHON" in os.environ:
        return
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="warm")
        command = warm_python.install(Path(os.environ[FOLDER]))
        server = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(FOLDER)))
        config.add_cleanup(server.wait)
        config.add_cleanup(server.stdin.close)
    sys.executable = f"{os.environ[FOLDER]}/python"
    multiprocessing.set_executable(sys.executable)


@pytest.fixture
def cold(monkeypatch):
    """Start processes with a fresh interpreter, which imports everything again."""
    warm = sys.executable
    monkeypatch.setattr(sys, "executable", COLD)
    multiprocessing.set_executable(COLD)
    yield
    multiprocessing.set_executable(warm)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="session")
def toy_npz(tmp_path_factory) -> Path:
    """Colour images of 12x8 pixels in three classes; the position of a bright bar is the class."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 96), ("val", 24), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 60, (count, 12, 8, 3), dtype=np.uint8)
        for number, label in enumerate(labels):
            images[number, 4 * label : 4 * label + 4, :, label] += 180
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def toy(toy_npz) -> tuple[str, ...]:
    """Overrides that choose the toy data."""
    return ("dataset=npz", f"dataset.source.path={toy_npz}")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run a command in this process, in `tmp_path/run` unless it resumes another folder."""

    def run(name: str, *overrides: str, folder: Path | None = None) -> Outcome:
        place = folder or tmp_path / "run"
        resumes = any(o.startswith("resume=") and o != "resume=auto" for o in overrides)
        where = () if resumes else (f"hydra.run.dir={place}",)
        monkeypatch.setattr(sys, "argv", [name, *overrides, *where])
        monkeypatch.chdir(tmp_path)
        status = 0
        capsys.readouterr()
        try:
            COMMANDS[name]()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err, place)

    return run


def compose(config_name: str, *overrides: str, folder: Path | None = None) -> Any:
    """Compose a config as the commands do, for a run in `folder`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_resolvers()
    place = [f"folder={folder}"] if folder else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra_compose(config_name, overrides=[*overrides, *place])


@pytest.fixture(scope="session")
def checkpoints(toy_npz, tmp_path_factory) -> Path:
    """A folder with two VQ-VAEs, `vqvae0` and `vqvae1`, and a `prior` on the codes of the first."""
    from vqvae_lightning.stages.training import train

    folder = tmp_path_factory.mktemp("checkpoints")
    toy = ("dataset=npz", f"dataset.source.path={toy_npz}")
    for seed in (0, 1):
        train(compose("vqvae", *toy, *TINY_VQVAE, f"seed={seed}", folder=folder / f"vqvae{seed}"))
    prior = ("trainer=debug", "model.net.channels=8", "model.net.layers=2", "batch_size=8")
    prior += ("model.net.null_label_rate=0",)
    path = folder / "vqvae0/checkpoints/best.ckpt"
    train(compose("prior", *toy, *prior, f"vqvae_checkpoint={path}", folder=folder / "prior"))
    return folder


class Prepared(NamedTuple):
    task: Any
    survey: Any


def prepare(cfg: Any, images: Any) -> Prepared:
    """A stage, completed, built and checked as `train` does before its first step."""
    from vqvae_lightning.stages.training import build_task, complete_config, load_data, survey_stage

    data = load_data(cfg, images)
    complete_config(cfg, data)
    task = build_task(cfg)
    return Prepared(task, survey_stage(cfg, task, data))


@pytest.fixture(autouse=True)
def _isolated():
    """Seed each test, and fail a test that changes the number of threads for later tests.

    A sum over two threads differs from a sum over one in its last bits.
    """
    import torch  # imported here, because xdist's controller runs no tests and needs no torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
