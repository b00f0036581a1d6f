"""Sequences that begin anew where a document begins, for operations that know of none."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional


def by_documents(
    operation: Callable[..., torch.Tensor],
    cu_seqlens: torch.Tensor,
    *packed: torch.Tensor,
    states: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """operation(*packed, *states) of each document alone, which lie one behind the other in tensors (1, T, …).

    Documents whose lengths lie between two powers of 2 run as one batch, with zeros behind the shorter ones: a causal
    operation does not see these, and computes less than 2T tokens.

    Args:
        operation: Of tensors (n, length, …) and states (n, …); its result is (n, length, …).
        *packed: Tensors (1, T, …).
        cu_seqlens: Where the N documents begin, and T, (N + 1) int32 or int64, as FlashAttention has them. Their
            values are read: a GPU is waited for.
        states: One for each document, (N, …).

    Raises:
        TypeError, ValueError: Another dtype, shape, or order; several sequences; states of another number.
    """
    b, t = packed[0].shape[:2]
    bounds = _checked(cu_seqlens, b, t)
    for state in states:
        if state.shape[0] != len(bounds) - 1:
            raise ValueError(
                f"initial_state has {state.shape[0]} sequences, expected {len(bounds) - 1}: one for each document"
            )
    device = packed[0].device
    # Row T: zeros, for what lies behind a document.
    rows = [functional.pad(x[0], (0, 0) * (x.ndim - 2) + (0, 1)) for x in packed]
    results, places = [], []
    for documents in _alike(bounds):
        starts = torch.tensor([bounds[i] for i in documents], device=device)[:, None]
        lengths = torch.tensor([bounds[i + 1] - bounds[i] for i in documents], device=device)[:, None]
        longest = max(bounds[i + 1] - bounds[i] for i in documents)
        offset = torch.arange(longest, device=device)
        inside = offset < lengths
        place = torch.where(inside, starts + offset, t)
        which = torch.tensor(documents, device=device)
        y = operation(*(x[place] for x in rows), *(state[which] for state in states))
        results.append(y[inside])
        places.append(place[inside])
    order = torch.cat(places).argsort()
    return torch.cat(results)[order][None]


def _alike(bounds: list[int]) -> Iterator[list[int]]:
    """The numbers of the documents, those of about one length together, in the order of the lengths."""
    groups: dict[int, list[int]] = {}
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        groups.setdefault((end - begin).bit_length(), []).append(i)
    for bits in sorted(groups):
        yield groups[bits]


def _checked(cu_seqlens: torch.Tensor, b: int, t: int) -> list[int]:
    """Its numbers, which may be those of B sequences of T tokens."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = str(cu_seqlens.dtype) if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens is {found}, expected a tensor of torch.int32 or torch.int64")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (N + 1) for N ≥ 1 documents")
    if b != 1:
        raise ValueError(f"cu_seqlens with {b} sequences, expected one that holds all documents: (1, T, …)")
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != t:
        raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}, expected 0 to the number of tokens, {t}")
    if any(end <= begin for begin, end in itertools.pairwise(bounds)):
        raise ValueError("cu_seqlens does not ascend everywhere: expected documents of at least one token")
    return bounds
