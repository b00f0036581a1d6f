"""What a tokenizer.json may ask of the `tokenizers` library, and what its failures become.

The library takes the file at its word: it allocates what the file says, and where memory is refused it ends the process
(an abort in Rust, which Python cannot catch). So the numbers are checked before the library sees them.
"""

import base64
import binascii
import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from based._core import Error, FormatError, parse_limit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_BYTES = 128 << 20  # a vocabulary of 256,000 words takes 35 MB
_MAX_LENGTH = 1 << 24  # tokens, of padding and truncation
_MAX_GROWTH = 1024  # times as long as the text that normalizers or decoders are given
_MAX_REPEATS = 100_000  # of a regular expression's part: each repeat is a copy of it in memory
_MAX_TEXT = 1024  # characters that a normalizer adds


def _byte_letters() -> list[str]:
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
"""The letters that stand for bytes in GPT-2's tokenizer: themselves where they can be seen, others from 256 on."""


_SAMPLE = "".join(map(chr, (*range(0x3000), *range(0x3000, 0xD800, 0x31), *range(0xE000, 0x110000, 0x101))))
"""Characters of which UTF-8 makes every byte that there is in a text."""


def read_bytes(path: Path) -> bytes:
    """The file, or its beginning when it is too long to be a tokenizer.json. Raises OSError."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return file.read(parse_limit(_MAX_BYTES) + 1)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a model's config says of its tokenizer's tokens."""

    num_tokens: int
    """The largest id, plus one."""
    end_token_id: int | None
    """Of <|endoftext|>, which stands between texts."""


def read_vocabulary(data: bytes) -> Vocabulary | None:
    """Of a tokenizer.json, without the library; None where there is no vocabulary in it."""
    try:
        document = json.loads(data)
        words = document["model"]["vocab"]  # of Unigram a list
        ids = dict(words) if isinstance(words, dict) else dict(zip((word for word, _ in words), count(), strict=False))
        ids |= {token["content"]: token["id"] for token in document.get("added_tokens") or []}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not ids or not all(type(id) is int and 0 <= id < 1 << 31 for id in ids.values()):
        return None
    return Vocabulary(max(ids.values()) + 1, ids.get("<|endoftext|>"))


def parse_tokenizer(data: bytes, where: str) -> "Tokenizer":
    """The tokenizer of a tokenizer.json. Raises FormatError, opened by `where`."""
    from tokenizers import Tokenizer

    limit = parse_limit(_MAX_BYTES)
    if len(data) > limit:
        raise FormatError(f"{where}: {len(data)} bytes or more, expected a tokenizer.json of at most {limit}")
    try:
        text = data.decode()
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a tokenizer.json: {error}") from error
    _check(document, where)
    with tokenizer_errors(f"{where}: not a tokenizer that tokenizers can read"):
        tokenizer = Tokenizer.from_str(text)
        _check_bytes(tokenizer, document, where)
        return tokenizer


