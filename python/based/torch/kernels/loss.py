"""Softmax cross-entropy of rows of logits as a Triton kernel: one read, and one more with a write for the gradient."""

import torch
import triton
import triton.language as tl


@triton.jit
def _cross_entropy(
    logits_ptr, target_ptr, loss_ptr, num_columns, num_classes, stride, IGNORED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has a row. Its second pass finds the row in the L2 cache.

    The target's logit is picked out in the first pass. Read by itself after that pass, it could already be a gradient:
    every thread reads a single number, and the sums below are the last point where the threads wait for each other.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * stride
    column = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    picked = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_classes, BLOCK):
        x = tl.load(logits_ptr + first + column, mask=first + column < num_classes, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # A lane that has seen no class yet: −∞ − (−∞) is no number.
        total = total * tl.exp(tl.where(largest == larger, 0.0, largest - larger))
        total += tl.where(x == -float("inf"), 0.0, tl.exp(x - larger))
        largest = larger
        picked += tl.where(first + column == target, x, 0.0)
    maximum = tl.max(largest, 0)
    normaliser = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum), 0))
    counts = target != IGNORED
    tl.store(loss_ptr + row, tl.where(counts, normaliser - tl.sum(picked, 0), 0.0))
    if GRADIENT:
        factor = tl.where(counts, 1.0, 0.0)
        for first in range(0, num_columns, BLOCK):
            at = first + column
            x = tl.load(logits_ptr + at, mask=at < num_classes, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(x - normaliser) - tl.where(at == target, 1.0, 0.0)) * factor
            tl.store(logits_ptr + at, gradient.to(tl.bfloat16), mask=at < num_columns)


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, num_classes: int, ignored: int, gradient: bool
) -> torch.Tensor:
    """−log softmax of the first num_classes columns of logits (N, C) bfloat16 at targets (N), float32.

    With `gradient`, that of its sum takes the place of logits: zeros where a target is `ignored`, and beyond
    num_classes.
    """
    losses = torch.empty_like(targets, dtype=torch.float32)
    _cross_entropy[(len(logits),)](
        logits, targets, losses, logits.shape[1], num_classes, logits.stride(0), ignored, gradient, 2048, num_warps=8
    )
    return losses
