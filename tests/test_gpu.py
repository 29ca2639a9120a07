"""Behaviour on a GPU, tested with stand-ins and on a real GPU if there is one."""

import io
import pickle
import signal
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY_VQVAE
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

from vqvae_lightning.callbacks import checkpoints
from vqvae_lightning.callbacks.averaging import AveragedWeights
from vqvae_lightning.callbacks.checkpoints import LastCheckpoint
from vqvae_lightning.callbacks.progress import StepProgress
from vqvae_lightning.callbacks.reproducibility import SeedSteps
from vqvae_lightning.data import ImageDataModule
from vqvae_lightning.data.images import ArrayDataset, StageDataModule
from vqvae_lightning.data.sources import Split, Splits
from vqvae_lightning.devices import Reading, exact_products
from vqvae_lightning.errors import DivergenceError
from vqvae_lightning.evaluation import drawing
from vqvae_lightning.networks.autoencoder import VQVAE
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import EMAQuantizer, LossQuantizer, lookup
from vqvae_lightning.quantizers.lookup import find_nearest_codes
from vqvae_lightning.tasks import PriorTask, VQVAETask, divergence
from vqvae_lightning.tasks.optimization import WarmupCosine

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_a_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


class Inside(TorchDispatchMode):
    """Records the operations in `find_nearest_codes`, which torch dispatches as one operation."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.vqvae_lightning.nearest_codes.default:
            with self:
                return lookup._nearest_codes(*arguments)
        return self.seen(function, arguments, options or {})

    def seen(self, function, arguments, options):
        return function(*arguments, **options)


class Travelling(PixelCNN):
    """A prior that records its moves between devices without moving its weights."""

    journey = ("cuda:0",)  # where an evaluation kept it before

    def _apply(self, fn, recurse=True):
        self.journey = (*self.journey, str(fn(torch.zeros(1)).device))
        return self

    def __reduce__(self):
        self.journey = (*self.journey, "sent")
        return super().__reduce__()


class HereAndNow:
    """A pool whose only worker is this process. Arguments are pickled as for another process."""

    def __init__(self, workers, context, initializer, arguments):
        places, draw = arguments
        buffer = io.BytesIO()
        ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(draw)
        initializer(places, pickle.loads(buffer.getvalue()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))

    def shutdown(self, cancel_futures):
        return None


def test_a_prior_is_sent_to_other_processes_from_the_cpu(monkeypatch):
    monkeypatch.setattr(drawing, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(drawing.signal, "signal", lambda *_: None)
    monkeypatch.setattr(drawing.torch, "set_num_threads", lambda _: None)
    prior = Travelling(5, 2, 2, channels=4, layers=1, first_kernel=3).eval()
    request = drawing._Request(prior, (3, 2, 2), None, 0, {"batch_size": 2})
    drawn = list(request.draw_in_processes([torch.device("meta"), torch.device("meta")]))
    assert sum(len(batch.codes) for batch in drawn) == 3
    assert prior.journey[:3] == ("cuda:0", "cpu", "sent")
    # Each process then moves it to its own device.
    assert drawing._worker[0].prior.journey[-1] == "meta"


def test_all_that_is_sent_of_a_draw_comes_from_the_cpu():
    class Elsewhere(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    labels, known = (torch.zeros(3).as_subclass(Elsewhere) for _ in range(2))
    prior = PixelCNN(5, 2, 2, channels=4, layers=1, first_kernel=3)
    request = drawing._Request(prior, (3, 2, 2), labels, 0, {"known": known, "top_k": 2})
    sent = request.move_to_cpu()
    assert [type(part) for part in (sent.labels, sent.options["known"])] == [torch.Tensor] * 2
    assert sent.options["top_k"] == 2


class Counted(Inside):
    def __init__(self):
        super().__init__()
        self.kernels, self.largest = 0, 0

    def seen(self, function, arguments, options):
        result = function(*arguments, **options)
        self.kernels += not function.is_view
        self.largest = max(self.largest, result.numel() if torch.is_tensor(result) else 0)
        return result


@pytest.fixture
def meta(monkeypatch):
    """Disable autocast, which the meta device does not support."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(("gigabytes", "most"), [(80, 300), (8, 600)])
