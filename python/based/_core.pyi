"""
The C++ core of based.
"""
from __future__ import annotations
import collections.abc
import enum
import numpy
import numpy.typing
import os
import typing
__all__: list[str] = ['Activation', 'Checkpoint', 'DeviceDescription', 'DeviceError', 'Engine', 'EngineBusyError', 'EngineClosedError', 'Error', 'FinishReason', 'FormatError', 'FullAttentionConfig', 'GatedConvConfig', 'GatedDeltaNetConfig', 'GatedLinearAttentionConfig', 'Generator', 'H3Config', 'HyenaConfig', 'LinearAttentionConfig', 'MAX_CONTEXT', 'MAX_TOKEN_IDS', 'MIXERS', 'Mamba2Config', 'MixerField', 'MlpConfig', 'Model', 'ModelConfig', 'NormKind', 'Parameter', 'PrefixLinearAttentionConfig', 'Projection', 'Rwkv4Config', 'Rwkv7Config', 'SafetensorsFile', 'SamplingParams', 'SelectiveScanConfig', 'Session', 'SessionBusyError', 'SlidingWindowConfig', 'State', 'StateError', 'StateTensor', 'Tensor', 'TokenEvent', 'Turn', 'Turns', 'UnsupportedError', 'add_cublas_path', 'available_memory', 'build_info', 'check_batch_size', 'check_config', 'check_json', 'check_params', 'check_prompt', 'convert_dtype', 'cuda_problem', 'devices', 'exchange_paths', 'measure_read_bandwidth', 'op_empty', 'op_gated_short_conv', 'op_sliding_window_attention', 'op_taylor_linear_attention', 'parse_limit', 'synchronize', 'write_safetensors']
class Error(Exception):
    """
    Base of the failures that are particular to this library.
    """
    def __str__(self) -> typing.Any:
        ...
class FormatError(Error, ValueError):
    """
    A file whose bytes contradict its format: weights, config, state.
    """
class StateError(Error, ValueError):
    """
    A state or checkpoint that belongs to another model or shape.
    """
class SessionBusyError(Error, RuntimeError):
    """
    A session or stream used while another call on it is under way.
    """
class UnsupportedError(Error, RuntimeError):
    """
    A request for something that this build or machine cannot do.
    """
class DeviceError(Error, RuntimeError):
    """
    A device that failed: the process can use it no more.
    """
class EngineBusyError(Error, RuntimeError):
    """
    A request that an engine has no room for now: its queue is full.
    """
class EngineClosedError(Error, RuntimeError):
    """
    A request to an engine that was shut down.
    """
class Tensor:
    """
    Dense rows of numbers; copies of it share its memory. NumPy and DLPack read it; NumPy gets a copy of what is a GPU's.
    """
    def __array__(self, dtype: typing.Any = None, copy: typing.Any = None) -> numpy.ndarray:
        """
        A NumPy array on the same memory, or on a copy of a GPU's.
        """
    def __dlpack__(self, *, stream: typing.Any = None, max_version: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None, dl_device: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None, copy: bool | None = None) -> typing.Any:
        """
        Contents are complete: no `stream` has to wait. A consumer that names the legacy default stream (1, as PyTorch does for its default stream) works on that one alone, and gives a GPU's memory back without waiting; for every other one, giving it back waits for the device.
        """
    def __dlpack_device__(self) -> tuple[int, int]:
        ...
    def __len__(self) -> int:
        ...
    def __repr__(self) -> str:
        ...
    def columns(self, count: typing.SupportsInt | typing.SupportsIndex) -> Tensor:
        """
        The first columns of a matrix, on the same memory.
        """
    @property
    def device(self) -> str:
        ...
    @property
    def dtype(self) -> str:
        ...
    @property
    def nbytes(self) -> int:
        ...
    @property
    def shape(self) -> tuple:
        ...
