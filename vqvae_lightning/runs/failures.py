"""`failure.txt`: why a job of a sweep failed."""

import shlex
from pathlib import Path
from typing import NamedTuple

from vqvae_lightning.errors import join_lines
from vqvae_lightning.files import write_text
from vqvae_lightning.runs.folder import RunFolder


class Failure(NamedTuple):
    """Why a job of a sweep failed."""

    error: str
    overrides: list[str]


def write_failure(folder: Path, error: str, overrides: list[str], trace: str) -> None:
    """Write `failure.txt` into a job's folder.

    Args:
        folder: Folder of the job.
        error: The error; line breaks become spaces.
        overrides: Overrides of the job.
        trace: Traceback of the error.
    """
    write_text(
        RunFolder(folder).failure, f"{join_lines(error)}\n{shlex.join(overrides)}\n\n{trace}"
    )


def read_failure(folder: Path) -> Failure | None:
    """Read what `write_failure` wrote; None if the job has not failed."""
    path = RunFolder(folder).failure
    if not path.is_file():
        return None
    error, overrides = path.read_text(encoding="utf-8").split("\n")[:2]
    return Failure(error, shlex.split(overrides))
