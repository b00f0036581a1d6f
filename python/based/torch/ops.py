"""The mixers as differentiable PyTorch operations, whose memory is linear in the number of tokens T.

Inputs are float64, float32, bfloat16 or float16 tensors on any device. Sums of 16-bit numbers are kept in float32.
Under autocast, inputs other than float64 are cast to autocast's dtype, as those of matrix products are. Every function
raises TypeError or ValueError with what was found and what is expected. Derivatives of any order are right: a backward
pass with create_graph=True, a transform of torch.func, and forward-mode differentiation use PyTorch's own operations
instead of the kernels, and keep what these need.

A sequence may go on where an earlier call stopped (`initial_state`), and one tensor (1, T, …) may hold N documents one
behind the other, each of which begins a sequence (`cu_seqlens`: where they begin, and T).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from based import _core
from based import ops as kernels
from based.torch._autograd import gradients, is_differentiated, is_transformed
from based.torch._documents import by_documents
from based.torch.kernels import HAS_TRITON

__all__ = [
    "gated_short_conv",
    "rotary_embedding",
    "selective_scan",
    "silu_short_conv",
    "sliding_window_attention",
    "swiglu",
    "taylor_linear_attention",
    "taylor_state",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 8  # elements: matrix units want rows of 16-bit numbers to start at multiples of 16 bytes
_MIN_BLOCK = 64  # queries of a block of window attention: fewer are too small a product
_FLASH_HEAD_DIM = 256  # the largest of PyTorch's FlashAttention
_KERNEL_TAPS = 8  # a program makes the convolution that often, each of as many taps
_KERNEL_FEATURE_DIMS = (8, 16, 24, 32)  # of the GPU kernels on tensor cores; others are slower than chunks here


# ---- Taylor linear attention -----------------------------------------------------------------------------------------


def taylor_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eps: float = 1e-12,
    chunk_size: int = 128,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_t = Σ_{j≤t} p(q_t·k_j/√f) v_j / (Σ_{j≤t} p(q_t·k_j/√f) + eps) with p(s) = 1 + s + s²/2, causal.

    The linear attention of BASED (arXiv:2402.18668). Quadratic inside chunks, and across them through
    the sums Σ φ(k) [v | 1]ᵀ of all tokens before, with φ the symmetric half of the second-order feature map. Saves its
    inputs and its result; the backward pass makes the rest again. On a GPU the forward pass of bfloat16 inputs with f =
    8, 16, 24 or 32 and D a multiple of 8 is the kernel of `based.ops`, if this build has it, and with Triton the
    backward pass is kernels, too; `chunk_size` then changes nothing.

    Args:
        q: Queries (B, T, H, f).
        k: Keys (B, T, H, f).
        v: Values (B, T, H, D).
        eps: Added to the denominator, ≥ 0.
        chunk_size: Tokens of a chunk. The result does not depend on it but for rounding. Scores take B·H·T·chunk_size
            numbers, states B·H·T/chunk_size · (f + 1)(f + 2)/2 · (D + 1).
        initial_state: Of the tokens before, from `taylor_state`: (B, H, F, D + 1), or (N, …) with cu_seqlens. No
            kernels then.
        cu_seqlens: Where documents begin, (N + 1) int32 or int64, of inputs with B = 1.

    Returns:
        (B, T, H, D), of the inputs' dtype.
    """
    _check_tensors(("q", q, "BTHf"), ("k", k, "BTHf"), ("v", v, "BTHD"))
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a finite number ≥ 0")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected ≥ 1")
    states = () if initial_state is None else (initial_state,)
    _check_taylor_state(k, v, *states, documents=cu_seqlens is not None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        q, k, v = _as_autocast(q, k, v)
        return _taylor(q, k, v, eps, chunk_size, *state)

    if cu_seqlens is not None:
        return by_documents(attend, cu_seqlens, q, k, v, states=states)
    return attend(q, k, v, *states)


def _taylor(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, chunk_size: int, state: torch.Tensor | None = None
) -> torch.Tensor:
    if is_transformed():
        return _chunks_forward(q, k, v, eps, chunk_size, state)
    if state is None:
        return _TaylorLinearAttention.apply(q, k, v, eps, chunk_size)
    if not torch.is_grad_enabled():
        return _chunks_forward(q, k, v, eps, chunk_size, state)
    # Keeps the inputs alone. Nothing here is random.
    return checkpoint(_chunks_forward, q, k, v, eps, chunk_size, state, use_reentrant=False, preserve_rng_state=False)


def taylor_state(k: torch.Tensor, v: torch.Tensor, initial_state: torch.Tensor | None = None) -> torch.Tensor:
    """Σ φ(k_t) [v_t | 1]ᵀ over all tokens: what `taylor_linear_attention` goes on from.

    The layout is that of `taylor` in a saved state (docs/state-format.md).

    Args:
        k: Keys (B, T, H, f).
        v: Values (B, T, H, D).
        initial_state: Of the tokens before, which is added.

    Returns:
        (B, H, 1 + f + f(f + 1)/2, D + 1), float32 (float64 of float64 inputs).
    """
    _check_tensors(("k", k, "BTHf"), ("v", v, "BTHD"))
    _check_taylor_state(k, v, *(() if initial_state is None else (initial_state,)), documents=False)
    dtype = _accumulation_dtype(k)
    pairs = _Pairs(k.shape[3], k.device, dtype)
    with torch.autocast(k.device.type, enabled=False):
        phi = pairs.features(k.to(dtype).transpose(1, 2)) * pairs.weight[:, 0].sqrt()
        state = phi.mT @ functional.pad(v.to(dtype), (0, 1), value=1).transpose(1, 2)
    state = state[:, :, : _num_features(k.shape[3])]
    return state if initial_state is None else state + initial_state


def _num_features(f: int) -> int:
    return (f + 1) * (f + 2) // 2


def _check_taylor_state(k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor, documents: bool) -> None:
    for x in state:
        expected = (k.shape[0], k.shape[2], _num_features(k.shape[3]), v.shape[3] + 1)
        dtype = _accumulation_dtype(k)
        if not isinstance(x, torch.Tensor) or x.dtype != dtype:
            found = _name(x) if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"initial_state is {found}, expected a tensor of {str(dtype).removeprefix('torch.')}")
        if tuple(x.shape)[1:] != expected[1:] or not (documents or x.shape[0] == expected[0]):
            wanted = ", ".join(map(str, ("N", *expected[1:]) if documents else expected))
            raise ValueError(f"initial_state has shape {tuple(x.shape)}, expected ({wanted})")
        if x.device != k.device:
            raise ValueError(f"initial_state is on {x.device}, expected {k.device}, where k is")


