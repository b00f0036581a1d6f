"""The sums of RWKV-4, by PyTorch's own operations."""

import torch
from torch.utils.checkpoint import checkpoint

from based.torch._autograd import is_transformed

_NOTHING = -1e30  # the exponent of empty sums


def wkv(
    k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, first: torch.Tensor, *, chunk_size: int = 256
) -> torch.Tensor:
    """y_t = (Σ_{j<t} e^{(t−1−j) decay + k_j} v_j + e^{first + k_t} v_t) / (the same without v): RWKV-4.

    Chunk after chunk; inside one by pairwise doubling. Each sum is kept as a number times e^o, with o the largest
    exponent in it, so that none overflows. Arithmetic is float32 (float64 of float64 inputs), also under autocast.
    Saves its inputs and the sums before each chunk; the backward pass makes the rest again, a chunk at a time.

    Args:
        k: (B, T, e).
        v: (B, T, e).
        decay: (e), ≤ 0.
        first: (e).
        chunk_size: Tokens of a chunk. The result does not depend on it but for rounding.

    Returns:
        (B, T, e), of v's dtype.

    Raises:
        ValueError: Shapes that do not fit each other; chunk_size < 1.
    """
    shape = tuple(k.shape)
    for name, tensor, expected in (("v", v, shape), ("decay", decay, shape[-1:]), ("first", first, shape[-1:])):
        if len(shape) != 3 or tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected} for k {shape} = (B, T, e)")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected ≥ 1")
    with torch.autocast(k.device.type, enabled=False):
        dtype, result_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
        k, v, decay, first = (part.to(dtype) for part in (k, v, decay, first))
        p = q = torch.zeros_like(k[:, 0])
        o = torch.full_like(p, _NOTHING)
        keeps_all = is_transformed() or not torch.is_grad_enabled()
        ys = []
        for ks, vs in zip(k.split(chunk_size, 1), v.split(chunk_size, 1), strict=True):
            inputs = (ks, vs, decay, first, p, q, o)
            # Nothing here is random.
            y, p, q, o = (
                _chunk(*inputs)
                if keeps_all
                else checkpoint(_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
            )
            ys.append(y)
        return torch.cat(ys, 1).to(result_dtype)


def _chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    first: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    o: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results of a chunk (B, C, e) behind tokens with the sums p e^o and q e^o (B, e), and the sums after it.

    Exponents o only scale: what they are changes no result, so no gradient goes through them. Nothing is changed in
    place, so that autograd and torch.func can differentiate and batch it.
    """
    # Row 0: the tokens before the chunk. A sum decays once for each row that it goes down.
    os = torch.cat([o[:, None], k.detach()], 1)
    scale = (k - k.detach()).exp()  # 1, with the gradient of e^k
    ps, qs = torch.cat([p[:, None], scale * v], 1), torch.cat([q[:, None], scale], 1)
    step, rows = 1, os.shape[1]
    while step < rows:
        # Rows t and t − step, each the sum of at most `step` tokens, make one of twice as many.
        late, early = os[:, step:], (os[:, :-step] + step * decay).detach()
        most = torch.maximum(late, early)
        kept = (os[:, :-step] + step * decay - most).exp()
        own = (late - most).exp()
        ps = torch.cat([ps[:, :step], own * ps[:, step:] + kept * ps[:, :-step]], 1)
        qs = torch.cat([qs[:, :step], own * qs[:, step:] + kept * qs[:, :-step]], 1)
        os = torch.cat([os[:, :step], most], 1)
        step *= 2
    own = first + k
    most = torch.maximum(os[:, :-1], own.detach())
    past, present = (os[:, :-1] - most).exp(), (own - most).exp()
    y = (past * ps[:, :-1] + present * v) / (past * qs[:, :-1] + present)
    return y, ps[:, -1].clone(), qs[:, -1].clone(), os[:, -1].clone()
