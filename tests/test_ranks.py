"""Two ranks end with the codebook of one process that sees both their batches."""

import copy

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


def rank(number, port, quantizer, results):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    # A copy: what is sent to a process here stays in memory that both ranks share.
    results[number] = run(copy.deepcopy(quantizer), lambda both: both[number])
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])
@pytest.mark.parametrize("init", ["kmeans", "data", "uniform"])
def test_two_ranks_end_with_the_codebook_of_one_process(make, init):
    # Built before the process group, as Lightning does: a decision at construction would be wrong.
    quantizer = make(24, 4, init=init, warmup_steps=1, decay=0.7, revive_below=0.5, revive_every=2)
    alone = run(copy.deepcopy(quantizer), torch.cat)
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank, (store.port, quantizer, results), nprocs=2)
        first, second = results[0], results[1]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)
    assert (alone[1:] != alone[:-1]).any(), "nothing was learnt"
