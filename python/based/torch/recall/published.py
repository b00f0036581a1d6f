"""The numbers that the authors published, read off their figures: `published.json`."""

import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Point:
    """A model of theirs."""

    source: str
    """Which figure: the name of a source in the file."""
    family: str
    """As in FAMILIES."""
    width: int | None
    size: int | None
    """None where the figure does not tell."""
    nbytes: int
    """As they count."""
    accuracy: float


def read_published() -> list[Point]:
    """All points, the older figure's first."""
    document = json.loads(resources.files("based.torch.recall").joinpath("published.json").read_text("utf-8"))
    return [Point(source["name"], **point) for source in document["sources"] for point in source["points"]]
