"""Training on a GPU against its bars: Taylor attention forward and backward, and whole steps.

  taylor   ops.taylor_linear_attention, bfloat16: errors against float64, times, memory; beside them
           flash-linear-attention's kernels where that package is installed
  360m     steps of BasedForCausalLM of the published 360M shape, 2,048 tokens a window, eager and with compiled layers;
           and `based train` itself, with and without training.deterministic
  bytes    the same for configs/based-bytes.yaml

Model FLOPs of a step, as in PaLM's MFU, nothing that is made twice: 6 for each weight of a matrix and token (the
embedding once, as the head; it is only read as the embedding), and 3 times those of the mixers forward, at 2 for each
multiplication with an addition: windows 2 D for each head and key that a query sees, Taylor attention 2 (D + 1) 153 for
each head and token (adding to the state, reading it; f = 16), convolutions K for each channel.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    sys.exit(f"training_speed.py needs PyTorch with CUDA: {error}")
from bars import Bars
from based import GatedConvConfig, LinearAttentionConfig, ModelConfig, SlidingWindowConfig, sizes
from based.torch import BasedForCausalLM, ops
from based.torch.train import Meter, read_config, train
from based.torch.train.config import model_config

PEAK = 989e12  # bfloat16 FLOP/s of an H100 or H200, dense
LENGTH = 2048
L2 = 64 << 20  # bytes, and more than any card here has
EPS = 1e-12


def milliseconds(run: Callable[[int], object], budget: float = 0.4, least: int = 10) -> float:
    """Median of at least `least` calls, after a warm-up; run(i) is to take other memory for the next i."""

    def timed(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for i, event in enumerate(events[1:]):
            run(i)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    first = statistics.median(timed(3))
    return statistics.median(timed(min(200, max(least, int(budget * 1e3 / first)))))


def relative(found: Tensor, exact: Tensor) -> float:
    """rel-L2."""
    return float((found.double() - exact).norm() / exact.norm())


# ---- Taylor attention ------------------------------------------------------------------------------------------------


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    p = (1 + s + s * s / 2).tril()
    return (p @ v / (p.sum(-1, keepdim=True) + EPS)).transpose(1, 2)


def random_inputs(b: int, t: int, h: int, d: int, f: int = 16) -> list[Tensor]:
    """q, k, v with gradients, dy."""
    made = [torch.randn(b, t, h, n, device="cuda", dtype=torch.bfloat16) for n in (f, f, d, d)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """y, dq, dk, dv."""
    *qkv, dy = inputs
    y = function(*qkv)
    return (y.detach(), *torch.autograd.grad(y, qkv, dy))


def taylor_errors(record: dict[str, Any]) -> None:
    """Of result and gradients, beside those of the definition in bfloat16."""
    for f, d, t in ((16, 64, 1000), (16, 112, 777), (8, 40, 300), (24, 64, 600), (32, 128, 300)):
        inputs = random_inputs(2, t, 4, d, f)
        doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        exact = with_gradients(quadratic, doubles)
        found, plain = with_gradients(ops.taylor_linear_attention, inputs), with_gradients(quadratic, inputs)
        errors = [(relative(a, c), relative(b, c)) for a, b, c in zip(found, plain, exact, strict=True)]
        again = with_gradients(ops.taylor_linear_attention, inputs)
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        text = ", ".join(f"{a:.1e} ({b:.1e})" for a, b in errors)
        print(f"errors of y, dq, dk, dv (plain bfloat16), f {f}, D {d}, T {t}: {text}; same bits: {same}", flush=True)
        record.setdefault("errors", []).append({"f": f, "D": d, "T": t, "ours_plain": errors, "same_bits": same})


def taylor_times(function: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> tuple[float, float, float]:
    """Milliseconds forward, and forward and backward; GB at the peak beyond inputs."""
    bytes_each = sum(x.nbytes for x in random_inputs(*shape))
    sets = [random_inputs(*shape) for _ in range(1 + -(-L2 // bytes_each))]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return function(*sets[i % len(sets)][:3])

    alone = milliseconds(forward)
    both = milliseconds(lambda i: with_gradients(function, sets[i % len(sets)]))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with_gradients(function, sets[0])
    torch.cuda.synchronize()
    return alone, both, (torch.cuda.max_memory_allocated() - before) / 1e9


def rivals() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """flash-linear-attention's, which scale and normalise as we do, but for their ε of 1e-6."""
    try:
        from fla.ops.based import fused_chunk_based, parallel_based
    except ImportError as error:
        print(f"flash-linear-attention is left out: {error}", flush=True)
        return
    yield "flash-linear-attention, parallel", parallel_based
    yield "flash-linear-attention, fused chunk", fused_chunk_based


