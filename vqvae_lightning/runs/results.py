"""`result.json` with each metric's unit, `config.yaml`, and the curves of `metrics.csv`."""

import csv
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vqvae_lightning.files import write_text
from vqvae_lightning.units import get_unit


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
    named = {name: {"value": value, "unit": get_unit(name)} for name, value in metrics.items()}
    result = {"metrics": named, **facts, **circumstances()}
    write_text(folder / "result.json", json.dumps(result, indent=1))
    return result


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
    checkout = Path(__file__).parents[2]
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
