"""Decoders that use their latents, or not: jobs of the sweeps with what `analysis.py` measured."""

import csv
from functools import partial

import matplotlib.pyplot as plt

from pages import results
from pages.figures import save
from pages.results import Group, Row, group_rows, list_swept_keys, read_rows, reader
from pages.tables import Column, format_table

PIXELS = 28 * 28
NAMES = {"gaussian_elbo": "VAE", "gaussian_free_bits": "VAE, free bits", "ema": "VQ-VAE"}
"""What the figure calls the quantizers of `sweep=posterior_collapse`."""


def group_latents(sweep: str) -> list[Group]:
    """Group the jobs of a sweep, each with what `analysis.py` measured of it."""
    path = results.ROOT / f"posterior_collapse/{sweep}_latents.csv"
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing: run analysis.py there first.")
    with path.open(newline="") as file:
        found = {row["folder"]: row for row in csv.DictReader(file)}
    rows = [row | found[row["folder"]] for row in read_rows(sweep)]
    return group_rows(rows, *list_swept_keys(sweep))


def bits_used(row: Row) -> float:
    """Bits per image that the decoder saves by the image's own latents."""
    return (float(row["other"]) - float(row["own"])) * PIXELS


def tabulate_latents(sweep: str, *titles: str) -> str:
    """Make the table of a sweep."""
    columns = [
        Column("rate, bits/dim", reader("rate"), ".3f"),
        Column("distortion", reader("own"), ".3f"),
        Column("total", lambda row: float(row["own"]) + float(row["rate"]), ".3f"),
        Column("distortion, latents of another image", reader("other"), ".3f"),
        Column("bits per image that the decoder uses", bits_used, ".0f"),
    ]
    return format_table(titles, group_latents(sweep), columns)


def draw_latents() -> None:
    """Draw the bits that the latents cost and that each decoder uses, for `posterior_collapse`."""
    groups = group_latents("posterior_collapse")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for axis, decoder in zip(axes, ("convolutional", "pixelcnn"), strict=True):
        draw_bits(axis, {NAMES[group.key[1]]: group for group in groups if group.key[0] == decoder})
        axis.set(title=f"decoder: {decoder}", xlim=(0, 4000))
        axis.locator_params(axis="x", nbins=4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, "posterior_collapse", "latents")


def draw_beta() -> None:
    """Draw the bits that the latents cost and that the decoder uses, for `beta`."""
    figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
    draw_bits(axis, {f"beta {group.key[0]}": group for group in group_latents("beta")})
    axis.margins(x=0.15)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, "posterior_collapse", "beta")


def draw_bits(axis: plt.Axes, groups: dict[str, Group]) -> None:
    """Draw two bars per group, from top to bottom: the cost of the latents, and their use."""
    found = list(groups.values())[::-1]
    for shift, title, value, colour in (
        (0.2, "cost of the latents", lambda row: float(row["rate"]) * PIXELS, "#b8c4cc"),
        (-0.2, "used by the decoder", bits_used, "#0b6e99"),
    ):
        means, deviations = zip(*(group.measure(value) for group in found), strict=True)
        places = [number + shift for number in range(len(found))]
        bars = axis.barh(places, means, 0.4, xerr=deviations, capsize=3, color=colour, label=title)
        axis.bar_label(bars, fmt="%.0f", padding=4)  # a bar of 2 bits is not seen
    axis.set_yticks(range(len(found)), list(groups)[::-1])
    axis.set_xlabel("bits per image")


TABLES = {
    "latents": partial(tabulate_latents, "posterior_collapse", "`model/decoder=`", "`quantizer=`"),
    "beta": partial(tabulate_latents, "beta", "`beta`"),
}
FIGURES = {"latents": draw_latents, "beta": draw_beta}
