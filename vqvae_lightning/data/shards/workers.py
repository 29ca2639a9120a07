"""Processes that read shards."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# A new interpreter takes seconds to import torch, for each worker of each loader. Workers use no
# GPU, print nothing and compute on one thread: what makes a fork unsafe they keep away from.
START = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Let workers start with SIGTERM blocked, in threads too that a library starts at the fork."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(number: int) -> None:
    """Leave signals to the process that trains: it may want batches until it has saved."""
    torch.set_num_threads(1)  # others that the parent had do not survive a fork
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # Windows has the first one only
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """End at the SIGTERM with which the process that trains ends its workers; at no other's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
