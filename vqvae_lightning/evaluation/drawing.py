"""Samples for an evaluation, and their nearest training images."""

import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.evaluation.reconstruction import decode_images
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import Drawn, fit_batch_size, sample_batches
from vqvae_lightning.randomness import derive_seed


class Samples(NamedTuple):
    """New images, on the CPU."""

    images: Tensor
    """(N, C, H, W) uint8."""
    codes: Tensor
    """(N, h, w) int64."""
    nats: Tensor
    """(N,) entropy of the distributions that were drawn from, summed over the drawn positions."""


def draw_images(
    vqvae: Any,
    prior: PixelCNN,
    count: int,
    labels: Tensor | None,
    seed: int,
    devices: Sequence[torch.device],
    keep_finished: bool = False,
    **options: Any,
) -> Samples:
    """New images, under a progress bar.

    Args:
        vqvae: The decoder of the prior's codes.
        prior: In evaluation mode.
        count: Images to draw.
        labels: (count,) classes to draw; None for an unconditional prior.
        seed: Of the draw.
        devices: To share the batches between, a process each; the samples are the same for any
            number of them.
        keep_finished: Whether Ctrl-C returns the batches finished so far, if there are any.
        **options: Of `sample_batches`.
    """
    device = devices[0]
    draw = _Draw(prior, (count, prior.height, prior.width), labels, seed, options)
    drawn: list[Drawn] = []
    with show_progress("sampling", count) as advance:
        try:
            for batch in draw.batches(device) if len(devices) == 1 else draw.shared(devices):
                drawn.append(batch)
                advance(len(batch.codes))
        except KeyboardInterrupt:
            if not (keep_finished and drawn):
                raise
    codes, nats = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Samples(decode_images(vqvae.to(device), codes.to(device)), codes, nats)


class _Draw(NamedTuple):
    """What a draw needs, to be sent to other processes."""

    prior: PixelCNN
    shape: tuple[int, int, int]
    labels: Tensor | None
    seed: int
    options: dict[str, Any]

    def batches(self, device: torch.device, only: slice | None = None) -> Iterator[Drawn]:
        """Draw here; the batches come to the CPU."""
        prior = self.prior.to(device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "samples"))
        batches = sample_batches(
            prior, self.shape, self.labels, generator=generator, only=only, **self.options
        )
        for batch in batches:
            yield Drawn(*(part.cpu() for part in batch))

    def on_cpu(self) -> "_Draw":
        """Itself, with the prior and all tensors on the CPU.

        A tensor of a GPU is sent as a handle of its memory: each receiving process would open that
        GPU too, besides its own, and this one would have to keep the memory.
        """
        labels = None if self.labels is None else self.labels.cpu()
        options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return self._replace(prior=self.prior.cpu(), labels=labels, options=options)

    def shared(self, devices: Sequence[torch.device]) -> Iterator[Drawn]:
        """Draw in a process per device, batch by batch, in order.

        Each process moves the prior, which comes to the CPU, to its own device.
        """
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for place in devices:
            places.put((place, max(1, torch.get_num_threads() // len(devices))))
        size = self.options.get("batch_size") or fit_batch_size(
            self.prior,
            *self.shape[1:],
            devices[0],
            self.options.get("guidance", 1) not in (0, 1),
            len(devices),
        )
        # No larger than a device's share, or some would have nothing to do.
        size = min(size, -(-self.shape[0] // len(devices)))
        sent = (places, self.on_cpu())
        with ProcessPoolExecutor(len(devices), context, _start_drawing, sent) as pool:
            starts = range(0, self.shape[0], size)
            jobs = [pool.submit(_draw_part, slice(start, start + size)) for start in starts]
            try:
                for job in jobs:
                    codes, nats = job.result()
                    yield Drawn(torch.from_numpy(codes), torch.from_numpy(nats))
            finally:
                pool.shutdown(cancel_futures=True)


_drawing: tuple[_Draw, torch.device]


def _start_drawing(places: Any, draw: _Draw) -> None:
    """In a process of its own: take one of the devices."""
    global _drawing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and keeps what is finished
    device, threads = places.get()
    torch.set_num_threads(threads)
    _drawing = draw, device


def _draw_part(only: slice) -> tuple[Any, Any]:
    """In a process of its own: a batch, as arrays, which need no file descriptors to be sent."""
    draw, device = _drawing
    (batch,) = draw._replace(
        options={**draw.options, "batch_size": only.stop - only.start}
    ).batches(device, only)
    return batch.codes.numpy(), batch.nats.numpy()


def nearest_training_images(images: PixelDataModule, samples: Tensor) -> Tensor:
    """For each sample (N, C, H, W) uint8, the training image at the smallest Euclidean distance."""
    flat = samples.flatten(1).float()
    best = torch.full((len(samples),), math.inf)
    nearest = torch.zeros_like(samples)
    with show_progress("searching", len(images.datasets["train"])) as advance:
        for part, _ in images.batches("train"):
            distance, row = torch.cdist(flat, part.flatten(1).float()).min(1)
            closer = distance < best
            best[closer] = distance[closer]
            nearest[closer] = part[row[closer]]
            advance(len(part))
    return nearest
