"""The terminal: one console and one progress bar."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

WIDE = 100_000  # columns; no line is longer


class LineConsole(Console):
    """A console that breaks lines on a terminal only, not in a file or a pipe."""

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """Columns and rows of the terminal; without a terminal, `WIDE` columns."""
        size = super().size
        return size if self.is_terminal else ConsoleDimensions(WIDE, size.height)


console = LineConsole()


class PositionColumn(ProgressColumn):
    """What is done and how much there is, in steps if the bar has `images_per_step`."""

    def render(self, task: Task) -> Text:
        """Text such as `step 3/10` or `96/500`."""
        return Text(_format_position(task), style="progress.download")


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """The mean speed of the last seconds."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s", style="cyan")


class ImageProgress:
    """Progress of one long operation, in images.

    On a terminal this is a bar, which `stop` removes. Without one, `report` prints a line.

    Args:
        description: Text to the left of the bar.
        images: Number of images at the end; None if unknown.
        images_per_step: Images per optimizer step, to show steps rather than images.
        done: Images that are already done.

    Attributes:
        on_terminal: Whether a bar is shown.
    """

    def __init__(
        self,
        description: str,
        images: int | None,
        images_per_step: int | None = None,
        done: int = 0,
    ) -> None:
        self.on_terminal = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            PositionColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not self.on_terminal,
        )
        self._task = self._progress.add_task(
            description, total=images, completed=done, images_per_step=images_per_step, note=""
        )
        self._reported = time.perf_counter(), done
        self._progress.start()

    def advance(self, images: int) -> None:
        """Add images that have just been finished."""
        self._progress.advance(self._task, images)

    def update(self, done: int, note: str) -> None:
        """Set the number of images done, and the text to the right of the bar."""
        self._progress.update(self._task, completed=done, note=note)

    def note(self, text: str) -> None:
        """Show `text` to the right of the bar at once."""
        self._progress.update(self._task, note=text, refresh=True)

    def report(self, done: int, text: str) -> None:
        """Update the bar. Without a terminal, print a line with the rate since the last report."""
        self.update(done, text)
        if self.on_terminal:
            return
        now, (then, before) = time.perf_counter(), self._reported
        self._reported = now, done
        position = _format_position(self._progress.tasks[0])
        rate = (done - before) / (now - then)
        console.print(f"{position}  {rate:,.0f} images/s  {text}", highlight=False)

    def stop(self) -> None:
        """Remove the bar."""
        self._progress.stop()


@contextmanager
def show_progress(description: str, images: int | None) -> Iterator[Callable[[int], None]]:
    """Show an `ImageProgress` within the block.

    Args:
        description: Text to the left of the bar.
        images: Number of images at the end; None if unknown.

    Yields:
        A function to call with the number of images just finished.
    """
    progress = ImageProgress(description, images)
    try:
        yield progress.advance
    finally:
        progress.stop()


def _format_position(task: Task) -> str:
    per_step = task.fields["images_per_step"]
    total = "?" if task.total is None else int(task.total) // (per_step or 1)
    done = int(task.completed) // (per_step or 1)
    return f"{'step ' if per_step else ''}{done}/{total}"


def print_line(line: str) -> None:
    """Print a line as it is: without markup, colours or line breaks of the console's width."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
