"""Raw results of the studies: the jobs of each sweep, their curves, and single runs."""

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vqvae_lightning.configs import CONF_DIR

ROOT = Path(__file__).parents[1]
STUDIES = {
    "quantizers": "quantizers",
    "quantizers_4096": "quantizers",
    "quantizers_cifar10": "quantizers",
    "quantizers_cifar10_4096": "quantizers",
    "codebook_size": "codebook_size",
    "commitment": "training_dynamics",
    "collapse": "training_dynamics",
    "dynamics": "training_dynamics",
    "decay": "training_dynamics",
    "learning_rate": "training_dynamics",
    "posterior_collapse": "posterior_collapse",
    "beta": "posterior_collapse",
    "sonnet_cifar10": "reference_settings",
    "recipe_cifar10": "reference_settings",
}
"""Study of each sweep."""
RUNS = {
    "bits_per_dim": "bits_per_dim",
    "sqvae": "reference_settings/sqvae",
    "hour": "reference_settings/hour",
}
"""Folder of the results of single runs, by their config's `study`."""
TITLES = {
    "MNIST": "MNIST",
    "FashionMNIST": "Fashion-MNIST",
    "CIFAR10": "CIFAR-10",
    "cifar10": "CIFAR-10",
}
"""Names of data sets in tables and figures."""
DRIFT = "val/codebook_drift"
VALIDATION = "val/nmse"
CURVES = (
    "train/commitment",
    "train/latent_power",
    "train/nmse",
    "train/perplexity",
    DRIFT,
    "train/codebook",
    "train/codebook_use",
    "train/revived_codes",
)
SWEEPS_WITH_CURVES = {
    "commitment": 1,
    "dynamics": 1,
    "decay": 1,
    "sonnet_cifar10": 100,
    "recipe_cifar10": 100,
}
"""Number of logged steps whose mean is stored as one, by sweep."""
BASELINES = {"commitment": 1, "decay": 2, "learning_rate": 3}
"""Row of the default recipe in the table of a sweep."""

Row = dict[str, str]


class Group(NamedTuple):
    """Jobs that differ only in their seed."""

    key: tuple[str, ...]
    rows: list[Row]

    def measure(self, value: Callable[[Row], float]) -> tuple[float, float]:
        """Compute mean and standard deviation (n - 1) over the seeds."""
        values = [value(row) for row in self.rows]
        return statistics.fmean(values), statistics.stdev(values)


def read_rows(sweep: str) -> list[Row]:
    """Read the jobs of a sweep; each must have finished."""
    path = ROOT / STUDIES[sweep] / f"{sweep}.csv"
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing: run sweep={sweep}, then studies.py FOLDER.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    unfinished = [row["folder"] for row in rows if row["state"] != "finished"]
    if unfinished:
        raise SystemExit(f"error: jobs {', '.join(unfinished)} of {sweep} have not finished.")
    return rows


def read_runs(name: str) -> dict[str, dict[str, Any]]:
    """Read the `result.json` of each run of a key of `RUNS`, by data set."""
    paths = sorted((ROOT / RUNS[name]).glob("*.json"))
    return {TITLES[path.stem]: json.loads(path.read_text()) for path in paths}


def read_test(result: dict[str, Any], name: str) -> float:
    """Read a test metric of a run."""
    return float(result["metrics"][f"test/{name}"]["value"])


def group_sweep(sweep: str) -> list[Group]:
    """Group the jobs of a sweep by what its preset varies, except the seed."""
    return group_rows(read_rows(sweep), *list_swept_keys(sweep))


def group_rows(rows: Sequence[Row], *keys: str) -> list[Group]:
    """Group jobs by the values of `keys`, in the order of the sweep."""
    ordered = sorted(rows, key=lambda row: int(row["folder"]))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in ordered:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [Group(key, found) for key, found in groups.items()]


def list_swept_keys(sweep: str) -> list[str]:
    """List the keys that a sweep's preset varies, except the seed."""
    preset: Any = OmegaConf.load(CONF_DIR / "sweep" / f"{sweep}.yaml")
    return [key for key in preset.hydra.sweeper.params if key != "seed"]


def reader(name: str) -> Callable[[Row], float]:
    """Return the function that reads a number of a row."""
    return lambda row: float(row[name])


def metric(name: str) -> Callable[[Row], float]:
    """Return the function that reads a test metric of a job."""
    return reader(f"test/{name}")


def read_curves_of(sweep: str) -> dict[str, list[Row]]:
    """Read the curves of each job of a sweep, by the job's folder."""
    found: dict[str, list[Row]] = {}
    with (ROOT / STUDIES[sweep] / f"{sweep}_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["folder"], []).append(row)
    return found


def at_end(sweep: str, value: Callable[[Row], float]) -> Callable[[Row], float]:
    """Return the function that measures the last stored point of a job's curves."""
    ends = {folder: rows[-1] for folder, rows in read_curves_of(sweep).items()}
    return lambda row: value(ends[row["folder"]])


def average_curve(
    rows: Sequence[Row],
    curves: dict[str, list[Row]],
    value: Callable[[Row], float],
    needs: str = CURVES[0],
) -> tuple[list[int], list[float]]:
    """Average a curve over jobs, at the steps at which all of them have logged `needs`."""
    found = [{int(p["step"]): value(p) for p in curves[r["folder"]] if p[needs]} for r in rows]
    steps = sorted(set.intersection(*map(set, found)))
    return steps, [statistics.fmean(one[step] for one in found) for step in steps]
