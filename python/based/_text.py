"""From tokens to text, as they come."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from based._tokenizer_json import tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 5


class IncrementalDecoder:
    """Text of a growing sequence of tokens; no piece ends in the middle of a character.

    A token's text depends on what precedes it (some tokenizers drop the first token's leading space), so each piece is
    decoded after the previous one, the first after the end of the prompt.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._set_context([int(token) for token in prompt[-_CONTEXT_TOKENS:]])
        if self._context_text.endswith(_REPLACEMENT):  # half a character: the prompt's, not ours
            self._set_context([])

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._set_context(self._pending)
        self._pending = []
        return text

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that make no character."""
        text = self._pending_text() if self._pending else ""
        self._pending = []
        return text

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._context_text) :]

    def _set_context(self, tokens: list[int]) -> None:
        self._context = tokens
        self._context_text = self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        with tokenizer_errors("the model's tokenizer failed on generated tokens"):
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class StopStringFinder:
    """Passes text on, holding back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include  # cut after the stop string, not before it
        self._held = ""

    def add(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string that was found (the earliest in the text)."""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text] if may_stop else []
        if found:
            self._held = ""
            at, stop = min(found, key=lambda match: match[0])
            return text[: at + len(stop) if self._include else at], stop
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        safe = len(text) - held
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, `stop` itself excepted."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