def test_the_look_up_in_a_large_codebook_takes_few_kernels_on_a_gpu(gigabytes, most, monkeypatch):
    # 256 images of 16x16 codes would take 6 000 kernels in blocks sized for a CPU's caches.
    memory = gigabytes * 2**30
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    budget = lookup.limit_scores(torch.device("cuda"))
    assert 4 * budget <= memory / 64
    monkeypatch.setattr(lookup, "limit_scores", lambda device: budget)
    vectors, codebook = torch.empty(65536, 64, device="meta"), torch.empty(16384, 64, device="meta")
    with Counted() as counted:
        find_nearest_codes(vectors, codebook)
    assert 50 < counted.kernels < most
    assert counted.largest <= budget


def pairs_of_near_codes(device="cpu"):
    """Return vectors, a codebook and the nearest codes, which TF32 and bfloat16 do not find."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(256, 16, generator=generator) * 2 - 1
    apart = (torch.rand(256, 16, generator=generator) - 0.5) * 2**-8
    codebook = torch.stack([centres + apart, centres - apart], 1).flatten(0, 1)
    # Each vector is nearer to its own row than to the other row of the pair.
    vectors = torch.stack([centres + apart / 2, centres - apart / 2], 1).flatten(0, 1)
    return vectors.to(device), codebook.to(device), torch.arange(512, device=device)


class ReducedPrecision(Inside):
    """Rounds factors to `bits` bits of mantissa where the settings allow it."""

    PRODUCTS = (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)

    def __init__(self, setting, bits):
        super().__init__()
        self.setting, self.bits = setting, bits

    def seen(self, function, arguments, options):
        if function.overloadpacket in self.PRODUCTS and self.setting.fp32_precision != "ieee":
            arguments = (*arguments[:-2], *map(self.rounded, arguments[-2:]))
        return function(*arguments, **options)

    def rounded(self, factor):
        mantissa, exponent = torch.frexp(factor)
        return torch.ldexp((mantissa * 2**self.bits).round(), exponent - self.bits)


SETTINGS = {
    "tf32": (torch.backends.cuda.matmul, 11),  # 10 stored bits and the implicit one
    "bf16": (torch.backends.mkldnn.matmul, 8),
}


@pytest.fixture(params=["high", "medium", "allow_tf32", "fp32_precision"])
def allowed(request):
    """Allow reduced precision through each of torch's interfaces."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), *(part.fp32_precision for part in settings)
    if request.param == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif request.param == "fp32_precision":
        for part, value in zip(settings, ("tf32", "bf16"), strict=True):
            part.fp32_precision = value
    else:
        torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    for part, value in zip(settings, before[1:], strict=True):
        part.fp32_precision = value


@pytest.mark.parametrize("precision", SETTINGS)
def test_codes_are_exact_where_products_may_be_rounded(precision, allowed):
    setting, bits = SETTINGS[precision]
    vectors, codebook, expected = pairs_of_near_codes()
    wide = torch.cdist(vectors.double(), codebook.double()).argmin(1)
    assert torch.equal(wide, expected)
    now = setting.fp32_precision
    with ReducedPrecision(setting, bits):
        product = torch.mm(vectors, codebook.t()) - codebook.square().sum(1) / 2
        if now != "ieee":  # plain products must miss the codes, or the case proves nothing
            assert (product.argmax(1) != expected).any()
        assert torch.equal(find_nearest_codes(vectors, codebook), expected)
    assert torch.equal(
        find_nearest_codes(vectors, codebook), expected
    )  # this processor's own products
    assert setting.fp32_precision == now
    if allowed != "fp32_precision":  # raises if the two interfaces disagree
        assert torch.get_float32_matmul_precision() == {"allow_tf32": "high"}.get(allowed, allowed)


