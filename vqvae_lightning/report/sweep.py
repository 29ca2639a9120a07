"""One page and one table of a sweep, from the files in the folders of its jobs."""

import csv
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from vqvae_lightning.configs import read_config
from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.report.run import inline_png, template
from vqvae_lightning.runs.failures import FAILURE, read_failure
from vqvae_lightning.runs.results import read_curves, read_result
from vqvae_lightning.units import get_direction, get_unit

COMPARED = (
    "mse",
    "nmse",
    "psnr_db",
    "ssim",
    "perplexity",
    "codebook_use",
    "nats_per_code",
    "accuracy",
    "total_bits_per_dim",
    "sample_accuracy",
    "sample_fid",
)
"""Test metrics in the page's table; `jobs.csv` contains all metrics."""
CURVES = ("nmse", "perplexity", "codebook_use", "nats_per_code", "accuracy")
DRAWN, PICTURED = 10, 24  # numbers of best jobs that have a coloured curve, and a picture
# Keys that are not settings to compare.
OWN = (
    "folder",
    "command",
    "commit",
    "resume",
    "trust",
    "foreign",
    "vqvae_hash",
    "data_fingerprint",
)


class Job(NamedTuple):
    """A job, as read from its folder.

    Attributes:
        folder: Folder of the job.
        name: The folder, relative to the sweep's.
        state: finished, pruned (stopped early because it lagged behind), failed, or unfinished.
        note: The error, or the number of steps so far.
        chosen: Overrides of its command.
        config: Full keys of its config to values, with the job's folder written as FOLDER.
        metrics: Test metrics by name.
        objective: Best score of `monitor`, or None.
        monitor: Name of the objective.
        seconds: Duration of training and testing, or of all stages; None until it has finished.
        curves: Curves of all stages, by their names in `metrics.csv`.
        pictures: Its latest picture of reconstructions or samples; none or one.
    """

    folder: Path
    name: str
    state: str
    note: str
    chosen: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]
    objective: float | None
    monitor: str
    seconds: float | None
    curves: dict[str, tuple[list[float], list[float]]]
    pictures: list[Path]


def write_sweep_report(folder: Path) -> list[Path]:
    """Write `report.html` and `jobs.csv`, which show finished and unfinished jobs.

    Args:
        folder: Folder of the sweep, which contains the folders of its jobs.

    Returns:
        Paths of both files.

    Raises:
        InputError: If there is no job in `folder`.
    """
    from vqvae_lightning.report import plots

    jobs = read_jobs(folder)
    keys = differing(jobs)
    short = [key for key in keys if any(key in job.chosen for job in jobs)] or keys
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    shown = [name for name in names if name.rpartition("/")[2] in COMPARED]
    finished = [job for job in jobs if job.objective is not None]
    labels = {job.name: label(job, short) for job in jobs}
    drawn = [job for job in jobs if job.curves][:DRAWN]
    others = [job for job in jobs if job.curves][DRAWN:]
    monitors = list(dict.fromkeys(job.monitor for job in jobs if job.monitor))
    panels = list(dict.fromkeys([*monitors, *(f"val/{name}" for name in CURVES)]))
    panels = [name for name in panels if any(name in job.curves for job in jobs)]
    page = template("sweep.html").render(
        folder=str(folder),
        jobs=jobs,
        counts=_counts(jobs),
        keys=short,
        names=shortened(short),
        value=value,
        shown=shown,
        unit=get_unit,
        monitors=monitors,
        labels=labels,
        best=finished[0] if finished else None,
        curves=Markup(
            plots.overlaid(
                [(labels[job.name], job.curves) for job in drawn],
                [job.curves for job in others],
                [(name, get_unit(name)) for name in panels],
            )
        )
        if panels
        else "",
        panels=panels,
        others=len(others),
        pictures=[(job, inline_png(path)) for job in jobs for path in job.pictures][:PICTURED],
        commands=[(job, shlex.join(_command(job))) for job in finished[:1]],
    )
    paths = [folder / "report.html", folder / "jobs.csv"]
    write_text(paths[0], page)
    write_text(paths[1], _table(jobs, keys, names))
    return paths


