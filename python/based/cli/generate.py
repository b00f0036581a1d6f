"""Continue a prompt.

The text goes to stdout as it comes, without the prompt. With --session the prompt continues what the state in FILE has
seen, and the state after it replaces FILE: a conversation of any length in a file of constant size. Without a prompt it
goes on where it stopped. The state before the last turn stays in FILE.before, for --undo.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.cli import UsageError, _common

if TYPE_CHECKING:
    from based import SamplingParams, Session, StreamChunk

_MOST_SAMPLES = 1 << 14  # of a prompt, as SamplingParams has it

_FIELDS: dict[str, Any] = {
    "n": _common.between(1, _MOST_SAMPLES),
    "max_tokens": _common.count_or_none,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "stop": _common.utf8,
    "stop_token_ids": _common.token_ids,
    "ignore_eos": bool,
    "logprobs": _common.between(0, 2**31 - 1),
    "logit_bias": str,
    "include_stop_str_in_output": bool,
    "skip_special_tokens": bool,
}
"""Fields of SamplingParams, each one a flag, with the type of its argument. Their domains are there, and their
defaults, except that of max_tokens."""

_MAX_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments; the sampling flags' help comes from SamplingParams."""
    from based import SamplingParams

    _common.add_text_arguments(parser, "prompt")
    _common.add_model_arguments(parser)
    _common.add_compute_arguments(parser)
    parser.add_argument(
        "--session",
        type=_common.path,
        metavar="FILE",
        help="start from the state in FILE, if there is one, and save it there",
    )
    parser.add_argument(
        "--separator",
        type=_common.utf8,
        metavar="TEXT",
        help="with --session: stands before the prompt, unless that is the first",
    )
    parser.add_argument(
        "--undo",
        action="store_true",
        help="with --session: take back the last turn, then continue with a prompt if any",
    )
    parser.add_argument("--token-ids", action="store_true", help="the prompt and the output are token ids")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample, at the end")
    _common.add_statistics_argument(parser)

    group = parser.add_argument_group("sampling")
    defaults = SamplingParams()
    metavars = {"stop": "TEXT", "stop_token_ids": "ID,…", "logit_bias": "ID:BIAS"}
    for name, kind in _FIELDS.items():
        flags = ["-n"] if name == "n" else ["--" + name.replace("_", "-")]
        help_text = getattr(SamplingParams, name).__doc__.strip().replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
        if name == "max_tokens":
            options |= {"default": _MAX_TOKENS, "help": f"{help_text[:-1]}: --max-tokens none (default: {_MAX_TOKENS})"}
        if kind is bool and getattr(defaults, name):
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
            continue
        if kind is bool:
            group.add_argument(*flags, action="store_true", **options)
            continue
        if name in ("stop", "logit_bias"):
            options |= {"action": "append", "help": help_text + " May be repeated."}
        elif name == "stop_token_ids":
            options |= {"action": "extend", "help": help_text + " May be repeated."}
        elif name != "max_tokens" and getattr(defaults, name) not in (None, []):
            options["help"] += f" (default: {getattr(defaults, name)})"
        group.add_argument(*flags, type=kind, metavar=metavars.get(name, "N"), **options)


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """The sampling flags that were given, over the defaults. Raises UsageError."""
    from based import SamplingParams

    given = {name: getattr(args, name) for name in _FIELDS if hasattr(args, name)}
    if "logit_bias" in given:
        given["logit_bias"] = dict(_bias(entry) for entry in given["logit_bias"])
    if "stop" in given and args.escape:
        given["stop"] = [_common.unescape(stop) for stop in given["stop"]]
    try:
        return SamplingParams(**given)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _bias(entry: str) -> tuple[int, float]:
    token, colon, bias = entry.partition(":")
    try:
        if colon:
            return int(token), float(bias)
    except ValueError:
        pass
    raise UsageError(f"--logit-bias {entry}: expected ID:BIAS, an integer and a number")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    params = sampling_params(args)
    if args.session is not None and params.n != 1:
        raise UsageError(f"--session continues one sequence: -n {params.n} must be 1")
    if params.logprobs is not None and not args.json:
        raise UsageError("--logprobs are shown with --json only")
    if args.session is None and (args.separator is not None or args.undo):
        raise UsageError("--separator and --undo are for a conversation: name its --session FILE")
    if args.separator is not None and args.token_ids:
        raise UsageError("--separator is text, and with --token-ids the prompt is not")
    with contextlib.ExitStack() as stack:
        saved = None if args.session is None else stack.enter_context(_SavedSession.locked(args.session, args.undo))
        if args.token_ids:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="generated text will be empty")
        _generate(args, params, saved)


