"""A model's tokenizer, loaded when text is first needed."""

import os
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from based._core import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_REPOSITORY = "openai-community/gpt2"
GPT2_VOCAB_SIZE = 50257
_HUB_PATIENCE = 5.0  # seconds


def read_tokenizer(path: Path) -> "Tokenizer":
    """Reads a tokenizer.json. Raises OSError or FormatError."""
    from tokenizers import Tokenizer

    text = path.read_bytes()
    try:
        return Tokenizer.from_str(text.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise FormatError(f"{path}: not a tokenizer that tokenizers can read: {error}") from error


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
            f"({GPT2_REPOSITORY}): {error}. Give prompts as token ids, or a tokenizer.json: load(..., tokenizer=path)"
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
                f"Give token ids, or load(..., tokenizer=path)"
            )
        return tokenizer

    def get_or_warn(self) -> "Tokenizer | None":
        """As get, for text that nobody asked for: asks no hub; where none is at hand, warns once and gives None."""
        if self._failed or self._load_at_hand is None:
            return self._tokenizer
        try:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._load_at_hand()
            if self._tokenizer is not None:
                return self._tokenizer
            problem = "this model's directory has no tokenizer.json, and GPT-2's is not in the hub's cache"
        except (OSError, FormatError) as error:
            problem = str(error)
        self._failed = True
        warnings.warn(f"generated text will be empty: {problem}", RuntimeWarning, stacklevel=2)
        return None


_alive: "weakref.WeakSet[LazyTokenizer]" = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """In a forked child, the thread that was loading is not there to finish."""
    for tokenizer in _alive:
        tokenizer._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)
