"""What the operations share of differentiation."""

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad


def is_differentiated() -> bool:
    """In a backward pass: whether it is to be differentiated itself, as with create_graph=True.

    Compiled backward passes never are: PyTorch refuses that.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, …) or forward-mode differentiation is under way.

    These see through PyTorch's own operations only.
    """
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], wanted: Sequence[bool], dy: torch.Tensor
) -> list[torch.Tensor | None]:
    """Of Σ function(*inputs) · dy, by PyTorch's own differentiation, and differentiable; None where not wanted."""
    # Views: one tensor may be given as two inputs, each of which has a gradient of its own.
    views = [x.view_as(x) for x in inputs]
    y = function(*views)
    chosen = [view for view, is_wanted in zip(views, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(y, chosen, dy.to(y.dtype), create_graph=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]