def _generate(args: argparse.Namespace, params: "SamplingParams", saved: "_SavedSession | None") -> None:
    # A saved session goes on by itself: it needs no prompt.
    goes_on = saved is not None and saved.start is not None
    text = _common.read_text(args, "prompt", optional=goes_on or args.undo)
    if saved is not None and args.undo and not text:
        saved.undo()
        return
    prompt: list[int] | None = None
    if args.token_ids or (goes_on and not text):
        prompt = _common.parse_ids(text)

    model = _common.load_model(args)
    session = model.session() if saved is not None else None
    if session is not None and saved is not None and saved.start is not None:
        session.load_state(saved.start)
    first = session is None or session.num_tokens == [0]
    if prompt is None:
        if model.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer: name one with --tokenizer, or use --token-ids")
        separator = "" if first or args.separator is None else args.separator
        prompt = model.encode(separator + text, at_start=first, split_special_tokens=args.split_special_tokens)

    start = time.perf_counter()
    printer = _JsonPrinter(params, len(prompt)) if args.json else _TextPrinter(params.n, args.token_ids)
    timer = _common.TokenTimer()
    printer.print_all(timer.watch(model.stream(prompt, params) if session is None else session.stream(prompt, params)))
    if printer.errors:  # a run that fails leaves the saved session as it was
        raise ValueError("; ".join(printer.errors))
    if session is not None and saved is not None:
        saved.replace(session)

    if _common.wants_statistics(args):
        seen = len(prompt) + timer.num_tokens
        state = params.n * (model.state_nbytes if model.max_context is None else model.state_nbytes_at(seen - 1))
        if session is not None:
            seen, state = session.num_tokens[0], session.state_nbytes
        parts = [
            f"prompt {len(prompt)} tokens" + (f", {len(prompt) / (timer.first - start):.1f} tok/s" if prompt else ""),
            f"output {timer.num_tokens} tokens" + (f", {timer.rate:.1f} tok/s" if timer.rate else ""),
            f"state {_common.nbytes(state)}"
            + (f" after {seen} tokens" if params.n == 1 else f" in {params.n} samples"),
            f"{model.dtype}, {model.num_threads} threads, {model.kernel_isa}",
        ]
        print("; ".join(parts), file=sys.stderr)


