"""Compile networks with `torch.compile`."""

import torch
from torch import nn


def compile_once(parts: list[nn.Module]) -> None:
    """Compile modules in place, so that their weights keep their names, and empty the list."""
    if parts:
        # Graphs of an earlier job in this process count towards torch's limit on recompilations.
        torch.compiler.reset()
    while parts:
        parts.pop().compile()
