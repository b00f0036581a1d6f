"""Measure prefill and decoding speed.

Every combination of -b, -d and -t is measured for every -p (prefill of a prompt) and every -n (decoding, one token at a
time); lists are separated by commas. --size makes a model of a named shape with seeded random weights, so that no
model file is needed. Decoding is the library's own generation loop, greedy sampling included. --plot draws the results
beside a transformer of the same width and depth. --claim compares BASED, a transformer and Mamba. See docs/cli.md.
`based bench serve` measures a server instead.
"""

import argparse
import csv
import io
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _claim, _common, _machine, _plot

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from based import _core

PARTS = {"serve": "based.cli._bench_serve"}
"""What stands behind the command's name, and the module that has it."""

_BUFFER_BYTES = 1 << 30  # many times any last-level cache
_CLAIM = ("1.3b", "attn-1b", "mamba-1b")
_UNTIMED_STEPS = 3  # of every run: a GPU runs the first step of a kind as it is and records it at the second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    from based.sizes import SIZES

    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", type=_common.text, metavar="PATH|ID", help=_common.MODEL_HELP)
    what.add_argument(
        "--size",
        type=_sizes,
        action="extend",
        metavar="SIZE,…",
        help=f"named shapes, with random weights: {', '.join(SIZES)}",
    )
    what.add_argument(
        "--claim",
        nargs="?",
        type=_sizes,
        action="extend",
        const=_CLAIM,
        metavar="SIZE,…",
        help=f"compare how fast these sizes generate (default: {','.join(_CLAIM)}; 128 sequences, prompts of 1024 "
        "tokens, 1024 generated; on a GPU FlashAttention-2 in PyTorch too)",
    )
    parser.add_argument("--revision", type=_common.text, metavar="REV", help=_common.REVISION_HELP)
    for flag, name, default, text in (
        ("-p", "--prompt", "512", "tokens of a prompt to prefill; 0: none"),
        ("-n", "--generate", "128", "tokens to generate; 0: none"),
        ("-b", "--batch", "1", "sequences at once"),
        ("-d", "--depth", "0", "tokens that each sequence has seen before"),
    ):
        least = 1 if flag == "-b" else 0
        parser.add_argument(
            flag, name, type=_integers(least), action="extend", metavar="N,…", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "-t",
        "--threads",
        type=_integers(1, _common.MOST_THREADS),
        action="extend",
        metavar="N,…",
        help="CPU threads (default: all usable)",
    )
    parser.add_argument(
        "-r", "--repetitions", type=_common.positive, default=5, metavar="N", help="of each test (default: 5)"
    )
    parser.add_argument("--device", type=_common.text, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: the model's, bfloat16 with --size)",
    )
    _common.add_context_argument(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights and tokens (default: 0)")
    parser.add_argument("--no-warmup", action="store_true", help="do not run each test once before measuring it")
    parser.add_argument("--no-bandwidth", action="store_true", help="do not measure the memory's bandwidth")
    parser.add_argument(
        "-o", "--output", default="md", choices=tuple(_WRITERS), help="format of the results (default: md)"
    )
    parser.add_argument(
        "--plot",
        type=_common.path,
        metavar="FILE",
        help=f"draw the results into a file ({', '.join(_plot.SUFFIXES)}); needs matplotlib",
    )
    parser.add_argument(
        "--rivals", type=_common.path, metavar="FILE", help="figures of tests/bench/rivals.py to draw beside (JSON)"
    )
    _common.add_statistics_argument(parser)


def _integers(least: int, most: int | None = None) -> Callable[[str], list[int]]:
    def parse(text: str) -> list[int]:
        values = [int(word) for word in text.split(",")]
        if min(values) < least:
            raise argparse.ArgumentTypeError(f"{min(values)} is not ≥ {least}")
        if most is not None and max(values) > most:
            raise argparse.ArgumentTypeError(f"{max(values)} is outside its domain, expected {least} … {most}")
        return values

    parse.__name__ = "list of integers"  # in argparse's message
    return parse


@dataclass(slots=True)
class Result:
    """One test: its figures are means over the repetitions, with sample standard deviations."""

    test: str  # "pp512": prefill of 512 tokens, "tg128": generation of 128
    batch: int
    depth: int
    threads: int
    repetitions: int
    tokens_per_second: float
    tokens_per_second_sd: float
    gbytes_per_second: float | None = None  # decoding: bytes that a step must move, over its time
    gbytes_per_second_sd: float | None = None
    memory_bandwidth: float | None = None  # GB/s, measured
    bandwidth_share: float | None = None
    tflops: float | None = None  # prefill: operations of its matrix products, over its time
    tflops_sd: float | None = None
    seconds: list[float] = field(default_factory=list)  # per repetition


def _sizes(text: str) -> list[str]:
    from based.sizes import named_config

    names = text.split(",")
    for name in names:
        try:
            named_config(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _set_defaults(args: argparse.Namespace) -> None:
    """Those that depend on what is measured."""
    defaults = {"prompt": 512, "generate": 128, "batch": 1, "depth": 0}
    if args.claim is not None:
        defaults |= {"prompt": 1024, "generate": 1024, "batch": 128}
        for name in ("depth", "rivals", "no_warmup", "no_bandwidth"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect with --claim: leave it out")
        if args.output not in ("md", "json"):
            raise UsageError(f"--output {args.output}: --claim writes md or json")
    args.threads = args.threads or [None]
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, [default])


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    _set_defaults(args)
    if args.claim is not None:
        _claim.run(args)
        return
    if not any(args.prompt + args.generate):
        raise UsageError("nothing to measure: -p and -n are 0")
    if args.rivals is not None and args.plot is None:
        raise UsageError("--rivals is drawn by --plot: give both")
    if args.plot is not None:
        _plot.check(args.plot)  # before an hour is spent
        if not any(args.generate):
            raise UsageError("nothing to plot: -n is 0")
    names = args.size or [args.model]
    if args.output == "json" and len(names) > 1:
        raise UsageError(f"--output json is of one model, --size lists {len(names)}: expected jsonl, csv or md")
    rivals = _plot.read_rivals(args.rivals) if args.rivals is not None else []
    lines = [_measure(args, name) for name in names]
    if args.plot is not None:
        _plot.draw(args.plot, lines, rivals)


def _measure(args: argparse.Namespace, name: str) -> "_plot.Measured":
    """One model: shows all results, and returns those that a figure has."""
    show = _common.wants_statistics(args)
    writer: Writer | None = None
    results: list[Result] = []
    for threads in args.threads:
        start = time.perf_counter()
        model = _make_model(args, name, threads)
        load_seconds = None if args.model is None else time.perf_counter() - start
        bandwidth = None if args.no_bandwidth else memory_bandwidth(model)
        writer = writer or _WRITERS[args.output](_header(model, name, load_seconds, bandwidth))
        bench = Bench(model, args.seed, args.repetitions, not args.no_warmup, bandwidth)
        tests = [(bench.prefill, n) for n in args.prompt if n] + [(bench.decode, n) for n in args.generate if n]
        for batch, depth in itertools.product(args.batch, args.depth):
            session = bench.session(batch, depth)
            for measure, count in tests:
                if show:
                    print(f"{measure.__name__} of {count}, batch {batch}, depth {depth} …", file=sys.stderr)
                results.append(measure(session, depth, count))
                writer.add(results[-1])
            del session  # its memory, before the next one's
    if writer is not None:
        writer.end()
    points = [_plot.Point(r.batch, r.depth, r.threads, r.tokens_per_second) for r in results if r.test.startswith("tg")]
    return _plot.Measured(name, model.config, model.dtype, points)


def _make_model(args: argparse.Namespace, name: str, threads: int | None) -> "_core.Model":
    from based import Model, load
    from based.sizes import named_config

    options: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "num_threads": threads,
        "max_context": args.max_context,
    }
    if args.size is None:
        return load(name, revision=args.revision, **options)._core
    if args.dtype == "auto":
        options["dtype"] = "bfloat16"
    return Model.random(named_config(name), args.seed, **options)._core


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """How fast memory is: a step is compared with it."""

    kind: str  # "read" or "copy" (bytes read and written)
    measure: Callable[[], float]  # GB/s


def memory_bandwidth(model: "_core.Model") -> Bandwidth | None:
    """Reading by the model's threads, or copying on its GPU; None, with a note on stderr, where no torch can copy."""
    from based import _core

    if model.device == "cpu":
        return Bandwidth("read", lambda: _core.measure_read_bandwidth(model.num_threads, _BUFFER_BYTES) / 1e9)
    torch = _machine.torch_with_cuda("bandwidth")
    if torch is None:
        return None
    measured = _copy_bandwidth(torch, model.device)
    return Bandwidth("copy", lambda: measured)


def _copy_bandwidth(torch: Any, device: str) -> float:
    with torch.cuda.device(device):
        source = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(24)]
        for event in events:
            target.copy_(source)
            event.record()
        torch.cuda.synchronize()
        milliseconds = [a.elapsed_time(b) for a, b in itertools.pairwise(events[3:])]
        del source, target
        torch.cuda.empty_cache()
    seconds: float = statistics.median(milliseconds) / 1e3
    return 2 * _BUFFER_BYTES / seconds / 1e9


