"""Plots of the reports, as SVG."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curves = dict[str, tuple[list[float], list[float]]]
Array = np.ndarray[Any, np.dtype[Any]]

INK, QUIET, TRAIN, VAL, EXTRA = "#1f2933", "#9aa5b1", "#7db3e8", "#1a5fb4", "#c64600"
COLOURS = (VAL, EXTRA, "#26806a", "#8a3ab9", "#b8860b", "#d6336c", "#0b93b8", "#7a4b1e")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text as text: smaller files, and the font of the page
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_svg(
    size: tuple[float, float], columns: int, paint: Callable[[list[Axes]], None], rows: int = 1
) -> str:
    """Draw an SVG of `size` inches; `paint` gets its axes in reading order and fills them."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(list(figure.subplots(rows, columns, squeeze=False).flat))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plot_curve(axes: Axes, curves: Curves, name: str, label: str, colour: str) -> None:
    """Plot one curve if it was logged."""
    if name in curves:
        few = len(curves[name][0]) < 30
        axes.plot(*curves[name], label=label, color=colour, marker="o" if few else "", ms=3)


def plot_runs(
    named: list[tuple[str, Curves]], others: list[Curves], panels: list[tuple[str, str]]
) -> str:
    """Plot the curves of several runs, with one panel per metric.

    Args:
        named: Label for the legend and curves of each run.
        others: Curves of the runs to show in grey, without a label.
        panels: Name and unit of each metric.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)

    def paint(axes: list[Axes]) -> None:
        for axis, (name, unit) in zip(axes, panels, strict=False):
            for curves in others:
                if name in curves:
                    axis.plot(*curves[name], color=QUIET, lw=0.7)
            for number, (label, curves) in enumerate(named):
                plot_curve(
                    axis, curves, name, label.replace("$", r"\$"), COLOURS[number % len(COLOURS)]
                )
                if name in curves:
                    # Dashes distinguish the curves without colours.
                    axis.lines[-1].set_linestyle(DASHES[number % len(DASHES)])
            axis.set(title=name, ylabel=unit, xlabel="steps")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        lines = {str(line.get_label()): line for axis in axes for line in axis.lines}
        labels = [label for label in lines if not label.startswith("_")]
        axes[0].figure.legend(
            [lines[label] for label in labels],
            labels,
            loc="outside lower left",
            ncols=2,
            fontsize=8,
        )

    return draw_svg((9, 2.6 * rows + 0.2 * -(-len(named) // 2)), columns, paint, rows)


def plot_losses(curves: Curves) -> str:
    """Plot the reconstruction and quantizer losses of stage 1 over steps."""
    # An autoregressive decoder has no NMSE.
    name, title = "nmse", "NMSE"
    if "train/nmse" not in curves and "train/nll_nats_per_dim" in curves:
        name, title = "nll_nats_per_dim", "nats per dimension"
    # With a likelihood, the NMSE is only logged.
    weighted = "nll_nats_per_dim_weighted"
    in_loss = weighted if f"train/{weighted}" in curves else "nmse"

    def paint(axes: list[Axes]) -> None:
        left, right = axes
        plot_curve(left, curves, f"train/{name}", "training batches", TRAIN)
        plot_curve(left, curves, f"val/{name}", "validation", VAL)
        left.set(title=f"Reconstruction: {title}", xlabel="steps", yscale="log")
        left.legend()
        plot_curve(right, curves, f"train/{in_loss}", "reconstruction", TRAIN)
        plot_curve(right, curves, "train/commitment_weighted", "commitment, weighted", EXTRA)
        plot_curve(right, curves, "train/codebook_weighted", "codebook, weighted", VAL)
        plot_curve(right, curves, "train/auxiliary_weighted", "auxiliary, weighted", QUIET)
        right.set(title="How the training losses balance", xlabel="steps", yscale="log")
        if right.lines:
            right.legend()

    return draw_svg((9, 2.8), 2, paint)


def plot_usage(curves: Curves, num_codes: int) -> str:
    """Plot the perplexity and codebook use of stage 1 over steps."""

    def paint(axes: list[Axes]) -> None:
        left, right = axes
        plot_curve(left, curves, "train/perplexity", "training, since last point", TRAIN)
        plot_curve(left, curves, "val/perplexity", "validation", VAL)
        left.axhline(num_codes, color=QUIET, ls=":", label=f"all {num_codes} equally")
        left.set(title="Perplexity of the codes", xlabel="steps", ylim=(0, num_codes * 1.08))
        left.legend(loc="lower right")
        plot_curve(right, curves, "train/codebook_use", "training, since last point", TRAIN)
        plot_curve(right, curves, "val/codebook_use", "validation", VAL)
        right.set(title="Share of codes in use", xlabel="steps", ylim=(0, 1.05))
        if "train/revived_codes" in curves:
            steps, revived = curves["train/revived_codes"]
            twin = right.twinx()
            twin.bar(steps, revived, width=max(steps) / 150, color=EXTRA, alpha=0.6)
            twin.set_ylabel("codes revived", color=EXTRA)
            twin.grid(visible=False)
        if right.lines:
            right.legend(loc="lower right")

    return draw_svg((9, 2.8), 2, paint)


def plot_prior(curves: Curves, split: str, metrics: dict[str, Any]) -> str:
    """Plot the nats per code of stage 2 over steps, with the baselines."""

    def paint(axes: list[Axes]) -> None:
        left, right = axes
        plot_curve(left, curves, "train/nats_per_code", "training batches", TRAIN)
        plot_curve(left, curves, "val/nats_per_code", "validation", VAL)
        baselines = (
            ("unigram_nats_per_code", "histogram of codes", "--"),
            ("position_nats_per_code", "histogram per position", ":"),
        )
        for name, label, dashes in baselines:
            if f"{split}/{name}" in metrics:
                left.axhline(
                    metrics[f"{split}/{name}"]["value"], color=QUIET, ls=dashes, label=label
                )
        left.set(title="Prior: nats per code", xlabel="steps")
        left.legend(loc="upper right", bbox_to_anchor=(1, 0.78))
        plot_curve(right, curves, "val/accuracy", "validation", VAL)
        right.set(title="Prior: share of codes predicted", xlabel="steps", ylim=(0, None))

    return draw_svg((9, 2.8), 2, paint)


def plot_histogram(counts: Array) -> str:
    """Plot the share of each code in the training split, the most used first.

    Args:
        counts: Histogram (K,), or (Q, K) for Q codebooks, which each get a line.
    """
    histograms = np.atleast_2d(counts)

    def paint(axes: list[Axes]) -> None:
        size = histograms.shape[1]
        for number, histogram in enumerate(histograms):
            share = np.sort(histogram)[::-1] / histogram.sum() * 100
            if len(histograms) == 1:
                axes[0].fill_between(np.arange(size), share, step="mid", color=TRAIN)
            else:
                style = {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number % 4]}
                label = f"codebook {number + 1}"
                axes[0].plot(share, drawstyle="steps-mid", label=label, **style)
        axes[0].axhline(100 / size, color=EXTRA, ls="--", label="equal use")
        title = f"Use of the {size} codes, most used first"
        axes[0].set(title=title, xlabel="rank", ylabel="% of codes", xlim=(0, size), ylim=(0, None))
        axes[0].legend()

    return draw_svg((9, 2.4), 1, paint)


def plot_code_maps(images: Array, codes: Array, counts: Array, columns: int = 10) -> str:
    """Show images above their codes, coloured by frequency.

    Args:
        images: Images (N, C, H, W) uint8.
        codes: Codes (N, h, w), or (N, h, w, Q), of which each codebook gets a row.
        counts: Histogram (K,), or (Q, K), of the training codes.
        columns: Largest number of images.
    """
    histograms = np.atleast_2d(counts)
    maps = codes.reshape(*codes.shape[:3], len(histograms))
    # Twice sorted: the rank of each code, 0 for the most frequent of its codebook.
    ranks = np.argsort(np.argsort(-histograms, axis=1), axis=1)
    shown = min(columns, len(images))

    def paint(axes: list[Axes]) -> None:
        for column in range(shown):
            picture = images[column].transpose(1, 2, 0)
            axes[column].imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
            for number, rank in enumerate(ranks):
                below = axes[(number + 1) * shown + column]
                colours = rank[maps[column, :, :, number]]
                below.imshow(colours, cmap="viridis", vmin=0, vmax=len(rank) - 1)
        for one in axes:
            one.set_axis_off()

    rows = 1 + len(histograms)
    return draw_svg((9, 0.975 * rows), shown, paint, rows=rows)


def plot_rate(metrics: dict[str, Any], split: str) -> str:
    """Plot the bits per dimension of the pixels and of the codes."""

    def paint(axes: list[Axes]) -> None:
        pixels = metrics[f"{split}/reconstruction_bits_per_dim"]["value"]
        rates = [
            (label, metrics[f"{split}/{name}_bits_per_dim"]["value"])
            for label, name in (
                ("uniform", "uniform"),
                ("histogram", "histogram"),
                ("prior", "prior"),
            )
            if f"{split}/{name}_bits_per_dim" in metrics
        ][::-1]
        names = [label for label, _ in rates]
        axes[0].barh(names, [pixels] * len(rates), color=TRAIN, label="pixels given the codes")
        costs = [cost for _, cost in rates]
        axes[0].barh(names, costs, left=pixels, color=EXTRA, label="codes")
        for row, cost in enumerate(costs):
            axes[0].text(pixels + cost, row, f" {pixels + cost:.3f}", va="center")
        title = "Bits per dimension, by what predicts the codes"
        axes[0].set(title=title, xlim=(0, (pixels + max(costs)) * 1.1))
        axes[0].grid(visible=False, axis="y")
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)

    return draw_svg((9, 1.9), 1, paint)
