"""Figures against their bars: a table on stdout, exit status 1 when a bar is missed."""

import sys


class Bars:
    """Collects figures, each with the limit that it must keep."""

    def __init__(self) -> None:
        self._missed = 0

    def at_most(self, what: str, figure: float, limit: float, unit: str = "") -> None:
        """One that must not be larger."""
        self._show(what, figure, "≤", limit, unit, figure <= limit)

    def at_least(self, what: str, figure: float, limit: float, unit: str = "") -> None:
        """One that must not be smaller."""
        self._show(what, figure, "≥", limit, unit, figure >= limit)

    def _show(self, what: str, figure: float, relation: str, limit: float, unit: str, kept: bool) -> None:
        self._missed += not kept
        bar = f"{relation} {limit:g} {unit}".strip()
        print(
            f"{what:52} {f'{figure:.3f} {unit}'.strip():>12}   bar {bar:12} {'kept' if kept else 'MISSED'}", flush=True
        )

    def end(self) -> None:
        """Leaves the process with the verdict."""
        sys.exit(1 if self._missed else 0)
