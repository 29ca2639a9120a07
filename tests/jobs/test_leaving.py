"""All ranks leave a job together at its end; after a failure, no rank waits for another."""

import pickle
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from vqvae_lightning import configs
from vqvae_lightning.callbacks.checkpoints import LastCheckpoint
from vqvae_lightning.commands import worker
from vqvae_lightning.distributed import leave
from vqvae_lightning.errors import DivergenceError, InputError, Interrupted, RankError
from vqvae_lightning.jobs import launched_ranks, local_ranks


@pytest.fixture
def events(monkeypatch):
    """Calls to a simulated process group and to simulated processes of other ranks."""
    seen = []
    connected = {"now": True}

    def disconnect(how):
        seen.append(how)
        connected["now"] = False

    class Rank:
        returncode = None

        def __init__(self, *arguments, **options):
            connected["now"] = True

        def poll(self):
            return self.returncode

        def wait(self, timeout=None):
            seen.append("wait")
            self.returncode = self.returncode or 0

        def kill(self):
            seen.append("kill")

    monkeypatch.setattr(local_ranks.subprocess, "Popen", Rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: connected["now"])
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append("join"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: disconnect("destroy"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: disconnect("abort"), raising=True
    )
    monkeypatch.setattr(local_ranks.time, "sleep", lambda _: None)
    return SimpleNamespace(seen=seen, rank=Rank)


AGREED = Interrupted("Stopped by SIGTERM after step 10.", 75, agreed=True)
ALONE = Interrupted("Stopped by SIGTERM.", 75)
ENDS = {
    "success": (None, "destroy"),
    "agreed": (AGREED, "destroy"),
    "alone": (ALONE, "abort"),
    "ctrl-c": (KeyboardInterrupt(), "abort"),
    "bad input": (InputError("x=1"), "abort"),
    "divergence": (DivergenceError("nan"), "abort"),
    "bug": (ValueError("y"), "abort"),
}


@pytest.mark.parametrize("end", ENDS)
def test_rank_0_leaves_before_it_waits_for_the_others(end, events, tmp_path):
    error, expected = ENDS[end]
    cfg = OmegaConf.create({"trainer": {"devices": 3}, "trust": []})
    caught = None
    try:
        with local_ranks.start_local_ranks(cfg, tmp_path, "module", 3):
            if error is not None:
                raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    assert events.seen[0] == expected
    assert set(events.seen[1:]) <= {"wait", "kill"}
    assert "wait" in events.seen


def test_a_rank_that_does_not_end_is_reported_in_one_line(events, tmp_path, monkeypatch):
    def stuck(self, timeout=None):
        if timeout is not None:
            raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(events.rank, "wait", stuck)
    cfg = OmegaConf.create({"trainer": {"devices": 2}, "trust": []})
    expected = (
        rf"rank 1 was still running 30 s after the job had ended \(its output: {tmp_path}/ranks/"
    )
    with (
        pytest.raises(RankError, match=expected),
        local_ranks.start_local_ranks(cfg, tmp_path, "module", 2),
    ):
        pass
    assert events.seen == ["destroy", "kill"]


@pytest.fixture
def launched():
    """Rank 0 of two ranks that a launcher started."""
    rank = object.__new__(launched_ranks.LaunchedRanks)
    rank.environment = SimpleNamespace(local_rank=lambda: 0)
    rank.rank, rank.world, rank.broken = 0, 2, False
    rank._sent, rank._store = 0, dist.HashStore()
    return rank


@pytest.mark.parametrize("end", ENDS)
def test_a_launched_rank_waits_for_the_others_only_if_all_leave(end, events, launched):
    error, expected = ENDS[end]
    caught = None
    try:
        with launched._connect("cpu"):
            if error is not None:
                raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    assert events.seen == ["join", expected]
    # The other ranks may wait in a collective, so that they can run no other job.
    assert launched.broken == (expected == "abort")


def test_the_failure_of_another_rank_is_reported_in_one_line(events, launched):
    with pytest.raises(RankError, match="another rank failed"), launched._connect("cpu"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert events.seen == ["join", "abort"]


@pytest.mark.parametrize(("stop", "waits"), [(AGREED, True), (ALONE, False)])
def test_a_rank_that_was_stopped_alone_does_not_wait_for_rank_0(
    stop, waits, events, launched, monkeypatch
):
    def run(cfg):
        raise stop

    launched.rank = 1
    monkeypatch.setattr(launched_ranks, "import_module", lambda name: SimpleNamespace(run=run))
    text = "trainer: {accelerator: cpu}"
    messages = iter([["module", text], None])
    monkeypatch.setattr(launched, "_receive", lambda: next(messages))
    with pytest.raises(SystemExit) as ended:
        launched.follow()
    assert ended.value.code == 75
    assert (next(messages, "none left") == "none left") == waits


@pytest.mark.parametrize("end", ENDS)
def test_the_other_ranks_leave_as_rank_0_does(end, events, monkeypatch):
    error, expected = ENDS[end]

    def run(cfg):
        if error is not None:
            raise error

    monkeypatch.setattr(worker, "run", run)
    monkeypatch.setattr(worker.sys, "argv", ["worker", "config.yaml"])
    monkeypatch.setattr(configs, "read_trusted", lambda path, trusted: {})
    caught = None
    try:
        worker.main()
    except BaseException as raised:
        caught = raised
    assert caught is (None if end == "agreed" else error)
    assert events.seen == [expected]


def test_a_stop_between_steps_is_agreed_on_by_all_ranks(monkeypatch):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    callback = LastCheckpoint("last.ckpt")
    callback._requested = 15
    with pytest.raises(Interrupted) as stopped:
        callback._stop("after step 3")
    assert stopped.value.agreed
    assert pickle.loads(pickle.dumps(stopped.value)).agreed
    assert not pickle.loads(pickle.dumps(ALONE)).agreed


@pytest.mark.parametrize("together", [True, False])
def test_ranks_can_connect_again_after_they_left(together):
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        leave(together)
        assert not dist.is_initialized()
        leave(together)  # does nothing the second time


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("together", [True, False])
def test_ranks_on_gpus_leave(together):
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device="cuda"))
    leave(together)
    assert not dist.is_initialized()
