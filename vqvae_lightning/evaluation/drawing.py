"""Draw new images, and find the training images that are nearest to them."""

import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vqvae_lightning.console import show_progress
from vqvae_lightning.data.images import PixelDataModule
from vqvae_lightning.evaluation.reconstruction import decode_images
from vqvae_lightning.networks.pixelcnn import PixelCNN
from vqvae_lightning.networks.sampling import Drawn, fit_batch_size, sample_batches
from vqvae_lightning.randomness import derive_seed

if TYPE_CHECKING:
    from vqvae_lightning.networks.autoencoder import VQVAE


class Samples(NamedTuple):
    """New images, on the CPU."""

    images: Tensor
    """(N, C, H, W) uint8."""
    codes: Tensor
    """(N, h, w) int64, or (N, h, w, Q) with several codes per position."""
    nats: Tensor
    """(N,) entropy of the distributions drawn from, summed over the drawn codes."""


def draw_images(
    vqvae: "VQVAE",
    prior: PixelCNN,
    count: int,
    labels: Tensor | None,
    seed: int,
    devices: Sequence[torch.device],
    keep_finished: bool = False,
    **options: Any,
) -> Samples:
    """Draw new images and show a progress bar.

    Args:
        vqvae: VQ-VAE that decodes the codes of the prior.
        prior: Prior in evaluation mode.
        count: Number of images.
        labels: Classes (count,) of the images; None for an unconditional prior.
        seed: Seed for sampling codes, and pixels from an autoregressive decoder.
        devices: Devices that share the batches, with one process each if there are several. The
            samples do not depend on their number.
        keep_finished: Whether Ctrl-C returns the finished batches, if there are any.
        **options: Further arguments of `sample_batches`.
    """
    device = devices[0]
    request = _Request(prior, (count, prior.height, prior.width), labels, seed, options)
    alone = len(devices) == 1
    batches = request.draw(device) if alone else request.draw_in_processes(devices)
    drawn: list[Drawn] = []
    with show_progress("sampling", count) as advance:
        try:
            for batch in batches:
                drawn.append(batch)
                advance(len(batch.codes))
        except KeyboardInterrupt:
            if not (keep_finished and drawn):
                raise
    codes, nats = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Samples(decode_images(vqvae.to(device), codes.to(device), seed), codes, nats)


class _Request(NamedTuple):
    """What to draw, in a form that can be sent to other processes."""

    prior: PixelCNN
    shape: tuple[int, int, int]
    labels: Tensor | None
    seed: int
    options: dict[str, Any]

    def draw(self, device: torch.device, only: slice | None = None) -> Iterator[Drawn]:
        """Draw in this process; the batches are returned on the CPU."""
        prior = self.prior.to(device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "samples"))
        batches = sample_batches(
            prior, self.shape, self.labels, generator=generator, only=only, **self.options
        )
        for batch in batches:
            yield Drawn(*(part.cpu() for part in batch))

    def move_to_cpu(self) -> "_Request":
        """Return the request with the prior and all tensors on the CPU.

        A GPU tensor would be sent as a handle to its memory. Each receiving process would then open
        that GPU in addition to its own, and this process could not free the memory.
        """
        labels = None if self.labels is None else self.labels.cpu()
        options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return self._replace(prior=self.prior.cpu(), labels=labels, options=options)

    def draw_in_processes(self, devices: Sequence[torch.device]) -> Iterator[Drawn]:
        """Draw with one process per device; the batches come in order.

        The prior is sent from the CPU, and each process moves it to its own device.
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
        # At most the share of a device, so that each device has something to do.
        size = min(size, -(-self.shape[0] // len(devices)))
        sent = (places, self.move_to_cpu())
        with ProcessPoolExecutor(len(devices), context, _start_drawing, sent) as pool:
            starts = range(0, self.shape[0], size)
            jobs = [pool.submit(_draw_part, slice(start, start + size)) for start in starts]
            try:
                for job in jobs:
                    codes, nats = job.result()
                    yield Drawn(torch.from_numpy(codes), torch.from_numpy(nats))
            finally:
                pool.shutdown(cancel_futures=True)


_worker: tuple[_Request, torch.device]


def _start_drawing(places: Any, request: _Request) -> None:
    """Set up a worker process: take one of the devices."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    device, threads = places.get()
    torch.set_num_threads(threads)
    _worker = request, device


def _draw_part(only: slice) -> tuple[Any, Any]:
    """Draw a batch in a worker process.

    Arrays are returned, because sending tensors needs file descriptors.
    """
    request, device = _worker
    (batch,) = request._replace(
        options={**request.options, "batch_size": only.stop - only.start}
    ).draw(device, only)
    return batch.codes.numpy(), batch.nats.numpy()


def find_nearest_images(images: PixelDataModule, samples: Tensor) -> Tensor:
    """Find the training image at the smallest Euclidean distance from each sample.

    Args:
        images: Images, set up.
        samples: Samples (N, C, H, W) uint8.

    Returns:
        Training images of the same shape.
    """
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
