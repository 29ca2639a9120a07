"""`failure.txt`: why a job of a sweep failed."""

import shlex
from pathlib import Path
from typing import NamedTuple

from vqvae_lightning.files import write_text

FAILURE = "failure.txt"
"""File in the folder of a failed job, with its error, its overrides and the traceback."""


class Failure(NamedTuple):
    """Why a job of a sweep failed."""

    error: str
    overrides: list[str]


def write_failure(folder: Path, error: str, overrides: list[str], trace: str) -> None:
    """Write `failure.txt` to a job's folder: the error in one line, overrides, and traceback."""
    line = " ".join(error.split())
    write_text(folder / FAILURE, f"{line}\n{shlex.join(overrides)}\n\n{trace}")


def read_failure(folder: Path) -> Failure | None:
    """Read what `write_failure` wrote; None if the job has not failed."""
    path = folder / FAILURE
    if not path.is_file():
        return None
    error, overrides = path.read_text(encoding="utf-8").split("\n")[:2]
    return Failure(error, shlex.split(overrides))