def read_jobs(folder: Path) -> list[Job]:
    """Read the jobs of a sweep, the best objective first and those without one last.

    Raises:
        InputError: If there is no job in `folder`.
    """
    if (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is the folder of one run; give the sweep's, which is above it.")
    places = list(job_folders(folder))
    if not places:
        raise InputError(f"{folder} is not the folder of a sweep: there is no job in it.")
    jobs = [_read(place, folder) for place in places]
    order = {"finished": 0, "pruned": 0, "unfinished": 1, "failed": 2}
    return sorted(
        jobs,
        key=lambda job: (
            job.objective is None,
            order[job.state]
            if job.objective is None
            else -job.objective
            if get_direction(job.monitor) == "max"
            else job.objective,
        ),
    )


def job_folders(folder: Path) -> Iterator[Path]:
    """List the folders in which a job of a sweep has started or failed, 2 before 10."""
    marks = ("config.yaml", FAILURE)
    for path in sorted(folder.glob("[!.]*/"), key=_natural):
        if any((path / mark).is_file() for mark in marks):
            yield path
        else:
            yield from job_folders(path)


def differing(jobs: list[Job]) -> list[str]:
    """List the keys in which the jobs differ, the overridden ones first."""

    def differ(values: list[Any]) -> bool:
        return any(other != values[0] for other in values)

    configured = [job for job in jobs if job.config]
    keys = dict.fromkeys(key for job in configured for key in job.config)
    chosen = dict.fromkeys(key for job in jobs for key in job.chosen)
    different = [key for key in chosen if differ([value(job, key) for job in jobs])]
    different += [key for key in keys if differ([value(job, key) for job in configured])]
    return list(dict.fromkeys(different))


def value(job: Job, key: str) -> Any:
    """Get a job's value of a key from its config or else its overrides; None if neither has it."""
    return job.config[key] if key in job.config else job.chosen.get(key)


def shortened(keys: list[str]) -> dict[str, str]:
    """Shorten each key to its last part, unless another key ends in the same part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: end if list(last.values()).count(end) == 1 else key for key, end in last.items()}


def label(job: Job, keys: list[str]) -> str:
    """Describe a job for a legend by its folder and the values in which it differs."""
    given = [(name, value(job, key)) for key, name in shortened(keys).items()]
    parts = [f"{name}={_text(one)}" for name, one in given if one is not None]
    return f"{job.name}: {', '.join(parts)}" if parts else job.name


def _natural(path: Path) -> list[tuple[int, str]]:
    """Build a sort key that sorts 2 before 10."""
    return [
        (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))
    ]


def _read(folder: Path, sweep: Path) -> Job:
    config: dict[str, Any] = {}
    command: list[str] = []
    path = folder / "config.yaml"
    if path.is_file():
        stored: Any = read_config(path)
        command = shlex.split(stored["command"] or "")[1:]
        config = dict(_leaves(stored, stored["folder"]))
    result, failure = read_result(folder), read_failure(folder)
    if failure is not None and not command:
        command = failure.overrides
    stages = [folder / stage for stage in ("vqvae", "prior")]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for place in (folder, *stages):
        if (place / "metrics.csv").is_file():
            curves |= read_curves(place / "metrics.csv")
    steps = max((points[0][-1] for points in curves.values()), default=0)
    state, note = "unfinished", f"after {steps:.0f} steps"
    if result is not None:
        state = "pruned" if result.get("pruned") else "finished"
        note = f"after {result['steps']} steps" if state == "pruned" else ""
    elif failure is not None:
        state, note = "failed", failure.error
    metrics = {name: entry["value"] for name, entry in (result or {}).get("metrics", {}).items()}
    # An evaluation has no objective, so its jobs are sorted by NMSE.
    split = (result or {}).get("split")
    monitor = (result or {}).get("monitor") or (f"{split}/nmse" if split else "")
    objective = (result or {}).get("objective", metrics.get(monitor))
    seconds = (result or {}).get("seconds")
    if isinstance(seconds, dict):
        seconds = sum(seconds.values())
    pictures = [folder / "samples.png"]
    pictures = [path for path in pictures if path.is_file()]
    for place in (*stages[::-1], folder):
        pictures += sorted((place / "pictures").glob("*.png"))[-1:]
    return Job(
        folder=folder,
        name=str(folder.relative_to(sweep)),
        state=state,
        note=note,
        chosen=dict(_overrides(command)),
        config=config,
        metrics=metrics,
        objective=objective,
        monitor=monitor,
        seconds=seconds,
        curves=curves,
        pictures=pictures[:1],
    )


def _overrides(words: list[str]) -> Iterator[tuple[str, Any]]:
    from omegaconf import OmegaConf

    for word in words:
        key, equals, given = word.lstrip("+").partition("=")
        if equals and key not in OWN and not key.startswith(("hydra.", "hydra/")):
            # Parsed as in a config, where 1e-3 is a number.
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={given}"]))
            yield key, read["value"]


def _leaves(node: Any, folder: str, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            if path or key not in OWN:
                yield from _leaves(child, folder, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str):
        yield path, node.replace(folder, "FOLDER")
    else:
        yield path, node


def _command(job: Job) -> list[str]:
    return shlex.split(read_config(job.folder / "config.yaml").get("command") or "")


def _counts(jobs: list[Job]) -> str:
    states = [job.state for job in jobs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _text(given: Any) -> str:
    return f"{given:.4g}" if isinstance(given, float) else str(given)


def _table(jobs: list[Job], keys: list[str], names: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["folder", "state", "objective", "monitor", "seconds", *keys, *names, "note"],
    )
    for job in jobs:
        facts = [job.name, job.state, job.objective, job.monitor, job.seconds]
        given = [value(job, key) for key in keys]
        values = [job.metrics.get(name) for name in names]
        writer.writerow([*facts, *given, *values, job.note])
    return buffer.getvalue()
