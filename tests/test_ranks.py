"""Two ranks end with the codebook of one process that sees both their batches."""

import subprocess
import sys
from pathlib import Path

import ddp_job
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer

STEPS = 6


def batches(step):
    """Vectors of both ranks, of different number: (first rank's, second rank's)."""
    generator = torch.Generator().manual_seed(step)
    both = 3 * torch.randn(7, 4, 3, 3, generator=generator)
    return both[:4], both[4:]


def run(quantizer, choose):
    """Codebook after each step; a gradient quantizer's rows move by revival and init only."""
    quantizer.train()
    history = []
    for step in range(STEPS):
        quantizer(choose(batches(step)))
        quantizer.update(0.0)
        history.append(quantizer.codebook.detach().clone())
    return torch.stack(history)


QUANTIZERS = {
    f"{make.__name__} {init}": (make, init)
    for make in (EMAQuantizer, LossQuantizer)
    for init in ("kmeans", "data", "uniform")
}


def build(case):
    make, init = QUANTIZERS[case]
    torch.manual_seed(0)
    return make(24, 4, init=init, warmup_steps=1, decay=0.7, revive_below=0.5, revive_every=2)


def rank(number, port, results):
    # Built before the process group, as Lightning does: a decision at construction would be wrong.
    quantizers = {case: build(case) for case in QUANTIZERS}
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    results[number] = {
        case: run(quantizer, lambda both: both[number]) for case, quantizer in quantizers.items()
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks():
    """The codebooks after each step on both ranks."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank, (store.port, results), nprocs=2)
        return results[0], results[1]


@pytest.mark.parametrize("case", QUANTIZERS)
def test_two_ranks_end_with_the_codebook_of_one_process(case, on_two_ranks):
    alone = run(build(case), torch.cat)
    first, second = (histories[case] for histories in on_two_ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)
    assert (alone[1:] != alone[:-1]).any(), "nothing was learnt"


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """What both ranks of real jobs of `Trainer(strategy="ddp")` ended with."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(ddp_job.__file__)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", ddp_job.CASES)
def test_training_on_two_ranks_is_training_in_one_process(case, ddp):
    # With batches of 6 and 7 images: the ranks' parts are uneven in every second step.
    alone, _ = ddp_job.fit(case, devices=1)
    for name, value in alone.items():
        assert torch.equal(ddp[0][case][name], ddp[1][case][name]), name
        torch.testing.assert_close(ddp[0][case][name], value, rtol=1e-4, atol=1e-5)
    moved = (alone["codebooks"][1:] - alone["codebooks"][:-1]).abs().amax((1, 2))
    assert (moved[2:] > 1e-6).all(), "the codebook stood still"
