"""What the tasks share: the optimizer and its schedule, and a stop when a loss is not finite."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vqvae_lightning.devices import Reading, reads_late
from vqvae_lightning.errors import DivergenceError, InputError, Key, check_range

MENDS = "Lower model.optimizer.lr, or set trainer.gradient_clip_val."

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class WarmupCosine:
    """Learning rate that rises linearly and then falls along half a cosine (arXiv:1608.03983).

    Args:
        warmup_steps: Optimizer steps until the full rate.
        final: Share of the full rate left at the end.

    Raises:
        InputError: If a value is outside its range.
    """

    def __init__(self, warmup_steps: int = 50, final: float = 0.03) -> None:
        self.warmup_steps = check_range("warmup_steps", warmup_steps, 0)
        self.final = check_range("final", final, 0, 1)

    def __call__(self, step: int, total: float) -> float:
        """The factor on the rate after `step` of `total` steps."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def optimization(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerFactory,
    schedule: WarmupCosine | None,
    total_steps: float,
) -> Any:
    """What `configure_optimizers` returns: the optimizer, and the schedule by step if there is one.

    Raises:
        InputError: If there is a schedule and training has no end that it could run towards.
    """
    built = optimizer(parameters)
    if schedule is None:
        return built
    if math.isinf(total_steps):
        raise InputError(
            "model.schedule needs an end: set trainer.max_steps or trainer.max_epochs, or "
            "model.schedule=null."
        )
    rate = LambdaLR(built, lambda step: schedule(step, total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def compile_once(parts: list[nn.Module]) -> None:
    """Compile modules in place, so that their weights keep their names; empties the list."""
    if parts:
        torch.compiler.reset()  # an earlier job's graphs count against the limit of this one's
    while parts:
        parts.pop().compile()


def check_optimizer(optimizer: OptimizerFactory) -> float:
    """Make an optimizer and step once, so that a bad value is found before any training.

    Returns:
        Values that it keeps per value of a parameter: 2 for Adam.

    Raises:
        InputError: With the bad argument below the key `optimizer`, and what the optimizer says.
    """
    values = 1024  # many, beside what an optimizer keeps once per tensor
    parameter = nn.Parameter(torch.zeros(values))
    try:
        built = _stepped(optimizer, parameter)
    except Exception as error:
        said = " ".join(str(error).split())
        name = _refused(optimizer)
        if name is None:
            raise InputError(Key("optimizer"), f": {said}") from error
        value = optimizer.keywords[name]  # type: ignore[attr-defined]
        accepted = inspect.signature(optimizer.func).parameters  # type: ignore[attr-defined]
        if name in accepted:
            hint = f"the default is {accepted[name].default}"
        else:
            hint = f"accepted are {', '.join(accepted)}"
        raise InputError(Key(f"optimizer.{name}"), f"={value}: {said}; {hint}.") from error
    kept = [value for value in built.state[parameter].values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in kept) // values


def _stepped(optimizer: OptimizerFactory, parameter: nn.Parameter) -> Optimizer:
    """An optimizer of `parameter` after its first step."""
    built = optimizer([parameter])
    parameter.grad = torch.zeros_like(parameter)
    built.step(lambda: 0.0)
    return built


def _refused(optimizer: OptimizerFactory) -> str | None:
    """The argument without which the optimizer works; None if there is none."""
    if not isinstance(optimizer, functools.partial):
        return None
    for name in optimizer.keywords:
        others = {key: value for key, value in optimizer.keywords.items() if key != name}
        try:
            _stepped(functools.partial(optimizer.func, **others), nn.Parameter(torch.zeros(1)))
        except Exception:
            continue
        return name
    return None


class LossWatch:
    """Stops a run whose loss is NaN or infinite.

    On a CPU each loss is looked at as soon as it is there, before the optimizer can spread it to
    the weights. On a GPU that would wait for the GPU in each step: a loss is looked at when the
    next one comes, and before anything is validated or saved.
    """

    def __init__(self) -> None:
        self._last: tuple[int, tuple[str, ...], Reading] | None = None

    def add(self, step: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Take in the loss of a step, and its parts by name, each ().

        Raises:
            DivergenceError: As `check`.
        """
        self.check()
        values = torch.stack([value.detach().float() for value in (loss, *terms.values())])
        self._last = step, tuple(terms), Reading(values)
        if not reads_late(loss.device):
            self.check("before it reached the weights")

    def check(self, when: str = "one step later, before anything was saved") -> None:
        """Look at the last loss now, if nobody has yet.

        Args:
            when: When the run stops, for the message.

        Raises:
            DivergenceError: Naming the step and the terms.
        """
        last, self._last = self._last, None
        if last is None:
            return
        step, names, reading = last
        loss, *values = reading.numbers()
        if math.isfinite(loss):
            return
        pairs = zip(names, values, strict=True)
        bad = ", ".join(f"{name}={value}" for name, value in pairs if not math.isfinite(value))
        raise DivergenceError(
            f"step {step}: the loss is {loss} ({bad or 'the sum of its terms'}); stopped {when}. "
            f"{MENDS}"
        )


class WatchedTask(pl.LightningModule):
    """A task that never validates with, nor saves, what a loss or weight that is no number made.

    Attributes:
        losses: Takes the loss of each training step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses = LossWatch()

    def on_validation_start(self) -> None:
        """Look at the last loss."""
        self.losses.check()

    def on_train_end(self) -> None:
        """Look at the last loss."""
        self.losses.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at the last loss, and at all weights: a finite loss may have another gradient.

        Raises:
            DivergenceError: If one is not finite; nothing is written then.
        """
        self.losses.check()
        states = checkpoint["state_dict"], checkpoint.get("current_model_state", {})
        finite = [
            value.isfinite().all()
            for state in states
            for value in state.values()
            if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if finite and not torch.stack(finite).all():
            raise DivergenceError(
                f"step {checkpoint['global_step']}: weights are NaN or infinite; stopped before "
                f"they were saved. {MENDS}"
            )
