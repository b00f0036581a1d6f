"""The recall frontier: accuracy of multi-query associative recall over bytes of state. `based recall`, docs/recall.md.

>>> rows = measure_frontier(Sweep.quick(), Path("recall"))

`families.py` has the kinds of models, and is where another one is added; `data.py` makes the texts, `sweep.py` says
what is trained, `training.py` and `workers.py` do it, `measuring.py` asks the runtime, `frontier.py` joins it all.
`published.py` reads the authors' numbers, `published.json`.
"""

from based.torch.recall.figure import draw
from based.torch.recall.frontier import Outcome, Paused, measure_frontier, merge
from based.torch.recall.sweep import Sweep

__all__ = ["Outcome", "Paused", "Sweep", "draw", "measure_frontier", "merge"]
