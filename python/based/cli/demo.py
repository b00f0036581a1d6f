"""A tour of what a state of fixed size is good for.

A completion as it comes; recall in context, of made-up pairs; the state saved to a file, from which a new process goes
on; forks of it; and bytes and speed beside a transformer's KV cache. It takes about half a minute.
"""

import argparse
import itertools
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from based._loading import BUNDLED
from based.cli import _common

if TYPE_CHECKING:
    from based import Model, SamplingParams, Session
    from based.models.pairs import Pair

_WIDTH = 80  # columns where stdout is no terminal
_FORKS, _FORK_TOKENS = 3, 64
_MEASURED, _COMPUTED = (256, 4096, 16384), (131_072, 1_048_576)  # numbers of tokens
_TIMED_TOKENS, _TIMED_RUNS = 64, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("prompt", nargs="?", default="def fibonacci(", help="of the completion (default: %(default)s)")
    parser.add_argument("--pairs", type=_pairs, default=32, metavar="N", help="to be recalled (default: 32)")
    parser.add_argument("--max-tokens", type=_common.positive, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--seed", type=int, metavar="N", help="of texts and pairs (default: another one each time)")
    _common.add_model_arguments(parser)
    _common.add_compute_arguments(parser)


def _pairs(text: str) -> int:
    from based.models.pairs import MOST_PAIRS

    value = int(text)
    if not 1 <= value <= MOST_PAIRS:
        raise argparse.ArgumentTypeError(f"{value} is not in [1, {MOST_PAIRS}]")
    return value


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    prompt = _common.check_text(args.prompt, "prompt")
    model = _common.load_model(args)
    _common.require_tokenizer(model.tokenizer, args.model)
    rng = random.Random(args.seed)
    threads = f", {model.num_threads} thread{'s' if model.num_threads > 1 else ''}" if model.device == "cpu" else ""
    print(f"{args.model}: {model.num_parameters / 1e6:.1f} M parameters, {model.dtype}, on {model.device}{threads}")
    _complete(model, prompt, _params(rng, args.max_tokens))
    session, pair = _recall(model, args.pairs, rng)
    _save(args, model, session, pair)
    _fork(session, rng)
    _cost(model, rng)


def _params(rng: random.Random, max_tokens: int) -> "SamplingParams":
    from based import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0.5, seed=int(rng.random() * 2**32))


def _complete(model: "Model", prompt: str, params: "SamplingParams") -> None:
    _heading("A completion")
    print(_style(prompt, "1"), end="", flush=True)
    timer = _common.TokenTimer()
    for chunk in timer.watch(model.stream(prompt, params)):
        print(chunk.text, end="", flush=True)
    print(f"\n\n{timer.num_tokens} tokens" + (f", {timer.rate:,.0f} a second." if timer.rate else "."))


def _recall(model: "Model", count: int, rng: random.Random) -> "tuple[Session, Pair]":
    """Tells pairs and asks for them. Returns a session that has seen the pairs, and one of them."""
    from based.models import pairs

    told = pairs.random_pairs(rng, count)
    _heading(f"Recall in context: made-up pairs, told once, {count} of them")
    _columns(f"{pairs.question(key)}{value}" for key, value in told)
    session = model.session()
    session.prefill(pairs.statement(told))
    print("\nNow each is asked for, in any order, from a fork of the state behind them:\n")
    asked = sorted(told, key=lambda _: rng.random())
    answers = [pairs.ask(session.fork(), [key])[0] for key, _ in asked]
    _columns(
        f"{pairs.question(key)}{answer} {'✓' if answer == value else f'✗ {value}'}"
        for (key, value), answer in zip(asked, answers, strict=True)
    )
    right = sum(answer == value for answer, (_, value) in zip(answers, asked, strict=True))
    print(f"\n{right} of {count} right.")
    return session, asked[0]


