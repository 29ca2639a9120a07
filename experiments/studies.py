"""Make the tables and figures of the studies from the results of their sweeps.

    uv run python experiments/studies.py [FOLDER ...]

FOLDER is the folder of a finished sweep, or of a pipeline of the study `bits_per_dim`. Its results
are copied into the folder of its study first: `<sweep>.csv` has a row per job, `<sweep>_curves.csv`
the curves of the jobs, and `<data set>.json` is the `result.json` of a pipeline. Then the figures
are drawn and the tables are written into the study's README, between the lines
`<!-- table NAME -->` and `<!-- end -->`. Without FOLDER, all tables and figures are made again.

A table has the mean and the standard deviation (n - 1) over the seeds. `=` marks a mean that lies
within twice the larger deviation of the baseline, which is the first row unless the page names
another: such a gap is not called a difference.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from omegaconf import OmegaConf
from rich.console import Console

from vqvae_lightning.configs import CONF_DIR, read_config
from vqvae_lightning.report.jobs import list_job_folders
from vqvae_lightning.report.sweep import write_sweep_report
from vqvae_lightning.runs.folder import RunFolder
from vqvae_lightning.runs.results import read_curves

ROOT = Path(__file__).parent
STUDIES = {
    "quantizers": "quantizers",
    "quantizers_4096": "quantizers",
    "codebook_size": "codebook_size",
    "commitment": "training_dynamics",
    "collapse": "training_dynamics",
    "dynamics": "training_dynamics",
    "decay": "training_dynamics",
    "learning_rate": "training_dynamics",
    "posterior_collapse": "posterior_collapse",
    "sonnet_cifar10": "reference_settings",
    "recipe_cifar10": "reference_settings",
}
"""Study of each sweep."""
DRIFT = "val/codebook_drift"
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
BITS = "bits_per_dim"
"""Study of single pipelines."""
BASELINES = {"commitment": 1, "decay": 2, "learning_rate": 3}
"""Row of the default recipe in the table of a sweep."""
NO_CURE = ("uniform", "0", "0.0")
TITLES = {"FashionMNIST": "Fashion-MNIST", "cifar10": "CIFAR-10", "CIFAR10": "CIFAR-10"}
"""Names of data sets in tables and figures."""
KEY = "model.net.quantizer."
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
PIXELS = 28 * 28
plt.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})

Row = dict[str, str]


class Column(NamedTuple):
    """A column of a table: its title, its value for a job, and how to print it."""

    title: str
    value: Callable[[Row], float]
    format: str = ".4f"


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
    with (ROOT / STUDIES[sweep] / f"{sweep}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    unfinished = [row["folder"] for row in rows if row["state"] != "finished"]
    if unfinished:
        raise SystemExit(f"error: jobs {', '.join(unfinished)} of {sweep} have not finished.")
    return rows


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


def metric(name: str) -> Callable[[Row], float]:
    """Return the function that reads a test metric of a job."""
    return lambda row: float(row[f"test/{name}"])


def nats_per_position(row: Row) -> float:
    """Cost of all codes of a position under the prior, which compares several codes with one."""
    positions = 49
    return float(row["test/prior_bits_per_dim"]) * PIXELS * math.log(2) / positions


def is_within_spread(mean: float, deviation: float, other: float, others: float) -> bool:
    """Tell whether two means are closer than twice the larger of their deviations."""
    return abs(mean - other) <= 2 * max(deviation, others)


def format_mean(group: Group, column: Column) -> str:
    """Format mean and standard deviation of a column over the seeds."""
    mean, deviation = group.measure(column.value)
    return f"{mean:{column.format}} ± {deviation:{column.format}}"


def format_table(
    titles: Sequence[str], groups: Sequence[Group], columns: Sequence[Column], baseline: int = 0
) -> str:
    """Format a Markdown table with a row per group; `=` marks equality with row `baseline`."""
    lines = [
        f"| {' | '.join([*titles, *(column.title for column in columns)])} |",
        f"|{' --- |' * len(titles)}{' ---: |' * len(columns)}",
    ]
    for number, group in enumerate(groups):
        cells = [f"`{value}`" for value in group.key]
        for column in columns:
            same = number != baseline and is_within_spread(
                *group.measure(column.value), *groups[baseline].measure(column.value)
            )
            cells.append(f"{format_mean(group, column)}{' =' if same else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the studies ---

NMSE = Column("test NMSE", metric("nmse"))
USE = Column("codes in use", metric("codebook_use"), ".1%")
PERPLEXITY = Column("perplexity", metric("perplexity"), ".0f")


def group_quantizers(sweep: str) -> list[Group]:
    """Group the jobs of a sweep over quantizers."""
    return group_rows(read_rows(sweep), *list_swept_keys(sweep))


def tabulate_quantizers(sweep: str) -> str:
    """Make the table of a sweep over quantizers."""
    columns = [
        NMSE,
        USE,
        PERPLEXITY,
        Column("prior, nats per position", nats_per_position, ".2f"),
        Column("rate, bits/dim", metric("prior_bits_per_dim")),
        Column("accuracy of samples", metric("sample_accuracy"), ".1%"),
        Column("Fréchet distance of samples", metric("sample_fid"), ".1f"),
        Column("seconds", lambda row: float(row["seconds"]), ".0f"),
    ]
    return format_table(["`quantizer=`"], group_quantizers(sweep), columns)


def draw_quantizers(sweep: str) -> None:
    """Draw error, cost of the codes and accuracy of the samples of each quantizer."""
    groups = group_quantizers(sweep)[::-1]
    panels = [
        ("test NMSE", metric("nmse")),
        ("prior, nats per position", nats_per_position),
        ("accuracy of samples", metric("sample_accuracy")),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.8), sharey=True, layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        draw_bars(axis, [group.key[0] for group in groups], groups, value, "#0b6e99")
        axis.set_title(title)
    save(figure, "quantizers", sweep)


def draw_bars(
    axis: plt.Axes,
    labels: Sequence[str],
    groups: Sequence[Group],
    value: Callable[[Row], float],
    colour: str,
) -> None:
    """Draw mean and deviation of each group as a horizontal bar, from bottom to top."""
    means, deviations = zip(*(group.measure(value) for group in groups), strict=True)
    axis.barh(labels, means, xerr=deviations, color=colour, capsize=3)


def compute_relative_term(point: Row) -> float:
    """Compute the commitment term relative to the latent power, at a logged step."""
    return float(point["train/commitment"]) / float(point["train/latent_power"])


def tabulate_commitment() -> str:
    """Make the table of `sweep=commitment`."""
    groups = group_rows(read_rows("commitment"), f"{KEY}commitment")
    ends = read_ends("commitment")

    def end(name: str) -> Callable[[Row], float]:
        return lambda row: float(ends[row["folder"]][name])

    columns = [
        NMSE,
        PERPLEXITY,
        Column("commitment term", end("train/commitment"), ".3g"),
        Column("latent power", end("train/latent_power"), ".3g"),
        Column("term / power", lambda row: compute_relative_term(ends[row["folder"]]), ".3f"),
    ]
    return format_table(["`commitment`"], groups, columns, baseline=BASELINES["commitment"])


def tabulate_collapse() -> str:
    """Make the tables of `sweep=collapse`, one for each codebook."""
    titles = ["`quantizer`", "`init`", "`warmup_steps`", "`revive_below`"]
    return "\n\n".join(
        format_table(titles, groups, [NMSE, USE, PERPLEXITY]) for groups in group_cures().values()
    )


def group_cures() -> dict[str, list[Group]]:
    """Group the jobs of `sweep=collapse` by codebook, then by their cures."""
    groups = group_rows(read_rows("collapse"), *list_swept_keys("collapse"))
    return {name: [g for g in groups if g.key[0] == name] for name in ("ema", "loss")}


def list_cures(key: Sequence[str]) -> list[str]:
    """List the cures that a job of `sweep=collapse` has: values other than uniform rows and 0."""
    words = ("data", "warm-up", "revival")
    return [word for word, value in zip(words, key[1:], strict=True) if value not in NO_CURE]


def tabulate_dynamics() -> str:
    """Make the table of `sweep=dynamics`."""
    groups = group_rows(read_rows("dynamics"), *list_swept_keys("dynamics"))
    return format_table(["`quantizer=`"], groups, [NMSE, USE, PERPLEXITY])


def draw_dynamics() -> None:
    """Draw everything that is logged of a codebook over the updates."""
    groups = group_rows(read_rows("dynamics"), *list_swept_keys("dynamics"))
    curves = read_curves_of("dynamics")
    panels = {
        "train/nmse": "NMSE",
        "train/commitment": "commitment term",
        "train/codebook": "codebook term",
        "train/latent_power": "latent power",
        "train/codebook_use": "codes in use in 10 batches",
        "train/perplexity": "perplexity of 10 batches",
        "train/revived_codes": "revived codes, each 20 updates",
        DRIFT: "drift over 100 updates",
    }
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for group, colour in zip(groups, ("#0b6e99", "#d1495b"), strict=True):
            curve = average_curve(group.rows, curves, lambda p, key=name: float(p[key]), name)
            axis.plot(*curve, color=colour, linewidth=2, label=f"quantizer={group.key[0]}")
        axis.set(title=title, xlabel="updates", xlim=(0, None))
        axis.set_ylim(bottom=0)
    axes[0, 0].set(ylim=(0.03, 1), yscale="log")
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(groups))
    save(figure, "training_dynamics", "dynamics")


def tabulate_decay() -> str:
    """Make the table of `sweep=decay`."""
    ends = read_ends("decay")
    columns = [
        NMSE,
        USE,
        PERPLEXITY,
        Column("drift", lambda row: float(ends[row["folder"]][DRIFT]), ".3f"),
    ]
    return format_table(["`decay`"], group_decays(), columns, baseline=BASELINES["decay"])


def group_decays() -> list[Group]:
    """Group the jobs of `sweep=decay`."""
    return group_rows(read_rows("decay"), *list_swept_keys("decay"))


def draw_decay() -> None:
    """Draw the error of each decay, and how far its codebook moves between validations."""
    groups = group_decays()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    decays = [group.key[0] for group in groups]
    draw_bars(axes[0], decays[::-1], groups[::-1], metric("nmse"), "#d1495b")
    axes[0].set(xlabel="test NMSE", ylabel="decay")
    curves = read_curves_of("decay")
    for shade, group in enumerate(groups):
        drift = average_curve(group.rows, curves, lambda point: float(point[DRIFT]), DRIFT)
        colour = plt.get_cmap("viridis")(0.9 - 0.28 * shade)
        axes[1].plot(*drift, "o-", color=colour, linewidth=2.5, label=group.key[0])
    axes[1].set(xlabel="updates", ylabel="drift since the last validation", ylim=(0, None))
    names = axes[1].get_legend_handles_labels()
    figure.legend(*names, title="decay", loc="outside lower center", ncols=len(groups))
    save(figure, "training_dynamics", "decay")


def group_rates() -> list[Group]:
    """Group the jobs of `sweep=learning_rate`."""
    return group_rows(read_rows("learning_rate"), *list_swept_keys("learning_rate"))


def tabulate_rates() -> str:
    """Make the table of `sweep=learning_rate`."""
    titles = ["`lr`", "`revive_below`"]
    return format_table(
        titles, group_rates(), [NMSE, USE, PERPLEXITY], baseline=BASELINES["learning_rate"]
    )


def draw_rates() -> None:
    """Draw error and perplexity of each learning rate, with and without revival."""
    groups = group_rates()[::-1]
    keys = [group.key for group in groups]
    labels = [f"{rate}{', revival' if float(below) else ''}" for rate, below in keys]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    panels = (("NMSE", metric("nmse"), "#d1495b"), ("perplexity", metric("perplexity"), "#0b6e99"))
    for axis, (title, value, colour) in zip(axes, panels, strict=True):
        draw_bars(axis, labels, groups, value, colour)
        axis.set_title(title)
    axes[0].set_ylabel("learning rate")
    save(figure, "training_dynamics", "learning_rate")


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


def draw_commitment() -> None:
    """Draw the commitment term, the latent power and their ratio over the updates."""
    groups = group_rows(read_rows("commitment"), f"{KEY}commitment")
    curves = read_curves_of("commitment")
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("commitment term", lambda p: float(p["train/commitment"])),
        ("latent power", lambda p: float(p["train/latent_power"])),
        ("term / power", compute_relative_term),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for shade, group in enumerate(groups):
            steps, means = average_curve(group.rows, curves, value)
            colour = plt.get_cmap("viridis")(0.9 - 0.28 * shade)
            axis.plot(steps, means, color=colour, linewidth=2.5, label=group.key[0])
        axis.set(title=title, xlabel="updates", yscale="log")
        axis.yaxis.set_minor_formatter(NullFormatter())
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, title="weight of the term", loc="outside lower center", ncols=len(groups))
    save(figure, "training_dynamics", "commitment")


def draw_collapse() -> None:
    """Draw error and codes in effective use for each combination of the cures."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.8), sharey=True, layout="constrained")
    panels = (("NMSE", metric("nmse"), "#d1495b"), ("perplexity", metric("perplexity"), "#0b6e99"))
    for number, (name, groups) in enumerate(group_cures().items()):
        ordered = sorted(groups, key=lambda group: len(list_cures(group.key)))
        labels = [" + ".join(list_cures(group.key)) or "no cure" for group in ordered]
        for axis, (title, value, colour) in zip(axes[2 * number :], panels, strict=False):
            draw_bars(axis, labels[::-1], ordered[::-1], value, colour)
            axis.set_title(f"{name}: {title}")
            axis.locator_params(axis="x", nbins=3)
    save(figure, "training_dynamics", "collapse")


