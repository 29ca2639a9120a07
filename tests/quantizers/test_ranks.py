"""Two ranks get the codebook and metrics of one process that sees both their batches."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ddp_job
import evaluated
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from vqvae_lightning.callbacks.codebook import CodebookDrift
from vqvae_lightning.callbacks.reproducibility import ConfigComparison
from vqvae_lightning.data import CodesDataModule, ImageDataModule
from vqvae_lightning.data.sources import Split, Splits
from vqvae_lightning.errors import DivergenceError, RankError
from vqvae_lightning.metrics import CodebookUsage, LatentUsage
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer, SonnetEMAQuantizer

STEPS = 6


def batches(step):
    """Draw a different number of vectors for each rank: (rank 0's, rank 1's)."""
    generator = torch.Generator().manual_seed(step)
    both = 3 * torch.randn(7, 4, 3, 3, generator=generator)
    return both[:4], both[4:]


def run(quantizer, choose):
    """Return the codebook after each step, without an optimizer that moves its rows."""
    quantizer.train()
    history = []
    for step in range(STEPS):
        quantizer(choose(batches(step)))
        quantizer.update(0.0)
        history.append(quantizer.codebook.detach().clone())
    return torch.stack(history)


QUANTIZERS = {
    f"{make.__name__} {init}": (make, {"init": init})
    for make in (EMAQuantizer, LossQuantizer)
    for init in ("kmeans", "data", "uniform")
} | {
    f"{arrangement} {init}": (
        EMAQuantizer,
        {"init": init, "codes_per_position": 2, "arrangement": arrangement},
    )
    for arrangement in ("product", "residual")
    for init in ("kmeans", "data")
}
RECIPE = {"warmup_steps": 2, "revive_below": 0.5, "revive_every": 2}
QUANTIZERS = {name: (make, RECIPE | options) for name, (make, options) in QUANTIZERS.items()} | {
    "SonnetEMAQuantizer": (SonnetEMAQuantizer, {})
}


def build(case):
    make, options = QUANTIZERS[case]
    torch.manual_seed(0)
    return make(24, 4, decay=0.7, **options)


def encode(folder):
    """Encode 41 images, an odd number, in `folder` and return their codes."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (41, 1, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(41) % 3)
    source = SimpleNamespace(load=lambda: Splits(split, split, split, ["a", "b", "c"]))
    quantizer = EMAQuantizer(300, 4, init="uniform", warmup_steps=0)
    net = VQVAE(quantizer, 1, hidden=8, residual_hidden=4).eval()
    data = CodesDataModule(ImageDataModule(source, 8, 6), net, "hash", str(folder), 8)
    data.encode(torch.device("cpu"))
    data.setup()
    return torch.stack([torch.tensor(data.datasets[s].data.astype("int64")) for s in data.datasets])


def usage(number):
    """Compute codebook and latent metrics of this rank's part; the parts differ in size."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(41, generator=generator) ** 2 * 20).long()
    mean, kl = torch.randn(2, 41, 3, 2, 2, generator=generator) * 0.1
    own = slice(None) if number is None else (slice(0, 30), slice(30, 41))[number]
    metrics = CodebookUsage(20), LatentUsage(3, 2, 2)
    metrics[0].update(codes[own])
    metrics[1].update(mean[own], kl[own])
    return {name: value for metric in metrics for name, value in metric.compute().items()}


CHANGES = {
    "equal": lambda rows: rows.clone(),
    "changed": lambda rows: rows + torch.eye(*rows.shape) * 1e-6,
    "permuted": lambda rows: rows.flip(0),  # the same rows, each under a different code
}


def compare_codebooks(number, change):
    """Return the error of `CodebookDrift` after rank 1's codebook is changed, or ""."""
    torch.manual_seed(0)
    quantizer = EMAQuantizer(5, 2)
    if number == 1:
        quantizer.codebook.copy_(CHANGES[change](quantizer.codebook))
    trainer = SimpleNamespace(sanity_checking=False, global_step=7)
    module = SimpleNamespace(net=SimpleNamespace(quantizer=quantizer))
    try:
        CodebookDrift().on_validation_epoch_end(trainer, module)
    except DivergenceError as error:
        return str(error)
    return ""