def _save(args: argparse.Namespace, model: "Model", session: "Session", pair: "Pair") -> None:
    from based.models import pairs

    _heading("The state is a file")
    key, _ = pair
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        session.save_state(path)
        size = _common.nbytes(path.stat().st_size)
        memory = _common.nbytes(session.state_nbytes)
        print(
            f"{session.num_tokens[0]} tokens: {memory} in memory, {size} in a file, which notes also\n"
            "what was said, for penalties. A new process goes on from there:\n"
        )
        named = "" if args.model == BUNDLED else f" -m {shlex.quote(args.model)}"
        print(
            f"$ based generate{named} --session {path.name} --temperature 0 \\\n"
            f"    --stop $'\\n' \"{pairs.question(key)}\"",
            flush=True,
        )
        command = [sys.executable, "-m", "based.cli", "generate", "--session", str(path), "--temperature", "0"]
        command += ["--max-tokens", str(pairs.ANSWER_TOKENS), "--stop", "\n", "--no-stats"]
        for name in ("model", "revision", "tokenizer"):
            if (value := getattr(args, name)) is not None:
                command.append(f"--{name}={value}")
        command += [f"--device={model.device}", f"--dtype={model.dtype}", f"--threads={model.num_threads}"]
        env = os.environ | {"PYTHONIOENCODING": "utf-8"}
        command.append(pairs.question(key))
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True, env=env)
    there, here = done.stdout.removesuffix("\n"), pairs.ask(session.fork(), [key])[0]
    print(f"{there}\n\nThis process says {'the same' if there == here else here}.")


def _fork(session: "Session", rng: random.Random) -> None:
    _heading("The state forks")
    prompt = "class Queue:\n    def "
    session.reset()
    session.prefill(prompt)
    state = f"one state of {session.num_tokens[0]} tokens and {_common.nbytes(session.state_nbytes)}"
    print(f"{_FORKS} ways on from {state}:")
    for _ in range(_FORKS):
        output = session.fork().generate("__", _params(rng, _FORK_TOKENS))[0].outputs[0]
        print(f"\n{_style(prompt + '__', '1')}{output.text}", flush=True)


def _cost(model: "Model", rng: random.Random) -> None:
    """Speed and memory, measured and computed, over the number of tokens seen."""
    from based import SamplingParams, sizes
    from based.models import pairs

    _heading("What it costs")
    assert model.tokenizer is not None
    ids: list[int] = []
    while len(ids) < _MEASURED[-1]:
        ids += model.tokenizer.encode(pairs.statement(pairs.random_pairs(rng, pairs.MOST_PAIRS))).ids
    cached = "float32" if model.dtype == "float32" else "bfloat16"
    params = SamplingParams(max_tokens=_TIMED_TOKENS, temperature=0, ignore_eos=True)
    session = model.session()
    before = {}
    for depth in _MEASURED:
        session.prefill(ids[session.num_tokens[0] : depth - _TIMED_TOKENS])
        before[depth] = session.checkpoint()
    # A busy machine slows single runs down: the best of some that are spread over the time.
    rates = dict.fromkeys(_MEASURED, 0.0)
    for _, depth in itertools.product(range(_TIMED_RUNS), _MEASURED):
        session.rollback(before[depth])
        timer = _common.TokenTimer()
        for _ in timer.watch(session.stream([], params)):
            pass
        rates[depth] = max(rates[depth], timer.rate)

    print(f"{'tokens seen':>12}{'tokens/s':>10}{'state':>10}{'KV cache':>10}")
    for depth in (*_MEASURED, *_COMPUTED):
        rate = f"{rates[depth]:,.0f}" if depth in rates else ""
        cache = sizes.kv_cache_nbytes(model.config, cached, depth)
        print(f"{depth:>12,}{rate:>10}{_common.nbytes(session.state_nbytes):>10}{_common.nbytes(cache):>10}")
    print(
        f"\nTokens a second are the best of {_TIMED_RUNS} runs. The KV cache is a transformer's of\n"
        "this width and depth: a quarter of that where 4 heads share keys and values."
    )


def _columns(cells: Iterable[str]) -> None:
    """In as many columns as there is room for."""
    cells = list(cells)
    columns = shutil.get_terminal_size((_WIDTH, 1)).columns if sys.stdout.isatty() else _WIDTH
    width = max(map(len, cells)) + 2
    count = max(1, (columns + 2) // width)  # nothing behind the last one
    for start in range(0, len(cells), count):
        print("".join(cell.ljust(width) for cell in cells[start : start + count]).rstrip(), flush=True)


def _heading(text: str) -> None:
    print(f"\n{_style(f'== {text}', '1')}\n", flush=True)


def _style(text: str, code: str) -> str:
    """In a weight or colour where a terminal shows it."""
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text
