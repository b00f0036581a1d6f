"""Measure how much small models recall, over the bytes of state that they keep: the recall frontier.

Trains small models of every kind on multi-query associative recall, on all GPUs, measures with the runtime what they
recall, and writes results.csv, whose path goes to stdout, and results.json to the folder of the sweep. A sweep that was
stopped or killed goes on when the same command is given again. Machines may share it: each trains some --families or
--points, and --merge joins their folders. See docs/recall.md.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from based.cli import UsageError, _common

_TIME_IS_UP = 75
_SWEEP = (
    "families",
    "points",
    "widths",
    "rival_widths",
    "feature_dims",
    "windows",
    "state_sizes",
    "learning_rates",
    "epochs",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "-o", "--output", type=_common.path, required=True, metavar="DIR", help="the folder of the sweep"
    )
    parser.add_argument("--quick", action="store_true", help="a small sweep, a minute on a CPU")
    parser.add_argument(
        "--settings",
        choices=("ours", "authors"),
        default="ours",
        help="how models are trained: ours, or as in the authors' experiments, 4 rates and 32 epochs (default: ours)",
    )
    group = parser.add_argument_group("the sweep", "Lists are separated by commas; the defaults are docs/recall.md's.")
    lists: tuple[tuple[str, type, str], ...] = (
        ("--families", str, "kinds of models, such as based,mamba"),
        ("--points", str, "models by name or pattern: based-d64-f16,mamba-d128-*"),
        ("--widths", int, "of BASED and attention; windows have the largest alone"),
        ("--rival-widths", int, "hidden sizes of the other families"),
        ("--feature-dims", int, "of BASED"),
        ("--windows", int, "keys of sliding windows"),
        ("--state-sizes", int, "of Mamba and Mamba-2: of each channel"),
        ("--learning-rates", float, "the best one counts"),
    )
    for flag, kind, what in lists:
        group.add_argument(flag, type=_list(kind), action="extend", metavar="LIST", help=what)
    group.add_argument("--epochs", type=_common.positive, metavar="N", help="of the training texts, at most")
    group.add_argument("--seed", type=int, metavar="N", help="of texts, weights and order")
    parser.add_argument(
        "--device",
        type=_common.text,
        default="auto",
        help="auto (all GPUs, or the CPU), cpu, cuda (all GPUs), cuda:N",
    )
    parser.add_argument(
        "--parallel", type=_common.positive, metavar="N", help="models at once on a device (default: GPU 8, CPU 1)"
    )
    parser.add_argument(
        "--time-limit",
        type=_common.seconds,
        metavar="SECONDS",
        help=f"stop by then, with exit status {_TIME_IS_UP}; the same command goes on",
    )
    parser.add_argument(
        "--save-every",
        type=_common.seconds,
        default=60,
        metavar="SECONDS",
        help="how much of a run's training a kill may lose (default: 60)",
    )
    parser.add_argument(
        "--merge",
        type=_common.path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="take in what other folders of this sweep hold, and train nothing",
    )
    parser.add_argument("--restart", action="store_true", help="remove the sweep that the folder holds, and begin anew")
    parser.add_argument("--plot", type=_common.path, metavar="FILE", help="draw the frontier: .svg, .png or .pdf")
    parser.add_argument(
        "--plot-bytes",
        choices=("authors", "decoder"),
        default="authors",
        help="of the figure: as the authors count, with their points, or what a decoder keeps (default: authors)",
    )
    parser.add_argument("--json", action="store_true", help="the rows of results.json on stdout")
    _common.add_statistics_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from based.cli import _plot

    if args.plot is not None:
        _plot.check(args.plot)
    elif args.plot_bytes != "authors":
        raise UsageError("--plot-bytes is of the figure that --plot draws: expected both")
    if args.merge is not None and args.restart:
        raise UsageError("--merge with --restart: expected one of them")
    recall: Any = importlib.import_module("based.torch.recall")
    given = {key: getattr(args, key) for key in _SWEEP if getattr(args, key) is not None}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        sweep = recall.Sweep.of(args.settings, quick=args.quick, **given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    wanted = _common.wants_statistics(args)
    try:
        if args.merge is not None:
            rows = recall.merge(sweep, args.output, args.merge)
        else:
            rows = recall.measure_frontier(
                sweep,
                args.output,
                device=args.device,
                parallel=args.parallel,
                time_limit=args.time_limit,
                save_every=args.save_every,
                restart=args.restart,
                note=(lambda text: print(text, file=sys.stderr, flush=True)) if wanted else (lambda text: None),
            )
    except recall.Paused as pause:
        print(f"based: {pause}", file=sys.stderr)
        raise SystemExit(_TIME_IS_UP if pause.signal is None else 128 + pause.signal) from None
    if not any(row.accuracy is not None for row in rows):
        raise FloatingPointError(
            f"the loss of no run stayed finite: {args.output / 'results.csv'} has rows without accuracies. "
            "Lower --learning-rates, with another --output or --restart"
        )
    if args.plot is not None:
        published = sweep.has_authors_texts and args.plot_bytes == "authors"
        recall.draw(args.plot, rows, args.plot_bytes, published=published)
    print(json.dumps([asdict(row) for row in rows]) if args.json else args.output / "results.csv")


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {kind.__name__} values") from None

    return parse
