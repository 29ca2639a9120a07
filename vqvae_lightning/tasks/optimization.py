"""The optimizer and its learning rate schedule."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vqvae_lightning.errors import InputError, Key, check_range, join_lines

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class WarmupCosine:
    """Learning rate that rises linearly, then falls along half a cosine (arXiv:1608.03983).

    Args:
        warmup_steps: Optimizer steps until the full rate.
        final: Share of the full rate at the end.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, warmup_steps: int = 50, final: float = 0.03) -> None:
        self.warmup_steps = check_range("warmup_steps", warmup_steps, 0)
        self.final = check_range("final", final, 0, 1)

    def __call__(self, step: int, total: float) -> float:
        """Return the factor on the learning rate after `step` of `total` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def configure_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerFactory,
    schedule: WarmupCosine | None,
    total_steps: float,
) -> Any:
    """Build what `configure_optimizers` returns: the optimizer, and its schedule by step.

    Args:
        parameters: Parameters to train.
        optimizer: Builds the optimizer from the parameters.
        schedule: Factor on the learning rate; None keeps it constant.
        total_steps: Optimizer steps of the whole training.

    Raises:
        InputError: If there is a schedule but no last step.
    """
    check_end(schedule, not math.isinf(total_steps))
    built = optimizer(parameters)
    if schedule is None:
        return built
    rate = LambdaLR(built, lambda step: schedule(step, total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def check_end(schedule: WarmupCosine | None, ends: bool) -> None:
    """Refuse a schedule without a last step.

    Args:
        schedule: Factor on the learning rate; None keeps it constant.
        ends: Whether the training has a last step.

    Raises:
        InputError: If there is a schedule but no last step.
    """
    if schedule is not None and not ends:
        raise InputError(
            Key("model.schedule"),
            " needs an end: set ",
            Key("trainer.max_steps"),
            " or ",
            Key("trainer.max_epochs"),
            ", or ",
            Key("model.schedule"),
            "=null.",
        )


def check_optimizer(optimizer: OptimizerFactory) -> float:
    """Build an optimizer and take one step, so that a bad option is found before training.

    Args:
        optimizer: Builds the optimizer from parameters.

    Returns:
        Values that the optimizer stores per parameter value: 2 for Adam.

    Raises:
        InputError: If the optimizer refuses an option; names the key below `optimizer` and quotes
            the optimizer's message.
    """
    values = 1024  # large compared with what an optimizer stores once per tensor
    parameter = nn.Parameter(torch.zeros(values))
    try:
        built = _build_and_step(optimizer, parameter)
    except Exception as error:
        message = join_lines(error)
        name = _find_bad_option(optimizer)
        if name is None:
            raise InputError(Key("optimizer"), f": {message}") from error
        value = optimizer.keywords[name]  # type: ignore[attr-defined]
        accepted = inspect.signature(optimizer.func).parameters  # type: ignore[attr-defined]
        if name in accepted:
            hint = f"the default is {accepted[name].default}"
        else:
            hint = f"accepted are {', '.join(accepted)}"
        raise InputError(Key(f"optimizer.{name}"), f"={value}: {message}; {hint}.") from error
    stored = [value for value in built.state[parameter].values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in stored) // values


def _build_and_step(optimizer: OptimizerFactory, parameter: nn.Parameter) -> Optimizer:
    """Build an optimizer of `parameter` and take one step."""
    built = optimizer([parameter])
    parameter.grad = torch.zeros_like(parameter)
    built.step(lambda: 0.0)
    return built


def _find_bad_option(optimizer: OptimizerFactory) -> str | None:
    """Find an option without which the optimizer works; None if there is none."""
    if not isinstance(optimizer, functools.partial):
        return None
    for name in optimizer.keywords:
        others = {key: value for key, value in optimizer.keywords.items() if key != name}
        factory = functools.partial(optimizer.func, **others)
        try:
            _build_and_step(factory, nn.Parameter(torch.zeros(1)))
        except Exception:
            continue
        return name
    return None
