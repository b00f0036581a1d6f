"""`based bench --claim`: how fast models of one size generate, each in this runtime, and a transformer in PyTorch."""

import functools
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _common, _machine, _plot

if TYPE_CHECKING:
    import argparse

    from based import ModelConfig, _core

MOST_SEQUENCES = 2048  # of the search for the fastest batch
_FEW = 8  # tokens of a warm-up
LEAST_GAIN = 1.05  # of twice as many sequences, for the search to go on


@dataclass(frozen=True, slots=True)
class Generation:
    """One measurement: `batch` prompts, and tokens generated behind them."""

    model: str
    runtime: str
    batch: int
    num_parameters: int
    state_nbytes: int  # of a sequence, at its end
    prompt_tokens_per_second: float | None
    tokens_per_second: float  # of the generated tokens, all sequences together


def run(args: "argparse.Namespace") -> None:
    """Runs the command."""
    batch, prompt, count = (_one(args, name) for name in ("batch", "prompt", "generate"))
    if prompt < 1 or count < 2:
        raise UsageError("--claim: expected a prompt of at least 1 token and at least 2 generated tokens")
    if args.plot is not None:
        _plot.check(args.plot)
    results: list[Generation] = []
    device = "cpu"
    for name in args.claim:
        model = _model(name, args)
        device = model.device
        results.append(_noted(measure(model, name, batch, prompt, count, args.repetitions)))
        if device != "cpu":
            results += _fastest(functools.partial(_measure_once, model, name, prompt, count), results[-1])
        del model
        gc.collect()
    if device != "cpu":
        results += _in_pytorch(args.claim, batch, prompt, count)
    document = _header(device, prompt, count) | {"results": [asdict(result) for result in results]}
    if args.output == "json":
        print(_common.to_json(document, indent=2))
    else:
        print(table(document, results, batch))
    if args.plot is not None:
        draw(args.plot, document, results)


def _one(args: "argparse.Namespace", name: str) -> int:
    values: list[int] = getattr(args, name)
    if len(values) != 1:
        raise UsageError(f"--claim: --{name} lists {len(values)} numbers, expected one")
    return values[0]


def _noted(result: Generation) -> Generation:
    """Shows a result at once: a run that is stopped has not measured for nothing."""
    runtime = "" if result.runtime == "based" else f" by {result.runtime}"
    text = f"{result.model}{runtime}: {result.batch:,} sequences: {result.tokens_per_second:,.0f} generated tok/s"
    print(f"based: {text}", file=sys.stderr, flush=True)
    return result


def _model(name: str, args: "argparse.Namespace") -> "_core.Model":
    from based import Model
    from based.sizes import named_config

    dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    threads = args.threads[0]
    return Model.random(named_config(name), args.seed, device=args.device, dtype=dtype, num_threads=threads)._core


def measure(model: "_core.Model", name: str, batch: int, prompt: int, count: int, repetitions: int = 1) -> Generation:
    """Medians of `repetitions` runs, each on fresh sequences. Raises MemoryError where the batch does not fit."""
    import numpy as np

    from based import _core

    random = np.random.default_rng(0)
    prompts = [random.integers(model.config.vocab_size, size=prompt) for _ in range(batch)]
    params = [_core.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)] * batch
    session = _core.Session(model, batch)
    warm_up = _core.Generator(session, [ids[:_FEW] for ids in prompts], [_few(count)] * batch)
    _run(warm_up, min(count, _FEW))  # records what later runs replay
    del warm_up
    prompt_seconds, seconds = [], []
    for _ in range(repetitions):
        session.reset()
        _core.synchronize(model.device)
        begin = time.perf_counter()
        generator = _core.Generator(session, prompts, params)
        generator.next()
        first = time.perf_counter()
        _run(generator, count - 1)
        seconds.append(time.perf_counter() - first)
        prompt_seconds.append(first - begin)
    return Generation(
        model=name,
        runtime="based",
        batch=batch,
        num_parameters=model.num_parameters,
        state_nbytes=session.state_nbytes // batch,
        prompt_tokens_per_second=batch * prompt / statistics.median(prompt_seconds),
        tokens_per_second=batch * (count - 1) / statistics.median(seconds),
    )


def _measure_once(model: "_core.Model", name: str, prompt: int, count: int, batch: int) -> Generation:
    return measure(model, name, batch, prompt, count)


def _few(count: int) -> "_core.SamplingParams":
    from based import _core

    return _core.SamplingParams(max_tokens=min(count, _FEW), temperature=0, ignore_eos=True)


def _run(generator: "_core.Generator", count: int) -> None:
    for _ in range(count):
        events = generator.next()
        for event in events:
            if event.error:
                raise MemoryError(event.error)


def _fastest(measured: Callable[[int], Generation], first: Generation) -> list[Generation]:
    """The fastest of twice, four times … as many sequences, while they fit and each gains; none if `first` is."""
    best, batch = first, 2 * first.batch
    while batch <= MOST_SEQUENCES:
        try:
            found = _noted(measured(batch))
        except MemoryError:
            break
        gains = found.tokens_per_second >= LEAST_GAIN * best.tokens_per_second
        if found.tokens_per_second > best.tokens_per_second:
            best = found
        if not gains:
            break
        batch *= 2
    return [] if best is first else [best]


