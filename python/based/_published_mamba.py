"""Translates a published Mamba (mamba_ssm 1) into ours, as _published.py does for BASED: see docs/converting.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from based._core import FormatError
from based._published import _MAX_LAYERS, HEAD, Recipe, Shape, _Fields, _show, _Weights

EMBEDDING = "backbone.embedding.weight"

# Of the authors' models: their script writes fields of its GPT-2 beside Mamba's. attn_cfg is of layers not there.
_NO_EFFECT = """
attn_cfg n_embd n_head n_positions residual_in_fp32 scale_attn_by_inverse_layer_idx use_fast_path
"""
# Of ssm_cfg: how training begins, and which kernels run.
_NO_EFFECT_IN_SSM = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
_VOCAB_SIZE = 50277  # mamba_ssm's default: GPT-NeoX's tokens


def is_mamba(config: object) -> bool:
    """Whether a published config.json is mamba_ssm's."""
    return isinstance(config, dict) and ("d_model" in config or "ssm_cfg" in config)


def has_gpt2_tokens(config: Mapping[str, Any]) -> bool:
    """Whether a Mamba reads GPT-2's tokens though its vocab_size is mamba_ssm's default.

    The authors' script trains all its models on these. It writes the fields of its GPT-2, too.
    """
    return config.get("vocab_size") == _VOCAB_SIZE and {"n_embd", "n_positions"} <= config.keys()