class _TaylorLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, chunk_size: int
    ) -> torch.Tensor:
        if _has_kernel(q, v):
            y = _taylor_kernel(q, k, v, eps)
        elif torch.compiler.is_compiling():
            y = _taylor_chunks(q, k, v, eps, chunk_size)
        else:
            y = _chunks_forward(q, k, v, eps, chunk_size)
        ctx.save_for_backward(q, k, v, y)
        ctx.eps, ctx.chunk_size = eps, chunk_size
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, y = ctx.saved_tensors
        if _has_kernel(q, v) and _triton_takes(q, k, v, y, dy) and not is_differentiated():
            return *_taylor_backward_kernel(q, k, v, y, dy, ctx.eps), None, None
        backward = _taylor_chunks_backward if torch.compiler.is_compiling() else _chunks_backward
        return *backward(q, k, v, y, dy, ctx.eps, ctx.chunk_size), None, None


def _chunks_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, chunk_size: int, state: torch.Tensor | None = None
) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return _Chunks(q, k, v, chunk_size, state).forward(eps)


def _chunks_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return _Chunks(q, k, v, chunk_size).backward(y, dy, eps)


# For compiled graphs: Inductor has no shapes for a number of chunks that it does not know, and takes a minute for one
# that it does.
_taylor_chunks = torch.library.custom_op("based::taylor_chunks", _chunks_forward, mutates_args=())
_taylor_chunks_backward = torch.library.custom_op("based::taylor_chunks_backward", _chunks_backward, mutates_args=())


@_taylor_chunks.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float, chunk_size: int, state: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@_taylor_chunks_backward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


