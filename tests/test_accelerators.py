"""A missing GPU is reported in one line, and a CPU job does not touch a GPU."""

import pytest
import torch
from conftest import TINY_VQVAE, compose

from vqvae_lightning.jobs.launched_ranks import choose_backend
from vqvae_lightning.stages import training
from vqvae_lightning.stages.training import train


@pytest.fixture
def forbidden_gpu(monkeypatch):
    """Simulate a machine with one GPU, and fail the test if it is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("set_device", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the GPU was used"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
    # Torch's optimizers would look for the simulated GPU.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("preflight", ["true", "false"])
@pytest.mark.parametrize("trainer", ["ddp", "gpu"])
def test_a_gpu_job_without_a_gpu_ends_with_one_line(trainer, preflight, toy, command):
    # trainer=ddp must not divide the batch by the number of GPUs, which is zero.
    outcome = command("vqvae-train", *toy, f"trainer={trainer}", f"preflight={preflight}")
    assert outcome.status == 1
    assert outcome.err.splitlines() == [
        "error: trainer.accelerator=gpu: this machine has no CUDA device; use "
        "trainer.accelerator=cpu."
    ]


@pytest.mark.usefixtures("forbidden_gpu")
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_on_the_cpu_talk_without_a_gpu(rank):
    # Rank 1 of two must not request a second GPU on a machine with one.
    assert choose_backend("cpu", rank) == "gloo"


@pytest.mark.usefixtures("forbidden_gpu")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_training_on_the_cpu_uses_no_gpu(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "get_local_rank", lambda: 1)
    result = train(compose("vqvae", *toy, *TINY_VQVAE, folder=tmp_path))
    assert result["peak_gpu_bytes"] is None