def group_sizes() -> list[Group]:
    """Group the jobs of `sweep=codebook_size`."""
    return group_rows(read_rows("codebook_size"), *list_swept_keys("codebook_size"))


def tabulate_sizes() -> str:
    """Make the table of `sweep=codebook_size`."""
    columns = [
        NMSE,
        USE,
        PERPLEXITY,
        Column("uniform rate, bits/dim", metric("uniform_bits_per_dim"), ".3f"),
        Column("prior rate, bits/dim", metric("prior_bits_per_dim"), ".3f"),
        Column("total, bits/dim", metric("total_bits_per_dim"), ".3f"),
        Column("accuracy of samples", metric("sample_accuracy"), ".1%"),
    ]
    return format_table(["`num_codes`", "`code_dim`"], group_sizes(), columns)


def draw_sizes() -> None:
    """Draw the error against the cost of the codes, for each number of channels."""
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for code_dim, colour in (("4", "#d1495b"), ("64", "#0b6e99")):
        groups = [group for group in group_sizes() if group.key[1] == code_dim]
        rates, spread = zip(*(g.measure(metric("prior_bits_per_dim")) for g in groups), strict=True)
        errors, deviations = zip(*(g.measure(metric("nmse")) for g in groups), strict=True)
        axis.errorbar(
            rates,
            errors,
            xerr=spread,
            yerr=deviations,
            marker="o",
            color=colour,
            linewidth=2,
            label=f"{code_dim} channels",
        )
        if code_dim == "64":
            for group, rate, error in zip(groups, rates, errors, strict=True):
                axis.annotate(
                    f"K={group.key[0]}",
                    (rate, error),
                    (-6, -18),
                    textcoords="offset points",
                    ha="right",
                )
    axis.set(
        xlabel="cost of the codes under the prior, bits/dim", ylabel="test NMSE", xlim=(0.03, None)
    )
    axis.legend()
    save(figure, "codebook_size", "rate_distortion")


