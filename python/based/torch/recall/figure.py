"""Draws recall over bytes of state."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from based.torch.recall.families import FAMILIES
from based.torch.recall.frontier import Outcome

_MARKERS = "osD^vP*X"


def draw(path: Path, rows: Sequence[Outcome]) -> None:
    """A point per model, a line along the best of each family: what so many bytes recall, at most.

    Args:
        path: .png, .svg or .pdf.
        rows: What measure_frontier returns.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(7.5, 5), layout="constrained")  # needs no display
    axes = figure.subplots()
    widths = sorted({row.width for row in rows})
    for color, (name, family) in enumerate(FAMILIES.items()):
        known = [(row, row.accuracy) for row in rows if row.family == name and row.accuracy is not None]
        points = sorted((row.state_nbytes, accuracy, row.width) for row, accuracy in known)
        if not points:
            continue
        best = [max(accuracy for _, accuracy, _ in points[: i + 1]) for i in range(len(points))]
        axes.plot([x for x, _, _ in points], best, "-", color=f"C{color}", alpha=0.4)
        for width in widths:
            some = [(x, y) for x, y, w in points if w == width]
            if some:
                marker = _MARKERS[widths.index(width) % len(_MARKERS)]
                label = f"{family.label}, width {width}"
                axes.plot(*zip(*some, strict=True), marker, color=f"C{color}", label=label)
    axes.set(title="Multi-query associative recall", xlabel="state of a sequence, bytes", ylabel="accuracy")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
