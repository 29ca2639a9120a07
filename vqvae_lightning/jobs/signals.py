"""Signals that stop a command: Ctrl-C and those of schedulers."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqvae_lightning.errors import Interrupted


@contextmanager
def handle_signals(name: str, cfg: Any) -> Iterator[None]:
    """Let an interruption end with the command that goes on from it.

    A scheduler's signal counts also where `LastCheckpoint` does not watch for it: while data are
    read, a checkpoint is tested, or samples are judged.
    """
    with _interrupt_on_signals():
        try:
            yield
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:  # Lightning exits on Ctrl-C
            begun = (Path(cfg.folder) / "config.yaml").is_file()
            hint = f" Go on with: {name} resume={cfg.folder}" if begun else ""
            if isinstance(stop, Interrupted):
                raise Interrupted(f"{stop}{hint}", stop.status) from stop
            # What Lightning makes of a SIGTERM during a test.
            if type(stop).__name__ == "SIGTERMException":
                raise Interrupted(f"Stopped by SIGTERM.{hint}", 75) from stop
            raise Interrupted(f"Interrupted.{hint}") from stop


@contextmanager
def _interrupt_on_signals() -> Iterator[None]:
    """Make an `Interrupted` of the signals with which schedulers announce the end."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"Stopped by {signal.Signals(number).name}.", 75)

    # submitit has handlers of its own, which requeue; and only the main thread may have any.
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