def read_latents() -> list[Row]:
    """Read the jobs of `sweep=posterior_collapse` with what its `analysis.py` measured of each."""
    path = ROOT / "posterior_collapse/latents.csv"
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing: run analysis.py there first.")
    with path.open(newline="") as file:
        found = {row["folder"]: row for row in csv.DictReader(file)}
    return [row | found[row["folder"]] for row in read_rows("posterior_collapse")]


def bits_used(row: Row) -> float:
    """Bits per image that the decoder saves by the image's own latents."""
    return (float(row["other"]) - float(row["own"])) * PIXELS


def tabulate_latents() -> str:
    """Make the tables of `sweep=posterior_collapse`, one for each decoder."""
    columns = [
        Column("rate, bits/dim", lambda row: float(row["rate"]), ".3f"),
        Column("distortion", lambda row: float(row["own"]), ".3f"),
        Column("total", lambda row: float(row["own"]) + float(row["rate"]), ".3f"),
        Column("distortion, latents of another image", lambda row: float(row["other"]), ".3f"),
        Column("bits per image that the decoder uses", bits_used, ".0f"),
    ]
    groups = group_rows(read_latents(), *list_swept_keys("posterior_collapse"))
    return format_table(["`model/decoder=`", "`quantizer=`"], groups, columns)


