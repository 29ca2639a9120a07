"""What a decoder's output means: how probable each of the 256 levels of a pixel is."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0  # a logistic of e**-7 levels already puts all mass on one level


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(-a)) for a > 0, exact at both ends and with finite gradients."""
    small = a <= math.log(2)
    one = torch.ones_like(a)
    return torch.where(
        small,
        torch.log(-torch.expm1(-torch.where(small, a, one))),
        torch.log1p(-torch.exp(-torch.where(small, one, a))),
    )


def discretised_logistic(levels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Natural log of the mass that a logistic distribution puts on each of 256 levels.

    The bin of level x reaches from x - 1/2 to x + 1/2, the outer two to infinity, so
    S(b) - S(a) = S(b) S(-a) (1 - exp(-1/s)) with b = (x + 1/2 - mean) / s and a = (x - 1/2 - mean)
    / s.
    Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1, in a form without clamps or a
    density fallback.

    Args:
        levels: Pixels, 0 to 255, any dtype.
        mean: On the same axis, broadcastable.
        log_scale: Natural log of the scale in levels, broadcastable; at least -7 is used.

    Returns:
        float32 of the broadcast shape.
    """
    x = levels.float()
    inverse = torch.exp(-log_scale.clamp_min(MIN_LOG_SCALE))
    b, a = (x + 0.5 - mean) * inverse, (x - 0.5 - mean) * inverse
    middle = F.logsigmoid(b) + F.logsigmoid(-a) + log1mexp(inverse.expand_as(b))
    return torch.where(x < 0.5, F.logsigmoid(b), torch.where(x > 254.5, F.logsigmoid(-a), middle))


def fit_log_scale(levels: Tensor, mean: Tensor) -> Tensor:
    """The log scale per channel (C, 1, 1) that makes `levels` (N, C, H, W) likeliest.

    By golden-section search: the log-likelihood has one maximum in the scale.
    """
    ratio = (math.sqrt(5) - 1) / 2
    channels = levels.shape[1]
    low = torch.full((channels, 1, 1), MIN_LOG_SCALE, device=levels.device)
    high = torch.full_like(low, 6.0)

    def loss(log_scale: Tensor) -> Tensor:
        return -discretised_logistic(levels, mean, log_scale).mean((0, 2, 3))[:, None, None]

    for _ in range(24):  # to 13 * 0.618**24 = 1e-4
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        below = loss(left) < loss(right)
        low, high = torch.where(below, low, left), torch.where(below, right, high)
    return (low + high) / 2
