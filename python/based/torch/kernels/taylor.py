"""The backward pass of Taylor linear attention as three Triton kernels, for bfloat16 on a GPU.

With p(s) = 1 + s + s²/2, s = c q·k, c = 1/√f, b_t = Σ_{j≤t} p(s_tj) + eps and δ_t = −dy_t·y_t:

    dq_t = c/b_t Σ_{j≤t} (1 + s_tj) (dy_t·v_j + δ_t) k_j
    dk_j = c Σ_{t≥j} (1 + s_tj) (dy_t·v_j + δ_t)/b_t q_t        dv_j = Σ_{t≥j} p(s_tj)/b_t dy_t

Inside a chunk of tokens these are sums over its pairs. All tokens before the chunk are in Σ v kᵀ and Σ k_j v kᵀ for
each j, all tokens after it in the same sums of dy/b and q; and so for the column of ones, which the denominator is. A
program of `_sums` owns four j, walks through the sequence, and leaves the sums before each chunk: one pass over the
inputs, no sums of chunks in memory. The sums have all f² products, not only those with i ≤ j: whole rows k_j k are made
in the registers that hold k.

`_query_gradients` comes between the two passes of `_sums`: it makes b and δ. No sum is made by atomic additions: equal
inputs give equal bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 64  # of the sums, that a query meets at a time
_CHUNK = 256  # tokens; of the pairs inside chunks a third of the time at f = 16, D = 64
_TILE = 64  # tokens


@triton.jit
def _sums(
    x_ptr, y_ptr, inverse_ptr, delta_ptr, sums_ptr, ones_ptr, num_tokens, heads, num_chunks,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """The sums over the chunks before each chunk; AFTER: of x/b, over those after it.

    sums[n]: Σ x_j y xᵀ for j < f and Σ y xᵀ, (f + 1, d, F), then Σ y, (d). ones[n]: Σ w x xᵀ and Σ w x, (F + 1, F),
    where w is 1; AFTER: δ. A program has four j, the last one the rest.
    """
    pair = (tl.program_id(0) // (f // 4 + 1)).to(tl.int64)
    j = tl.program_id(0) % (f // 4 + 1) * 4
    column, i, row = tl.arange(0, D), tl.arange(0, F), tl.arange(0, TILE)
    x_ptr += pair // heads * x_batch + pair % heads * x_head
    y_ptr += pair // heads * y_batch + pair % heads * y_head
    inverse_ptr += pair * num_tokens
    delta_ptr += pair * num_tokens
    size = d * F
    sums_ptr += pair * num_chunks * ((f + 1) * size + d)
    ones_ptr += pair * num_chunks * ((F + 1) * F)
    feature, value = (i < f)[None, :], (column < d)[None, :]
    at_x = row[:, None] * x_token + i[None, :]
    at_y = row[:, None] * y_token + column[None, :]
    of_matrix = column[:, None] * F + i[None, :]
    inside = (column < d)[:, None]
    a = tl.zeros([D, F], tl.float32)
    b = tl.zeros([D, F], tl.float32)
    if j < f:
        c = tl.zeros([D, F], tl.float32)
        e = tl.zeros([D, F], tl.float32)
        for step in range(num_chunks):
            chunk = num_chunks - 1 - step if AFTER else step
            out = sums_ptr + tl.cast(chunk, tl.int64) * ((f + 1) * size + d) + j * size + of_matrix
            tl.store(out, a.to(tl.bfloat16), mask=inside)
            tl.store(out + size, b.to(tl.bfloat16), mask=inside)
            tl.store(out + 2 * size, c.to(tl.bfloat16), mask=inside)
            tl.store(out + 3 * size, e.to(tl.bfloat16), mask=inside)
            for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE):
                there = start + row < num_tokens
                tile = x_ptr + start * x_token
                x = tl.load(tile + at_x, mask=there[:, None] & feature, other=0.0).to(tl.float32)
                y = tl.trans(tl.load(y_ptr + start * y_token + at_y, mask=there[:, None] & value, other=0.0))
                if AFTER:
                    x *= tl.load(inverse_ptr + start + row, mask=there, other=0.0)[:, None]
                tile += row * x_token + j
                x_a = tl.load(tile, mask=there, other=0.0).to(tl.float32)
                x_b = tl.load(tile + 1, mask=there, other=0.0).to(tl.float32)
                x_c = tl.load(tile + 2, mask=there, other=0.0).to(tl.float32)
                x_e = tl.load(tile + 3, mask=there, other=0.0).to(tl.float32)
                a = tl.dot(y, (x * x_a[:, None]).to(tl.bfloat16), a)
                b = tl.dot(y, (x * x_b[:, None]).to(tl.bfloat16), b)
                c = tl.dot(y, (x * x_c[:, None]).to(tl.bfloat16), c)
                e = tl.dot(y, (x * x_e[:, None]).to(tl.bfloat16), e)
    else:
        squares = tl.zeros([F, F], tl.float32)
        linear = tl.zeros([TILE, F], tl.float32)
        of_squares = i[:, None] * F + i[None, :]
        for step in range(num_chunks):
            chunk = num_chunks - 1 - step if AFTER else step
            out = sums_ptr + tl.cast(chunk, tl.int64) * ((f + 1) * size + d) + f * size
            tl.store(out + of_matrix, a.to(tl.bfloat16), mask=inside)
            tl.store(out + size + column[:, None] + 0 * i[None, :], b.to(tl.bfloat16), mask=inside & (i == 0)[None, :])
            out_ones = ones_ptr + tl.cast(chunk, tl.int64) * ((F + 1) * F)
            tl.store(out_ones + of_squares, squares)
            tl.store(out_ones + F * F + i, tl.sum(linear, 0))
            for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE):
                there = start + row < num_tokens
                x = tl.load(x_ptr + start * x_token + at_x, mask=there[:, None] & feature, other=0.0)
                y = tl.trans(tl.load(y_ptr + start * y_token + at_y, mask=there[:, None] & value, other=0.0))
                weighted = x.to(tl.float32)
                one = tl.where(there[:, None] & (i == 0)[None, :], 1.0, 0.0)
                if AFTER:
                    inverse = tl.load(inverse_ptr + start + row, mask=there, other=0.0)[:, None]
                    weighted *= inverse
                    one *= inverse
                a = tl.dot(y, weighted.to(tl.bfloat16), a)
                b = tl.dot(y, one.to(tl.bfloat16), b)
                if AFTER:
                    weighted *= tl.load(delta_ptr + start + row, mask=there, other=0.0)[:, None]
                squares = tl.dot(tl.trans(x), weighted.to(tl.bfloat16), squares)
                linear += weighted


@triton.jit
def _query_gradients(
    q_ptr, k_ptr, v_ptr, y_ptr, dy_ptr, sums_ptr, ones_ptr, dq_ptr, inverse_ptr, delta_ptr,
    num_tokens, heads, num_chunks, scale, eps,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    y_batch, y_token, y_head, dy_batch, dy_token, dy_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """dq, 1/b and δ of TILE queries."""
    tiles = tl.cdiv(num_tokens, TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) % tiles * TILE
    chunk = start // CHUNK
    token = start + tl.arange(0, TILE)
    i, column = tl.arange(0, F), tl.arange(0, D)
    there = (token < num_tokens)[:, None]
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    y_ptr += batch * y_batch + head * y_head
    dy_ptr += batch * dy_batch + head * dy_head
    feature, value = (i < f)[None, :], (column < d)[None, :]
    q = tl.load(q_ptr + token[:, None] * q_token + i[None, :], mask=there & feature, other=0.0)
    dy = tl.load(dy_ptr + token[:, None] * dy_token + column[None, :], mask=there & value, other=0.0)
    y = tl.load(y_ptr + token[:, None] * y_token + column[None, :], mask=there & value, other=0.0)
    delta = -tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    dq = tl.zeros([TILE, F], tl.float32)
    denominator = tl.zeros([TILE], tl.float32)
    for first in range(chunk * CHUNK, start + TILE, TILE):
        key = first + tl.arange(0, TILE)
        present = (key < num_tokens)[:, None]
        k = tl.load(k_ptr + key[:, None] * k_token + i[None, :], mask=present & feature, other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_token + column[None, :], mask=present & value, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = token[:, None] >= key[None, :]
        denominator += tl.sum(tl.where(seen, 1 + s + s * s * 0.5, 0.0), 1)
        ds = tl.where(seen, (1 + s) * (tl.dot(dy, tl.trans(v)) + delta[:, None]), 0.0)
        dq = tl.dot(ds.to(tl.bfloat16), k, dq)
    if chunk > 0:
        size = d * F
        sums = sums_ptr + (pair * num_chunks + chunk) * ((f + 1) * size + d)
        ones = ones_ptr + (pair * num_chunks + chunk) * ((F + 1) * F)
        wide = q.to(tl.float32)
        ones1 = tl.load(ones + F * F + i)
        ones2 = tl.load(ones + i[:, None] * F + i[None, :])
        turned = tl.dot(wide, ones2, input_precision="tf32x3") * scale
        denominator += chunk * CHUNK + scale * tl.sum(wide * (ones1[None, :] + 0.5 * turned), 1)
        dq += delta[:, None] * (ones1[None, :] + turned)
        of_matrix = sums + column[:, None] * F + i[None, :]
        row = tl.arange(0, ROWS)
        several = sums + (row // F * size + row % F)[None, :] + column[:, None] * F
        inside = (column < d)[:, None]
        dq = tl.dot(dy, tl.load(of_matrix + f * size, mask=inside, other=0.0), dq)
        for first_row in tl.static_range(0, f * F, ROWS):
            some = first_row // F + tl.arange(0, ROWS // F)
            some = tl.load(q_ptr + token[:, None] * q_token + some[None, :], mask=there, other=0.0).to(tl.float32)
            turned = tl.dot(dy, tl.load(several + first_row // F * size, mask=inside, other=0.0))
            turned = tl.reshape(turned, (TILE, ROWS // F, F)) * (some * scale)[:, :, None]
            dq += tl.sum(turned, 1)
    inverse = 1 / (denominator + eps)
    dq *= (inverse * scale)[:, None]
    tl.store(dq_ptr + ((batch * num_tokens + token[:, None]) * heads + head) * f + i[None, :], dq.to(tl.bfloat16),
             mask=there & feature)  # fmt: skip
    tl.store(inverse_ptr + pair * num_tokens + token, inverse, mask=token < num_tokens)
    tl.store(delta_ptr + pair * num_tokens + token, delta, mask=token < num_tokens)


@triton.jit
def _key_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, sums_ptr, ones_ptr, inverse_ptr, delta_ptr, dk_ptr, dv_ptr,
    num_tokens, heads, num_chunks, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dy_batch, dy_token, dy_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dk and dv of TILE keys."""
    tiles = tl.cdiv(num_tokens, TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) % tiles * TILE
    chunk = start // CHUNK
    token = start + tl.arange(0, TILE)
    i, column = tl.arange(0, F), tl.arange(0, D)
    there = (token < num_tokens)[:, None]
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    dy_ptr += batch * dy_batch + head * dy_head
    feature, value = (i < f)[None, :], (column < d)[None, :]
    k = tl.load(k_ptr + token[:, None] * k_token + i[None, :], mask=there & feature, other=0.0)
    v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=there & value, other=0.0)
    dk = tl.zeros([TILE, F], tl.float32)
    dv = tl.zeros([TILE, D], tl.float32)
    for first in range(start, tl.minimum(chunk * CHUNK + CHUNK, num_tokens), TILE):
        query = first + tl.arange(0, TILE)
        present = query < num_tokens
        q = tl.load(q_ptr + query[:, None] * q_token + i[None, :], mask=present[:, None] & feature, other=0.0)
        dy = tl.load(dy_ptr + query[:, None] * dy_token + column[None, :], mask=present[:, None] & value, other=0.0)
        inverse = tl.load(inverse_ptr + pair * num_tokens + query, mask=present, other=0.0)
        delta = tl.load(delta_ptr + pair * num_tokens + query, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q)) * scale
        weight = tl.where(token[:, None] <= query[None, :], inverse[None, :], 0.0)
        dv = tl.dot(((1 + s + s * s * 0.5) * weight).to(tl.bfloat16), dy, dv)
        ds = (1 + s) * weight * (tl.dot(v, tl.trans(dy)) + delta[None, :])
        dk = tl.dot(ds.to(tl.bfloat16), q, dk)
    if chunk + 1 < num_chunks:
        size = d * F
        sums = sums_ptr + (pair * num_chunks + chunk) * ((f + 1) * size + d)
        ones = ones_ptr + (pair * num_chunks + chunk) * ((F + 1) * F)
        ones1 = tl.load(ones + F * F + i)
        ones2 = tl.load(ones + i[:, None] * F + i[None, :])
        wide = k.to(tl.float32)
        dk += ones1[None, :] + tl.dot(wide, ones2, input_precision="tf32x3") * scale
        of_matrix = sums + column[:, None] * F + i[None, :]
        inside = (column < d)[:, None]
        dk = tl.dot(v, tl.load(of_matrix + f * size, mask=inside, other=0.0), dk)
        for j in tl.static_range(f):
            k_j = tl.load(k_ptr + token * k_token + j, mask=token < num_tokens, other=0.0).to(tl.float32) * scale
            of_j = tl.load(of_matrix + j * size, mask=inside, other=0.0)
            dk += k_j[:, None] * tl.dot(v, of_j)
            dv = tl.dot((wide * (k_j * (0.5 * scale))[:, None]).to(tl.bfloat16), tl.trans(of_j), dv)
        linear = tl.trans(tl.load(of_matrix + f * size, mask=inside, other=0.0))
        dv = tl.dot((wide * scale).to(tl.bfloat16), linear, dv)
        constant = tl.load(sums + (f + 1) * size + column, mask=column < d, other=0.0)
        dv += constant.to(tl.float32)[None, :]
    out = (batch * num_tokens + token[:, None]) * heads + head
    tl.store(dk_ptr + out * f + i[None, :], (dk * scale).to(tl.bfloat16), mask=there & feature)
    tl.store(dv_ptr + out * d + column[None, :], dv.to(tl.bfloat16), mask=there & value)


