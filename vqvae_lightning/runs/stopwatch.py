"""Seconds that a run has taken, summed over its interruptions."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text

SECONDS = "seconds.json"
"""File of an unfinished run or stage: how long it has taken so far."""


class Stopwatch:
    """Seconds that a run or stage has taken, summed over the parts between interruptions.

    Args:
        folder: Folder of the run or stage, where earlier parts have stored their sum.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SECONDS
        known = self._path.is_file()
        self._before = float(json.loads(self._path.read_text())["seconds"]) if known else 0.0
        self._start = perf_counter()

    @property
    def seconds(self) -> float:
        """Sum of the earlier parts and of this one until now."""
        return self._before + perf_counter() - self._start

    def keep(self) -> None:
        """Write the sum, so that it survives even if this process is killed."""
        write_text(self._path, json.dumps({"seconds": self.seconds}))

    def forget(self) -> None:
        """Delete the stored sum, which the result now contains."""
        self._path.unlink(missing_ok=True)


@contextmanager
def time_stage(folder: Path) -> Iterator[Stopwatch]:
    """Time the block; if it fails, store its seconds for the next part of the same run.

    If the block refuses its input before the run has begun, nothing is stored.
    """
    watch = Stopwatch(folder)
    try:
        yield watch
    except BaseException as error:
        if not isinstance(error, InputError) or (folder / "config.yaml").is_file():
            with suppress(OSError):  # such as a full disk: the block's error is the one to report
                watch.keep()
        raise
    watch.forget()