def _in_pytorch(names: Sequence[str], batch: int, prompt: int, count: int) -> list[Generation]:
    """The transformers of the list by PyTorch's FlashAttention-2, half-way through the generated tokens."""
    from based.sizes import named_config

    shapes = {name: shape for name in names if (shape := _transformer_shape(named_config(name))) is not None}
    if not shapes or _machine.torch_with_cuda("FlashAttention-2") is None:
        return []
    rival: Any = importlib.import_module("based.torch._rival")
    results = []
    for name, numbers in shapes.items():
        shape = rival.Shape(**numbers)

        def measured(batch: int, name: str = name, shape: Any = shape) -> Generation:
            seconds = rival.flash_attention_step(shape, batch, prompt + count // 2)
            if seconds is None:
                raise MemoryError(f"{name}: {batch} sequences do not fit")
            return Generation(
                model=name,
                runtime="PyTorch, FlashAttention-2",
                batch=batch,
                num_parameters=named_config(name).num_parameters,
                state_nbytes=shape.cache_nbytes(prompt + count),
                prompt_tokens_per_second=None,
                tokens_per_second=batch / seconds,
            )

        try:
            first = _noted(measured(batch))
        except MemoryError as error:
            print(f"based: {error}", file=sys.stderr, flush=True)
            continue
        results += [first, *_fastest(measured, first)]
    return results


def _transformer_shape(config: "ModelConfig") -> dict[str, int] | None:
    """The shape of a model of full attention in every layer, each head with keys of its own; else None."""
    kinds = {mixer.mixer for mixer in config.layers}
    first: Any = config.layers[0]
    if kinds != {"full_attention"} or first.num_kv_heads != first.num_heads or config.mlp is None:
        return None
    return {
        "width": config.hidden_size,
        "layers": len(config.layers),
        "heads": first.num_heads,
        "inner": config.mlp.inner_size,
        "vocabulary": config.padded_vocab_size,
    }


def _header(device: str, prompt: int, count: int) -> dict[str, Any]:
    from based import build_info, devices

    (name,) = (found.name for found in devices() if found.device == device)
    return {
        "version": build_info()["version"],
        "commit": _machine.commit(),
        "device": _machine.cpu_name() if device == "cpu" else name,
        "prompt": prompt,
        "generated": count,
    }


def table(document: dict[str, Any], results: Sequence[Generation], batch: int) -> str:
    """In Markdown. Ratios are to the transformers of the list, at their own best batch for the others'."""
    slowest: dict[str, float] = {}
    for result in results:
        if result.runtime != "based" or _is_transformer(result.model):
            key = f"{result.model}, {result.runtime}"
            slowest.setdefault(key, result.tokens_per_second)
    columns = ["model", "runtime", "sequences", "parameters", "state of a sequence", "prompt tok/s", "generated tok/s"]
    columns += [f"× {key}" for key in slowest]
    commit = f" ({document['commit']})" if document["commit"] else ""
    lines = [
        f"based {document['version']}{commit}, {document['device']}; "
        f"{document['generated']} tokens generated behind prompts of {document['prompt']}",
        "",
        "| " + " | ".join(columns) + " |",
        "|:---|:---|" + "---:|" * (len(columns) - 2),
    ]
    for r in sorted(results, key=lambda r: (r.batch != batch, -r.tokens_per_second)):
        cells = [
            r.model,
            r.runtime,
            f"{r.batch:,}",
            f"{r.num_parameters / 1e6:,.0f} M",
            _common.nbytes(r.state_nbytes),
            "" if r.prompt_tokens_per_second is None else f"{r.prompt_tokens_per_second:,.0f}",
            f"{r.tokens_per_second:,.0f}",
            *(f"{r.tokens_per_second / speed:.2f}" for speed in slowest.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_transformer(name: str) -> bool:
    from based.sizes import named_config

    return _transformer_shape(named_config(name)) is not None


def draw(path: Path, document: dict[str, Any], results: Sequence[Generation]) -> None:
    """Bars, the fastest first."""
    figure_module: Any = importlib.import_module("matplotlib.figure")
    ordered = sorted(results, key=lambda r: r.tokens_per_second)
    figure = figure_module.Figure(figsize=(8, 1.2 + 0.5 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    names = [f"{r.model}, {r.batch:,} sequences" + ("" if r.runtime == "based" else f"\n{r.runtime}") for r in ordered]
    bars = axes.barh(names, [r.tokens_per_second for r in ordered], color="0.6", edgecolor="black")
    for bar, result in zip(bars, ordered, strict=True):
        if result.runtime != "based":
            bar.set_hatch("//")
    axes.bar_label(bars, [f"{r.tokens_per_second:,.0f}" for r in ordered], padding=3)
    axes.margins(x=0.15)
    what = f"{document['generated']:,} tokens behind prompts of {document['prompt']:,}"
    axes.set(xlabel=f"generated tokens per second: {what}, {document['device']}")
    figure.savefig(path, dpi=150)
