"""The kinds of models whose recall is compared. A new kind is one more entry of FAMILIES.

For a mixer that the runtime and `based.torch` have, an entry with its layers is all: its bytes follow from the config,
the runtime measures its recall, and tables, columns and the figure have it.

Every model has two layers and no MLP: a gated convolution, which brings a key and its value together, and the mixer
that is to recall; or two such mixers, where the authors have it so. As in their experiments there is no positional
encoding, and LayerNorm but for Mamba and Mamba-2.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from based import sizes
from based._core import ModelConfig


class Grid(Protocol):
    """What a sweep varies: see Sweep, which says what each is."""

    @property
    def vocab_size(self) -> int:
        """Of the models."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden sizes of BASED, attention and windows."""

    @property
    def rival_widths(self) -> tuple[int, ...]:
        """Hidden sizes of all other families."""

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Of BASED."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys."""

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Numbers of state of each channel of a scan."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be trained."""

    family: str
    width: int
    size: int
    """What makes the state of a width larger or smaller: see Family.size."""
    config: ModelConfig
    num_tokens: int
    """Of the longest text: what a state that grows is counted at."""

    @property
    def name(self) -> str:
        """Such as "based-d64-f16"."""
        return f"{self.family}-d{self.width}-{FAMILIES[self.family].size[0]}{self.size}"

    @property
    def state_nbytes(self) -> int:
        """Bytes that a decoder keeps of the longest text, in float32: `based.sizes.state_nbytes`."""
        return sizes.state_nbytes(self.config, "float32", self.num_tokens)

    @property
    def authors_nbytes(self) -> int:
        """Bytes as the authors count them in their Figure 2: Family.counted, in float32."""
        return 4 * FAMILIES[self.family].counted(self.width, self.size)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of models."""

    label: str
    """In the figure."""
    marker: str
    """In the figure, matplotlib's name."""
    line: str | tuple[int, tuple[int, ...]]
    """Likewise."""
    size: str
    """What Candidate.size is: a column of the results, whose first letter stands in a model's name."""
    shapes: Callable[[Grid], Iterable[tuple[int, int]]]
    """Widths and sizes of its models in a sweep."""
    layers: Callable[[int, int], list[dict[str, Any]]]
    """As config.json says them, from width and size."""
    counted: Callable[[int, int], int]
    """How many numbers of state the authors count, from width and size: those of the mixers, without the first layer's
    convolution and without the inputs of a mixer's own one. Where they count none, what this rule makes of it."""
    differences: tuple[str, ...]
    """From the model that the authors train under this name, besides the training."""
    norm: str = "layer_norm"
    scaled_output: bool = False
    """Whether the authors draw the mixers' output projections smaller than other matrices: a rule of theirs asks for
    their name."""
    multiple: int = 1
    """Of which its widths are multiples."""

    def candidates(self, sweep: Grid) -> list[Candidate]:
        """Its models in a sweep. Raises ValueError for a width that it cannot have."""
        name = next(name for name, family in FAMILIES.items() if family is self)
        found = []
        for width, size in self.shapes(sweep):
            if width % self.multiple:
                raise ValueError(f"a width is {width}, expected a multiple of {self.multiple} for the family {name}")
            config = _model(sweep.vocab_size, width, self.layers(width, size), self.norm)
            found.append(Candidate(name, width, size, config, sweep.max_length))
        return found


def _conv(width: int) -> dict[str, Any]:
    return {"mixer": "gated_conv", "inner_size": width, "kernel_size": 3, "bias": True}


def _taylor(width: int, feature_dim: int) -> dict[str, Any]:
    return {"mixer": "linear_attention", "num_heads": 1, "feature_dim": feature_dim, "head_dim": width, "eps": 1e-12}


def _attention(width: int) -> dict[str, Any]:
    return {
        "mixer": "full_attention",
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": width,
        "scale": width**-0.5,
        "qkv_bias": True,
        "out_bias": True,
        "rotary_dim": 0,
        "rotary_base": 10000.0,
        "rotary_interleaved": False,
    }


