"""The table of all settings of all studies."""

from collections.abc import Callable, Iterator

from pages import results
from pages.results import (
    RUNS,
    STUDIES,
    group_sweep,
    list_swept_keys,
    metric,
    read_runs,
    read_test,
)
from pages.tables import format_rows
from vqvae_lightning.report.comparison import format_gap

METRICS = {
    "nmse": "NMSE",
    "codebook_use": "codes in use",
    "perplexity": "perplexity",
    "nats_per_code": "nats per code",
    "prior_bits_per_dim": "rate, bits/dim",
    "total_bits_per_dim": "total, bits/dim",
    "real_accuracy": "accuracy, real",
    "sample_accuracy": "accuracy, samples",
    "sample_fid": "Fréchet, samples",
}
"""Columns of the table of all settings, by metric."""


def list_settings() -> Iterator[tuple[str, str, str, dict[str, tuple[float, float] | float]]]:
    """List the study, setting, seeds with commit, and metrics of each setting of all studies.

    A metric is its mean and standard deviation, or one value of a single run.
    """
    for sweep, study in STUDIES.items():
        if not (results.ROOT / study / f"{sweep}.csv").is_file():
            continue
        swept = list_swept_keys(sweep)
        for group in group_sweep(sweep):
            setting = ", ".join(
                f"{key.rpartition('.')[2]}={value}"
                for key, value in zip(swept, group.key, strict=True)
            )
            setting = setting or f"sweep={sweep}"
            commits = sorted({row["commit"][:7] for row in group.rows})
            metrics = {
                name: group.measure(metric(name))
                for name in METRICS
                if group.rows[0].get(f"test/{name}")
            }
            yield study, setting, f"{len(group.rows)}, {' '.join(commits)}", metrics
    for run, place in RUNS.items():
        study, _, part = place.partition("/")
        for data, result in read_runs(run).items():
            metrics = {
                name: read_test(result, name)
                for name in METRICS
                if f"test/{name}" in result["metrics"]
            }
            yield study, f"{part} {data}".strip(), f"1, {result['commit'][:7]}", metrics


def tabulate_settings() -> str:
    """Make the table of all settings of all studies."""
    words = ("study", "setting", "seeds, commit")
    rows = []
    for study, setting, seeds, metrics in list_settings():
        cells = [f"[{study}]({study}/README.md)", f"`{setting}`", seeds]
        for name in METRICS:
            value = metrics.get(name)
            if isinstance(value, tuple):
                cells.append(f"{value[0]:.4g} ± {format_gap(value[1])}")
            else:
                cells.append("" if value is None else f"{value:.4g}")
        rows.append(cells)
    return format_rows([*words, *METRICS.values()], rows, len(words))


TABLES = {"settings": tabulate_settings}
FIGURES: dict[str, Callable[[], None]] = {}
