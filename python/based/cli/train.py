"""Train a model as CONFIG.yaml says, or go on with it.

Everything goes to the folder of the run (`output`): checkpoints, logs, and `model`, a model directory, whose path is
written to stdout at the end. A run that was stopped or killed goes on from its last checkpoint when the same command is
given again. For several GPUs, torchrun starts it. See docs/training.md.
"""

import argparse
import importlib
import sys
from dataclasses import asdict
from typing import Any

from based.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("config", type=_common.path, metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "-o", "--output", type=_common.path, metavar="DIR", help="the folder of the run (default: CONFIG's)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY.PATH=VALUE",
        help="instead of what CONFIG says, such as training.steps=100. May be repeated.",
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY.PATH",
        help="go on with a run though CONFIG or --set says otherwise than before, such as training.steps. May be "
        "repeated.",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="fail when there is no checkpoint to go on from")
    group.add_argument("--restart", action="store_true", help="remove the run that the folder holds, and begin anew")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end: the model, its losses")
    _common.add_statistics_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    training: Any = importlib.import_module("based.torch.train")
    config = training.read_config(args.config, args.settings, args.output)
    meter = training.Meter(wanted=_common.wants_statistics(args))
    try:
        result = training.train(config, restart=args.restart, must_resume=args.resume, change=args.change, meter=meter)
    except training.Stopped as stop:
        if training.is_first_process():
            print(f"based: {stop}", file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    finally:
        meter.close()
    if training.is_first_process():
        print(_common.to_json(asdict(result), default=str) if args.json else result.model)
