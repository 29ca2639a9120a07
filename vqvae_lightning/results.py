"""What a run writes down: its config, its curves, and `result.json` with each figure's unit."""

import csv
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

from vqvae_lightning.errors import InputError

FAILURE = "failure.txt"
"""What a failed job of a sweep leaves: its error, its overrides, and where the code failed."""
SECONDS = "seconds.json"
"""What an unfinished run or stage leaves: how long it has taken so far."""
UNITS = {
    "accuracy": "share of codes predicted",
    "active_dims": "latent channels",
    "auxiliary": "1",
    "auxiliary_weighted": "1",
    "bits_per_code": "bits/code",
    "code_entropy_bits": "bits/code",
    "codebook": "squared latent value",
    "codebook_drift": "share of mean row length",
    "codebook_use": "share of codes",
    "codebook_weighted": "1",
    "commitment": "squared latent value",
    "commitment_weighted": "1",
    "dead_codes": "codes",
    "entropy_nats_per_code": "nats/code",
    "histogram_bits_per_dim": "bits/dim",
    "images": "images",
    "kl": "nats per latent value",
    "kl_clamped": "nats per latent value",
    "kl_clamped_weighted": "1",
    "kl_nats_dim": "nats per latent value",
    "kl_weighted": "1",
    "learning_rate": "1",
    "loss": "1",
    "mse": "squared pixel value in [0, 1]",
    "mse_unrounded": "squared pixel value in [0, 1]",
    "nats_per_code": "nats/code",
    "nmse": "mse / variance of training pixels",
    "perplexity": "codes",
    "perplexity_batch32": "codes, mean over batches of 32 images",
    "position_nats_per_code": "nats/code, histogram per position",
    "prior_bits_per_dim": "bits/dim",
    "psnr_db": "dB",
    "psnr_per_image_db": "dB, mean over images",
    "real_accuracy": "share of images",
    "reconstruction_accuracy": "share of images",
    "reconstruction_bits_per_dim": "bits/dim",
    "reconstruction_fid": "squared distance of classifier features",
    "revived_codes": "codes",
    "sample_accuracy": "share of images",
    "sample_fid": "squared distance of classifier features",
    "ssim": "1",
    "total_bits_per_dim": "bits/dim",
    "unigram_nats_per_code": "nats/code",
    "uniform_bits_per_dim": "bits/dim",
    "uniform_nats_per_code": "nats/code",
}
"""Unit of each logged name, by its last part; a number that ends it is left out."""
LOWER = {
    "bits_per_code",
    "codebook",
    "commitment",
    "kl",
    "kl_clamped",
    "loss",
    "mse",
    "nats_per_code",
    "nmse",
    "prior_bits_per_dim",
}
HIGHER = {"accuracy", "active_dims", "codebook_use", "perplexity", "psnr_db"}
"""Names in validation that a run can be judged by, as `LOWER`; by their last part."""


def direction(name: str) -> Literal["min", "max"] | None:
    """Which value of a logged name such as `val/nmse` is the best; None if neither is."""
    last = name.rpartition("/")[2]
    if last in HIGHER:
        return "max"
    return "min" if last in LOWER else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, then renamed: a reader sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")  # Windows has another, in which none reads YAML


class Stopwatch:
    """Seconds that a run or stage has taken, over all parts into which it was interrupted.

    Args:
        folder: Folder of the run or stage, where earlier parts have left their sum.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SECONDS
        known = self._path.is_file()
        self._before = float(json.loads(self._path.read_text())["seconds"]) if known else 0.0
        self._start = perf_counter()

    @property
    def seconds(self) -> float:
        """Sum of the earlier parts and of this one until now."""
        return self._before + perf_counter() - self._start

    def keep(self) -> None:
        """Write the sum, so that it survives even if this process is killed."""
        write_text(self._path, json.dumps({"seconds": self.seconds}))

    def forget(self) -> None:
        """Delete what was kept: the result has the sum."""
        self._path.unlink(missing_ok=True)


@contextmanager
def timed(folder: Path) -> Iterator[Stopwatch]:
    """Time the block; if it does not end, keep its seconds for the next part of the same run.

    A block that refuses its input before the run has begun leaves nothing.
    """
    watch = Stopwatch(folder)
    try:
        yield watch
    except BaseException as error:
        if not isinstance(error, InputError) or (folder / "config.yaml").is_file():
            with suppress(OSError):  # such as a full disk: the first error is what counts
                watch.keep()
        raise
    watch.forget()


def write_config(cfg: Any, folder: Path) -> None:
    """`config.yaml`: the whole resolved config."""
    from omegaconf import OmegaConf

    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The `result.json` of a finished run or stage; None if there is none."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each column of a `metrics.csv`; of a run that goes on, so far."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    text = path.read_text()
    # A line without its end is one that is being written.
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                # A row carries the index of its step; the curve is over steps done.
                steps.append(float(row["step"]) + 1)
                values.append(float(value))
    return curves


def write_result(folder: Path, metrics: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Write `result.json`.

    Args:
        folder: Of the run or stage.
        metrics: Name to value; the units come from `UNITS`.
        **facts: What else belongs to the result: seed, split, number of images, seconds.

    Returns:
        What was written.
    """
    named = {name: {"value": value, "unit": unit(name)} for name, value in metrics.items()}
    result = {"metrics": named, **facts, **circumstances()}
    write_text(folder / "result.json", json.dumps(result, indent=1))
    return result


class Failure(NamedTuple):
    """Why a job of a sweep failed."""

    error: str
    overrides: list[str]


def write_failure(folder: Path, error: str, overrides: list[str], trace: str) -> None:
    """Leave `failure.txt` in a job's folder: the error in one line, and what led to it."""
    line = " ".join(error.split())
    write_text(folder / FAILURE, f"{line}\n{shlex.join(overrides)}\n\n{trace}")


def read_failure(folder: Path) -> Failure | None:
    """What `write_failure` wrote; None if the job has not failed."""
    path = folder / FAILURE
    if not path.is_file():
        return None
    error, overrides = path.read_text(encoding="utf-8").split("\n")[:2]
    return Failure(error, shlex.split(overrides))


def unit(name: str) -> str:
    """The unit of a logged name such as `val/kl_nats_dim7`."""
    last = name.rpartition("/")[2]
    return UNITS.get(last) or UNITS[last.rstrip("0123456789")]


def circumstances() -> dict[str, Any]:
    """Library versions and machine."""
    import torch

    names = ("vqvae-lightning", "torch", "torchvision", "pytorch-lightning", "hydra-core")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "gpu": gpu},
    }


def checkout_commit() -> str | None:
    """Commit of this checkout, `-dirty` if files differ from it; None for an installed wheel."""
    checkout = Path(__file__).parents[1]
    # Not the commit of another project, in whose checkout a virtual environment may lie.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return run.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
