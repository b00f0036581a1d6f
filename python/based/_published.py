"""Translates a published config.json and its tensor names into ours: see docs/converting.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from based._core import FormatError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How to make one of our tensors: the published ones stacked on their first axis, then reshaped."""

    name: str
    sources: tuple[str, ...]
    shape: Shape
    wide: bool = False
    """Float32, whatever the dtype that weights are converted to."""


EMBEDDING = "transformer.embeddings.word_embeddings.weight"
HEAD = "lm_head.weight"

# Fields of transformers' GPT2Config, PretrainedConfig and GenerationConfig (4.36 to 5.x), and of the authors' code,
# that do not change what the model computes.
_NO_EFFECT_FIELDS = """
_attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path architectures
assistant_confidence_threshold assistant_early_exit assistant_lookbehind attn_implementation auto_map bad_words_ids
begin_suppress_tokens cache_implementation chunk_size_feed_forward constraints cross_attention_hidden_size
decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers dtype early_stopping
encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
exponential_decay_length_penalty finetuning_task force_words_ids forced_bos_token_id forced_decoder_ids
forced_eos_token_id guidance_scale id2label initializer_range is_assistant is_composition is_decoder
is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty low_memory max_length max_matching_ngram_size
max_new_tokens max_time min_length min_new_tokens min_p model_type n_ctx name_or_path no_repeat_ngram_size
num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_logits output_past output_scores pad_token_id penalty_alpha prefix
prefill_chunk_size problem_type prompt_lookup_num_tokens pruned_heads remove_invalid_values renormalize_logits
reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate return_legacy_cache
sep_token_id sequence_bias stop_strings summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj suppress_tokens target_lookbehind task_specific_params temperature tf_legacy_loss
tie_encoder_decoder token_healing tokenizer_class top_h top_k top_p torch_dtype torchscript transformers_version
typical_p use_bfloat16 use_cache watermarking_config xla_device

data_type dec_length enc_length
fixed_decay l_max mlp_checkpoint_lvl parallel_block_tied_norm residual_in_fp32 sequence_parallel special_initializer
use_flash_attn use_weight_init
"""
_NO_EFFECT = frozenset(_NO_EFFECT_FIELDS.split())

# Fields that the runtime supports at one value only (also the authors' default).
_ONLY: dict[str, object] = {
    "add_cross_attention": False,
    "attn_dwconv": False,
    "causal": True,
    "lm_head_bias": False,
    "parallel_block": False,
    "prenorm": True,
    "rotary_emb_scale_base": None,
    "word_embed_proj_dim": None,
}

# activation_function → (gated, ours)
_ACTIVATIONS = {
    "swiglu": (True, "silu"),
    "geglu": (True, "gelu"),
    "glu": (True, "sigmoid"),
    "gelu": (False, "gelu"),
    "gelu_new": (False, "gelu_tanh"),
    "gelu_fast": (False, "gelu_tanh"),
    "gelu_approx": (False, "gelu_tanh"),
    "gelu_pytorch_tanh": (False, "gelu_tanh"),
    "relu": (False, "relu"),
    "sqrelu": (False, "relu_squared"),
}

_GPT2_VOCAB_SIZE = 50257  # GPT2Config's default
_REQUIRED: Any = object()
_HUGE = (1 << 31) - 1
_MAX_LAYERS = 4096  # of the model format


