"""The terminal: one console and one progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

WIDE = 100_000  # columns, more than any line has


class LineConsole(Console):
    """A console that breaks no line in a file or a pipe, which has no edge to break it at."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal, if there is one."""
        size = super().size
        return size if self.is_terminal else ConsoleDimensions(WIDE, size.height)


console = LineConsole()


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """The mean speed of the last seconds."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s", style="cyan")


@contextmanager
def progress_bar(description: str, images: int | None) -> Iterator[Callable[[int], None]]:
    """A bar over `images` images, or of unknown length.

    Call what it yields with the number of images just finished.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(description, total=images)
        yield lambda count: progress.advance(task, count)
