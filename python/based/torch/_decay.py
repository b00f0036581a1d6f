"""Linear attention whose state decays, in chunks, by PyTorch's own operations."""

import math

import torch
from torch.nn import functional

from based.torch._chunks import check_operands, split


def decayed_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    *,
    p: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← diag(α_t) S + k_t v_tᵀ;  y_t = Sᵀq_t (Mamba-2, arXiv:2405.21060; GLA, arXiv:2312.06635).

    With p and b: S ← diag(α_t) S + b_t (Sᵀp_t)ᵀ + k_t v_tᵀ (RWKV-7, arXiv:2503.14456). In a chunk the Sᵀp_t solve a
    triangular system; from chunk to chunk goes S alone.

    Every exponent is a sum of log α over tokens that lie between two others, so none is positive: no decay overflows.
    With a decay for each row of S, those between all pairs of tokens of a chunk are B·H·T·chunk_size·d_k numbers.
    Arithmetic is float32 (float64 of float64 inputs), also under autocast.

    Args:
        q: Queries (B, T, H, d_k), scaled.
        k: Keys (B, T, H, d_k).
        v: Values (B, T, H, d_v).
        log_alpha: log α ≤ 0, (B, T, H), or (B, T, H, d_k): one for each row of S.
        p: What is read of S before a token, (B, T, H, d_k); None for nothing.
        b: Where it is added, (B, T, H, d_k); given when p is.
        initial_state: S before the first token, (B, H, d_k, d_v); None: zeros.
        chunk_size: Tokens of a chunk. The results do not depend on it but for rounding. None: 64, or 16 with a decay
            for each row.

    Returns:
        y (B, T, H, d_v), of v's dtype, and S after the last token, (B, H, d_k, d_v).

    Raises:
        ValueError: Shapes that do not fit each other; chunk_size < 1; one of p and b alone.
    """
    n, t, h, d_k = k.shape if isinstance(k, torch.Tensor) and k.ndim == 4 else (0, 0, 0, 0)
    d_v = v.shape[-1]
    by_rows = log_alpha.ndim == 4
    if chunk_size is None:
        chunk_size = 16 if by_rows else 64
    operands = {
        "q": (q, (n, t, h, d_k)),
        "k": (k, (n, t, h, d_k)),
        "v": (v, (n, t, h, d_v)),
        "log_alpha": (log_alpha, (n, t, h, d_k) if by_rows else (n, t, h)),
        "p": (p, (n, t, h, d_k)),
        "b": (b, (n, t, h, d_k)),
        "initial_state": (initial_state, (n, h, d_k, d_v)),
    }
    check_operands(operands, chunk_size)
    if (p is None) != (b is None):
        raise ValueError(f"{'p' if p is None else 'b'} is None, expected p and b, or none of them")
    if not by_rows:
        log_alpha = log_alpha[..., None]
    with torch.autocast(q.device.type, enabled=False):
        return _in_chunks(q, k, v, log_alpha, p, b, initial_state, min(chunk_size, t))


def _in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    state: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, result_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    t = k.shape[1]
    q, k, v, log_alpha = (split(x, size, dtype) for x in (q, k, v, log_alpha))  # behind the end: k = 0, α = 1
    time = log_alpha.cumsum(-2)  # log γ, (…, C, 1 or d_k)
    decay = _decays(time)
    gamma, last = time.exp(), time[..., -1:, :]
    rest = (last - time).exp()  # what is left of a row at the chunk's end
    kept, added = last.exp().mT, (rest * k).mT @ v
    s = torch.zeros_like(added[:, :, 0]) if state is None else state.to(dtype)
    y = _products(q, k, decay) @ v
    states, read = [], []
    if p is None or b is None:
        for n in range(k.shape[2]):
            states.append(s)
            s = kept[:, :, n] * s + added[:, :, n]
    else:
        p, b = split(p, size, dtype), split(b, size, dtype)
        # Sᵀp_t = X_t + Y_t S: the part that the chunk itself brings, and that of the S before it.
        system = torch.eye(p.shape[-2], dtype=dtype, device=k.device) - _products_before(p, b, decay)
        known = torch.cat([_products_before(p, k, decay) @ v, (time - log_alpha).exp() * p], -1)
        solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        x, of_state = solved.split([v.shape[-1], p.shape[-1]], -1)
        for n in range(k.shape[2]):
            states.append(s)
            read.append(x[:, :, n] + of_state[:, :, n] @ s)
            s = kept[:, :, n] * s + added[:, :, n] + (rest * b)[:, :, n].mT @ read[-1]
        y = y + _products(q, b, decay) @ torch.stack(read, 2)
    y = y + (gamma * q) @ torch.stack(states, 2)
    return y.flatten(2, 3)[:, :, :t].transpose(1, 2).to(result_dtype), s


def _decays(time: torch.Tensor) -> torch.Tensor:
    """γ_t / γ_j for j ≤ t, zeros for others: (…, C, C, 1 or d_k)."""
    later = torch.ones(time.shape[-2], time.shape[-2], dtype=torch.bool, device=time.device).triu(1)
    return (time[..., :, None, :] - time[..., None, :, :]).masked_fill(later[..., None], -math.inf).exp()


def _products(x: torch.Tensor, y: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Σ_i x_t[i] decay_tj[i] y_j[i], (…, C, C)."""
    if decay.shape[-1] == 1:
        return (x @ y.mT) * decay[..., 0]
    return ((decay * y[..., None, :, :]) @ x[..., None])[..., 0]


def _products_before(x: torch.Tensor, y: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The same with the decay up to the token before t, of j < t."""
    return functional.pad(_products(x[..., 1:, :], y, decay[..., :-1, :, :]), (0, 0, 1, 0))
