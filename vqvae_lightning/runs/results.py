"""Files of a run: `result.json` with units, `config.yaml`, and the curves of `metrics.csv`."""

import csv
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqvae_lightning.files import write_text
from vqvae_lightning.units import get_unit

if TYPE_CHECKING:
    from omegaconf import DictConfig


def write_config(cfg: "DictConfig", folder: Path) -> None:
    """Write the whole resolved config to `config.yaml`."""
    from omegaconf import OmegaConf

    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read the `result.json` of a finished run or stage; None if there is none."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read steps and values of each column of a `metrics.csv`, even while it is being written."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    text = path.read_text()
    # A line without a newline is still being written.
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                # A row has the index of its step, but a curve is over the number of finished steps.
                steps.append(float(row["step"]) + 1)
                values.append(float(value))
    return curves


def write_result(folder: Path, metrics: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Write `result.json`.

    Args:
        folder: Folder of the run or stage.
        metrics: Name to value; the units come from `UNITS`.
        **facts: Other entries of the result, such as seed, split, number of images, seconds.

    Returns:
        The contents of the file.
    """
    named = {name: {"value": value, "unit": get_unit(name)} for name, value in metrics.items()}
    result = {"metrics": named, **facts, **describe_environment()}
    write_text(folder / "result.json", json.dumps(result, indent=1))
    return result


def describe_environment() -> dict[str, Any]:
    """Collect the versions of libraries, and the machine's processor, threads and GPU."""
    import torch

    names = ("vqvae-lightning", "torch", "torchvision", "pytorch-lightning", "hydra-core")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "machine": {"processor": _read_processor(), "threads": torch.get_num_threads(), "gpu": gpu},
    }


def read_commit() -> str | None:
    """Read this checkout's commit, with `-dirty` if files differ; None for an installed wheel."""
    checkout = Path(__file__).parents[2]
    # A virtual environment may be in the checkout of another project, whose commit is not meant.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return run.stdout.strip()


def _read_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
