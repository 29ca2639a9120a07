"""The jobs of a sweep, read from their folders."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vqvae_lightning.configs import read_config
from vqvae_lightning.errors import InputError
from vqvae_lightning.runs.failures import read_failure
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_curves, read_result
from vqvae_lightning.units import get_direction

OWN_KEYS = (
    "folder",
    "command",
    "commit",
    "resume",
    "trust",
    "foreign",
    "vqvae_hash",
    "data_fingerprint",
)
"""Keys of a config that are not settings to compare."""


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
        commit: Git commit that the job ran on, if the code was in a checkout.
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
    commit: str | None
    curves: dict[str, tuple[list[float], list[float]]]
    pictures: list[Path]


def read_jobs(folder: Path) -> list[Job]:
    """Read the jobs of a sweep, the best objective first and those without one last.

    Raises:
        InputError: If there is no job in `folder`.
    """
    if RunFolder(folder).is_begun:
        raise InputError(f"{folder} is the folder of one run; give the sweep's, which is above it.")
    places = list(list_job_folders(folder))
    if not places:
        raise InputError(f"{folder} is not the folder of a sweep: there is no job in it.")
    jobs = [_read_job(place, folder) for place in places]
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


def list_job_folders(folder: Path) -> Iterator[Path]:
    """List the folders in which a job of a sweep has started or failed, 2 before 10."""
    for path in sorted(folder.glob("[!.]*/"), key=_split_numbers):
        if RunFolder(path).is_begun or RunFolder(path).failure.is_file():
            yield path
        else:
            yield from list_job_folders(path)


def _split_numbers(path: Path) -> list[tuple[int, str]]:
    """Split a path into words and numbers: a sort key that puts 2 before 10."""
    return [
        (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))
    ]


def _read_job(folder: Path, sweep: Path) -> Job:
    """Read a job of the folder `sweep`, whatever state it is in."""
    config: dict[str, Any] = {}
    command: list[str] = []
    run = RunFolder(folder)
    if run.is_begun:
        stored: Any = read_config(run.config)
        command = shlex.split(stored["command"] or "")[1:]
        config = dict(flatten_config(stored, stored["folder"]))
    result, failure = read_result(folder), read_failure(folder)
    if failure is not None and not command:
        command = failure.overrides
    stages = [run.stage(name) for name in ("vqvae", "prior")]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for place in (run, *stages):
        if place.metrics.is_file():
            curves |= read_curves(place.metrics)
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
    pictures = [path for path in [run.samples_picture] if path.is_file()]
    for place in (*stages[::-1], run):
        pictures += sorted(place.pictures.glob("*.png"))[-1:]
    return Job(
        folder=folder,
        name=str(folder.relative_to(sweep)),
        state=state,
        note=note,
        chosen=dict(_parse_overrides(command)),
        config=config,
        metrics=metrics,
        objective=objective,
        monitor=monitor,
        seconds=seconds,
        commit=(result or {}).get("commit"),
        curves=curves,
        pictures=pictures[:1],
    )


def _parse_overrides(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Parse the words of a command to keys and values, without Hydra's own keys."""
    for word in words:
        key, equals, given = word.lstrip("+").partition("=")
        if equals and key not in OWN_KEYS and not key.startswith(("hydra.", "hydra/")):
            # Parsed as in a config, where 1e-3 is a number.
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={given}"]))
            yield key, read["value"]


def flatten_config(node: Any, folder: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """List the full keys and values of a config, with `folder` written as FOLDER."""
    if isinstance(node, dict):
        for key, child in node.items():
            if path or key not in OWN_KEYS:
                yield from flatten_config(child, folder, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str):
        yield path, node.replace(folder, "FOLDER")
    else:
        yield path, node
