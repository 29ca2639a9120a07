"""A scheduler's signal ends every command with status 75, one line, and no unfinished files."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from vqvae_lightning.runs.folder import CLAIM


@pytest.fixture(params=["SIGTERM", "SIGUSR2"])
def send(request):
    """Send this process a signal, which fails the test if the command does not handle it."""
    number = signal.Signals[request.param]

    def fail(*_):
        pytest.fail(f"{number.name} was not handled")

    def send():
        os.kill(os.getpid(), number)
        time.sleep(10)  # the handler runs here

    send.name = number.name
    before = signal.signal(number, fail)
    yield send
    assert signal.getsignal(number) == fail, "the command left its handler"
    signal.signal(number, before)


def write_half(send):
    """A replacement of `np.savez_compressed` that is interrupted while it writes."""

    def save(file, **arrays):
        if isinstance(file, str | Path):
            Path(file).write_bytes(b"half")
        else:
            file.write(b"half")
        send()

    return save


@pytest.mark.parametrize(
    ("name", "override", "files"),
    [
        ("vqvae-sample", "prior_checkpoint={}/prior/checkpoints/best.ckpt", "samples"),
        ("vqvae-reconstruct", "vqvae_checkpoint={}/vqvae0/checkpoints/best.ckpt", "reconstruct*"),
    ],
)
def test_a_command_that_was_stopped_can_be_resumed(
    name, override, files, checkpoints, command, send, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", write_half(send))
        stopped = command(name, override.format(checkpoints))
    folder = stopped.folder
    assert stopped.status == 75
    assert stopped.err == f"Stopped by {send.name}. Resume with: {name} resume={folder}\n"
    left = {path.name for path in folder.iterdir()}
    assert CLAIM not in left
    assert not [path for path in left if path.startswith(".") or path.endswith(".npz")]

    resumed = command(name, f"resume={folder}")
    assert resumed.status == 0, resumed.err
    assert (folder / "result.json").is_file()
    assert len(list(folder.glob(f"{files}.npz"))) == 1


def test_interrupted_shards_leave_nothing_and_can_be_repeated(toy, command, send, monkeypatch):
    writer = pytest.importorskip("webdataset.writer").TarWriter
    write, written = writer.write, []

    def stop_at_the_third(self, sample):
        written.append(sample)
        if len(written) == 3:
            send()
        return write(self, sample)

    options = (*toy, "output=run", "per_shard=10")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", stop_at_the_third)
        stopped = command("vqvae-shards", *options)
    assert stopped.status == 75
    assert stopped.err == f"Stopped by {send.name}.\n"
    assert not list(stopped.folder.iterdir())

    again = command("vqvae-shards", *options)
    assert again.status == 0, again.err
    assert len(list(again.folder.glob("train-*.tar"))) == 10
