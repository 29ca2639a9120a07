"""What the figures of the studies share: bars, and a file that knows which results it shows."""

import hashlib
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.container import BarContainer

from pages import results
from pages.results import Group, Row

plt.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})


def draw_bars(
    axis: plt.Axes,
    labels: Sequence[str],
    groups: Sequence[Group],
    value: Callable[[Row], float],
    colour: str,
) -> BarContainer:
    """Draw mean and deviation of each group as a horizontal bar, from bottom to top."""
    means, deviations = zip(*(group.measure(value) for group in groups), strict=True)
    return axis.barh(labels, means, xerr=deviations, color=colour, capsize=3)


def hash_data(study: str) -> str:
    """Hash the raw results of a study; each figure stores the hash of those it shows."""
    digest = hashlib.sha256()
    for path in sorted((results.ROOT / study).iterdir()):
        if path.suffix in (".csv", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def save(figure: plt.Figure, study: str, name: str) -> None:
    """Save a figure of a study, with the hash of its data."""
    path = results.ROOT / study / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Source": hash_data(study), "Software": ""})
    plt.close(figure)
