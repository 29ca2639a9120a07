"""How long a run has taken, including its parts before an interruption."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter

from vqvae_lightning.errors import InputError
from vqvae_lightning.files import write_text
from vqvae_lightning.runs.folder import RunFolder


class Stopwatch:
    """Time of a run or stage, including its parts before an interruption.

    Args:
        folder: Folder of the run or stage; earlier parts may have stored their time in it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = RunFolder(folder).seconds
        stored = self._path.is_file()
        self._before = float(json.loads(self._path.read_text())["seconds"]) if stored else 0.0
        self._start = perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of the earlier parts and of this one so far."""
        return self._before + perf_counter() - self._start

    def keep(self) -> None:
        """Store the time, so that it is known even if this process is killed."""
        write_text(self._path, json.dumps({"seconds": self.seconds}))

    def forget(self) -> None:
        """Delete the stored time of a finished run, whose result contains it."""
        self._path.unlink(missing_ok=True)


@contextmanager
def time_stage(folder: Path) -> Iterator[Stopwatch]:
    """Time the block; if it fails or is interrupted, store its seconds for when it is resumed.

    A block that refuses its input before the run has begun stores nothing.
    """
    watch = Stopwatch(folder)
    try:
        yield watch
    except BaseException as error:
        if not isinstance(error, InputError) or RunFolder(folder).is_begun:
            with suppress(OSError):  # on a full disk, say, the original error is what matters
                watch.keep()
        raise
    watch.forget()
