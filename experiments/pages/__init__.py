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

TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "quantizers": quantizers.TABLES,
    "codebook_size": codebook_size.TABLES,
    "training_dynamics": training_dynamics.TABLES,
    "posterior_collapse": posterior_collapse.TABLES,
    "reference_settings": reference_settings.TABLES,
    bits_per_dim.BITS: bits_per_dim.TABLES,
    ".": settings.TABLES,
}
"""Tables of each study, by the name in its README; `.` is the page of all studies."""
FIGURES: dict[str, dict[str, Callable[[], None]]] = {
    "quantizers": quantizers.FIGURES,
    "codebook_size": codebook_size.FIGURES,
    "training_dynamics": training_dynamics.FIGURES,
    "posterior_collapse": posterior_collapse.FIGURES,
    "reference_settings": reference_settings.FIGURES,
    bits_per_dim.BITS: bits_per_dim.FIGURES,
}
"""Figures of each study, by the name of the PNG file."""