def translate_mamba(
    config: object, shapes: Mapping[str, Shape], head_differs: bool, where: str, weights_where: str
) -> tuple[dict[str, Any], list[Recipe]]:
    """Our config (a JSON object) and how to make its tensors: as _published.translate()."""
    top = _Fields(config, where)
    weights = _Weights(shapes, weights_where, where)

    d = top.integer("d_model")
    num_layers = top.integer("n_layer")
    vocab_size = top.integer("vocab_size", _VOCAB_SIZE)
    multiple = top.integer("pad_vocab_size_multiple", 8)
    padded_vocab_size = -(-vocab_size // multiple) * multiple
    rms_norm = top.boolean("rms_norm", True)
    tied = top.boolean("tie_embeddings", True)
    if top.integer("d_intermediate", 0, minimum=0) != 0:
        raise top.error("d_intermediate", "0: a Mamba with MLPs is not supported")
    if top.get("attn_layer_idx", []) != []:
        raise top.error("attn_layer_idx", "an empty list: a Mamba with attention layers is not supported")

    if shapes and not any(name.startswith("backbone.") for name in shapes):
        found = ", ".join(sorted(shapes)[:3])
        raise FormatError(
            f"{weights_where}: found tensors {found}, …, expected names like {EMBEDDING}, as {where} is a Mamba's"
        )
    stored = {int(match[1]) for name in shapes if (match := re.match(r"backbone\.layers\.(\d{1,9})\.", name))}
    if stored and max(stored) + 1 != num_layers:
        raise FormatError(f"{where}: n_layer: found {num_layers}, but {weights_where} holds {max(stored) + 1} layers")
    if num_layers > _MAX_LAYERS:
        raise FormatError(f"{where}: n_layer: found {num_layers}, expected at most {_MAX_LAYERS}")

    vocabulary = f"vocab_size {vocab_size} rounded up to a multiple of {multiple}, d_model {d}"
    weights.take("embedding.weight", EMBEDDING, (padded_vocab_size, d), vocabulary)
    if head_differs or (not tied and HEAD not in shapes):  # a head equal to the embedding is the embedding
        weights.take("lm_head.weight", HEAD, (padded_vocab_size, d), vocabulary)
    weights.left.discard(HEAD)

    def take_norm(ours: str, published: str) -> None:
        weights.take(f"{ours}.weight", f"{published}.weight", (d,), f"d_model {d}")
        weights.take_bias(f"{ours}.bias", f"{published}.bias", d, not rms_norm, f"rms_norm {_show(rms_norm)}")

    take_norm("final_norm", "backbone.norm_f")
    mixer = _Scan(_Fields(top.get("ssm_cfg", {}), where, "ssm_cfg."), d)
    for layer in range(num_layers):
        take_norm(f"layers.{layer}.norm1", f"backbone.layers.{layer}.norm")
        mixer.take(weights, f"layers.{layer}.mixer", f"backbone.layers.{layer}.mixer")

    token_ids = {key: top.integer(key, None, minimum=0, null=True) for key in ("bos_token_id", "eos_token_id")}
    for key, token in token_ids.items():
        if token is not None and token >= vocab_size:
            raise top.error(key, f"a token below vocab_size {vocab_size}, or null")
    top.finish(_NO_EFFECT.split())
    weights.finish()
    return {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "hidden_size": d,
        "norm": {"type": "rms_norm" if rms_norm else "layer_norm", "eps": 1e-5},
        "mlp": None,
        "tie_embeddings": not head_differs,
        **token_ids,
        "layers": [mixer.config] * num_layers,
    }, weights.recipes


class _Scan:
    """What ssm_cfg says of every layer."""

    def __init__(self, fields: _Fields, d: int) -> None:
        if fields.get("layer", "Mamba1") != "Mamba1":
            raise fields.error("layer", '"Mamba1": other layers are not supported')
        self.state_size = fields.integer("d_state", 16)
        self.kernel_size = fields.integer("d_conv", 4)
        expand = fields.number("expand", 2, maximum=1 << 16)
        self.inner_size = int(expand * d)
        if self.inner_size < 1:
            raise fields.error("expand", f"a number that makes one channel at least of d_model {d}")
        rank = fields.get("dt_rank", "auto")
        if rank != "auto" and type(rank) is not int:
            raise fields.error("dt_rank", '"auto" or an integer')
        self.dt_rank = math.ceil(d / 16) if rank == "auto" else fields.integer("dt_rank")
        self.conv_bias = fields.boolean("conv_bias", True)
        self.bias = fields.boolean("bias", False)
        fields.finish(_NO_EFFECT_IN_SSM)
        self.d = d
        self.channels = f"ssm_cfg.expand {expand:g}, d_model {d}"
        self.config = {
            "mixer": "selective_scan",
            "inner_size": self.inner_size,
            "state_size": self.state_size,
            "kernel_size": self.kernel_size,
            "dt_rank": self.dt_rank,
            "conv_bias": self.conv_bias,
            "bias": self.bias,
        }

    def take(self, weights: _Weights, ours: str, published: str) -> None:
        d, e, n, k, r = self.d, self.inner_size, self.state_size, self.kernel_size, self.dt_rank

        def take(name: str, shape: Shape, reason: str, source: str | None = None, **options: Any) -> None:
            weights.take(f"{ours}.{name}", f"{published}.{source or name}", shape, reason, **options)

        def take_bias(name: str, size: int, wanted: bool, key: str, source: str | None = None, **options: Any) -> None:
            reason = f"ssm_cfg.{key} {_show(wanted)}"
            weights.take_bias(f"{ours}.{name}", f"{published}.{source or name}", size, wanted, reason, **options)

        states = f"{self.channels}, ssm_cfg.d_state {n}"
        steps = f"{self.channels}, ssm_cfg.dt_rank {r}"
        taps = f"{self.channels}, ssm_cfg.d_conv {k}"
        take("in_proj.weight", (2 * e, d), self.channels)
        take_bias("in_proj.bias", 2 * e, self.bias, "bias")
        take("conv.weight", (e, 1, k), taps, "conv1d.weight", to=(e, k), wide=True)
        take_bias("conv.bias", e, self.conv_bias, "conv_bias", "conv1d.bias", wide=True)
        take("x_proj.weight", (r + 2 * n, e), f"{steps}, ssm_cfg.d_state {n}")
        take("dt_proj.weight", (e, r), steps)
        take("dt_proj.bias", (e,), self.channels, wide=True)
        take("A_log", (e, n), states, wide=True)
        take("D", (e,), self.channels, wide=True)
        take("out_proj.weight", (d, e), self.channels)
        take_bias("out_proj.bias", d, self.bias, "bias")
