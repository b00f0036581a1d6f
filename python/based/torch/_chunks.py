"""What recurrences in chunks share."""

from collections.abc import Mapping

import torch
from torch.nn import functional


def check_operands(operands: Mapping[str, tuple[torch.Tensor | None, tuple[int, ...]]], chunk_size: int) -> None:
    """Raises ValueError: a tensor that has not the shape beside it, an extent of 0, or chunk_size < 1."""
    for name, (tensor, shape) in operands.items():
        if tensor is not None and (tuple(tensor.shape) != shape or 0 in shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} with extents ≥ 1, as k and v")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected ≥ 1")


def split(x: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, T, H, …) → (B, H, N, size, …) of this dtype, zeros behind the end."""
    x = x.to(dtype).transpose(1, 2)
    return functional.pad(x, (0, 0) * (x.ndim - 3) + (0, -x.shape[2] % size)).unflatten(2, (-1, size))
