"""Random models of any architecture: in our format, and as published checkpoints written without torch.

Everything follows from choices: from a seed (`Seeded`) or from hypothesis (the strategies at the end), which shrinks.
Weights are scaled so that logits have a standard deviation of about 2 and every layer matters.
"""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st

from tests.reference.files import round_to, to_float64, write_model, write_safetensors

Array = np.ndarray[Any, Any]
Config = dict[str, Any]
T = TypeVar("T")

GATED = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_approx": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "sqrelu": "relu_squared",
}
DTYPES = ("float32", "bfloat16", "float16")


class Choose(Protocol):
    def integer(self, low: int, high: int) -> int: ...
    def one_of(self, values: Sequence[T]) -> T: ...


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def one_of(self, values: Sequence[T]) -> T:
        return self.random.choice(values)


class _Drawn:
    """Choices by hypothesis; the first value of a list is the simplest."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one_of(self, values: Sequence[T]) -> T:
        return self.draw(st.sampled_from(list(values)))


# ---- our models ------------------------------------------------------------------------------------------------------


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a model of ours (docs/model-format.md)."""
    d, mlp = config["hidden_size"], config["mlp"]
    layer_norm = config["norm"]["type"] == "layer_norm"
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, cols: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, cols)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (d,)
        if layer_norm:
            shapes[f"{name}.bias"] = (d,)

    linear("embedding", config["padded_vocab_size"], d, False)
    if not config["tie_embeddings"]:
        linear("lm_head", config["padded_vocab_size"], d, False)
    norm("final_norm")
    for i, layer in enumerate(config["layers"]):
        name = f"layers.{i}.mixer"
        if layer["mixer"] == "gated_conv":
            e = layer["inner_size"]
            linear(f"{name}.in_proj", 2 * e, d, layer["bias"])
            shapes[f"{name}.conv.weight"] = (e, layer["kernel_size"])
            linear(f"{name}.out_proj", d, e, layer["bias"])
        elif layer["mixer"] == "linear_attention":
            h, f, head_dim = layer["num_heads"], layer["feature_dim"], layer["head_dim"]
            linear(f"{name}.proj_q", h * f, d, False)
            linear(f"{name}.proj_k", h * f, d, False)
            linear(f"{name}.proj_v", h * head_dim, d, False)
            linear(f"{name}.out_proj", d, h * head_dim, False)
        elif layer["mixer"] == "selective_scan":
            e, n, r = layer["inner_size"], layer["state_size"], layer["dt_rank"]
            linear(f"{name}.in_proj", 2 * e, d, layer["bias"])
            shapes[f"{name}.conv.weight"] = (e, layer["kernel_size"])
            if layer["conv_bias"]:
                shapes[f"{name}.conv.bias"] = (e,)
            linear(f"{name}.x_proj", r + 2 * n, e, False)
            linear(f"{name}.dt_proj", e, r, True)
            shapes[f"{name}.A_log"] = (e, n)
            shapes[f"{name}.D"] = (e,)
            linear(f"{name}.out_proj", d, e, layer["bias"])
        elif layer["mixer"] == "prefix_linear_attention":
            h, f, head_dim = layer["num_heads"], layer["feature_dim"], layer["head_dim"]
            for part in ("q", "k", "k_enc"):
                linear(f"{name}.proj_{part}", h * f, d, False)
            for part in ("v", "v_enc"):
                linear(f"{name}.proj_{part}", h * head_dim, d, False)
            linear(f"{name}.out_proj", d, h * head_dim, False)
        elif layer["mixer"] == "gated_delta_net":
            h, dk, head_dim = layer["num_heads"], layer["key_dim"], layer["head_dim"]
            linear(f"{name}.qkv_proj", h * (2 * dk + head_dim), d, False)
            linear(f"{name}.b_proj", h, d, False)
            if layer["decay"]:
                linear(f"{name}.a_proj", h, d, False)
                shapes[f"{name}.A_log"] = shapes[f"{name}.dt_bias"] = (h,)
            if layer["output_gate"]:
                linear(f"{name}.g_proj", h * head_dim, d, False)
            shapes[f"{name}.conv.weight"] = (h * (2 * dk + head_dim), layer["kernel_size"])
            shapes[f"{name}.norm.weight"] = (head_dim,)
            linear(f"{name}.out_proj", d, h * head_dim, False)
        elif layer["mixer"] == "rwkv4":
            e = layer["inner_size"]
            for part in "kvr":
                linear(f"{name}.{part}_proj", e, d, False)
                shapes[f"{name}.time_mix_{part}"] = (d,)
            shapes[f"{name}.time_decay"] = shapes[f"{name}.time_first"] = (e,)
            linear(f"{name}.out_proj", d, e, False)
        elif layer["mixer"] == "h3":
            h, modes = layer["num_heads"], layer["num_modes"]
            e = h * layer["head_dim"]
            linear(f"{name}.qkv_proj", 3 * e, d, True)
            shapes[f"{name}.shift_B"] = shapes[f"{name}.shift_C"] = (e, layer["kernel_size"])
            shapes[f"{name}.shift_D"] = (e,)
            shapes[f"{name}.log_dt"] = shapes[f"{name}.D"] = (h,)
            shapes[f"{name}.A_log"] = shapes[f"{name}.A_imag"] = (h, modes)
            shapes[f"{name}.B"] = shapes[f"{name}.C"] = (h, modes, 2)
            linear(f"{name}.out_proj", d, e, True)
        elif layer["mixer"] == "hyena":
            e, f = layer["inner_size"], layer["filter_size"]
            linear(f"{name}.in_proj", 3 * e, d, True)
            shapes[f"{name}.conv.weight"] = (3 * e, layer["kernel_size"])
            shapes[f"{name}.conv.bias"] = (3 * e,)
            for number, shape in enumerate(((f, 3), (f, f), (f, f), (e, f)), 1):
                shapes[f"{name}.filter.w{number}"] = shape
            for part in ("b1", "b2", "b3", "freq"):
                shapes[f"{name}.filter.{part}"] = (f,)
            shapes[f"{name}.filter.D"] = (e,)
            linear(f"{name}.out_proj", d, e, True)
        elif layer["mixer"] == "mamba2":
            h, e, n = layer["num_heads"], layer["num_heads"] * layer["head_dim"], layer["state_size"]
            channels = e + 2 * layer["num_groups"] * n
            linear(f"{name}.xbc_proj", channels, d, False)
            linear(f"{name}.z_proj", e, d, False)
            linear(f"{name}.dt_proj", h, d, False)
            shapes[f"{name}.conv.weight"] = (channels, layer["kernel_size"])
            if layer["conv_bias"]:
                shapes[f"{name}.conv.bias"] = (channels,)
            shapes[f"{name}.norm.weight"] = (e,)
            shapes[f"{name}.A_log"] = shapes[f"{name}.D"] = shapes[f"{name}.dt_bias"] = (h,)
            linear(f"{name}.out_proj", d, e, False)
        elif layer["mixer"] == "rwkv7":
            e = layer["num_heads"] * layer["head_dim"]
            for part in "rwkvag":
                shapes[f"{name}.mix_{part}"] = (layer["hidden_size"],)
            for part in "rkv":
                linear(f"{name}.{part}_proj", e, d, False)
            for part, rank in (("w", "decay_rank"), ("a", "rate_rank"), ("g", "gate_rank")):
                linear(f"{name}.{part}_down_proj", layer[rank], d, False)
                linear(f"{name}.{part}_up_proj", e, layer[rank], part != "g")
            for part in ("k_k", "k_a", "r_k", "norm.weight", "norm.bias"):
                shapes[f"{name}.{part}"] = (e,)
            linear(f"{name}.out_proj", d, e, False)
        elif layer["mixer"] == "gated_linear_attention":
            h, dk, head_dim, rank = layer["num_heads"], layer["key_dim"], layer["head_dim"], layer["gate_rank"]
            linear(f"{name}.qkv_proj", h * (2 * dk + head_dim), d, False)
            linear(f"{name}.g_proj", h * head_dim, d, False)
            linear(f"{name}.a_down_proj", rank, d, False)
            linear(f"{name}.a_up_proj", h * dk, rank, True)
            shapes[f"{name}.norm.weight"] = (head_dim,)
            linear(f"{name}.out_proj", d, h * head_dim, False)
        else:
            h, h_kv, head_dim = layer["num_heads"], layer["num_kv_heads"], layer["head_dim"]
            linear(f"{name}.qkv_proj", (h + 2 * h_kv) * head_dim, d, layer["qkv_bias"])
            linear(f"{name}.out_proj", d, h * head_dim, layer["out_bias"])
        norm(f"layers.{i}.norm1")
        if mlp is None:
            continue
        norm(f"layers.{i}.norm2")
        linear(f"layers.{i}.mlp.fc1", mlp["inner_size"] * (2 if mlp["gated"] else 1), d, mlp["fc1_bias"])
        linear(f"layers.{i}.mlp.fc2", d, mlp["inner_size"], mlp["fc2_bias"])
    return shapes


