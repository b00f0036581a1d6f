"""Answer a file of prompts: lines of OpenAI's batches, or lines like {"prompt": "Once upon a time", "max_tokens": 20}.

A line of OUTPUT is the answer to one of INPUT, as it comes; --in-order keeps their order. A line that is wrong has an
error for an answer. OUTPUT is never written anew: the same command goes on where an earlier one ended, however that one
ended, and answers no line twice. A pipe or a device as OUTPUT is written from its beginning, and - is stdout.
"""

import argparse
import asyncio
import codecs
import contextlib
import fcntl
import itertools
import json
import os
import re
import stat
import sys
import zlib
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from based.cli import UsageError, _common

if TYPE_CHECKING:
    from based import Engine, Model, State

_URL = "/v1/completions"
_ENVELOPE = dict.fromkeys(("custom_id", "method", "url", "body"))  # of a line of OpenAI's
_LONGEST_LINE = 64 << 20  # bytes
_LONGEST_ANSWER = 1 << 30  # bytes
_ANSWER_HEADS = b'{"line":', b'{"id":"batch_req_'  # with which the two kinds of answers begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("input", type=_common.text, metavar="INPUT", help="JSON lines; - is stdin")
    parser.add_argument(
        "output", type=_common.path, metavar="OUTPUT", help="JSON lines, which are added to; - is stdout"
    )
    _common.add_model_arguments(parser)
    _common.add_compute_arguments(parser)
    parser.add_argument(
        "--max-batch-size",
        type=_common.positive,
        metavar="N",
        help="samples at once (default: 1,024 on a GPU and 32 on the CPU, or as many as memory holds)",
    )
    parser.add_argument("--in-order", action="store_true", help="answers in the order of the lines")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="of every N lines the I-th, 1/N to N/N"
    )
    _common.add_statistics_argument(parser)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard, expected 1/4 … 4/4, for example")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.input != "-":
        source: BinaryIO = open(args.input, "rb")  # noqa: SIM115 # closed below
    elif sys.stdin is None:
        raise UsageError("-: there is no stdin")
    else:
        source = sys.stdin.buffer
    with source, _Output(args.output) as output:
        if output.is_file(source):
            raise UsageError(f"{args.input} and {args.output} are one file: expected another for the answers")
        output.read()
        model = _common.load_model(args)
        wanted = _common.wants_statistics(args)
        with model.engine(args.max_batch_size) as engine, _Progress(source, wanted) as progress:
            name = "stdin" if args.input == "-" else args.input
            lines = _lines(source, name, output, args.shard)
            asyncio.run(_Batch(model, args.model, engine, output, progress, in_order=args.in_order).run(lines))
            output.cut()
        if wanted:
            print(progress.summary(output.num_before), file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line that is to be answered."""

    number: int  # 1, 2, …
    checksum: int
    data: bytes


def _lines(source: BinaryIO, name: str, output: "_Output", shard: tuple[int, int]) -> Iterator[_Line]:
    """The lines of this shard that have no answer yet. Raises ValueError where another file was answered."""
    for number in itertools.count(1):
        data = source.readline(_LONGEST_LINE + 1)
        if not data:
            break
        if len(data) > _LONGEST_LINE:
            raise ValueError(f"{name}: line {number} has more than {_LONGEST_LINE} bytes")
        data = data.rstrip(b"\r\n")
        checksum = zlib.crc32(data)
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if (number - shard[0]) % shard[1] or not data.strip():
            continue
        answered = output.answered(number)
        if answered is None:
            yield _Line(number, checksum, data)
        elif answered != checksum:
            raise ValueError(
                f"{output.path} has the answer to another line {number} than {name}: expected the file that it was "
                "begun with. Name another OUTPUT, or remove it"
            )


class _Output:
    """The answers: what a file holds already, and what is added. One process at a time.

    A pipe, a device or stdout is only written.
    """

    def __init__(self, path: Path) -> None:
        """Opens it, and changes nothing. Raises OSError, and ValueError when it cannot be an output."""
        self.path = path
        self.num_before = 0
        self._checksums = array("q")  # by line; −1: no answer
        self._whole: int | None = None  # bytes of whole lines, where a part of a line is behind them
        self._is_stdout = str(path) == "-"
        self._file: BinaryIO
        self._resumes = False
        if self._is_stdout:
            self._file = sys.stdout.buffer
            return
        # What is no regular file may have no end, or none that it gives back.
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if stat.S_ISBLK(mode):
            raise ValueError(f"{path} is a disk: expected a file, a pipe or a character device for the answers")
        access = os.O_RDWR | os.O_CREAT | os.O_APPEND if stat.S_ISREG(mode) else os.O_WRONLY
        self._file = os.fdopen(os.open(path, access, 0o666), "r+b" if stat.S_ISREG(mode) else "wb", buffering=0)
        self._resumes = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        try:
            if self._resumes:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another `based batch` is writing it") from None

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_stdout:
            return
        with contextlib.suppress(OSError):  # of a pipe, say
            os.fsync(self._file.fileno())
        self._file.close()

    def is_file(self, source: BinaryIO) -> bool:
        """Whether both are one regular file."""
        try:
            found, other = os.fstat(self._file.fileno()), os.fstat(source.fileno())
        except OSError:  # a stream without a descriptor
            return False
        return stat.S_ISREG(found.st_mode) and os.path.samestat(found, other)

    def read(self) -> None:
        """Finds what is answered. Raises OSError, and ValueError when the file holds something else.

        A last line without an end, of a process that was killed, is no answer: see cut().
        """
        if not self._resumes:
            return
        self._file.seek(0)
        end = 0
        lines = open(self._file.fileno(), "rb", closefd=False)  # noqa: SIM115
        for index in itertools.count(1):
            line = lines.readline(1 << 12)
            if line.lstrip().startswith(b"{") and not line.endswith(b"\n"):  # anything else is no answer
                line += lines.readline(_LONGEST_ANSWER + 1 - len(line))
            if not line:
                return
            if len(line) > _LONGEST_ANSWER:
                raise self._no_answer(index, f" of at most {_LONGEST_ANSWER} bytes")
            if not line.endswith(b"\n"):
                if not self.num_before and not any(line.startswith(h) or h.startswith(line) for h in _ANSWER_HEADS):
                    raise self._no_answer(index)
                self._whole = end
                return
            end += len(line)
            try:
                answer = json.loads(line)
                number, checksum = answer["line"], int(answer["checksum"], 16)
                if not isinstance(number, int) or number < 1 or not 0 <= checksum < 1 << 32:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._no_answer(index) from None
            self._mark(number, checksum)
            self.num_before += 1

    def _no_answer(self, index: int, bound: str = "") -> ValueError:
        return ValueError(
            f"{self.path}: line {index} is no answer of `based batch`{bound}: expected a file of its answers, or "
            "another OUTPUT"
        )

    def cut(self) -> None:
        """Takes off a last line without an end. Raises OSError."""
        if self._whole is not None:
            os.ftruncate(self._file.fileno(), self._whole)
            self._whole = None

    def _mark(self, number: int, checksum: int) -> None:
        if number > len(self._checksums):
            self._checksums.extend([-1] * (max(number, 2 * len(self._checksums)) - len(self._checksums)))
        self._checksums[number - 1] = checksum

    def answered(self, number: int) -> int | None:
        """The checksum of the line that this answers; None: there is no answer."""
        found = self._checksums[number - 1] if number <= len(self._checksums) else -1
        return None if found < 0 else found

    def write(self, line: bytes) -> None:
        """Adds a whole line. Raises OSError."""
        self.cut()
        data = memoryview(line)
        while data:
            data = data[self._file.write(data) :]
        self._file.flush()


class _Progress:
    """A bar on stderr: bytes of the input that are answered, tokens per second."""

    def __init__(self, source: BinaryIO, shown: bool) -> None:
        self.num_lines = self.num_failed = self.num_tokens = 0
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            size = os.fstat(source.fileno()).st_size or None
            self._bar = tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr, miniters=0)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, line: _Line, num_tokens: int | None) -> None:
        """Counts an answer. num_tokens: None: it is an error."""
        self.num_lines += 1
        self.num_failed += num_tokens is None
        self.num_tokens += num_tokens or 0
        if self._bar is not None:
            rate = self.num_tokens / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{self.num_lines} lines, {rate:.1f} tokens/s", refresh=False)
            self._bar.update(len(line.data) + 1)

    def summary(self, num_before: int) -> str:
        """What was done."""
        before = f" ({num_before} were answered before)" if num_before else ""
        failed = f", {self.num_failed} of them with an error" if self.num_failed else ""
        return f"{self.num_lines} lines answered{failed}{before}; {self.num_tokens} tokens generated"


class _Batch:
    """Answers lines, some ahead of those that run."""

    def __init__(
        self, model: "Model", name: str, engine: "Engine", output: _Output, progress: _Progress, *, in_order: bool
    ) -> None:
        self._model, self._name, self._engine = model, name, engine
        self._output, self._progress = output, progress
        self._in_order = in_order
        # Lines under way, and answers that wait for their turn.
        self._room = asyncio.Semaphore(2 * engine.stats().max_batch_size)
        self._early: dict[int, tuple[_Line, bytes, int | None]] = {}
        self._order: deque[int] = deque()  # lines that were begun and are not written, where order is kept

    async def run(self, lines: Iterator[_Line]) -> None:
        """Until all are answered. Raises what a line's answer cannot say: OSError, and the engine's end."""

        async def answer(line: _Line) -> None:
            self._finish(line, *await self._answer(line))

        try:
            async with asyncio.TaskGroup() as group:
                async for line in _in_thread(lines):
                    await self._room.acquire()
                    if self._in_order:
                        self._order.append(line.number)
                    group.create_task(answer(line))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _finish(self, line: _Line, answer: bytes, num_tokens: int | None) -> None:
        if not self._in_order:
            self._write(line, answer, num_tokens)
            return
        self._early[line.number] = line, answer, num_tokens
        while self._order and self._order[0] in self._early:
            self._write(*self._early.pop(self._order.popleft()))

    def _write(self, line: _Line, answer: bytes, num_tokens: int | None) -> None:
        self._output.write(answer)
        self._progress.add(line, num_tokens)
        self._room.release()

    async def _answer(self, line: _Line) -> tuple[bytes, int | None]:
        """The line of the output, and how many tokens were generated."""
        from based.server._bodies import parse_object
        from based.server._errors import ApiError, invalid, to_json

        custom_id: Any = None
        is_openai = False
        num_tokens: int | None = None
        status = 200
        try:
            body = parse_object(line.data)
            custom_id = body.pop("custom_id", None)
            is_openai = "body" in body or "url" in body
            if is_openai:
                body = _body_of(body)
            found, count = await self._complete(line, body)
            if len(found) > _LONGEST_ANSWER // 2:  # with a long custom_id before it, it can still be read again
                raise ValueError(
                    f"the answer has {len(found)} bytes, expected at most {_LONGEST_ANSWER // 2}: ask for fewer "
                    "samples or log-probabilities"
                )
            num_tokens = count
        except ApiError as error:
            status, found = error.status, to_json(error.body())
        except (ValueError, TypeError, MemoryError) as error:
            status, found = 400, to_json(invalid(str(error)).body())
        head: dict[str, Any] = {"line": line.number, "checksum": f"{line.checksum:08x}"}
        if not is_openai:
            if custom_id is not None:
                head["custom_id"] = custom_id
            return b"%s,%s\n" % (to_json(head)[:-1], found[1:]), num_tokens
        head = {"id": f"batch_req_{line.number}", "custom_id": custom_id, "error": None} | head
        response = to_json({"status_code": status, "request_id": f"line_{line.number}"})
        return b'%s,"response":%s,"body":%s}}\n' % (to_json(head)[:-1], response[:-1], found), num_tokens

    async def _complete(self, line: _Line, body: dict[str, Any]) -> tuple[bytes, int]:
        """The answer's body, and how many tokens were generated.

        Raises ApiError, ValueError, TypeError and MemoryError.
        """
        from based import EngineBusyError
        from based.server._answers import Answer, Usage
        from based.server._errors import invalid
        from based.server._options import Limits
        from based.server._requests import read_completion
        from based.server._scoring import echoed_logprobs

        def no_state(_: str, param: str) -> "State":
            raise invalid(f"{param}: a batch has no states to go on from", param=param)

        for field in ("stream", "save_state"):
            if body.get(field):
                raise invalid(f"{field} is for a server: leave it out", param=field)
        most = 1 << 30
        limits = Limits(prompts=most, n=most, logprobs=most)
        name = body.get("model")
        completion = await asyncio.to_thread(
            read_completion, body, self._model, name if isinstance(name, str) else self._name, limits, no_state
        )
        echoed = await echoed_logprobs(self._model, completion, asyncio.to_thread)
        usage = Usage()
        usage.prompt_tokens = sum(len(prompt.token_ids) for prompt in completion.prompts)
        requests = []
        for prompt in completion.prompts if completion.max_tokens else ():
            while True:
                try:
                    requests.append(
                        self._engine.submit(
                            prompt.token_ids,
                            completion.params,
                            priority=completion.priority,
                            timeout=completion.timeout,
                            every_token=bool(completion.params.stop),
                        )
                    )
                    break
                except EngineBusyError:  # a line may have more prompts than a queue
                    await asyncio.sleep(0.05)
        outputs = [await request.wait() for request in requests]
        usage.cached_tokens = sum(request.num_cached_tokens or 0 for request in requests)
        usage.completion_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        answer = Answer(completion, self._model, self._name, f"line_{line.number}", echoed)
        return answer.whole(outputs, usage, None), usage.completion_tokens


def _body_of(line: dict[str, Any]) -> dict[str, Any]:
    """The completion that a line of OpenAI's asks for. Raises ApiError."""
    from based.server._bodies import check_fields, describe
    from based.server._errors import invalid

    check_fields(line, _ENVELOPE)
    for field, expected in (("method", "POST"), ("url", _URL)):
        if (found := line.get(field, expected)) != expected:
            shown = found if isinstance(found, str) and len(found) <= 100 else describe(found)
            raise invalid(f"{field} is {shown}, expected {expected}", param=field)
    body = line.get("body")
    if not isinstance(body, dict):
        raise invalid(f"body is {describe(body)}, expected an object", param="body")
    return body


async def _in_thread(lines: Iterator[_Line]) -> AsyncIterator[_Line]:
    """The lines, read in a thread: stdin may take its time."""
    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line
