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
    """As in FAMILIES, which need not have it."""
    width: int | None
    size: int | None
    """None where the figure does not tell."""
    nbytes: int
    """As they count."""
    accuracy: float


def read_published() -> tuple[list[Point], dict[str, str]]:
    """All points, the older figure's first, and labels of those families that FAMILIES may lack."""
    document = json.loads(resources.files("based.torch.recall").joinpath("published.json").read_text("utf-8"))
    points = [Point(source["name"], **point) for source in document["sources"] for point in source["points"]]
    return points, document["labels"]
