"""One table of several runs: their metrics, differences, and spread over seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from vqvae_lightning.configs import read_config
from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.report.jobs import OWN_KEYS, flatten_config
from vqvae_lightning.report.run import load_template
from vqvae_lightning.report.sweep import COMPARED
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_result
from vqvae_lightning.units import get_unit

JUDGED = ("*_accuracy", "reconstruction_fid", "sample_fid")
"""Metrics that depend on the classifier of an evaluation."""
CHECKPOINTS = ("vqvae_checkpoint", "prior_checkpoint")


class Measured(NamedTuple):
    """Metrics of a run on one split of its data.

    Attributes:
        name: The folder, as given.
        seed: Seed of the run that was measured.
        settings: Keys of the configs of the run and of its checkpoints to values, without seeds.
        metrics: Values by name.
        facts: Data fingerprint, split, numbers of images and samples, and hash of the classifier.
        weights: Hashes of the files of weights that the user gave, by their key.
    """

    name: str
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, float]
    facts: dict[str, Any]
    weights: dict[str, str]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: Folder of the run, or folders of the runs that differ only in their seed.
        seeds: Seeds of these runs.
        metrics: Values, or means over the seeds.
        deviations: Standard deviations over the seeds (n - 1); empty for a single run.
        differences: Values minus those of the first run; empty for groups and the first run.
    """

    name: str
    seeds: list[int]
    metrics: dict[str, float]
    deviations: dict[str, float]
    differences: dict[str, float]


def read_measured(folder: Path) -> Measured:
    """Read the metrics of a pipeline, an evaluation, or a training run.

    Raises:
        InputError: If the run has no result, or its result has no metrics of a split.
    """
    run = RunFolder(folder)
    if not run.is_begun:
        raise InputError(f"{folder} is not the folder of a run: it has no config.yaml.")
    config = read_config(run.config)
    place = run.stage("evaluation") if config.get("kind") == "pipeline" else run
    result = read_result(place.path)
    if result is None:
        raise InputError(f"{folder} has not finished: it has no {place.result}.")
    metrics = {name: entry["value"] for name, entry in result["metrics"].items()}
    splits = {name.partition("/")[0] for name in metrics if "/" in name}
    if len(splits) != 1:
        raise InputError(f"{folder} has no metrics of a split to compare.")
    configs = {"": (config, run)}
    for key in CHECKPOINTS:
        # The settings that an evaluation compares are those of the runs it evaluates.
        path = config.get(key) or (result.get(key) if place is run else None)
        source = RunFolder(Path(path).parents[1]) if path else None
        if source is not None and source.is_begun:
            configs[f"{key.removesuffix('_checkpoint')}."] = (read_config(source.config), source)
    settings = {
        prefix + key: value
        for prefix, (stored, _) in configs.items()
        for key, value in flatten_config(stored, str(stored.get("folder")))
        if key.rpartition(".")[2] != "seed" and key not in (*OWN_KEYS, *CHECKPOINTS, "run")
    }
    first = next((stored for prefix, (stored, _) in configs.items() if prefix), config)
    facts = {
        "data fingerprint": result.get("data_fingerprint") or config.get("data_fingerprint"),
        "split": splits.pop(),
        "images": result.get("images"),
        "samples": result.get("samples"),
        "classifier": result.get("classifier"),
    }
    return Measured(
        str(folder), int(first["seed"]), settings, metrics, facts, result.get("weights", {})
    )


def check_comparable(runs: Sequence[Measured]) -> list[str]:
    """Check that the runs were measured on the same images.

    Returns:
        Warnings about metrics that do not compare, one per line.

    Raises:
        InputError: If data or splits differ; it names both runs and values.
    """
    first, *others = runs
    for name in ("data fingerprint", "split"):
        for run in others:
            if run.facts[name] != first.facts[name]:
                raise InputError(
                    f"{first.name} was measured on {name} {first.facts[name]}, and {run.name} on "
                    f"{run.facts[name]}: evaluate both on the same images."
                )
    warnings = []
    judged = {run.facts["classifier"] for run in runs if run.facts["classifier"]}
    if len(judged) > 1:
        warnings.append(
            f"{', '.join(JUDGED)} come from different classifiers: evaluate all runs with "
            "classifier_seed=0."
        )
    for key in sorted({key for run in runs for key in run.weights}):
        hashes = sorted({run.weights[key] for run in runs if key in run.weights})
        if len(hashes) > 1:
            warnings.append(
                f"*{key}* come from different weights: {', '.join(hashes)}; evaluate all runs with "
                f"the same file in weights.{key}."
            )
    counts = {run.facts["samples"] for run in runs if run.facts["samples"]}
    if len(counts) > 1:
        listed = ", ".join(map(str, sorted(counts)))
        warnings.append(f"sample_* come from different numbers of samples: {listed}.")
    return warnings


