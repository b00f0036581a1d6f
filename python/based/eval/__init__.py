"""lm-evaluation-harness with models of this package: `based eval`, and the class "based" of the harness' registry.

import lm_eval
import based.eval

lm_eval.simple_evaluate("based", {"pretrained": "hazyresearch/based-360m"}, tasks=["swde"])
"""

try:
    import lm_eval as _lm_eval
except ImportError as error:
    raise ImportError(f'{error}: based.eval needs lm-evaluation-harness: pip install "based[eval]"') from error

from based.eval._lm import BasedLM
from based.eval._tasks import TASKS, Offered, load_tasks

__all__ = ["TASKS", "BasedLM", "Offered", "load_tasks"]

del _lm_eval
