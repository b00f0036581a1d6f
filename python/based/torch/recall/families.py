"""The kinds of models whose recall is compared. A new kind is one more entry of FAMILIES.

For a mixer that the runtime has (Mamba, H3 and RWKV once it does), an entry with its layer is all: its state counts by
`based.sizes.state_nbytes`, and the runtime measures its recall, as they do for the others.

Every model has two layers and no MLP: a gated convolution, which brings a key and its value together, and the mixer
that is to recall. As in the authors' experiments there is one head, no positional encoding, and LayerNorm.
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
        """Hidden sizes."""

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Of BASED."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Keys."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be trained."""

    family: str
    width: int
    size: int
    """What makes the state of a width larger or smaller: see Family.size."""
    config: ModelConfig

    @property
    def name(self) -> str:
        """Such as "based-d64-f16"."""
        return f"{self.family}-d{self.width}-{FAMILIES[self.family].size[0]}{self.size}"

    @property
    def state_nbytes(self) -> int:
        """Bytes of a sequence's state that fills every window, in float32: `based.sizes.state_nbytes`."""
        return sizes.state_nbytes(self.config, "float32")


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of models."""

    label: str
    """In the figure."""
    size: str
    """What Candidate.size is: a column of the results."""
    shapes: Callable[[Grid], Iterable[tuple[int, int]]]
    """Widths and sizes of its models in a sweep."""
    mixer: Callable[[int, int], dict[str, Any]]
    """The second layer, as config.json says it, from width and size."""

    def candidates(self, sweep: Grid) -> list[Candidate]:
        """Its models in a sweep."""
        name = next(name for name, family in FAMILIES.items() if family is self)
        return [
            Candidate(name, width, size, _model(sweep.vocab_size, width, self.mixer(width, size)))
            for width, size in self.shapes(sweep)
        ]


def _taylor(width: int, feature_dim: int) -> dict[str, Any]:
    return {"mixer": "linear_attention", "num_heads": 1, "feature_dim": feature_dim, "head_dim": width, "eps": 1e-12}


def _window(width: int, window: int) -> dict[str, Any]:
    return {
        "mixer": "sliding_window",
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": width,
        "window": window,
        "scale": width**-0.5,
        "qkv_bias": True,
        "out_bias": True,
        "rotary_dim": 0,
        "rotary_base": 10000.0,
        "rotary_interleaved": False,
    }


def _model(vocab_size: int, width: int, mixer: dict[str, Any]) -> ModelConfig:
    document = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size,
        "hidden_size": width,
        "norm": {"type": "layer_norm", "eps": 1e-5},
        "mlp": None,
        "tie_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "layers": [{"mixer": "gated_conv", "inner_size": width, "kernel_size": 3, "bias": True}, mixer],
    }
    return ModelConfig.from_json(json.dumps(document), "recall")


FAMILIES: dict[str, Family] = {
    "based": Family(
        label="BASED",
        size="feature_dim",
        shapes=lambda sweep: [(width, f) for width in sweep.widths for f in sweep.feature_dims],
        mixer=_taylor,
    ),
    "attention": Family(
        label="full attention",
        size="window",
        shapes=lambda sweep: [(width, sweep.max_length) for width in sweep.widths],
        mixer=_window,
    ),
    "window": Family(
        label="sliding window",
        size="window",
        shapes=lambda sweep: [(max(sweep.widths), window) for window in sweep.windows],
        mixer=_window,
    ),
}
