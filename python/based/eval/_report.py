"""Runs tasks and says what came out: the harness' table, a JSON document, and the authors' figures beside ours."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.utils import make_table

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from based.eval._lm import BasedLM

PAPER = ("swde", "fda", "squad_completion")
PAPER_VERSION = 0
PAPER_FIGURES = {
    "based-360m": (25.65, 14.34, 24.23),
    "mamba-360m": (17.28, 5.90, 24.83),
    "attn-360m": (56.26, 57.89, 27.85),
    "based-1b": (37.71, 19.06, 29.49),
    "mamba-1b": (28.35, 11.07, 29.42),
    "attn-1b": (69.04, 68.87, 35.89),
}
"""What the authors publish of their models, trained on 10 G tokens: `contains` in % of each task of PAPER."""

_PACKAGES = ("based", "lm_eval", "datasets", "numpy", "tokenizers", "transformers")
_FEWSHOT_SEED = 1234  # the harness' own


def evaluate(
    lm: "BasedLM", tasks: "Sequence[Task]", *, limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """The harness' results. Raises ValueError where a task has no examples for num_fewshot."""
    for task in tasks:
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:  # the harness, too, leaves tasks alone that say 0
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    groups: dict[str, Any] = {"tasks": {task.task_name: task for task in tasks}, "groups": {}, "group_map": {}}
    with _bars(lm.shows_progress):
        results: dict[str, Any] = lm_eval.evaluator.evaluate(lm=lm, task_dict=groups, limit=limit, log_samples=False)
    return results


@contextlib.contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """The harness shows a bar while it writes prompts, wanted or not."""
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bar, disable=not wanted)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar


def document(lm: "BasedLM", results: Mapping[str, Any], model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures, and what they depend on."""
    return {
        "results": results["results"],
        "versions": results["versions"],
        "num_fewshot": results["n-shot"],
        "num_documents": results["n-samples"],
        "model": {
            "name": model,
            "fingerprint": lm.model.fingerprint,
            "num_parameters": lm.model.num_parameters,
            "dtype": lm.model.dtype,
            "device": lm.model.device,
            "kernel_isa": lm.model.kernel_isa,
            "tokenizer": lm.tokenizer_name,
            "config": json.loads(lm.model.config.to_json()),
        },
        "settings": {"batch_size": lm.batch_size, **settings},
        "context_tokens": {"all": lm.num_prompt_tokens, "read": lm.num_fed_tokens},
        "packages": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "based" not in found:  # run from its sources
        from based import __version__

        found["based"] = __version__
    return found


def table(results: Mapping[str, Any], model: str) -> str:
    """The harness' table, and the paper's where one of its tasks was run."""
    text: str = make_table(results).rstrip("\n")
    return text + (paper_table(results, model) if any(name in results["results"] for name in PAPER) else "")


def paper_table(results: Mapping[str, Any], model: str) -> str:
    """The authors' figures beside ours."""
    ours = [results["results"].get(name, {}).get("contains,none") for name in PAPER]
    versions = [results["versions"].get(name, "") for name in PAPER]
    rows = [("contains, %", *PAPER), ("---", *["---:"] * len(PAPER))]
    rows += [
        (f"{name}, authors (version {PAPER_VERSION})", *(f"{figure:.2f}" for figure in figures))
        for name, figures in PAPER_FIGURES.items()
    ]
    measured = [
        "" if figure is None else f"{100 * figure:.2f} (version {version})"
        for figure, version in zip(ours, versions, strict=True)
    ]
    rows.append((f"{model}, here", *measured))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"\n\n{lines}\n\nVersion 1 of these tasks strips the white space around prompts and answers: its figures are "
        f"not comparable\nwith those of version {PAPER_VERSION}, which are the authors'."
    )
