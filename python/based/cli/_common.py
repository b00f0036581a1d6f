"""What several subcommands share: the model's arguments, where text comes from, how numbers are shown."""

import argparse
import codecs
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from based._loading import BUNDLED
from based.cli import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from based import Model, StreamChunk

MODEL_HELP = "model directory, directory of a published model, or owner/name on the hub"
REVISION_HELP = "branch, tag or commit on the hub"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, and where its tokenizer is."""
    help_text = f"{MODEL_HELP} (default: {BUNDLED}, which comes with the package)"
    parser.add_argument("-m", "--model", type=text, default=BUNDLED, metavar="PATH|ID", help=help_text)
    parser.add_argument("--revision", type=text, metavar="REV", help=REVISION_HELP)
    parser.add_argument(
        "--tokenizer",
        type=text,
        metavar="FILE",
        help="a tokenizer.json, or a tokenizer's directory (default: the model's)",
    )


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--device", type=text, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights")
    parser.add_argument("-t", "--threads", type=threads, metavar="N", help="CPU threads (default: all usable)")
    add_context_argument(parser)


def add_context_argument(parser: argparse.ArgumentParser) -> None:
    """--max-context."""
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tokens of a sequence, of a model with full attention (default: as many as memory holds)",
    )


def load_model(args: argparse.Namespace) -> "Model":
    """The model that add_model_arguments and add_compute_arguments ask for."""
    import based

    return based.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        num_threads=args.threads,
        max_context=args.max_context,
        revision=args.revision,
        tokenizer=args.tokenizer,
    )


def require_tokenizer(tokenizer: "Tokenizer | None", model: str) -> "Tokenizer":
    """The tokenizer itself. Raises ValueError when the model has none."""
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: name one with --tokenizer")
    return tokenizer


def add_text_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """A text as argument, --file or stdin."""
    parser.add_argument("text", nargs="?", metavar=name.upper(), help=f"the {name} (default: --file, or else stdin)")
    parser.add_argument("-f", "--file", type=path, metavar="FILE", help=f"read the {name} from a file; - is stdin")
    parser.add_argument(
        "-e", "--escape", action="store_true", help="arguments hold escapes: \\n, \\t, \\r, \\\\, \\xHH, \\uHHHH"
    )
    parser.add_argument(
        "--split-special-tokens", action="store_true", help=f"a special token's text in the {name} is plain letters"
    )


def read_text(args: argparse.Namespace, what: str, *, optional: bool = False) -> str:
    """The text that add_text_arguments asks for; one newline at the end of a file or of stdin is not part of it.

    optional: it may be empty, or not be given where stdin is a terminal.
    """
    if args.text is not None and args.file is not None:
        raise UsageError(f"give the {what} as an argument or with --file, not both")
    if args.text is not None:
        return unescape(check_text(args.text, what)) if args.escape else check_text(args.text, what)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        if optional:
            return ""
        raise UsageError(f"no {what}: give it as an argument, with --file, or on stdin")
    text = decode_text(*read_bytes("-" if args.file is None else str(args.file)))
    return text.removesuffix("\n").removesuffix("\r")


def read_bytes(file: str) -> tuple[bytes, str]:
    """The contents of a file, or of stdin if it is "-", and what to call it.

    Raises OSError, MemoryError, and ValueError when it is a device or a pipe that has no end.
    """
    if file != "-":
        with open(file, "rb") as source:
            return _read_all(source, file), file
    if sys.stdin is None:
        raise UsageError("-: there is no stdin")
    return _read_all(sys.stdin.buffer, "stdin"), "stdin"


def _read_all(source: BinaryIO, name: str) -> bytes:
    try:
        is_regular = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:  # a stream without a descriptor
        is_regular = False
    try:
        if is_regular:
            return source.read()
        size = 0
        parts = []
        while part := source.read(_STREAM_PART):
            size += len(part)
            if size > _LONGEST_STREAM:
                raise ValueError(
                    f"{name} is no regular file and has more than {_LONGEST_STREAM} bytes: write the text into a file, "
                    "which may be longer"
                )
            parts.append(part)
            if len(part) < _STREAM_PART:  # the end: a terminal is not asked twice
                break
        return b"".join(parts)
    except MemoryError:
        raise MemoryError(f"{name}: the text is longer than memory holds") from None


_STREAM_PART, _LONGEST_STREAM = 1 << 20, 1 << 30  # bytes


def decode_text(data: bytes, where: str) -> str:
    """UTF-8; a byte order mark at the beginning is no text. Raises ValueError."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8 ({error.reason})") from error


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", "'": "'", '"': '"'}


