"""The number, choice and device of the vectors gathered for the first codebook."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch

from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer
from vqvae_lightning.quantizers.codebook import POOL_STEPS


def warm_up(quantizer, steps, make=lambda step: torch.randn(8, 3, 8, 8)):
    """Train `quantizer` for `steps` steps on batches of 512 vectors and return it."""
    for step in range(steps):
        quantizer.train()(make(step))
        quantizer.update(0.0)
    return quantizer


@pytest.mark.parametrize(("init", "per_code"), [("kmeans", 16), ("data", 1), ("uniform", 0)])
def test_a_checkpoint_holds_only_the_vectors_for_the_first_codebook(init, per_code):
    # All vectors of 16 steps would take 8.6 GB in float64, for 64x64 grids and batches of 256.
    quantizer = EMAQuantizer(10, 3, init=init, warmup_steps=99)
    alone = sum(tensor.nbytes for tensor in quantizer.state_dict().values())
    saved = warm_up(quantizer, 98).state_dict()
    sizes = {name: len(tensor) for name, tensor in saved.items() if name.startswith("pool")}
    assert set(sizes.values()) == ({10 * per_code} if per_code else set())
    float32, float64 = 4, 8
    gathered = 10 * per_code * (3 * float32 + float64)
    assert sum(tensor.nbytes for tensor in saved.values()) == alone + gathered
    done = warm_up(quantizer, 1).state_dict()
    assert not any(name.startswith("pool") for name in done)


def test_all_vectors_of_the_last_steps_are_equally_likely_to_be_gathered():
    def fill_with_step(step):
        return torch.full((8, 3, 8, 8), float(step))

    first, last = 3, 3 + POOL_STEPS
    quantizer = EMAQuantizer(128, 3, warmup_steps=last + 1)
    saved = warm_up(quantizer, last, fill_with_step).state_dict()["pool"]
    counts = saved[:, 0].long().bincount(minlength=last)
    expected = 128 * 16 / (POOL_STEPS - 1)  # the last step is still to come
    assert counts[: first + 1].sum() == 0
    # The draw is without replacement, so a binomial's standard deviation, 11, is an upper bound.
    assert ((counts[first + 1 :] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("total", [1000, 1555])
def test_a_warm_up_that_a_short_training_ends_gathers_its_last_steps(total):
    end = math.ceil(total / 10)
    quantizer = EMAQuantizer(128, 3, warmup_steps=200)
    for step in range(1, end + 1):
        saved = quantizer.state_dict().get("pool", torch.empty(0, 3))
        quantizer.train()(torch.full((8, 3, 8, 8), float(step)))
        quantizer.update(step / total)
        assert quantizer.initialised == (step == end)
    # The vectors of all steps but the last, which initialises the codebook.
    assert saved[:, 0].unique().tolist() == list(range(end - POOL_STEPS + 1, end))


def test_a_short_warm_up_gathers_as_many_vectors_as_a_long_one():
    # The warm-up ends after a tenth of the training, so one step must be enough for k-means.
    seen = []

    class Watched(EMAQuantizer):
        def _initialise(self, generator):
            seen.append(len(self._pool))
            super()._initialise(generator)

    for warmup_steps in (1, 30):
        warm_up(Watched(10, 3, warmup_steps=warmup_steps), warmup_steps)
    assert seen == [160, 160]


def restore_halfway(make, init):
    """Return a quantizer in its warm-up, and a copy restored from its checkpoint on the CPU."""
    quantizer = warm_up(make(10, 3, init=init, warmup_steps=5), 3)
    restored = make(10, 3, init=init, warmup_steps=5)
    restored.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    return quantizer, restored


@pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])
def test_restored_warm_up_vectors_move_with_the_module(make, monkeypatch):
    # On `meta`, as on a GPU, an operation with a tensor of another device is an error.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # rejects `meta`
    _, restored = restore_halfway(make, "data")
    restored.to("meta")
    warm_up(restored, 2, lambda step: torch.randn(8, 3, 8, 8, device="meta"))
    assert restored.initialised
    assert restored.codebook.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [EMAQuantizer, LossQuantizer])
def test_a_run_resumes_within_the_warm_up_on_the_gpu(make):
    quantizer, restored = restore_halfway(make, "kmeans")
    batches = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    warm_up(quantizer, 2, lambda step: batches[step])
    warm_up(restored.to("cuda"), 2, lambda step: batches[step].cuda())
    assert restored.initialised
    torch.testing.assert_close(restored.codebook.cpu(), quantizer.codebook, rtol=1e-4, atol=1e-4)
