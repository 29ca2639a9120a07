"""Signals that stop a command: Ctrl-C and the signals of schedulers."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vqvae_lightning.errors import Interrupted
from vqvae_lightning.runs.folder import RunFolder


@contextmanager
def handle_signals(name: str, folder: Path) -> Iterator[None]:
    """Turn a signal that arrives during the block into an `Interrupted` that says how to resume.

    They cover everything but training, during which `LastCheckpoint` has its own handlers: reading
    data, testing, evaluating, drawing samples and writing shards.

    Args:
        name: Name of the command.
        folder: Folder of the run.

    Raises:
        Interrupted: With status 130 after Ctrl-C and 75 after a scheduler's signal.
    """
    with interrupt_on_signals():
        try:
            yield
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:  # Lightning exits on Ctrl-C
            begun = RunFolder(folder).is_begun
            hint = f" Resume with: {name} resume={folder}" if begun else ""
            if isinstance(stop, Interrupted):
                raise Interrupted(f"{stop}{hint}", stop.status, stop.agreed) from stop
            # Lightning raises this when a SIGTERM arrives during a test.
            if type(stop).__name__ == "SIGTERMException":
                raise Interrupted(f"Stopped by SIGTERM.{hint}", 75) from stop
            raise Interrupted(f"Interrupted.{hint}") from stop


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise `Interrupted` when a scheduler's signal arrives during the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}.", 75)

    # submitit's own handlers requeue the job. Only the main thread may set handlers.
    if "SUBMITIT_EXECUTOR" in os.environ or threading.current_thread() != threading.main_thread():
        yield
        return
    # Windows has no SIGUSR2.
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
