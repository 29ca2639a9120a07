"""Number of codes and of their channels."""

import matplotlib.pyplot as plt

from pages.figures import save
from pages.results import Group, group_sweep, metric
from pages.tables import ACCURACY, FRECHET, NMSE, PERPLEXITY, USE, Column, tabulate_sweep

RATE = Column("prior rate, bits/dim", metric("prior_bits_per_dim"), ".3f")
COLOURS = ("#edae49", "#d1495b", "#0b6e99")
"""Colour of each number of channels, from few to many."""


def tabulate_sizes() -> str:
    """Make the table of `sweep=codebook_size`."""
    columns = [
        NMSE,
        USE,
        PERPLEXITY,
        Column("uniform rate, bits/dim", metric("uniform_bits_per_dim"), ".3f"),
        RATE,
        Column("total, bits/dim", metric("total_bits_per_dim"), ".3f"),
        ACCURACY,
        FRECHET,
    ]
    return tabulate_sweep("codebook_size", ["`num_codes`", "`code_dim`"], columns)


def draw_sizes() -> None:
    """Draw error and samples against the cost of the codes, for each number of channels."""
    curves: dict[str, list[Group]] = {}
    for group in group_sweep("codebook_size"):
        curves.setdefault(group.key[1], []).append(group)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for (code_dim, groups), colour in zip(curves.items(), COLOURS, strict=True):
        rates, spread = zip(*(group.measure(RATE.value) for group in groups), strict=True)
        style = {"color": colour, "marker": "o", "linewidth": 2, "label": f"{code_dim} channels"}
        for axis, column in zip(axes, (NMSE, FRECHET), strict=True):
            means, deviations = zip(*(group.measure(column.value) for group in groups), strict=True)
            axis.errorbar(rates, means, xerr=spread, yerr=deviations, **style)
            axis.set(title=column.title)
    # Only the last curve, which lies left of the others, has room for names on its left.
    for group in groups:
        point = group.measure(RATE.value)[0], group.measure(NMSE.value)[0]
        place = {"textcoords": "offset points", "ha": "right"}
        axes[0].annotate(f"K={group.key[0]}", point, (-6, -18), **place)
    for axis in axes:
        axis.set_xlim(left=0)
    figure.supxlabel("cost of the codes under the prior, bits/dim")
    axes[0].legend()
    save(figure, "codebook_size", "rate_distortion")


TABLES = {"sizes": tabulate_sizes}
FIGURES = {"rate_distortion": draw_sizes}
