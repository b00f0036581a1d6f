"""The mixers' CUDA kernels by themselves, on tensors of PyTorch or of any library that speaks DLPack. Forward only.

Inputs are float32, bfloat16 or float16, of one dtype and on one GPU, and are read in place. Results are torch tensors
when the first input is one, otherwise `based.Tensor`s. Work is enqueued, not waited for: on `stream`, a cudaStream_t as
an integer that outlives the results; None is torch's current stream for torch tensors, or else the legacy default one.

Every function raises TypeError or ValueError with what was found and what is expected, UnsupportedError without CUDA,
MemoryError, DeviceError.
"""

import sys
from typing import Any

from based import _core

__all__ = ["gated_short_conv", "sliding_window_attention", "taylor_linear_attention"]

_DLPACK_CUDA = 2


def taylor_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    initial_state: Any = None,
    return_state: bool = False,
    eps: float = 1e-12,
    stream: int | None = None,
) -> Any:
    """y_t = Σ_{j≤t} p(q_t·k_j/√f) v_j / (Σ_{j≤t} p(q_t·k_j/√f) + eps) with p(s) = 1 + s + s²/2, causal.

    Args:
        q: Queries (B, T, H, f), any strides but for the last axis, which is dense; so k and v.
        k: Keys, as q.
        v: Values (B, T, H, D).
        initial_state: Σ φ(k) [v | 1]ᵀ of the tokens before, (B, H, 1 + f + f(f + 1)/2, D + 1) float32, dense
            (docs/state-format.md); None when there were none. It is not changed.
        return_state: Also return the state after these tokens, in this form.
        eps: Added to the denominator.
        stream: See above.

    Returns:
        y (B, T, H, D), or (y, state).
    """
    _check_rank("q", q, 4, "(B, T, H, f)")
    _check_rank("v", v, 4, "(B, T, H, D)")
    call = _Call("q", q, stream)
    out = call.empty(v.shape)
    f, d = q.shape[3], v.shape[3]
    num_features = 1 + f + f * (f + 1) // 2
    state = call.empty((q.shape[0], q.shape[2], num_features, d + 1), "float32") if return_state else None
    _core.op_taylor_linear_attention(q, k, v, initial_state, out, state, eps, call.stream, call.producer_stream)
    return (out, state) if return_state else out


def sliding_window_attention(
    q: Any, k: Any, v: Any, *, window: int, scale: float | None = None, stream: int | None = None
) -> Any:
    """Causal softmax attention of each query over the last `window` keys, its own included. No rotary embedding.

    Args:
        q: Queries (B, T, H, D), any strides but for the last axis, which is dense; so k and v.
        k: Keys (B, T, H_kv, D); H_kv divides H, query head h reads key head ⌊h · H_kv / H⌋.
        v: Values, as k.
        window: Number of keys.
        scale: Of q·k before the softmax; None for D^(-1/2).
        stream: See above.

    Returns:
        (B, T, H, D).
    """
    _check_rank("q", q, 4, "(B, T, H, D)")
    call = _Call("q", q, stream)
    out = call.empty(q.shape)
    if scale is None:
        scale = q.shape[3] ** -0.5
    _core.op_sliding_window_attention(q, k, v, out, window, scale, call.stream, call.producer_stream)
    return out


def gated_short_conv(
    u: Any, weight: Any, *, initial_state: Any = None, return_state: bool = False, stream: int | None = None
) -> Any:
    """SiLU(conv(u₁)) ⊙ u₂ for u = [u₁|u₂], conv depthwise and causal: Σ_j weight[:, j] · u₁[t − K + 1 + j].

    Args:
        u: (B, T, 2e), dense.
        weight: (e, K), dense, of u's dtype; the last tap is the present token's.
        initial_state: The last K − 1 values of u₁ before, oldest first, (B, K − 1, e) float32, dense; None for zeros.
            Used in u's dtype, which those of an earlier call have. It is not changed.
        return_state: Also return the state after these tokens, in this form.
        stream: See above.

    Returns:
        (B, T, e), or that and the state.
    """
    _check_rank("u", u, 3, "(B, T, 2e)")
    _check_rank("weight", weight, 2, "(e, K)")
    call = _Call("u", u, stream)
    (b, t, _), (e, taps) = u.shape, weight.shape
    out = call.empty((b, t, e))
    state = call.empty((b, taps - 1, e), "float32") if return_state else None
    _core.op_gated_short_conv(u, weight, initial_state, out, state, call.stream, call.producer_stream)
    return (out, state) if return_state else out


class _Call:
    """Where one call's work runs, and memory of the first input's kind for its results."""

    def __init__(self, name: str, like: Any, stream: int | None) -> None:
        torch = sys.modules.get("torch")
        self._torch = torch if torch is not None and isinstance(like, torch.Tensor) else None
        self._like = like
        device, index = like.__dlpack_device__()
        if device != _DLPACK_CUDA:
            raise ValueError(f"{name} is not on a GPU (DLPack device type {int(device)}), expected a CUDA tensor")
        self._device = f"cuda:{index}"
        if self._torch is not None and stream is None:
            self.stream = self._torch.cuda.current_stream(like.device).cuda_stream
            self.producer_stream = -1  # nothing to wait for: it is the stream that made the inputs
        else:
            self.stream = stream or 0
            self.producer_stream = stream or 1  # DLPack's name of the legacy default stream

    def empty(self, shape: Any, dtype: str | None = None) -> Any:
        """Uninitialised, of the first input's dtype unless another one is given."""
        if self._torch is not None:
            torch_dtype = self._like.dtype if dtype is None else getattr(self._torch, dtype)
            return self._torch.empty(tuple(shape), dtype=torch_dtype, device=self._like.device)
        return _core.op_empty(self._device, dtype or str(self._like.dtype), list(shape), self.stream)


def _check_rank(name: str, value: Any, rank: int, axes: str) -> None:
    if not hasattr(value, "__dlpack__") or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be a tensor that exports DLPack, not {type(value).__name__}")
    if len(value.shape) != rank:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {axes}")
