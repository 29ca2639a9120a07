"""The discretised logistic distribution over the 256 levels of a pixel."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0  # a scale of e**-7 levels already puts all mass on one level


def log1mexp(a: Tensor) -> Tensor:
    """Compute log(1 - exp(-a)) for a > 0, accurately at both ends and with finite gradients."""
    small = a <= math.log(2)
    one = torch.ones_like(a)
    return torch.where(
        small,
        torch.log(-torch.expm1(-torch.where(small, a, one))),
        torch.log1p(-torch.exp(-torch.where(small, one, a))),
    )


def discretised_logistic(levels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the natural log of the mass that a logistic distribution puts on each level.

    The bin of level x extends from x - 1/2 to x + 1/2, and the two outer bins extend to infinity.
    The mass of an inner bin is S(b) - S(a) = S(b) S(-a) (1 - exp(-1/s)), where S is the sigmoid,
    b = (x + 1/2 - mean) / s and a = (x - 1/2 - mean) / s.
    Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1, in a form without clamps or a
    density fallback.

    Args:
        levels: Pixels, 0 to 255, of any dtype.
        mean: Mean in levels, broadcastable.
        log_scale: Natural log of the scale in levels, broadcastable. Values below -7 count as -7.

    Returns:
        float32 tensor of the broadcast shape.
    """
    x = levels.float()
    inverse = torch.exp(-log_scale.clamp_min(MIN_LOG_SCALE))
    b, a = (x + 0.5 - mean) * inverse, (x - 0.5 - mean) * inverse
    middle = F.logsigmoid(b) + F.logsigmoid(-a) + log1mexp(inverse.expand_as(b))
    return torch.where(x < 0.5, F.logsigmoid(b), torch.where(x > 254.5, F.logsigmoid(-a), middle))


def fit_log_scale(levels: Tensor, mean: Tensor) -> Tensor:
    """Find the log scale per channel (C, 1, 1) that maximises the likelihood of `levels`.

    Golden-section search suffices, because the log-likelihood has one maximum in the scale.

    Args:
        levels: Pixels (N, C, H, W), 0 to 255.
        mean: Mean in levels (N, C, H, W).
    """
    ratio = (math.sqrt(5) - 1) / 2
    channels = levels.shape[1]
    low = torch.full((channels, 1, 1), MIN_LOG_SCALE, device=levels.device)
    high = torch.full_like(low, 6.0)

    def loss(log_scale: Tensor) -> Tensor:
        return -discretised_logistic(levels, mean, log_scale).mean((0, 2, 3))[:, None, None]

    for _ in range(24):  # narrows 13 to 13 * 0.618**24 = 1e-4
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        below = loss(left) < loss(right)
        low, high = torch.where(below, low, left), torch.where(below, right, high)
    return (low + high) / 2