class SafetensorsFile:
    """
    A safetensors file, memory-mapped and checked whole. Raises OSError or FormatError.
    """
    def __init__(self, path: os.PathLike | str | bytes) -> None:
        ...
    def dtypes(self) -> dict[str, str]:
        """
        "float32", "bfloat16", … by tensor name.
        """
    def metadata(self) -> dict[str, str]:
        ...
    def read(self, name: str, offset: typing.SupportsInt | typing.SupportsIndex, nbytes: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
        """
        Bytes of a tensor in a new uint8 array, read and not mapped. Raises OSError, and FormatError when the file has become shorter.
        """
    def tensors(self) -> dict:
        """
        Read-only arrays on the mapping, which they keep alive, by name. bfloat16 comes as uint16 and float8 as uint8, bit for bit; arrays may be unaligned.
        """
class NormKind(enum.Enum):
    layer_norm: typing.ClassVar[NormKind]
    rms_norm: typing.ClassVar[NormKind]
    @classmethod
    def __new__(cls, value):
        ...
class Activation(enum.Enum):
    """
    gelu is the exact (erf) form, relu_squared relu(x)².
    """
    gelu: typing.ClassVar[Activation]
    gelu_tanh: typing.ClassVar[Activation]
    identity: typing.ClassVar[Activation]
    relu: typing.ClassVar[Activation]
    relu_squared: typing.ClassVar[Activation]
    sigmoid: typing.ClassVar[Activation]
    silu: typing.ClassVar[Activation]
    @classmethod
    def __new__(cls, value):
        ...
class MixerField:
    """
    A key of a mixer in config.json.
    """
    @property
    def domain(self) -> str:
        """
        The values that it may have, in words; empty for a bool.
        """
    @property
    def high(self) -> int | None:
        """
        Of an int: the greatest value; None where it depends on other keys.
        """
    @property
    def key(self) -> str:
        ...
    @property
    def low(self) -> int | None:
        """
        Of an int: the least value; None for others.
        """
    @property
    def meaning(self) -> str:
        ...
    @property
    def type(self) -> str:
        """
        "int", "float" or "bool".
        """
class Projection:
    """
    y = x Wᵀ (+ b), W (rows, cols): "{name}.weight", "{name}.bias".
    """
    @property
    def bias(self) -> bool:
        ...
    @property
    def cols(self) -> int:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def rows(self) -> int:
        ...
    @property
    def stacked(self) -> bool:
        """
        On the projection before it: both are one product.
        """
class Parameter:
    """
    A tensor of a mixer's weights that is no projection.
    """
    @property
    def name(self) -> str:
        ...
    @property
    def shape(self) -> list[int]:
        ...
class StateTensor:
    """
    A tensor of a state file: "layers.{i}.{name}".
    """
    @property
    def dtype(self) -> str:
        """
        "float32"; "model": the dtype that the model runs in; "projection": on a GPU the model's, on the CPU and in state files float32.
        """
    @property
    def kind(self) -> str:
        """
        "dense"; "ring": one row for each of the last tokens; "taylor": packed sums; "pending": a row for each token that is not in the sums yet; "context": one row for each token.
        """
    @property
    def name(self) -> str:
        ...
    @property
    def shape(self) -> list[int]:
        """
        First extent of a ring: rows of a full one; of pending and context: 0.
        """
class GatedConvConfig:
    """
    A gated short convolution.
    """
    letter: typing.ClassVar[str] = 'c'
    mixer: typing.ClassVar[str] = 'gated_conv'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def bias(self) -> bool:
        """
        on W_in and W_out; the convolution has none
        """
    @property
    def inner_size(self) -> int:
        """
        e, channels of u₁ and of u₂
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the convolution
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class LinearAttentionConfig:
    """
    Second-order Taylor linear attention.
    """
    letter: typing.ClassVar[str] = 'L'
    mixer: typing.ClassVar[str] = 'linear_attention'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def eps(self) -> float:
        """
        added to the denominator
        """
    @property
    def feature_dim(self) -> int:
        """
        f, size of q and k per head
        """
    @property
    def head_dim(self) -> int:
        """
        size of v per head
        """
    @property
    def num_features(self) -> int:
        ...
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class SlidingWindowConfig:
    """
    Sliding-window attention.
    """
    letter: typing.ClassVar[str] = 'W'
    mixer: typing.ClassVar[str] = 'sliding_window'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def head_dim(self) -> int:
        """
        size of q, k and v per head
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def num_kv_heads(self) -> int:
        """
        H_kv; query head h reads kv head ⌊h · H_kv / H⌋
        """
    @property
    def out_bias(self) -> bool:
        """
        whether `out_proj` has a bias
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def qkv_bias(self) -> bool:
        """
        whether `qkv_proj` has a bias
        """
    @property
    def rotary_base(self) -> float:
        """
        of the angles
        """
    @property
    def rotary_dim(self) -> int:
        """
        R; 0 for no rotary embedding. n = ⌈R/2⌉ pairs (x[i], x[i+n]) turn by position · rotary_base^(−2i/R)
        """
    @property
    def rotary_interleaved(self) -> bool:
        """
        the pairs are (x[2i], x[2i+1])
        """
    @property
    def scale(self) -> float:
        """
        of q·k before the softmax
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
    @property
    def window(self) -> int:
        """
        keys attended, the query's own included
        """
class PrefixLinearAttentionConfig:
    """
    Second-order Taylor linear attention that reads a prefix as a whole (JRT-RNN).
    """
    letter: typing.ClassVar[str] = 'P'
    mixer: typing.ClassVar[str] = 'prefix_linear_attention'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def enc_length(self) -> int:
        """
        tokens of the prefix
        """
    @property
    def eps(self) -> float:
        """
        added to the denominator
        """
    @property
    def feature_dim(self) -> int:
        """
        f, size of q and k per head
        """
    @property
    def head_dim(self) -> int:
        """
        size of v per head
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class FullAttentionConfig:
    """
    Full causal attention.
    """
    letter: typing.ClassVar[str] = 'A'
    mixer: typing.ClassVar[str] = 'full_attention'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def head_dim(self) -> int:
        """
        size of q, k and v per head
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def num_kv_heads(self) -> int:
        """
        H_kv; query head h reads kv head ⌊h · H_kv / H⌋
        """
    @property
    def out_bias(self) -> bool:
        """
        whether `out_proj` has a bias
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def qkv_bias(self) -> bool:
        """
        whether `qkv_proj` has a bias
        """
    @property
    def rotary_base(self) -> float:
        """
        of the angles
        """
    @property
    def rotary_dim(self) -> int:
        """
        R; 0 for no rotary embedding. n = ⌈R/2⌉ pairs (x[i], x[i+n]) turn by position · rotary_base^(−2i/R)
        """
    @property
    def rotary_interleaved(self) -> bool:
        """
        the pairs are (x[2i], x[2i+1])
        """
    @property
    def scale(self) -> float:
        """
        of q·k before the softmax
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class SelectiveScanConfig:
    """
    A selective scan (Mamba).
    """
    letter: typing.ClassVar[str] = 'S'
    mixer: typing.ClassVar[str] = 'selective_scan'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def bias(self) -> bool:
        """
        on W_in and W_out; W_x has none, W_dt has one always
        """
    @property
    def conv_bias(self) -> bool:
        """
        whether the convolution has one
        """
    @property
    def dt_rank(self) -> int:
        """
        R, rank of the step's projection
        """
    @property
    def inner_size(self) -> int:
        """
        e, channels of the scan
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the convolution
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def state_size(self) -> int:
        """
        N, numbers of state per channel
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class GatedDeltaNetConfig:
    """
    A gated delta rule (Gated DeltaNet; DeltaNet without the decay).
    """
    letter: typing.ClassVar[str] = 'D'
    mixer: typing.ClassVar[str] = 'gated_delta_net'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def decay(self) -> bool:
        """
        whether there is an α; false: α = 1, DeltaNet
        """
    @property
    def eps(self) -> float:
        """
        of the norm of each head's result
        """
    @property
    def head_dim(self) -> int:
        """
        size of v per head
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the convolution
        """
    @property
    def key_dim(self) -> int:
        """
        size of q and k per head
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def output_gate(self) -> bool:
        """
        whether there is a W_g
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class Rwkv4Config:
    """
    The time mix of RWKV-4.
    """
    letter: typing.ClassVar[str] = 'r'
    mixer: typing.ClassVar[str] = 'rwkv4'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def hidden_size(self) -> int:
        """
        d, the model's own
        """
    @property
    def inner_size(self) -> int:
        """
        e, channels of k, v and r
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class H3Config:
    """
    Two state space models with products between them (H3).
    """
    letter: typing.ClassVar[str] = 'H'
    mixer: typing.ClassVar[str] = 'h3'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def head_dim(self) -> int:
        """
        size of q, k and v per head
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the shift
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def num_modes(self) -> int:
        """
        M, complex modes of each head
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class HyenaConfig:
    """
    A long convolution between two gates, its filter made by an MLP (Hyena).
    """
    letter: typing.ClassVar[str] = 'Y'
    mixer: typing.ClassVar[str] = 'hyena'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def filter_size(self) -> int:
        """
        F, width of the filter's MLP
        """
    @property
    def inner_size(self) -> int:
        """
        e, channels of x₁, of x₂ and of v
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the short convolution
        """
    @property
    def max_length(self) -> int:
        """
        L, taps of the long one: a sequence has no more tokens
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class Mamba2Config:
    """
    A state-space model with one decay per head (Mamba-2).
    """
    letter: typing.ClassVar[str] = 'M'
    mixer: typing.ClassVar[str] = 'mamba2'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def conv_bias(self) -> bool:
        """
        whether the convolution has one
        """
    @property
    def eps(self) -> float:
        """
        of the norm of each group's result
        """
    @property
    def head_dim(self) -> int:
        """
        size of x per head
        """
    @property
    def kernel_size(self) -> int:
        """
        K, taps of the convolution
        """
    @property
    def num_groups(self) -> int:
        """
        G; head h reads B and C of group ⌊h · G / H⌋
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def state_size(self) -> int:
        """
        N, size of B and C
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class GatedLinearAttentionConfig:
    """
    Linear attention with a decay for each row of its state (GLA).
    """
    letter: typing.ClassVar[str] = 'G'
    mixer: typing.ClassVar[str] = 'gated_linear_attention'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def eps(self) -> float:
        """
        of the norm of each head's result
        """
    @property
    def gate_normalizer(self) -> float:
        """
        log α = log σ(·) over this
        """
    @property
    def gate_rank(self) -> int:
        """
        R, rows of W₁
        """
    @property
    def head_dim(self) -> int:
        """
        size of v per head
        """
    @property
    def key_dim(self) -> int:
        """
        size of q, k and α per head
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class Rwkv7Config:
    """
    The time mix of RWKV-7.
    """
    letter: typing.ClassVar[str] = 'R'
    mixer: typing.ClassVar[str] = 'rwkv7'
    @staticmethod
    def fields() -> list[MixerField]:
        """
        The keys of config.json beside "mixer", in order.
        """
    def __eq__(self: typing.Self, arg0: typing.Self) -> bool:
        ...
    def __getstate__(self: typing.Self) -> dict:
        ...
    def __hash__(self: typing.Self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    def projections(self: typing.Self, hidden_size: typing.SupportsInt | typing.SupportsIndex) -> list[Projection]:
        """
        The matrices that each token is multiplied by, in order.
        """
    @property
    def decay_rank(self) -> int:
        """
        R_w, rows of W_w1
        """
    @property
    def eps(self) -> float:
        """
        of the norm of each head's result
        """
    @property
    def gate_rank(self) -> int:
        """
        R_g, rows of W_g1
        """
    @property
    def head_dim(self) -> int:
        """
        size of r, k, v, w, a and g per head
        """
    @property
    def hidden_size(self) -> int:
        """
        d, the model's own
        """
    @property
    def num_heads(self) -> int:
        """
        H
        """
    @property
    def parameters(self) -> list[Parameter]:
        """
        The other tensors of its weights.
        """
    @property
    def rate_rank(self) -> int:
        """
        R_a, rows of W_a1
        """
    @property
    def state(self) -> list[StateTensor]:
        """
        The tensors of a layer in a state file.
        """
    @property
    def summary(self) -> str:
        """
        The shape, in words.
        """
class MlpConfig:
    def __eq__(self, arg0: MlpConfig) -> bool:
        ...
    def __getstate__(self) -> dict:
        ...
    def __hash__(self) -> int:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    @property
    def activation(self) -> Activation:
        ...
    @property
    def fc1_bias(self) -> bool:
        ...
    @property
    def fc2_bias(self) -> bool:
        ...
    @property
    def gated(self) -> bool:
        ...
    @property
    def inner_size(self) -> int:
        ...
class ModelConfig:
    """
    Every number that the maths needs: a model directory's config.json.
    """
    @staticmethod
    def from_json(text: str, where: str = 'config') -> ModelConfig:
        """
        Parses and checks; `where` opens every message. Raises FormatError.
        """
    def __eq__(self, arg0: ModelConfig) -> bool:
        ...
    def __getstate__(self) -> str:
        ...
    def __hash__(self) -> int:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: str) -> None:
        ...
    def to_json(self) -> str:
        """
        The canonical text: from_json(to_json()) is equal.
        """
    @property
    def bos_token_id(self) -> int | None:
        ...
    @property
    def eos_token_id(self) -> int | None:
        ...
    @property
    def hidden_size(self) -> int:
        ...
    @property
    def layers(self) -> list[GatedConvConfig | LinearAttentionConfig | SlidingWindowConfig | PrefixLinearAttentionConfig | FullAttentionConfig | SelectiveScanConfig | GatedDeltaNetConfig | Rwkv4Config | H3Config | HyenaConfig | Mamba2Config | GatedLinearAttentionConfig | Rwkv7Config]:
        ...
    @property
    def max_tokens(self) -> int | None:
        """
        Tokens that a sequence may have, where a layer has such a limit; None for any number.
        """
    @property
    def mlp(self) -> MlpConfig | None:
        """
        Of every layer; None: a layer is its mixer alone.
        """
    @property
    def norm(self) -> NormKind:
        ...
    @property
    def norm_eps(self) -> float:
        ...
    @property
    def num_parameters(self) -> int:
        ...
    @property
    def padded_vocab_size(self) -> int:
        ...
    @property
    def prefix_tokens(self) -> int:
        """
        Tokens at the beginning of a sequence that are read as a whole; 0 for a causal model.
        """
    @property
    def tie_embeddings(self) -> bool:
        ...
    @property
    def vocab_size(self) -> int:
        ...
class SamplingParams:
    """
    How to choose tokens: vLLM's names and meanings.
    
    Applied in this order: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p. Raises TypeError for a value
    of a wrong type and ValueError for one outside its domain. Lists and dicts are copied: assign a new one to change them.
    """
    __hash__: typing.ClassVar[None] = None
    def __eq__(self, arg0: typing.Any) -> typing.Any:
        ...
    def __getstate__(self) -> dict:
        ...
    def __init__(self, *, n: typing.SupportsIndex = 1, max_tokens: typing.SupportsIndex | None = 16, min_tokens: typing.SupportsIndex = 0, temperature: typing.SupportsFloat = 1.0, top_p: typing.SupportsFloat = 1.0, top_k: typing.SupportsIndex = 0, min_p: typing.SupportsFloat = 0.0, repetition_penalty: typing.SupportsFloat = 1.0, presence_penalty: typing.SupportsFloat = 0.0, frequency_penalty: typing.SupportsFloat = 0.0, seed: typing.SupportsIndex | None = None, stop: str | collections.abc.Sequence[str] | None = None, stop_token_ids: collections.abc.Sequence[typing.SupportsIndex] | None = None, ignore_eos: bool = False, logprobs: typing.SupportsIndex | None = None, logit_bias: collections.abc.Mapping[typing.SupportsIndex, typing.SupportsFloat] | None = None, include_stop_str_in_output: bool = False, skip_special_tokens: bool = True) -> None:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, arg0: dict) -> None:
        ...
    @property
    def frequency_penalty(self) -> float:
        """
        [-2, 2]; counts tokens of the output.
        """
    @frequency_penalty.setter
    def frequency_penalty(self, arg1: typing.SupportsFloat) -> None:
        ...
    @property
    def ignore_eos(self) -> bool:
        """
        Do not end at the model's eos_token_id.
        """
    @ignore_eos.setter
    def ignore_eos(self, arg1: bool) -> None:
        ...
    @property
    def include_stop_str_in_output(self) -> bool:
        """
        Cut the text after what stopped it instead.
        """
    @include_stop_str_in_output.setter
    def include_stop_str_in_output(self, arg1: bool) -> None:
        ...
    @property
    def logit_bias(self) -> dict[int, float]:
        """
        Number in [-100, 100] added to the logit, by token id.
        """
    @logit_bias.setter
    def logit_bias(self, arg1: collections.abc.Mapping[typing.SupportsIndex, typing.SupportsFloat] | None) -> None:
        ...
    @property
    def logprobs(self) -> int | None:
        """
        Also return the log-probabilities of this many likeliest tokens, from the model's own distribution.
        """
    @logprobs.setter
    def logprobs(self, arg1: typing.SupportsIndex | None) -> None:
        ...
    @property
    def max_tokens(self) -> int | None:
        """
        Tokens to generate at most, ≥ 1; None: no limit.
        """
    @max_tokens.setter
    def max_tokens(self, arg1: typing.SupportsIndex | None) -> None:
        ...
    @property
    def min_p(self) -> float:
        """
        [0, 1].
        """
    @min_p.setter
    def min_p(self, arg1: typing.SupportsFloat) -> None:
        ...
    @property
    def min_tokens(self) -> int:
        """
        Nothing stops a sequence before so many tokens; 0 … max_tokens.
        """
    @min_tokens.setter
    def min_tokens(self, arg1: typing.SupportsIndex) -> None:
        ...
    @property
    def n(self) -> int:
        """
        Samples per prompt, ≥ 1.
        """
    @n.setter
    def n(self, arg1: typing.SupportsIndex) -> None:
        ...
    @property
    def presence_penalty(self) -> float:
        """
        [-2, 2]; counts tokens of the output.
        """
    @presence_penalty.setter
    def presence_penalty(self, arg1: typing.SupportsFloat) -> None:
        ...
    @property
    def repetition_penalty(self) -> float:
        """
        > 0; counts tokens of prompt and output.
        """
    @repetition_penalty.setter
    def repetition_penalty(self, arg1: typing.SupportsFloat) -> None:
        ...
    @property
    def seed(self) -> int | None:
        """
        None: a fresh one per request.
        """
    @seed.setter
    def seed(self, arg1: typing.SupportsIndex | None) -> None:
        ...
    @property
    def skip_special_tokens(self) -> bool:
        """
        Leave special tokens out of the text; stop strings may hold them either way.
        """
    @skip_special_tokens.setter
    def skip_special_tokens(self, arg1: bool) -> None:
        ...
    @property
    def stop(self) -> list[str]:
        """
        Strings that end the text, which is cut before them.
        """
    @stop.setter
    def stop(self, arg1: str | collections.abc.Sequence[str] | None) -> None:
        ...
    @property
    def stop_token_ids(self) -> list[int]:
        """
        Tokens that end the sequence; kept in token_ids.
        """
    @stop_token_ids.setter
    def stop_token_ids(self, arg1: collections.abc.Sequence[typing.SupportsIndex] | None) -> None:
        ...
    @property
    def temperature(self) -> float:
        """
        ≥ 0; 0 is greedy.
        """
    @temperature.setter
    def temperature(self, arg1: typing.SupportsFloat) -> None:
        ...
    @property
    def top_k(self) -> int:
        """
        0 or -1: all; else ≥ 1.
        """
    @top_k.setter
    def top_k(self, arg1: typing.SupportsIndex) -> None:
        ...
    @property
    def top_p(self) -> float:
        """
        (0, 1].
        """
    @top_p.setter
    def top_p(self, arg1: typing.SupportsFloat) -> None:
        ...
class Model:
    """
    Immutable weights on one device. Any number of threads.
    """
    @staticmethod
    def load(directory: os.PathLike | str | bytes, *, device: str = 'cpu', dtype: str | None = None, num_threads: typing.SupportsIndex | None = None, deterministic: bool = False, max_context: typing.SupportsIndex | None = None) -> Model:
        """
        Reads config.json and model.safetensors (or its shards). Raises OSError, FormatError, UnsupportedError, ValueError.
        """
    @staticmethod
    def random(config: ModelConfig, seed: typing.SupportsIndex = 0, *, device: str = 'cpu', dtype: str | None = None, num_threads: typing.SupportsIndex | None = None, deterministic: bool = False, max_context: typing.SupportsIndex | None = None) -> Model:
        """
        Seeded random weights of this shape.
        """
    def forward(self, token_ids: collections.abc.Sequence[int] | numpy.ndarray) -> Tensor:
        """
        Logits (T, padded_vocab_size) float32.
        """
    def score(self, token_ids: collections.abc.Sequence[int] | numpy.ndarray) -> numpy.typing.NDArray[numpy.float32]:
        """
        (T - 1) natural-log probabilities, float32.
        """
    def state_nbytes_at(self, num_tokens: typing.SupportsIndex) -> int:
        ...
    def trace(self, token_ids: collections.abc.Sequence[int] | numpy.ndarray) -> dict:
        """
        Tensors by name; mixer_out and block_out are lists, one per layer.
        """
    @property
    def config(self) -> ModelConfig:
        ...
    @property
    def device(self) -> str:
        ...
    @property
    def dtype(self) -> str:
        ...
    @property
    def fingerprint(self) -> str:
        ...
    @property
    def kernel_isa(self) -> str:
        ...
    @property
    def max_context(self) -> int | None:
        ...
    @property
    def memory(self) -> tuple[int, int, int]:
        """
        Bytes of the device held now: weights, states, workspace.
        """
    @property
    def num_parameters(self) -> int:
        ...
    @property
    def num_threads(self) -> int:
        ...
    @property
    def state_nbytes(self) -> int:
        ...
    @property
    def weight_nbytes(self) -> int:
        ...
class Turn:
    """
    The right to use something that has one user at a time. Ends with the last reference.
    """
    def __enter__(self) -> typing.Any:
        ...
    def __exit__(self, *args) -> None:
        ...
    def leave(self) -> None:
        """
        Ends it. No effect on one that has ended.
        """
class Turns:
    """
    Gives turns, one at a time.
    """
    def __init__(self) -> None:
        ...
    def take(self, why_others_fail: str) -> Turn:
        """
        A Turn. Raises SessionBusyError with the reason that the holder of the turn gave.
        """
    @property
    def taken(self) -> bool:
        """
        Whether somebody has a turn.
        """
class State:
    """
    What one sequence has seen, at one moment. Immutable; any number of sessions may start from it.
    """
    @staticmethod
    def load(path: os.PathLike | str | bytes, model: typing.Any, sequence: typing.SupportsIndex | None = None) -> State:
        """
        Sequence `sequence` of a state file; None: the only one. Raises StateError, FormatError, OSError.
        """
    def __repr__(self) -> str:
        ...
    def save(self, path: os.PathLike | str | bytes) -> None:
        """
        Saves it as a state file of one sequence: written aside, then renamed. Raises OSError.
        """
    @property
    def nbytes(self) -> int:
        """
        Device memory that it holds; 0 when nothing has been seen.
        """
    @property
    def num_tokens(self) -> int:
        """
        Tokens seen.
        """
class Checkpoint:
    """
    The states of all sequences of one session at one moment.
    """
    @property
    def num_tokens(self) -> list[int]:
        ...
    @property
    def state_nbytes(self) -> int:
        ...
    @property
    def states(self) -> list[State]:
        """
        By sequence; each may be restored alone.
        """
class Session:
    """
    The states of B sequences that are advanced together. One thread at a time.
    """
    @typing.overload
    def __init__(self, model: Model, states: collections.abc.Sequence[State]) -> None:
        """
        Sequence i starts from states[i].
        """
    @typing.overload
    def __init__(self, model: Model, batch_size: typing.SupportsIndex = 1) -> None:
        ...
    def checkpoint(self) -> Checkpoint:
        ...
    def copy(self, source: typing.SupportsIndex, target: typing.SupportsIndex) -> None:
        """
        Makes sequence `target` equal to `source`.
        """
    def fork(self) -> Session:
        ...
    def load_state(self, path: os.PathLike | str | bytes) -> None:
        ...
    def prefill(self, prompts: collections.abc.Sequence[collections.abc.Sequence[int] | numpy.ndarray], sequences: collections.abc.Sequence[typing.SupportsIndex] | None = None) -> Tensor:
        """
        Feeds one prompt to each listed sequence. Logits at their last tokens, (B, padded_vocab_size) float32.
        """
    def reset(self, sequence: typing.SupportsIndex | None = None) -> None:
        """
        Forgets what one sequence, or every one, has seen.
        """
    def restore(self, sequence: typing.SupportsIndex, state: State) -> None:
        """
        Makes a sequence what the state says.
        """
    def rollback(self, checkpoint: Checkpoint) -> None:
        ...
    def save_state(self, path: os.PathLike | str | bytes) -> None:
        ...
    def snapshot(self, sequence: typing.SupportsIndex) -> State:
        """
        The state of one sequence.
        """
    def step(self, tokens: collections.abc.Sequence[int] | numpy.ndarray, sequences: collections.abc.Sequence[typing.SupportsIndex] | None = None) -> Tensor:
        """
        Feeds one token to each listed sequence. Logits (B, padded_vocab_size) float32.
        """
    def undo_last(self) -> None:
        """
        Right after a step or a change of states in the main thread: makes it undone, unless the states take more than 64 MiB.
        """
    @property
    def batch_size(self) -> int:
        ...
    @property
    def num_tokens(self) -> list[int]:
        """
        Tokens seen, by sequence.
        """
    @property
    def state_nbytes(self) -> int:
        ...
class FinishReason(enum.Enum):
    abort: typing.ClassVar[FinishReason]
    error: typing.ClassVar[FinishReason]
    length: typing.ClassVar[FinishReason]
    none: typing.ClassVar[FinishReason]
    stop: typing.ClassVar[FinishReason]
    @classmethod
    def __new__(cls, value):
        ...
class TokenEvent:
    """
    One new token of one sample of one request.
    """
    @property
    def error(self) -> str:
        """
        Why there is no token, when finish is error.
        """
    @property
    def finish(self) -> FinishReason:
        ...
    @property
    def logprob(self) -> float:
        ...
    @property
    def request(self) -> int:
        ...
    @property
    def sample(self) -> int:
        ...
    @property
    def stop_token(self) -> int | None:
        ...
    @property
    def token(self) -> int:
        ...
    @property
    def top_logprobs(self) -> list[tuple[int, float]]:
        """
        (token, log-probability), likeliest first.
        """
class Generator:
    """
    Runs requests to their ends, one token per sequence and call.
    """
    @typing.overload
    def __init__(self, model: Model, prompts: collections.abc.Sequence[collections.abc.Sequence[int] | numpy.ndarray], params: collections.abc.Sequence[SamplingParams], max_batch_size: typing.SupportsIndex) -> None:
        """
        On a session of its own, of at most `max_batch_size` sequences.
        """
    @typing.overload
    def __init__(self, session: Session, prompts: collections.abc.Sequence[collections.abc.Sequence[int] | numpy.ndarray], params: collections.abc.Sequence[SamplingParams]) -> None:
        """
        On a session: request i continues sequence i, from where it is when its prompt is empty; every n must be 1.
        """
    def add(self, prompt: collections.abc.Sequence[int] | numpy.ndarray, params: SamplingParams) -> int:
        """
        One more request for a generator with a session of its own; its number.
        """
    def cancel(self) -> None:
        """
        Makes a next() that another thread is in, and every later one, raise Error soon. From any thread.
        """
    def done(self) -> bool:
        ...
    def finish(self, request: typing.SupportsInt | typing.SupportsIndex, sample: typing.SupportsInt | typing.SupportsIndex, num_read: typing.SupportsInt | typing.SupportsIndex = 9223372036854775807) -> None:
        """
        Ends a sample early. No effect on one that has ended. num_read: of its tokens, that the caller has read: a session does not see the others.
        """
    def next(self) -> list[TokenEvent]:
        """
        Advances every running sequence by one token. Empty only when done().
        """
class Engine:
    """
    Runs the requests of any number of threads in one batch; see based.Engine.
    """
    def __init__(self, model: Model, max_batch_size: typing.SupportsIndex, max_waiting_requests: typing.SupportsIndex | None = None, max_waiting_tokens: typing.SupportsIndex | None = None, max_step_tokens: typing.SupportsIndex | None = None, elastic: bool = False, cache_bytes: typing.SupportsIndex = 0, host_cache_bytes: typing.SupportsIndex = 0, cache_dir: os.PathLike | str | bytes | None = None, cache_dir_bytes: typing.SupportsIndex = 0) -> None:
        """
        elastic: memory for states is taken as samples need it, and given back when nothing runs.
        """
    def cancel(self, request: typing.SupportsIndex, why: str = 'cancelled') -> None:
        """
        Ends a request at the next step.
        """
    def finish(self, request: typing.SupportsIndex, sample: typing.SupportsIndex, num_read: typing.SupportsIndex) -> None:
        """
        Ends one sample after num_read of its tokens.
        """
    def pause(self, request: typing.SupportsIndex, paused: bool) -> None:
        """
        A paused request takes no step.
        """
    def shutdown(self, drain: bool, timeout: typing.SupportsFloat | None = None) -> bool:
        """
        Takes no more requests; waits until all have ended. False: the time was over before.
        """
    def stats(self) -> dict:
        """
        Numbers of requests, samples, tokens and steps.
        """
    def submit(self, prompt: collections.abc.Sequence[int] | numpy.ndarray, params: SamplingParams, priority: typing.SupportsIndex = 0, timeout: typing.SupportsFloat | None = None, state: State | None = None, keep_state: bool = False, reader_ends: bool = False, every_token: bool = True) -> int:
        """
        The request's number. Raises EngineBusyError when the queue is full, EngineClosedError after a shutdown.
        """
    def wait(self, timeout: typing.SupportsFloat) -> list | None:
        """
        Events of all requests, as soon as there are some: (request, sample, token, logprob, top_logprobs, finish, stop_token, error, num_cached_tokens, scheduled, time, state); none when the time is over. None: the engine has ended.
        """
class DeviceDescription:
    """
    The CPU, or a GPU of this machine.
    """
    @property
    def architecture(self) -> str:
        ...
    @property
    def device(self) -> str:
        ...
    @property
    def free_nbytes(self) -> int:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def problem(self) -> str:
        """
        Why it cannot be used; empty when it can.
        """
    @property
    def total_nbytes(self) -> int:
        ...
def add_cublas_path(path: str) -> None:
    """
    A folder to look into for cuBLASLt before the system's own. Before the first use of CUDA.
    """
def available_memory() -> int:
    """
    Bytes of the machine's memory that this process may still take.
    """
def build_info() -> dict:
    """
    version, compiler, the instruction sets and GPU architectures that kernels were compiled for, and the CUDA toolkit's version (None: a build without CUDA).
    """
def check_batch_size(max_batch_size: typing.SupportsIndex) -> int:
    """
    The number itself. Raises TypeError and ValueError.
    """
def check_config(text: str, where: str) -> str:
    """
    The canonical form of a config.json's text. Raises FormatError.
    """
def check_json(text: bytes, where: str) -> None:
    """
    Refuses what is no JSON, and JSON that would take much more memory than its text. Raises FormatError.
    """
def check_params(params: SamplingParams, vocab_size: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Raises ValueError, also for a token id outside the vocabulary.
    """
def check_prompt(prompt: collections.abc.Sequence[int] | numpy.ndarray, vocab_size: typing.SupportsInt | typing.SupportsIndex, name: str) -> numpy.typing.NDArray[numpy.int32]:
    """
    Token ids as an array. Raises TypeError and ValueError, in which `name` is the prompt's.
    """
def convert_dtype(bits: numpy.ndarray, source: str, target: str) -> numpy.ndarray:
    """
    A new array of the same shape, each number converted between float32, bfloat16 and float16 (nearest even; too large gives inf). bfloat16 as uint16.
    """
def cuda_problem() -> str:
    """
    Why no GPU can be used; empty when one can.
    """
def devices() -> list[DeviceDescription]:
    """
    The CPU, then every GPU of this machine.
    """
def exchange_paths(a: os.PathLike | str | bytes, b: os.PathLike | str | bytes) -> bool:
    """
    Lets two files or directories change names at once. False where the filesystem cannot. Raises OSError.
    """
def measure_read_bandwidth(num_threads: typing.SupportsIndex | None = None, nbytes: typing.SupportsIndex = 1073741824) -> float:
    """
    Bytes per second at which that many CPU threads (None: all) read a buffer of `nbytes`; median of several passes.
    """
def op_empty(device: str, dtype: str, shape: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], stream: typing.SupportsInt | typing.SupportsIndex) -> Tensor:
    """
    Uninitialised memory of a GPU, in the order of `stream`.
    """