class _Chunks:
    """One call's tokens in N chunks of C, and the products that the forward and the backward pass share.

    With c = 1/√f and x₀ = 1, φ(x) = (x_i x_j) for 0 ≤ i ≤ j ≤ f gives 1 + s + s²/2 = φ(q)·W φ(k) for s = c q·k, where W
    is diagonal: 1 for i = j = 0, c for i = 0 < j, c² for 0 < i < j, c²/2 for 0 < i = j. V = [v | 1 | 0]: the
    denominator is one more column. The numerators and denominators of chunk n are
    tril(p(Q Kᵀ)) V + φ(Q) S_n, with S_n = W Σ φ(K)ᵀ V over the chunks before n. The first chunk has nothing before it
    without an initial state, the last one nothing after: S stands for chunks `first` … N − 1. An initial state is
    √W Σ φ(K)ᵀ [v | 1] of the tokens before.

    Nothing here is changed in place, so that autograd and torch.func can differentiate and batch it.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_size: int, state: torch.Tensor | None = None
    ) -> None:
        self.num_tokens, f, self.head_dim = q.shape[1], q.shape[3], v.shape[3]
        self.scale = f**-0.5
        # float16 cannot hold sums over many tokens, of which the states consist. A CPU multiplies in float32 anyway:
        # states that are not rounded keep y exact where φ(q)·S cancels, for q at right angles to long keys.
        self.dtype = _accumulation_dtype(q) if q.dtype == torch.float16 or not q.is_cuda else q.dtype
        self.result_dtype = q.dtype
        several = self.num_tokens > chunk_size
        self.chunk = chunk_size if several else self.num_tokens
        self.num_chunks = (self.num_tokens + chunk_size - 1) // chunk_size if several else 1
        self.first = 1 if state is None else 0
        self.has_states = several or state is not None
        self.q, self.k = self._split(q), self._split(k)
        ones = functional.pad(v, (0, 1), value=1)
        self.v = self._split(functional.pad(ones, (0, -ones.shape[-1] % _ALIGNMENT)))
        self.s = _product(self.q, self.k.mT) * self.scale
        self.p = torch.tril(1 + self.s + self.s * self.s / 2)  # (B, H, N, C, C)
        if self.has_states:
            self.pairs = _Pairs(f, q.device, _accumulation_dtype(q))
            weight = self.pairs.weight
            self.phi_q = self.pairs.features(self.q[:, :, self.first :])
        if several:
            self.phi_k = self.pairs.features(self.k[:, :, :-1])
            increments = _product(self.phi_k.mT, self.v[:, :, :-1])  # (B, H, N − 1, F, E)
            states = increments.cumsum(2) * weight
        if state is not None:
            missing = (0, self.v.shape[-1] - state.shape[-1], 0, weight.shape[0] - state.shape[-2])
            initial = (functional.pad(state, missing) * weight.sqrt())[:, :, None]
            states = torch.cat([initial, states + initial], 2) if several else initial
        if self.has_states:
            self.states = states.to(self.dtype)

    def forward(self, eps: float) -> torch.Tensor:
        """The operation's result, (B, T, H, D)."""
        sums = _product(self.p.to(self.dtype), self.v)
        if self.has_states:
            sums = _add_to_later(sums, _product(self.phi_q, self.states), self.first)
        d = self.head_dim
        return self._join(sums[..., :d] / (sums[..., d : d + 1] + eps))

    def backward(
        self, y: torch.Tensor, dy: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, without an initial state."""
        d = self.head_dim
        denominator = self.p.sum(-1, keepdim=True)
        if self.has_states:
            denominator = _add_to_later(denominator, _product(self.phi_q, self.states[..., d : d + 1]))
        # y = a/b: da = dy/b, db = −(dy·y)/b
        dy = self._split(dy).to(denominator.dtype) / (denominator + eps)
        db = -(dy * self._split(y)).sum(-1, keepdim=True)
        da = functional.pad(torch.cat([dy, db], -1), (0, self.v.shape[-1] - d - 1)).to(self.dtype)

        dp = _product(da, self.v.mT)
        ds = torch.tril((1 + self.s) * dp * self.scale).to(self.dtype)
        dq, dk = _product(ds, self.k), _product(ds.mT, self.q)
        dv = _product(self.p.to(self.dtype).mT, da)
        if self.has_states:
            dphi_q = _product(da[:, :, 1:], self.states.mT)
            d_increments = _product(self.phi_q.mT, da[:, :, 1:])  # of S, of chunks 1 … N − 1
            later = (d_increments.flip(2).cumsum(2).flip(2) * self.pairs.weight).to(self.dtype)
            dphi_k = _product(self.v[:, :, :-1], later.mT)
            dv = _add_to_earlier(dv, _product(self.phi_k, later))
            dq = _add_to_later(dq, self.pairs.features_backward(self.q[:, :, 1:], dphi_q))
            dk = _add_to_earlier(dk, self.pairs.features_backward(self.k[:, :, :-1], dphi_k))
        return self._join(dq), self._join(dk), self._join(dv[..., :d])

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H, n) → (B, H, N, C, n), zeros after the end."""
        b, _, h, n = x.shape
        x = functional.pad(x, (0, 0, 0, 0, 0, self.num_chunks * self.chunk - self.num_tokens))
        return x.reshape(b, self.num_chunks, self.chunk, h, n).permute(0, 3, 1, 2, 4).to(self.dtype).contiguous()

    def _join(self, x: torch.Tensor) -> torch.Tensor:
        """What _split made of a (B, T, H, n), as that."""
        b, h, _, _, n = x.shape
        x = x.permute(0, 2, 3, 1, 4).reshape(b, self.num_chunks * self.chunk, h, n)
        # Always a copy: of one head the rest is a view of what it is made of (_cast).
        return x.narrow(1, 0, self.num_tokens).to(self.result_dtype, memory_format=torch.contiguous_format, copy=True)


def _add_to_later(x: torch.Tensor, rest: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Adds `rest` to x (B, H, N, …), in the chunks from `first` on."""
    return torch.cat([x[:, :, :first], x[:, :, first:] + rest], 2)


def _add_to_earlier(x: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Adds `rest` to x (B, H, N, …), in all chunks but the last."""
    return torch.cat([x[:, :, :-1] + rest, x[:, :, -1:]], 2)


class _Pairs:
    """The feature map φ(x) = (x_i x_j) for 0 ≤ i ≤ j ≤ f with x₀ = 1, zeros up to an aligned number F of features."""

    def __init__(self, f: int, device: torch.device, dtype: torch.dtype) -> None:
        self.feature_dim = f
        i, j = torch.triu_indices(f + 1, f + 1, device=device)
        # No number may come from the host's memory: a CUDA graph could not be recorded.
        c = functional.pad(torch.full((f,), f**-0.5, dtype=dtype, device=device), (1, 0), value=1)
        weight = c[i] * c[j] * (1 - 0.5 * ((i == j) & (i > 0)).to(dtype))
        padding = (0, -len(i) % _ALIGNMENT)
        self.weight = functional.pad(weight, padding)[:, None]
        """The diagonal of W, (F, 1)."""
        self._i, self._j = (functional.pad(index, padding, value=f + 1) for index in (i, j))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(…, f) → (…, F)."""
        x = self._extended(x)
        return x[..., self._i] * x[..., self._j]

    def features_backward(self, x: torch.Tensor, dphi: torch.Tensor) -> torch.Tensor:
        """The gradient of x, (…, f), in dphi's dtype."""
        x = self._extended(x).to(dphi.dtype)
        dims = torch.arange(1, self.feature_dim + 1, device=x.device)
        # A product with ones and zeros sums in one order; index_add_ would not on a GPU.
        to_i, to_j = ((index[:, None] == dims).to(dphi.dtype) for index in (self._i, self._j))
        return (dphi * x[..., self._j]) @ to_i + (dphi * x[..., self._i]) @ to_j

    def _extended(self, x: torch.Tensor) -> torch.Tensor:
        """[1, x, 0]."""
        return functional.pad(functional.pad(x, (1, 0), value=1), (0, 1))


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of matrices with float32 sums and result, float64 of float64."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if is_differentiated() or is_transformed():
        return a.float() @ b.float()
    return _bfloat16_product(a, b)


# torch.compile does not know torch.bmm's out_dtype.
@torch.library.custom_op("based::bfloat16_product", mutates_args=(), device_types="cuda")
def _bfloat16_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, a.shape[:-2])


@_bfloat16_product.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32)


@torch.library.custom_op("based::taylor_linear_attention", mutates_args=(), device_types="cuda")
def _taylor_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    q, k, v = (x.detach().contiguous() for x in (q, k, v))
    return kernels.taylor_linear_attention(q, k, v, eps=eps)


@_taylor_kernel.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("based::taylor_linear_attention_backward", mutates_args=(), device_types="cuda")
def _taylor_backward_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from based.torch.kernels.taylor import taylor_backward

    return taylor_backward(q, k, v, y, dy, eps)


