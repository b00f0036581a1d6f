"""Linear attention whose state decays, in chunks, by PyTorch's own operations."""

import math

import torch

from based.torch._chunks import check_operands, split


def decayed_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← diag(α_t) S + k_t v_tᵀ;  y_t = Sᵀq_t (Mamba-2, arXiv:2405.21060; GLA, arXiv:2312.06635).

    Every exponent is a sum of log α over tokens that lie between two others, so none is positive: no decay overflows.
    With a decay for each row of S, those between all pairs of tokens of a chunk are B·H·T·chunk_size·d_k numbers.
    Arithmetic is float32 (float64 of float64 inputs), also under autocast.

    Args:
        q: Queries (B, T, H, d_k), scaled.
        k: Keys (B, T, H, d_k).
        v: Values (B, T, H, d_v).
        log_alpha: log α ≤ 0, (B, T, H), or (B, T, H, d_k): one for each row of S.
        initial_state: S before the first token, (B, H, d_k, d_v); None: zeros.
        chunk_size: Tokens of a chunk. The results do not depend on it but for rounding. None: 64, or 16 with a decay
            for each row.

    Returns:
        y (B, T, H, d_v), of v's dtype, and S after the last token, (B, H, d_k, d_v).

    Raises:
        ValueError: Shapes that do not fit each other; chunk_size < 1.
    """
    b, t, h, d_k = k.shape if isinstance(k, torch.Tensor) and k.ndim == 4 else (0, 0, 0, 0)
    d_v = v.shape[-1]
    by_rows = log_alpha.ndim == 4
    if chunk_size is None:
        chunk_size = 16 if by_rows else 64
    operands = {
        "q": (q, (b, t, h, d_k)),
        "k": (k, (b, t, h, d_k)),
        "v": (v, (b, t, h, d_v)),
        "log_alpha": (log_alpha, (b, t, h, d_k) if by_rows else (b, t, h)),
        "initial_state": (initial_state, (b, h, d_k, d_v)),
    }
    check_operands(operands, chunk_size)
    with torch.autocast(q.device.type, enabled=False):
        return _in_chunks(q, k, v, log_alpha if by_rows else log_alpha[..., None], initial_state, min(chunk_size, t))


def _in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_alpha: torch.Tensor,
    state: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, result_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    b, t, h, d_k = k.shape
    q, k, v, log_alpha = (split(x, size, dtype) for x in (q, k, v, log_alpha))  # behind the end: k = 0, α = 1
    time = log_alpha.cumsum(-2)  # log γ, (…, C, 1 or d_k)
    gamma, last = time.exp(), time[..., -1:, :]
    s = torch.zeros(b, h, d_k, v.shape[-1], dtype=dtype, device=k.device) if state is None else state.to(dtype)
    added = ((last - time).exp() * k).mT @ v  # what a chunk leaves at its end
    kept = last.exp().mT
    states = []
    for n in range(k.shape[2]):
        states.append(s)
        s = kept[:, :, n] * s + added[:, :, n]
    y = _products(q, k, time) @ v + (gamma * q) @ torch.stack(states, 2)
    return y.flatten(2, 3)[:, :, :t].transpose(1, 2).to(result_dtype), s


def _products(q: torch.Tensor, k: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Σ_i q_t[i] (γ_t[i] / γ_j[i]) k_j[i] for j ≤ t, zeros for others: (…, C, C)."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    decay = time[..., :, None, :] - time[..., None, :, :]
    decay = decay.masked_fill(later[..., None], -math.inf).exp()
    if decay.shape[-1] == 1:
        return (q @ k.mT) * decay[..., 0]
    return ((decay * k[..., None, :, :]) @ q[..., None])[..., 0]
