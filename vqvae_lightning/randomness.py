"""Random streams for each purpose, and noise that does not depend on the number of devices."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor

from vqvae_lightning.distributed import get_rank_and_world

Purpose = Literal[
    "init", "order", "shuffle", "flip", "noise", "codebook", "samples", "pictures", "judge",
    "shards", "trials", "bound", "pixels",
]  # fmt: skip
# These numbers are part of each stream: changing one changes the results for a seed.
PURPOSES: dict[Purpose, int] = {
    "init": 0,  # initial weights of a stage
    "order": 1,  # order of the training images or of the shards in an epoch
    "shuffle": 2,  # order of the rows that a worker holds
    "flip": 3,  # which training images are mirrored
    "noise": 4,  # dropout, label dropout and latents in a training step
    "codebook": 5,  # vectors that initialise the codebook and revive codes
    "samples": 6,  # codes sampled from a prior
    "pictures": 7,  # codes sampled for pictures during training
    "judge": 8,  # initial weights of the classifier that judges samples
    "shards": 9,  # order in which training images are written to shards
    "trials": 10,  # suggestions of a resumed study
    "bound": 11,  # latents that bound the likelihood of a variational autoencoder
    "pixels": 12,  # images that an autoregressive decoder draws given the latents
}


def derive_seed(seed: int, purpose: Purpose, *numbers: int) -> int:
    """Derive the seed of one random stream, which no other purpose, seed or number shares.

    Sums or products of the parts would not keep streams apart: seed 0 with batch 1024 could give
    the stream of seed 1 with batch 0. Only `set_aside`, which chooses the validation images, uses
    its seed directly.

    Args:
        seed: Seed of the run.
        purpose: Purpose of the stream.
        *numbers: Numbers such as batch, epoch or rank that identify the stream within its purpose.

    Returns:
        64 random bits. The CPU generator of torch uses the lower 32, so two of its streams coincide
        with probability 2^-32.
    """
    # A spawn key, because SeedSequence([1]) and SeedSequence([1, 0]) are the same.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(PURPOSES[purpose], *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def draw_for_batch(draw: Callable[[int], Tensor], images: int) -> Tensor:
    """Draw for the images of all ranks, and return this rank's rows.

    Every rank draws for the whole batch from a generator in the same state (`SeedSteps`) and takes
    its own part, so the noise of an image does not depend on the number of ranks. In training the
    batch is divided equally, in the order of the ranks. If the parts differ in size, each rank
    still gets noise for its images, but not the noise of a single process.

    Args:
        draw: Function that draws as many rows as it is given.
        images: Number of images on this rank.

    Returns:
        Noise (images, ...).
    """
    rank, world = get_rank_and_world()
    drawn = draw(images * world)
    if world == 1:
        return drawn
    # Copied, because a view kept for the backward pass would hold the noise of all ranks.
    return drawn[rank * images : (rank + 1) * images].clone()
