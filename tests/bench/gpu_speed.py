"""The figures that must hold on a GPU: BASED 1.3B, bfloat16, random weights, sampling included.

  decode   tokens per second by batch size, at depth 1,000, where windows are full
  prefill  tokens per millisecond of one prompt
  depth    time per token at depth 1,000,000 against 1,000, runs in turns
  load     a model directory in page cache into a fresh process, the start of CUDA included

The bars are those of one H200. Exit status 1 when one is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from based import Model, _core, build_info, sizes
from based.cli.bench import Bench, memory_bandwidth
from memory_and_load import write_model

BATCHES = {1: 750, 8: None, 32: None, 128: 45_000, 256: None, 1024: 90_000}  # tokens per second
PROMPTS = {8192: 170, 131_072: 170}  # tokens per millisecond
SHALLOW, DEEP = 1000, 1_000_000

LOAD = """
import json, sys, time
import based
times = []
for _ in range(2):
    start = time.perf_counter()
    model = based.load(sys.argv[1], device=sys.argv[2])
    model.score([1, 2])  # they are there
    times.append(time.perf_counter() - start)
    del model
print(json.dumps(times))
"""


class Figures:
    """Collects figures, each with its bar, and shows them at the end."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def add(
        self, what: str, figure: float, unit: str, *, least: float | None = None, most: float | None = None
    ) -> None:
        """`least` and `most`: what must hold; neither: a figure to know."""
        kept = None
        if least is not None or most is not None:
            kept = (least is None or figure >= least) and (most is None or figure <= most)
        self.records.append({"what": what, "figure": figure, "unit": unit, "least": least, "most": most, "kept": kept})
        print(f"… {what}: {figure:,.4g} {unit}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """The table."""
        for r in self.records:
            bar = "" if r["kept"] is None else f"≥ {r['least']:,g}" if r["least"] is not None else f"≤ {r['most']:,g}"
            verdict = {None: "", True: "PASS", False: "MISS"}[r["kept"]]
            print(f"{r['what']:44} {r['figure']:>16,.3f} {r['unit']:8} {bar:>12}  {verdict}".rstrip())


class Speed:
    """One model and what is measured on it."""

    def __init__(self, device: str, size: str, quick: int, deterministic: bool, figures: Figures) -> None:
        self._config = sizes.named_config(size)
        self._model = Model.random(self._config, device=device, dtype="bfloat16", deterministic=deterministic)
        self._core = self._model._core
        self._figures = figures
        self._bandwidth = memory_bandwidth(self._core)
        self._quick = quick

    def decode(self) -> None:
        """By batch size."""
        for batch, bar in BATCHES.items():
            bench = Bench(self._core, 0, 3, True, self._bandwidth)
            count = max(2, max(32, min(256, 16384 // batch)) // self._quick)
            result = bench.decode(bench.session(batch, SHALLOW), SHALLOW, count)
            speed = batch * count / statistics.median(result.seconds)
            self._figures.add(f"decode, batch {batch:,}", speed, "tok/s", least=bar)
            self._figures.add("    bytes moved", result.gbytes_per_second or 0.0, "GB/s")
            if result.bandwidth_share is not None:
                self._figures.add("    share of the memory's bandwidth", 100 * result.bandwidth_share, "%")

    def prefill(self) -> None:
        """By length."""
        for length, bar in PROMPTS.items():
            bench = Bench(self._core, 0, 3 if length > 100_000 else 7, True, None)
            result = bench.prefill(bench.session(1, 0), 0, length // self._quick)
            speed = length // self._quick / statistics.median(result.seconds) / 1e3
            self._figures.add(f"prefill, {length:,} tokens", speed, "tok/ms", least=bar)
            self._figures.add("    matrix products", result.tflops or 0.0, "TFLOP/s")

    def depth(self) -> None:
        """Two sessions in turns, so that whatever else the card does touches both."""
        bench = Bench(self._core, 0, 1, False, None)
        deep = DEEP // self._quick
        start = time.perf_counter()
        sessions = {depth: bench.session(1, depth) for depth in (deep, SHALLOW)}
        self._figures.add(f"prefill, {deep + SHALLOW:,} tokens", time.perf_counter() - start, "s")
        seconds: dict[int, list[float]] = {depth: [] for depth in sessions}
        count = max(2, 256 // self._quick)
        for round_ in range(-1, 9):  # one to warm up
            for depth in sorted(sessions, reverse=round_ % 2 == 1):
                result = bench.decode(sessions[depth], depth, count)
                if round_ >= 0:
                    seconds[depth].append(result.seconds[0] / count)
        for depth in sorted(seconds):
            self._figures.add(f"time per token at depth {depth:,}", 1e3 * statistics.median(seconds[depth]), "ms")
        pairs = zip(seconds[deep], seconds[SHALLOW], strict=True)
        ratio = statistics.median(d / s for d, s in pairs)
        self._figures.add("time per token, deep over shallow", ratio, "", most=1.02)

    def memory(self) -> None:
        """Of a sequence, and of a session of 128."""
        self._figures.add("state of a sequence", self._model.state_nbytes / 1e6, "MB", most=15)
        session = self._model.session(128)
        session.prefill([np.arange(8) + i for i in range(128)])
        use = self._model.memory
        for name in ("weights", "states", "workspace"):
            self._figures.add(f"    {name}, 128 sequences", getattr(use, name) / 1e6, "MB")


def measure_load(device: str, size: str, directory: Path | None, figures: Figures) -> None:
    """In fresh processes."""
    with tempfile.TemporaryDirectory(dir=directory) as path:
        write_model(sizes.named_config(size), Path(path))
        command = [sys.executable, "-c", LOAD, path, device]
        runs = []
        for _ in range(3):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"loading failed:\n{done.stderr}")
            runs.append(json.loads(done.stdout))
    first, second = (statistics.median(run[i] for run in runs) for i in (0, 1))
    figures.add("load from page cache, CUDA's start included", first, "s", most=2.5)
    figures.add("    once more in the same process", second, "s")


def main() -> None:
    """Measures and prints the table."""
    names = ("decode", "prefill", "depth", "memory", "load")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,…", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--device", default="cuda", help="such as cuda:1 (default: cuda)")
    parser.add_argument("--size", default="1.3b", choices=sizes.SIZES, help="the bars are those of 1.3b")
    parser.add_argument("--quick", type=int, default=1, metavar="N", help="steps and prompts an Nth as long")
    parser.add_argument(
        "--deterministic", action="store_true", help="based.load(deterministic=True); the bars are not of it"
    )
    parser.add_argument("--directory", type=Path, help="where the model to load is written (default: for temporaries)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    if args.quick < 1:
        parser.error("--quick must be ≥ 1")

    figures = Figures()
    speed: Speed | None = None
    start = time.perf_counter()
    if chosen != ["load"]:
        speed = Speed(args.device, args.size, args.quick, args.deterministic, figures)
        tests: dict[str, Callable[[], None]] = {
            "decode": speed.decode,
            "prefill": speed.prefill,
            "depth": speed.depth,
            "memory": speed.memory,
        }
        for name in chosen:
            if name in tests:
                tests[name]()
        del speed, tests
    if "load" in chosen:
        measure_load(args.device, args.size, args.directory, figures)
    missed = [r["what"] for r in figures.records if r["kept"] is False]

    card = next((d.name for d in _core.devices() if d.device != "cpu"), "no GPU")
    facts = {"card": card, "device": args.device, "size": args.size, "quick": args.quick}
    facts |= {"deterministic": args.deterministic} | build_info()
    how = "bfloat16, deterministic" if args.deterministic else "bfloat16"
    print(f"\n{args.size}, {how}, {card}; measured in {time.perf_counter() - start:.0f} s")
    figures.show()
    if args.json is not None:
        args.json.write_text(json.dumps(facts | {"figures": figures.records, "missed": missed}, indent=2) + "\n")
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