def arrange_rows(runs: Sequence[Measured]) -> list[Row]:
    """Arrange one row per run, then one per group of runs that differ only in their seed."""
    first, rows = runs[0], []
    for run in runs:
        shared = run.metrics.keys() & first.metrics.keys() if run is not first else ()
        differences = {name: run.metrics[name] - first.metrics[name] for name in shared}
        rows.append(Row(run.name, [run.seed], run.metrics, {}, differences))
    remaining = list(runs)
    while remaining:
        # One run per seed: a repeated run would make the spread look smaller.
        alike = {
            run.seed: run for run in reversed(remaining) if run.settings == remaining[0].settings
        }
        remaining = [run for run in remaining if run.settings != remaining[0].settings]
        if len(alike) < 2:
            continue
        group = [alike[seed] for seed in sorted(alike)]
        names = [name for name in group[0].metrics if all(name in run.metrics for run in group)]
        columns = {name: [run.metrics[name] for run in group] for name in names}
        rows.append(
            Row(
                ", ".join(run.name for run in group),
                sorted(alike),
                {name: statistics.fmean(values) for name, values in columns.items()},
                {name: statistics.stdev(values) for name, values in columns.items()},
                {},
            )
        )
    return rows


def compare_runs(folders: Sequence[Path], output: Path) -> tuple[Table, list[str], list[Path]]:
    """Compare runs, and write `comparison.html` and `comparison.csv`.

    Args:
        folders: Folders of the runs; differences are to the first.
        output: Folder of both files.

    Returns:
        A table of the main metrics, warnings, and the paths of both files.

    Raises:
        InputError: If a run has no metrics, or the runs were measured on different images.
    """
    runs = [read_measured(folder) for folder in folders]
    warnings = check_comparable(runs)
    rows = arrange_rows(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    facts = {name: value for name, value in runs[0].facts.items() if value is not None}
    page = load_template("comparison.html").render(
        rows=rows,
        names=names,
        unit=get_unit,
        cell=_format_cell,
        warnings=warnings,
        facts=facts,
        first=runs[0].name,
    )
    paths = [output / "comparison.html", output / "comparison.csv"]
    write_text(paths[0], page)
    write_text(paths[1], _format_csv(rows, names))
    shown = [name for name in names if name.rpartition("/")[2] in COMPARED]
    return _make_table(rows, shown), warnings, paths


def _make_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    table = Table(title="comparison", title_justify="left")
    for title in ("run", "seeds"):
        table.add_column(title, overflow="fold")
    for name in names:
        table.add_column(f"{name}\n{get_unit(name)}", justify="right", overflow="fold")
    for row in rows:
        cells = [_format_cell(row, name) for name in names]
        table.add_row(row.name, _format_seeds(row), *cells)
    return table


def _format_seeds(row: Row) -> str:
    return f"n = {len(row.seeds)}" if row.deviations else str(row.seeds[0])


def _format_cell(row: Row, name: str) -> str:
    if name not in row.metrics:
        return "-"
    value = f"{row.metrics[name]:.5g}"
    if name in row.deviations:
        return f"{value} ± {format_gap(row.deviations[name])}"
    if name in row.differences:
        return f"{value} ({format_gap(row.differences[name], sign='+')})"
    return value


def format_gap(gap: float, sign: str = "-") -> str:
    """Format a deviation or a difference with two significant figures.

    From 10 on it is a whole number: the perplexity of a large codebook deviates by 104, not 1e+02.

    Args:
        gap: The value, in any unit.
        sign: `+` for a sign before positive values too.
    """
    return f"{gap:{sign}.0f}" if abs(gap) >= 10 else f"{gap:{sign}.2g}"


def _format_csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    kinds = ("", " minus first", " standard deviation")
    writer.writerow(["run", "seeds", *(name + kind for name in names for kind in kinds)])
    for row in rows:
        parts = (row.metrics, row.differences, row.deviations)
        values = [part.get(name) for name in names for part in parts]
        writer.writerow([row.name, " ".join(map(str, row.seeds)), *values])
    return buffer.getvalue()
