"""What holds on a GPU: proved on stand-ins for one, and on a GPU where there is one."""

import io
import pickle
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqvae_lightning import evaluation
from vqvae_lightning.devices import exact_products
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.quantizers import base
from vqvae_lightning.quantizers.base import nearest_codes

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_a_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


class Inside(TorchDispatchMode):
    """Sees the operations within `nearest_codes` too, which is one operation from outside."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.vqvae_lightning.nearest_codes.default:
            with self:
                return base._nearest_codes(*arguments)
        return self.seen(function, arguments, options or {})

    def seen(self, function, arguments, options):
        return function(*arguments, **options)


class Travelling(PixelCNN):
    """A prior that keeps account of its moves; its weights stay where they are."""

    journey = ("cuda:0",)  # where an evaluation had it before

    def _apply(self, fn, recurse=True):
        self.journey = (*self.journey, str(fn(torch.zeros(1)).device))
        return self

    def __reduce__(self):
        self.journey = (*self.journey, "sent")
        return super().__reduce__()


class HereAndNow:
    """A pool whose one worker is this process; what it is sent is pickled as for another one."""

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
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", HereAndNow)
    monkeypatch.setattr(evaluation.signal, "signal", lambda *_: None)
    monkeypatch.setattr(evaluation.torch, "set_num_threads", lambda _: None)
    prior = Travelling(5, 2, 2, channels=4, layers=1, first_kernel=3).eval()
    draw = evaluation._Draw(prior, (3, 2, 2), None, 0, {"batch_size": 2})
    drawn = list(draw.shared([torch.device("meta"), torch.device("meta")]))
    assert sum(len(batch.codes) for batch in drawn) == 3
    assert prior.journey[:3] == ("cuda:0", "cpu", "sent")
    # Each process then moves it to its own device.
    assert evaluation._drawing[0].prior.journey[-1] == "meta"


def test_all_that_is_sent_of_a_draw_comes_from_the_cpu():
    class Elsewhere(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

    labels, known = (torch.zeros(3).as_subclass(Elsewhere) for _ in range(2))
    prior = PixelCNN(5, 2, 2, channels=4, layers=1, first_kernel=3)
    draw = evaluation._Draw(prior, (3, 2, 2), labels, 0, {"known": known, "top_k": 2})
    sent = draw.on_cpu()
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
    """Without autocast, which the meta device has not."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize(("gigabytes", "most"), [(80, 300), (8, 600)])
def test_a_gpu_looks_a_large_codebook_up_in_few_kernels(gigabytes, most, monkeypatch):
    # 256 images of 16x16 codes; in blocks for a CPU's caches they were 6 000 kernels.
    memory = gigabytes * 2**30
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    budget = base.scores_at_a_time(torch.device("cuda"))
    assert 4 * budget <= memory / 64
    monkeypatch.setattr(base, "scores_at_a_time", lambda device: budget)
    vectors, codebook = torch.empty(65536, 64, device="meta"), torch.empty(16384, 64, device="meta")
    with Counted() as counted:
        nearest_codes(vectors, codebook)
    assert 50 < counted.kernels < most
    assert counted.largest <= budget


def pairs_of_near_codes(device="cpu"):
    """Vectors, a codebook and the nearest codes, which factors in TF32 or bfloat16 do not find."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(256, 16, generator=generator) * 2 - 1
    apart = (torch.rand(256, 16, generator=generator) - 0.5) * 2**-8
    codebook = torch.stack([centres + apart, centres - apart], 1).flatten(0, 1)
    # Each nearer to its own row than to the row's twin.
    vectors = torch.stack([centres + apart / 2, centres - apart / 2], 1).flatten(0, 1)
    return vectors.to(device), codebook.to(device), torch.arange(512, device=device)


class ReducedPrecision(Inside):
    """A processor that takes what the settings allow: factors with `bits` bits of mantissa."""

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
    "tf32": (torch.backends.cuda.matmul, 11),  # 10 bits are stored, the first one is not
    "bf16": (torch.backends.mkldnn.matmul, 8),
}


@pytest.fixture(params=["high", "medium", "allow_tf32", "fp32_precision"])
def allowed(request):
    """Reduced precision, allowed in each way that torch has for it."""
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
        if now != "ieee":  # the case is one: plain products miss the codes
            assert (product.argmax(1) != expected).any()
        assert torch.equal(nearest_codes(vectors, codebook), expected)
    assert torch.equal(nearest_codes(vectors, codebook), expected)  # of this processor's own
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


@on_a_gpu
def test_tf32_changes_no_code_on_a_gpu(allowed):
    vectors, codebook, expected = pairs_of_near_codes("cuda")
    assert torch.equal(nearest_codes(vectors, codebook), expected)