@_taylor_backward_kernel.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _has_kernel(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Of the forward pass."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[3] in _KERNEL_FEATURE_DIMS
        and v.shape[3] % 8 == 0
        and _BUILT_FOR_CUDA
    )


def _triton_takes(*tensors: torch.Tensor) -> bool:
    """Triton kernels count a sequence's numbers in 32 bits. Triton comes with PyTorch for CUDA."""
    return HAS_TRITON and all(x.is_cuda and x.stride(1) * x.shape[1] < 1 << 31 for x in tensors)


_BUILT_FOR_CUDA = _core.build_info()["cuda"] is not None


# ---- sliding-window attention ----------------------------------------------------------------------------------------


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention of each query over the last `window` keys, its own included. No rotary embedding.

    On a GPU, of 16-bit inputs with D a multiple of 8 up to 256, PyTorch's FlashAttention. Otherwise in blocks of
    max(window − 1, 64) queries, each of which sees its own block of keys and the one before: scores take B·H·T·2·block
    numbers at most, where PyTorch's attention keeps them at all.

    Args:
        q: Queries (B, T, H, D).
        k: Keys (B, T, H_kv, D); H_kv divides H, query head h reads key head ⌊h · H_kv / H⌋.
        v: Values (B, T, H_kv, D).
        window: Number of keys, ≥ 1.
        scale: Of q·k before the softmax, > 0; None for D^(-1/2).
        initial_state: Keys and values of the last P ≥ 1 tokens before, each (B, P, H_kv, D), or (N, P, …) with
            cu_seqlens. P = window − 1 are enough; a sequence with fewer tokens before it has all of them.
        cu_seqlens: Where documents begin, (N + 1) int32 or int64, of inputs with B = 1.

    Returns:
        (B, T, H, D), of the inputs' dtype.
    """
    _check_tensors(("q", q, "BTHD"), ("k", k, "BTKD"), ("v", v, "BTKD"), names={"K": "H_kv"})
    (_, _, h, d), h_kv = q.shape, k.shape[2]
    if h % h_kv != 0:
        raise ValueError(f"k has {h_kv} heads, expected a divisor of the {h} heads of q")
    if window < 1:
        raise ValueError(f"window is {window}, expected ≥ 1")
    scale = d**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected a finite number > 0")
    before = () if initial_state is None else _checked_window_state(initial_state, q, k, cu_seqlens is not None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *before: torch.Tensor) -> torch.Tensor:
        if before:  # queries of zeros for the tokens before
            keys, values = (x[:, max(0, x.shape[1] - window + 1) :] for x in before)
            q = functional.pad(q, (0, 0, 0, 0, keys.shape[1], 0))
            k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        q, k, v = _as_autocast(q, k, v)
        y = _attend_in_window(q, k, v, window, scale)
        return y[:, keys.shape[1] :] if before else y

    if cu_seqlens is not None:
        return by_documents(attend, cu_seqlens, q, k, v, states=before)
    return attend(q, k, v, *before)


def _checked_window_state(
    state: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, k: torch.Tensor, documents: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"initial_state is {type(state).__name__}, expected keys and values: a tuple of two tensors")
    keys, values = state
    axes = "NPKD" if documents else "BPKD"
    named = ("initial_state[0]", keys, axes), ("initial_state[1]", values, axes)
    _check_tensors(("q", q, "BTHD"), ("k", k, "BTKD"), *named, names={"N": "N", "P": "P"})
    return keys, values


def _attend_in_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    if is_transformed():
        return _attend_in_blocks(q, k, v, window, scale, _attend_plainly)
    q_once, k_once, v_once = (q, k, v) if torch.compiler.is_compiling() else _OnceDifferentiable.apply(q, k, v)
    if window < q.shape[1] and _takes_flash(q):
        y = _attend_window(q_once, k_once, v_once, window, scale)
    else:
        y = _attend_in_blocks(q_once, k_once, v_once, window, scale, _attend)
    if torch.compiler.is_compiling() or not y.requires_grad:
        return y
    return _TwiceDifferentiable.apply(y, q, k, v, window, scale)


def _takes_flash(q: torch.Tensor) -> bool:
    d = q.shape[3]
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and d % 8 == 0 and d <= _FLASH_HEAD_DIM


class _OnceDifferentiable(torch.autograd.Function):
    """Gives tensors as they are, and no second derivatives: where these are asked for, their gradients are none.

    An operator whose result has no gradient then (_TwiceDifferentiable) may still be asked for gradients of zeros.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(None for _ in gradients) if is_differentiated() else gradients


