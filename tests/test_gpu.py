"""What holds on a GPU: proved on stand-ins for one, and on a GPU where there is one."""

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch

from vqvae_lightning import evaluation
from vqvae_lightning.networks.pixelcnn import PixelCNN


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