class Bench:
    """Measures one model."""

    def __init__(
        self, model: "_core.Model", seed: int, repetitions: int, warm_up: bool, bandwidth: Bandwidth | None
    ) -> None:
        import numpy as np

        self.model = model
        self._random = np.random.default_rng(seed)
        self._repetitions = repetitions
        self._warm_up = warm_up
        self._bandwidth = bandwidth

    def session(self, batch: int, depth: int) -> "_core.Session":
        """A session whose sequences have seen `depth` tokens: one was fed them, the others are copies of it."""
        from based import _core

        session = _core.Session(self.model, batch)
        if depth:
            session.prefill([self._tokens(depth)], [0])
            for sequence in range(1, batch):
                session.copy(0, sequence)
        return session

    def prefill(self, session: "_core.Session", depth: int, count: int) -> Result:
        """Feeds a prompt of `count` tokens to each sequence; the session is as before afterwards."""
        from based import _core

        batch = session.batch_size
        prompts = [self._tokens(count) for _ in range(batch)]
        before = session.checkpoint()

        def once() -> float:
            session.rollback(before)
            _core.synchronize(self.model.device)
            start = time.perf_counter()
            session.prefill(prompts)
            return time.perf_counter() - start

        if self._warm_up:
            once()
        seconds = [once() for _ in range(self._repetitions)]
        session.rollback(before)
        result = self._result(f"pp{count}", session, depth, [count * batch / s for s in seconds], seconds)
        operations = prefill_operations(self.model.config, count) * batch
        result.tflops, result.tflops_sd = _mean_sd([operations / s / 1e12 for s in seconds])
        return result

    def decode(self, session: "_core.Session", depth: int, count: int) -> Result:
        """Generates `count` tokens on each sequence; the session is as before afterwards."""
        batch = session.batch_size
        before = session.checkpoint()
        first = depth + 1 + _UNTIMED_STEPS
        moved = sum(step_nbytes(self.model, batch, first + i) for i in range(1, count + 1)) / count

        def once(count: int) -> float:
            session.rollback(before)
            generator = self._generator(session, count)
            for _ in range(1 + _UNTIMED_STEPS):  # the first one feeds the token that starts it
                generator.next()
            # From the end of one step to the end of another, however far ahead of its tokens the device runs.
            start = time.perf_counter()
            for _ in range(count):
                generator.next()
            return time.perf_counter() - start

        if self._warm_up:
            once(min(count, 16))
        bandwidths = [self._measure_bandwidth()]
        seconds = []
        for _ in range(self._repetitions):
            seconds.append(once(count))
            bandwidths.append(self._measure_bandwidth())
        session.rollback(before)
        result = self._result(f"tg{count}", session, depth, [count * batch / s for s in seconds], seconds)
        speeds = [moved * count / s / 1e9 for s in seconds]
        result.gbytes_per_second, result.gbytes_per_second_sd = _mean_sd(speeds)
        if self._bandwidth:
            # Of each repetition: the bandwidth before and after it, for it drifts where machines are shared.
            around = [(a + b) / 2 for a, b in itertools.pairwise(bandwidths)]
            result.memory_bandwidth = statistics.mean(around)
            result.bandwidth_share = statistics.mean(s / b for s, b in zip(speeds, around, strict=True))
        return result

    def _generator(self, session: "_core.Session", count: int) -> "_core.Generator":
        from based import _core

        # One token more than those that are not timed and the `count` that are: the end of a request costs a step.
        params = _core.SamplingParams(max_tokens=count + _UNTIMED_STEPS + 2, temperature=0, ignore_eos=True)
        prompts = [self._tokens(1) for _ in range(session.batch_size)]
        return _core.Generator(session, prompts, [params] * session.batch_size)

    def _tokens(self, count: int) -> "npt.NDArray[np.int64]":
        return self._random.integers(self.model.config.vocab_size, size=count)

    def _measure_bandwidth(self) -> float:
        return math.nan if self._bandwidth is None else self._bandwidth.measure()

    def _result(
        self, test: str, session: "_core.Session", depth: int, speeds: Sequence[float], seconds: list[float]
    ) -> Result:
        mean, sd = _mean_sd(speeds)
        return Result(test, session.batch_size, depth, self.model.num_threads, len(seconds), mean, sd, seconds=seconds)


