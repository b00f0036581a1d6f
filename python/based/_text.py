"""From tokens to text, as they come, and text for a terminal."""

import codecs
import functools
import json
from collections.abc import Collection, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from based._tokenizer_json import BYTE_LETTERS, tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 5
_MAX_CHARACTER_BYTES = 4


def printable(text: str, keep: str = "") -> str:
    """The text with what is no letter or sign as an escape: a terminal obeys control characters in names of files."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class Detokenizer:
    """What a tokenizer's tokens say. Found out once for a tokenizer, and shared by all texts that are decoded."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.special = {
            id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        kinds = set(_decoder_kinds(tokenizer))
        self.is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        """Each token stands for bytes, whatever precedes it; the text is these bytes as UTF-8."""
        self.may_cut_characters = "ByteLevel" in kinds
        """A token may end inside a character."""
        self.fallback_bytes: dict[int, int] = {}
        """The tokens that stand for one byte each, among others that stand for text."""
        if "ByteFallback" in kinds:
            for byte in range(256):
                for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"):
                    if (token := tokenizer.token_to_id(name)) is not None:
                        self.fallback_bytes[token] = byte
        self._token_bytes: dict[int, bytes] = {}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token. Only where is_byte_level."""
        found = self._token_bytes.get(token)
        if found is None:
            name = self.tokenizer.id_to_token(token) or ""
            known = all(letter in _BYTES for letter in name)
            found = bytes(_BYTES[letter] for letter in name) if known else name.encode()
            self._token_bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """The text of one token in the middle of a text, U+FFFD for parts of characters; special tokens too."""
        if self.is_byte_level:
            return self.token_bytes(token).decode(errors="replace")
        return self.decode([*self.anchor, token])[len(self.anchor_text) :]

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        """What the tokenizer says."""
        with tokenizer_errors("the model's tokenizer failed on tokens"):
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    @functools.cached_property
    def anchor(self) -> list[int]:
        """A token that stands for text before: some decoders strip the space of a text's first token."""
        vocabulary = self.tokenizer.get_vocab()
        letters = (id for token, id in sorted(vocabulary.items()) if token.isascii() and token.isalpha())
        others = (id for id in sorted(vocabulary.values()) if id not in self.special and id not in self.fallback_bytes)
        for ids in (letters, others):
            for id in ids:
                text = self.decode([id])
                if text and text == text.strip() and _REPLACEMENT not in text:
                    return [id]
        return []

    @functools.cached_property
    def anchor_text(self) -> str:
        """The anchor's."""
        return self.decode(self.anchor)

    def holds_special(self, text: str) -> bool:
        """Whether a special token's text is part of this one."""
        return any(content in text for content in self.special.values())


def _decoder_kinds(tokenizer: "Tokenizer") -> list[str]:
    """The decoder's steps: the "type" of each in tokenizer.json."""

    def kinds(step: dict[str, Any]) -> list[str]:
        if step["type"] == "Sequence":
            return [kind for part in step["decoders"] for kind in kinds(part)]
        return [step["type"]]

    return [] if tokenizer.decoder is None else kinds(json.loads(tokenizer.decoder.__getstate__()))


_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