def model_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """Random weights, float32, by our names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in model_shapes(config).items():
        values = rng.standard_normal(shape)
        if "norm" in name:
            values = values * 0.2 + (1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            values *= 0.2
        elif name in ("embedding.weight", "lm_head.weight"):
            values *= 2 / np.sqrt(shape[1])
            values[config["vocab_size"] :] *= 0.1  # never the arg-max
        else:
            values *= 1 / np.sqrt(shape[-1] if len(shape) > 1 else 1)
        tensors[name] = values.astype(np.float32)
    return tensors


MIXERS = (
    "gated_conv",
    "linear_attention",
    "sliding_window",
    "prefix_linear_attention",
    "full_attention",
    "selective_scan",
    "gated_delta_net",
    "rwkv4",
    "h3",
    "hyena",
    "mamba2",
    "gated_linear_attention",
    "rwkv7",
)
"""The kinds that random models are made of."""

ON_A_GPU = (
    "gated_conv",
    "linear_attention",
    "sliding_window",
    "full_attention",
    "selective_scan",
    "prefix_linear_attention",
    "gated_delta_net",
)
"""Those that a GPU has kernels for."""


def _random_mixer(choose: Choose, kinds: Sequence[str], hidden_size: int) -> Config:
    kind = choose.one_of(list(kinds))
    if kind == "gated_conv":
        inner_size, kernel_size = choose.integer(1, 40), choose.integer(1, 6)
        return {
            "mixer": kind,
            "inner_size": inner_size,
            "kernel_size": kernel_size,
            "bias": choose.one_of([False, True]),
        }
    if kind == "linear_attention":
        return {
            "mixer": kind,
            "num_heads": choose.integer(1, 4),
            "feature_dim": choose.one_of([16, 1, 2, 3, 5, 8, 17, 24]),
            "head_dim": choose.one_of([16, 1, 3, 7, 8, 20, 33]),
            "eps": choose.one_of([1e-12, 0.0, 1e-3]),
        }
    if kind == "prefix_linear_attention":  # a prefix of one token: such models may be fed in any pieces
        return {
            "mixer": kind,
            "num_heads": choose.integer(1, 4),
            "feature_dim": choose.one_of([16, 1, 3, 8, 17]),
            "head_dim": choose.one_of([16, 1, 7, 20]),
            "enc_length": 1,
            "eps": choose.one_of([1e-12, 0.0, 1e-3]),
        }
    if kind == "selective_scan":
        return {
            "mixer": kind,
            "inner_size": choose.integer(1, 40),
            "state_size": choose.one_of([16, 1, 2, 5, 32]),
            "kernel_size": choose.integer(1, 5),
            "dt_rank": choose.one_of([4, 1, 2, 3, 7]),
            "conv_bias": choose.one_of([True, False]),
            "bias": choose.one_of([False, True]),
        }
    if kind == "gated_delta_net":
        return {
            "mixer": kind,
            "num_heads": choose.integer(1, 3),
            # A vector of one number has the length of its rounding where that cancels: C++ tests have such.
            "key_dim": choose.one_of([8, 3, 16, 21]),
            "head_dim": choose.one_of([16, 5, 8, 33]),
            "kernel_size": choose.integer(1, 5),
            "eps": choose.one_of([1e-5, 1e-3]),
            "decay": choose.one_of([True, False]),
            "output_gate": choose.one_of([True, False]),
        }
    if kind == "rwkv4":
        return {"mixer": kind, "hidden_size": hidden_size, "inner_size": choose.integer(1, 40)}
    if kind == "h3":
        return {
            "mixer": kind,
            "num_heads": choose.integer(1, 6),
            "head_dim": choose.one_of([2, 1, 3, 5]),
            "kernel_size": choose.integer(1, 20),
            "num_modes": choose.one_of([8, 1, 3, 17]),
        }
    if kind == "hyena":
        return {
            "mixer": kind,
            "inner_size": choose.integer(1, 40),
            "kernel_size": choose.integer(1, 4),
            "max_length": choose.one_of([1024, 2000]),  # more tokens than any test feeds a random model
            "filter_size": choose.integer(1, 16),
        }
    if kind == "mamba2":
        num_groups = choose.integer(1, 2)
        return {
            "mixer": kind,
            "num_heads": num_groups * choose.integer(1, 3),
            "head_dim": choose.one_of([16, 3, 8, 21]),
            "state_size": choose.one_of([16, 1, 5, 33]),
            "num_groups": num_groups,
            "kernel_size": choose.integer(1, 5),
            "eps": choose.one_of([1e-5, 1e-3]),
            "conv_bias": choose.one_of([True, False]),
        }
    if kind == "gated_linear_attention":
        return {
            "mixer": kind,
            "num_heads": choose.integer(1, 3),
            "key_dim": choose.one_of([8, 5, 16, 21]),
            "head_dim": choose.one_of([16, 5, 8, 33]),
            "gate_rank": choose.one_of([4, 1, 16]),
            "gate_normalizer": choose.one_of([16.0, 1.0]),
            "eps": choose.one_of([1e-5, 1e-3]),
        }
    if kind == "rwkv7":
        return {
            "mixer": kind,
            "hidden_size": hidden_size,
            "num_heads": choose.integer(1, 3),
            "head_dim": choose.one_of([8, 5, 16, 21]),
            "decay_rank": choose.one_of([4, 1, 16]),
            "rate_rank": choose.one_of([4, 1, 9]),
            "gate_rank": choose.one_of([4, 1, 16]),
            "eps": choose.one_of([64e-5, 1e-3]),
        }
    assert kind in ("sliding_window", "full_attention"), f"{kind} has no random shapes"
    num_kv_heads, head_dim = choose.integer(1, 3), choose.one_of([16, 1, 2, 3, 7, 8, 24, 33])
    return {
        "mixer": kind,
        "num_heads": num_kv_heads * choose.integer(1, 3),
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        **({"window": choose.one_of([9, 1, 2, 3, 17, 64])} if kind == "sliding_window" else {}),
        "scale": choose.one_of([head_dim**-0.5, 1.0, 0.1]),
        "qkv_bias": choose.one_of([False, True]),
        "out_bias": choose.one_of([False, True]),
        "rotary_dim": choose.integer(0, head_dim // 2 * 2),
        "rotary_base": choose.one_of([10000.0, 100.0, 1e6]),
        "rotary_interleaved": choose.one_of([False, True]),
    }


def random_model_config(choose: Choose, max_layers: int = 4, kinds: Sequence[str] = MIXERS) -> Config:
    """Any config that our format allows, small."""
    vocab_size, hidden_size = choose.integer(2, 70), choose.integer(1, 48)
    config = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": vocab_size + choose.integer(0, 9),
        "hidden_size": hidden_size,
        "norm": {"type": choose.one_of(["rms_norm", "layer_norm"]), "eps": choose.one_of([1e-5, 1e-3])},
        "mlp": {
            "gated": choose.one_of([True, False]),
            "activation": choose.one_of(["silu", "gelu", "gelu_tanh", "sigmoid", "relu", "relu_squared", "identity"]),
            "inner_size": choose.integer(1, 70),
            "fc1_bias": choose.one_of([False, True]),
            "fc2_bias": choose.one_of([False, True]),
        },
        "tie_embeddings": choose.one_of([True, False]),
        "bos_token_id": choose.one_of([None, 0]),
        "eos_token_id": choose.one_of([None, vocab_size - 1]),
        "layers": [_random_mixer(choose, kinds, hidden_size) for _ in range(choose.integer(1, max_layers))],
    }
    return config if choose.integer(0, 4) else config | {"mlp": None}


@dataclass(frozen=True)
class RandomModel:
    """A model directory to be, of ours."""

    config: Config
    seed: int
    dtype: str

    def tensors(self) -> dict[str, Array]:
        """The weights as they are stored, in float64."""
        drawn = model_tensors(self.config, self.seed)
        return {name: to_float64(round_to(values, self.dtype), self.dtype) for name, values in drawn.items()}

    def write(self, directory: Path) -> None:
        write_model(directory, self.config, model_tensors(self.config, self.seed), self.dtype)


def random_model(
    choose: Choose, max_layers: int = 4, dtypes: Sequence[str] = DTYPES, kinds: Sequence[str] = MIXERS
) -> RandomModel:
    config = random_model_config(choose, max_layers, kinds)
    return RandomModel(config, choose.integer(0, 1 << 30), choose.one_of(dtypes))


# ---- published checkpoints -------------------------------------------------------------------------------------------

# What transformers writes beside the model's own fields, and what the authors' code does not read for the output.
_NO_EFFECT: Config = {
    "resid_pdrop": 0.1,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "use_cache": True,
    "reorder_and_upcast_attn": False,
    "torch_dtype": None,
    "pruned_heads": {},
    "is_decoder": False,
    "temperature": 0.3,
    "top_k": 50,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "transformers_version": "4.36.2",
    "special_initializer": True,
    "fused_mlp": False,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "use_flash_attn": True,
    "residual_in_fp32": True,
    "fixed_decay": True,
    "decay_const": -5,
    "model_type": "gpt2",
}
# What the absence of a field says.
DEFAULTS: Config = {
    "layer_norm_epsilon": 1e-5,
    "rms_norm": False,
    "activation_function": "gelu_new",
    "n_inner": None,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "mlp_type": "base",
    "ff_mult": 2,
    "n_head_kv": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_fraction": 0,
    "rotary_emb_base": 10000,
    "rotary_emb_interleaved": False,
    "pad_vocab_size_multiple": 1,
    "tie_word_embeddings": True,
    "mixer": None,
    "alt_mixer": None,
    "alt_mixer_2": None,
    "alt_mixer_layers": None,
    "alt_mixer_2_layers": None,
    "n_positions": 0,
}
_MIXER_DEFAULTS: dict[str, Config] = {
    "gated_conv": {"expand_proj": 2, "kernel_size": 3, "use_bias": True},
    "linear_attention": {"num_heads": 16, "feature_dim": 16, "head_dim": None, "eps": 1e-12},
    "sliding_window": {"window_size": 128},
    "prefix_linear_attention": {"feature_dim": 16, "eps": 1e-12, "implementation": "default", "use_mask": True},
}


def _omit_defaults(choose: Choose, config: Config, defaults: Config) -> Config:
    """Some of the fields that say what their absence says are left out."""
    return {
        k: v for k, v in config.items() if not (k in defaults and v == defaults[k] and choose.one_of([False, True]))
    }


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint to be."""

    config: Config  # the published config.json
    expected: Config  # the config.json of ours that it means
    seed: int
    dtype: str = "float32"
    prefix: str = "model."
    container: str = "bin"  # bin, safetensors; with "-shards": two files and an index
    head: str = "shared"  # of a tied model: the embedding's storage, a copy, or absent
    ordered: bool = True  # an OrderedDict with _metadata, or a plain dict
    extras: bool = True  # metric counters and transformer.decay.decay
    conv_name: str = "conv"  # of a convolution's module

    def expected_tensors(self) -> dict[str, tuple[str, Array]]:
        """(dtype, bits) by our names."""
        drawn = model_tensors(self.expected, self.seed)
        return {name: (self.dtype, round_to(values, self.dtype)) for name, values in drawn.items()}

    def published_tensors(self) -> dict[str, tuple[str, Array]]:
        """(dtype, bits) by the names in the file. A head that shares the embedding's storage is the same array."""
        alternative = self.expected["mlp"]["gated"] and self.config.get("mlp_type") == "alt"
        published = publish_tensors(self.expected, self.expected_tensors(), alternative)
        embedding = published["transformer.embeddings.word_embeddings.weight"]
        if self.expected["tie_embeddings"] and self.head != "absent":
            copy = (embedding[0], embedding[1].copy())
            published["lm_head.weight"] = embedding if self.head == "shared" else copy
        published = {k.replace(".conv.conv.", f".{self.conv_name}.conv."): v for k, v in published.items()}
        if self.extras:
            published["transformer.decay.decay"] = ("float32", np.zeros(4, np.float32))
        published = {self.prefix + name: tensor for name, tensor in published.items()}
        if self.extras:
            published["val_metrics.num-tokens.count"] = ("int64", np.array(123))
        return published

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=2), encoding="utf-8")
        tensors = self.published_tensors()
        stem, suffix = ("pytorch_model", "bin") if self.container.startswith("bin") else ("model", "safetensors")
        if not self.container.endswith("-shards"):
            self._write_file(directory / f"{stem}.{suffix}", tensors)
            return
        names = list(tensors)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"{stem}-{number:05d}-of-00002.{suffix}"
            self._write_file(directory / shard, {name: tensors[name] for name in part})
            weight_map.update(dict.fromkeys(part, shard))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _write_file(self, path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
        if path.suffix == ".safetensors":
            write_safetensors(path, tensors)
        else:
            write_torch(path, tensors, ordered=self.ordered)


def publish_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[str, Array]], alternative_mlp: bool = False
) -> dict[str, tuple[str, Array]]:
    """Our tensors by their published names, without prefix: the inverse of conversion."""
    result: dict[str, tuple[str, Array]] = {}
    for name, (dtype, bits) in tensors.items():
        if name in ("embedding.weight", "lm_head.weight"):
            published = name.replace("embedding.", "transformer.embeddings.word_embeddings.")
        else:
            published = "transformer." + name.replace("final_norm", "ln_f").replace("qkv_proj", "Wqkv")
        if name.endswith("mixer.conv.weight"):
            published, bits = published.replace("conv.weight", "conv.conv.weight"), bits[:, None, :]
        if alternative_mlp and ".fc1." in name:  # fc1 is the gate, fc3 the value
            m = config["mlp"]["inner_size"]
            result[published.replace("fc1", "fc3")] = (dtype, bits[:m])
            bits = bits[m:]
        result[published] = (dtype, bits)
    return result