def _scan(width: int, state_size: int) -> dict[str, Any]:
    return {
        "mixer": "selective_scan",
        "inner_size": 2 * width,
        "state_size": state_size,
        "kernel_size": 4,
        "dt_rank": -(-width // 16),
        "conv_bias": True,
        "bias": False,
    }


def _delta(width: int, heads: int, expand: int, *, decay: bool) -> dict[str, Any]:
    return {
        "mixer": "gated_delta_net",
        "num_heads": heads,
        "key_dim": width // heads,
        "head_dim": expand * width // heads,
        "kernel_size": 4,
        "eps": 1e-5,
        "decay": decay,
        "output_gate": False,
    }


def _mamba2(width: int, state_size: int) -> dict[str, Any]:
    return {
        "mixer": "mamba2",
        "num_heads": 2 * width // 64,
        "head_dim": 64,
        "state_size": state_size,
        "num_groups": 1,
        "kernel_size": 4,
        "eps": 1e-5,
        "conv_bias": True,
    }


def _gla(width: int, heads: int) -> dict[str, Any]:
    return {
        "mixer": "gated_linear_attention",
        "num_heads": heads,
        "key_dim": width // (2 * heads),
        "head_dim": width // heads,
        "gate_rank": 16,
        "gate_normalizer": 16.0,
        "eps": 1e-5,
    }


def _rwkv7(width: int, heads: int) -> dict[str, Any]:
    return {
        "mixer": "rwkv7",
        "hidden_size": width,
        "num_heads": heads,
        "head_dim": 64,
        "decay_rank": 16,
        "rate_rank": 16,
        "gate_rank": 64,
        "eps": 64e-5,
    }


def _h3(width: int, state_size: int) -> dict[str, Any]:
    return {
        "mixer": "h3",
        "num_heads": width // 2,
        "head_dim": 2,
        "kernel_size": state_size,
        "num_modes": state_size // 2,
    }


def _hyena(width: int, max_length: int) -> dict[str, Any]:
    return {"mixer": "hyena", "inner_size": width, "kernel_size": 3, "max_length": max_length, "filter_size": 64}


def _rwkv4(width: int) -> dict[str, Any]:
    return {"mixer": "rwkv4", "hidden_size": width, "inner_size": width}


def _model(vocab_size: int, width: int, layers: list[dict[str, Any]], norm: str) -> ModelConfig:
    document = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "hidden_size": width,
        "norm": {"type": norm, "eps": 1e-5},
        "mlp": None,
        "tie_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "layers": layers,
    }
    return ModelConfig.from_json(json.dumps(document), "recall")


_NO_IDENTITY = "nothing is added behind a mixer; the authors' blocks, whose MLP is the identity, add norm2(r) to r"
"""Of every family but those whose blocks the authors take from elsewhere."""
_CONV_FIRST = (
    "layer 0 is W_out(SiLU(conv(u1)) * u2) + b with [u1|u2] = W_in u + b, 3 taps and no bias of the convolution; the "
    "authors' BaseConv is conv(u) * (W u + b) + u, with a bias of the convolution, without SiLU",
    _NO_IDENTITY,
)
"""Of every family with a convolution before the mixer."""
_LAST_NORM = "the last norm is an RMSNorm; the authors' is a LayerNorm"
_MAMBA = (
    _LAST_NORM,
    "the first weights are mamba_ssm's; a version of the authors' code (0cd64f8) draws all linear layers with 0.02 and "
    "sets the bias of W_dt to zero",
)