def measure_taylor(bars: Bars, record: dict[str, Any]) -> None:
    """Both shapes."""
    taylor_errors(record)
    shapes = {(4, 8192, 16, 64): (7.4, 3.7), (8, 2048, 16, 64): (1.7, 0.85)}
    for shape, (bar, half) in shapes.items():
        name = " × ".join(map(str, shape))
        forward, both, memory = taylor_times(ops.taylor_linear_attention, shape)
        b, t, *rest = shape
        twice = taylor_times(ops.taylor_linear_attention, (b, 2 * t, *rest))[2]
        entry = {"shape": shape, "forward_ms": forward, "both_ms": both, "memory_GB": memory, "memory_2T_GB": twice}
        print(f"{name}: forward {forward:.3f} ms, peak {memory:.2f} GB, at 2 T {twice:.2f} GB", flush=True)
        bars.at_most(f"{name}: forward + backward", both, bar, "ms")
        bars.at_most("  half of that", both, half, "ms")
        bars.at_most("  memory at 2 T over that at T", twice / memory, 2.05)
        for rival, function in rivals():
            theirs = taylor_times(function, shape)
            print(f"  {rival}: forward {theirs[0]:.3f}, both {theirs[1]:.3f} ms, {theirs[2]:.2f} GB", flush=True)
            entry[rival] = theirs
        record.setdefault("times", []).append(entry)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _window_flops(mixer: SlidingWindowConfig, length: int) -> float:
    w = min(mixer.window, length)
    keys = w - w * (w - 1) / 2 / length  # the first w − 1 queries see fewer
    return 4 * keys * mixer.head_dim * mixer.num_heads


def _taylor_flops(mixer: LinearAttentionConfig, _length: int) -> float:
    f = mixer.feature_dim
    return 4 * (f + 1) * (f + 2) / 2 * (mixer.head_dim + 1) * mixer.num_heads


def _conv_flops(mixer: GatedConvConfig, _length: int) -> float:
    return 2 * mixer.kernel_size * mixer.inner_size


# Of a mixer's own operation, forward, per token.
MIXER_FLOPS: dict[type, Callable[[Any, int], float]] = {
    SlidingWindowConfig: _window_flops,
    LinearAttentionConfig: _taylor_flops,
    GatedConvConfig: _conv_flops,
}


def flops_per_token(config: ModelConfig, length: int) -> float:
    """See above."""
    model = BasedForCausalLM(config, device="meta")
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith("conv.weight"))
    return 6 * matrices + 3 * sum(MIXER_FLOPS[type(mixer)](mixer, length) for mixer in config.layers)