def op_gated_short_conv(u: typing.Any, weight: typing.Any, initial_state: typing.Any, out: typing.Any, final_state: typing.Any, stream: typing.SupportsInt | typing.SupportsIndex, producer_stream: typing.Any) -> None:
    ...
def op_sliding_window_attention(q: typing.Any, k: typing.Any, v: typing.Any, out: typing.Any, window: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, producer_stream: typing.Any) -> None:
    ...
def op_taylor_linear_attention(q: typing.Any, k: typing.Any, v: typing.Any, initial_state: typing.Any, out: typing.Any, final_state: typing.Any, eps: typing.SupportsFloat | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex, producer_stream: typing.Any) -> None:
    ...
def parse_limit(real_limit: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    A limit on what is parsed as a whole, multiplied by the environment variable BASED_PARSE_LIMIT. Raises ValueError when that is not an integer from 1 to 1000.
    """
def synchronize(device: str) -> None:
    """
    Waits for everything that was enqueued on a device.
    """
def write_safetensors(path: os.PathLike | str | bytes, tensors: collections.abc.Sequence[tuple[str, typing.Any, str]], metadata: collections.abc.Mapping[str, str]) -> None:
    """
    Writes (name, array, dtype name) in this order to a temporary file beside `path` and renames it. Arrays are C-contiguous and hold the dtype's bits (bfloat16 as uint16); what has `shape` and `read`(offset, nbytes) is read in blocks. Raises OSError, TypeError, ValueError.
    """
MAX_CONTEXT: int = 16777216
MAX_TOKEN_IDS: int = 268435456
MIXERS: tuple = (GatedConvConfig, LinearAttentionConfig, SlidingWindowConfig, PrefixLinearAttentionConfig, FullAttentionConfig, SelectiveScanConfig, GatedDeltaNetConfig, Rwkv4Config, H3Config, HyenaConfig, Mamba2Config, GatedLinearAttentionConfig, Rwkv7Config)
