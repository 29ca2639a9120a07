"""Writing files so that no reader sees a partial one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` in one step at the end of the block.

    A reader sees the old file or the new one. If the block fails, the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file that contains `text`."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")  # the default of Windows is not that of YAML