class IncrementalDecoder:
    """Text of a growing sequence of tokens, in constant time per token; no piece ends in the middle of a character.

    Bytes are read as a streaming UTF-8 decoder reads them: at most 3 of them wait for the rest of their character, and
    those that make no character are shown as U+FFFD. A token's text may depend on what precedes it (some tokenizers
    drop the first token's leading space), so it is decoded after the tokens before it, the first ones of the prompt.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer | Detokenizer",
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        at_start: bool = True,
    ) -> None:
        """at_start: the prompt is all that there is before, not the last part of a longer text."""
        self._of = tokenizer if isinstance(tokenizer, Detokenizer) else Detokenizer(tokenizer)
        self._hidden = self._of.special if skip_special_tokens else {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # of byte-level tokens
        self._pending: list[int] = []  # tokens of an unfinished character
        if not self._of.is_byte_level:
            self._begin(prompt, at_start)

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        if token in self._hidden:
            return ""
        if self._of.is_byte_level:
            return self._utf8.decode(self._of.token_bytes(token))
        if token in self._of.fallback_bytes:
            self._pending.append(token)
            return self._take_bytes(final=False)
        text = self._take_bytes(final=True) if self._of.fallback_bytes else ""
        self._pending.append(token)
        return text + self._take_tokens(final=False)

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that make no character."""
        if self._of.is_byte_level:
            return self._utf8.decode(b"", True)
        return self._take_bytes(final=True) if self._of.fallback_bytes else self._take_tokens(final=True)

    def _take_bytes(self, *, final: bool) -> str:
        """Text of the pending byte tokens. The tokenizer would make U+FFFD of all bytes in a row if one is wrong."""
        text = ""
        while self._pending:
            try:
                bytes(self._of.fallback_bytes[token] for token in self._pending).decode()
                text += self._behind_context(self._pending)
                self._pending = []
            except UnicodeDecodeError as error:  # no character is complete: one would have been taken
                if error.reason == "unexpected end of data" and not final:
                    return text
                text += _REPLACEMENT
                del self._pending[: error.end]
            self._is_start = False
            self._set_context([])  # not these bytes: they would be one row with the next ones
        return text

    def _take_tokens(self, *, final: bool) -> str:
        """Text of the pending tokens, which may end inside a character if the tokenizer's may."""
        text = ""
        while self._pending:
            count = len(self._pending)
            if self._of.may_cut_characters and not final and self._behind_context(self._pending).endswith(_REPLACEMENT):
                if count < _MAX_CHARACTER_BYTES:
                    break
                count = 1  # this one is no part of a character that goes on
            text += self._behind_context(self._pending[:count])
            self._set_context(self._context + self._pending[:count])
            del self._pending[:count]
        return text

    def _behind_context(self, tokens: list[int]) -> str:
        return self._decode(self._before + self._context + tokens)[len(self._context_text) :]

    def _begin(self, prompt: Sequence[int], at_start: bool) -> None:
        """Takes the prompt's last tokens as context, as far as they are text."""
        context: list[int] = []
        self._is_start = at_start and len(prompt) <= 8 * _CONTEXT_TOKENS  # not many special tokens are gone through
        for token in reversed(prompt[-8 * _CONTEXT_TOKENS :]):
            if int(token) in self._of.fallback_bytes:
                self._is_start = False
                break
            if int(token) not in self._hidden:
                context.insert(0, int(token))
        self._set_context(context)
        if self._of.may_cut_characters and self._context_text.endswith(_REPLACEMENT):
            self._is_start = False
            self._set_context([])  # half a character: the prompt's, not ours

    def _set_context(self, tokens: list[int]) -> None:
        self._is_start &= len(tokens) <= _CONTEXT_TOKENS
        self._context = tokens[-_CONTEXT_TOKENS:]
        self._before = [] if self._is_start else self._of.anchor
        self._context_text = self._decode(self._before + self._context)

    def _decode(self, tokens: list[int]) -> str:
        return self._of.decode(tokens, skip_special_tokens=bool(self._hidden))


class StopStringFinder:
    """Passes text on, holding back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool, with_hidden: Collection[str] = ()) -> None:
        """with_hidden: the stop strings that are looked for in the text with what is hidden in it."""
        self._stops = stops
        self._include = include  # cut after the stop string, not before it
        self._with_hidden = with_hidden
        self._held = ""
        self._shown: list[bool] = []  # of each letter of _held

    def add(self, text: str, *, may_stop: bool, hidden: str = "") -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string that was found (the earliest in the text).

        hidden: a special token's text, behind `text`, that is not to be shown.
        """
        if not self._stops:
            return text, None
        self._held += text + hidden
        self._shown += [True] * len(text) + [False] * len(hidden)
        visible = self._visible(0, len(self._held))
        found = []
        for stop in self._stops if may_stop else ():
            searched = self._held if stop in self._with_hidden else visible
            if (at := searched.find(stop)) >= 0:
                found.append((self._visible(0, at) if stop in self._with_hidden else visible[:at], stop))
        if found:
            self._held, self._shown = "", []
            before, stop = min(found, key=lambda match: len(match[0]))
            return before + stop if self._include else before, stop
        # Letters of _held from `safe` on may begin a stop string.
        safe = len(self._held) - max((_overlap(self._held, stop) for stop in self._with_hidden), default=0)
        kept = max((_overlap(visible, stop) for stop in self._stops if stop not in self._with_hidden), default=0)
        while sum(self._shown[safe:]) < kept:
            safe -= 1
        text = self._visible(0, safe)
        self._held, self._shown = self._held[safe:], self._shown[safe:]
        return text, None

    def flush(self) -> str:
        """What was held back."""
        text = self._visible(0, len(self._held))
        self._held, self._shown = "", []
        return text

    def _visible(self, begin: int, end: int) -> str:
        return "".join(compress(self._held[begin:end], self._shown[begin:end]))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, `stop` itself excepted."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
