"""Gradient estimators, which pass the gradient through the look-up."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Replace `z` by `vectors` in the forward pass and pass the gradient on to `z` unchanged.

    The textbook form `z + (vectors - z).detach()` is not exact: in bfloat16, rounding changes a
    third of its elements. The decoder would train on vectors that decoding codes never produces.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor) -> Tensor:
        """Return `vectors` bit for bit."""
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of `z` unchanged, and none for `vectors`."""
        return gradients[0], None


class Rotation(torch.autograd.Function):
    """Replace `z` by `vectors` and apply the same rotation and scale to the gradient, transposed.

    Each vector e is written as (|e| / |z|) R z. The rotation R = 1 - 2 r r' + 2 e^ z^', with
    r = (z^ + e^) / |z^ + e^|, takes the direction z^ to e^ within their plane. Factor and rotation
    are treated as constants. Source: Fifty et al. 2024 (arXiv:2410.06424), section 4.2. Vectors are
    along the last dimension.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor) -> Tensor:
        """Return `vectors` bit for bit."""
        ctx.save_for_backward(z, vectors)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return (|e| / |z|) R' gradient for `z`, and none for `vectors`."""
        z, vectors = ctx.saved_tensors
        gradient = gradients[0]
        source, target = F.normalize(z, dim=-1), F.normalize(vectors, dim=-1)
        middle = F.normalize(source + target, dim=-1)
        turned = (
            gradient
            - 2 * middle * (middle * gradient).sum(-1, keepdim=True)
            + 2 * source * (target * gradient).sum(-1, keepdim=True)
        )
        length = z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return turned * (vectors.norm(dim=-1, keepdim=True) / length), None


ESTIMATORS = {"straight_through": StraightThrough, "rotation": Rotation}
