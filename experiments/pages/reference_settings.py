"""DeepMind's example for sonnet beside our defaults, SQ-VAE's protocol, and an hour on CIFAR-10."""

import csv

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from pages import results
from pages.figures import save
from pages.results import (
    RUNS,
    VALIDATION,
    Group,
    at_end,
    average_curve,
    read_curves_of,
    read_rows,
    read_runs,
    read_test,
    reader,
)
from pages.tables import NMSE, PERPLEXITY, USE, Column, format_mean, format_rows

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
    rows = [["sonnet's notebook, one run", f"{error:.3f}", f"{perplexity:.0f}", "-", "-", "-"]]
    for sweep, title in REFERENCES.items():
        group = Group((title,), read_rows(sweep))
        columns = [
            Column("", at_end(sweep, reader("train/nmse"))),
            Column("", at_end(sweep, reader("train/perplexity")), ".0f"),
            NMSE,
            PERPLEXITY,
            USE,
        ]
        rows.append([title, *(format_mean(group, column) for column in columns)])
    return format_rows(titles, rows)


def tabulate_sqvae() -> str:
    """Make the table of the data sets in SQ-VAE's protocol."""
    columns = (
        ("NMSE", "nmse", ".4f"),
        ("codes in use", "codebook_use", ".1%"),
        ("perplexity", "perplexity", ".1f"),
        ("perplexity of 32 images", "perplexity_batch32", ".1f"),
        ("nats per code", "nats_per_code", ".3f"),
        ("accuracy, real", "real_accuracy", ".1%"),
        ("accuracy, samples", "sample_accuracy", ".1%"),
        ("Fréchet distance", "sample_fid", ".2f"),
    )
    titles = ("data set", "squared error of an image", *(c[0] for c in columns), "minutes")
    rows = []
    for data, result in read_runs("sqvae").items():
        error = f"{read_test(result, 'mse_unrounded') * 28 * 28:.2f}"
        cells = [f"{read_test(result, name):{form}}" for _, name, form in columns]
        minutes = f"{sum(result['seconds'].values()) / 60:.0f}"
        rows.append([data, error, *cells, minutes])
    return format_rows(titles, rows)


def tabulate_validation() -> str:
    """Make the table of the validation errors of the hour on CIFAR-10."""
    with (results.ROOT / RUNS["hour"] / "cifar10.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [f"{int(row['step']):,}".replace(",", " ") for row in rows]
    errors = [f"{float(row[VALIDATION]):.4f}" for row in rows]
    return format_rows(["updates", *steps], [["validation NMSE", *errors]])


def tabulate_hour() -> str:
    """Make the table of the hour on CIFAR-10."""
    (result,) = read_runs("hour").values()
    cells = {
        "NMSE": f"{read_test(result, 'nmse'):.4f}",
        "squared error, pixels in [0, 1]": f"{read_test(result, 'mse'):.5f}",
        "PSNR of the mean error": f"{read_test(result, 'psnr_db'):.2f} dB",
        "codes in use": f"{read_test(result, 'codebook_use'):.0%}",
        "perplexity": f"{read_test(result, 'perplexity'):.0f}",
        "minutes": f"{result['seconds'] / 60:.0f}",
    }
    return format_rows(["test images", ""], list(cells.items()))


def draw_references() -> None:
    """Draw error and perplexity over the updates, with the numbers of sonnet's run."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    panels = ("train/nmse", "train/perplexity")
    for number, (axis, name) in enumerate(zip(axes, panels, strict=True)):
        for sweep, colour in zip(REFERENCES, ("#d1495b", "#0b6e99"), strict=True):
            steps, means = average_curve(read_rows(sweep), read_curves_of(sweep), reader(name))
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


TABLES = {
    "references": tabulate_references,
    "sqvae": tabulate_sqvae,
    "validation": tabulate_validation,
    "hour": tabulate_hour,
}
FIGURES = {"curves": draw_references}