class _TwiceDifferentiable(torch.autograd.Function):
    """Gives y as it is, and second derivatives, which PyTorch's kernels of attention have not.

    Where these are asked for, the gradients of q, k and v are those of the definition, and y has none.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window, ctx.scale = window, scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not is_differentiated():
            return dy, None, None, None, None, None

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return _attend_in_blocks(q, k, v, ctx.window, ctx.scale, _attend_plainly)

        return None, *gradients(attend, ctx.saved_tensors, ctx.needs_input_grad[1:4], dy), None, None


def _attend_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float, attend: "_Attend"
) -> torch.Tensor:
    """The same in blocks of queries."""
    b, t = q.shape[:2]
    if window >= t:
        return attend(q, k, v, None, scale)
    size = min(max(window - 1, _MIN_BLOCK), t)
    position = torch.arange(2 * size, device=q.device)
    age = position[size:, None] - position  # of a block's queries, to its keys and those of the block before
    mask = (age >= 0) & (age < window)
    first = attend(q[:, :size], k[:, :size], v[:, :size], mask[:, size:], scale)
    if t == size:
        return first
    num_blocks = -(-t // size)
    blocks = [
        functional.pad(x, (0, 0, 0, 0, 0, num_blocks * size - t)).reshape(b, num_blocks, size, *x.shape[2:])
        for x in (q, k, v)
    ]
    own = [x[:, 1:].flatten(0, 1) for x in blocks]  # (B · (blocks − 1), size, heads, D)
    before = [x[:, :-1].flatten(0, 1) for x in blocks[1:]]
    keys, values = (torch.cat(pair, 1) for pair in zip(before, own[1:], strict=True))
    others = attend(own[0], keys, values, mask, scale)
    others = others.reshape(b, (num_blocks - 1) * size, *others.shape[2:])
    return torch.cat([first, others[:, : t - size]], 1)


def _attend_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """The same by FlashAttention, which leaves out the keys that no query of a block sees."""
    b, t = q.shape[:2]
    k, v = _as_many_heads(q, k, v)
    starts = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y: Any = varlen_attn(q, k, v, starts, starts, t, t, scale=scale, window_size=(window - 1, 0))
    result: torch.Tensor = y.unflatten(0, (b, t))
    return result


def _as_many_heads(q: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values (B, T, H_kv, D), each head as often as queries read it."""
    group = q.shape[2] // tensors[0].shape[2]
    return [x.repeat_interleave(group, dim=2) if group > 1 else x for x in tensors]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """softmax(scale · q kᵀ) v over the keys where `mask` is true; None: over those up to the query's own."""
    q, k, v = (x.transpose(1, 2) for x in (q, *_as_many_heads(q, k, v)))
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y.transpose(1, 2)


def _attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The same by operations that can be differentiated again, and with sums in float32 at least."""
    result_dtype, dtype = q.dtype, _accumulation_dtype(q)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, *_as_many_heads(q, k, v)))
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    with torch.autocast(q.device.type, enabled=False):
        scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
        return _cast((scores.softmax(-1) @ v).transpose(1, 2), result_dtype)


_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]


def rotary_embedding(
    x: torch.Tensor,
    *,
    rotary_dim: int,
    base: float = 10000.0,
    interleaved: bool = False,
    start: int = 0,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turns pairs of the first rotary_dim dimensions of each head by angles that grow with the position (RoFormer).

    (a, b) → (a cos θ − b sin θ, a sin θ + b cos θ), where pair i < n = ⌈rotary_dim / 2⌉ is (x[i], x[i + n]), or (x[2i],
    x[2i + 1]) when interleaved, and θ = position · base^(−2i / rotary_dim).

    Args:
        x: Queries or keys (B, T, H, D), from position `start` on.
        rotary_dim: Dimensions that turn; 0 for none. 2n ≤ D.
        base: Of the angles, > 0.
        interleaved: Which numbers make a pair.
        start: Position of the first token, ≥ 0.
        cu_seqlens: Where documents begin, (N + 1) int32 or int64, of x with B = 1: each starts at position `start`.

    Returns:
        (B, T, H, D), of x's dtype.
    """
    _check_tensors(("x", x, "BTHD"))
    if start < 0:
        raise ValueError(f"start is {start}, expected a position ≥ 0")
    if cu_seqlens is not None:
        return by_documents(
            lambda x: rotary_embedding(x, rotary_dim=rotary_dim, base=base, interleaved=interleaved, start=start),
            cu_seqlens,
            x,
        )
    t, d = x.shape[1], x.shape[3]
    n = -(-rotary_dim // 2)
    if rotary_dim < 0 or 2 * n > d:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected 0 to {d // 2 * 2}")
    if not 0 < base < math.inf:
        raise ValueError(f"base is {base}, expected a finite number > 0")
    if n == 0:
        return x
    dtype = _accumulation_dtype(x)
    cos, sin = _rotary_tables(x.device, start + t, rotary_dim, base)
    cos, sin = cos[start:].to(dtype), sin[start:].to(dtype)
    a, b = x[..., : 2 * n].to(dtype).unflatten(-1, (n, 2) if interleaved else (2, n)).unbind(-1 if interleaved else -2)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1 if interleaved else -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * n :]], -1)


