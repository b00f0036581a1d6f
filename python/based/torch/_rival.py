"""A transformer in plain PyTorch, which BASED's speed is compared with on a GPU. Random weights.

Multi-head attention in every layer by scaled_dot_product_attention over a KV cache, rotary embedding of whole heads,
RMSNorm, a SwiGLU MLP. A step is recorded as one CUDA graph, greedy sampling included.
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-5
_cuda: Any = torch.cuda


class Weights:
    """Fresh random matrices, each with memory of its own."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.options: dict[str, Any] = {"device": device, "dtype": dtype}

    def matrix(self, rows: int, columns: int) -> Tensor:
        """With rows of about norm 1."""
        return torch.randn(rows, columns, **self.options).mul_(columns**-0.5)

    def normal(self, *shape: int) -> Tensor:
        """From N(0, 1)."""
        return torch.randn(shape, **self.options)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (…, head_dim), halves paired."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin (…, 1, head_dim / 2) for heads of x at `positions`."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angle = (positions[..., None] * 10000.0**-exponents)[..., None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Swiglu:
    """A gated MLP."""

    def __init__(self, new: Weights, d: int, inner: int) -> None:
        self.norm, self.fc1, self.fc2 = new.normal(d), new.matrix(2 * inner, d), new.matrix(d, inner)

    def __call__(self, r: Tensor) -> Tensor:
        """R + mlp(norm(r))."""
        value, gate = F.linear(F.rms_norm(r, r.shape[-1:], self.norm, EPS), self.fc1).chunk(2, -1)
        return r + F.linear(value * F.silu(gate), self.fc2)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a transformer. The default is that of 1.3 billion parameters whose heads suit the kernels."""

    width: int = 1680
    layers: int = 36
    heads: int = 21
    inner: int = 4480
    vocabulary: int = 50264

    @property
    def head_dim(self) -> int:
        """Size of q, k and v per head."""
        return self.width // self.heads

    @property
    def cached_dim(self) -> int:
        """Of a head in the cache: a multiple of 8. Of any other size PyTorch would copy the cache in every step."""
        return -(-self.head_dim // 8) * 8

    def cache_nbytes(self, num_tokens: int) -> int:
        """Of a sequence's keys and values in 16 bits."""
        return 2 * self.layers * num_tokens * self.heads * self.cached_dim * 2


class Transformer:
    """Multi-head attention in every layer."""

    def __init__(self, new: Weights, shape: Shape | None = None) -> None:
        self.new, self.shape = new, shape or Shape()
        d = self.shape.width
        self.embedding, self.final_norm = new.matrix(self.shape.vocabulary, d), new.normal(d)
        self.layers = [
            (new.normal(d), new.matrix(3 * d, d), new.matrix(d, d), Swiglu(new, d, self.shape.inner))
            for _ in range(self.shape.layers)
        ]

    def cache_nbytes(self, batch: int, context: int) -> int:
        """Of all sequences."""
        return batch * self.shape.cache_nbytes(context)

    def step(self, batch: int, context: int) -> Callable[[], Tensor]:
        """A function that makes the token number `context` of each sequence, and attends to all of them."""
        caches = self._caches(batch, context)
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.new.options["device"])
        position = torch.full((1,), context - 1, dtype=torch.long, device=self.new.options["device"])

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = caches[i]
            keys.index_copy_(1, position, self._padded(k))
            values.index_copy_(1, position, self._padded(v))
            return self._attention(q, keys, values, False)

        def once() -> Tensor:
            tokens.copy_(self._next(tokens, position, attend))
            return tokens

        return once

    def prefill(self, batch: int, length: int) -> Callable[[], Tensor]:
        """A function that feeds a prompt to each sequence and makes its first token."""
        device = self.new.options["device"]
        tokens = torch.randint(self.shape.vocabulary, (batch, length), device=device)
        positions = torch.arange(length, device=device)
        caches = self._caches(batch, length)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = caches[i]
            keys.copy_(self._padded(k))
            values.copy_(self._padded(v))
            return self._attention(q, keys, values, True)

        return lambda: self._next(tokens, positions, attend)

    def _caches(self, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
        shape = (batch, context, self.shape.heads, self.shape.head_dim)
        return [(self._padded(self.new.normal(*shape)), self._padded(self.new.normal(*shape))) for _ in self.layers]

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.shape.cached_dim - self.shape.head_dim))

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
        q, keys, values = (x.transpose(1, 2) for x in (self._padded(q), keys, values))
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=is_causal, scale=self.shape.head_dim**-0.5)
        return y[..., : self.shape.head_dim]

    def _next(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        r = F.embedding(tokens, self.embedding)
        turn = angles(positions, self.shape.head_dim, r.dtype)
        for i, (norm, qkv_weight, out_weight, mlp) in enumerate(self.layers):
            qkv = F.linear(F.rms_norm(r, r.shape[-1:], norm, EPS), qkv_weight)
            q, k, v = qkv.view(*qkv.shape[:2], 3, self.shape.heads, self.shape.head_dim).unbind(2)
            y = attend(i, rotate(q, *turn), rotate(k, *turn), v)
            r = mlp(r + F.linear(y.transpose(1, 2).flatten(2), out_weight))
        return F.linear(F.rms_norm(r[:, -1:], r.shape[-1:], self.final_norm, EPS), self.embedding).argmax(-1)


def median_seconds(run: Callable[[], object], budget: float) -> float:
    """Of at least 5 runs, and as many as `budget` seconds hold, up to 200."""

    def timed(count: int) -> list[float]:
        events = [_cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    first = statistics.median(timed(3))  # warm-up
    return statistics.median(timed(min(200, max(5, int(budget / first)))))


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as one CUDA graph."""
    stream = _cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose and allocate before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = _cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], object] = graph.replay
    return replay


def flash_attention_step(shape: Shape, batch: int, context: int) -> float | None:
    """Seconds of a step that makes the token number `context` of each sequence; None where memory is too small."""
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            transformer = Transformer(Weights("cuda", torch.bfloat16), shape)
            return median_seconds(recorded(transformer.step(batch, context)), 1.0)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
