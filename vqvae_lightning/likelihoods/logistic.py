"""The discretised logistic distribution over the 256 levels of a pixel."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

MIN_LOG_SCALE = -7.0  # a scale of e**-7 levels already puts all mass on one level
BOUNDS = (MIN_LOG_SCALE, 6.0)  # a scale of e**6 levels is far wider than all levels together


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
    x, mean, log_scale = torch.broadcast_tensors(levels.float(), mean.float(), log_scale.float())
    mass: Tensor = _LogMass.apply(x, mean, log_scale)
    return mass


class _LogMass(torch.autograd.Function):
    """`discretised_logistic` for float32 tensors of one shape, with its derivatives written out.

    Autograd through the formula stores a dozen tensors and takes twice as long, which is most of a
    training step with a mixture of logistics.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        inverse = torch.exp(-log_scale.clamp_min(MIN_LOG_SCALE))
        centre = (x - mean) * inverse
        ctx.save_for_backward(x, log_scale, inverse, centre)
        below, above = F.logsigmoid(centre + 0.5 * inverse), F.logsigmoid(0.5 * inverse - centre)
        middle = log1mexp(inverse).add_(below).add_(above)
        return torch.where(x < 0.5, below, torch.where(x > 254.5, above, middle))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        x, log_scale, inverse, centre = ctx.saved_tensors
        lowest, highest = x < 0.5, x > 254.5
        # d log S(b) / db and d log S(-a) / d(-a); the outer bins lack one of the two.
        b, negative_a = centre + 0.5 * inverse, 0.5 * inverse - centre
        of_b = torch.sigmoid(-b).masked_fill_(highest, 0)
        of_a = torch.sigmoid(-negative_a).masked_fill_(lowest, 0)
        by_mean = (of_a - of_b).mul_(inverse).mul_(gradient)
        # d log(1 - exp(-1/s)) / d log s, which the outer bins lack too.
        between = (inverse / torch.expm1(inverse)).masked_fill_(lowest | highest, 0)
        by_scale = of_b.mul_(b).add_(of_a.mul_(negative_a)).add_(between).neg_().mul_(gradient)
        return None, by_mean, by_scale.masked_fill_(log_scale < MIN_LOG_SCALE, 0)


def fit_log_scale(levels: Tensor, mean: Tensor) -> Tensor:
    """Find the log scale per channel (C, 1, 1) that maximises the likelihood of `levels`.

    Args:
        levels: Pixels (N, C, H, W), 0 to 255.
        mean: Mean in levels (N, C, H, W).
    """

    def fit(channel: int) -> float:
        x, centre = levels[:, channel].float().contiguous(), mean[:, channel].contiguous()

        def loss(log_scale: float) -> float:
            return -discretised_logistic(x, centre, x.new_tensor(log_scale)).mean().item()

        # Brent's search suffices, because the log-likelihood has one maximum in the scale.
        found = minimize_scalar(loss, bounds=BOUNDS, method="bounded", options={"xatol": 1e-4})
        return float(found.x)

    fitted = [fit(channel) for channel in range(levels.shape[1])]
    return mean.new_tensor(fitted)[:, None, None]