def step_nbytes(model: "_core.Model", batch: int, num_tokens: int) -> float:
    """Bytes that a decode step moves, on average; `num_tokens`: of each sequence, after it.

    Weights are read once. State is read, and what changes of it written: see sizes.mixer_step_nbytes.
    """
    from based import sizes

    config = model.config
    weights = model.weight_nbytes
    if not config.tie_embeddings:  # a lookup reads a row of it
        weights -= config.padded_vocab_size * config.hidden_size * sizes.ITEM_SIZE[model.dtype]
    on_gpu = model.device != "cpu"
    state = sum(sizes.mixer_step_nbytes(mixer, model.dtype, num_tokens, on_gpu=on_gpu) for mixer in config.layers)
    return weights + batch * state


def prefill_operations(config: "_core.ModelConfig", num_tokens: int) -> int:
    """Operations of a prompt's matrix products, a multiplication and an addition each; the head once, at its end."""
    from based import sizes

    layers = sum(rows * columns for rows, columns in sizes.gemm_shapes(config))
    return 2 * (num_tokens * layers + config.padded_vocab_size * config.hidden_size)


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _header(model: "_core.Model", name: str, load_seconds: float | None, bandwidth: Bandwidth | None) -> dict[str, Any]:
    """What all results of one run have in common."""
    from based import build_info, sizes

    return {
        "version": build_info()["version"],
        "commit": _machine.commit(),
        "compiler": build_info()["compiler"],
        "cpu": _machine.cpu_name(),
        "device": model.device,
        "kernel_isa": model.kernel_isa,
        "model": name,
        "num_parameters": model.num_parameters,
        "dtype": model.dtype,
        "weight_nbytes": model.weight_nbytes,
        "state_nbytes": model.state_nbytes if model.max_context is None else model.state_nbytes_at(0),
        "token_nbytes": sizes.token_nbytes(model.config, model.dtype),
        "load_seconds": load_seconds,
        "bandwidth_kind": None if bandwidth is None else bandwidth.kind,
    }


