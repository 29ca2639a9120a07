"""Features that macOS or Windows lacks, removed on Linux."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import compose

from vqvae_lightning.callbacks.checkpoints import LastCheckpoint
from vqvae_lightning.data.shards import workers
from vqvae_lightning.errors import InputError, Interrupted
from vqvae_lightning.files import write_text
from vqvae_lightning.jobs import parallel, signals
from vqvae_lightning.runs import claims
from vqvae_lightning.runs.claims import claim_folder


@pytest.fixture
def _windows_signals(monkeypatch):
    """Leave the signals of Windows, which has no SIGUSR1, no SIGUSR2 and no signal masks."""
    for name in ("SIGUSR1", "SIGUSR2", "pthread_sigmask", "sigwaitinfo"):
        monkeypatch.delattr(signal, name)
    known = dict(signal.Signals.__members__)
    for name in ("SIGUSR1", "SIGUSR2"):
        known.pop(name)
    monkeypatch.setattr(signal, "Signals", SimpleNamespace(__members__=known))


@pytest.mark.usefixtures("_windows_signals")
def test_commands_stop_on_the_signals_that_the_system_has(tmp_path):
    cfg = compose("vqvae", folder=tmp_path)
    last = LastCheckpoint("last.ckpt", signals=cfg.callbacks.last.signals)
    assert last.signals == [signal.SIGINT, signal.SIGTERM]
    with pytest.raises(InputError, match="SIGNOTHING"):
        LastCheckpoint("last.ckpt", signals=["SIGNOTHING"])
    before = signal.getsignal(signal.SIGTERM)
    with signals.interrupt_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with parallel.forward_signals(tmp_path) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]


@pytest.mark.usefixtures("_windows_signals")
def test_workers_of_shards_ignore_the_signals_that_the_system_has(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        workers.torch, "set_num_threads", lambda _: None
    )  # would limit this process too
    try:
        with workers.block_sigterm():
            workers.init_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_jobs_run_in_parallel_where_the_system_has_no_cpu_affinity(command, monkeypatch):
    # macOS has none.
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(parallel, "list_visible_gpus", list)
    seen = []

    def make_jobs(self, overrides, first):
        seen.append(overrides)
        raise Interrupted("enough")

    monkeypatch.setattr(parallel.JoblibLauncher, "make_jobs", make_jobs)
    outcome = command("vqvae-train", "hydra/launcher=joblib", "seed=0,1")
    assert outcome.status == 130, outcome.err
    assert len(seen[0]) == 2


def test_gpus_are_shared_with_the_locks_of_windows(tmp_path, monkeypatch):
    locked = []

    def locking(file, mode, count):
        if locked:
            locked.clear()
            raise PermissionError
        locked.append((mode, count))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(parallel, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parallel.take_gpus(str(tmp_path), [["4"], ["7"]])
    assert (locked, os.environ["CUDA_VISIBLE_DEVICES"]) == ([(2, 1)], "4")
    parallel.take_gpus(str(tmp_path), [["4"], ["7"]])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_a_process_on_windows_is_not_checked_with_a_signal(tmp_path, monkeypatch):
    # On Windows, signal 0 is Ctrl-C.
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(claims.os, "kill", lambda *_: pytest.fail("it sent a signal"))
    with (
        claim_folder(tmp_path),
        pytest.raises(InputError, match=r"if that process has ended.*delete"),
        claim_folder(tmp_path),
    ):
        pass


def test_an_existing_file_is_replaced_without_rename(tmp_path, monkeypatch):
    # On Windows, `rename` refuses an existing name.
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: pytest.fail("it renamed"))
    for text in ("old", "new"):
        write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "new"


def test_files_are_utf8_in_every_locale(tmp_path):
    job = (
        "import sys; from pathlib import Path\n"
        "from vqvae_lightning.runs.failures import read_failure, write_failure\n"
        "write_failure(Path(sys.argv[1]), 'no caf\\u00e9', ['study=\\u00e9'], '')\n"
        "assert read_failure(Path(sys.argv[1])).error == 'no caf\\u00e9'\n"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run(
        [sys.executable, "-c", job, str(tmp_path)], env={**os.environ, **ascii_only}, check=True
    )
    assert "café" in (tmp_path / "failure.txt").read_text(encoding="utf-8")
