"""A model's tokenizer, loaded when text is first needed."""

import json
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based._core import FormatError
from based._text import Detokenizer
from based._tokenizer_files import read_tokenizer_json
from based._tokenizer_json import parse_tokenizer, tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_REPOSITORY = "openai-community/gpt2"
GPT2_URL = f"https://huggingface.co/{GPT2_REPOSITORY}/resolve/main/tokenizer.json"
GPT2_VOCAB_SIZE = 50257
_HUB_PATIENCE = 5.0  # seconds

QUICK = 1 << 14
"""Characters, or tokens, of a prompt that takes some milliseconds to prepare."""


def read_tokenizer(path: Path) -> "Tokenizer":
    """Reads what find_tokenizer() found, which then encodes whole texts and nothing else.

    Raises OSError or FormatError.
    """
    tokenizer = parse_tokenizer(read_tokenizer_json(path), str(path))
    reset_for_whole_texts(tokenizer)
    return tokenizer


def reset_for_whole_texts(tokenizer: "Tokenizer") -> None:
    """Takes out what a tokenizer.json may keep from a training: truncation, padding, and merges left out at random."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None


def fetch_gpt2_tokenizer() -> "Tokenizer":
    """GPT-2's tokenizer, which the published models use, from the hub's cache or the hub. Raises OSError.

    A hub that is out of reach costs one request: hf_hub_download by itself would try for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    if (found := cached_gpt2_tokenizer()) is not None:
        return found
    try:
        if not _is_offline():
            get_hf_file_metadata(hf_hub_url(GPT2_REPOSITORY, "tokenizer.json"), timeout=_HUB_PATIENCE)
        path = hf_hub_download(GPT2_REPOSITORY, "tokenizer.json")
    except Exception as error:  # whatever httpx, the hub and the cache raise
        raise OSError(
            f"this model's directory has no tokenizer.json, and GPT-2's could not be fetched from the hub "
            f"({GPT2_REPOSITORY}): {error}. Give prompts as token ids, or a tokenizer.json: load(..., tokenizer=path), "
            f"--tokenizer FILE. Published models ship none and use GPT-2's: {GPT2_URL}"
        ) from error
    return read_tokenizer(Path(path))