def random_checkpoint(choose: Choose, max_layers: int = 4) -> Checkpoint:
    """Any architecture that published configs can express and we run, small."""
    flag = [False, True]
    num_heads_kv, head_dim = choose.integer(1, 3), choose.one_of([16, 1, 2, 3, 7, 8, 24])
    num_heads = num_heads_kv * choose.integer(1, 2)
    odd_head_dim = choose.one_of(flag)  # heads · head_dim is not the hidden size
    d = choose.integer(4, 40) if odd_head_dim else num_heads * head_dim
    vocab_size, multiple = choose.integer(2, 70), choose.one_of([1, 8, 16])
    padded_vocab_size = (vocab_size + multiple - 1) // multiple * multiple

    activation = choose.one_of([*GATED, *PLAIN])
    gated, alternative = activation in GATED, choose.one_of(["base", "alt"])
    n_inner, ff_mult = choose.one_of([None, 1, 60, 256, 300]), choose.one_of([2, 4])
    if not gated:
        inner_size = n_inner or 4 * d
    elif alternative == "alt":
        inner_size = (int(2 * d * ff_mult / 3) + 255) // 256 * 256
    else:
        inner_size = ((n_inner or int(8 * d / 3)) + 255) // 256 * 256

    rotary_dim = choose.integer(0, head_dim // 2 * 2)
    qkv_bias, out_bias, scaled, by_layer = (choose.one_of(flag) for _ in range(4))
    rotary_base, interleaved = choose.one_of([10000.0, 500.0]), choose.one_of(flag)

    def mixer(key: str) -> tuple[Config | None, Callable[[int], Config]]:
        """The published dict of a mixer, and what it means in a layer."""
        kind = choose.one_of(
            ["gated_conv", "linear_attention", "sliding_window", "prefix_linear_attention", "full_attention"]
        )
        if kind == "gated_conv":
            expand, kernel_size = choose.one_of([2, 4, *([] if d % 2 else [1, 3])]), choose.one_of([3, 1, 2, 4, 7])
            bias = choose.one_of(flag)
            published = {
                "_target_": "based.models.mixers.convolution.BaseConv",
                "l_max": 2048,
                "expand_proj": expand,
                "use_bias": bias,
                # "kernel_sizes" is what published configs say and nothing reads.
                choose.one_of(["kernel_size", "kernel_sizes"]): kernel_size,
            }
            e = expand * d // 2
            ours = {"mixer": kind, "inner_size": e, "kernel_size": kernel_size, "bias": bias}
            if published.get("kernel_size") == 3 and choose.one_of(flag):
                del published["kernel_size"]
            return _omit_defaults(choose, published, {"expand_proj": 2, "use_bias": True}), lambda _: ours
        if kind == "linear_attention":
            heads, f = choose.one_of([1, 2, 3, 16]), choose.one_of([16, 1, 2, 5, 24])
            size = choose.one_of([None, 1, 5, 8, 17])
            eps = choose.one_of([1e-12, 1e-3])
            if size is None and d < heads:
                size = 2
            published = {
                "_target_": "based.models.mixers.linear_attention.LinearAttention",
                "l_max": 2048,
                "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp", "input_dim": f},
                "feature_dim": f,
                "num_heads": heads,
                "head_dim": size,
                "eps": eps,
                "parallel_implementation": choose.one_of(["quadratic", "fla_parallel", "linear", "tk"]),
            }
            ours = {
                "mixer": kind,
                "num_heads": heads,
                "feature_dim": f,
                "head_dim": size or d // heads,
                "eps": eps,
            }
            return _omit_defaults(choose, published, _MIXER_DEFAULTS[kind]), lambda _: ours
        if kind == "prefix_linear_attention":
            heads = choose.one_of([h for h in (1, 2, 3, 4) if d % h == 0])
            f, eps, length = choose.one_of([16, 1, 5]), choose.one_of([1e-12, 1e-3]), choose.one_of([1024, 1, 7])
            published = {
                "_target_": "based.models.mixers.prefix_linear_attention.PrefixLinearAttention",
                "l_max": 2048,
                "feature_dim": f,
                "feature_name": "taylor_exp",
                "num_heads": heads,
                "num_key_value_heads": heads,
                "enc_length": length,
                "dec_length": 1024,
                "eps": eps,
                "implementation": choose.one_of(["fla_parallel", "default"]),
                "use_mask": True,
            }
            ours = {"mixer": kind, "num_heads": heads, "feature_dim": f, "head_dim": d // heads}
            ours |= {"enc_length": length, "eps": eps}
            return _omit_defaults(choose, published, _MIXER_DEFAULTS[kind]), lambda _: ours
        window_size = choose.one_of([16, 0, 1, 2, 5, 9, 128])

        def meaning(layer: int) -> Config:
            scale = head_dim**-0.5 if scaled else 1.0
            return {
                "mixer": kind,
                "num_heads": num_heads,
                "num_kv_heads": num_heads_kv,
                "head_dim": head_dim,
                **({"window": window_size // 2 + 1} if kind == "sliding_window" else {}),
                "scale": scale / (layer + 1) if by_layer else scale,
                "qkv_bias": qkv_bias,
                "out_bias": out_bias,
                "rotary_dim": rotary_dim,
                "rotary_base": rotary_base,
                "rotary_interleaved": interleaved,
            }

        if kind == "full_attention":
            return None, meaning
        published = {
            "_target_": "based.models.mixers.slide_attention.SlidingAttention",
            "window_size": window_size,
            "num_heads": 99,  # not read: the top level's are
            "causal": True,
        }
        return _omit_defaults(choose, published, _MIXER_DEFAULTS[kind]), meaning

    num_layers = choose.integer(1, max_layers)
    mixers = {key: mixer(key) for key in ("mixer", "alt_mixer", "alt_mixer_2")}
    # A layer may be in both lists: the second wins. Numbers beyond the last layer are allowed.
    lists = {
        key: [layer for layer in range(num_layers + 2) if choose.one_of(flag)] for key in ("alt_mixer", "alt_mixer_2")
    }
    layers = []
    for layer in range(num_layers):
        key = next((key for key in ("alt_mixer_2", "alt_mixer") if layer in lists[key]), "mixer")
        layers.append(mixers[key][1](layer))

    rms_norm, eps = choose.one_of([True, False]), choose.one_of([1e-5, 1e-3])
    fc1_bias, fc2_bias, tied = choose.one_of(flag), choose.one_of(flag), choose.one_of([True, False])
    tokens = {}
    for key in ("bos_token_id", "eos_token_id"):
        tokens[key] = choose.one_of([None, 0, vocab_size - 1, vocab_size, 50256])
    # R + ½ over head_dim: int() of the product is R whatever the rounding.
    fraction = 1 if rotary_dim == head_dim else (rotary_dim + 0.5) / head_dim if rotary_dim else 0
    config = {
        **{key: value[0] for key, value in mixers.items()},
        **{f"{key}_layers": value for key, value in lists.items()},
        "vocab_size": vocab_size,
        "pad_vocab_size_multiple": multiple,
        "n_positions": 0,
        "n_embd": d,
        "n_layer": num_layers,
        "n_head": num_heads,
        "n_head_kv": None if num_heads_kv == num_heads else num_heads_kv,
        **({"head_dim": head_dim} if odd_head_dim else {}),
        "n_inner": n_inner,
        "activation_function": activation,
        "mlp_type": alternative,
        "ff_mult": ff_mult,
        "mlp_fc1_bias": fc1_bias,
        "mlp_fc2_bias": fc2_bias,
        "layer_norm_epsilon": eps,
        "rms_norm": rms_norm,
        "qkv_proj_bias": qkv_bias,
        "out_proj_bias": out_bias,
        "scale_attn_weights": scaled,
        "scale_attn_by_inverse_layer_idx": by_layer,
        "rotary_emb_fraction": fraction,
        "rotary_emb_base": rotary_base,
        "rotary_emb_interleaved": interleaved,
        "tie_word_embeddings": tied,
        **tokens,
    }
    expected = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "hidden_size": d,
        "norm": {"type": "rms_norm" if rms_norm else "layer_norm", "eps": eps},
        "mlp": {
            "gated": gated,
            "activation": {**GATED, **PLAIN}[activation],
            "inner_size": inner_size,
            "fc1_bias": fc1_bias,
            "fc2_bias": fc2_bias,
        },
        "tie_embeddings": tied,
        **{key: token if token is not None and token < vocab_size else None for key, token in tokens.items()},
        "layers": layers,
    }
    return Checkpoint(
        config={**_omit_defaults(choose, config, DEFAULTS), **(_NO_EFFECT if choose.one_of(flag) else {})},
        expected=expected,
        seed=choose.integer(0, 1 << 30),
        dtype=choose.one_of(DTYPES),
        prefix=choose.one_of(["model.", ""]),
        container=choose.one_of(["bin", "safetensors", "bin-shards", "safetensors-shards"]),
        head=choose.one_of(["shared", "copy", "absent"]),
        ordered=choose.one_of([True, False]),
        extras=choose.one_of([True, False]),
    )


def golden_like(seed: int = 0, **changes: Any) -> Checkpoint:
    """A small published checkpoint with one layer of each mixer, for tests that damage it. `changes`: of Checkpoint."""
    config = {
        "mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "l_max": 64, "expand_proj": 4},
        "alt_mixer": {
            "_target_": "based.models.mixers.linear_attention.LinearAttention",
            "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp", "input_dim": 4},
            "feature_dim": 4,
            "num_heads": 2,
        },
        "alt_mixer_2": {"_target_": "based.models.mixers.slide_attention.SlidingAttention", "window_size": 6},
        "alt_mixer_layers": [1],
        "alt_mixer_2_layers": [2],
        "vocab_size": 21,
        "pad_vocab_size_multiple": 8,
        "n_positions": 0,
        "n_embd": 8,
        "n_layer": 3,
        "n_head": 2,
        "n_inner": 256,
        "activation_function": "swiglu",
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "rotary_emb_fraction": 1,
        "rms_norm": True,
    }
    window = {"mixer": "sliding_window", "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "window": 4, "scale": 0.5}
    window |= {"qkv_bias": False, "out_bias": False}
    window |= {"rotary_dim": 4, "rotary_base": 10000.0, "rotary_interleaved": False}
    expected = {
        "format": "based",
        "format_version": 1,
        "vocab_size": 21,
        "padded_vocab_size": 24,
        "hidden_size": 8,
        "norm": {"type": "rms_norm", "eps": 1e-5},
        "mlp": {"gated": True, "activation": "silu", "inner_size": 256, "fc1_bias": False, "fc2_bias": False},
        "tie_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "layers": [
            {"mixer": "gated_conv", "inner_size": 16, "kernel_size": 3, "bias": True},
            {"mixer": "linear_attention", "num_heads": 2, "feature_dim": 4, "head_dim": 4, "eps": 1e-12},
            window,
        ],
    }
    return replace(Checkpoint(config, expected, seed), **changes)


def first_upload(**changes: Any) -> Checkpoint:
    """golden_like() as the authors' first upload, based-1.3b, writes it: other names, fewer fields. No tensor differs
    but in its name and the vocabulary's size, GPT-2's."""
    checkpoint = golden_like(conv_name="conv1", extras=False)
    config, mixers = dict(checkpoint.config), "based.models.mixers"
    del config["vocab_size"]
    config["mixer"] = {
        "_target_": f"{mixers}.base_conv.BaseConvWithSiLU4",
        "l_max": 2048,
        "use_bias": True,
        "expand_proj": 4,
        "kernel_sizes": [3],
    }
    config["alt_mixer"] = {
        "_target_": f"{mixers}.linear_attn.LinearAttention",
        "l_max": 2048,
        "feature_dim": 4,
        "feature_name": "taylor_exp",
        "num_heads": 2,
        "num_key_value_heads": 2,
        "train_view": "quadratic",
    }
    config["alt_mixer_2"] = {"_target_": f"{mixers}.slide_fa2.SlidingsMHA", "causal": True, "window_size": 6}
    config["alt_mixer_2"] |= {"num_heads": 2, "do_update": True}
    expected = dict(checkpoint.expected) | {"vocab_size": 50257, "padded_vocab_size": 50264}
    expected |= {"bos_token_id": 50256, "eos_token_id": 50256}
    return replace(checkpoint, config=config, expected=expected, **changes)


# ---- torch's file format, by hand ------------------------------------------------------------------------------------

_STORAGE_NAMES = {
    "float32": "FloatStorage",
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
}


class Pickle:
    """Opcodes of pickle protocol 2, as torch.save writes them."""

    PROTO, STOP = b"\x80\x02", b"."
    EMPTY_DICT, MARK, SETITEMS, SETITEM = b"}", b"(", b"u", b"s"
    REDUCE, BUILD, BINPERSID, TUPLE, FALSE = b"R", b"b", b"Q", b"t", b"\x89"

    @staticmethod
    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    @staticmethod
    def integer(value: int) -> bytes:
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    @classmethod
    def integers(cls, values: Iterable[int]) -> bytes:
        return cls.MARK + b"".join(map(cls.integer, values)) + cls.TUPLE

    @staticmethod
    def name(module: str, name: str) -> bytes:
        return b"c" + f"{module}\n{name}\n".encode()

    @classmethod
    def ordered_dict(cls) -> bytes:
        return cls.name("collections", "OrderedDict") + b")" + cls.REDUCE

    @classmethod
    def storage(cls, kind: bytes, key: str, numel: int) -> bytes:
        """kind: the opcodes of the storage's type."""
        inside = cls.text("storage") + kind + cls.text(key) + cls.text("cpu") + cls.integer(numel)
        return cls.MARK + inside + cls.TUPLE + cls.BINPERSID

    @classmethod
    def tensor(cls, storage: bytes, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
        arguments = storage + cls.integer(offset) + cls.integers(shape) + cls.integers(strides)
        hooks = cls.FALSE + cls.ordered_dict()
        return cls.name("torch._utils", "_rebuild_tensor_v2") + cls.MARK + arguments + hooks + cls.TUPLE + cls.REDUCE


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides[: len(shape)]


def write_zip(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """As torch writes them: uncompressed, ZIP64 fields in the local headers."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(data)


def write_torch(
    path: Path, tensors: Mapping[str, tuple[str, Array]], *, ordered: bool = True, root: str = "archive"
) -> None:
    """What torch.save writes for these (dtype, bits); one array under two names is one storage."""
    members: dict[str, bytes] = {}
    keys: dict[int, str] = {}
    items = b""
    for name, (dtype, bits) in tensors.items():
        key = keys.setdefault(id(bits), str(len(keys)))
        members[f"{root}/data/{key}"] = np.ascontiguousarray(bits).tobytes()
        storage = Pickle.storage(Pickle.name("torch", _STORAGE_NAMES[dtype]), key, bits.size)
        items += Pickle.text(name) + Pickle.tensor(storage, 0, bits.shape, contiguous_strides(bits.shape))
    pickled = Pickle.PROTO + (Pickle.ordered_dict() if ordered else Pickle.EMPTY_DICT)
    pickled += Pickle.MARK + items + Pickle.SETITEMS
    if ordered:
        version = Pickle.EMPTY_DICT + Pickle.text("version") + Pickle.integer(1) + Pickle.SETITEM
        metadata = Pickle.ordered_dict() + Pickle.text("") + version + Pickle.SETITEM
        pickled += Pickle.EMPTY_DICT + Pickle.text("_metadata") + metadata + Pickle.SETITEM + Pickle.BUILD
    data = {f"{root}/data.pkl": pickled + Pickle.STOP, f"{root}/byteorder": b"little", **members}
    write_zip(path, {**data, f"{root}/version": b"3\n"})


# ---- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def models(
    draw: Any, max_layers: int = 4, dtypes: Sequence[str] = DTYPES, kinds: Sequence[str] = MIXERS
) -> RandomModel:
    """Model directories of ours."""
    return random_model(_Drawn(draw), max_layers, dtypes, kinds)


@st.composite
def checkpoints(draw: Any, max_layers: int = 4) -> Checkpoint:
    """Published checkpoints."""
    return random_checkpoint(_Drawn(draw), max_layers)


# ---- published Mambas ------------------------------------------------------------------------------------------------

# What the authors' training script writes of its GPT-2.
GPT2_FIELDS: Config = {
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": True,
    "n_positions": 2048,
    "n_embd": 1024,
    "n_head": 16,
    "use_flash_attn": True,
    "fused_dropout_add_ln": True,
    "fused_mlp": True,
    "fused_bias_fc": True,
    "use_fast_path": True,
}


def mamba_checkpoint(seed: int = 0, ssm: Mapping[str, Any] | None = None, **changes: Any) -> MambaCheckpoint:
    """A small one as state-spaces publish theirs. `ssm`: its ssm_cfg; `changes`: of its config."""
    ssm = {} if ssm is None else ssm
    config: Config = {"d_model": 24, "n_layer": 3, "vocab_size": 51, "ssm_cfg": dict(ssm), "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, **changes}
    d, vocab_size, multiple = config["d_model"], config["vocab_size"], config.get("pad_vocab_size_multiple", 8)
    rank = ssm.get("dt_rank", "auto")
    layer = {
        "mixer": "selective_scan",
        "inner_size": int(ssm.get("expand", 2) * d),
        "state_size": ssm.get("d_state", 16),
        "kernel_size": ssm.get("d_conv", 4),
        "dt_rank": -(-d // 16) if rank == "auto" else rank,
        "conv_bias": ssm.get("conv_bias", True),
        "bias": ssm.get("bias", False),
    }
    expected = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": -(-vocab_size // multiple) * multiple,
        "hidden_size": d,
        "norm": {"type": "rms_norm" if config.get("rms_norm", True) else "layer_norm", "eps": 1e-5},
        "mlp": None,
        "tie_embeddings": config.get("tie_embeddings", True),
        "bos_token_id": None,
        "eos_token_id": None,
        "layers": [layer] * config["n_layer"],
    }
    return MambaCheckpoint(config, expected, seed)


class MambaCheckpoint(Checkpoint):
    """A published Mamba to be."""

    def published_tensors(self) -> dict[str, tuple[str, Array]]:
        published: dict[str, tuple[str, Array]] = {}
        for name, (dtype, bits) in self.expected_tensors().items():
            if name.endswith("mixer.conv.weight"):
                bits = bits[:, None, :]
            there = name.replace("norm1", "norm").replace("final_norm", "norm_f").replace(".conv.", ".conv1d.")
            published[name if name.startswith("lm_head") else f"backbone.{there}"] = (dtype, bits)
        if self.expected["tie_embeddings"] and self.head != "absent":
            dtype, bits = published["backbone.embedding.weight"]
            published["lm_head.weight"] = (dtype, bits if self.head == "shared" else bits.copy())
        return {self.prefix + name: tensor for name, tensor in published.items()}