def unescape(text: str) -> str:
    """What escapes in an argument stand for. Raises UsageError."""

    def letter(found: re.Match[str]) -> str:
        if (code := found[1] or found[2]) is not None:
            return chr(int(code, 16))
        if found[3] not in _ESCAPES:
            raise UsageError(f"{found[0]!r} is no escape: expected \\n, \\t, \\r, \\0, \\\\, \\xHH or \\uHHHH")
        return _ESCAPES[found[3]]

    plain = re.sub(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.?))", letter, text, flags=re.DOTALL)
    try:
        return plain.encode("utf-16", "surrogatepass").decode("utf-16")  # two \\u for a character above U+FFFF
    except UnicodeDecodeError as error:
        raise UsageError(f"{text!r} holds half of a character above U+FFFF, which takes two \\u") from error


def check_text(text: str, what: str) -> str:
    """The argument itself. Raises ValueError when it is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that the shell passed on as they were
        raise ValueError(f"the {what} is not UTF-8: {error}") from error
    return text


def parse_ids(text: str) -> list[int]:
    """Token ids separated by commas or white space. Raises UsageError."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"token ids are integers separated by commas or spaces: {error}") from error


def token_ids(text: str) -> list[int]:
    """An argument that is token ids."""
    try:
        return parse_ids(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_statistics_argument(parser: argparse.ArgumentParser) -> None:
    """--stats, --no-stats: see wants_statistics."""
    parser.add_argument(
        "--stats",
        action=argparse.BooleanOptionalAction,
        help="statistics and progress on stderr (default: if that is a terminal)",
    )


def wants_statistics(args: argparse.Namespace) -> bool:
    """Whether to write statistics to stderr."""
    asked: bool | None = args.stats
    return sys.stderr.isatty() if asked is None else asked


def to_json(value: Any, **options: Any) -> str:
    """JSON that stdout can hold: letters as they are where it is UTF-8, escaped elsewhere."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf8, **options)


class TokenTimer:
    """Counts the tokens of a stream and times them. The first one comes out of the prefill."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.first = self.last = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second after the first one; 0 when there was no other."""
        return (self.num_tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0

    def watch(self, chunks: Iterable["StreamChunk"]) -> Iterator["StreamChunk"]:
        """The chunks."""
        for chunk in chunks:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.num_tokens += len(chunk.token_ids)
            yield chunk


def count_or_none(text: str) -> int | None:
    """An argument that is an integer, or "none"."""
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor none") from None


def text(value: str) -> str:
    """An argument that is not empty, as that of an unset variable is."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return value


def utf8(value: str) -> str:
    """An argument that is text, which bytes that the shell passes on as they are need not be."""
    try:
        return check_text(value, "text")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(value: str) -> Path:
    """The same of a path."""
    return Path(text(value))


def positive(text: str) -> int:
    """An argument that is an integer ≥ 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not ≥ 1")
    return value


def between(least: int, most: int) -> Callable[[str], int]:
    """An argument that is an integer from least to most."""

    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is outside its domain, expected {least} … {most}")
        return value

    parse.__name__ = "int"  # in argparse's message
    return parse


MOST_THREADS = 1024
threads = between(1, MOST_THREADS)
"""An argument that is a number of CPU threads."""


def not_negative(text: str) -> int:
    """An argument that is an integer ≥ 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not ≥ 0")
    return value


def add_counts(group: "argparse._ArgumentGroup", *flags: tuple[str, int, str]) -> None:
    """Arguments (flag, default, text) that are integers ≥ 1."""
    for flag, default, text in flags:
        group.add_argument(flag, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")


def seconds(text: str) -> float:
    """An argument that is a finite number > 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number > 0")
    return value


def nbytes(count: float) -> str:
    """Bytes for people: "13.2 MB", decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