def draw_latents() -> None:
    """Draw the bits that the latents cost and those that each decoder uses."""
    groups = group_rows(read_latents(), *list_swept_keys("posterior_collapse"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, decoder in zip(axes, ("convolutional", "pixelcnn"), strict=True):
        found = [group for group in groups if group.key[0] == decoder][::-1]
        for shift, title, value, colour in (
            (0.2, "cost of the latents", lambda row: float(row["rate"]) * PIXELS, "#b8c4cc"),
            (-0.2, "used by the decoder", bits_used, "#0b6e99"),
        ):
            means, deviations = zip(*(group.measure(value) for group in found), strict=True)
            places = [number + shift for number in range(len(found))]
            axis.barh(places, means, 0.4, xerr=deviations, capsize=3, color=colour, label=title)
        axis.set_yticks(range(len(found)), [group.key[1] for group in found])
        axis.set(title=f"decoder: {decoder}", xlabel="bits per image", xlim=(0, 3500))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, "posterior_collapse", "latents")


SONNET = {
    100: (0.483, 10.4),
    500: (0.147, 34.3),
    1000: (0.105, 71.8),
    2000: (0.081, 154),
    3000: (0.071, 227),
    5000: (0.061, 327),
    7500: (0.058, 329),
    10000: (0.056, 326),
}
"""Training NMSE and perplexity that sonnet's notebook printed, by updates."""
REFERENCES = {
    "sonnet_cifar10": "sonnet's setting, here",
    "recipe_cifar10": "our defaults",
}
"""Sweeps of the study `reference_settings`."""


def read_ends(sweep: str) -> dict[str, Row]:
    """Read the last stored point of each job's curves, by the job's folder."""
    return {folder: rows[-1] for folder, rows in read_curves_of(sweep).items()}


def tabulate_references() -> str:
    """Make the table of the sweeps of `reference_settings`, with the numbers of sonnet's run."""
    error, perplexity = SONNET[10000]
    titles = (
        "run",
        "training NMSE",
        "training perplexity",
        "test NMSE",
        "perplexity",
        "codes in use",
    )
    lines = [
        f"| {' | '.join(titles)} |",
        "| --- |" + " ---: |" * (len(titles) - 1),
        f"| sonnet's notebook, one run | {error:.3f} | {perplexity:.0f} | - | - | - |",
    ]
    for sweep, title in REFERENCES.items():
        ends = read_ends(sweep)

        def end(name: str, ends: dict[str, Row] = ends) -> Callable[[Row], float]:
            return lambda row: float(ends[row["folder"]][name])

        group = Group((title,), read_rows(sweep))
        columns = [
            Column("", end("train/nmse")),
            Column("", end("train/perplexity"), ".0f"),
            NMSE,
            PERPLEXITY,
            USE,
        ]
        cells = [title, *(format_mean(group, column) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_references() -> None:
    """Draw error and perplexity over the updates, with the numbers of sonnet's run."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    panels = ("train/nmse", "train/perplexity")
    for number, (axis, name) in enumerate(zip(axes, panels, strict=True)):
        for sweep, colour in zip(REFERENCES, ("#d1495b", "#0b6e99"), strict=True):
            steps, means = average_curve(
                read_rows(sweep), read_curves_of(sweep), lambda point, key=name: float(point[key])
            )
            axis.plot(steps, means, color=colour, linewidth=2.5, label=REFERENCES[sweep])
        printed = [values[number] for values in SONNET.values()]
        axis.plot(list(SONNET), printed, "ko", markersize=7, label="sonnet's notebook")
        axis.set(xlabel="updates", title=("NMSE", "perplexity of a batch")[number])
        axis.set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, "reference_settings", "curves")


def read_pipelines() -> dict[str, dict[str, Any]]:
    """Read the results of the study `bits_per_dim`, by data set."""
    paths = sorted((ROOT / BITS).glob("*.json"))
    return {TITLES.get(path.stem, path.stem): json.loads(path.read_text()) for path in paths}


def read_bits(result: dict[str, Any], term: str) -> float:
    """Read a term of a pipeline's bits per dimension."""
    return float(result["metrics"][f"test/{term}_bits_per_dim"]["value"])


def tabulate_bits() -> str:
    """Make the table of the bits per dimension: a row per term and a column per data set."""
    found = read_pipelines()
    terms: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("distortion, -log2 p(x given z)", lambda r: read_bits(r, "reconstruction")),
        ("rate, uniform codes", lambda r: read_bits(r, "uniform")),
        ("rate, histogram of the codes", lambda r: read_bits(r, "histogram")),
        ("rate, PixelCNN prior", lambda r: read_bits(r, "prior")),
        (
            "**total with uniform codes**",
            lambda r: read_bits(r, "reconstruction") + read_bits(r, "uniform"),
        ),
        ("**total with the prior**", lambda r: read_bits(r, "total")),
    ]
    lines = [f"| bits/dim, test images | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for title, value in terms:
        lines.append(f"| {title} | {' | '.join(f'{value(r):.3f}' for r in found.values())} |")
    for title, name, form in (
        ("squared error / variance of the pixels", "nmse", ".4f"),
        ("codes in use", "codebook_use", ".1%"),
        ("perplexity of a codebook", "perplexity", ".0f"),
        ("prior, nats per code", "nats_per_code", ".3f"),
        ("accuracy of a classifier on real images", "real_accuracy", ".1%"),
        ("accuracy of a classifier on samples", "sample_accuracy", ".1%"),
    ):
        values = [r["metrics"][f"test/{name}"]["value"] for r in found.values()]
        lines.append(f"| {title} | {' | '.join(f'{value:{form}}' for value in values)} |")
    for stage in ("vqvae", "prior", "evaluation"):
        minutes = [f"{r['seconds'][stage] / 60:.0f}" for r in found.values()]
        lines.append(f"| minutes, {stage} | {' | '.join(minutes)} |")
    return "\n".join(lines)


def draw_bits() -> None:
    """Draw distortion and rate of each data set under the three models of the codes."""
    rates = {"uniform": "uniform codes", "histogram": "histogram", "prior": "PixelCNN prior"}
    found = read_pipelines()
    figure, axis = plt.subplots(figsize=(11, 4.8), layout="constrained")
    names = [f"{data}, {words}" for data in found for words in rates.values()]
    pairs = [(r, rate) for r in found.values() for rate in rates]
    distortion = [read_bits(r, "reconstruction") for r, _ in pairs]
    cost = [read_bits(r, rate) for r, rate in pairs]
    axis.barh(names, distortion, color="#b8c4cc", label="pixels given codes")
    bars = axis.barh(names, cost, left=distortion, color="#0b6e99", label="codes")
    axis.bar_label(bars, [f" {a + b:.2f}" for a, b in zip(distortion, cost, strict=True)])
    axis.invert_yaxis()
    axis.set(xlabel="bits per dimension of test images", xlim=(0, 1.1 * max(distortion) + 1.2))
    figure.legend(loc="outside upper center", ncols=2)
    save(figure, BITS, "bits")


def list_settings() -> Iterator[tuple[str, str, str, dict[str, tuple[float, float] | float]]]:
    """List the study, setting, seeds with commit, and metrics of each setting of all studies.

    A metric is its mean and standard deviation, or one value of a single run.
    """
    for sweep, study in STUDIES.items():
        if not (ROOT / study / f"{sweep}.csv").is_file():
            continue
        rows = read_rows(sweep)
        swept = list_swept_keys(sweep)
        for group in group_rows(rows, *swept):
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
    for data, result in read_pipelines().items():
        found = {name: result["metrics"][f"test/{name}"]["value"] for name in METRICS}
        yield BITS, data, f"1, {result['commit'][:7]}", found


def tabulate_settings() -> str:
    """Make the table of all settings of all studies."""
    lines = [
        f"| study | setting | seeds, commit | {' | '.join(METRICS.values())} |",
        f"| --- | --- | --- |{' ---: |' * len(METRICS)}",
    ]
    for study, setting, seeds, metrics in list_settings():
        cells = []
        for name in METRICS:
            value = metrics.get(name)
            if isinstance(value, tuple):
                cells.append(f"{value[0]:.4g} ± {value[1]:.2g}")
            else:
                cells.append("" if value is None else f"{value:.4g}")
        lines.append(
            f"| [{study}]({study}/README.md) | `{setting}` | {seeds} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "quantizers": {
        name: partial(tabulate_quantizers, name) for name in ("quantizers", "quantizers_4096")
    },
    "codebook_size": {"sizes": tabulate_sizes},
    "training_dynamics": {
        "dynamics": tabulate_dynamics,
        "commitment": tabulate_commitment,
        "collapse": tabulate_collapse,
        "learning_rate": tabulate_rates,
        "decay": tabulate_decay,
    },
    "posterior_collapse": {"latents": tabulate_latents},
    "reference_settings": {"references": tabulate_references},
    BITS: {"bits": tabulate_bits},
    ".": {"settings": tabulate_settings},
}
"""Tables of each study, by the name in its README."""
FIGURES: dict[str, dict[str, Callable[[], None]]] = {
    "quantizers": {
        name: partial(draw_quantizers, name) for name in ("quantizers", "quantizers_4096")
    },
    "codebook_size": {"rate_distortion": draw_sizes},
    "training_dynamics": {
        "dynamics": draw_dynamics,
        "commitment": draw_commitment,
        "collapse": draw_collapse,
        "learning_rate": draw_rates,
        "decay": draw_decay,
    },
    "posterior_collapse": {"latents": draw_latents},
    "reference_settings": {"curves": draw_references},
    BITS: {"bits": draw_bits},
}
"""Figures of each study, by the name of the PNG file."""


# --- files ---


def hash_data(study: str) -> str:
    """Hash the raw results of a study; each figure stores the hash of those it shows."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / study).iterdir()):
        if path.suffix in (".csv", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def save(figure: plt.Figure, study: str, name: str) -> None:
    """Save a figure of a study, with the hash of its data."""
    path = ROOT / study / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Source": hash_data(study), "Software": ""})
    plt.close(figure)


def read_curves_of(sweep: str) -> dict[str, list[Row]]:
    """Read the curves of each job of a sweep, by the job's folder."""
    found: dict[str, list[Row]] = {}
    with (ROOT / STUDIES[sweep] / f"{sweep}_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["folder"], []).append(row)
    return found


def collect(folder: Path) -> str:
    """Copy the results of a finished sweep or pipeline into the folder of its study.

    Returns:
        The study.

    Raises:
        SystemExit: If it belongs to no study.
    """
    run = RunFolder(folder)
    config = read_config(run.config) if run.is_finished else {}
    if config.get("study") == BITS:
        result = json.loads(run.result.read_text())
        # Without the folders of the machine that ran it.
        result["command"] = re.sub(r"=\S*/", "=", result["command"])
        (ROOT / BITS / f"{name_data(config['dataset']['source'])}.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )
        return BITS
    jobs = list(list_job_folders(folder))
    sweep = read_config(RunFolder(jobs[0]).config)["study"] if jobs else None
    if sweep not in STUDIES:
        raise SystemExit(f"error: {folder} is not a sweep of {', '.join(STUDIES)}.")
    place = ROOT / STUDIES[sweep]
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
    page = ROOT / study / "README.md"
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
        study for sweep, study in STUDIES.items() if not (ROOT / study / f"{sweep}.csv").is_file()
    }
    swept = [study for study in STUDIES.values() if study not in missing]
    return list(dict.fromkeys([*swept, *([BITS] if read_pipelines() else [])]))


def fill_tables(study: str) -> str:
    """Return the study's README with its tables made again; `.` is the page of all studies."""
    check_page(study)
    text = (ROOT / study / "README.md").read_text()
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
        (ROOT / study / "README.md").write_text(fill_tables(study))
        for draw in FIGURES.get(study, {}).values():
            draw()
        Console().print(f"experiments/{study}", highlight=False)


if __name__ == "__main__":
    main()