def test_products_stay_exact_until_the_last_thread_is_done(allowed):
    setting = torch.backends.cuda.matmul
    first, second = exact_products(), exact_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert setting.fp32_precision == "tf32"


SIZE = 8


def image_data(flip=True):
    images = torch.randint(0, 256, (16, 1, SIZE, SIZE), dtype=torch.uint8)
    split = Split(images, torch.arange(16) % 3)
    source = SimpleNamespace(
        prepare=lambda: None, load=lambda: Splits(split, split, split, ["a", "b", "c"])
    )
    data = ImageDataModule(source, 4, 4, flip=flip)
    data.setup()
    return data


class CodeData(StageDataModule):
    """Random codes, without a VQ-VAE."""

    grid, images = (2, 2), SimpleNamespace(image_shape=(1, SIZE, SIZE))

    def __init__(self):
        super().__init__(4, 4, 0)
        rows = ArrayDataset(torch.randint(0, 16, (16, 2, 2)), torch.arange(16) % 3)
        self.datasets = dict.fromkeys(("train", "val", "test"), rows)

    def histogram(self):
        return torch.ones(16)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def vqvae_task(make):
    quantizer = make(16, 4, init="uniform", warmup_steps=0, revive_every=1000)
    net = VQVAE(quantizer, channels=1, hidden=8, residual_hidden=4)
    return VQVAETask(net, adam, WarmupCosine(2)), image_data()


def prior_task():
    net = PixelCNN(
        16, 2, 2, num_classes=3, null_label_rate=0.1, channels=8, layers=2, first_kernel=3
    )
    return PriorTask(net, adam, WarmupCosine(2)), CodeData()


STAGES = {
    "ema": lambda: vqvae_task(EMAQuantizer),
    "loss": lambda: vqvae_task(LossQuantizer),
    "prior": prior_task,
}


