"""Draws recall over bytes of state."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from based.torch.recall.families import FAMILIES
from based.torch.recall.frontier import Outcome

_MARKERS = "osD^vP*X"


def draw(path: Path, rows: Sequence[Outcome]) -> None:
    """A point per model, and steps along the best of each family: what so many bytes recall, at most.

    Feature sizes and windows stand on the points.

    Args:
        path: .png, .svg or .pdf.
        rows: What measure_frontier returns.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")
    ticker: Any = importlib.import_module("matplotlib.ticker")
    figure = figure_module.Figure(figsize=(7.5, 5), layout="constrained")  # needs no display
    axes = figure.subplots()
    widths = sorted({row.width for row in rows})
    for color, (name, family) in enumerate(FAMILIES.items()):
        known = [(row, row.accuracy) for row in rows if row.family == name and row.accuracy is not None]
        points = sorted((row.state_nbytes, accuracy, row.width, row.size) for row, accuracy in known)
        if not points:
            continue
        # Between two models nothing is known: the best so far holds until a larger state does better.
        best = [max(accuracy for _, accuracy, *_ in points[: i + 1]) for i in range(len(points))]
        axes.plot([x for x, *_ in points], best, "-", drawstyle="steps-post", color=f"C{color}", alpha=0.4)
        for width in widths:
            some = [(x, y) for x, y, w, _ in points if w == width]
            if some:
                marker = _MARKERS[widths.index(width) % len(_MARKERS)]
                label = f"{family.label}, width {width}"
                axes.plot(*zip(*some, strict=True), marker, color=f"C{color}", label=label)
        if len({size for *_, size in points}) > 1:
            for x, y, _, size in points:
                note = {"xytext": (3, -9), "textcoords": "offset points", "fontsize": "x-small", "color": f"C{color}"}
                axes.annotate(f"{size}", (x, y), **note)
    settings = len(rows[0].accuracies)
    axes.set(
        title=f"Multi-query associative recall, mean of {settings} settings",
        xlabel="state of a sequence (on the points: feature size of BASED, keys of a window)",
        ylabel="accuracy",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda nbytes, _: f"{nbytes / 1e3:g} kB" if nbytes < 1e6 else f"{nbytes / 1e6:g} MB")
    axes.set_ylim(-0.02, 1.05)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
