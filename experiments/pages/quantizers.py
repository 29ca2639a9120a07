"""Quantizers, judged up to the samples: the same table and figure for each sweep."""

import math
from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt

from pages.figures import draw_bars, save
from pages.results import Row, group_sweep, metric, reader
from pages.tables import ACCURACY, FRECHET, NMSE, PERPLEXITY, USE, Column, tabulate_sweep

DIMENSIONS = {
    "quantizers": 16,
    "quantizers_4096": 16,
    "quantizers_cifar10": 48,
    "quantizers_cifar10_4096": 48,
}
"""Pixels times channels that belong to a position of the codes, by sweep."""
RECONSTRUCTIONS = Column("Fréchet distance of reconstructions", metric("reconstruction_fid"), ".1f")


def nats_per_position(sweep: str) -> Callable[[Row], float]:
    """Return the cost of all codes of a position under the prior, for one code or several."""
    nats = DIMENSIONS[sweep] * math.log(2)
    return lambda row: float(row["test/prior_bits_per_dim"]) * nats


def tabulate_quantizers(sweep: str) -> str:
    """Make the table of a sweep over quantizers."""
    columns = [
        NMSE,
        USE,
        PERPLEXITY,
        Column("prior, nats per position", nats_per_position(sweep), ".2f"),
        Column("rate, bits/dim", metric("prior_bits_per_dim")),
        ACCURACY,
        RECONSTRUCTIONS,
        FRECHET,
        Column("seconds", reader("seconds"), ".0f"),
    ]
    return tabulate_sweep(sweep, ["`quantizer=`"], columns)


def draw_quantizers(sweep: str) -> None:
    """Draw error, cost of the codes and quality of the samples of each quantizer."""
    groups = group_sweep(sweep)[::-1]
    names = [group.key[0] for group in groups]
    panels = [
        (NMSE.title, NMSE.value),
        ("prior, nats per position", nats_per_position(sweep)),
        (ACCURACY.title, ACCURACY.value),
        ("Fréchet distance", RECONSTRUCTIONS.value),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(14, 4.8), sharey=True, layout="constrained")
    samples = draw_bars(axes[-1], names, groups, FRECHET.value, "#8fc1d4")
    for axis, (title, value) in zip(axes, panels, strict=True):
        last = draw_bars(axis, names, groups, value, "#0b6e99")
        axis.set_title(title)
        axis.locator_params(axis="x", nbins=3)
    legend = {"samples": samples, "reconstructions": last}
    figure.legend(legend.values(), legend.keys(), loc="outside lower right", ncols=2)
    save(figure, "quantizers", sweep)


TABLES = {sweep: partial(tabulate_quantizers, sweep) for sweep in DIMENSIONS}
FIGURES = {sweep: partial(draw_quantizers, sweep) for sweep in DIMENSIONS}
