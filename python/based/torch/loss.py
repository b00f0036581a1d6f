"""Cross-entropy of a linear layer's outputs, which memory never holds all at once."""

from typing import Any

import torch

from based.torch._autograd import gradients, is_differentiated, is_transformed
from based.torch.kernels import HAS_TRITON

IGNORED = -100
_BLOCK = 1 << 28  # logits in memory at a time


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_classes: int, is_sum: bool = False
) -> torch.Tensor:
    """The mean of −log softmax(weight · hidden)[target] over all targets that count.

    The gradients of hidden and weight are made in the forward pass, from one block of tokens' logits after the other:
    so no logits are kept, and none are made twice. Where derivatives of higher order are asked for, or torch.func
    transforms the call, all logits are made at once and kept.

    Args:
        hidden: (N, d).
        weight: (C, d); under autocast products run in its dtype.
        targets: (N) int64: a class, or -100 where a token shall not count.
        num_classes: The softmax is over the first of the C rows.
        is_sum: The sum instead of the mean.

    Returns:
        A scalar, float32 (float64 of float64); NaN when no target counts.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if is_transformed():
        total = _plain_total(hidden, weight, targets, num_classes)
        return total if is_sum else total / (targets != IGNORED).sum()
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _LinearCrossEntropy.apply(hidden, weight, targets, num_classes, wanted)
    return total if is_sum else total / (targets != IGNORED).sum()


def _plain_total(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The sum of the losses, by operations that can be differentiated again."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden @ weight[:num_classes].t()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_classes: int, wanted: bool
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens = len(hidden)
        num_blocks = -(-tokens * len(weight) // _BLOCK)
        size = -(-tokens // (num_blocks * 128)) * 128  # a multiple of a tile of the products
        total = hidden.new_zeros((), dtype=wide)
        d_hidden = []
        d_weight: torch.Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for h, target in zip(hidden.split(size), targets.split(size), strict=True):
                losses, gradient = _losses(h @ weight.t(), target, num_classes, wanted)
                total = total + losses.sum()
                if wanted:
                    d_hidden.append(gradient @ weight)
                    d_weight = _add_product(d_weight, gradient.t(), h)
        if wanted:
            assert d_weight is not None
            ctx.save_for_backward(torch.cat(d_hidden), d_weight, hidden, weight, targets)
        ctx.num_classes = num_classes
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, hidden, weight, targets = ctx.saved_tensors
        if not is_differentiated():
            return (d_hidden * d_total).to(hidden.dtype), (d_weight * d_total).to(weight.dtype), None, None, None

        def total(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return _plain_total(hidden, weight, targets, ctx.num_classes)

        return *gradients(total, (hidden, weight), ctx.needs_input_grad[:2], d_total), None, None, None


def _losses(
    logits: torch.Tensor, targets: torch.Tensor, num_classes: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log softmax at the targets, and its gradient in logits' dtype, which may take the memory of logits."""
    if logits.is_cuda and logits.dtype == torch.bfloat16 and HAS_TRITON:
        losses = _cross_entropy_kernel(logits, targets, num_classes, wanted)
        return losses, logits
    counts = targets != IGNORED
    index = torch.where(counts, targets, 0)[:, None]
    wide = logits[:, :num_classes].to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = torch.where(counts, (normaliser - wide.gather(1, index))[:, 0], 0)
    if not wanted:
        return losses, logits
    gradient = (wide - normaliser).exp()
    gradient = gradient.scatter_add(1, index, torch.full_like(normaliser, -1)) * counts[:, None]
    return losses, torch.nn.functional.pad(gradient, (0, logits.shape[1] - num_classes)).to(logits.dtype)


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Total + a·b with float32 sums, float64 of float64."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return _add_16_bit_product(total, a, b)
    wide = torch.promote_types(a.dtype, torch.float32)
    product = a.to(wide) @ b.to(wide)
    return product if total is None else total + product


# torch.compile does not know out_dtype.
@torch.library.custom_op("based::add_product", mutates_args=(), device_types="cuda")
def _add_16_bit_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32)


@_add_16_bit_product.register_fake
def _(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


@torch.library.custom_op("based::cross_entropy_", mutates_args=("logits",), device_types="cuda")
def _cross_entropy_kernel(logits: torch.Tensor, targets: torch.Tensor, num_classes: int, wanted: bool) -> torch.Tensor:
    from based.torch.kernels.loss import cross_entropy_

    return cross_entropy_(logits, targets, num_classes, IGNORED, wanted)


@_cross_entropy_kernel.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor, num_classes: int, wanted: bool) -> torch.Tensor:
    return torch.empty_like(targets, dtype=torch.float32)
