"""What BASED is measured against on a GPU, in plain PyTorch: random bfloat16 weights, steps under one CUDA graph.

  upstream's arithmetic   BASED 1.3B as its authors decode it: 273 features unpacked, the state in bfloat16
  transformer             1.3B (width 1680, 36 layers, 21 heads of 80, SwiGLU, rotary) with a KV cache; attention by
                          scaled_dot_product_attention: FlashAttention-2, and once cuDNN's
  products                cuBLAS alone: the matrix products of a BASED 1.3B step, and of its prefill without the head

Greedy sampling included. Medians of CUDA events. `based bench --plot` draws the JSON file.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import Tensor
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"rivals.py needs PyTorch with CUDA: {error}")
from based import GatedConvConfig, LinearAttentionConfig, ModelConfig, sizes
from based.torch._rival import EPS, Swiglu, Transformer, Weights, angles, median_seconds, recorded, rotate


class Upstream:
    """BASED as its authors decode it: one state for each sequence, of a batch that stays as it is."""

    def __init__(self, new: Weights, config: ModelConfig) -> None:
        self.new, self.config = new, config
        d = config.hidden_size
        self.embedding, self.final_norm = new.matrix(config.padded_vocab_size, d), new.normal(d)
        self.norms = [new.normal(d) for _ in config.layers]
        shapes = iter(sizes.gemm_shapes(config))
        self.products = []  # of each layer's mixer, then the MLP's two
        self.mlps = []
        for _ in config.layers:
            self.products.append((new.matrix(*next(shapes)), new.matrix(*next(shapes))))
            self.mlps.append(Swiglu(new, d, config.mlp.inner_size))
            next(shapes), next(shapes)
        self.taps = [
            new.normal(m.kernel_size, m.inner_size) if isinstance(m, GatedConvConfig) else None for m in config.layers
        ]
        self.biases = [
            (new.normal(2 * m.inner_size), new.normal(d)) if isinstance(m, GatedConvConfig) else (None, None)
            for m in config.layers
        ]

    def step(self, batch: int) -> Callable[[], Tensor]:
        """A function that advances `batch` sequences by one token, windows full, and returns the tokens."""
        new, config = self.new, self.config
        tokens = torch.zeros(batch, dtype=torch.long, device=new.options["device"])
        position = torch.full((1,), 1000, dtype=torch.long, device=new.options["device"])
        states: list[tuple[Tensor, ...]] = []
        for m in config.layers:
            if isinstance(m, GatedConvConfig):
                states.append((new.normal(batch, m.kernel_size - 1, m.inner_size),))
            elif isinstance(m, LinearAttentionConfig):
                features = 1 + m.feature_dim + m.feature_dim**2
                kv, k = new.normal(batch, m.num_heads, m.head_dim, features), new.normal(batch, m.num_heads, features)
                states.append((kv, k.abs_()))
            else:
                ring = (batch, m.window, m.num_kv_heads, m.head_dim)
                states.append((new.normal(*ring), new.normal(*ring)))

        def once() -> Tensor:
            r = F.embedding(tokens, self.embedding)
            for i, m in enumerate(config.layers):
                x = F.rms_norm(r, r.shape[-1:], self.norms[i], EPS)
                u = F.linear(x, self.products[i][0], self.biases[i][0])
                if isinstance(m, GatedConvConfig):
                    y = self._conv(u, states[i][0], self.taps[i])
                elif isinstance(m, LinearAttentionConfig):
                    y = self._linear_attention(m, u, *states[i])
                else:
                    y = self._window(m, u, position, *states[i])
                r = self.mlps[i](r + F.linear(y, self.products[i][1], self.biases[i][1]))
            x = F.rms_norm(r, r.shape[-1:], self.final_norm, EPS)
            tokens.copy_(F.linear(x, self.embedding)[:, : config.vocab_size].argmax(-1))
            position.add_(1)
            return tokens

        return once

    @staticmethod
    def _conv(u: Tensor, state: Tensor, taps: Tensor | None) -> Tensor:
        u1, u2 = u.chunk(2, -1)
        inputs = torch.cat((state, u1[:, None]), 1)
        state.copy_(inputs[:, 1:])
        return F.silu((inputs * taps).sum(1)) * u2

    @staticmethod
    def _linear_attention(m: LinearAttentionConfig, u: Tensor, kv_state: Tensor, k_state: Tensor) -> Tensor:
        width = m.num_heads * m.feature_dim
        q, k = (taylor_features(x.unflatten(-1, (m.num_heads, -1))) for x in (u[:, :width], u[:, width : 2 * width]))
        v = u[:, 2 * width :].unflatten(-1, (m.num_heads, -1))
        kv_state += k[:, :, None] * v[..., None]
        k_state += k
        y = (q[:, :, None] * kv_state).sum(-1) / ((q * k_state).sum(-1, keepdim=True) + m.eps)
        return y.flatten(1)

    @staticmethod
    def _window(m: Any, u: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = u.unflatten(-1, (3, m.num_heads, m.head_dim)).unbind(1)
        turn = angles(position, m.head_dim, u.dtype)
        keys.index_copy_(1, position % m.window, rotate(k, *turn)[:, None])
        values.index_copy_(1, position % m.window, v[:, None])
        y = F.scaled_dot_product_attention(
            rotate(q, *turn)[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), scale=m.scale
        )
        return y.flatten(1)


def taylor_features(x: Tensor) -> Tensor:
    """[1, x / f^¼, x xᵀ / √(2f)]: every product, as the authors keep it."""
    f = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * f)
    return torch.cat((torch.ones_like(x[..., :1]), x / f**0.25, squares), -1)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Report:
    """Collects figures as they come and shows them."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.records: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": [], "products": []}

    def measure(
        self,
        kind: str,
        make: Callable[[], Callable[[], object]],
        tokens: int,
        nbytes: int = 0,
        *,
        graph: bool = True,
        attention: "SDPBackend | None" = None,
        **facts: Any,
    ) -> None:
        """Times what `make` makes; `tokens` are made or fed in a run. `nbytes`: memory that it needs."""
        what = ", ".join(f"{name} {value}" if name != "rival" else str(value) for name, value in facts.items())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if nbytes * 1.1 > free:
            print(f"{kind:9} {what}: left out, needs {nbytes / 1e9:.0f} GB of {free / 1e9:.0f} free", flush=True)
            return
        backend: AbstractContextManager[Any] = nullcontext() if attention is None else sdpa_kernel(attention)
        with torch.inference_mode(), backend:
            run = make()
            seconds = median_seconds(recorded(run) if graph else run, self._budget)
        record = facts | {"milliseconds": seconds * 1e3, "tokens_per_second": tokens / seconds}
        self.records[kind].append(record)
        print(f"{kind:9} {what:58} {seconds * 1e3:9.3f} ms {tokens / seconds:12,.0f} tok/s", flush=True)