class Steps:
    """Whole steps of training, as `based train` takes them without training.deterministic."""

    def __init__(self, config: ModelConfig, windows: int, compiled: str) -> None:
        torch._dynamo.reset()
        self.model = BasedForCausalLM(config, device="cuda")
        if compiled == "layers":
            for layer in self.model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.tokens = torch.randint(config.vocab_size, (8, windows, LENGTH), device="cuda")

    def __call__(self, i: int) -> None:
        tokens = self.tokens[i % len(self.tokens)]
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(tokens, labels=tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure_steps(
    name: str, config: ModelConfig, windows: int, record: dict[str, Any], profiles: Path | None, modes: list[str]
) -> None:
    """Eager and compiled."""
    record[name] = []
    for compiled in modes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        steps = Steps(config, windows, compiled)
        steps(0)
        torch.cuda.synchronize()
        began = time.perf_counter() - start
        ms = milliseconds(steps, 2.0)
        rate = windows * LENGTH / ms * 1e3
        mfu = rate * flops_per_token(config, LENGTH) / PEAK
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(
            f"{name}, {windows} × {LENGTH}, {compiled:6}: {ms:.2f} ms a step, {rate:,.0f} tokens/s, MFU {mfu:.1%}, "
            f"{memory:.1f} GB; first step after {began:.1f} s",
            flush=True,
        )
        entry = {"windows": windows, "mode": compiled, "ms": ms, "tokens_per_second": rate, "mfu": mfu, "GB": memory}
        record[name].append(entry)
        if profiles is not None:
            write_profile(steps, profiles / f"profile-{name}-{compiled}.txt")
        del steps


def write_profile(steps: Steps, path: Path) -> None:
    """The kernels of two steps by their time."""
    count = 2
    with torch.profiler.profile() as profile:
        for i in range(count):
            steps(i)
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    lines = [f"{total / count / 1e3:.2f} ms a step in kernels"]
    for e in kernels[:60]:
        spent = e.self_device_time_total
        lines.append(f"{spent / count / 1e3:8.3f} ms {spent / total:6.1%} {e.count // count:5} × {e.key[:150]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


class Enough(Exception):  # noqa: N818
    """There are figures."""


class Rates(Meter):
    """Keeps the speeds that a run shows, and ends it after some of them."""

    def __init__(self, count: int) -> None:
        super().__init__(wanted=False)
        self.count, self.rates = count, list[float]()

    def show(self, step: int, steps: int, loss: float, rate: float, left: float) -> None:
        """Called after every 10 steps."""
        self.rates.append(rate)
        if len(self.rates) == self.count:
            raise Enough


def trainer_rate(name: str, vocabulary: int, windows: int, sets: list[str]) -> float:
    """Tokens/s of `based train` on random tokens: the median of 10 steps each, without the first."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, np.random.default_rng(0).integers(vocabulary - 1, size=1 << 23).astype(np.uint16))
        settings = [
            "data.tokenizer=none",
            f"data.train=[{{tokens: {tokens}}}]",
            "training.steps=1000",
            f"training.batch_size={windows}",
            f"training.micro_batch_size={windows}",
            "training.device=cuda",
            *sets,
        ]
        path = Path(__file__).parents[2] / "configs" / f"based-{name}.yaml"
        meter = Rates(6)
        with contextlib.suppress(Enough):
            train(read_config(path, settings, Path(folder) / "run"), meter=meter)
        return statistics.median(meter.rates[1:])


def measure_model(
    name: str, bars: Bars, windows: int, record: dict[str, Any], profiles: Path | None, modes: list[str]
) -> None:
    """Steps by themselves, then `based train`."""
    if name == "360m":
        config, sets = sizes.named_config("360m"), ["data.validation=[]"]
    else:
        path = Path(__file__).parents[2] / "configs" / "based-bytes.yaml"
        config = model_config(read_config(path).model, 264, 256)
        sets = ["model.vocab_size=264", "data.validation=[]"]
    flops = flops_per_token(config, LENGTH)
    print(f"{name}: {flops / 1e9:.3f} GFLOP a token", flush=True)
    measure_steps(name, config, windows, record, profiles, modes)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    for deterministic in ("false", "true"):
        rate = trainer_rate(name, config.vocab_size, windows, [*sets, f"training.deterministic={deterministic}"])
        ms, mode = windows * LENGTH / rate * 1e3, f"based train, deterministic {deterministic}"
        print(f"{name}, {windows} × {LENGTH}, {mode}: {ms:.2f} ms a step, {rate:,.0f} tokens/s", flush=True)
        record[name].append({"windows": windows, "mode": mode, "ms": ms, "tokens_per_second": rate})
        if name == "360m":
            bars.at_least("360m: model-FLOPs utilisation of `based train`", rate * flops / PEAK * 100, 40, "%")


def main() -> None:
    """Measures, prints a table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["taylor", "360m", "bytes"], help="may be given twice")
    parser.add_argument("--windows", type=int, default=16, help="of a step of the 360M shape (default 16)")
    parser.add_argument("--mode", action="append", choices=["eager", "layers"], help="of steps; both by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--profiles", type=Path, metavar="FOLDER", help="write the kernels' times there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("training_speed.py needs PyTorch with CUDA: torch.cuda.is_available() is False")
    record: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    bars = Bars()
    wanted = args.only or ["taylor", "360m", "bytes"]
    if "taylor" in wanted:
        measure_taylor(bars, record)
    for name, windows in (("360m", args.windows), ("bytes", 64)):
        if name in wanted:
            measure_model(name, bars, windows, record, args.profiles, args.mode or ["eager", "layers"])
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    bars.end()


if __name__ == "__main__":
    main()
