"""Translate a published model into a model directory.

SRC holds config.json and pytorch_model.bin or model.safetensors; DST appears whole or not at all. No torch is needed,
and nothing that the file contains is run.
"""

import argparse
import sys
import time

from based.cli import _common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("src", type=_common.path, metavar="SRC", help="the published directory")
    parser.add_argument("dst", type=_common.path, metavar="DST", help="the model directory to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)"
    )
    parser.add_argument(
        "--tokenizer",
        type=_common.path,
        metavar="FILE",
        help="a tokenizer.json, or a tokenizer's directory (default: SRC's, if any)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model directory")
    _common.add_statistics_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from based.convert import convert

    start = time.perf_counter()
    for note in convert(args.src, args.dst, args.dtype, args.tokenizer, overwrite=args.overwrite):
        print(f"{args.dst}: {note}", file=sys.stderr)
    if _common.wants_statistics(args):
        size = sum(path.stat().st_size for path in args.dst.iterdir())
        print(f"{args.dst}: {_common.nbytes(size)} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
