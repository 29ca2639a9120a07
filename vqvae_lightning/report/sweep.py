"""One page and one table of a sweep, from the files in the folders of its jobs."""

import csv
import io
import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vqvae_lightning.configs import read_config
from vqvae_lightning.files import write_text
from vqvae_lightning.report.jobs import Job, read_jobs
from vqvae_lightning.report.plots import plot_runs
from vqvae_lightning.report.run import inline_png, load_template
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.units import get_unit

COMPARED = (
    "mse",
    "nmse",
    "psnr_db",
    "nll_nats_per_dim",
    "ssim",
    "perplexity",
    "codebook_use",
    "nats_per_code",
    "accuracy",
    "total_bits_per_dim",
    "sample_accuracy",
    "sample_fid",
    "reconstruction_efficientnet_distance",
    "sample_efficientnet_frechet",
)
"""Test metrics in the page's table; `jobs.csv` contains all metrics."""
CURVES = ("nmse", "perplexity", "codebook_use", "nats_per_code", "accuracy")
DRAWN, PICTURED = 10, 24  # numbers of best jobs that have a coloured curve, and a picture


def write_sweep_report(folder: Path) -> list[Path]:
    """Write `report.html` and `jobs.csv`, which show finished and unfinished jobs.

    Args:
        folder: Folder of the sweep, which contains the folders of its jobs.

    Returns:
        Paths of both files.

    Raises:
        InputError: If there is no job in `folder`.
    """
    jobs = read_jobs(folder)
    keys = list_differing_keys(jobs)
    short = keep_chosen(keys, jobs) or keys
    names = list(dict.fromkeys(name for job in jobs for name in job.metrics))
    shown = [name for name in names if name.rpartition("/")[2] in COMPARED]
    finished = [job for job in jobs if job.objective is not None]
    labels = {job.name: label_job(job, short) for job in jobs}
    drawn = [job for job in jobs if job.curves][:DRAWN]
    others = [job for job in jobs if job.curves][DRAWN:]
    monitors = list(dict.fromkeys(job.monitor for job in jobs if job.monitor))
    panels = list(dict.fromkeys([*monitors, *(f"val/{name}" for name in CURVES)]))
    panels = [name for name in panels if any(name in job.curves for job in jobs)]
    page = load_template("sweep.html").render(
        folder=str(folder),
        jobs=jobs,
        counts=_count_states(jobs),
        keys=short,
        names=shorten_keys(short),
        value=get_value,
        shown=shown,
        splits=sorted({name.partition("/")[0] for name in shown}),
        unit=get_unit,
        monitors=monitors,
        labels=labels,
        best=finished[0] if finished else None,
        curves=Markup(
            plot_runs(
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
        commands=[(job, shlex.join(_read_command(job))) for job in finished[:1]],
    )
    paths = [RunFolder(folder).report, RunFolder(folder).jobs]
    write_text(paths[0], page)
    write_text(paths[1], _format_table(jobs, keys, names))
    return paths


def list_differing_keys(jobs: list[Job]) -> list[str]:
    """List the keys in which the jobs differ, the overridden ones first."""

    def differ(values: list[Any]) -> bool:
        return any(other != values[0] for other in values)

    configured = [job for job in jobs if job.config]
    keys = dict.fromkeys(key for job in configured for key in job.config)
    chosen = dict.fromkeys(key for job in jobs for key in job.chosen)
    different = [key for key in chosen if differ([get_value(job, key) for job in jobs])]
    different += [key for key in keys if differ([get_value(job, key) for job in configured])]
    return list(dict.fromkeys(different))


def keep_chosen(keys: list[str], jobs: list[Job]) -> list[str]:
    """Keep the keys that the command of a job overrides."""
    return [key for key in keys if any(key in job.chosen for job in jobs)]


def get_value(job: Job, key: str) -> Any:
    """Get a job's value of a key from its config or else its overrides; None if neither has it."""
    return job.config[key] if key in job.config else job.chosen.get(key)


def shorten_keys(keys: list[str]) -> dict[str, str]:
    """Shorten each key to its last part, unless another key ends in the same part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: end if list(last.values()).count(end) == 1 else key for key, end in last.items()}


def label_job(job: Job, keys: list[str]) -> str:
    """Describe a job for a legend by its folder and the values in which it differs."""
    given = [(name, get_value(job, key)) for key, name in shorten_keys(keys).items()]
    parts = [f"{name}={_format_value(one)}" for name, one in given if one is not None]
    return f"{job.name}: {', '.join(parts)}" if parts else job.name


def _read_command(job: Job) -> list[str]:
    return shlex.split(read_config(RunFolder(job.folder).config).get("command") or "")


def _count_states(jobs: list[Job]) -> str:
    states = [job.state for job in jobs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _format_value(given: Any) -> str:
    return f"{given:.4g}" if isinstance(given, float) else str(given)


def _format_table(jobs: list[Job], keys: list[str], names: list[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["folder", "state", "objective", "monitor", "seconds", "commit", *keys, *names, "note"],
    )
    for job in jobs:
        facts = [job.name, job.state, job.objective, job.monitor, job.seconds, job.commit]
        given = [get_value(job, key) for key in keys]
        values = [job.metrics.get(name) for name in names]
        writer.writerow([*facts, *given, *values, job.note])
    return buffer.getvalue()