def measure_based(report: Report, new: Weights, quick: bool) -> None:
    """cuBLAS on every matrix of the model, in order; then whole steps."""
    config = sizes.named_config("1.3b")
    upstream = Upstream(new, config)
    pairs = zip(upstream.products, upstream.mlps, strict=True)
    matrices = [w for products, mlp in pairs for w in (*products, mlp.fc1, mlp.fc2)]

    def products(rows: int, head: bool) -> Callable[[], None]:
        inputs = {k: new.normal(rows, k) for k in {w.shape[1] for w in matrices}}

        def run() -> None:
            for weight in [*matrices, upstream.embedding] if head else matrices:
                F.linear(inputs[weight.shape[1]], weight)

        return run

    for rows in (1, 128) if quick else (1, 8, 32, 128, 256, 512, 1024):
        report.measure("products", lambda rows=rows: products(rows, True), rows, rival="cuBLAS, a step", rows=rows)
    report.measure("products", lambda: products(8192, False), 8192, rival="cuBLAS, prefill", rows=8192)
    for batch in (1, 128) if quick else (1, 8, 32, 128, 256, 1024):
        report.measure(
            "decode",
            lambda batch=batch: upstream.step(batch),
            batch,
            batch * 22_000_000,  # the state, and temporaries of a layer's size
            rival="upstream's arithmetic",
            batch=batch,
            context=None,
        )


def measure_transformer(report: Report, new: Weights, quick: bool) -> None:
    """Steps at several contexts, and prompts."""
    transformer = Transformer(new)

    def decode(batch: int, context: int, attention: SDPBackend, name: str) -> None:
        report.measure(
            "decode",
            lambda: transformer.step(batch, context),
            batch,
            transformer.cache_nbytes(batch, context),
            attention=attention,
            rival=name,
            batch=batch,
            context=context,
        )

    for batch, context in decode_sizes(quick):
        decode(batch, context, SDPBackend.FLASH_ATTENTION, "transformer")
    decode(128, 1536, SDPBackend.CUDNN_ATTENTION, "transformer, cuDNN's attention")
    for batch, length in [(2, 4096)] if quick else [(2, 4096), (1, 16384)]:
        report.measure(
            "prefill",
            lambda batch=batch, length=length: transformer.prefill(batch, length),
            batch * length,
            transformer.cache_nbytes(batch, length),
            graph=False,  # its kernels are long
            attention=SDPBackend.FLASH_ATTENTION,
            rival="transformer",
            sequences=batch,
            length=length,
        )


def decode_sizes(quick: bool) -> Iterator[tuple[int, int]]:
    """(batch, context) of the transformer."""
    yield from itertools.product((1, 128), (1536,) if quick else (1024, 1536))
    if not quick:
        yield from ((1, 8192), (1, 65536))


def driver() -> str:
    """Of the card; "unknown" when nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main() -> None:
    """Measures, prints a table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("rivals.py needs PyTorch with CUDA: torch.cuda.is_available() is False")

    facts = {"card": torch.cuda.get_device_name(), "driver": driver()}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    report = Report(0.15 if args.quick else 0.5)
    new = Weights("cuda", torch.bfloat16)
    measure_based(report, new, args.quick)
    measure_transformer(report, new, args.quick)
    if args.json is not None:
        args.json.write_text(json.dumps(facts | report.records, indent=2) + "\n")


if __name__ == "__main__":
    main()