FAMILIES: dict[str, Family] = {
    "based": Family(
        label="BASED",
        marker="o",
        line="-",
        size="feature_dim",
        shapes=lambda sweep: [(width, f) for width in sweep.widths for f in sweep.feature_dims],
        layers=lambda width, f: [_conv(width), _taylor(width, f)],
        counted=lambda width, f: (1 + f + f * (f + 1) // 2) * (width + 1),
        differences=_CONV_FIRST,
    ),
    "attention": Family(
        label="full attention",
        marker="s",
        line="--",
        size="window",
        shapes=lambda sweep: [(width, sweep.max_length) for width in sweep.widths],
        layers=lambda width, _: [_conv(width), _attention(width)],
        counted=lambda width, tokens: 2 * tokens * width,
        differences=(*_CONV_FIRST, "attention has no dropout; the authors' drops a tenth of its probabilities"),
        scaled_output=True,
    ),
    "window": Family(
        label="sliding window",
        marker="D",
        line=":",
        size="window",
        shapes=lambda sweep: [(max(sweep.widths), window) for window in sweep.windows],
        layers=lambda width, window: [
            _conv(width),
            _attention(width) | {"mixer": "sliding_window", "window": window},
        ],
        counted=lambda width, window: 2 * window * width,
        differences=(*_CONV_FIRST, "a window of w is w keys; the authors' mask leaves w + 1, which they count as w"),
        scaled_output=True,
    ),
    "mamba": Family(
        label="Mamba",
        marker="^",
        line="-.",
        size="state_size",
        shapes=lambda sweep: [(width, n) for width in sweep.rival_widths for n in sweep.state_sizes],
        layers=lambda width, n: [_scan(width, n), _scan(width, n)],
        counted=lambda width, n: 2 * 2 * width * n,
        differences=_MAMBA,
        norm="rms_norm",
        scaled_output=True,
    ),
    "delta_net": Family(
        label="DeltaNet",
        marker="v",
        line=(0, (6, 2)),
        size="num_heads",
        shapes=lambda sweep: [(width, 2) for width in sweep.rival_widths],
        layers=lambda width, heads: [_conv(width), _delta(width, heads, 1, decay=False)],
        counted=lambda width, heads: width * width // heads,
        differences=(*_CONV_FIRST, "q, k and v are float32; the authors round them to bfloat16"),
        multiple=2,
    ),
    "gated_delta_net": Family(
        label="Gated DeltaNet",
        marker="P",
        line=(0, (4, 1, 1, 1, 1, 1)),
        size="num_heads",
        shapes=lambda sweep: [(width, 2) for width in sweep.rival_widths],
        layers=lambda width, heads: [_conv(width), _delta(width, heads, 2, decay=True)],
        counted=lambda width, heads: 2 * width * width // heads,
        differences=(*_CONV_FIRST, "q, k, v and the gates are float32; the authors round them to bfloat16"),
        multiple=2,
    ),
    "mamba2": Family(
        label="Mamba-2",
        marker="<",
        line=(0, (8, 1, 1, 1)),
        size="state_size",
        shapes=lambda sweep: [(width, n) for width in sweep.rival_widths for n in sweep.state_sizes],
        layers=lambda width, n: [_mamba2(width, n), _mamba2(width, n)],
        counted=lambda width, n: 2 * 2 * width * n,
        differences=(_LAST_NORM,),
        norm="rms_norm",
        scaled_output=True,
        multiple=32,
    ),
    "gla": Family(
        label="GLA",
        marker="X",
        line=(0, (3, 3)),
        size="num_heads",
        shapes=lambda sweep: [(width, 2) for width in sweep.rival_widths],
        layers=lambda width, heads: [_conv(width), _gla(width, heads)],
        counted=lambda width, heads: width * width // (2 * heads),
        differences=_CONV_FIRST,
        multiple=4,
    ),
    "rwkv7": Family(
        label="RWKV-7",
        marker="*",
        line=(0, (6, 1, 2, 1)),
        size="num_heads",
        shapes=lambda sweep: [(width, width // 64) for width in sweep.rival_widths],
        layers=lambda width, heads: [_conv(width), _rwkv7(width, heads)],
        counted=lambda _, heads: heads * 64 * 64,
        differences=(
            *_CONV_FIRST,
            "the first weights are those of RWKV-LM's first layer; the authors draw all matrices with 0.02, and "
            "the mixes of two tokens, k_k, k_a, r_k and all biases begin as zeros",
        ),
        multiple=64,
    ),
    "h3": Family(
        label="H3",
        marker="p",
        line=(0, (2, 1)),
        size="state_size",
        shapes=lambda sweep: [(width, width // 4) for width in sweep.rival_widths],
        layers=lambda width, n: [_h3(width, n), _h3(width, n)],
        counted=lambda width, n: 2 * width * n,
        differences=(_NO_IDENTITY,),
        multiple=8,
    ),
    "hyena": Family(
        label="Hyena",
        marker="h",
        line=(0, (1, 2)),
        size="window",
        shapes=lambda sweep: [(width, sweep.max_length) for width in sweep.rival_widths],
        layers=lambda width, tokens: [_hyena(width, tokens), _hyena(width, tokens)],
        counted=lambda width, tokens: 2 * width * tokens,
        differences=(
            _NO_IDENTITY,
            "what the filter reads of a place is fixed: the time, a cosine, a sine; the authors' training changes them",
        ),
        scaled_output=True,
    ),
    "rwkv4": Family(
        label="RWKV-4",
        marker=">",
        line=(0, (1, 1, 4, 1)),
        size="state_size",
        shapes=lambda sweep: [(width, 3) for width in sweep.rival_widths],
        layers=lambda width, _: [_rwkv4(width), _rwkv4(width)],
        counted=lambda width, n: 2 * width * n,
        differences=(
            _NO_IDENTITY,
            "the authors count no state of RWKV-4; authors_nbytes is 3 numbers a channel, without the token before",
            "the first decays and mixes of two tokens are those of 2 layers; the authors' are of the first 2 of 12",
            "the results of the sums are float32; the authors round them to bfloat16",
        ),
    ),
}
