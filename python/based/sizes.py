"""Named model shapes, and what a shape costs: bytes of state, bytes of a transformer's KV cache, products per token.

All of it follows from a ModelConfig alone; no weights are needed.
"""

import json
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, ClassVar, Protocol, SupportsIndex

from based._core import ModelConfig, Projection, StateTensor


class Mixer(Protocol):
    """What the configs of all mixers have (`ModelConfig.layers`)."""

    mixer: ClassVar[str]

    @property
    def state(self) -> list[StateTensor]:
        """The tensors of a layer in a state file."""

    def projections(self, hidden_size: SupportsIndex) -> list[Projection]:
        """The matrices that each token is multiplied by."""


ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number, by the name of its dtype."""


def named_config(name: str) -> ModelConfig:
    """The config of a named shape: one of `SIZES`. Raises ValueError for any other name."""
    if name not in SIZES:
        raise ValueError(f"size is {name!r}, expected one of {', '.join(SIZES)}")
    return ModelConfig.from_json(json.dumps(SIZES[name]()), f"size {name}")


PENDING_TOKENS = 8
"""W: on a GPU, a linear layer adds tokens to its sums W at a time (kPendingTokens of cuda/kernels.h)."""


def mixer_nbytes(mixer: Mixer, ring_dtype: str, num_tokens: int | None = None) -> int:
    """Bytes that one layer keeps of a sequence of `num_tokens` tokens.

    None: of one that fills every window, without what grows with every token (mixer_token_nbytes).

    ring_dtype: of a window's keys and values, the model's. All other state is float32. A device may round up, keep the
    inputs of convolutions in the model's dtype, and a few tokens of linear layers beside their sums.
    """
    return sum(
        prod(_rows(tensor, num_tokens)) * ITEM_SIZE[ring_dtype if tensor.dtype == "model" else "float32"]
        for tensor in mixer.state
    )


def mixer_token_nbytes(mixer: Mixer, ring_dtype: str) -> int:
    """Bytes by which one layer's state grows with every token: its keys and values in full attention, otherwise 0."""
    item = ITEM_SIZE[ring_dtype]
    return sum(prod(tensor.shape[1:]) * item for tensor in mixer.state if tensor.kind == "context")


def _rows(tensor: StateTensor, num_tokens: int | None) -> list[int]:
    """The tensor's shape; of a ring and of all tokens' keys, in a sequence of `num_tokens` tokens."""
    if tensor.kind == "context":
        return [num_tokens or 0, *tensor.shape[1:]]
    if tensor.kind == "ring" and num_tokens is not None:
        return [min(tensor.shape[0], num_tokens), *tensor.shape[1:]]
    return tensor.shape


def state_nbytes(config: ModelConfig, ring_dtype: str, num_tokens: int | None = None) -> int:
    """Bytes of one sequence's state: the sum of mixer_nbytes over all layers."""
    return sum(mixer_nbytes(mixer, ring_dtype, num_tokens) for mixer in config.layers)


def token_nbytes(config: ModelConfig, ring_dtype: str) -> int:
    """Bytes by which a sequence's state grows with every token: the sum of mixer_token_nbytes over all layers."""
    return sum(mixer_token_nbytes(mixer, ring_dtype) for mixer in config.layers)


def mixer_step_nbytes(mixer: Mixer, dtype: str, num_tokens: int, *, on_gpu: bool) -> float:
    """Bytes of one layer's state that a decode step reads and writes for one sequence, on average.

    What is read: all that is kept; `num_tokens`: of the sequence, after the step. What is written: the inputs of a
    convolution, one row of a window, and the sums of a linear layer, on a GPU by one step in W = PENDING_TOKENS: there
    0 to W - 1 tokens, as k and v, wait beside them, and are read too; a step that adds none to the sums writes its own.
    """
    step = 0.0
    for tensor in mixer.state:
        item = ITEM_SIZE[dtype if tensor.dtype == "model" or (on_gpu and tensor.dtype == "projection") else "float32"]
        match tensor.kind:
            case "ring" | "context":  # reads what it has, writes one row
                step += (prod(_rows(tensor, num_tokens)) + prod(_rows(tensor, 1))) * item
            case "taylor" if on_gpu:
                step += (1 + 1 / PENDING_TOKENS) * prod(tensor.shape) * item
            case "pending" if on_gpu:
                step += ((PENDING_TOKENS - 1) / 2 + 1 - 1 / PENDING_TOKENS) * prod(tensor.shape[1:]) * item
            case _:  # the CPU leaves no tokens pending
                step += 2 * prod(tensor.shape) * item
    return step


def kv_cache_nbytes(config: ModelConfig, dtype: str, num_tokens: int) -> int:
    """Bytes that a transformer of the same width and number of layers keeps of a sequence.

    Multi-head attention in every layer, num_heads · head_dim = hidden_size: a key and a value of hidden_size numbers
    per layer and token. Where G heads share keys and values
    (grouped-query attention; 4 to 8 in most models of today), it is 1/G of that.
    """
    return 2 * len(config.layers) * config.hidden_size * ITEM_SIZE[dtype] * num_tokens