# torch.compile would make the sines in float64 again for each head and sequence that they turn.
@torch.library.custom_op("based::rotary_tables", mutates_args=())
def _rotary_tables(
    device: torch.device, num_tokens: int, rotary_dim: int, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angles, (T, 1, n) float64: positions may be large."""
    exponents = torch.arange(-(-rotary_dim // 2), dtype=torch.float64, device=device) * (-2 / rotary_dim)
    angles = torch.arange(num_tokens, device=device)[:, None, None] * base**exponents
    return angles.cos(), angles.sin()


@_rotary_tables.register_fake
def _(device: torch.device, num_tokens: int, rotary_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = torch.empty(2, num_tokens, 1, -(-rotary_dim // 2), dtype=torch.float64, device=device)
    return cos, sin


# ---- gated short convolution -----------------------------------------------------------------------------------------


def gated_short_conv(
    u: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """SiLU(conv(u₁)) ⊙ u₂ for u = [u₁|u₂], conv depthwise and causal: Σ_j weight[:, j] · u₁[t − K + 1 + j].

    Saves its inputs alone; the backward pass makes the convolution again.

    Args:
        u: (B, T, 2e).
        weight: (e, K), of u's dtype, or float32 for 16-bit u; the last tap is the present token's.
        initial_state: u₁ of the last P ≥ 1 tokens before, (B, P, e), or (N, P, e) with cu_seqlens; zeros stand before
            them. P = K − 1 are enough.
        cu_seqlens: Where documents begin, (N + 1) int32 or int64, of u with B = 1.

    Returns:
        (B, T, e), of u's dtype.
    """
    _check_tensors(("u", u, "BT2"), names={"2": "2e"})
    if u.shape[2] % 2 != 0:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (B, T, 2e)")
    _check_tensors(("weight", weight, "eK"))
    if weight.shape[0] * 2 != u.shape[2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({u.shape[2] // 2}, K)")
    if weight.device != u.device:
        raise ValueError(f"weight is on {weight.device}, expected {u.device}")
    before = () if initial_state is None else (initial_state,)
    for state in before:
        e = weight.shape[0]
        _check_tensors(("u", u, "BT2"), ("initial_state", state, "NPe" if cu_seqlens is not None else "BPe"))
        if state.shape[2] != e:
            raise ValueError(f"initial_state has shape {tuple(state.shape)}, expected extent {e} of its last axis")

    def convolve(u: torch.Tensor, *before: torch.Tensor) -> torch.Tensor:
        for state in before:  # tokens of zeros for u₂
            u = torch.cat([functional.pad(state, (0, state.shape[2])), u], 1)
        (u,) = _as_autocast(u)
        y = _convolve(u, weight)
        return y[:, before[0].shape[1] :] if before else y

    if cu_seqlens is not None:
        return by_documents(convolve, cu_seqlens, u, states=before)
    return convolve(u, *before)


def _convolve(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype not in (u.dtype, _accumulation_dtype(u)):
        raise TypeError(f"weight is {_name(weight)}, expected {_name(u)}")
    return _plain_conv(u, weight) if is_transformed() else _GatedShortConv.apply(u, weight)


def _plain_conv(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    u1, u2, w = _widened(u, weight)
    return _cast(functional.silu(_causal_conv(u1, w)) * u2, u.dtype)


class _GatedShortConv(torch.autograd.Function):
    # K shifted sums instead of a convolution of PyTorch's: K is small, and they accumulate in float32.

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(u, weight)
        if _has_conv_kernel(u, weight):
            return _conv_kernel(u, weight)
        return _plain_conv(u, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, weight = ctx.saved_tensors
        if _has_conv_kernel(u, weight) and not is_differentiated():
            du, dw = _conv_gradients_kernel(u, weight, dy)
            return du, dw.to(weight.dtype)
        u1, u2, w = _widened(u, weight)
        t, taps = u1.shape[1], w.shape[1]
        conv = _causal_conv(u1, w)
        silu, slope = _silu(conv)
        dconv = dy * u2 * slope
        after = functional.pad(dconv, (0, 0, 0, taps - 1))
        du1 = _correlate(after, w.flip(1), t)
        before = functional.pad(u1, (0, 0, taps - 1, 0))
        dw = torch.stack([(dconv * before[:, j : j + t]).sum((0, 1)) for j in range(taps)], -1)
        return torch.cat([du1, dy * silu], -1).to(u.dtype), dw.to(weight.dtype)


@torch.library.custom_op("based::gated_short_conv", mutates_args=(), device_types="cuda")
def _conv_kernel(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from based.torch.kernels.gates import conv

    return conv(u.contiguous(), weight.contiguous())


@_conv_kernel.register_fake
def _(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return u.new_empty(u.shape[0], u.shape[1], u.shape[2] // 2)


@torch.library.custom_op("based::gated_short_conv_backward", mutates_args=(), device_types="cuda")
def _conv_gradients_kernel(
    u: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from based.torch.kernels.gates import conv_gradients

    return conv_gradients(u.contiguous(), weight.contiguous(), dy.contiguous())


@_conv_gradients_kernel.register_fake
def _(u: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    return du, torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)


def _has_conv_kernel(u: torch.Tensor, weight: torch.Tensor) -> bool:
    return u.dtype != torch.float64 and weight.shape[1] <= _KERNEL_TAPS and _triton_takes(u)


def _widened(u: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = _accumulation_dtype(u)
    u1, u2 = u.to(dtype).chunk(2, -1)
    return u1, u2, weight.to(dtype)


def _causal_conv(u1: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _correlate(functional.pad(u1, (0, 0, w.shape[1] - 1, 0)), w, u1.shape[1])


def _correlate(x: torch.Tensor, w: torch.Tensor, t: int) -> torch.Tensor:
    """Σ_j w[:, j] · x[:, j : j + t], (B, t, e)."""
    y = w[:, 0] * x[:, :t]
    for j in range(1, w.shape[1]):
        y = torch.addcmul(y, w[:, j], x[:, j : j + t])
    return y


# ---- selective scan --------------------------------------------------------------------------------------------------


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(Δ_t a) h_{t-1} + Δ_t b_t x_t, y_t = Σ_n c_t h_t + d x_t with Δ = softplus(dt + dt_bias).

    The scan of Mamba (arXiv:2312.00752). Chunk after chunk; inside one by pairwise doubling, in which no number grows.
    Saves its inputs and the state before each chunk; the backward pass makes the rest again, a chunk at a time.

    Args:
        x: (B, T, e).
        dt: (B, T, e).
        dt_bias: (e), of x's dtype, or float32 for 16-bit x; so a and d.
        a: (e, N), ≤ 0: what is above it would grow without bounds.
        b: (B, T, N).
        c: (B, T, N).
        d: (e).
        initial_state: h_0, (B, e, N), of the returned one's dtype; None for zeros.
        chunk_size: Tokens of a chunk. The result does not depend on it but for rounding. The states that are kept take
            B·e·N·T/chunk_size numbers, those of the chunk at hand a few times B·e·N·chunk_size.

    Returns:
        y (B, T, e), of x's dtype, and h_T (B, e, N), float32 (float64 of float64 inputs).
    """
    _check_tensors(("x", x, "BTe"), ("dt", dt, "BTe"), ("b", b, "BTN"), ("c", c, "BTN"))
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected ≥ 1")
    e, n = x.shape[2], b.shape[2]
    x, dt, b, c = _as_autocast(x, dt, b, c)
    dtype = _accumulation_dtype(x)
    for name, vector in (("dt_bias", dt_bias), ("d", d)):
        _check_beside(name, vector, (e,), x, (x.dtype, dtype))
    _check_beside("a", a, (e, n), x, (x.dtype, dtype))
    if initial_state is None:
        initial_state = x.new_zeros((x.shape[0], e, n), dtype=dtype)
    _check_beside("initial_state", initial_state, (x.shape[0], e, n), x, (dtype,))
    scan = _plain_scan if is_transformed() else _SelectiveScan.apply
    y, state, _ = scan(x, dt, dt_bias, a, b, c, d, initial_state, chunk_size)
    return y, state


def _check_beside(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {x.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {_name(tensor)}, expected {str(dtypes[-1]).removeprefix('torch.')}")


def _doubling(decay: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = decay_t h_{t-1} + u_t from h_{-1} = 0, and Π_{i≤t} decay_i, over axis 1: in log₂ of its extent steps.

    Nothing is changed in place, so that autograd and torch.func can differentiate and batch it.
    """
    step, t = 1, u.shape[1]
    while step < t:
        u = torch.cat([u[:, :step], torch.addcmul(u[:, step:], decay[:, step:], u[:, :-step])], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return u, decay


def _scan_chunk(delta: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> Any:
    """The states (B, C, e, N) of a chunk after h (B, e, N), and each token's decay."""
    decay = (delta[..., None] * a).exp()
    u, decays = _doubling(decay, (delta * x)[..., None] * b[:, :, None])
    return torch.addcmul(u, decays, h[:, None]), decay


def _plain_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    h: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the state after it, and those before each chunk (B, chunks, e, N)."""
    with torch.autocast(x.device.type, enabled=False):
        dtype, result_dtype = _accumulation_dtype(x), x.dtype
        x, dt, dt_bias, a, b, c, d = (part.to(dtype) for part in (x, dt, dt_bias, a, b, c, d))
        ys, starts = [], []
        for xs, dts, bs, cs in zip(*(part.split(chunk_size, 1) for part in (x, dt, b, c)), strict=True):
            starts.append(h)
            states, _ = _scan_chunk(functional.softplus(dts + dt_bias), xs, a, bs, h)
            h = states[:, -1]
            ys.append((states @ cs[..., None])[..., 0] + d * xs)
        # A copy of the last state: what is a view may not be changed by whoever gets it.
        return _cast(torch.cat(ys, 1), result_dtype), h.clone(), torch.stack(starts, 1)


def _scan_gradients(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    starts: torch.Tensor,
    dy: torch.Tensor,
    dh: torch.Tensor,
    chunk_size: int,
) -> list[torch.Tensor]:
    """Of the seven inputs and of h_0. dh: of the last state."""
    dtypes = [part.dtype for part in (x, dt, dt_bias, a, b, c, d)]
    with torch.autocast(x.device.type, enabled=False):
        dtype = starts.dtype
        x, dt, dt_bias, a, b, c, d, dy = (part.to(dtype) for part in (x, dt, dt_bias, a, b, c, d, dy))
        da, dd = torch.zeros_like(a), (dy * x).sum((0, 1))
        parts: list[tuple[torch.Tensor, ...]] = []
        chunks = zip(*(part.split(chunk_size, 1) for part in (x, dt, b, c, dy)), starts.unbind(1), strict=True)
        for xs, dts, bs, cs, dys, h in reversed(list(chunks)):
            raw = dts + dt_bias
            delta = functional.softplus(raw)
            states, decay = _scan_chunk(delta, xs, a, bs, h)
            # g_t = c_t dy_t + decay_{t+1} g_{t+1}: the same scan from the end, decays one token later.
            g = dys[..., None] * cs[:, :, None]
            g = torch.cat([g[:, :-1], g[:, -1:] + dh[:, None]], 1)
            later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
            g = _doubling(later.flip(1), g.flip(1))[0].flip(1)
            before = torch.cat([h[:, None], states[:, :-1]], 1)
            exponent = g * before * decay  # the gradient of Δ a
            along_b = (g @ bs[..., None])[..., 0]  # of Δ x
            ddelta = (exponent * a).sum(-1) + along_b * xs
            da = da + (exponent * delta[..., None]).sum((0, 1))
            dbs = ((delta * xs)[:, :, None] @ g)[:, :, 0]
            dcs = (dys[:, :, None] @ states)[:, :, 0]
            parts.append((along_b * delta + d * dys, ddelta * torch.sigmoid(raw), dbs, dcs))
            dh = decay[:, 0] * g[:, 0]
        dx, ddt, db, dc = (torch.cat(part[::-1], 1) for part in zip(*parts, strict=True))
        found = (dx, ddt, ddt.sum((0, 1)), da, db, dc, dd)
        return [*(part.to(kind) for part, kind in zip(found, dtypes, strict=True)), dh.clone()]


# For compiled graphs, which would have all chunks one after another.
_scan_chunks = torch.library.custom_op("based::selective_scan", _plain_scan, mutates_args=())
_scan_chunks_backward = torch.library.custom_op("based::selective_scan_backward", _scan_gradients, mutates_args=())


@_scan_chunks.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    h: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_chunks = (x.shape[1] + chunk_size - 1) // chunk_size
    starts = h.new_empty(h.shape[0], num_chunks, h.shape[1], h.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(h), starts


@_scan_chunks_backward.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    starts: torch.Tensor,
    dy: torch.Tensor,
    dh: torch.Tensor,
    chunk_size: int,
) -> list[torch.Tensor]:
    inputs = (x, dt, dt_bias, a, b, c, d, starts[:, 0])
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in inputs]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dt: torch.Tensor,
        dt_bias: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        h: torch.Tensor,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        forward = _scan_chunks if torch.compiler.is_compiling() else _plain_scan
        y, state, starts = forward(x, dt, dt_bias, a, b, c, d, h, chunk_size)
        ctx.save_for_backward(x, dt, dt_bias, a, b, c, d, h, starts)
        ctx.chunk_size = chunk_size
        ctx.mark_non_differentiable(starts)
        return y, state, starts

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dh: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        x, dt, dt_bias, a, b, c, d, h, starts = ctx.saved_tensors
        if is_differentiated():

            def scan(*inputs: Any) -> torch.Tensor:
                """Both results as one, so that one gradient is of both."""
                operands: Any = (*inputs, ctx.chunk_size)
                y, state, _ = _plain_scan(*operands)
                return (y * dy).sum(dtype=state.dtype) + (state * dh).sum()

            one = torch.ones((), dtype=starts.dtype, device=starts.device)
            return *gradients(scan, (x, dt, dt_bias, a, b, c, d, h), ctx.needs_input_grad[:8], one), None
        backward = _scan_chunks_backward if torch.compiler.is_compiling() else _scan_gradients
        return *backward(x, dt, dt_bias, a, b, c, d, starts, dy, dh, ctx.chunk_size), None


def silu_short_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU(conv(x) + bias), conv depthwise and causal: Σ_j weight[:, j] · x[t − K + 1 + j].

    Args:
        x: (B, T, e).
        weight: (e, K), of x's dtype, or float32 for 16-bit x; the last tap is the present token's.
        bias: (e), likewise; None for none.

    Returns:
        (B, T, e), of x's dtype.
    """
    _check_tensors(("x", x, "BTe"))
    _check_tensors(("weight", weight, "eK"))
    (x,) = _as_autocast(x)
    dtype = _accumulation_dtype(x)
    _check_beside("weight", weight, (x.shape[2], weight.shape[1]), x, (x.dtype, dtype))
    if bias is not None:
        _check_beside("bias", bias, (x.shape[2],), x, (x.dtype, dtype))
    conv = _causal_conv(x.to(dtype), weight.to(dtype))
    return _cast(functional.silu(conv if bias is None else conv + bias.to(dtype)), x.dtype)


# ---- gates -----------------------------------------------------------------------------------------------------------


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """The product value ⊙ SiLU(gate) for h = [value|gate].

    Saves h alone.

    Args:
        h: (B, T, 2m).

    Returns:
        (B, T, m), of h's dtype.
    """
    _check_tensors(("h", h, "BT2"), names={"2": "2m"})
    if h.shape[2] % 2 != 0:
        raise ValueError(f"h has shape {tuple(h.shape)}, expected (B, T, 2m)")
    (h,) = _as_autocast(h)
    return _plain_swiglu(h) if is_transformed() else _Swiglu.apply(h)


def _plain_swiglu(h: torch.Tensor) -> torch.Tensor:
    value, gate = h.to(_accumulation_dtype(h)).chunk(2, -1)
    return _cast(value * functional.silu(gate), h.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        if h.dtype != torch.float64 and _triton_takes(h):
            return _swiglu_kernel(h)
        return _plain_swiglu(h)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (h,) = ctx.saved_tensors
        if h.dtype != torch.float64 and _triton_takes(h) and not is_differentiated():
            return _swiglu_gradient_kernel(h, dy)
        value, gate = h.to(_accumulation_dtype(h)).chunk(2, -1)
        silu, slope = _silu(gate)
        return torch.cat([dy * silu, dy * value * slope], -1).to(h.dtype)


def _silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(x) and SiLU′(x)."""
    sigmoid = torch.sigmoid(x)
    silu = x * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


@torch.library.custom_op("based::swiglu", mutates_args=(), device_types="cuda")
def _swiglu_kernel(h: torch.Tensor) -> torch.Tensor:
    from based.torch.kernels.gates import swiglu

    return swiglu(h.contiguous())


@_swiglu_kernel.register_fake
def _(h: torch.Tensor) -> torch.Tensor:
    return h.new_empty(h.shape[0], h.shape[1], h.shape[2] // 2)


@torch.library.custom_op("based::swiglu_backward", mutates_args=(), device_types="cuda")
def _swiglu_gradient_kernel(h: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    from based.torch.kernels.gates import swiglu_gradient

    return swiglu_gradient(h.contiguous(), dy.contiguous())


@_swiglu_gradient_kernel.register_fake
def _(h: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_tensors(*arguments: tuple[str, torch.Tensor, str], names: dict[str, str] | None = None) -> None:
    """Of (name, tensor, one letter per axis): equal letters are equal extents, and all share dtype and device."""
    first_name, first, _ = arguments[0]
    extents: dict[str, int] = {}
    for name, tensor, axes in arguments:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {_name(tensor)}, expected float64, float32, bfloat16 or float16")
        found, known = tuple(tensor.shape), dict(extents)
        if len(found) != len(axes) or any(extents.setdefault(a, n) != n for a, n in zip(axes, found, strict=True)):
            expected = ", ".join(str(known.get(axis, (names or {}).get(axis, axis))) for axis in axes)
            raise ValueError(f"{name} has shape {found}, expected ({expected})")
        if 0 in found:
            raise ValueError(f"{name} has shape {found}, expected extents ≥ 1")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {first.device}, where {first_name} is")
        if tensor.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise TypeError(f"{name} is {_name(tensor)}, expected {_name(first)}, which {first_name} is")


def _cast(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y.to(dtype) without its call where y is what it returns: compiled by PyTorch 2.11 the gradients would be zero."""
    return y if y.dtype == dtype else y.to(dtype)


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, in autocast's dtype where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
