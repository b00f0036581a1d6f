"""Measure how well a model predicts a text: bits per byte and perplexity.

The text is one sequence: behind the model's bos token, if it has one, otherwise behind its own first token, which is
not counted then. The state has a fixed size, so a text of any length is read whole, each token given all before it.
With --window it is read as a model with a context of N tokens would read it: in windows, each from an empty state, that
begin --stride tokens after one another, and each token is counted in the first window that holds it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from based.cli import UsageError, _common

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from based import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("file", type=_common.text, metavar="FILE", help="UTF-8 text; - is stdin")
    _common.add_model_arguments(parser)
    _common.add_compute_arguments(parser)
    parser.add_argument("--window", type=_common.positive, metavar="N", help="tokens of a window (default: all)")
    parser.add_argument(
        "--stride", type=_common.positive, metavar="N", help="tokens from one window to the next (default: half of one)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    _common.add_statistics_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.stride is not None and args.window is None:
        raise UsageError("--stride is the distance of windows: give --window too")
    window = args.window
    stride = args.stride or max(1, (window or 0) // 2)
    if window is not None and (window < 2 or stride >= window):
        raise UsageError(f"--window {window} --stride {stride}: expected a window of two tokens, and a stride below it")

    data, where = _common.read_bytes(args.file)
    text = _common.decode_text(data, where)
    model = _common.load_model(args)
    _common.require_tokenizer(model.tokenizer, args.model)
    ids, num_bytes = _sequence(model, text)
    if len(ids) < 2:
        raise ValueError(f"{where}: no token can be predicted from another: expected a longer text")

    from tqdm import tqdm

    counted = len(ids) - 1
    total = 0.0
    with tqdm(total=counted, unit=" tokens", disable=not _common.wants_statistics(args), file=sys.stderr) as bar:
        start = time.perf_counter()
        for begin, first, end in _windows(len(ids), window or len(ids), stride):
            logprobs: npt.NDArray[np.float32] = model.score(ids[begin:end])
            counted_here = logprobs[first - begin - 1 :]
            found_here = float(counted_here.sum(dtype="float64"))
            if not math.isfinite(found_here):
                at = next((i for i, value in enumerate(counted_here.tolist()) if not math.isfinite(value)), 0)
                raise ValueError(
                    f"the log-probability of token {first + at} is {counted_here[at]}, expected a finite number: "
                    f"{args.model} computes no probabilities for this text"
                )
            total -= found_here
            bar.update(end - first)
        seconds = time.perf_counter() - start

    found = {
        "tokens": counted,
        "bytes": num_bytes,
        "bits_per_byte": total / math.log(2) / num_bytes,
        "loss": total / counted,
        "perplexity": math.exp(min(total / counted, 700)),
        "window": window,
        "stride": None if window is None else stride,
    }
    if args.json:
        print(json.dumps(found))
    else:
        how = "whole" if window is None else f"windows of {window} tokens, stride {stride}"
        print(f"{counted} tokens, {num_bytes} bytes ({how})")
        print(f"bits per byte  {found['bits_per_byte']:.4f}")
        print(f"perplexity     {found['perplexity']:.4f} per token")
    if _common.wants_statistics(args):
        print(f"{counted / seconds:.1f} tok/s, {model.dtype}, {model.kernel_isa}", file=sys.stderr)


def _sequence(model: "Model", text: str) -> tuple[list[int], int]:
    """The tokens, and the bytes of text of all but the first."""
    ids = model.encode(text, split_special_tokens=True)  # as training reads documents
    num_bytes = len(text.encode())
    bos = model.config.bos_token_id
    start = bos if bos is not None and bos < model.config.vocab_size else None
    if start is not None:
        return (ids if ids[:1] == [start] else [start, *ids]), num_bytes
    if model.tokenizer is not None and ids:
        num_bytes -= len(model.tokenizer.decode(ids[:1]).encode())
    return ids, num_bytes


def _windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): tokens `first` … `end` − 1 are counted, each given those from `begin` on."""
    begin, first = 0, 1
    while first < num_tokens:
        end = min(begin + window, num_tokens)
        yield begin, first, end
        begin, first = begin + stride, end
