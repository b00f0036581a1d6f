"""What the operations share of differentiation."""

import functools
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Any) -> Any:
    """PyTorch's once_differentiable, which by itself takes second derivatives for zero where dy is a constant."""
    once = function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, dy: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dy.requires_grad:
            dy = dy.detach().requires_grad_()
        return once(ctx, dy)

    return checked
