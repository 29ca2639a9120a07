"""What a logger needs to show pictures and histograms."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

MAX_BARS = 512  # the most that Weights & Biases accepts

Array = np.ndarray[Any, np.dtype[Any]]


class Histogram(NamedTuple):
    """Hits of codes, the most used code first.

    Attributes:
        counts: (K,) hits of each code.
        bars: (B,) hits of each bar. Above `MAX_BARS` codes, neighbouring codes share a bar.
        edges: (B + 1,) positions of the bars' edges, from 0 to K.
    """

    counts: Array
    bars: Array
    edges: Array


def build_histogram(counts: Tensor) -> Histogram:
    """Sort the hits (K,) of each code and sum them into bars."""
    heights = counts.sort(descending=True).values.cpu().double().numpy()
    edges = np.linspace(0, len(heights), min(len(heights), MAX_BARS) + 1)
    bars, _ = np.histogram(np.arange(len(heights)), edges, weights=heights)
    return Histogram(heights, bars, edges)


class MediaWriter(Protocol):
    """Writes pictures and histograms to one logger."""

    def write_picture(
        self, name: str, picture: Array, step: int, parts: dict[str, Array] | None = None
    ) -> None:
        """Write a picture.

        Args:
            name: Logged name.
            picture: (H, W, 3) uint8.
            step: Logged step.
            parts: The same picture in parts, by caption.
        """

    def write_histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Write a histogram under a logged name."""
