"""Draws what `based bench` measured, beside a transformer of the same width and depth."""

import importlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _common

if TYPE_CHECKING:
    from based import ModelConfig

SUFFIXES = (".png", ".svg", ".pdf")
_CONTEXTS = tuple(2**i for i in range(5, 21))


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of decoding."""

    batch: int
    depth: int
    threads: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A model and its measurements."""

    name: str
    config: "ModelConfig"
    dtype: str
    points: list[Point]

    def lines(self) -> Iterable[tuple[str, list[Point]]]:
        """The points of each number of threads, with what the line is called."""
        counts = sorted({p.threads for p in self.points})
        for threads in counts:
            label = self.name if len(counts) == 1 else f"{self.name}, {threads} threads"
            yield label, [p for p in self.points if p.threads == threads]


@dataclass(frozen=True, slots=True)
class Rival:
    """One measurement of decoding by something else; context None: its speed does not depend on it."""

    name: str
    batch: int
    context: int | None
    tokens_per_second: float


def check(path: Path) -> None:
    """Raises what draw() would raise for want of matplotlib, of a format or of a directory."""
    from based import UnsupportedError

    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot: {path} is none of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: {path.parent} is not a directory")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise UnsupportedError('--plot needs matplotlib: pip install "based[plot]"') from error


def read_rivals(path: Path) -> list[Rival]:
    """The decoding figures of a file written by tests/bench/rivals.py. Raises OSError and FormatError."""
    from based import FormatError

    try:
        document = json.loads(path.read_text())
        return [
            Rival(str(d["rival"]), int(d["batch"]), d.get("context"), float(d["tokens_per_second"]))
            for d in document["decode"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: no figures of tests/bench/rivals.py: {error!r}") from error


def draw(path: Path, models: Sequence[Measured], rivals: Sequence[Rival]) -> None:
    """Three panels: tokens a second against batch, time per token against depth, bytes of state against context.

    All models have the same batches and depths. The last panel has the KV cache of a transformer of the first model's
    width and depth, too.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(15, 4.5), layout="constrained")  # needs no display
    speed, time, memory = figure.subplots(1, 3)
    points = [p for model in models for p in model.points]
    shallow, deepest, single = min(p.depth for p in points), max(p.depth for p in points), min(p.batch for p in points)

    for model in models:
        for label, line in model.lines():
            _line(speed, {p.batch: p.tokens_per_second for p in line if p.depth == shallow}, label)
            _line(time, {p.depth: 1e3 * single / p.tokens_per_second for p in line if p.batch == single}, label)
    for (rival, context), group in _groups(rivals, lambda r: (r.name, r.context)):
        label = rival if context is None else f"{rival}, context {context:,}"
        _line(speed, {r.batch: r.tokens_per_second for r in group}, label, style="s--")
    _axes(speed, f"decoding at depth {shallow:,}", "sequences", "tokens per second")

    for (rival, _), group in _groups([r for r in rivals if r.batch == single], lambda r: (r.name, r.context is None)):
        milliseconds = {r.context: 1e3 * r.batch / r.tokens_per_second for r in group}
        if None in milliseconds:  # the same at every depth
            milliseconds = dict.fromkeys((shallow, deepest), milliseconds[None])
        _line(time, {c: m for c, m in milliseconds.items() if c is not None}, rival, style="s--")
    _axes(time, f"decoding {single} sequence{'s' if single > 1 else ''}", "tokens seen before", "ms per token")
    time.set_xscale("symlog", linthresh=16)  # a depth may be 0
    time.set_yscale("linear")
    time.set_ylim(bottom=0)

    from based import sizes

    for model in models:
        nbytes = {n: sizes.state_nbytes(model.config, model.dtype, n) for n in _CONTEXTS}
        _line(memory, nbytes, f"{model.name}, state", style="-")
    first = models[0]
    cache = {n: sizes.kv_cache_nbytes(first.config, first.dtype, n) for n in _CONTEXTS}
    whose = "transformer" if len(models) == 1 else f"transformer like {first.name}"
    _line(memory, cache, f"{whose}, KV cache", style="--")
    _axes(memory, "memory of a sequence (computed)", "tokens seen", "")
    memory.yaxis.set_major_formatter(lambda nbytes, _: _common.nbytes(nbytes))
    figure.savefig(path, dpi=150)


def _groups(rivals: Iterable[Rival], key: Any) -> Iterable[tuple[Any, list[Rival]]]:
    def order(rival: Rival) -> tuple[Any, ...]:
        return tuple(-1 if part is None else part for part in key(rival))

    for _, group in itertools.groupby(sorted(rivals, key=order), order):
        members = list(group)
        yield key(members[0]), members


def _line(axes: Any, line: dict[int, float] | dict[int, int], label: str, style: str = "o-") -> None:
    axes.plot(*zip(*sorted(line.items()), strict=True), style, label=label)


def _axes(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
