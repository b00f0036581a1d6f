"""The gated delta rule in chunks, by PyTorch's own operations."""

import math

import torch

from based.torch._chunks import check_operands, split


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_alpha: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S ← α_t S;  S ← S + k_t (β_t (v_t − Sᵀk_t))ᵀ;  y_t = Sᵀq_t (Gated DeltaNet, arXiv:2412.06464; α = 1: DeltaNet).

    In a chunk the changes u_t = β_t (v_t − α_t Sᵀk_t) solve a triangular system; from chunk to chunk goes S alone.
    Arithmetic is float32 (float64 of float64 inputs), also under autocast.

    Args:
        q: Queries (B, T, H, d_k), scaled.
        k: Keys (B, T, H, d_k), of length 1.
        v: Values (B, T, H, d_v).
        beta: (B, T, H) in [0, 1].
        log_alpha: log α ≤ 0, (B, T, H); None: α = 1.
        initial_state: S before the first token, (B, H, d_k, d_v); None: zeros.
        chunk_size: Tokens of a chunk. The results do not depend on it but for rounding.

    Returns:
        y (B, T, H, d_v), of v's dtype, and S after the last token, (B, H, d_k, d_v).

    Raises:
        ValueError: Shapes that do not fit each other; chunk_size < 1.
    """
    b, t, h, d_k = k.shape if isinstance(k, torch.Tensor) and k.ndim == 4 else (0, 0, 0, 0)
    d_v = v.shape[-1]
    operands = {
        "q": (q, (b, t, h, d_k)),
        "k": (k, (b, t, h, d_k)),
        "v": (v, (b, t, h, d_v)),
        "beta": (beta, (b, t, h)),
        "log_alpha": (log_alpha, (b, t, h)),
        "initial_state": (initial_state, (b, h, d_k, d_v)),
    }
    check_operands(operands, chunk_size)
    with torch.autocast(q.device.type, enabled=False):
        return _in_chunks(q, k, v, beta, log_alpha, initial_state, min(chunk_size, t))


def _in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_alpha: torch.Tensor | None,
    state: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, result_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    b, t, h, d_k = k.shape

    # Behind the end β = 0 and α = 1: these tokens change nothing.
    q, k, v, beta = (split(x, size, dtype) for x in (q, k, v, beta[..., None]))
    time = torch.zeros_like(beta[..., 0]) if log_alpha is None else split(log_alpha, size, dtype).cumsum(-1)  # log γ
    ones = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()
    decay = (time[..., :, None] - time[..., None, :]).masked_fill(~ones, -math.inf).exp()  # γ_t / γ_j for j ≤ t
    system = torch.eye(size, dtype=dtype, device=k.device) + (beta * (k @ k.mT) * decay).tril(-1)
    gamma = time.exp()[..., None]
    # u = X − Y S: the changes without a state before the chunk, and what one takes off.
    solved = torch.linalg.solve_triangular(
        system, torch.cat([beta * v, beta * gamma * k], -1), upper=False, unitriangular=True
    )
    x, y = solved.split([v.shape[-1], d_k], -1)
    within = (q @ k.mT) * decay
    rest = (time[..., -1:] - time).exp()[..., None] * k  # what is left of a key at the chunk's end
    s = torch.zeros(b, h, d_k, v.shape[-1], dtype=dtype, device=k.device) if state is None else state.to(dtype)
    out = []
    for n in range(k.shape[2]):
        u = x[:, :, n] - y[:, :, n] @ s
        out.append(gamma[:, :, n] * (q[:, :, n] @ s) + within[:, :, n] @ u)
        s = gamma[:, :, n, -1:] * s + rest[:, :, n].mT @ u
    result = torch.cat(out, 2)[:, :, :t].transpose(1, 2)
    return result.to(result_dtype), s
