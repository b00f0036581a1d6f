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

On Hopper Triton's products with a matrix of 16 or 32 columns may read beyond the shared memory (Triton 3.6 and 3.7,
triton-lang/triton#10573 and #11366: an illegal memory access, or wrong numbers). So q and k are padded to 64 columns
where a product reads them, and four j are one matrix. Their products with the sums of ones are no matrix products.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_CHUNK = 256  # tokens; the pairs inside chunks take a third of the time at f = 16, D = 64
_TILE = 64  # tokens
_WIDTH = 64  # least number of columns of a matrix


@triton.jit
def _side_by_side(a, b, c, e, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[a b c e], each a quarter of the columns."""
    joined = tl.join(tl.join(a, b), tl.join(c, e))  # (…, 0|1 of the pair, pair)
    return tl.reshape(tl.permute(joined, (0, 3, 2, 1)), (ROWS, COLUMNS))


@triton.jit
def _sums(
    x_ptr, y_ptr, inverse_ptr, delta_ptr, sums_ptr, ones_ptr, num_tokens, heads, num_chunks,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """The sums over the chunks before each chunk; AFTER: of x/b, over those after it.

    sums[n]: for each four j [Σ x_j y xᵀ | …] (d, 4F), then [Σ y xᵀ | Σ y | 0 …]. ones[n]: Σ w x xᵀ and Σ w x,
    (F + 1, F), where w is 1; AFTER: δ. A program has four j, the last one the rest.
    """
    pair = (tl.program_id(0) // (f // 4 + 1)).to(tl.int64)
    group = tl.program_id(0) % (f // 4 + 1)
    column, i, row, wide = tl.arange(0, D), tl.arange(0, F), tl.arange(0, TILE), tl.arange(0, 4 * F)
    x_ptr += pair // heads * x_batch + pair % heads * x_head
    y_ptr += pair // heads * y_batch + pair % heads * y_head
    inverse_ptr += pair * num_tokens
    delta_ptr += pair * num_tokens
    sums_ptr += (pair * num_chunks * (f // 4 + 1) + group) * d * 4 * F
    ones_ptr += pair * num_chunks * ((F + 1) * F)
    feature, value = (i < f)[None, :], (column < d)[None, :]
    at_x = row[:, None] * x_token + i[None, :]
    at_y = row[:, None] * y_token + column[None, :]
    out = sums_ptr + column[:, None] * (4 * F) + wide[None, :]
    inside = (column < d)[:, None]
    total = tl.zeros([D, 4 * F], tl.float32)
    if group < f // 4:
        for step in range(num_chunks):
            chunk = num_chunks - 1 - step if AFTER else step
            tl.store(out + tl.cast(chunk, tl.int64) * ((f // 4 + 1) * d * 4 * F), total.to(tl.bfloat16), mask=inside)
            for start in range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE):
                there = start + row < num_tokens
                tile = x_ptr + start * x_token
                x = tl.load(tile + at_x, mask=there[:, None] & feature, other=0.0).to(tl.float32)
                y = tl.trans(tl.load(y_ptr + start * y_token + at_y, mask=there[:, None] & value, other=0.0))
                if AFTER:
                    x *= tl.load(inverse_ptr + start + row, mask=there, other=0.0)[:, None]
                tile += row * x_token + group * 4
                x_a = tl.load(tile, mask=there, other=0.0).to(tl.float32)[:, None]
                x_b = tl.load(tile + 1, mask=there, other=0.0).to(tl.float32)[:, None]
                x_c = tl.load(tile + 2, mask=there, other=0.0).to(tl.float32)[:, None]
                x_e = tl.load(tile + 3, mask=there, other=0.0).to(tl.float32)[:, None]
                a, b = (x * x_a).to(tl.bfloat16), (x * x_b).to(tl.bfloat16)
                c, e = (x * x_c).to(tl.bfloat16), (x * x_e).to(tl.bfloat16)
                total = tl.dot(y, _side_by_side(a, b, c, e, TILE, 4 * F), total)
    else:
        squares = tl.zeros([F, F], tl.float32)
        linear = tl.zeros([TILE, F], tl.float32)
        of_squares = i[:, None] * F + i[None, :]
        for step in range(num_chunks):
            chunk = num_chunks - 1 - step if AFTER else step
            tl.store(out + tl.cast(chunk, tl.int64) * ((f // 4 + 1) * d * 4 * F), total.to(tl.bfloat16), mask=inside)
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
                a, b, none = weighted.to(tl.bfloat16), one.to(tl.bfloat16), tl.zeros([TILE, F], tl.bfloat16)
                total = tl.dot(y, _side_by_side(a, b, none, none, TILE, 4 * F), total)
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
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Stores dq, 1/b and δ of TILE queries."""
    tiles = tl.cdiv(num_tokens, TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) % tiles * TILE
    chunk = start // CHUNK
    token = start + tl.arange(0, TILE)
    i, column, padded = tl.arange(0, F), tl.arange(0, D), tl.arange(0, WIDTH)
    there = (token < num_tokens)[:, None]
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    y_ptr += batch * y_batch + head * y_head
    dy_ptr += batch * dy_batch + head * dy_head
    feature, value = (padded < f)[None, :], (column < d)[None, :]
    q = tl.load(q_ptr + token[:, None] * q_token + padded[None, :], mask=there & feature, other=0.0)
    dy = tl.load(dy_ptr + token[:, None] * dy_token + column[None, :], mask=there & value, other=0.0)
    y = tl.load(y_ptr + token[:, None] * y_token + column[None, :], mask=there & value, other=0.0)
    delta = -tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    near = tl.zeros([TILE, WIDTH], tl.float32)
    denominator = tl.zeros([TILE], tl.float32)
    for first in range(chunk * CHUNK, start + TILE, TILE):
        key = first + tl.arange(0, TILE)
        present = (key < num_tokens)[:, None]
        k = tl.load(k_ptr + key[:, None] * k_token + padded[None, :], mask=present & feature, other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_token + column[None, :], mask=present & value, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = token[:, None] >= key[None, :]
        denominator += tl.sum(tl.where(seen, 1 + s + s * s * 0.5, 0.0), 1)
        ds = tl.where(seen, (1 + s) * (tl.dot(dy, tl.trans(v)) + delta[:, None]), 0.0)
        near = tl.dot(ds.to(tl.bfloat16), k, near)
    dq = tl.sum(tl.reshape(near, (TILE, WIDTH // F, F)), 1)  # columns from f on are zeros
    if chunk > 0:
        sums = sums_ptr + (pair * num_chunks + chunk) * ((f // 4 + 1) * d * 4 * F)
        ones = ones_ptr + (pair * num_chunks + chunk) * ((F + 1) * F)
        four, wide = tl.arange(0, 4), tl.arange(0, 4 * F)
        at = sums + column[:, None] * (4 * F) + wide[None, :]
        inside = (column < d)[:, None]
        far = tl.reshape(tl.dot(dy, tl.load(at + f // 4 * d * 4 * F, mask=inside, other=0.0)), (TILE, 4, F))
        dq += tl.sum(tl.where((four == 0)[None, :, None], far, 0.0), 1)
        for group in tl.static_range(f // 4):
            q_j = tl.load(q_ptr + token[:, None] * q_token + (group * 4 + four)[None, :], mask=there, other=0.0)
            far = tl.dot(dy, tl.load(at + group * d * 4 * F, mask=inside, other=0.0))
            dq += tl.sum(tl.reshape(far, (TILE, 4, F)) * (q_j.to(tl.float32) * scale)[:, :, None], 1)
        ones1 = tl.load(ones + F * F + i)[None, :]
        of_ones = tl.zeros([TILE, F], tl.float32)  # Σ_j q_j Σ k_j k
        for j in range(f):
            factor = tl.load(q_ptr + token * q_token + j, mask=token < num_tokens, other=0.0).to(tl.float32) * scale
            of_ones += factor[:, None] * tl.load(ones + j * F + i)[None, :]
        narrow = tl.load(q_ptr + token[:, None] * q_token + i[None, :], mask=there & (i < f)[None, :], other=0.0)
        denominator += chunk * CHUNK + scale * tl.sum(narrow.to(tl.float32) * (ones1 + 0.5 * of_ones), 1)
        dq += delta[:, None] * (ones1 + of_ones)
    inverse = 1 / (denominator + eps)
    dq *= (inverse * scale)[:, None]
    tl.store(dq_ptr + ((batch * num_tokens + token[:, None]) * heads + head) * f + i[None, :], dq.to(tl.bfloat16),
             mask=there & (i < f)[None, :])  # fmt: skip
    tl.store(inverse_ptr + pair * num_tokens + token, inverse, mask=token < num_tokens)
    tl.store(delta_ptr + pair * num_tokens + token, delta, mask=token < num_tokens)


@triton.jit
def _key_gradients(
    q_ptr, k_ptr, v_ptr, dy_ptr, sums_ptr, ones_ptr, inverse_ptr, delta_ptr, dk_ptr, dv_ptr,
    num_tokens, heads, num_chunks, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dy_batch, dy_token, dy_head,
    f: tl.constexpr, d: tl.constexpr, F: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Stores dk and dv of TILE keys."""
    tiles = tl.cdiv(num_tokens, TILE)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // heads, pair % heads
    start = tl.program_id(0) % tiles * TILE
    chunk = start // CHUNK
    token = start + tl.arange(0, TILE)
    i, column, padded = tl.arange(0, F), tl.arange(0, D), tl.arange(0, WIDTH)
    there = (token < num_tokens)[:, None]
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    dy_ptr += batch * dy_batch + head * dy_head
    feature, value = (padded < f)[None, :], (column < d)[None, :]
    k = tl.load(k_ptr + token[:, None] * k_token + padded[None, :], mask=there & feature, other=0.0)
    v = tl.load(v_ptr + token[:, None] * v_token + column[None, :], mask=there & value, other=0.0)
    near = tl.zeros([TILE, WIDTH], tl.float32)
    dv = tl.zeros([TILE, D], tl.float32)
    for first in range(start, tl.minimum(chunk * CHUNK + CHUNK, num_tokens), TILE):
        query = first + tl.arange(0, TILE)
        present = query < num_tokens
        q = tl.load(q_ptr + query[:, None] * q_token + padded[None, :], mask=present[:, None] & feature, other=0.0)
        dy = tl.load(dy_ptr + query[:, None] * dy_token + column[None, :], mask=present[:, None] & value, other=0.0)
        inverse = tl.load(inverse_ptr + pair * num_tokens + query, mask=present, other=0.0)
        delta = tl.load(delta_ptr + pair * num_tokens + query, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q)) * scale
        weight = tl.where(token[:, None] <= query[None, :], inverse[None, :], 0.0)
        dv = tl.dot(((1 + s + s * s * 0.5) * weight).to(tl.bfloat16), dy, dv)
        ds = (1 + s) * weight * (tl.dot(v, tl.trans(dy)) + delta[None, :])
        near = tl.dot(ds.to(tl.bfloat16), q, near)
    dk = tl.sum(tl.reshape(near, (TILE, WIDTH // F, F)), 1)  # columns from f on are zeros
    if chunk + 1 < num_chunks:
        sums = sums_ptr + (pair * num_chunks + chunk) * ((f // 4 + 1) * d * 4 * F)
        ones = ones_ptr + (pair * num_chunks + chunk) * ((F + 1) * F)
        four, wide = tl.arange(0, 4), tl.arange(0, 4 * F)
        at = sums + column[:, None] * (4 * F) + wide[None, :]
        inside = (column < d)[:, None]
        at_k = k_ptr + token[:, None] * k_token
        narrow = tl.load(at_k + i[None, :], mask=there & (i < f)[None, :], other=0.0).to(tl.float32)
        rest = tl.load(at + f // 4 * d * 4 * F, mask=inside, other=0.0)
        far = tl.reshape(tl.dot(v, rest), (TILE, 4, F))
        dk += tl.sum(tl.where((four == 0)[None, :, None], far, 0.0), 1) + tl.load(ones + F * F + i)[None, :]
        one = tl.where(there & (i == 0)[None, :], 1.0, 0.0).to(tl.bfloat16)
        none = tl.zeros([TILE, F], tl.bfloat16)
        phi = _side_by_side((narrow * scale).to(tl.bfloat16), one, none, none, TILE, 4 * F)
        dv = tl.dot(phi, tl.trans(rest), dv)
        half = narrow * (0.5 * scale)
        for group in tl.static_range(f // 4):
            several = tl.load(at + group * d * 4 * F, mask=inside, other=0.0)
            k_j = tl.load(at_k + (group * 4 + four)[None, :], mask=there, other=0.0).to(tl.float32) * scale
            ones2 = tl.load(ones + (group * 4 + four)[:, None] * F + i[None, :])
            far = tl.reshape(tl.dot(v, several), (TILE, 4, F)) + ones2[None, :, :]
            dk += tl.sum(far * k_j[:, :, None], 1)
            at_j = k_ptr + token * k_token + group * 4
            k_a = tl.load(at_j, mask=token < num_tokens, other=0.0).to(tl.float32)[:, None] * scale
            k_b = tl.load(at_j + 1, mask=token < num_tokens, other=0.0).to(tl.float32)[:, None] * scale
            k_c = tl.load(at_j + 2, mask=token < num_tokens, other=0.0).to(tl.float32)[:, None] * scale
            k_e = tl.load(at_j + 3, mask=token < num_tokens, other=0.0).to(tl.float32)[:, None] * scale
            a, b = (half * k_a).to(tl.bfloat16), (half * k_b).to(tl.bfloat16)
            c, e = (half * k_c).to(tl.bfloat16), (half * k_e).to(tl.bfloat16)
            dv = tl.dot(_side_by_side(a, b, c, e, TILE, 4 * F), tl.trans(several), dv)
    out = (batch * num_tokens + token[:, None]) * heads + head
    tl.store(dk_ptr + out * f + i[None, :], (dk * scale).to(tl.bfloat16), mask=there & (i < f)[None, :])
    tl.store(dv_ptr + out * d + column[None, :], dv.to(tl.bfloat16), mask=there & value)


def taylor_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k (B, T, H, f) and v (B, T, H, D) from those of y, all bfloat16; f and D multiples of 8."""
    q, k, v, y, dy = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, y, dy))
    b, t, h, f = q.shape
    d = v.shape[3]
    features = max(16, triton.next_power_of_2(f))
    sizes: dict[str, Any] = {
        "f": f, "d": d, "F": features, "D": max(_WIDTH, triton.next_power_of_2(d)), "CHUNK": _CHUNK, "TILE": _TILE,
    }  # fmt: skip
    num_chunks, pairs, groups = triton.cdiv(t, _CHUNK), b * h, f // 4 + 1
    sums = q.new_empty(pairs, num_chunks, groups, d, 4 * features)
    ones = q.new_empty(pairs, num_chunks, features + 1, features, dtype=torch.float32)
    inverse, delta = q.new_empty(2, pairs, t, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    scale = f**-0.5
    by_groups, by_tiles = (pairs * groups,), (pairs * triton.cdiv(t, _TILE),)
    of_q, of_k, of_v, of_y, of_dy = (x.stride()[:3] for x in (q, k, v, y, dy))
    options = {"num_warps": 4, "num_stages": 2}
    _sums[by_groups](
        k, v, inverse, delta, sums, ones, t, h, num_chunks, *of_k, *of_v, **sizes, AFTER=False, **options
    )  # fmt: skip
    _query_gradients[by_tiles](
        q, k, v, y, dy, sums, ones, dq, inverse, delta, t, h, num_chunks, scale, eps, *of_q, *of_k, *of_v, *of_y,
        *of_dy, **sizes, WIDTH=_WIDTH, **options,
    )  # fmt: skip
    _sums[by_groups](
        q, dy, inverse, delta, sums, ones, t, h, num_chunks, *of_q, *of_dy, **sizes, AFTER=True, **options
    )  # fmt: skip
    _key_gradients[by_tiles](
        q, k, v, dy, sums, ones, inverse, delta, dk, dv, t, h, num_chunks, scale, *of_q, *of_k, *of_v, *of_dy,
        **sizes, WIDTH=_WIDTH, **options,
    )  # fmt: skip
    return dq, dk, dv
