"""Tables and figures of each study, made from the raw results next to its page."""

from collections.abc import Callable

from pages import (
    bits_per_dim,
    codebook_size,
    posterior_collapse,
    quantizers,
    reference_settings,
    settings,
    training_dynamics,
)

PAGES = {
    "quantizers": quantizers,
    "codebook_size": codebook_size,
    "training_dynamics": training_dynamics,
    "posterior_collapse": posterior_collapse,
    "reference_settings": reference_settings,
    bits_per_dim.BITS: bits_per_dim,
    ".": settings,
}
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    study: page.TABLES for study, page in PAGES.items()
}
"""Tables of each study, by the name in its README; `.` is the page of all studies."""
FIGURES: dict[str, dict[str, Callable[[], None]]] = {
    study: page.FIGURES for study, page in PAGES.items()
}
"""Figures of each study, by the name of the PNG file."""
