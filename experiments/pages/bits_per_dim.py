"""Bits per dimension of whole models: single pipelines, whose `result.json` is stored."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from pages.figures import save
from pages.results import read_runs, read_test
from pages.tables import format_rows

BITS = "bits_per_dim"
"""The study."""


def read_bits(result: dict[str, Any], term: str) -> float:
    """Read a term of a pipeline's bits per dimension."""
    return read_test(result, f"{term}_bits_per_dim")


def tabulate_bits() -> str:
    """Make the table of the bits per dimension: a row per term and a column per data set."""
    found = read_runs(BITS)
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
    rows = [[title, *(f"{value(r):.3f}" for r in found.values())] for title, value in terms]
    for title, name, form in (
        ("squared error / variance of the pixels", "nmse", ".4f"),
        ("codes in use", "codebook_use", ".1%"),
        ("perplexity of a codebook", "perplexity", ".0f"),
        ("prior, nats per code", "nats_per_code", ".3f"),
        ("accuracy of a classifier on real images", "real_accuracy", ".1%"),
        ("accuracy of a classifier on samples", "sample_accuracy", ".1%"),
    ):
        values = [read_test(r, name) for r in found.values()]
        rows.append([title, *(f"{value:{form}}" for value in values)])
    for stage in ("vqvae", "prior", "evaluation"):
        minutes = [f"{r['seconds'][stage] / 60:.0f}" for r in found.values()]
        rows.append([f"minutes, {stage}", *minutes])
    return format_rows(["bits/dim, test images", *found], rows)


def draw_bits() -> None:
    """Draw distortion and rate of each data set under the three models of the codes."""
    rates = {"uniform": "uniform codes", "histogram": "histogram", "prior": "PixelCNN prior"}
    found = read_runs(BITS)
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


TABLES = {"bits": tabulate_bits}
FIGURES = {"bits": draw_bits}