def compare_configs(number, other):
    """Return the error of `ConfigComparison` after rank 1's config is merged with `other`."""
    config = OmegaConf.create({"model": {"lr": 0.1, "beta": 1}, "seed": 0})
    if number == 1:
        config.merge_with(other)
    try:
        ConfigComparison(config).setup(None, None, "fit")
    except RankError as error:
        return str(error)
    return ""


OTHERS = {
    "equal": {},
    "one value": {"model": {"lr": 0.2}},
    "another key": {"model": {"beta": 1.0}, "device": "cpu"},
}


def rank(number, port, results, folder):
    # Lightning too builds them before the process group exists, so nothing may be decided here.
    quantizers = {case: build(case) for case in QUANTIZERS}
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    results[number] = {
        case: run(quantizer, lambda both: both[number]) for case, quantizer in quantizers.items()
    }
    encode(folder)
    results[f"usage {number}"] = usage(number)
    results[f"codebooks {number}"] = {c: compare_codebooks(number, c) for c in CHANGES}
    results[f"configs {number}"] = {c: compare_configs(number, o) for c, o in OTHERS.items()}
    results[f"measured {number}"] = evaluated.measure(folder / "evaluated")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Return the results of both ranks, and the folder of their codes."""
    folder = tmp_path_factory.mktemp("codes")
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank, (store.port, results, folder), nprocs=2)
        return dict(results), folder


@pytest.mark.parametrize("case", QUANTIZERS)
def test_two_ranks_end_with_the_codebook_of_one_process(case, on_two_ranks):
    alone = run(build(case), torch.cat)
    results, _ = on_two_ranks
    assert torch.equal(results[0][case], results[1][case])
    torch.testing.assert_close(results[0][case], alone, rtol=1e-5, atol=1e-5)
    assert (alone[1:] != alone[:-1]).any(), "nothing was learnt"


def test_usage_over_ranks_equals_usage_of_all_codes_together(on_two_ranks):
    results, _ = on_two_ranks
    for name, value in usage(None).items():
        for number in (0, 1):
            torch.testing.assert_close(results[f"usage {number}"][name], value)


def test_ranks_encode_each_image_once_and_in_order(on_two_ranks, tmp_path):
    _, folder = on_two_ranks
    (made,) = folder.glob("hash-*")
    together = encode(folder)  # maps the stored codes
    assert (made / "header.json").is_file()
    assert not list(made.glob("*.part")), "parts of the ranks remain"
    assert torch.equal(together, encode(tmp_path))


def test_ranks_with_different_codebooks_stop_the_run(on_two_ranks):
    for number in (0, 1):
        error = on_two_ranks[0][f"codebooks {number}"]
        assert error["equal"] == ""
        for change in ("changed", "permuted"):
            assert "step 7: the ranks' codebooks differ" in error[change]


def test_a_rank_with_a_different_config_is_named(on_two_ranks):
    for number in (0, 1):
        assert on_two_ranks[0][f"configs {number}"] == {
            "equal": "",
            "one value": "rank 1 has another config than rank 0: model.lr",
            "another key": "rank 1 has another config than rank 0: device, model.beta",
        }


def test_metrics_over_ranks_equal_those_of_one_process(on_two_ranks, tmp_path):
    alone = evaluated.measure(tmp_path)
    assert len(alone) > 15
    for number in (0, 1):
        found = on_two_ranks[0][f"measured {number}"]
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name] == pytest.approx(value, rel=2e-5), name


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Return the results of both ranks of jobs with `Trainer(strategy="ddp")`."""
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
def test_training_on_two_ranks_equals_training_in_one_process(case, ddp):
    # Batches alternate between 6 and 7 images, so that every second one is divided unevenly. The
    # validation set has an odd number of images, which a padding sampler would make even.
    alone, _ = ddp_job.fit(case, devices=1)
    assert {"val/mse", "val/perplexity", "val/commitment"} <= set(alone)
    for name, value in alone.items():
        assert torch.equal(ddp[0][case][name], ddp[1][case][name]), name
        torch.testing.assert_close(ddp[0][case][name], value, rtol=1e-4, atol=1e-5)
    moved = (alone["codebooks"][1:] - alone["codebooks"][:-1]).abs().amax((1, 2))
    assert (moved[2:] > 1e-6).all(), "the codebook stood still"
    assert alone["revived"] > 0
