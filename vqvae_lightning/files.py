"""Files that no reader ever sees half-written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end of the block it replaces `path` in one step.

    A reader sees the old file or the new one. A block that fails leaves the old one alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")  # Windows has another, in which none reads YAML
