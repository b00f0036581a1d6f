"""From text to token ids while training: bytes, or a tokenizer.json."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from based._core import FormatError
from based._loading import find_tokenizer
from based._tokenizer import read_tokenizer, reset_for_whole_texts
from based._tokenizer_files import find_tokenizer as find_tokenizer_file
from based._tokenizer_json import BYTE_LETTERS, tokenizer_errors
from based.torch.train.config import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = np.ndarray[Any, Any]

_BLOCK = 1 << 18  # tokens that are decoded at a time


class Encoder(ABC):
    """What the run's tokenizer makes of documents."""

    vocab_size: int
    end_token_id: int
    start_token_ids: tuple[int, ...] = ()
    """What the tokenizer puts before a text, as it does before a prompt: a document begins with it."""
    json: bytes
    """tokenizer.json, for the model directory."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without start and end: one that the text spells out is letters like any other."""

    @abstractmethod
    def nbytes(self, ids: Ids) -> int:
        """Of the text that the ids stand for."""


class ByteEncoder(Encoder):
    """A token per byte of UTF-8, whose id is the byte; 256 ends a document."""

    def __init__(self, end_token: str) -> None:
        self.vocab_size, self.end_token_id = 257, 256
        self.json = byte_tokenizer(end_token).to_str().encode()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The bytes."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def nbytes(self, ids: Ids) -> int:
        """One each."""
        return len(ids)


class FileEncoder(Encoder):
    """A tokenizer.json."""

    def __init__(self, tokenizer: "Tokenizer", end_token: str, where: str) -> None:
        end = tokenizer.token_to_id(end_token)
        if end is None:
            raise FormatError(f"data.end_token: {where} has no token {end_token!r}")
        self.vocab_size, self.end_token_id = max(tokenizer.get_vocab().values()) + 1, end  # ids may have holes
        reset_for_whole_texts(tokenizer)
        self.start_token_ids, ends = _added(tokenizer, where)
        if ends:  # a document ends with the end token; a prompt that a model goes on with does not
            _add_only(tokenizer, self.start_token_ids)
        self.json = tokenizer.to_str().encode()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """What the tokenizer says."""
        with tokenizer_errors("the tokenizer failed on a document"):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def nbytes(self, ids: Ids) -> int:
        """Of what the tokenizer makes of the ids, some at a time."""
        blocks = (ids[start : start + _BLOCK].tolist() for start in range(0, len(ids), _BLOCK))
        return sum(len(self._tokenizer.decode(block, skip_special_tokens=False).encode()) for block in blocks)


def _added(tokenizer: "Tokenizer", where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the post-processor puts before a text and after it."""
    for text in ("a", "0", "."):
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode(text).ids
        for start in range(len(whole) - len(plain) + 1):
            end = start + len(plain)
            if plain and whole[start:end] == plain:
                return tuple(whole[:start]), tuple(whole[end:])
    raise FormatError(f"{where}: its post-processor changes the tokens of a text, expected tokens before and after it")


def _add_only(tokenizer: "Tokenizer", start: tuple[int, ...]) -> None:
    """Replaces the post-processor by one that puts these tokens before a text."""
    from tokenizers.processors import TemplateProcessing

    names = [tokenizer.id_to_token(token) for token in start]
    tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(dict(zip(names, start, strict=True)).items())
    )


def make_encoder(config: Config) -> Encoder | None:
    """The run's tokenizer; None for sources of token ids. Raises OSError, FormatError."""
    name, data = config.data.tokenizer, config.data
    if name == "none":
        return None
    if name == "bytes":
        return ByteEncoder(data.end_token)
    if name is not None:
        path = find_tokenizer_file(config.path(name), config.path(name))
        return FileEncoder(read_tokenizer(path), data.end_token, str(path))
    source = model_source(config)
    tokenizer = find_tokenizer(source).get()
    if tokenizer is None:
        raise FormatError(f"data.tokenizer: missing, and {source} has none: expected a tokenizer.json, or none")
    return FileEncoder(tokenizer, data.end_token, str(source))


def model_source(config: Config) -> Path | str:
    """What model.from names: a directory if there is one, otherwise a name at the hub."""
    assert config.model.from_ is not None
    path = config.path(config.model.from_)
    return path if path.exists() else config.model.from_


def byte_tokenizer(end_token: str) -> "Tokenizer":
    """A tokenizer of 256 bytes, whose ids they are, and an end token, 256."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(BYTE_LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
    return tokenizer
