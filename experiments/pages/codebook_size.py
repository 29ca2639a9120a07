"""Number of codes and of their channels."""

import matplotlib.pyplot as plt

from pages.figures import save
from pages.results import Group, group_sweep, metric
from pages.tables import NMSE, PERPLEXITY, USE, Column, tabulate_sweep

COLOURS = ("#edae49", "#d1495b", "#0b6e99")
"""Colour of each number of channels, from few to many."""


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
        Column("Fréchet distance of samples", metric("sample_fid"), ".1f"),
    ]
    return tabulate_sweep("codebook_size", ["`num_codes`", "`code_dim`"], columns)


def draw_sizes() -> None:
    """Draw error and samples against the cost of the codes, for each number of channels."""
    curves: dict[str, list[Group]] = {}
    for group in group_sweep("codebook_size"):
        curves.setdefault(group.key[1], []).append(group)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    panels = (("test NMSE", "nmse"), ("Fréchet distance of samples", "sample_fid"))
    for axis, (title, name) in zip(axes, panels, strict=True):
        axis.set(title=title, xlim=(0, 0.53))
        for (code_dim, groups), colour in zip(curves.items(), COLOURS, strict=True):
            costs = [group.measure(metric("prior_bits_per_dim")) for group in groups]
            values = [group.measure(metric(name)) for group in groups]
            rates, spread = zip(*costs, strict=True)
            means, deviations = zip(*values, strict=True)
            style = {"color": colour, "marker": "o", "linewidth": 2}
            label = f"{code_dim} channels"
            axis.errorbar(rates, means, xerr=spread, yerr=deviations, label=label, **style)
        if axis is axes[0]:
            for group, *point in zip(groups, rates, means, strict=True):
                place = {"textcoords": "offset points", "ha": "right"}
                axis.annotate(f"K={group.key[0]}", point, (-6, -18), **place)
    figure.supxlabel("cost of the codes under the prior, bits/dim")
    axes[0].legend()
    save(figure, "codebook_size", "rate_distortion")


TABLES = {"sizes": tabulate_sizes}
FIGURES = {"rate_distortion": draw_sizes}
