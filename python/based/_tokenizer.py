"""A model's tokenizer, loaded when text is first needed."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from based._core import FormatError
from based._tokenizer_json import parse_tokenizer, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_REPOSITORY = "openai-community/gpt2"
GPT2_VOCAB_SIZE = 50257


def read_tokenizer(path: Path) -> "Tokenizer":
    """Reads a tokenizer.json. Raises OSError or FormatError."""
    return parse_tokenizer(read_bytes(path), str(path))


def fetch_gpt2_tokenizer() -> "Tokenizer":
    """GPT-2's tokenizer, which the published models use, from the hub or its cache. Raises OSError."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(GPT2_REPOSITORY, "tokenizer.json")
    except Exception as error:  # whatever httpx, the hub and the cache raise
        raise OSError(
            f"this model's directory has no tokenizer.json, and GPT-2's could not be fetched from the hub "
            f"({GPT2_REPOSITORY}): {error}. Give prompts as token ids, or a tokenizer.json: load(..., tokenizer=path)"
        ) from error
    return read_tokenizer(Path(path))


class LazyTokenizer:
    """Loads once, in whichever thread asks first."""

    def __init__(self, load: "Callable[[], Tokenizer] | None") -> None:
        self._load = load  # None: the model has none
        self._tokenizer: Tokenizer | None = None
        self._failed = False
        self._lock = threading.Lock()

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
        """As get, for text that nobody asked for: when reading fails, warns once and gives None."""
        if self._failed:
            return self._tokenizer
        try:
            return self.get()
        except (OSError, FormatError) as error:
            self._failed = True
            warnings.warn(f"generated text will be empty: {error}", RuntimeWarning, stacklevel=2)
            return None