class _SavedSession:
    """The state file of a conversation, which one process at a time continues, and beside it the state before it."""

    def __init__(self, path: Path, undo: bool) -> None:
        self._path = path
        name = path.name + ".before"
        self._before = path.with_name(name if len(os.fsencode(name)) <= 255 else _hidden_name(path, "before"))
        self.start = self._before if undo else path if path.exists() else None
        """The state to go on from; None for a conversation that begins."""
        if undo and not self._before.exists():
            raise FileNotFoundError(
                errno.ENOENT,
                "there is no turn to undo: only the last one can be, once, and not the first (remove the session's "
                "file to begin anew)",
                str(self._before),
            )

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path, undo: bool) -> "Iterator[_SavedSession]":
        """Raises BlockingIOError while another process continues the conversation: its turn or ours would be lost."""
        path = path.resolve()
        path.parent.stat()  # a folder that is not there: say so before the work, not after it
        lock = path.with_name(_hidden_name(path, "lock"))
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, lock):
                    break
            except BlockingIOError as error:
                os.close(descriptor)
                raise BlockingIOError(
                    errno.EWOULDBLOCK, "another process continues this conversation: wait for its end", str(path)
                ) from error
            os.close(descriptor)  # of a process that has just removed it
        try:
            yield cls(path, undo)
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def replace(self, session: "Session") -> None:
        """Saves the state after a turn."""
        aside = self._path.with_name(_hidden_name(self._path, "aside"))
        aside.unlink(missing_ok=True)  # of a process that was killed here: whoever has the lock is alone
        if self.start != self._path:  # what lies in `before` is the state before this turn, or of another conversation
            session.save_state(self._path)
            if self.start is None:
                self._before.unlink(missing_ok=True)
            return
        try:
            try:
                os.link(self._path, aside)
            except OSError:  # a file system without links
                shutil.copy2(self._path, aside)
            session.save_state(self._path)
            os.replace(aside, self._before)
        finally:
            aside.unlink(missing_ok=True)

    def undo(self) -> None:
        """Takes the last turn back."""
        os.replace(self._before, self._path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _hidden_name(path: Path, suffix: str) -> str:
    """Of a file beside `path`, whose own name may have the longest length allowed."""
    return f".based-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{suffix}"


class _TextPrinter:
    """Writes sample after sample, the running one as it comes, with lines of --- between them."""

    def __init__(self, num_samples: int, token_ids: bool) -> None:
        self.errors: list[str] = []  # of samples that could not go on
        self._token_ids = token_ids
        self._held: list[list[str]] = [[] for _ in range(num_samples)]
        self._started = [False] * num_samples
        self._finished = [False] * num_samples
        self._current = 0

    def print_all(self, chunks: Iterable["StreamChunk"]) -> None:
        for chunk in chunks:
            self._held[chunk.index].append(self._piece(chunk))
            self._finished[chunk.index] |= chunk.finish_reason is not None
            if chunk.error is not None:
                self.errors.append(chunk.error)
            while self._current < len(self._held) and self._advance():
                pass

    def _piece(self, chunk: "StreamChunk") -> str:
        if not self._token_ids:
            return chunk.text
        started, self._started[chunk.index] = self._started[chunk.index], True
        return (" " if started else "") + " ".join(map(str, chunk.token_ids))

    def _advance(self) -> bool:
        """Writes what there is of the current sample; whether it is complete."""
        held = self._held[self._current]
        sys.stdout.write("".join(held))
        held.clear()
        done = self._finished[self._current]
        if done:
            self._current += 1
            sys.stdout.write("\n" if self._current == len(self._held) else "\n---\n")
        sys.stdout.flush()
        return done


class _JsonPrinter:
    """Writes one object per sample, in order, when all are complete."""

    def __init__(self, params: "SamplingParams", num_prompt_tokens: int) -> None:
        self.errors: list[str] = []  # of samples that could not go on
        self._num_prompt_tokens = num_prompt_tokens
        self._chunks: list[list[StreamChunk]] = [[] for _ in range(params.n)]

    def print_all(self, chunks: Iterable["StreamChunk"]) -> None:
        for chunk in chunks:
            self._chunks[chunk.index].append(chunk)
            if chunk.error is not None:
                self.errors.append(chunk.error)
        for index, sample in enumerate(self._chunks):
            record: dict[str, Any] = {
                "index": index,
                "text": "".join(chunk.text for chunk in sample),
                "token_ids": [token for chunk in sample for token in chunk.token_ids],
                "num_prompt_tokens": self._num_prompt_tokens,
                "finish_reason": sample[-1].finish_reason,
                "stop_reason": sample[-1].stop_reason,
                "cumulative_logprob": sum(chunk.logprob for chunk in sample),
            }
            if sample[-1].error is not None:
                record["error"] = sample[-1].error
            if sample[-1].logprobs is not None:
                record["logprobs"] = [
                    [
                        {"token_id": token, "token": top.decoded_token, "logprob": top.logprob, "rank": top.rank}
                        for token, top in entry.items()
                    ]
                    for chunk in sample
                    for entry in chunk.logprobs or ()
                ]
            print(_common.to_json(record))
