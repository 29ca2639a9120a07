"""Random numbers: a stream for each purpose, and noise that does not depend on the devices."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor

from vqvae_lightning.distributed import get_rank_and_world

Purpose = Literal[
    "init", "order", "shuffle", "flip", "noise", "codebook", "samples", "pictures", "judge",
    "shards", "trials",
]  # fmt: skip
# These numbers are part of each stream: another number changes what a seed gives.
PURPOSES: dict[Purpose, int] = {
    "init": 0,  # first weights of a stage
    "order": 1,  # of the training images, or of the shards, in an epoch
    "shuffle": 2,  # of the rows that a worker holds
    "flip": 3,  # which training images are mirrored
    "noise": 4,  # dropout, label dropout, latents: what the networks draw in a training step
    "codebook": 5,  # vectors that first rows and revived codes are taken from
    "samples": 6,  # codes that a prior draws
    "pictures": 7,  # the same during training
    "judge": 8,  # first weights of the classifier that judges samples
    "shards": 9,  # order in which training images are written
    "trials": 10,  # suggestions of a study that is continued
}


def derive_seed(seed: int, purpose: Purpose, *numbers: int) -> int:
    """A seed for one stream of random numbers, which no other purpose, seed or number shares.

    Seeds that are sums or products of their parts do not keep streams apart: seed 0 and batch 1024
    gave what seed 1 and batch 0 should have. `set_aside`, which chooses the validation images, is
    the one place that uses its seed as it is.

    Args:
        seed: The run's seed.
        purpose: What is drawn.
        *numbers: What sets this stream apart from others of the purpose: batch, epoch, rank.

    Returns:
        64 random bits. The CPU generator of torch uses the lower 32, so two of its streams coincide
        with a chance of 2^-32.
    """
    # The numbers as a spawn key: SeedSequence([1]) and SeedSequence([1, 0]) are the same.
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(PURPOSES[purpose], *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def draw_for_batch(draw: Callable[[int], Tensor], images: int) -> Tensor:
    """This rank's rows of what `draw` gives for the images of all ranks.

    Every rank draws for the whole batch from a generator in the same state (`SeedSteps`) and takes
    its own part, so that the noise of an image does not depend on the number of ranks. In training
    the ranks cut a batch into equal parts, in the order of the ranks. With parts of several sizes
    each rank still gets noise for its images, but not that of a single process.

    Args:
        draw: Takes a number of images and draws that many rows.
        images: Images of this rank.

    Returns:
        (images, ...).
    """
    rank, world = get_rank_and_world()
    drawn = draw(images * world)
    if world == 1:
        return drawn
    # A copy: a part kept for the backward pass would keep the noise of all ranks in memory.
    return drawn[rank * images : (rank + 1) * images].clone()
