"""The gated short convolution and the SiLU gate as Triton kernels, which take little longer than memory.

A program of the convolution has TILE tokens of one sequence and BLOCK channels. What K taps read again comes from the
cache. The gradient of the convolution's result goes through memory: to make it again for each tap took three times as
long.
"""

import torch
import triton
import triton.language as tl

_TILE, _BLOCK = 32, 64
_ELEMENTS = 1024


@triton.jit
def _conv(
    u_ptr, weight_ptr, y_ptr, num_tokens, channels, tiles, blocks, K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores y = SiLU(c) u₂, c_t = Σ_j w_j u₁[t − K + 1 + j]."""
    tile = tl.program_id(0) // blocks
    sequence = (tile // tiles).to(tl.int64) * num_tokens
    token = (tile % tiles * TILE + tl.arange(0, TILE))[:, None]
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = channel < channels
    u_ptr += sequence * 2 * channels + channel
    weight_ptr += channel * K
    c = tl.zeros([TILE, BLOCK], tl.float32)
    for j in tl.static_range(K):
        t = token - (K - 1 - j)
        u1 = tl.load(u_ptr + t * 2 * channels, mask=inside & (t >= 0) & (t < num_tokens), other=0.0)
        c += tl.load(weight_ptr + j, mask=inside, other=0.0).to(tl.float32) * u1.to(tl.float32)
    kept = inside & (token < num_tokens)
    u2 = tl.load(u_ptr + token * 2 * channels + channels, mask=kept, other=0.0).to(tl.float32)
    y = c * tl.sigmoid(c) * u2
    tl.store(y_ptr + sequence * channels + token * channels + channel, y.to(y_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _conv_gate_gradients(
    u_ptr, weight_ptr, dy_ptr, du_ptr, dc_ptr, dw_ptr, num_tokens, channels, tiles, blocks, K: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores du₂ = dy SiLU(c), dc = dy u₂ SiLU′(c), and the tile's part of dw_j = Σ_t dc_t u₁[t − K + 1 + j]."""
    tile = tl.program_id(0) // blocks
    sequence = (tile // tiles).to(tl.int64) * num_tokens
    token = (tile % tiles * TILE + tl.arange(0, TILE))[:, None]
    block = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    channel = block[None, :]
    inside = channel < channels
    kept = inside & (token < num_tokens)
    u_ptr += sequence * 2 * channels + channel
    du_ptr += sequence * 2 * channels + channel
    at = sequence * channels + token * channels + channel
    c = tl.zeros([TILE, BLOCK], tl.float32)
    for j in tl.static_range(K):
        t = token - (K - 1 - j)
        u1 = tl.load(u_ptr + t * 2 * channels, mask=kept & (t >= 0), other=0.0)
        c += tl.load(weight_ptr + channel * K + j, mask=inside, other=0.0).to(tl.float32) * u1.to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=kept, other=0.0).to(tl.float32)
    u2 = tl.load(u_ptr + token * 2 * channels + channels, mask=kept, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(c)
    silu = c * sigmoid
    tl.store(du_ptr + token * 2 * channels + channels, (dy * silu).to(du_ptr.dtype.element_ty), mask=kept)
    dc = dy * u2 * (sigmoid + silu * (1 - sigmoid))
    tl.store(dc_ptr + at, dc.to(dc_ptr.dtype.element_ty), mask=kept)
    for j in tl.static_range(K):
        t = token - (K - 1 - j)
        u1 = tl.load(u_ptr + t * 2 * channels, mask=kept & (t >= 0), other=0.0)
        dw = tl.sum(dc * u1.to(tl.float32), 0)
        tl.store(dw_ptr + (tile.to(tl.int64) * K + j) * channels + block, dw, mask=block < channels)


@triton.jit
def _conv_input_gradients(
    dc_ptr, weight_ptr, du_ptr, num_tokens, channels, tiles, blocks, K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores du₁[t] = Σ_s w_{K−1−s} dc[t + s]."""
    tile = tl.program_id(0) // blocks
    sequence = (tile // tiles).to(tl.int64) * num_tokens
    token = (tile % tiles * TILE + tl.arange(0, TILE))[:, None]
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = channel < channels
    dc_ptr += sequence * channels + channel
    du1 = tl.zeros([TILE, BLOCK], tl.float32)
    for s in tl.static_range(K):
        dc = tl.load(dc_ptr + (token + s) * channels, mask=inside & (token + s < num_tokens), other=0.0)
        w = tl.load(weight_ptr + channel * K + (K - 1 - s), mask=inside, other=0.0).to(tl.float32)
        du1 += w * dc.to(tl.float32)
    du_ptr += sequence * 2 * channels + token * 2 * channels + channel
    tl.store(du_ptr, du1.to(du_ptr.dtype.element_ty), mask=inside & (token < num_tokens))


def conv(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """SiLU(conv(u₁)) ⊙ u₂ for u (B, T, 2e) and weight (e, K), both dense."""
    b, t, _ = u.shape
    e, taps = weight.shape
    y = u.new_empty(b, t, e)
    tiles, blocks = triton.cdiv(t, _TILE), triton.cdiv(e, _BLOCK)
    _conv[(b * tiles * blocks,)](u, weight, y, t, e, tiles, blocks, taps, _TILE, _BLOCK, num_warps=4)
    return y


def conv_gradients(u: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of u, and of weight in float32."""
    b, t, _ = u.shape
    e, taps = weight.shape
    du = torch.empty_like(u)
    tiles, blocks = triton.cdiv(t, _TILE), triton.cdiv(e, _BLOCK)
    dw = u.new_empty(b * tiles, taps, e, dtype=torch.float32)
    dc = torch.empty_like(dy)
    grid, shape = (b * tiles * blocks,), (t, e, tiles, blocks, taps, _TILE, _BLOCK)
    _conv_gate_gradients[grid](u, weight, dy, du, dc, dw, *shape, num_warps=4)
    _conv_input_gradients[grid](dc, weight, du, *shape, num_warps=4)
    return du, dw.sum(0).t().contiguous()


@triton.jit
def _swiglu(h_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    h_ptr += row * 2 * width + column
    value = tl.load(h_ptr, mask=inside).to(tl.float32)
    gate = tl.load(h_ptr + width, mask=inside).to(tl.float32)
    y = value * gate * tl.sigmoid(gate)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(h_ptr, dy_ptr, dh_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    h_ptr += row * 2 * width + column
    dh_ptr += row * 2 * width + column
    value = tl.load(h_ptr, mask=inside).to(tl.float32)
    gate = tl.load(h_ptr + width, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dh_ptr, (dy * silu).to(dh_ptr.dtype.element_ty), mask=inside)
    dgate = dy * value * (sigmoid + silu * (1 - sigmoid))
    tl.store(dh_ptr + width, dgate.to(dh_ptr.dtype.element_ty), mask=inside)


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """The product value · SiLU(gate) for h = [value|gate] (B, T, 2m), dense."""
    b, t, width = h.shape[0], h.shape[1], h.shape[2] // 2
    y = h.new_empty(b, t, width)
    _swiglu[b * t, triton.cdiv(width, _ELEMENTS)](h, y, width, _ELEMENTS, num_warps=4)
    return y


def swiglu_gradient(h: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of h."""
    b, t, width = dy.shape
    dh = torch.empty_like(h)
    _swiglu_gradient[b * t, triton.cdiv(width, _ELEMENTS)](h, dy, dh, width, _ELEMENTS, num_warps=4)
    return dh
