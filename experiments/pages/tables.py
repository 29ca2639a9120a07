"""Tables of means and deviations over the seeds, in Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pages.results import BASELINES, Group, Row, group_sweep, metric


class Column(NamedTuple):
    """A column of a table: its title, its value for a job, and how to print it."""

    title: str
    value: Callable[[Row], float]
    format: str = ".4f"


def is_within_spread(mean: float, deviation: float, other: float, others: float) -> bool:
    """Tell whether two means are closer than twice the larger of their deviations."""
    return abs(mean - other) <= 2 * max(deviation, others)


def format_mean(group: Group, column: Column) -> str:
    """Format mean and standard deviation of a column over the seeds."""
    mean, deviation = group.measure(column.value)
    return f"{mean:{column.format}} ± {deviation:{column.format}}"


def format_rows(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Format a Markdown table, whose first `words` columns are words and the others numbers."""
    lines = [
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * words}{' ---: |' * (len(titles) - words)}",
    ]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def format_table(
    titles: Sequence[str], groups: Sequence[Group], columns: Sequence[Column], baseline: int = 0
) -> str:
    """Format a Markdown table with a row per group; `=` marks equality with row `baseline`."""
    rows = []
    for number, group in enumerate(groups):
        cells = [f"`{value}`" for value in group.key]
        for column in columns:
            same = number != baseline and is_within_spread(
                *group.measure(column.value), *groups[baseline].measure(column.value)
            )
            cells.append(f"{format_mean(group, column)}{' =' if same else ''}")
        rows.append(cells)
    return format_rows([*titles, *(column.title for column in columns)], rows, len(titles))


NMSE = Column("test NMSE", metric("nmse"))
USE = Column("codes in use", metric("codebook_use"), ".1%")
PERPLEXITY = Column("perplexity", metric("perplexity"), ".0f")
ACCURACY = Column("accuracy of samples", metric("sample_accuracy"), ".1%")
FRECHET = Column("Fréchet distance of samples", metric("sample_fid"), ".1f")


def tabulate_sweep(
    sweep: str, titles: Sequence[str], columns: Sequence[Column] = (NMSE, USE, PERPLEXITY)
) -> str:
    """Make the table of a sweep, with the row of the default recipe as the baseline."""
    return format_table(titles, group_sweep(sweep), columns, BASELINES.get(sweep, 0))
