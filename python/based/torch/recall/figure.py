"""Draws recall over bytes of state: a panel for each family, with BASED behind it."""

import importlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from based.torch.recall.families import FAMILIES
from based.torch.recall.frontier import Outcome
from based.torch.recall.published import Point, read_published

_REFERENCE = "based"
_COLUMNS = 3
_WIDTH = 4.1  # inches: 394 pixels of a browser's, a telephone's width; what is drawn need not shrink
_ROW = 1.25
_SMALL, _LARGE = 7.2, 8.5  # points
_OURS, _THEIRS = "#10365f", "#6f6f6f"
_BEHIND = "#b4b4b4"
_OPEN, _SHADED = "white", "#cfcfcf"
"""Fills of the older and of the newer published figure."""

# x, accuracy, width, size
Mark = tuple[float, float, int, int]


def draw(
    path: Path,
    rows: Sequence[Outcome],
    count: Literal["authors", "decoder"] = "authors",
    *,
    published: bool = False,
) -> None:
    """A panel per family: a mark per model, and steps along the best: what so many bytes recall, at most.

    The steps of BASED are behind those of every other family. Sizes stand on the marks where there is room; larger
    marks are wider models. Marks differ by their form and fill, lines by their dashes, so that no colour is needed.

    Args:
        path: .png, .svg or .pdf.
        rows: What measure_frontier returns.
        count: Whose bytes: as the authors count them, or what a decoder keeps.
        published: Whether to draw the authors' own numbers too, which are of the authors' texts, and count="authors".

    Raises:
        ImportError: matplotlib is missing.
        ValueError: published with other bytes.
    """
    figure = make_figure(rows, count, published=published)
    figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def make_figure(rows: Sequence[Outcome], count: Literal["authors", "decoder"], *, published: bool) -> Any:
    """What draw() saves."""
    if published and count != "authors":
        raise ValueError("published numbers have the authors' bytes alone: expected count='authors'")
    figure_module: Any = importlib.import_module("matplotlib.figure")
    points = read_published() if published else []
    ours = {name: _marks(rows, name, count) for name in FAMILIES}
    names = [name for name in FAMILIES if ours[name] or any(p.family == name for p in points)]
    others = [name for name in names if name != _REFERENCE]
    head = len(others) < len(names)
    strips = -(-len(others) // _COLUMNS)
    height = 0.95 + (2.1 if head else 0) + _ROW * strips
    figure = figure_module.Figure(figsize=(_WIDTH, height), layout="constrained")  # needs no display
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    grid = figure.add_gridspec(head + strips, _COLUMNS, height_ratios=[2.1] * head + [_ROW] * strips)
    first = figure.add_subplot(grid[0, :]) if head else None
    cells = [(row + head, column) for row in range(strips) for column in range(_COLUMNS)]
    panels = {} if first is None else {_REFERENCE: first}
    for name, (row, column) in zip(others, cells, strict=False):
        panels[name] = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
    reference = ours[_REFERENCE] or [(p.nbytes, p.accuracy, 0, 0) for p in points if p.family == _REFERENCE]
    everything = [x for marks in ours.values() for x, *_ in marks] + [p.nbytes for p in points]
    limits = min(everything) / 1.6, max(everything) * 1.6
    for name, panel in panels.items():
        _axes(panel, FAMILIES[name].label, limits, name == _REFERENCE)
        if name != _REFERENCE and reference:
            end = (limits[1], reference[-1][1], 0, 0)
            panel.plot(*_steps([*reference, end]), color=_BEHIND, linewidth=2.4, zorder=1)
        _theirs(panel, name, [p for p in points if p.family == name])
        _ours(panel, name, ours[name])
    bottom = {column: name for name, (_, column) in zip(others, cells, strict=False)}
    for name, (_, column) in zip(others, cells, strict=False):
        panels[name].tick_params(labelbottom=bottom[column] == name, labelleft=column == 0)
    bytes_of = "as the authors count them" if count == "authors" else "that a decoder keeps of the longest text"
    settings = len(rows[0].accuracies)
    figure.suptitle(f"Multi-query associative recall, mean of {settings} settings", fontsize=_LARGE)
    figure.supxlabel(f"bytes of state, {bytes_of}", fontsize=_LARGE)
    figure.supylabel("accuracy", fontsize=_LARGE)
    _legend(panels[names[0]], points, reference="BASED" if reference and others else None)
    figure.draw_without_rendering()
    for name, panel in panels.items():
        _sizes(figure, panel, ours[name], [p for p in points if p.family == name])
    return figure


def _marks(rows: Iterable[Outcome], family: str, count: str) -> list[Mark]:
    """Of a family's models that have an accuracy, by bytes."""
    return sorted(
        (row.authors_nbytes if count == "authors" else row.state_nbytes, row.accuracy, row.width, row.size)
        for row in rows
        if row.family == family and row.accuracy is not None
    )


def _steps(marks: Sequence[Mark]) -> tuple[list[float], list[float]]:
    """Between two models nothing is known: the best so far holds until a larger state does better."""
    best = list(itertools.accumulate((accuracy for _, accuracy, *_ in marks), max))
    x = [float(x) for x, *_ in marks]
    corners_x = [x[0], *(corner for right in x[1:] for corner in (right, right))]
    corners_y = [best[0], *(corner for pair in itertools.pairwise(best) for corner in pair)]
    return corners_x, corners_y


def _ours(panel: Any, name: str, marks: list[Mark]) -> None:
    if not marks:
        return
    family = FAMILIES[name]
    panel.plot(*_steps(marks), linestyle=family.line, color=_OURS, alpha=0.4, linewidth=1.3, zorder=2)
    widths = sorted({width for _, _, width, _ in marks})
    for x, accuracy, width, _ in marks:
        size = 3.2 + 1.1 * widths.index(width)
        style = {"marker": family.marker, "markersize": size, "color": _OURS, "linestyle": "", "zorder": 4}
        panel.plot([x], [accuracy], **style, clip_on=False)


def _theirs(panel: Any, name: str, points: list[Point]) -> None:
    for source, fill in zip(dict.fromkeys(p.source for p in read_published()), (_OPEN, _SHADED), strict=True):
        some = [(p.nbytes, p.accuracy) for p in points if p.source == source]
        if some:
            style = {"marker": FAMILIES[name].marker, "markersize": 4.2, "linestyle": "", "zorder": 3, "clip_on": False}
            colors = {"markerfacecolor": fill, "markeredgecolor": _THEIRS, "markeredgewidth": 0.8}
            panel.plot(*zip(*some, strict=True), **style, **colors)


def _axes(panel: Any, label: str, limits: tuple[float, float], is_first: bool) -> None:
    ticker: Any = importlib.import_module("matplotlib.ticker")
    panel.set_title(label, fontsize=_LARGE, loc="left", pad=2)
    panel.set_xscale("log")
    panel.set_xlim(*limits)
    panel.set_ylim(-0.03, 1.08)
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3) if is_first else (1,)))
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.xaxis.set_major_formatter(lambda nbytes, _: f"{nbytes / 1e3:g} k" if nbytes < 1e6 else f"{nbytes / 1e6:g} M")
    panel.yaxis.set_major_locator(ticker.FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    panel.yaxis.set_major_formatter(lambda accuracy, _: f"{accuracy:g}" if accuracy in (0, 0.5, 1) else "")
    panel.tick_params(labelsize=_SMALL, length=2, pad=2)
    panel.grid(visible=True, alpha=0.3, linewidth=0.5)


def _legend(panel: Any, points: Sequence[Point], *, reference: str | None) -> None:
    lines: Any = importlib.import_module("matplotlib.lines")
    mark = {"marker": "o", "linestyle": ""}
    entries = [lines.Line2D([], [], **mark, color=_OURS, markersize=4.3, label="ours; larger marks: wider")]
    for source, fill in zip(dict.fromkeys(p.source for p in points), (_OPEN, _SHADED), strict=False):
        colors = {"markerfacecolor": fill, "markeredgecolor": _THEIRS, "markeredgewidth": 0.8}
        entries.append(lines.Line2D([], [], **mark, **colors, markersize=4.2, label=source))
    if reference is not None:
        entries.append(lines.Line2D([], [], color=_BEHIND, linewidth=2.4, label=f"{reference}, behind the others"))
    panel.legend(handles=entries, loc="lower right", fontsize=_SMALL, borderpad=0.3, labelspacing=0.25)


def _sizes(figure: Any, panel: Any, marks: Sequence[Mark], theirs: Sequence[Point]) -> None:
    """Writes each mark's size beside it where that covers no mark and no other size; elsewhere not."""
    if len({size for *_, size in marks}) < 2:
        return
    transforms: Any = importlib.import_module("matplotlib.transforms")
    scale = figure.dpi / 72
    frame = panel.get_window_extent()
    spots = [panel.transData.transform((x, accuracy)) for x, accuracy, *_ in marks]
    every = [*spots, *(panel.transData.transform((p.nbytes, p.accuracy)) for p in theirs)]
    taken = [transforms.Bbox.from_bounds(x - 2.5 * scale, y - 2.5 * scale, 5 * scale, 5 * scale) for x, y in every]
    for (x, accuracy, _, size), spot in zip(marks, spots, strict=True):
        for offset in ((4, -8), (4, 2), (-4, 3), (-4, -8)):
            right = offset[0] < 0
            width, height = (0.65 * len(str(size)) + 0.2) * _SMALL * scale, 0.8 * _SMALL * scale
            left = spot[0] + offset[0] * scale - (width if right else 0)
            box = transforms.Bbox.from_bounds(left, spot[1] + offset[1] * scale, width, height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                style = {"fontsize": _SMALL, "color": _OURS, "ha": "right" if right else "left", "zorder": 5}
                panel.annotate(f"{size}", (x, accuracy), xytext=offset, textcoords="offset points", **style)
                taken.append(box)
                break