def gemm_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of every matrix that each token is multiplied by, in order; without the head."""
    d = config.hidden_size
    mlp = config.mlp
    products = [] if mlp is None else [((2 if mlp.gated else 1) * mlp.inner_size, d), (d, mlp.inner_size)]
    return [shape for mixer in config.layers for shape in (*_mixer_shapes(mixer, d), *products)]


def _mixer_shapes(mixer: Mixer, d: int) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    for p in mixer.projections(d):
        if p.stacked:
            shapes[-1] = (shapes[-1][0] + p.rows, p.cols)
        else:
            shapes.append((p.rows, p.cols))
    return shapes


LETTERS = {
    "c": "convolution",
    "L": "linear attention",
    "W": "window",
    "P": "linear attention with a prefix",
    "A": "full attention",
    "S": "selective scan (Mamba)",
    "M": "Mamba-2",
    "D": "Gated DeltaNet",
    "G": "gated linear attention",
    "R": "RWKV-7",
    "r": "RWKV-4",
    "H": "H3",
    "Y": "Hyena",
}
"""A layer's mixer, by the letter that stands for it in `recipe` and that its class has."""


def recipe(
    layers: str,
    hidden_size: int,
    num_heads: int,
    inner_size: int,
    *,
    window: int = 0,
    feature_dim: int = 16,
    enc_length: int = 1024,
    head_dim: int | None = None,
    conv_size: int | None = None,
    scan_state: int = 16,
    max_length: int = 2048,
    vocab_size: int,
    end_token_id: int | None,
) -> dict[str, Any]:
    """The config.json of a model of the published recipe (docs/model-format.md). Nothing but the letters is checked.

    Args:
        layers: A letter each, of LETTERS.
        hidden_size: Width of the residual stream.
        num_heads: Of all mixers that have heads.
        inner_size: Of the MLP; 0 for a model without.
        window: Keys, a query's own included; of use where a layer is W.
        feature_dim: Size of a head's queries and keys in linear attention.
        enc_length: Tokens of a prefix; of use where a layer is P.
        head_dim: None for hidden_size / num_heads.
        conv_size: Channels of a convolution, or of a scan; None for 2 · hidden_size.
        scan_state: Numbers of state of each channel of a scan: of S and M.
        max_length: The most tokens of a sequence; of use where a layer is Y.
        vocab_size: Number of tokens.
        end_token_id: The token that starts and ends a text, if there is one.

    Raises ValueError for a letter that LETTERS has not.
    """
    if unknown := [letter for letter in layers if letter not in LETTERS]:
        raise ValueError(f"layers: found letter {unknown[0]!r}, expected letters among {', '.join(LETTERS)}")
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    conv_size = 2 * hidden_size if conv_size is None else conv_size
    conv = {
        "mixer": "gated_conv",
        "inner_size": conv_size,
        "kernel_size": 3,
        "bias": True,
    }
    taylor = {
        "mixer": "linear_attention",
        "num_heads": num_heads,
        "feature_dim": feature_dim,
        "head_dim": head_dim,
        "eps": 1e-12,
    }
    attention = {
        "mixer": "sliding_window",
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "window": window,
        "scale": head_dim**-0.5,
        "qkv_bias": False,
        "out_bias": False,
        "rotary_dim": head_dim,
        "rotary_base": 10000.0,
        "rotary_interleaved": False,
    }
    full = {key: value for key, value in attention.items() if key != "window"}
    full |= {"mixer": "full_attention", "rotary_dim": head_dim // 2}
    scan = {
        "mixer": "selective_scan",
        "inner_size": conv_size,
        "state_size": scan_state,
        "kernel_size": 4,
        "dt_rank": -(-hidden_size // 16),
        "conv_bias": True,
        "bias": False,
    }
    mlp = {"gated": True, "activation": "silu", "inner_size": inner_size, "fc1_bias": False, "fc2_bias": False}
    prefix = taylor | {"mixer": "prefix_linear_attention", "enc_length": enc_length}
    mixers: dict[str, dict[str, Any]] = {"c": conv, "L": taylor, "W": attention}
    mixers |= {"P": prefix, "A": full, "S": scan}
    heads = {"num_heads": num_heads, "head_dim": head_dim}
    mixers["D"] = heads | {"mixer": "gated_delta_net", "key_dim": head_dim, "kernel_size": 4, "eps": 1e-5}
    mixers["D"] |= {"decay": True, "output_gate": True}
    mixers["G"] = heads | {"mixer": "gated_linear_attention", "key_dim": head_dim // 2, "gate_rank": 16}
    mixers["G"] |= {"gate_normalizer": 16.0, "eps": 1e-5}
    mixers["M"] = heads | {"mixer": "mamba2", "num_heads": conv_size // head_dim, "state_size": scan_state}
    mixers["M"] |= {"num_groups": 1, "kernel_size": 4, "eps": 1e-5, "conv_bias": True}
    rank, gate_rank = (max(32, 32 * round(size / 32)) for size in (1.8 * hidden_size**0.5, 0.6 * hidden_size**0.8))
    mixers["R"] = heads | {"mixer": "rwkv7", "hidden_size": hidden_size, "eps": head_dim * 1e-5}
    mixers["R"] |= {"decay_rank": rank, "rate_rank": rank, "gate_rank": gate_rank}
    mixers["r"] = {"mixer": "rwkv4", "hidden_size": hidden_size, "inner_size": hidden_size}
    mixers["H"] = heads | {"mixer": "h3", "kernel_size": 64, "num_modes": 32}
    mixers["Y"] = {"mixer": "hyena", "inner_size": hidden_size, "kernel_size": 3, "filter_size": 64}
    mixers["Y"] |= {"max_length": max_length}
    return {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": -(-vocab_size // 8) * 8,
        "hidden_size": hidden_size,
        "norm": {"type": "rms_norm", "eps": 1e-5},
        "mlp": mlp if inner_size else None,
        "tie_embeddings": True,
        "bos_token_id": end_token_id,
        "eos_token_id": end_token_id,
        "layers": [mixers[letter] for letter in layers],
    }


def _based(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    inner_size: int,
    linear: Iterable[int],
    window: Iterable[int],
    *,
    window_size: int = 256,
    vocab_size: int = 50257,
    linear_letter: str = "L",
) -> dict[str, Any]:
    """The recipe with convolutions but for the layers listed; the authors' window_size is not the number of keys."""
    linear, window = set(linear), set(window)
    layers = "".join(linear_letter if i in linear else "W" if i in window else "c" for i in range(num_layers))
    keys = window_size // 2 + 1
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "inner_size": inner_size, "window": keys}
    return recipe(layers, **sizes, vocab_size=vocab_size, end_token_id=vocab_size - 1)


def _attn(hidden_size: int, num_layers: int, num_heads: int, inner_size: int) -> dict[str, Any]:
    """The authors' transformers, to which they compare."""
    layers = "A" * num_layers
    config = recipe(layers, hidden_size, num_heads, inner_size, vocab_size=50257, end_token_id=50256)
    return config | {"padded_vocab_size": 50272}


def _mamba(
    hidden_size: int, num_layers: int, *, vocab_size: int = 50277, padded_vocab_size: int = 50280
) -> dict[str, Any]:
    """Scans without MLPs. By default with GPT-NeoX's tokens, whose first one ends a text."""
    config = recipe("S" * num_layers, hidden_size, 1, 0, vocab_size=vocab_size, end_token_id=0)
    return config | {"padded_vocab_size": padded_vocab_size}


def _authors_mamba(hidden_size: int) -> dict[str, Any]:
    """With GPT-2's tokens."""
    config = _mamba(hidden_size, 46, vocab_size=50257, padded_vocab_size=50288)
    return config | {"bos_token_id": 50256, "eos_token_id": 50256}


_OF_1_3B = ([1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34])

SIZES: dict[str, Callable[[], dict[str, Any]]] = {
    "tiny": lambda: _based(128, 7, 4, 256, [1, 6], [2], window_size=16, vocab_size=258),
    "60m": lambda: _based(512, 12, 8, 1024, [1, 6], [2, 7]),
    "360m": lambda: _based(1024, 27, 16, 2048, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    "1.3b": lambda: _based(1792, 36, 16, 3584, *_OF_1_3B),
    # The first upload, with windows of 65 keys.
    "1.3b-w128": lambda: _based(1792, 36, 16, 3584, *_OF_1_3B, window_size=128),
    # JRT-360M-30B, of 26 layers, and JRT-1B-50B: the linear layers read a prefix of 1,024 tokens as a whole.
    "jrt-360m": lambda: _based(1024, 26, 16, 2048, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22], linear_letter="P"),
    "jrt-1.3b": lambda: _based(1792, 36, 16, 3584, *_OF_1_3B, linear_letter="P"),
    "attn-360m": lambda: _attn(1024, 24, 16, 2816),
    "attn-360M-30B": lambda: _attn(1024, 24, 16, 2816),
    "attn-1b": lambda: _attn(1680, 36, 24, 4480),
    "attn-1b-50bn": lambda: _attn(1680, 36, 24, 4480),
    "mamba-360m": lambda: _authors_mamba(1024),
    "mamba-360M-30B": lambda: _authors_mamba(1024),
    "mamba-1b": lambda: _authors_mamba(2048),
    "mamba-1b-50b": lambda: _authors_mamba(2048),
    "mamba-130m": lambda: _mamba(768, 24),
    "mamba-370m": lambda: _mamba(1024, 48),
    "mamba-790m": lambda: _mamba(1536, 48),
    "mamba-1.4b": lambda: _mamba(2048, 48),
    "mamba-2.8b": lambda: _mamba(2560, 64),
}
"""Names for `named_config`: 360m and 1.3b are the published models' shapes, tiny and 60m smaller ones of that recipe;
attn-… are the authors' transformers, mamba-… the Mambas that they and state-spaces published."""
