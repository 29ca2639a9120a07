"""Number of codes and of their channels."""

import matplotlib.pyplot as plt

from pages.figures import save
from pages.results import group_sweep, metric
from pages.tables import NMSE, PERPLEXITY, USE, Column, tabulate_sweep


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
    return tabulate_sweep("codebook_size", ["`num_codes`", "`code_dim`"], columns)


def draw_sizes() -> None:
    """Draw the error against the cost of the codes, for each number of channels."""
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for code_dim, colour in (("4", "#d1495b"), ("64", "#0b6e99")):
        groups = [group for group in group_sweep("codebook_size") if group.key[1] == code_dim]
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


TABLES = {"sizes": tabulate_sizes}
FIGURES = {"rate_distortion": draw_sizes}
