"""Runtime for BASED language models.

>>> model = based.load("path-or-hub-id")
>>> model.generate("a prompt", based.SamplingParams(max_tokens=64, temperature=0))[0].outputs[0].text
"""

from based import sizes
from based._core import (
    Checkpoint,
    DeviceError,
    EngineBusyError,
    EngineClosedError,
    Error,
    FormatError,
    FullAttentionConfig,
    GatedConvConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    H3Config,
    HyenaConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MlpConfig,
    ModelConfig,
    PrefixLinearAttentionConfig,
    Rwkv4Config,
    Rwkv7Config,
    SamplingParams,
    SelectiveScanConfig,
    SessionBusyError,
    SlidingWindowConfig,
    State,
    StateError,
    Tensor,
    UnsupportedError,
    build_info,
)
from based._devices import DeviceInfo, devices
from based._engine import CacheStats, CacheTier, Engine, EngineRequest, EngineStats, RequestTimes
from based._loading import load
from based._model import MemoryUse, Model
from based._outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from based._score import ContinuationScore
from based._session import Session

__version__: str = build_info()["version"]

__all__ = [
    "CacheStats",
    "CacheTier",
    "Checkpoint",
    "CompletionOutput",
    "ContinuationScore",
    "DeviceError",
    "DeviceInfo",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineRequest",
    "EngineStats",
    "Error",
    "FormatError",
    "FullAttentionConfig",
    "GatedConvConfig",
    "GatedDeltaNetConfig",
    "GatedLinearAttentionConfig",
    "H3Config",
    "HyenaConfig",
    "LinearAttentionConfig",
    "Logprob",
    "Mamba2Config",
    "MemoryUse",
    "MlpConfig",
    "Model",
    "ModelConfig",
    "PrefixLinearAttentionConfig",
    "RequestOutput",
    "RequestTimes",
    "Rwkv4Config",
    "Rwkv7Config",
    "SamplingParams",
    "SelectiveScanConfig",
    "Session",
    "SessionBusyError",
    "SlidingWindowConfig",
    "State",
    "StateError",
    "StreamChunk",
    "Tensor",
    "UnsupportedError",
    "__version__",
    "build_info",
    "devices",
    "load",
    "sizes",
]

for _type in (
    DeviceError,
    EngineBusyError,
    EngineClosedError,
    Error,
    FormatError,
    SessionBusyError,
    State,
    StateError,
    Tensor,
    UnsupportedError,
):
    _type.__module__ = "based"  # where users find them; tracebacks say so
