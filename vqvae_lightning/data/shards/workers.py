"""Worker processes that read shards: how they start and which signals they ignore."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A spawned interpreter takes seconds to import torch, for each worker of each loader. Forking is
# safe here, because workers use no GPU, print nothing and compute on one thread.
START = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def block_sigterm() -> Iterator[None]:
    """Start workers with SIGTERM blocked, also in threads that a library starts at the fork."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(number: int) -> None:
    """Ignore signals: the training process handles them and may need batches until it has saved."""
    torch.set_num_threads(1)  # the parent's other threads do not survive a fork
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has only SIGINT
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm, daemon=True).start()


def _exit_on_sigterm() -> None:
    """Exit on SIGTERM from the parent, which ends its workers with it; ignore any other sender."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