def taylor_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k (B, T, H, f) and v (B, T, H, D) from those of y, all bfloat16; f a multiple of 8."""
    q, k, v, y, dy = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, y, dy))
    b, t, h, f = q.shape
    d = v.shape[3]
    widths: dict[str, Any] = {
        "f": f, "d": d, "F": max(16, triton.next_power_of_2(f)), "D": max(16, triton.next_power_of_2(d)),
        "CHUNK": _CHUNK, "TILE": _TILE,
    }  # fmt: skip
    num_chunks, pairs = triton.cdiv(t, _CHUNK), b * h
    sums = q.new_empty(pairs, num_chunks, (f + 1) * d * widths["F"] + d)
    ones = q.new_empty(pairs, num_chunks, (widths["F"] + 1) * widths["F"], dtype=torch.float32)
    inverse, delta = q.new_empty(2, pairs, t, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scale = f**-0.5
    by_features, by_tiles = ((f // 4 + 1) * pairs,), (triton.cdiv(t, _TILE) * pairs,)
    of_q, of_k, of_v, of_y, of_dy = (x.stride()[:3] for x in (q, k, v, y, dy))
    _sums[by_features](
        k, v, inverse, delta, sums, ones, t, h, num_chunks, *of_k, *of_v, **widths, AFTER=False,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _query_gradients[by_tiles](
        q, k, v, y, dy, sums, ones, dq, inverse, delta, t, h, num_chunks, scale, eps, *of_q, *of_k, *of_v, *of_y,
        *of_dy, **widths, ROWS=_ROWS, num_warps=4, num_stages=2,
    )  # fmt: skip
    _sums[by_features](
        q, dy, inverse, delta, sums, ones, t, h, num_chunks, *of_q, *of_dy, **widths, AFTER=True,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _key_gradients[by_tiles](
        q, k, v, dy, sums, ones, inverse, delta, dk, dv, t, h, num_chunks, scale, *of_q, *of_k, *of_v, *of_dy,
        **widths, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv
