"""The command line: `based COMMAND`, of which COMMANDS has the list.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted,
141 the reader of stdout went away, 143 terminated while training,
75 `recall` reached its time limit.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from based._text import printable

COMMANDS = {
    "generate": "continue a prompt",
    "demo": "a tour: completion, recall, saved and forked states, costs",
    "convert": "translate a published model into a model directory",
    "inspect": "show a model's shape, size, and bytes of state per sequence",
    "tokenize": "turn text into token ids, and back",
    "perplexity": "measure how well a model predicts a text",
    "bench": "measure prefill and decoding speed",
    "train": "train a model, or go on with it",
    "recall": "measure recall over bytes of state: the recall frontier",
    "batch": "answer a file of prompts",
    "eval": "measure a model with lm-evaluation-harness",
    "serve": "answer completions over HTTP",
}
"""Subcommand, which is the module of this package that has it, and its line of help."""


class UsageError(Exception):
    """Arguments that contradict each other or the domain of a value; what argparse itself cannot see."""


class _CommandParser(argparse.ArgumentParser):
    """Imports its subcommand's module when it is first used, so that `based --help` imports nothing."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        command = self.prog.rsplit(" ", 1)[-1]
        module = importlib.import_module(f"based.cli.{command}")
        part = args[0] if args else None
        if part in (parts := getattr(module, "PARTS", {})):  # such as `based bench serve`
            module = importlib.import_module(parts[part])
            self.prog += f" {part}"
            args = args[1:]
        self.description = module.__doc__
        module.add_arguments(self)
        self.set_defaults(run=module.run, parser=self)
        self.add_argument("--debug", action="store_true", help="show where in the code an error comes from")
        return super().parse_known_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse takes the value of --stop=-- for the separator "--" (Python 3.11 and 3.12).
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="based", description="Runtime for BASED language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from based import __version__

        print(f"based {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. argv: without the program's name; None for the process's own."""
    with _usable_streams():
        return _main(argv)


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """A closed stdout or stderr is /dev/null; what the encoding of stdout lacks is written as an escape."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _main(argv: Sequence[str] | None) -> int:
    debug = False
    options: Mapping[str, str] = {}
    showwarning = warnings.showwarning
    try:
        args = _make_parser().parse_args(argv)
        debug, options = args.debug, _options(args.parser)

        def show(message: Any, *_: Any, **__: Any) -> None:
            print("based: warning:", printable(_in_options(str(message), options), keep="\n"), file=sys.stderr)

        warnings.showwarning = show
        try:
            args.run(args)
        except UsageError as error:
            args.parser.error(_in_options(str(error), options))
        finally:
            warnings.showwarning = showwarning
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse's: 0 after --help, 2 after a wrong argument
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is left in the buffer has nowhere to go; flushing it at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        print("based: error:", printable(_describe(error, options), keep="\n"), file=sys.stderr)
        return 1


def _describe(error: Exception, options: Mapping[str, str]) -> str:
    """One line: what str() makes of it, without OSError's "[Errno 2]", or its type when that says nothing."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return where + " ".join(error.strerror.split())
    return _in_options(" ".join(str(error).split()), options) or type(error).__name__


def _options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The options of a command by the names of the library's arguments."""
    options = {action.dest: max(action.option_strings, key=len) for action in parser._actions if action.option_strings}
    if "threads" in options:
        options["num_threads"] = options["threads"]
    return options


def _in_options(message: str, options: Mapping[str, str]) -> str:
    """A message of the library with its arguments as they are typed here: --max-tokens for max_tokens.

    A name that is also a word stands for the argument at the beginning only, where the message says what is wrong.
    """
    message = message.removeprefix("SamplingParams: ").replace("load(..., tokenizer=path)", "--tokenizer FILE")
    for name, option in options.items():
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./])", option, message)
        elif name in ("device", "dtype"):
            message = re.sub(rf"\b{name}='([\w:]*)'", rf"{option} \1", message)
        message = re.sub(rf"^{name}(?=: |\[| is | must | = )", option, message)
    return message
