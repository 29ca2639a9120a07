"""Make the tables and figures of the studies from the results of their sweeps.

    uv run python experiments/studies.py [FOLDER ...]

FOLDER is the folder of a finished sweep, or of a single run of `RUNS`. Its results are copied
into the folder of its study first: `<sweep>.csv` has a row per job, `<sweep>_curves.csv` the curves
of the jobs, `<data set>.json` is the `result.json` of a run, and `<data set>.csv` has the
validation errors of one training. Then the figures are drawn and the tables are written into the
study's README, between the lines `<!-- table NAME -->` and `<!-- end -->`. Without FOLDER, all
tables and figures are made again.

A table has the mean and the standard deviation (n - 1) over the seeds. `=` marks a mean that lies
within twice the larger deviation of the baseline, which is the first row unless the page names
another: such a gap is not called a difference.
"""

import argparse
import csv
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import FIGURES, TABLES, results
from pages.results import CURVES, RUNS, STUDIES, SWEEPS_WITH_CURVES, VALIDATION, read_runs
from rich.console import Console

from vqvae_lightning.configs import read_config
from vqvae_lightning.report.jobs import list_job_folders
from vqvae_lightning.report.sweep import write_sweep_report
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_curves


def collect(folder: Path) -> str:
    """Copy the results of a finished sweep or run into the folder of its study.

    Returns:
        The study.

    Raises:
        SystemExit: If it belongs to no study.
    """
    run = RunFolder(folder)
    config = read_config(run.config) if run.is_finished else {}
    if config.get("study") in RUNS:
        result = json.loads(run.result.read_text())
        # Without the folders of the machine that ran it.
        result["command"] = re.sub(r"=\S*/", "=", config["command"])
        text = json.dumps(result, indent=1).replace(f"{config['folder']}/", "")
        place = RUNS[config["study"]]
        stored = results.ROOT / place / f"{name_data(config['dataset']['source'])}.json"
        stored.parent.mkdir(exist_ok=True)
        stored.write_text(text + "\n")
        if run.metrics.is_file():  # of a training; the stages of a pipeline have their own
            errors = read_curves(run.metrics)[VALIDATION]
            lines = [f"{step:.0f},{error!r}" for step, error in zip(*errors, strict=True)]
            stored.with_suffix(".csv").write_text("\n".join([f"step,{VALIDATION}", *lines, ""]))
        return place.partition("/")[0]
    jobs = list(list_job_folders(folder))
    sweep = read_config(RunFolder(jobs[0]).config)["study"] if jobs else None
    if sweep not in STUDIES:
        raise SystemExit(f"error: {folder} is not a sweep of {', '.join(STUDIES)}.")
    place = results.ROOT / STUDIES[sweep]
    check_page(STUDIES[sweep])
    write_sweep_report(folder)
    shutil.copy(RunFolder(folder).jobs, place / f"{sweep}.csv")
    if sweep in SWEEPS_WITH_CURVES:
        with (place / f"{sweep}_curves.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["folder", "step", *CURVES])
            window = SWEEPS_WITH_CURVES[sweep]
            writer.writerows(row for job in jobs for row in list_points(job, folder, window))
    return STUDIES[sweep]


def check_page(study: str) -> None:
    """Check that a study has a page with a place for each table.

    Raises:
        SystemExit: If it has not; nothing is written then.
    """
    page = results.ROOT / study / "README.md"
    text = page.read_text() if page.is_file() else ""
    for name in TABLES[study]:
        if f"<!-- table {name} -->" not in text:
            raise SystemExit(
                f"error: experiments/{study}/README.md needs a place for its table: "
                f"<!-- table {name} --> and <!-- end -->."
            )


def name_data(source: dict[str, Any]) -> str:
    """Name the data set of a run: its class in torchvision, or its file."""
    target = source.get("dataset", {}).get("_target_", "").rpartition(".")[2]
    return target or Path(source["path"]).stem


def list_points(job: Path, folder: Path, window: int) -> Iterator[list[str]]:
    """List the folder, step and values of a job's curves: means over `window` logged steps each.

    A step without one of the values, as in a warm-up, does not count for it. The last steps are
    left out if they do not fill a window.
    """
    curves = read_curves(RunFolder(job).metrics)
    points = {name: dict(zip(*curves.get(name, ([], [])), strict=True)) for name in CURVES}
    steps = sorted({step for found in points.values() for step in found})
    for start in range(0, len(steps) - window + 1, window):
        chunk = steps[start : start + window]
        found = [[points[name][s] for s in chunk if s in points[name]] for name in CURVES]
        values = [f"{statistics.fmean(known):.6g}" if known else "" for known in found]
        yield [str(job.relative_to(folder)), f"{chunk[-1]:.0f}", *values]


def list_stored() -> list[str]:
    """List the studies whose raw results are stored."""
    missing = {
        study
        for sweep, study in STUDIES.items()
        if not (results.ROOT / study / f"{sweep}.csv").is_file()
    }
    found = [study for study in STUDIES.values() if study not in missing]
    found += [place for name, place in RUNS.items() if read_runs(name) and place in TABLES]
    return list(dict.fromkeys(found))


def fill_tables(study: str) -> str:
    """Return the study's README with its tables made again; `.` is the page of all studies."""
    check_page(study)
    text = (results.ROOT / study / "README.md").read_text()
    for name, tabulate in TABLES[study].items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        table = tabulate()
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Copy the results of the given sweeps, then make all tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of finished sweeps")
    folders: list[Path] = parser.parse_args().folders
    studies = list(dict.fromkeys(map(collect, folders))) or list_stored()
    for study in [*studies, "."]:
        (results.ROOT / study / "README.md").write_text(fill_tables(study))
        for draw in FIGURES[study].values():
            draw()
        Console().print(f"experiments/{study}", highlight=False)


if __name__ == "__main__":
    main()