class tokenizer_errors:  # noqa: N801 (used as a function)
    """A block that calls the library: its failures become FormatErrors, "what: …".

    The library raises bare Exceptions, and PanicException, which is a BaseException, where its own code gave up.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (Error, MemoryError)):
            return
        if isinstance(error, (UnicodeEncodeError, TypeError)) and "TextInputSequence" in str(error):
            raise ValueError("the text holds half of a surrogate pair, expected characters that UTF-8 has") from error
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            text = " ".join(str(error).split())
            raise FormatError(f"{self._what}: {text[:300] or type(error).__name__}") from error


def _check(document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise FormatError(f"{where}: not a tokenizer.json: found {type(document).__name__}, expected an object")
    for section, keys in (
        ("padding", ("pad_to_multiple_of",)),
        ("truncation", ("max_length", "stride")),
    ):
        values = document.get(section)
        if not isinstance(values, dict):
            continue
        numbers = {key: values.get(key) for key in keys}
        if isinstance(strategy := values.get("strategy"), dict):
            numbers["strategy.Fixed"] = strategy.get("Fixed")
        for key, value in numbers.items():
            if type(value) is int and value > _MAX_LENGTH:
                raise FormatError(f"{where}: {section}.{key}: found {value}, expected at most {_MAX_LENGTH}")
    for section in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1.0
        for part in _objects(document.get(section)):
            growth *= _growth(part, f"{where}: {section}")
            if growth > _MAX_GROWTH:
                raise FormatError(
                    f"{where}: {section}: found replacements that may make a text {growth:.0f} times as long, "
                    f"expected at most {_MAX_GROWTH}"
                )


def _check_bytes(tokenizer: "Tokenizer", document: dict[str, Any], where: str) -> None:
    """That a byte-level BPE has a token for each byte of a text: the library drops what it has none for.

    With an unknown token, or with tokens of bytes to fall back to, it drops nothing; other models raise.
    """
    model = document.get("model")
    steps = _objects([document.get("normalizer"), document.get("pre_tokenizer")])
    if not isinstance(model, dict) or not any(step.get("type") == "ByteLevel" for step in steps):
        return
    vocab = model.get("vocab")
    options = ("unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or any(map(model.get, options)) or not isinstance(vocab, dict):
        return
    if vocab.keys() >= set(BYTE_LETTERS):
        return
    # A letter that no text comes to, of a capital where all are made small, may be missing.
    text = _SAMPLE if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(_SAMPLE)
    words = (
        [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    )
    letters = set().union(*words)
    missing = [byte for byte, letter in enumerate(BYTE_LETTERS) if letter in letters and letter not in vocab]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise FormatError(
            f"{where}: model.vocab: found no token {json.dumps(BYTE_LETTERS[missing[0]])}, the letter of byte "
            f"{missing[0]}, expected one for each byte of a text, since there is no unk_token: a text would lose "
            f"{'bytes' if len(missing) > 1 else 'byte'} {', '.join(map(str, missing[:8]))}{more}"
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield value
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def _growth(part: dict[str, Any], where: str) -> float:
    """How many times as long a text may become by this component; checks its own numbers."""
    kind, pattern, growth = part.get("type"), part.get("pattern"), 1.0
    for key in ("content", "prepend"):
        text = part.get(key)
        if kind in ("Replace", "Prepend") and isinstance(text, str) and len(text) > _MAX_TEXT:
            raise FormatError(f"{where}: {key}: found {len(text)} characters, expected at most {_MAX_TEXT}")
    if isinstance(pattern, dict) and isinstance(regex := pattern.get("Regex"), str):
        repeats = 1
        for low, high in re.findall(r"\{(\d*),?(\d*)\}", regex):
            repeats *= max(int((high or low or "0")[:9]), 1)
            if repeats > _MAX_REPEATS:
                raise FormatError(f"{where}: found a pattern of {repeats} repeats, expected at most {_MAX_REPEATS}")
    if kind == "Replace" and isinstance(pattern, dict) and isinstance(content := part.get("content"), str):
        literal = pattern.get("String")
        # A regular expression may match between all characters.
        growth = max(1.0, len(content) / len(literal)) if isinstance(literal, str) and literal else 1.0 + len(content)
    if kind == "Precompiled" and isinstance(encoded := part.get("precompiled_charsmap"), str):
        _check_charsmap(encoded, where)
    return growth


def _check_charsmap(encoded: str, where: str) -> None:
    """SentencePiece's map: 4 bytes of the length of a table, the table, texts. The library reserves that length."""
    try:
        charsmap = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: precompiled_charsmap: not base64: {error}") from error
    length = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or length > len(charsmap) - 4 or length % 4:
        raise FormatError(
            f"{where}: precompiled_charsmap: found a table of {length} bytes in {len(charsmap)}, expected one that fits"
        )
