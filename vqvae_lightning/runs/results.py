"""The files that describe a run: `config.yaml`, `result.json` and `metrics.csv`."""

import csv
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from vqvae_lightning.files import write_text
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.units import get_unit

if TYPE_CHECKING:
    from omegaconf import DictConfig


def write_config(cfg: "DictConfig", folder: Path) -> None:
    """Write the whole resolved config as `config.yaml`."""
    write_text(RunFolder(folder).config, OmegaConf.to_yaml(cfg, resolve=True))


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read the `result.json` of a run or stage; None if it has not finished."""
    path = RunFolder(folder).result
    return json.loads(path.read_text()) if path.is_file() else None


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Read the steps and values of each column of a `metrics.csv`, which may still be growing."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    text = path.read_text()
    # A last line without a line break is still being written.
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, values = curves.setdefault(name, ([], []))
                # A row has the index of its step; a curve is over the number of steps done.
                steps.append(float(row["step"]) + 1)
                values.append(float(value))
    return curves


def write_result(folder: Path, metrics: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Write `result.json`.

    Args:
        folder: Folder of the run or stage.
        metrics: Values by name; `units.get_unit` adds their units.
        **facts: Everything else that describes the result, such as seed, split, number of images
            and seconds.

    Returns:
        The contents of the file.
    """
    named = {name: {"value": value, "unit": get_unit(name)} for name, value in metrics.items()}
    result = {"metrics": named, **facts, **describe_machine()}
    write_text(RunFolder(folder).result, json.dumps(result, indent=1))
    return result


def describe_machine() -> dict[str, Any]:
    """Versions of the libraries, processor, number of threads and GPU."""
    import torch  # reading results must not need it

    names = ("vqvae-lightning", "torch", "torchvision", "pytorch-lightning", "hydra-core")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "machine": {"processor": _name_processor(), "threads": torch.get_num_threads(), "gpu": gpu},
    }


def find_commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ; None for an installed wheel."""
    checkout = Path(__file__).parents[2]
    # Without this check, git would find the commit of a project whose virtual environment contains
    # this package.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        run = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None
    return run.stdout.strip()


def _name_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