def _show(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list) and len(value) > 80:
        return f"an array of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class _Fields:
    """One JSON object, read strictly: what is not asked for and not known to be without effect is an error."""

    def __init__(self, values: object, where: str, path: str = "") -> None:
        if not isinstance(values, dict):
            raise FormatError(f"{where}: {path.rstrip('.') or 'the file'}: found {_show(values)}, expected an object")
        self.values: dict[str, object] = values
        self.where = where
        self.path = path
        self.asked: set[str] = set()
        for key, only in _ONLY.items():  # first: tensors of such a model may differ in any way
            value = self.get(key, only)
            if type(value) is not type(only) or value != only:
                raise self.error(key, f"{_show(only)}: nothing else is supported")

    def error(self, key: str, expected: str) -> FormatError:
        found = f"found {_show(self.values[key])}" if key in self.values else "missing"
        return FormatError(f"{self.where}: {self.path}{key}: {found}, expected {expected}")

    def get(self, key: str, default: object = _REQUIRED) -> Any:
        self.asked.add(key)
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise self.error(key, "a value: it has no default")
        return default

    def integer(self, key: str, default: int | None = _REQUIRED, minimum: int = 1, null: bool = False) -> Any:
        value = self.get(key, default)
        if value is None and (null or key not in self.values):
            return None
        if type(value) is not int or not minimum <= value <= _HUGE:
            raise self.error(key, f"an integer from {minimum} to {_HUGE}" + (", or null" if null else ""))
        return value

    def number(self, key: str, default: float, maximum: float = 1e30) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value <= maximum:
            raise self.error(key, f"a number from 0 to {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        value = self.get(key, default)
        if value not in choices:
            raise self.error(key, "one of " + ", ".join(choices))
        return str(value)

    def alias(self, key: str, other: str, default: int | None = _REQUIRED) -> Any:
        """An integer that transformers reads under two names."""
        names = [name for name in (key, other) if name in self.values]
        if not names:
            return self.integer(key, default)
        values = {self.integer(name) for name in names}
        if len(values) > 1:
            raise self.error(other, f"the value of {key}, {_show(self.values[key])}")
        return values.pop()

    def finish(self, also_without_effect: Sequence[str] = ()) -> None:
        for key in self.values:
            if key in self.asked or key in _NO_EFFECT or key in also_without_effect:
                continue
            if key.startswith(("fused_", "decay_")) or key.endswith(("dropout", "pdrop")):
                continue
            raise FormatError(f"{self.where}: {self.path}{key}: found {_show(self.values[key])}: unknown field")


class _Weights:
    """The published tensors' shapes, taken one by one; finish() names what is missing or left."""

    def __init__(self, shapes: Mapping[str, Shape], where: str, config: str) -> None:
        self.shapes = shapes
        self.where = where
        self.config = config
        self.left = set(shapes)
        self.missing: list[str] = []
        self.recipes: list[Recipe] = []

    def take(
        self,
        ours: str,
        sources: str | Sequence[str],
        shape: Shape,
        reason: str,
        to: Shape | None = None,
        wide: bool = False,
    ) -> None:
        """`shape`: of each source. `to`: our shape, where it is not the sources' stacked ones. `wide`: see Recipe."""
        names = (sources,) if isinstance(sources, str) else tuple(sources)
        for name in names:
            found = self.shapes.get(name)
            if found is None:
                self.missing.append(name)
            elif found != shape:
                raise FormatError(
                    f"{self.where}: {name}: found shape {found}, expected {shape} ({reason} in {self.config})"
                )
            self.left.discard(name)
        self.recipes.append(Recipe(ours, names, to or (shape[0] * len(names), *shape[1:]), wide))

    def take_bias(
        self, ours: str, sources: str | Sequence[str], size: int, wanted: bool, reason: str, wide: bool = False
    ) -> None:
        """`wanted`: what the field in `reason` says. `wide`: see Recipe."""
        names = (sources,) if isinstance(sources, str) else tuple(sources)
        for name in names:
            if (name in self.shapes) != wanted:
                found = "is there" if name in self.shapes else "is missing"
                raise FormatError(f"{self.where}: {name}: {found}, but {self.config} says {reason}")
        if wanted:
            self.take(ours, names, (size,), reason, wide=wide)

    def finish(self) -> None:
        for what, names in (("missing", sorted(self.missing)), ("not expected", sorted(self.left))):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise FormatError(f"{self.where}: tensors {what} for {self.config}: {', '.join(names[:8])}{more}")


@dataclass(frozen=True)
class _Attention:
    """The top-level fields that softmax attentions read."""

    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    qkv_bias: bool
    out_bias: bool
    scale_by_head_dim: bool
    scale_by_layer: bool
    rotary_fraction: float
    rotary_base: float
    rotary_interleaved: bool


def normalise_names(names: Sequence[str], where: str) -> dict[str, str]:
    """Published tensor name without the prefixes of wrappers → name in the file.

    `model.` is the published one; `module.` is of DistributedDataParallel, `_orig_mod.` of torch.compile.
    Metric counters are dropped, and so is the buffer of `fixed_decay`, which has no effect on the output.
    """
    result: dict[str, str] = {}
    for name in names:
        if "metrics" in name:
            continue
        short = name.replace("._orig_mod.", ".")
        while (stripped := re.sub("^(model|module|_orig_mod)[.]", "", short)) != short:
            short = stripped
        if short == "transformer.decay.decay":
            continue
        if short in result:
            raise FormatError(f"{where}: holds both {result[short]} and {name}")
        result[short] = name
    return result


def translate(
    config: object, shapes: Mapping[str, Shape], head_differs: bool, where: str, weights_where: str
) -> tuple[dict[str, Any], list[Recipe]]:
    """Our config (a JSON object) and how to make its tensors.

    `shapes`: of the tensors, by normalised name. `head_differs`: a head is there and is not equal to the embedding.
    Raises FormatError naming the field or tensor, what was found and what was expected.
    """
    top = _Fields(config, where)
    weights = _Weights(shapes, weights_where, where)

    # ---- sizes -------------------------------------------------------------------------------------------------
    vocab_size = top.integer("vocab_size", _GPT2_VOCAB_SIZE)
    multiple = top.integer("pad_vocab_size_multiple", 1)
    padded_vocab_size = -(-vocab_size // multiple) * multiple
    d = top.alias("n_embd", "hidden_size")
    num_layers = top.alias("n_layer", "num_hidden_layers")
    positions = [
        top.integer(key, minimum=-_HUGE) for key in ("n_positions", "max_position_embeddings") if key in top.values
    ]
    if positions and positions[-1] > 0:
        key = "max_position_embeddings" if "max_position_embeddings" in top.values else "n_positions"
        raise top.error(key, "0: a table of learned positions is not supported")
    for name in shapes:
        if name.startswith("backbone."):
            raise FormatError(
                f"{weights_where}: {name}: the tensors of a Mamba model, but {where} is not of mamba_ssm: no d_model"
            )
        if "position_embeddings" in name:
            raise FormatError(f"{weights_where}: {name}: a table of learned positions, not supported")
    if shapes and not any(name.startswith("transformer.") for name in shapes):
        found = ", ".join(sorted(shapes)[:3])
        raise FormatError(f"{weights_where}: found tensors {found}, …, expected names like {EMBEDDING}")
    stored = {int(match[1]) for name in shapes if (match := re.match(r"transformer\.layers\.(\d{1,9})\.", name))}
    # Before anything is made for each layer: a number in a config is not a reason to take memory.
    if stored and max(stored) + 1 != num_layers:
        raise FormatError(f"{where}: n_layer: found {num_layers}, but {weights_where} holds {max(stored) + 1} layers")
    if num_layers > _MAX_LAYERS:
        raise FormatError(f"{where}: n_layer: found {num_layers}, expected at most {_MAX_LAYERS}")
    top.boolean("tie_word_embeddings", True)  # the tensors tell: an absent head is the embedding

    absent = "" if "vocab_size" in top.values else ", as where it is absent,"
    vocabulary = f"vocab_size {vocab_size}{absent} rounded up to a multiple of {multiple}, n_embd {d}"
    weights.take("embedding.weight", EMBEDDING, (padded_vocab_size, d), vocabulary)
    if head_differs:
        weights.take("lm_head.weight", HEAD, (padded_vocab_size, d), vocabulary)
    elif HEAD in shapes:
        weights.left.discard(HEAD)

    # ---- norms -------------------------------------------------------------------------------------------------
    rms_norm = top.boolean("rms_norm", False)
    norm_eps = top.number("layer_norm_epsilon", 1e-5)

    def take_norm(ours: str, published: str) -> None:
        weights.take(f"{ours}.weight", f"{published}.weight", (d,), f"n_embd {d}")
        weights.take_bias(f"{ours}.bias", f"{published}.bias", d, not rms_norm, f"rms_norm {_show(rms_norm)}")

    take_norm("final_norm", "transformer.ln_f")

    # ---- layers ------------------------------------------------------------------------------------------------
    mlp = _Mlp(top, weights, d, all(top.values.get(key) is None for key in ("mixer", "alt_mixer", "alt_mixer_2")))
    attention = _Attention(
        num_heads=top.alias("n_head", "num_attention_heads", None),
        num_kv_heads=top.integer("n_head_kv", None, null=True),
        head_dim=top.integer("head_dim", None, null=True),
        qkv_bias=top.boolean("qkv_proj_bias", True),
        out_bias=top.boolean("out_proj_bias", True),
        scale_by_head_dim=top.boolean("scale_attn_weights", True),
        scale_by_layer=top.boolean("scale_attn_by_inverse_layer_idx", False),
        rotary_fraction=top.number("rotary_emb_fraction", 0.0, maximum=2),
        rotary_base=top.number("rotary_emb_base", 10000.0),
        rotary_interleaved=top.boolean("rotary_emb_interleaved", False),
    )
    alternatives: list[tuple[object, str, frozenset[int] | None]] = [(top.get("mixer", None), "mixer", None)]
    for key in ("alt_mixer", "alt_mixer_2"):
        listed = top.get(f"{key}_layers", None)
        if listed is not None and not (
            isinstance(listed, list) and all(type(index) is int and index >= 0 for index in listed)
        ):
            raise top.error(f"{key}_layers", "a list of layer numbers, or null")
        alternatives.append((top.get(key, None), key, frozenset(listed or ())))

    layers = []
    for layer in range(num_layers):
        # The last list that names the layer decides; "mixer" takes the rest.
        value, key = next((v, k) for v, k, listed in reversed(alternatives) if listed is None or layer in listed)
        published = f"transformer.layers.{layer}"
        take_norm(f"layers.{layer}.norm1", f"{published}.norm1")
        take_norm(f"layers.{layer}.norm2", f"{published}.norm2")
        if value is None:  # the authors' code makes full causal attention of it
            layers.append({"mixer": "full_attention"} | _softmax_attention(weights, d, layer, attention, top))
            mlp.take(layer)
            continue
        fields = _Fields(value, where, f"{key}.")
        translate_mixer = _MIXERS.get(_class_of(fields.get("_target_")))
        if translate_mixer is None:
            raise fields.error("_target_", "a class named " + ", ".join(_MIXERS))
        layers.append(translate_mixer(fields, weights, d, layer, attention, top))
        mlp.take(layer)
    token_ids = {key: _token_id(top, key, vocab_size) for key in ("bos_token_id", "eos_token_id")}
    top.finish()
    weights.finish()

    result = {
        "format": "based",
        "format_version": 1,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "hidden_size": d,
        "norm": {"type": "rms_norm" if rms_norm else "layer_norm", "eps": norm_eps},
        "mlp": mlp.config,
        "tie_embeddings": not head_differs,
        **token_ids,
        "layers": layers,
    }
    return result, weights.recipes


def _token_id(top: _Fields, key: str, vocab_size: int) -> int | None:
    """None for an id that is no token of this vocabulary: GPT-2's default stays in the config of small models."""
    value = top.get(key, 50256)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and type(value) is not int:
        raise top.error(key, "a token id or null")
    return value if value is not None and 0 <= value < vocab_size else None


class _Mlp:
    """W₁, W₂ of every layer. Gated, published: fc1 = [value; gate], or (mlp_type alt) fc1 = gate, fc3 = value."""

    def __init__(self, top: _Fields, weights: _Weights, d: int, is_transformer: bool) -> None:
        """is_transformer: where no width is given, the tensor's is right."""
        self.weights = weights
        self.d = d
        activation = top.choice("activation_function", "gelu_new", tuple(_ACTIVATIONS))
        gated, ours = _ACTIVATIONS[activation]
        n_inner = top.integer("n_inner", None, null=True)
        self.fc1_bias = top.boolean("mlp_fc1_bias", True)
        self.fc2_bias = top.boolean("mlp_fc2_bias", True)
        # Both are read by gated MLPs only.
        alternative = top.choice("mlp_type", "base", ("base", "alt")) == "alt"
        ff_mult = top.number("ff_mult", 2, maximum=_HUGE)
        self.split = gated and alternative

        if not gated:
            sizes, self.reason = [n_inner or 4 * d], f"n_inner {_show(n_inner)}"
        else:
            exact, self.reason = n_inner or int(8 * d / 3), f"n_inner {_show(n_inner)}"
            if self.split:
                exact, self.reason = int(2 * d * ff_mult / 3), f"mlp_type 'alt', ff_mult {ff_mult:g}"
            sizes = [-(-exact // 256) * 256, -(-exact // 128) * 128, exact]
        # The authors' gated MLP rounds up to a multiple of 256, that of their transformers' code to one of 128; a file
        # made without the rounding is as unambiguous.
        self.inner_size = sizes[0]
        fc1 = weights.shapes.get("transformer.layers.0.mlp.fc1.weight", ())
        rows_per_channel = 2 if gated and not self.split else 1
        if is_transformer and gated and n_inner is None and fc1 and fc1[0] % rows_per_channel == 0:
            sizes.append(fc1[0] // rows_per_channel)
        if fc1 and fc1[0] in [size * rows_per_channel for size in sizes]:
            self.inner_size = fc1[0] // rows_per_channel
        self.rows = self.inner_size * rows_per_channel
        self.config = {
            "gated": gated,
            "activation": ours,
            "inner_size": self.inner_size,
            "fc1_bias": self.fc1_bias,
            "fc2_bias": self.fc2_bias,
        }

    def take(self, layer: int) -> None:
        ours, published = f"layers.{layer}.mlp", f"transformer.layers.{layer}.mlp"
        fc1 = [f"{published}.fc3", f"{published}.fc1"] if self.split else [f"{published}.fc1"]
        fc1_reason, fc2_reason = f"mlp_fc1_bias {_show(self.fc1_bias)}", f"mlp_fc2_bias {_show(self.fc2_bias)}"
        take, take_bias = self.weights.take, self.weights.take_bias
        take(f"{ours}.fc1.weight", [f"{name}.weight" for name in fc1], (self.rows, self.d), self.reason)
        take_bias(f"{ours}.fc1.bias", [f"{name}.bias" for name in fc1], self.rows, self.fc1_bias, fc1_reason)
        take(f"{ours}.fc2.weight", f"{published}.fc2.weight", (self.d, self.inner_size), self.reason)
        take_bias(f"{ours}.fc2.bias", f"{published}.fc2.bias", self.d, self.fc2_bias, fc2_reason)


def _class_of(target: object) -> str:
    """The last part of a dotted name; "" for what is none."""
    return target.rsplit(".", 1)[-1] if isinstance(target, str) else ""


def _gated_conv(fields: _Fields, weights: _Weights, d: int, layer: int, _: _Attention, __: _Fields) -> dict[str, Any]:
    expand = fields.integer("expand_proj", 2)
    bias = fields.boolean("use_bias", True)
    conv_name = "conv"
    if _class_of(fields.get("_target_")) == "BaseConvWithSiLU4":  # of based-1.3b: reads a list of one kernel's size
        conv_name = "conv1"
        sizes = fields.get("kernel_sizes", [3])
        if not (isinstance(sizes, list) and len(sizes) == 1 and type(sizes[0]) is int and 1 <= sizes[0] <= _HUGE):
            raise fields.error("kernel_sizes", f"a list of one integer from 1 to {_HUGE}")
        kernel_size = sizes[0]
        size_field = f"kernel_sizes [{kernel_size}]"
        fields.finish(("implicit_long_conv", "use_cuda"))
    else:
        kernel_size = fields.integer("kernel_size", None)
        size_field = f"kernel_size {kernel_size}"
        fields.finish(("kernel_sizes", "use_cuda"))
    if expand * d % 2:
        raise fields.error("expand_proj", f"an even product with n_embd {d}")
    inner_size = expand * d // 2
    ours, published = f"layers.{layer}.mixer", f"transformer.layers.{layer}.mixer"
    conv = weights.shapes.get(f"{published}.{conv_name}.conv.weight", ())
    if kernel_size is None:  # published configs leave it out: the tensor tells
        kernel_size = conv[2] if len(conv) == 3 else 3
        size_field = f"kernel_size {kernel_size}"
    width = f"{fields.path}expand_proj {expand}, n_embd {d}"
    taps = f"{width}, {fields.path}{size_field}"
    use_bias = f"{fields.path}use_bias {_show(bias)}"
    weights.take(f"{ours}.in_proj.weight", f"{published}.in_proj.weight", (2 * inner_size, d), width)
    weights.take_bias(f"{ours}.in_proj.bias", f"{published}.in_proj.bias", 2 * inner_size, bias, use_bias)
    weights.take(
        f"{ours}.conv.weight",
        f"{published}.{conv_name}.conv.weight",
        (inner_size, 1, kernel_size),
        taps,
        to=(inner_size, kernel_size),
    )
    weights.take(f"{ours}.out_proj.weight", f"{published}.out_proj.weight", (d, inner_size), width)
    weights.take_bias(f"{ours}.out_proj.bias", f"{published}.out_proj.bias", d, bias, use_bias)
    return {"mixer": "gated_conv", "inner_size": inner_size, "kernel_size": kernel_size, "bias": bias}


# Of the first LinearAttention: of other feature maps, of the initialisation, of how the same is computed, unused.
_LINEAR_NO_EFFECT_FIELDS = """
attn_fp32 c0 c1 c2 expand_rotary feature_expanded_dim init_weights linear_attn_init mem_save rope_theta train_view
use_decay_proj_init_1
"""
_LINEAR_NO_EFFECT = tuple(_LINEAR_NO_EFFECT_FIELDS.split())


def _named_feature_map(fields: _Fields, num_heads: int, feature_dim: int) -> None:
    """Checks a linear layer of the first form.

    The feature map is a name, keys and values may have heads of their own, and switches add what later code has not.
    """
    fields.choice("feature_name", "taylor_exp", ("taylor_exp",))
    if fields.integer("num_key_value_heads", 16) != num_heads:
        raise fields.error("num_key_value_heads", f"{num_heads}, as {fields.path}num_heads: heads that share keys")
    if fields.integer("scale_dim", None, null=True) not in (None, feature_dim):
        raise fields.error("scale_dim", f"null or {feature_dim}, as {fields.path}feature_dim")
    for key in (
        "fa_rotary",
        "initial_conv",
        "use_act",
        "use_decay_proj",
        "use_exp_combo",
        "use_output_gating",
        "use_positive",
        "use_proj_g",
        "use_rotary_apply",
    ):
        if fields.boolean(key, False):
            raise fields.error(key, "false: nothing else is supported")


def _linear_attention(
    fields: _Fields, weights: _Weights, d: int, layer: int, _: _Attention, __: _Fields
) -> dict[str, Any]:
    num_heads = fields.integer("num_heads", 16)
    feature_dim = fields.integer("feature_dim", 16)
    head_dim = fields.integer("head_dim", None, null=True)
    eps = fields.number("eps", 1e-12)
    if "feature_name" in fields.values and "feature_map" not in fields.values:  # of based-1.3b
        _named_feature_map(fields, num_heads, feature_dim)
        fields.finish(_LINEAR_NO_EFFECT)
    else:
        feature_map = _Fields(fields.get("feature_map"), fields.where, f"{fields.path}feature_map.")
        # The authors' kernels to choose from; the quadratic form that they approximate is what we compute.
        implementation = fields.get("parallel_implementation", "quadratic")
        if not isinstance(implementation, str) or not re.fullmatch(r"quadratic|linear|tk|fla_\w+", implementation):
            raise fields.error("parallel_implementation", "quadratic, linear, tk or fla_*")
        fields.finish()
        if _class_of(feature_map.get("_target_")) != "TaylorExp":
            raise feature_map.error("_target_", "a class named TaylorExp")
        if feature_map.integer("input_dim") != feature_dim:
            raise feature_map.error("input_dim", f"{feature_dim}, as {fields.path}feature_dim")
        feature_map.finish()
    if head_dim is None:
        head_dim = d // num_heads

    ours, published = f"layers.{layer}.mixer", f"transformer.layers.{layer}.mixer"
    features = f"{fields.path}num_heads {num_heads}, {fields.path}feature_dim {feature_dim}, n_embd {d}"
    heads = f"{fields.path}num_heads {num_heads}, {fields.path}head_dim {head_dim}, n_embd {d}"
    for name in ("proj_q", "proj_k"):
        shape = (num_heads * feature_dim, d)
        weights.take(f"{ours}.{name}.weight", f"{published}.{name}.weight", shape, features)
    weights.take(f"{ours}.proj_v.weight", f"{published}.proj_v.weight", (num_heads * head_dim, d), heads)
    weights.take(f"{ours}.out_proj.weight", f"{published}.out_proj.weight", (d, num_heads * head_dim), heads)
    return {
        "mixer": "linear_attention",
        "num_heads": num_heads,
        "feature_dim": feature_dim,
        "head_dim": head_dim,
        "eps": eps,
    }


def _prefix_linear_attention(
    fields: _Fields, weights: _Weights, d: int, layer: int, _: _Attention, top: _Fields
) -> dict[str, Any]:
    num_heads = fields.integer("num_heads")
    feature_dim = fields.integer("feature_dim", 16)
    enc_length = fields.integer("enc_length")
    if top.values.get("enc_length", enc_length) != enc_length:
        raise fields.error("enc_length", f"{_show(top.values['enc_length'])}, as enc_length of the model")
    eps = fields.number("eps", 1e-12)
    if d % num_heads:
        raise fields.error("num_heads", f"a divisor of n_embd {d}")
    head_dim = d // num_heads
    fields.choice("implementation", "default", ("default", "fla_parallel"))  # two ways to the same sums
    fields.choice("feature_name", "taylor_exp", ("taylor_exp",))
    if fields.integer("num_key_value_heads", num_heads) != num_heads:
        raise fields.error("num_key_value_heads", f"{num_heads}, as {fields.path}num_heads")
    if fields.integer("scale_dim", None, null=True) not in (None, feature_dim):
        raise fields.error("scale_dim", f"null or {feature_dim}, as {fields.path}feature_dim")
    fields.finish(("use_mask", "layer_idx"))  # a mask is for padding, which we have not

    ours, published = f"layers.{layer}.mixer", f"transformer.layers.{layer}.mixer"
    features = f"{fields.path}num_heads {num_heads}, {fields.path}feature_dim {feature_dim}, n_embd {d}"
    heads = f"{fields.path}num_heads {num_heads}, n_embd {d}"
    for name in ("proj_q", "proj_k", "proj_k_enc"):
        shape = (num_heads * feature_dim, d)
        weights.take(f"{ours}.{name}.weight", f"{published}.{name}.weight", shape, features)
    for name in ("proj_v", "proj_v_enc", "out_proj"):
        weights.take(f"{ours}.{name}.weight", f"{published}.{name}.weight", (d, d), heads)
    return {
        "mixer": "prefix_linear_attention",
        "num_heads": num_heads,
        "feature_dim": feature_dim,
        "head_dim": head_dim,
        "enc_length": enc_length,
        "eps": eps,
    }


def _sliding_window(
    fields: _Fields, weights: _Weights, d: int, layer: int, attention: _Attention, top: _Fields
) -> dict[str, Any]:
    window_size = fields.integer("window_size", 128, minimum=0)
    # The authors' code overwrites these by the top level's.
    overwritten = "num_heads num_heads_kv qkv_proj_bias out_proj_bias softmax_scale layer_idx rotary_emb_dim"
    for key in ("cross_attn", "dwconv", "return_residual"):  # of SlidingsMHA
        if fields.boolean(key, False):
            raise fields.error(key, "false: nothing else is supported")
    fields.finish(
        (
            *overwritten.split(),
            "rotary_emb_base",
            "rotary_emb_interleaved",
            "checkpointing",
            "do_update",
            "batch_size",
            "use_mask",
        )
    )
    softmax = _softmax_attention(weights, d, layer, attention, top)
    return {"mixer": "sliding_window", "window": window_size // 2 + 1} | softmax


def _softmax_attention(weights: _Weights, d: int, layer: int, attention: _Attention, top: _Fields) -> dict[str, Any]:
    """The fields that both have, from the top level; takes the tensors."""
    num_heads = attention.num_heads
    if num_heads is None:
        raise top.error("n_head", f"a number of heads, for the attention of layer {layer}")
    num_kv_heads = attention.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise top.error("n_head_kv", f"a divisor of n_head {num_heads}")
    if attention.head_dim is None and d % num_heads:
        raise top.error("n_head", f"a divisor of n_embd {d}")
    head_dim = attention.head_dim or d // num_heads
    rotary_dim = int(attention.rotary_fraction * head_dim)
    if 2 * -(-rotary_dim // 2) > head_dim:
        raise top.error("rotary_emb_fraction", f"a fraction whose pairs fit in a head of {head_dim}")
    scale = head_dim**-0.5 if attention.scale_by_head_dim else 1.0
    if attention.scale_by_layer:
        scale /= layer + 1

    ours, published = f"layers.{layer}.mixer", f"transformer.layers.{layer}.mixer"
    heads = f"n_embd {d}, n_head {num_heads}, n_head_kv {num_kv_heads}, heads of {head_dim}"
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    qkv_bias, out_bias = f"qkv_proj_bias {_show(attention.qkv_bias)}", f"out_proj_bias {_show(attention.out_bias)}"
    weights.take(f"{ours}.qkv_proj.weight", f"{published}.Wqkv.weight", (rows, d), heads)
    weights.take_bias(f"{ours}.qkv_proj.bias", f"{published}.Wqkv.bias", rows, attention.qkv_bias, qkv_bias)
    weights.take(f"{ours}.out_proj.weight", f"{published}.out_proj.weight", (d, num_heads * head_dim), heads)
    weights.take_bias(f"{ours}.out_proj.bias", f"{published}.out_proj.bias", d, attention.out_bias, out_bias)
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "scale": scale,
        "qkv_bias": attention.qkv_bias,
        "out_bias": attention.out_bias,
        "rotary_dim": rotary_dim,
        "rotary_base": attention.rotary_base,
        "rotary_interleaved": attention.rotary_interleaved,
    }


_MIXERS = {
    "BaseConv": _gated_conv,
    "LinearAttention": _linear_attention,
    "SlidingAttention": _sliding_window,
    "PrefixLinearAttention": _prefix_linear_attention,
    # The names of the same in the first upload, based-1.3b.
    "BaseConvWithSiLU4": _gated_conv,
    "SlidingsMHA": _sliding_window,
}