class Writer:
    """Shows results as they come, or at the end; `header` holds for all of them."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header

    def add(self, result: Result) -> None:
        """Takes one result."""
        raise NotImplementedError

    def end(self) -> None:
        """No more come."""


class _Markdown(Writer):
    _COLUMNS = ("test", "batch", "depth", "threads", "tok/s", "GB/s", "of bandwidth", "TFLOP/s")

    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__(header)
        commit = f" ({header['commit']})" if header["commit"] else ""
        weights = f"{header['num_parameters'] / 1e6:,.1f} M parameters, {_common.nbytes(header['weight_nbytes'])}"
        print(
            f"based {header['version']}{commit}, {header['compiler']}; {header['cpu']}, {header['kernel_isa']}; "
            f"{header['model']}: {weights} {header['dtype']}, state {_common.nbytes(header['state_nbytes'])}"
            + (f" + {_common.nbytes(header['token_nbytes'])} per token" if header["token_nbytes"] else "")
            + (f", loaded in {header['load_seconds']:.2f} s" if header["load_seconds"] is not None else "")
            + (f"; bandwidth: {header['bandwidth_kind']}" if header["bandwidth_kind"] is not None else "")
            + "\n"
        )
        print("| " + " | ".join(self._COLUMNS) + " |")
        print("|:---|" + "---:|" * (len(self._COLUMNS) - 1), flush=True)

    def add(self, result: Result) -> None:
        share = ""
        if result.bandwidth_share is not None:
            share = f"{result.bandwidth_share:.0%} of {result.memory_bandwidth:.1f}"
        cells = [
            result.test,
            result.batch,
            result.depth,
            result.threads,
            _plus_minus(result.tokens_per_second, result.tokens_per_second_sd),
            _plus_minus(result.gbytes_per_second, result.gbytes_per_second_sd),
            share,
            _plus_minus(result.tflops, result.tflops_sd, 3),
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _plus_minus(mean: float | None, sd: float | None, digits: int = 1) -> str:
    return "" if mean is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


class _Csv(Writer):
    _names: list[str] | None = None

    def add(self, result: Result) -> None:
        row = self.header | asdict(result)
        row["seconds"] = " ".join(map(str, row["seconds"]))
        if self._names is None:
            self._names = list(row)
            print(_csv_line(self._names))
        print(_csv_line(row.values()), flush=True)


def _csv_line(values: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow("" if value is None else value for value in values)
    return line.getvalue()


class _JsonLines(Writer):
    def add(self, result: Result) -> None:
        print(_common.to_json(self.header | asdict(result)), flush=True)


class _Json(Writer):
    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__(header)
        self._results: list[dict[str, Any]] = []

    def add(self, result: Result) -> None:
        self._results.append(asdict(result))

    def end(self) -> None:
        print(_common.to_json(self.header | {"results": self._results}, indent=2))


_WRITERS: dict[str, Callable[[dict[str, Any]], Writer]] = {
    "md": _Markdown,
    "csv": _Csv,
    "json": _Json,
    "jsonl": _JsonLines,
}