def cached_gpt2_tokenizer() -> "Tokenizer | None":
    """The same from the hub's cache, or None when it is not there. Asks nobody. Raises FormatError."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(GPT2_REPOSITORY, "tokenizer.json")
    return read_tokenizer(Path(path)) if isinstance(path, str) else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class LazyTokenizer:
    """Loads once, in whichever thread asks first."""

    def __init__(
        self, load: "Callable[[], Tokenizer] | None", load_at_hand: "Callable[[], Tokenizer | None] | None" = None
    ) -> None:
        """load: None when the model has none. load_at_hand: the same without the network, or None; by default load."""
        self._load = load
        self._load_at_hand = load_at_hand or load
        self._tokenizer: Tokenizer | None = None
        self._detokenizer: Detokenizer | None = None
        self._encoders: dict[tuple[bool, bool], Tokenizer] = {}
        self._failed = False
        self._lock = threading.Lock()
        _alive.add(self)

    @property
    def is_loaded(self) -> bool:
        """Whether get() returns at once."""
        return self._tokenizer is not None or self._load is None

    def get(self) -> "Tokenizer | None":
        """The tokenizer, None if the model has none. Raises OSError or FormatError when it cannot be read."""
        with self._lock:
            if self._tokenizer is None and self._load is not None:
                self._tokenizer = self._load()
            return self._tokenizer

    def require(self, purpose: str) -> "Tokenizer":
        """As get, but raises ValueError if the model has none."""
        tokenizer = self.get()
        if tokenizer is None:
            raise ValueError(
                f"{purpose} needs a tokenizer and this model has none: its directory holds no tokenizer.json. "
                f"Give token ids, or a tokenizer.json: load(..., tokenizer=path), --tokenizer FILE"
            )
        return tokenizer

    def encode(self, text: str, *, at_start: bool, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Raises ValueError if the model has no tokenizer, OSError or FormatError as get.

        at_start: the text begins its sequence, so that the tokenizer puts its start token and prefix space before it.
            Otherwise it goes on in the middle of a word, if need be.
        split_special_tokens: a special token's text is letters like any other.
        """
        tokenizer = self.require("a text prompt")
        with tokenizer_errors("the model's tokenizer failed on a text"):
            return self._encode(tokenizer, text, at_start, split_special_tokens)

    def _encode(self, tokenizer: "Tokenizer", text: str, at_start: bool, split_special_tokens: bool) -> list[int]:
        encoder = self._encoder(tokenizer, at_start, split_special_tokens)
        if at_start or encoder is tokenizer:
            return _ids(encoder, text, add_special_tokens=at_start)
        # The prefix space is missing before `text` only: a special token in it is followed by one as usual.
        usual = self._encoder(tokenizer, True, split_special_tokens)
        encoding = usual.encode(text, add_special_tokens=False)
        added = usual.get_added_tokens_decoder()
        first = next((i for i, id in enumerate(encoding.ids) if id in added and not split_special_tokens), None)
        if first is None:
            return _ids(encoder, text, add_special_tokens=False)
        before = text[: encoding.offsets[first][0]]
        return [*_ids(encoder, before, add_special_tokens=False), *encoding.ids[first:]]

    def detokenizer(self) -> Detokenizer | None:
        """How tokens become text; None if the model has no tokenizer. Raises as get."""
        tokenizer = self.get()
        if tokenizer is not None and self._detokenizer is None:
            self._detokenizer = Detokenizer(tokenizer)
        return self._detokenizer

    def detokenizer_or_warn(self) -> Detokenizer | None:
        """As detokenizer, for text that nobody asked for: asks no hub. If there is none, warns once and gives None."""
        if self._failed or self._load_at_hand is None:
            return self._detokenizer
        try:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._load_at_hand()
            if self._tokenizer is not None:
                return self.detokenizer()
            problem = "this model's directory has no tokenizer.json, and GPT-2's is not in the hub's cache"
        except (OSError, FormatError) as error:
            problem = str(error)
        self._failed = True
        warnings.warn(f"generated text will be empty: {problem}", RuntimeWarning, stacklevel=2)
        return None

    def _encoder(self, tokenizer: "Tokenizer", at_start: bool, split_special_tokens: bool) -> "Tokenizer":
        """The tokenizer, or a copy that differs in what is asked for."""
        from tokenizers import Tokenizer

        with self._lock:
            key = at_start, split_special_tokens
            if key not in self._encoders:
                description = json.loads(tokenizer.to_str())
                changed = not at_start and _drop_prefix(description)
                copy = tokenizer
                if changed or split_special_tokens:
                    copy = Tokenizer.from_str(json.dumps(description))
                    copy.encode_special_tokens = split_special_tokens
                self._encoders[key] = copy
            return self._encoders[key]


# By the type of a step: what it does to the space before a text, and the value with which it does nothing.
_WITHOUT_PREFIX: dict[str, tuple[str, Any]] = {
    "Prepend": ("prepend", ""),
    "Strip": ("strip_left", False),
    "Metaspace": ("prepend_scheme", "never"),
    "ByteLevel": ("add_prefix_space", False),
}


def _drop_prefix(description: dict[str, Any]) -> bool:
    """Takes what adds or removes a space before a text out of a tokenizer.json; whether there was something."""
    changed = False
    for key in ("normalizer", "pre_tokenizer"):
        steps: list[dict[str, Any]] = [description[key]] if description.get(key) else []
        for step in steps:  # grows
            kind = step["type"]
            if kind == "Sequence":
                steps += step["normalizers" if key == "normalizer" else "pretokenizers"]
            elif kind in _WITHOUT_PREFIX:
                option, value = _WITHOUT_PREFIX[kind]
                changed |= step[option] != value
                step[option] = value
    return changed


def _ids(tokenizer: "Tokenizer", text: str, *, add_special_tokens: bool) -> list[int]:
    if len(text) > QUICK:  # a batch lets other threads run Python; encode() does not
        return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


_alive: "weakref.WeakSet[LazyTokenizer]" = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """In a forked child, the thread that was loading is not there to finish."""
    for tokenizer in _alive:
        tokenizer._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)
