"""Losses, collapse, learning rate and decay while a VQ-VAE trains."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from pages.figures import draw_bars, save
from pages.results import (
    DRIFT,
    Group,
    Row,
    at_end,
    average_curve,
    group_sweep,
    metric,
    read_curves_of,
    reader,
)
from pages.tables import NMSE, PERPLEXITY, USE, Column, format_table, tabulate_sweep

NO_CURE = ("uniform", "0", "0.0")
"""Values of the keys of `sweep=collapse` that switch a cure off."""


REVIVED = "train/revived_codes"
TERM = reader("train/commitment")
POWER = reader("train/latent_power")


def compute_relative_term(point: Row) -> float:
    """Compute the commitment term relative to the latent power, at a logged step."""
    return TERM(point) / POWER(point)


def tabulate_commitment() -> str:
    """Make the table of `sweep=commitment`."""
    columns = [
        NMSE,
        PERPLEXITY,
        Column("commitment term", at_end("commitment", TERM), ".3g"),
        Column("latent power", at_end("commitment", POWER), ".3g"),
        Column("term / power", at_end("commitment", compute_relative_term), ".3f"),
    ]
    return tabulate_sweep("commitment", ["`commitment`"], columns)


def draw_commitment() -> None:
    """Draw the commitment term, the latent power and their ratio over the updates."""
    groups = group_sweep("commitment")
    curves = read_curves_of("commitment")
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("commitment term", TERM),
        ("latent power", POWER),
        ("term / power", compute_relative_term),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for shade, group in enumerate(groups):
            steps, means = average_curve(group.rows, curves, value)
            colour = plt.get_cmap("viridis")(0.9 - 0.28 * shade)
            axis.plot(steps, means, color=colour, linewidth=2.5, label=group.key[0])
        axis.set(title=title, xlabel="updates", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, title="weight of the term", loc="outside lower center", ncols=len(groups))
    save(figure, "training_dynamics", "commitment")


def tabulate_collapse() -> str:
    """Make the tables of `sweep=collapse`, one for each codebook."""
    titles = ["`quantizer`", "`init`", "`warmup_steps`", "`revive_below`"]
    return "\n\n".join(
        format_table(titles, groups, [NMSE, USE, PERPLEXITY]) for groups in group_cures().values()
    )


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
    axes[0].sharex(axes[2])  # so that the errors of both codebooks compare
    save(figure, "training_dynamics", "collapse")


def group_cures() -> dict[str, list[Group]]:
    """Group the jobs of `sweep=collapse` by codebook, then by their cures."""
    groups = group_sweep("collapse")
    return {name: [g for g in groups if g.key[0] == name] for name in ("ema", "loss")}


def list_cures(key: Sequence[str]) -> list[str]:
    """List the cures that a job of `sweep=collapse` has: values other than uniform rows and 0."""
    words = ("data", "warm-up", "revival")
    return [word for word, value in zip(words, key[1:], strict=True) if value not in NO_CURE]


def draw_dynamics() -> None:
    """Draw everything that is logged of a codebook over the updates."""
    groups = group_sweep("dynamics")
    curves = read_curves_of("dynamics")
    panels = {
        "train/nmse": "NMSE",
        "train/commitment": "commitment term",
        "train/codebook": "codebook term",
        "train/latent_power": "latent power",
        "train/codebook_use": "codes in use",
        "train/perplexity": "perplexity",
        REVIVED: "revived so far",
        DRIFT: "drift",
    }
    with plt.rc_context({"font.size": 22, "axes.titlesize": 22}):
        figure, axes = plt.subplots(2, 4, figsize=(15, 6.2), layout="constrained", sharex=True)
        for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
            for group, colour in zip(groups, ("#0b6e99", "#d1495b"), strict=True):
                steps, values = average_curve(group.rows, curves, reader(name), name)
                if name == REVIVED:  # mostly zeros, because few of the logged updates revive
                    values = list(accumulate(values))
                axis.plot(steps, values, color=colour, linewidth=2.5, label=group.key[0])
            axis.set(title=title, xlim=(0, None))
            axis.set_ylim(bottom=0)
        axes[0, 0].set(ylim=(0.03, 1), yscale="log")
        for axis in axes[1]:
            axis.set_xlabel("updates")
        axes[0, 0].legend(frameon=False)
        save(figure, "training_dynamics", "dynamics")


def tabulate_decay() -> str:
    """Make the table of `sweep=decay`."""
    columns = [NMSE, USE, PERPLEXITY, Column("drift", at_end("decay", reader(DRIFT)), ".3f")]
    return tabulate_sweep("decay", ["`decay`"], columns)


def draw_decay() -> None:
    """Draw the error of each decay, and how far its codebook moves between validations."""
    groups = group_sweep("decay")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    decays = [group.key[0] for group in groups]
    draw_bars(axes[0], decays[::-1], groups[::-1], metric("nmse"), "#d1495b")
    axes[0].set(xlabel="test NMSE", ylabel="decay")
    curves = read_curves_of("decay")
    for shade, group in enumerate(groups):
        drift = average_curve(group.rows, curves, reader(DRIFT), DRIFT)
        colour = plt.get_cmap("viridis")(0.9 - 0.28 * shade)
        axes[1].plot(*drift, "o-", color=colour, linewidth=2.5, label=group.key[0])
    axes[1].set(xlabel="updates", ylabel="drift since the last validation", ylim=(0, None))
    names = axes[1].get_legend_handles_labels()
    figure.legend(*names, title="decay", loc="outside lower center", ncols=len(groups))
    save(figure, "training_dynamics", "decay")


def draw_rates() -> None:
    """Draw error and perplexity of each learning rate, with and without revival."""
    groups = group_sweep("learning_rate")[::-1]
    keys = [group.key for group in groups]
    labels = [f"{rate}{', revival' if float(below) else ''}" for rate, below in keys]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    panels = (("NMSE", metric("nmse"), "#d1495b"), ("perplexity", metric("perplexity"), "#0b6e99"))
    for axis, (title, value, colour) in zip(axes, panels, strict=True):
        draw_bars(axis, labels, groups, value, colour)
        axis.set_title(title)
    axes[0].set_ylabel("learning rate")
    save(figure, "training_dynamics", "learning_rate")


TABLES = {
    "dynamics": partial(tabulate_sweep, "dynamics", ["`quantizer=`"]),
    "commitment": tabulate_commitment,
    "collapse": tabulate_collapse,
    "learning_rate": partial(tabulate_sweep, "learning_rate", ["`lr`", "`revive_below`"]),
    "decay": tabulate_decay,
}
FIGURES = {
    "dynamics": draw_dynamics,
    "commitment": draw_commitment,
    "collapse": draw_collapse,
    "learning_rate": draw_rates,
    "decay": draw_decay,
}