def fit(stage, folder, *callbacks, **options):
    """Train six steps with all per-batch callbacks, without logging or saving."""
    task, data = STAGES[stage]()
    trainer = pl.Trainer(
        max_steps=1000,  # the last one would be logged
        limit_val_batches=0,
        log_every_n_steps=1000,
        gradient_clip_val=1.0,
        callbacks=[
            *callbacks,
            StepProgress(),
            SeedSteps(0),
            AveragedWeights(),
            LastCheckpoint(str(folder / "last.ckpt"), 1000, ()),
            StopAfterSixSteps(),
        ],
        logger=False,
        enable_checkpointing=True,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(task, datamodule=data)
    return trainer


class StopAfterSixSteps(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 6


class Nowhere(SingleDeviceStrategy):
    """Trains on the meta device, whose tensors have no values to wait for."""

    def teardown(self):
        """Keep the weights on the device."""


class AnyDevice(CPUAccelerator):
    def setup_device(self, device):
        """Accept any device."""


class NoWaitingCopies(TorchDispatchMode):
    """Refuses copies to the meta device that would wait on a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        to = torch.device(options.get("device") or "cpu")
        if function is torch.ops.aten._to_copy.default and to.type == "meta":
            assert options.get("non_blocking") or arguments[0].device.type == "meta"
        return function(*arguments, **options)


class WithinSteps(pl.Callback):
    """Enters a context after the first two steps and exits it after the last one."""

    def __init__(self, context):
        self.context = context

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.context.__enter__()

    def on_train_end(self, trainer, pl_module):
        self.context.__exit__(None, None, None)

    def on_exception(self, trainer, pl_module, exception):
        self.context.__exit__(None, None, None)  # otherwise later tests would run within it


class Unread(Reading):
    """Finite numbers that record when they are read."""

    def __init__(self, values):
        self.asked, self.size = Unread.step, values.numel()
        Unread.delays = [] if Unread.step == 0 else Unread.delays

    def wait(self):
        Unread.delays.append(Unread.step - self.asked)
        return [0.0] * self.size


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_a_value_of_the_device(stage, tmp_path, monkeypatch):
    # `.item()`, `if`, `bincount`, `nonzero` and masks raise on the meta device.
    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            Unread.step = trainer.global_step

    monkeypatch.setattr(divergence, "Reading", Unread)
    monkeypatch.setattr(pl.loops.fit_loop, "has_len_all_ranks", lambda *_: True)  # asks the device
    place = Nowhere(torch.device("meta"), accelerator=AnyDevice())
    trainer = fit(stage, tmp_path, Clock(), WithinSteps(NoWaitingCopies()), strategy=place)
    assert trainer.global_step == 6
    # The loss of each step is read in the next one, and the last at the end.
    assert Unread.delays == [1] * 5 + [0]
    averaged = trainer.callbacks[4]._average_model
    assert {p.device.type for p in averaged.module.parameters()} == {"meta"}
    assert int(averaged.n_averaged) == 6


@on_a_gpu
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_on_a_gpu(stage, tmp_path):
    class Refused:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    try:
        trainer = fit(stage, tmp_path, WithinSteps(Refused()), accelerator="gpu", devices=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 6


def test_a_loss_that_is_found_late_reaches_no_checkpoint(toy, command, monkeypatch):
    monkeypatch.setattr(divergence, "reads_late", lambda device: True)
    steps = ("trainer.max_steps=50", "callbacks.last.every_n_steps=1")
    wild = ("model.optimizer.lr=1e20", "model.schedule=null")
    outcome = command("vqvae-train", *toy, *TINY_VQVAE, *steps, *wild)
    assert outcome.status == 1
    assert "the loss is" in outcome.err
    assert "nmse=" in outcome.err
    assert "one step later, before anything was saved" in outcome.err
    last = torch.load(outcome.folder / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_loss_is_checked_before_a_validation_and_at_the_end():
    for hook in ("on_validation_start", "on_train_end"):
        task, _ = prior_task()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(divergence, "reads_late", lambda device: True)
            task.losses.add(7, torch.tensor(torch.nan), {"loss": torch.tensor(torch.inf)})
        with pytest.raises(DivergenceError, match=r"step 7: the loss is nan \(loss=inf\)"):
            getattr(task, hook)()


@pytest.mark.parametrize("place", ["state_dict", "current_model_state"])
def test_weights_that_are_not_finite_are_not_saved(place):
    # A finite loss can have a gradient that overflows.
    task, _ = prior_task()
    state = {name: value.clone() for name, value in task.state_dict().items()}
    checkpoint = {"state_dict": state, "current_model_state": dict(state), "global_step": 4}
    task.on_save_checkpoint(checkpoint)
    name = next(iter(state))
    checkpoint[place] = {**state, name: torch.full_like(state[name], torch.inf)}
    with pytest.raises(DivergenceError, match="step 4: weights are NaN or infinite"):
        task.on_save_checkpoint(checkpoint)


def test_ranks_of_gpus_read_their_agreement_to_stop_one_step_late(monkeypatch):
    callback = LastCheckpoint("last.ckpt", 1000, ())
    callback._requested = signal.SIGTERM
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    agreed = {}
    for late in (False, True):
        monkeypatch.setattr(checkpoints, "reads_late", lambda device, late=late: late)
        callback._agreed = False
        agreed[late] = []
        for step in range(8, 13):
            callback._agree(SimpleNamespace(global_step=step, strategy=strategy))
            agreed[late].append(callback._agreed)
    assert agreed == {
        False: [False, False, True, True, True],
        True: [False, False, False, True, True],
    }


@on_a_gpu
def test_tf32_changes_no_code_on_a_gpu(allowed):
    vectors, codebook, expected = pairs_of_near_codes("cuda")
    assert torch.equal(find_nearest_codes(vectors, codebook), expected)
