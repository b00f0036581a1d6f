"""The backward pass of Taylor linear attention as three Triton kernels, for bfloat16 on a GPU.

With p(s) = 1 + s + s²/2, s = c q·k, c = 1/√f, b_t = Σ_{j≤t} p(s_tj) + eps and δ_t = −dy_t·y_t:

    dq_t = c/b_t Σ_{j≤t} (1 + s_tj) (dy_t·v_j + δ_t) k_j
    dk_j = c Σ_{t≥j} (1 + s_tj) (dy_t·v_j + δ_t)/b_t q_t        dv_j = Σ_{t≥j} p(s_tj)/b_t dy_t

Inside a chunk of tokens these are sums over its pairs. All tokens before the chunk are in
S₁ = Σ k_i v and S₂ = Σ k_i k_j v, all tokens after it in the same sums of q and dy/b; and so for the column of ones,
which the denominator is. A program of `_sums` owns 64 rows of such a sum, walks through the sequence, and leaves the sum
before each chunk: one pass over the inputs, no sums of chunks in memory. The sums have all f² products, not only those
with i ≤ j: rows are then whole vectors k_j · k, which a program makes from two loads.

`_query_gradients` comes between the two passes of `_sums`: it makes b and δ. No sum is made by atomic additions: equal
inputs give equal bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 64  # of a sum, which a program of _sums owns
_CHUNK = 256  # tokens; of the pairs inside chunks a third of the time at f = 16, D = 64
_TILE = 64  # tokens


@triton.jit
def _sums(
    x_ptr, y_ptr, inverse_ptr, delta_ptr, sums_ptr, ones_ptr, num_tokens, heads, num_chunks,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """sums[n] = Σ φ(x) y, ones[n] = Σ φ(x) over the chunks before n; AFTER: φ(x)/b and Σ φ(x) δ/b, those after n.

    φ(x): f rows of x_j x (F numbers each), x, 1; ROWS of them are this program's.
    """
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, j, beyond = row % F, row // F, row - f * F
    quadratic = beyond < 0
    x_ptr += pair // heads * x_batch + pair % heads * x_head
    y_ptr += pair // heads * y_batch + pair % heads * y_head
    num_rows = f * F + F + 1
    column = tl.arange(0, D)
    kept = (row < num_rows)[:, None] & (column < d)[None, :]
    out = sums_ptr + (pair * num_chunks * num_rows + row[:, None]) * d + column[None, :]
    ones_out = ones_ptr + pair * num_chunks * num_rows + row

    total = tl.zeros([ROWS, D], tl.float32)
    of_ones = tl.zeros([ROWS], tl.float32)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if AFTER else step
        tl.store(out + chunk.to(tl.int64) * num_rows * d, total.to(tl.bfloat16), mask=kept)
        tl.store(ones_out + chunk.to(tl.int64) * num_rows, of_ones, mask=row < num_rows)
        for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE):
            token = start + tl.arange(0, TILE)
            there = token < num_tokens
            at = x_ptr + token[None, :] * x_token
            vector = (i < f) & (quadratic | (beyond < F))
            other = tl.where(beyond == F, 1.0, 0.0).to(tl.bfloat16)
            a = tl.load(at + i[:, None], mask=vector[:, None] & there[None, :], other=0.0)
            a = tl.where(vector[:, None], a, other[:, None])
            b = tl.load(at + j[:, None], mask=quadratic[:, None] & there[None, :], other=1.0)
            phi = a.to(tl.float32) * b.to(tl.float32)
            if AFTER:
                phi *= tl.load(inverse_ptr + pair * num_tokens + token, mask=there, other=0.0)[None, :]
                of_ones += tl.sum(phi * tl.load(delta_ptr + pair * num_tokens + token, mask=there, other=0.0), 1)
            else:
                of_ones += tl.sum(phi, 1)
            y_at = y_ptr + token[:, None] * y_token + column[None, :]
            y = tl.load(y_at, mask=there[:, None] & (column < d)[None, :], other=0.0)
            total = tl.dot(phi.to(tl.bfloat16), y, total)


@triton.jit
def _query_gradients(
    q_ptr, k_ptr, v_ptr, y_ptr, dy_ptr, sums_ptr, ones_ptr, dq_ptr, inverse_ptr, delta_ptr,
    num_tokens, heads, num_chunks, scale, eps,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    y_batch, y_token, y_head, dy_batch, dy_token, dy_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dq, 1/b and δ of TILE queries."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) * TILE
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
        num_rows = f * F + F + 1
        sums = sums_ptr + (pair * num_chunks + chunk) * num_rows * d
        ones = ones_ptr + (pair * num_chunks + chunk) * num_rows
        wide = q.to(tl.float32)
        ones1 = tl.load(ones + f * F + i)
        ones2 = tl.load(ones + i[:, None] * F + i[None, :], mask=(i < f)[:, None], other=0.0)
        turned = tl.dot(wide, ones2, input_precision="tf32x3") * scale
        denominator += chunk * CHUNK + scale * tl.sum(wide * (ones1[None, :] + 0.5 * turned), 1)
        dq += delta[:, None] * (ones1[None, :] + turned)
        transposed = sums + i[None, :] * d + column[:, None]
        inside = (column < d)[:, None]
        dq = tl.dot(dy, tl.load(transposed + f * F * d, mask=inside, other=0.0), dq)
        for j in tl.static_range(f):
            q_j = tl.load(q_ptr + token * q_token + j, mask=token < num_tokens, other=0.0).to(tl.float32) * scale
            dq += q_j[:, None] * tl.dot(dy, tl.load(transposed + j * F * d, mask=inside, other=0.0))
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
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Dk and dv of TILE keys."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) * TILE
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
        num_rows = f * F + F + 1
        sums = sums_ptr + (pair * num_chunks + chunk) * num_rows * d
        ones = ones_ptr + (pair * num_chunks + chunk) * num_rows
        ones1 = tl.load(ones + f * F + i)
        ones2 = tl.load(ones + i[:, None] * F + i[None, :], mask=(i < f)[:, None], other=0.0)
        dk += ones1[None, :] + tl.dot(k.to(tl.float32), ones2, input_precision="tf32x3") * scale
        transposed = sums + i[None, :] * d + column[:, None]
        inside = (column < d)[:, None]
        dk = tl.dot(v, tl.load(transposed + f * F * d, mask=inside, other=0.0), dk)
        for j in tl.static_range(f):
            k_j = tl.load(k_ptr + token * k_token + j, mask=token < num_tokens, other=0.0).to(tl.float32) * scale
            dk += k_j[:, None] * tl.dot(v, tl.load(transposed + j * F * d, mask=inside, other=0.0))
        row = tl.arange(0, ROWS)
        for first_row in range(0, f * F, ROWS):
            at = k_ptr + token[:, None] * k_token
            a = tl.load(at + ((first_row + row) % F)[None, :], mask=there & ((row % F) < f)[None, :], other=0.0)
            b = tl.load(at + ((first_row + row) // F)[None, :], mask=there, other=0.0)
            phi = a.to(tl.float32) * b.to(tl.float32) * (scale * scale * 0.5)
            of_rows = tl.load(sums + (first_row + row)[:, None] * d + column[None, :], mask=value, other=0.0)
            dv = tl.dot(phi.to(tl.bfloat16), of_rows, dv)
        linear = tl.load(sums + (f * F + i)[:, None] * d + column[None, :], mask=value, other=0.0)
        dv = tl.dot((k.to(tl.float32) * scale).to(tl.bfloat16), linear, dv)
        constant = tl.load(sums + (f * F + F) * d + column, mask=column < d, other=0.0)
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
    rows = f * widths["F"] + widths["F"] + 1
    num_chunks, pairs = triton.cdiv(t, _CHUNK), b * h
    sums = q.new_empty(pairs, num_chunks, rows, d)
    ones = q.new_empty(pairs, num_chunks, rows, dtype=torch.float32)
    inverse, delta = q.new_empty(2, pairs, t, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scale = f**-0.5
    by_rows, by_tiles = (triton.cdiv(rows, _ROWS), pairs), (triton.cdiv(t, _TILE), pairs)
    of_q, of_k, of_v, of_y, of_dy = (x.stride()[:3] for x in (q, k, v, y, dy))
    _sums[by_rows](
        k, v, inverse, delta, sums, ones, t, h, num_chunks, *of_k, *of_v, **widths, ROWS=_ROWS, AFTER=False,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _query_gradients[by_tiles](
        q, k, v, y, dy, sums, ones, dq, inverse, delta, t, h, num_chunks, scale, eps, *of_q, *of_k, *of_v, *of_y,
        *of_dy, **widths, num_warps=4, num_stages=2,
    )  # fmt: skip
    _sums[by_rows](
        q, dy, inverse, delta, sums, ones, t, h, num_chunks, *of_q, *of_dy, **widths, ROWS=_ROWS, AFTER=True,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _key_gradients[by_tiles](
        q, k, v, dy, sums, ones, inverse, delta, dk, dv, t, h, num_chunks, scale, *of_q, *of_k, *of_v, *of_dy,
        **widths, ROWS=_ROWS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv
