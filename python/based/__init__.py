"""Runtime for BASED language models.

>>> model = based.load("path-or-hub-id")
>>> model.generate("a prompt", based.SamplingParams(max_tokens=64, temperature=0))[0].outputs[0].text
"""

from based._core import (
    Checkpoint,
    Error,
    FormatError,
    GatedConvConfig,
    LinearAttentionConfig,
    MlpConfig,
    ModelConfig,
    SamplingParams,
    SessionBusyError,
    SlidingWindowConfig,
    StateError,
    UnsupportedError,
    build_info,
)
from based._loading import load
from based._model import Model
from based._outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from based._session import Session

__version__: str = build_info()["version"]

__all__ = [
    "Checkpoint",
    "CompletionOutput",
    "Error",
    "FormatError",
    "GatedConvConfig",
    "LinearAttentionConfig",
    "Logprob",
    "MlpConfig",
    "Model",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "SessionBusyError",
    "SlidingWindowConfig",
    "StateError",
    "StreamChunk",
    "UnsupportedError",
    "__version__",
    "build_info",
    "load",
]

for _type in (Error, FormatError, SessionBusyError, StateError, UnsupportedError):
    _type.__module__ = "based"  # where users find them; tracebacks say so
