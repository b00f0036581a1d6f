"""A BASED language model as a PyTorch module, with the parameters of a model directory under their own names."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from based import _core, sizes
from based._core import (
    Activation,
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
    NormKind,
    PrefixLinearAttentionConfig,
    Rwkv4Config,
    Rwkv7Config,
    SelectiveScanConfig,
    SlidingWindowConfig,
    UnsupportedError,
)
from based._loading import model_directory
from based._tokenizer_files import find_tokenizer, read_tokenizer_json
from based.convert import StrPath, atomic_directory, open_weights, sync
from based.torch import ops
from based.torch._autograd import is_transformed
from based.torch._decay import decayed_linear_attention
from based.torch._delta import gated_delta_rule
from based.torch._documents import by_documents
from based.torch._long_conv import hyena_filter, long_conv, s4d_taps, shift_taps
from based.torch._wkv import wkv
from based.torch.loss import IGNORED, linear_cross_entropy

_FILE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES = (torch.float64, *_FILE_DTYPES.values())


# With names, so that pickle finds them.
def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.identity: _identity,
    Activation.silu: functional.silu,
    Activation.gelu: functional.gelu,
    Activation.gelu_tanh: _gelu_tanh,
    Activation.sigmoid: torch.sigmoid,
    Activation.relu: functional.relu,
    Activation.relu_squared: _relu_squared,
}
_ONTO_RESIDUAL = ("mixer.out_proj.weight", "mlp.fc2.weight")
_WIDE = (
    *("mixer.A_log", "mixer.D", "mixer.dt_proj.bias", "mixer.dt_bias"),
    *("mixer.time_decay", "mixer.time_first", "mixer.time_mix_k", "mixer.time_mix_v", "mixer.time_mix_r"),
    *("mixer.shift_B", "mixer.shift_C", "mixer.shift_D", "mixer.log_dt", "mixer.A_imag", "mixer.B", "mixer.C"),
    *(f"mixer.filter.{name}" for name in ("w1", "b1", "w2", "b2", "w3", "b3", "w4", "freq", "D")),
)
"""Float32 in 16-bit models and their files: where they are rounded, a scan forgets at other times."""


class BasedForCausalLM(nn.Module):
    """The model that `based.Model` runs, for training.

    Equations, parameter names and shapes are those of docs/model-format.md, and the logits are those of `based.Model`
    up to rounding. The residual stream is float32 (float64 of float64 parameters); under autocast products run in its
    dtype, and the norms and the residual stream stay float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        special_initializer: bool = False,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """A model with random weights: see reset_parameters.

        Args:
            config: Its shape, as `based.Model.config`, `ModelConfig.from_json` or `based.sizes.named_config` give it.
            special_initializer: The standard deviation of the weights is √(2 / 5d) instead of 0.02.
            activation_checkpointing: Keep only the residual stream between layers for the backward pass, which runs
                each layer forward again. May be changed at any time.
            device: Of the parameters; None for PyTorch's default.
            dtype: Of the parameters: torch.float32, bfloat16, float16 or float64.

        Raises:
            TypeError: `config` is no ModelConfig, or `dtype` none of these.
        """
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a based.ModelConfig")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}, expected torch.float32, bfloat16, float16 or float64")
        self.config = config
        self.special_initializer = special_initializer
        self.activation_checkpointing = activation_checkpointing
        self.tokenizer_json: bytes | None = None
        """The tokenizer.json of the directory that load() read; save() writes it."""

        # Without memory first: every weight is drawn once, and from one place.
        factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
        rows, d = config.padded_vocab_size, config.hidden_size
        self.embedding = nn.Embedding(rows, d, **factory)
        self.layers = nn.ModuleList(_Layer(config, mixer, factory) for mixer in config.layers)
        self.final_norm = _Norm(config, factory)
        self.lm_head = None if config.tie_embeddings else nn.Linear(d, rows, bias=False, **factory)
        self.to_empty(device=torch.get_default_device() if device is None else device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights as the authors do, from PyTorch's generator.

        Normal with standard deviation σ = 0.02, or √(2 / 5d) with special_initializer; σ / √(2L) for the two matrices
        of each of the L layers whose products are added to the residual stream. Convolutions as torch.nn.Conv1d, norms
        ones, biases zeros. Scans and delta rules by their own authors' rules: see their modules.
        """
        std = math.sqrt(2 / (5 * self.config.hidden_size)) if self.special_initializer else 0.02
        drawing: list[Any] = [layer.mixer for layer in self.layers if hasattr(layer.mixer, "reset_parameters")]
        own = {id(parameter) for mixer in drawing for parameter in mixer.own_parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in own:
                continue
            if "norm" in name:
                nn.init.constant_(parameter, 1 if name.endswith("weight") else 0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("conv.weight"):
                bound = parameter.shape[1] ** -0.5  # 1/√K: each output has K inputs
                nn.init.uniform_(parameter, -bound, bound)
            else:
                onto_residual = name.endswith(_ONTO_RESIDUAL)
                nn.init.normal_(parameter, std=std / math.sqrt(2 * len(self.layers)) if onto_residual else std)
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mixer, _Rwkv4):
                layer.mixer.place = (i, len(self.layers))
        for mixer in drawing:
            mixer.reset_parameters(len(self.layers) * (1 if self.config.mlp is None else 2))

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        num_items_in_batch: torch.Tensor | int | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Logits of every position; with labels, their loss instead.

        Args:
            input_ids: Tokens (B, T), int64 or int32, in [0, vocab_size): checked on the CPU, where that waits for
                nothing.
            labels: (B, T) int64: what input_ids says, or -100 where a token shall not count. The logits at position t
                are scored against the label at t + 1, so T ≥ 2. Of a model with a prefix (prefix_linear_attention),
                the labels of the prefix's tokens never count, and T must be larger than it.
            attention_mask: (B, T) of ones, as data collators of other models make it. Zeros must stand behind a
                sequence's last one, where padding changes nothing: its labels are -100.
            reduction: Of the loss: the mean, or the sum, for micro-batches of unequal numbers of labels.
            num_items_in_batch: The loss is the sum over this number, which counts the labels of all micro-batches.
            cu_seqlens: input_ids (1, T) hold N documents one behind the other, each a sequence of its own: where they
                begin, and T, (N + 1) int32 or int64. Logits at a document's last token are scored against no label.
            return_dict: Return a dict of what follows, "loss" and "logits". With labels it holds the loss, and in eval
                mode the logits too, all of them.

        Returns:
            Logits (B, T, padded_vocab_size), float32 (float64 of float64 parameters); columns from vocab_size on are no
            tokens. With labels, a scalar of this dtype: the mean over all labels that count of −log softmax, which is
            over the vocab_size tokens as in `based.Model.score`; NaN when none counts. Logits are made of some tokens
            at a time, and their gradient at once: memory never holds all of them.

        Raises:
            TypeError, ValueError: Another dtype, shape or device; a token that is none.
        """
        self._check_tokens("input_ids", input_ids, (torch.int64, torch.int32))
        if attention_mask is not None:
            _check_mask(attention_mask, input_ids)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}, expected mean or sum")
        if labels is None:
            logits = self.logits(self.hidden(input_ids, cu_seqlens=cu_seqlens))
            return {"logits": logits} if return_dict else logits
        self._check_tokens("labels", labels, (torch.int64,), ignored=IGNORED)
        if labels.shape != input_ids.shape or labels.shape[1] < 2:
            expected = f"that of input_ids, {tuple(input_ids.shape)}, with T ≥ 2"
            raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {expected}")
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if cu_seqlens is not None:
            targets = targets.index_fill(1, cu_seqlens[1:].to(targets.device, torch.int64) - 1, IGNORED)
        if (prefix := self.config.prefix_tokens) > 1:
            if cu_seqlens is not None:
                raise ValueError(
                    f"cu_seqlens with labels, and this model reads the first {prefix} tokens of a sequence as a whole: "
                    "expected a sequence each"
                )
            if labels.shape[1] <= prefix:
                raise ValueError(
                    f"labels has {labels.shape[1]} tokens a sequence, and this model reads the first {prefix} as a "
                    "whole: expected more, since only what follows them can be learnt"
                )
            targets[:, : prefix - 1] = IGNORED  # the prefix has been read when they are predicted
        states = self.hidden(input_ids, cu_seqlens=cu_seqlens)
        hidden = states.flatten(0, 1)
        is_sum = reduction == "sum" or num_items_in_batch is not None
        loss = linear_cross_entropy(hidden, self._head.weight, targets.flatten(), self.config.vocab_size, is_sum)
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        if not return_dict:
            return loss
        return {"loss": loss} if self.training else {"loss": loss, "logits": self.logits(states)}

    def hidden(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """final_norm(r) of tokens (B, T), which are not checked: (B, T, d), of the parameters' dtype.

        After fully_shard(model), register_fsdp_forward_method(model, "hidden") lets it gather weights; "logits", too.

        positions: (B, N) int64 in [0, T): those of them alone, (B, N, d). cu_seqlens: as forward.
        """
        self._check_gathered("hidden")
        r = self._residual(input_ids) if cu_seqlens is None else by_documents(self._residual, cu_seqlens, input_ids)
        if positions is not None:
            r = r.gather(1, positions[..., None].expand(-1, -1, r.shape[-1]))
        return self.final_norm(r).to(self._head.weight.dtype)

    def _residual(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer, (B, T, d)."""
        r = self.embedding(input_ids)
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        for layer in self.layers:
            r = _recomputed(layer, r) if self.activation_checkpointing else layer(r)
        return r

    @property
    def _head(self) -> nn.Embedding | nn.Linear:
        return self.embedding if self.lm_head is None else self.lm_head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's product with hidden states (…, d): (…, padded_vocab_size), as forward returns it."""
        self._check_gathered("logits")
        logits = functional.linear(hidden, self._head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _check_gathered(self, method: str) -> None:
        if isinstance(self._head.weight, DTensor) and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"the weights are in shards, which forward() alone gathers by itself: after fully_shard(model), "
                f"torch.distributed.fsdp.register_fsdp_forward_method(model, {method!r}) is needed"
            )

    def _check_tokens(
        self, name: str, tokens: torch.Tensor, dtypes: tuple[torch.dtype, ...], ignored: int | None = None
    ) -> None:
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in dtypes:
            found = str(tokens.dtype) if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise TypeError(f"{name} is {found}, expected a tensor of {' or '.join(map(str, dtypes))}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}, expected (B, T), both ≥ 1")
        device = self.embedding.weight.device
        if tokens.device != device:
            raise ValueError(f"{name} is on {tokens.device}, expected {device}, where the model is")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
            foreign = (tokens < 0) | (tokens >= self.config.vocab_size)
            if ignored is not None:
                foreign &= tokens != ignored
            if foreign.any():
                raise ValueError(
                    f"{name} holds {int(tokens[foreign][0])}, expected tokens in [0, {self.config.vocab_size})"
                )

    # ---- model directories ---------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path_or_id: StrPath,
        *,
        revision: str | None = None,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "BasedForCausalLM":
        """The model of a directory in our format or as published, or of the hub: what `based.load` takes.

        Args:
            path_or_id: See `based.load`.
            revision: See `based.load`.
            activation_checkpointing: See the constructor; so device.
            device: Of the parameters.
            dtype: Of the parameters, whatever the file's.

        Raises:
            FileNotFoundError, OSError, FormatError, ValueError: As `based.load`.
            TypeError: As the constructor.
        """
        directory = model_directory(path_or_id, revision)
        config_path = directory / "config.json"
        config = ModelConfig.from_json(config_path.read_text(encoding="utf-8"), str(config_path))
        model = cls(config, activation_checkpointing=activation_checkpointing, device="meta", dtype=dtype)
        path, stored = open_weights(directory)
        if extra := sorted(stored.keys() - model.state_dict().keys()):
            raise FormatError(f"{path}: tensors that the config has no place for: {', '.join(extra[:5])}")
        if device is None:
            device = torch.get_default_device()
        state = {}
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if name not in stored:
                raise FormatError(f"{path}: tensor {name} {shape} is missing")
            tensor = stored[name]
            if tensor.shape != shape:
                raise FormatError(f"{path}: tensor {name} has shape {tensor.shape}, the config makes it {shape}")
            if tensor.dtype not in _FILE_DTYPES:
                raise FormatError(f"{path}: tensor {name} has dtype {tensor.dtype}, expected {', '.join(_FILE_DTYPES)}")
            bits = torch.from_numpy(np.require(tensor.bits, requirements=["C", "W"]))
            state[name] = bits.view(_FILE_DTYPES[tensor.dtype]).to(device, parameter.dtype)
        model.load_state_dict(state, assign=True)
        tokenizer = find_tokenizer(directory, None)
        model.tokenizer_json = None if tokenizer is None else read_tokenizer_json(tokenizer)
        return model

    @torch.no_grad()
    def save(
        self,
        path: StrPath,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        tokenizer: StrPath | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes a model directory, which `based.load` reads; it appears whole or not at all.

        Weights in shards (FSDP) are gathered: then every process calls this, and the first one writes.

        Args:
            path: Must not exist, or be an empty directory; with `overwrite` it may be a model directory, which is
                replaced.
            dtype: Of the weights in the file; None for that of the parameters, which must be one of these.
            tokenizer: A tokenizer.json, or a directory that holds one; by default that of the directory which load()
                read.
            overwrite: See path.

        Raises:
            ValueError: `dtype` is none of these, or too narrow for a weight; or the parameters are not those of
                `config`: adapters must be merged and parametrizations removed first.
            OSError: FileNotFoundError, FileExistsError, a full disk.
        """
        dtype_name = str(self.embedding.weight.dtype).removeprefix("torch.") if dtype is None else dtype
        if dtype_name not in _FILE_DTYPES:
            raise ValueError(f"dtype is {dtype_name!r}, expected one of {', '.join(_FILE_DTYPES)}")
        text = self.tokenizer_json
        if tokenizer is not None:
            found = find_tokenizer(Path(tokenizer), tokenizer)
            text = None if found is None else read_tokenizer_json(found)
        self._check_parameters()
        tensors = []
        writes = True
        for name, parameter in self.named_parameters():
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                writes = torch.distributed.get_rank() == 0
            else:
                whole = parameter
            if not writes:
                continue
            own = "float32" if name.endswith(_WIDE) else dtype_name
            tensor = whole.to("cpu", _FILE_DTYPES[own]).contiguous()
            if tensor.isinf().sum() > whole.isinf().sum():
                raise ValueError(f"{name} holds values beyond the range of {own}, expected a wider dtype")
            bits = tensor.view(torch.uint16) if own == "bfloat16" else tensor
            tensors.append((name, bits.numpy(), own))
        if not writes:
            return
        with atomic_directory(None, Path(path), overwrite) as directory:
            _core.write_safetensors(directory / "model.safetensors", tensors, {"format": "based"})
            files = {"config.json": self.config.to_json().encode(), "tokenizer.json": text}
            for file, content in files.items():
                if content is not None:
                    (directory / file).write_bytes(content)
                    sync(directory / file)

    def _check_parameters(self) -> None:
        """That the parameters are those of the config, by names and shapes."""
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        shapes |= {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        expected = {name: tuple(p.shape) for name, p in BasedForCausalLM(self.config, device="meta").named_parameters()}
        advice = (
            "Merge adapters into the weights first (peft: merge_and_unload()), remove parametrizations and masks "
            "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove), and put resized weights into a model "
            "of a config that says so"
        )
        for name, shape in expected.items():
            if shapes.get(name) != shape:
                found = f"has shape {shapes[name]}" if name in shapes else "is missing"
                raise ValueError(f"{name} {found}, the config makes it {shape}: nothing was written. {advice}")
        if extra := sorted(shapes.keys() - expected.keys()):
            raise ValueError(f"{extra[0]}: the config has no place for it: nothing was written. {advice}")

    def extra_repr(self) -> str:
        """What print() shows beside the submodules."""
        return f"{self.config.num_parameters / 1e6:,.1f} M parameters"


class ForTrainer(nn.Module):
    """A model as Hugging Face's Trainer wants one: `Trainer(model=ForTrainer(model), …)`, then `model.save(…)`.

    It returns dicts, takes num_items_in_batch, and has no `config`, on which Trainer would set attributes.
    """

    # Looked for by Trainer: it may pass num_items_in_batch, which leaves each sequence's first label out.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"

    def __init__(self, model: BasedForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """`BasedForCausalLM.forward` with return_dict."""
        result: dict[str, torch.Tensor] = self.model(
            input_ids,
            labels,
            attention_mask=attention_mask,
            num_items_in_batch=num_items_in_batch,
            return_dict=True,
        )
        return result


def _check_mask(mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    """That it masks nothing but padding behind a sequence; on the CPU, where that waits for nothing."""
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape:
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {found}, expected a tensor of shape {tuple(input_ids.shape)}")
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed():
        return
    if (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any() or not mask[:, 0].bool().all():
        raise ValueError("attention_mask has a zero before a one, expected padding behind a sequence only")


def _recomputed(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing here is random


class _Layer(nn.Module):
    """r += mixer(norm1(r)); r += mlp(norm2(r)), where the model has MLPs."""

    def __init__(self, config: ModelConfig, mixer: Any, factory: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = _Norm(config, factory)
        if type(mixer) not in _MIXERS:
            raise UnsupportedError(
                f"the mixer {mixer.mixer} has no PyTorch module: found it in the config, expected one of "
                + ", ".join(kind.mixer for kind in _MIXERS)
            )
        self.mixer = _MIXERS[type(mixer)](mixer, config.hidden_size, factory)
        self.norm2 = None if config.mlp is None else _Norm(config, factory)
        self.mlp = None if config.mlp is None else _Mlp(config.mlp, config.hidden_size, factory)

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        r = r + self.mixer(self.norm1(r))
        return r if self.mlp is None or self.norm2 is None else r + self.mlp(self.norm2(r))


class _Norm(nn.Module):
    """RMSNorm or LayerNorm of the residual stream, in its dtype; the result has the weights'."""

    def __init__(self, config: ModelConfig, factory: dict[str, Any]) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, **factory))
        layer_norm = config.norm == NormKind.layer_norm
        self.bias = nn.Parameter(torch.empty(config.hidden_size, **factory)) if layer_norm else None

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        weight, shape = self.weight.to(r.dtype), self.weight.shape
        if self.bias is None:
            y = functional.rms_norm(r, shape, weight, self.eps)
        else:
            y = functional.layer_norm(r, shape, weight, self.bias.to(r.dtype), self.eps)
        return y.to(self.weight.dtype)


class _Linear(nn.Linear):
    """Takes x of any dtype: norms may be kept in float32 beside 16-bit matrices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


def _projection(config: sizes.Mixer, name: str, d: int, factory: dict[str, Any]) -> nn.Linear:
    """The projection of this name in the mixer's description."""
    (p,) = (p for p in config.projections(d) if p.name == name)
    return _Linear(p.cols, p.rows, bias=p.bias, **factory)


class _GatedConv(nn.Module):
    def __init__(self, config: GatedConvConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.in_proj = _projection(config, "in_proj", d, factory)
        self.conv = _GatedShortConv(config.inner_size, config.kernel_size, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.conv(self.in_proj(x)))


class _GatedShortConv(nn.Module):
    def __init__(self, e: int, kernel_size: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(e, kernel_size, **factory))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return ops.gated_short_conv(u, self.weight)


class _LinearAttention(nn.Module):
    def __init__(self, config: LinearAttentionConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.proj_q = _projection(config, "proj_q", d, factory)
        self.proj_k = _projection(config, "proj_k", d, factory)
        self.proj_v = _projection(config, "proj_v", d, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.proj_q, self.proj_k, self.proj_v))
        return self.out_proj(ops.taylor_linear_attention(q, k, v, self.eps).flatten(2))


class _PrefixLinearAttention(nn.Module):
    def __init__(self, config: PrefixLinearAttentionConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.eps, self.enc_length = config.num_heads, config.eps, config.enc_length
        self.proj_q = _projection(config, "proj_q", d, factory)
        self.proj_k = _projection(config, "proj_k", d, factory)
        self.proj_v = _projection(config, "proj_v", d, factory)
        self.proj_k_enc = _projection(config, "proj_k_enc", d, factory)
        self.proj_v_enc = _projection(config, "proj_v_enc", d, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The prefix's M keys and values stand before all others, where every token sees them; nobody asks there."""
        prefix = x[:, : self.enc_length]
        inputs = [(self.proj_q, x), (self.proj_k, x), (self.proj_v, x)]
        inputs += [(self.proj_k_enc, prefix), (self.proj_v_enc, prefix)]
        q, k, v, k_enc, v_enc = (proj(rows).unflatten(-1, (self.num_heads, -1)) for proj, rows in inputs)
        q = torch.cat([torch.zeros_like(k_enc), q], dim=1)
        y = ops.taylor_linear_attention(q, torch.cat([k_enc, k], dim=1), torch.cat([v_enc, v], dim=1), self.eps)
        return self.out_proj(y[:, prefix.shape[1] :].flatten(2))


class _SoftmaxAttention(nn.Module):
    """Over a window, or over all keys."""

    def __init__(self, config: SlidingWindowConfig | FullAttentionConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        h, h_kv = config.num_heads, config.num_kv_heads
        self.heads = [h, h_kv, h_kv]
        self.window = config.window if isinstance(config, SlidingWindowConfig) else None
        self.scale = config.scale
        self.rotary: dict[str, Any] = {
            "rotary_dim": config.rotary_dim,
            "base": config.rotary_base,
            "interleaved": config.rotary_interleaved,
        }
        self.qkv_proj = _projection(config, "qkv_proj", d, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (sum(self.heads), -1))
        v = qkv[:, :, -self.heads[2] :]
        qk = ops.rotary_embedding(qkv[:, :, : -self.heads[2]], **self.rotary)
        q, k = qk.split(self.heads[:2], dim=2)
        y = ops.sliding_window_attention(q, k, v, window=self.window or x.shape[1], scale=self.scale)
        return self.out_proj(y.flatten(2))


class _SelectiveScan(nn.Module):
    def __init__(self, config: SelectiveScanConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        e, n, r = config.inner_size, config.state_size, config.dt_rank
        wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
        self.parts = [r, n, n]
        self.in_proj = _projection(config, "in_proj", d, factory)
        self.conv = _SiluShortConv(e, config.kernel_size, config.conv_bias, factory)
        self.x_proj = _projection(config, "x_proj", d, factory)
        self.dt_proj = nn.Linear(r, e, bias=False, **factory)
        self.dt_proj.bias = nn.Parameter(torch.empty(e, **wide))
        self.A_log = nn.Parameter(torch.empty(e, n, **wide))
        self.D = nn.Parameter(torch.empty(e, **wide))
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return list(self.parameters())

    def reset_parameters(self, num_residuals: int) -> None:
        """As mamba_ssm: PyTorch's own, but W_out over √num_residuals, A = −1 … −N, D = 1, and W_dt uniform in ±R^−½.

        The steps that the bias of W_dt makes by itself are log-uniform in 0.001 … 0.1.
        """
        for projection in (self.in_proj, self.x_proj, self.out_proj):
            bound = projection.in_features**-0.5
            nn.init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        self.out_proj.weight.div_(math.sqrt(num_residuals))
        bound = self.conv.weight.shape[1] ** -0.5
        for parameter in self.conv.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.uniform_(self.dt_proj.weight, -(self.parts[0] ** -0.5), self.parts[0] ** -0.5)
        _draw_steps(self.dt_proj.bias)
        nn.init.ones_(self.A_log).cumsum_(1).log_()
        nn.init.ones_(self.D)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        x, z = self.in_proj(u).chunk(2, -1)
        x = self.conv(x)
        step, b, c = self.x_proj(x).split(self.parts, -1)
        dt = functional.linear(step, self.dt_proj.weight)
        y, _ = ops.selective_scan(x, dt, self.dt_proj.bias, -self.A_log.exp(), b, c, self.D)
        return self.out_proj(ops.swiglu(torch.cat([y, z], -1)))


class _SiluShortConv(nn.Module):
    def __init__(self, channels: int, kernel_size: int, has_bias: bool, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel_size, **factory))
        self.bias = nn.Parameter(torch.empty(channels, **factory)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_short_conv(x, self.weight, self.bias)


def _draw_steps(bias: nn.Parameter) -> None:
    """So that softplus(bias) is log-uniform in 0.001 … 0.1."""
    steps = nn.init.uniform_(bias, math.log(0.001), math.log(0.1)).exp_()
    steps.add_((-torch.expm1(-steps)).log())  # the inverse of softplus


class _GatedDeltaNet(nn.Module):
    def __init__(self, config: GatedDeltaNetConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = _projection(config, "qkv_proj", d, factory)
        self.b_proj = _projection(config, "b_proj", d, factory)
        self.a_proj = _projection(config, "a_proj", d, factory) if config.decay else None
        self.g_proj = _projection(config, "g_proj", d, factory) if config.output_gate else None
        self.conv = _SiluShortConv(self.qkv_proj.out_features, config.kernel_size, False, factory)
        self.norm = _HeadNorm(config.head_dim, config.eps, factory)
        if config.decay:
            wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
            self.A_log = nn.Parameter(torch.empty(config.num_heads, **wide))
            self.dt_bias = nn.Parameter(torch.empty(config.num_heads, **wide))
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return [self.A_log, self.dt_bias] if self.config.decay else []

    def reset_parameters(self, _: int) -> None:
        """As flash-linear-attention: exp(A_log) uniform in 0 … 16, and steps log-uniform in 0.001 … 0.1."""
        if self.config.decay:
            nn.init.uniform_(self.A_log, 1e-3, 16).log_()
            _draw_steps(self.dt_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, d_k = self.config.num_heads, self.config.key_dim
        u = self.conv(self.qkv_proj(x))
        q, k, v = (part.unflatten(-1, (h, -1)) for part in u.split([h * d_k, h * d_k, u.shape[-1] - 2 * h * d_k], -1))
        wide = torch.promote_types(u.dtype, torch.float32)
        q, k = (part.to(wide) / (part.to(wide).square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        log_alpha = None
        if self.a_proj is not None:
            log_alpha = -self.A_log.to(wide).exp() * functional.softplus(
                self.a_proj(x).to(wide) + self.dt_bias.to(wide)
            )
        y, _ = gated_delta_rule(q * d_k**-0.5, k, v, torch.sigmoid(self.b_proj(x)), log_alpha)
        y = self.norm(y).flatten(2)
        return self.out_proj(y if self.g_proj is None else y * functional.silu(self.g_proj(x)))


class _Mamba2(nn.Module):
    def __init__(self, config: Mamba2Config, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
        self.xbc_proj = _projection(config, "xbc_proj", d, factory)
        self.z_proj = _projection(config, "z_proj", d, factory)
        self.dt_proj = _projection(config, "dt_proj", d, factory)
        self.conv = _SiluShortConv(self.xbc_proj.out_features, config.kernel_size, config.conv_bias, factory)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(config.num_heads, **wide)) for _ in range(3))
        self.norm = _HeadNorm(self.z_proj.out_features, config.eps, factory, config.num_groups)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return [parameter for name, parameter in self.named_parameters() if name != "norm.weight"]

    def reset_parameters(self, num_residuals: int) -> None:
        """As mamba_ssm: PyTorch's own, but W_out over √num_residuals, exp(A_log) uniform in 1 … 16, and D = 1.

        The steps that dt_bias makes by itself are log-uniform in 0.001 … 0.1.
        """
        for projection in (self.xbc_proj, self.z_proj, self.dt_proj, self.out_proj):
            bound = projection.in_features**-0.5
            nn.init.uniform_(projection.weight, -bound, bound)
        self.out_proj.weight.div_(math.sqrt(num_residuals))
        bound = self.config.kernel_size**-0.5
        for parameter in self.conv.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.uniform_(self.A_log, 1, 16).log_()
        nn.init.ones_(self.D)
        _draw_steps(self.dt_bias)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        h, groups, e = self.config.num_heads, self.config.num_groups, self.z_proj.out_features
        xbc = self.conv(self.xbc_proj(u))
        wide = torch.promote_types(xbc.dtype, torch.float32)
        x, b, c = xbc.split([e, (xbc.shape[-1] - e) // 2, (xbc.shape[-1] - e) // 2], -1)
        x = x.unflatten(-1, (h, -1)).to(wide)
        b, c = (part.unflatten(-1, (groups, -1)).repeat_interleave(h // groups, 2) for part in (b, c))
        delta = functional.softplus(self.dt_proj(u).to(wide) + self.dt_bias.to(wide))
        log_alpha = -self.A_log.to(wide).exp() * delta
        y, _ = decayed_linear_attention(c, b, delta[..., None] * x, log_alpha)
        y = (y + self.D.to(wide)[:, None] * x).flatten(2) * functional.silu(self.z_proj(u).to(wide))
        return self.out_proj(self.norm(y).to(xbc.dtype))


class _GatedLinearAttention(nn.Module):
    def __init__(self, config: GatedLinearAttentionConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = _projection(config, "qkv_proj", d, factory)
        self.g_proj = _projection(config, "g_proj", d, factory)
        self.a_down_proj = _projection(config, "a_down_proj", d, factory)
        self.a_up_proj = _projection(config, "a_up_proj", d, factory)
        self.norm = _HeadNorm(config.head_dim, config.eps, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, d_k = self.config.num_heads, self.config.key_dim
        u = self.qkv_proj(x)
        q, k, v = (part.unflatten(-1, (h, -1)) for part in u.split([h * d_k, h * d_k, u.shape[-1] - 2 * h * d_k], -1))
        a = self.a_up_proj(self.a_down_proj(x)).unflatten(-1, (h, -1))
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        log_alpha = functional.logsigmoid(a) / self.config.gate_normalizer
        y, _ = decayed_linear_attention(q * d_k**-0.5, k, v, log_alpha)
        return self.out_proj(self.norm(y).flatten(2) * functional.silu(self.g_proj(x)))


class _Rwkv7(nn.Module):
    def __init__(self, config: Rwkv7Config, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        for part in _RWKV7_MIXES:
            setattr(self, f"mix_{part}", nn.Parameter(torch.empty(d, **factory)))
        self.r_proj = _projection(config, "r_proj", d, factory)
        self.k_proj = _projection(config, "k_proj", d, factory)
        self.v_proj = _projection(config, "v_proj", d, factory)
        self.w_down_proj = _projection(config, "w_down_proj", d, factory)
        self.w_up_proj = _projection(config, "w_up_proj", d, factory)
        self.a_down_proj = _projection(config, "a_down_proj", d, factory)
        self.a_up_proj = _projection(config, "a_up_proj", d, factory)
        self.g_down_proj = _projection(config, "g_down_proj", d, factory)
        self.g_up_proj = _projection(config, "g_up_proj", d, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)
        self.k_k, self.k_a, self.r_k = (
            nn.Parameter(torch.empty(config.num_heads * config.head_dim, **factory)) for _ in range(3)
        )
        self.norm = nn.GroupNorm(config.num_heads, config.num_heads * config.head_dim, config.eps, **factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("norm.")]

    def reset_parameters(self, _: int) -> None:
        """As the authors' first layer: channels forget at rates of all sizes, and the result is 0 at first."""
        e, size, d = self.r_k.shape[0], self.config.head_dim, self.config.hidden_size
        for part, power in _RWKV7_MIXES.items():
            mix = getattr(self, f"mix_{part}")
            mix.copy_(1 - (torch.arange(d, device=mix.device) / d) ** power)
        channel = torch.arange(e, device=self.r_k.device)
        share = channel / max(e - 1, 1)  # 0 … 1
        zigzag = 2 * (channel % size) / max(size - 1, 1) - 1  # −1 … 1 in each head
        zigzag = zigzag * zigzag.abs()
        for projection, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -bound * d**-0.5, bound * d**-0.5)
        for down in (self.w_down_proj, self.a_down_proj, self.g_down_proj):
            nn.init.zeros_(down.weight)
        for up in (self.w_up_proj, self.a_up_proj, self.g_up_proj):
            drawn = torch.empty(up.weight.shape, device=up.weight.device)  # float32: 16 bits have no decomposition
            up.weight.copy_(nn.init.orthogonal_(drawn, 0.1 * max(1.0, math.sqrt(up.in_features / e))))
        self.w_up_proj.bias.copy_(6 * share - 5.5 + 2.5 * zigzag)
        self.a_up_proj.bias.copy_(0.4 * (share - 0.5) - 0.19 + 0.3 * zigzag)
        self.k_k.copy_(0.71 - 0.1 * (share - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        change = functional.pad(x, (0, 0, 1, 0))[:, :-1].to(wide) - x.to(wide)
        mixed = {part: (x + change * getattr(self, f"mix_{part}").to(wide)).to(x.dtype) for part in _RWKV7_MIXES}

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.to(wide).unflatten(-1, (self.config.num_heads, -1))

        r, k, v = heads(self.r_proj(mixed["r"])), heads(self.k_proj(mixed["k"])), heads(self.v_proj(mixed["v"]))
        w = heads(self.w_up_proj(torch.tanh(self.w_down_proj(mixed["w"]))))
        a = torch.sigmoid(heads(self.a_up_proj(self.a_down_proj(mixed["a"]))))
        g = self.g_up_proj(torch.sigmoid(self.g_down_proj(mixed["g"])))
        kappa = functional.normalize(k * heads(self.k_k), dim=-1)
        k = k * (1 + (a - 1) * heads(self.k_a))
        log_w = -math.exp(-0.5) * torch.sigmoid(w)
        y, _ = decayed_linear_attention(r, k, v, log_w, p=kappa, b=-kappa * a)
        y = functional.layer_norm(y, y.shape[-1:], eps=self.config.eps).flatten(2)
        y = y * self.norm.weight.to(wide) + self.norm.bias.to(wide)
        y = y + ((r * k * heads(self.r_k)).sum(-1, keepdim=True) * v).flatten(2)
        return self.out_proj((y * g).to(x.dtype))


_RWKV7_MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""What is made of a token and the one before, and the power of the first share of the latter."""


class _HeadNorm(nn.Module):
    """RMSNorm of each head's result, or of each of `num_groups` parts of it, which have weights of their own."""

    def __init__(self, size: int, eps: float, factory: dict[str, Any], num_groups: int = 1) -> None:
        super().__init__()
        self.eps, self.num_groups = eps, num_groups
        self.weight = nn.Parameter(torch.empty(size, **factory))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        parts = y.to(wide).unflatten(-1, (self.num_groups, -1))
        normed = functional.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.to(wide)).to(y.dtype)


class _Rwkv4(nn.Module):
    place = (0, 1)  # the layer's number and how many there are: its first decays follow from them

    def __init__(self, config: Rwkv4Config, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
        self.time_decay = nn.Parameter(torch.empty(config.inner_size, **wide))
        self.time_first = nn.Parameter(torch.empty(config.inner_size, **wide))
        self.time_mix_k = nn.Parameter(torch.empty(d, **wide))
        self.time_mix_v = nn.Parameter(torch.empty(d, **wide))
        self.time_mix_r = nn.Parameter(torch.empty(d, **wide))
        self.k_proj = _projection(config, "k_proj", d, factory)
        self.v_proj = _projection(config, "v_proj", d, factory)
        self.r_proj = _projection(config, "r_proj", d, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return [self.time_decay, self.time_first, self.time_mix_k, self.time_mix_v, self.time_mix_r]

    def reset_parameters(self, _: int) -> None:
        """As BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py, for layer i of L with ρ = i / (L − 1).

        time_decay = 8 (c / (e − 1))^(0.7 + 1.3 ρ) − 5 for channel c; time_first = log 0.3 + ((c + 1) mod 3 − 1) / 2;
        μ_k = (c / d)^(1 − i / L), μ_v = μ_k + 0.3 ρ, μ_r = √μ_k. Matrices as the model's, where the authors begin with
        zeros.
        """
        i, layers = self.place
        later = i / max(1, layers - 1)
        for parameter in self.own_parameters():  # 0, 1, …
            nn.init.ones_(parameter).cumsum_(0).sub_(1)
        e, d = len(self.time_decay), len(self.time_mix_k)
        self.time_decay.div_(max(1, e - 1)).pow_(0.7 + 1.3 * later).mul_(8).sub_(5)
        self.time_first.add_(1).remainder_(3).sub_(1).mul_(0.5).add_(math.log(0.3))
        self.time_mix_k.div_(d).pow_(1 - i / layers)
        self.time_mix_v.div_(d).pow_(1 - i / layers).add_(0.3 * later)
        self.time_mix_r.div_(d).pow_(0.5 * (1 - i / layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        before = functional.pad(wide, (0, 0, 1, -1))

        def mixed(mu: torch.Tensor) -> torch.Tensor:
            return torch.lerp(before, wide, mu.to(wide.dtype)).to(x.dtype)

        k, v, r = (
            self.k_proj(mixed(self.time_mix_k)),
            self.v_proj(mixed(self.time_mix_v)),
            self.r_proj(mixed(self.time_mix_r)),
        )
        y = wkv(k, v, -self.time_decay.exp(), self.time_first)
        return self.out_proj(torch.sigmoid(r) * y)


class _H3(nn.Module):
    def __init__(self, config: H3Config, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        h, taps, modes = config.num_heads, config.kernel_size, config.num_modes
        e = h * config.head_dim
        wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
        self.num_heads = h
        self.qkv_proj = _projection(config, "qkv_proj", d, factory)
        self.shift_B = nn.Parameter(torch.empty(e, taps, **wide))
        self.shift_C = nn.Parameter(torch.empty(e, taps, **wide))
        self.shift_D = nn.Parameter(torch.empty(e, **wide))
        self.log_dt = nn.Parameter(torch.empty(h, **wide))
        self.A_log = nn.Parameter(torch.empty(h, modes, **wide))
        self.A_imag = nn.Parameter(torch.empty(h, modes, **wide))
        self.B = nn.Parameter(torch.empty(h, modes, 2, **wide))
        self.C = nn.Parameter(torch.empty(h, modes, 2, **wide))
        self.D = nn.Parameter(torch.empty(h, **wide))
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        shift = [self.shift_B, self.shift_C, self.shift_D]
        return [*shift, self.log_dt, self.A_log, self.A_imag, self.B, self.C, self.D]

    def reset_parameters(self, _: int) -> None:
        """As HazyResearch/zoology, zoology/mixers/h3.

        The shift's B is e₁ and its C as of torch.nn.Conv1d; steps log-uniform in 0.001 … 0.1; A = −½ + iπn for mode n
        (S4D-Lin), B = 1, C normal with a variance of ½ of both parts; both D normal.
        """
        nn.init.zeros_(self.shift_B)[:, 0] = 1
        bound = self.shift_C.shape[1] ** -0.5
        nn.init.uniform_(self.shift_C, -bound, bound)
        nn.init.uniform_(self.log_dt, math.log(0.001), math.log(0.1))
        nn.init.constant_(self.A_log, math.log(0.5))
        nn.init.ones_(self.A_imag).cumsum_(1).sub_(1).mul_(math.pi)
        nn.init.zeros_(self.B)[..., 0] = 1
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.normal_(self.shift_D)
        nn.init.normal_(self.D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(x)
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, -1)
        k = long_conv(k, shift_taps(self.shift_B, self.shift_C)) + self.shift_D * k
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        kv = k[..., None] * v[..., None, :]  # (B, T, H, size of k, size of v)
        taps = s4d_taps(self.log_dt, self.A_log, self.A_imag, self.B, self.C, x.shape[1])
        s = long_conv(kv, taps[..., None, None]) + self.D[:, None, None] * kv
        y = (q[..., None] * s).sum(-2).flatten(2)
        return self.out_proj(y.to(qkv.dtype))


class _Hyena(nn.Module):
    def __init__(self, config: HyenaConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.in_proj = _projection(config, "in_proj", d, factory)
        self.conv = _ShortConv(3 * config.inner_size, config.kernel_size, factory)
        self.filter = _HyenaFilter(config, factory)
        self.out_proj = _projection(config, "out_proj", d, factory)

    def own_parameters(self) -> list[nn.Parameter]:
        """Those that reset_parameters() draws, and not the model."""
        return [*self.conv.parameters(), *self.filter.own_parameters()]

    def reset_parameters(self, _: int) -> None:
        """As HazyResearch/zoology, zoology/mixers/hyena.py.

        The short convolution as torch.nn.Conv1d, freq = 1, D normal. The filter's matrices are as the model's, its
        biases zeros.
        """
        bound = self.conv.weight.shape[1] ** -0.5
        for parameter in self.conv.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.filter.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"a sequence of {x.shape[1]} tokens, and this model's hyena layers have filters of {self.max_length}: "
                "expected no more tokens, or a config with a greater max_length"
            )
        u = self.in_proj(x)
        x1, x2, v = self.conv(u).chunk(3, -1)
        product = v * x1
        y = long_conv(product, self.filter(x.shape[1])) + self.filter.D * product
        return self.out_proj((y * x2).to(u.dtype))


class _ShortConv(nn.Module):
    def __init__(self, channels: int, kernel_size: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel_size, **factory))
        self.bias = nn.Parameter(torch.empty(channels, **factory))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(B, T, channels), in float32 at least."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        taps = self.weight.to(u.dtype)
        padded = functional.pad(u, (0, 0, taps.shape[1] - 1, 0))
        y = self.bias.to(u.dtype).expand_as(u)
        for j in range(taps.shape[1]):
            y = torch.addcmul(y, taps[:, j], padded[:, j : j + u.shape[1]])
        return y


class _HyenaFilter(nn.Module):
    def __init__(self, config: HyenaConfig, factory: dict[str, Any]) -> None:
        super().__init__()
        self.max_length = config.max_length
        f, e = config.filter_size, config.inner_size
        wide = factory | {"dtype": torch.promote_types(factory["dtype"], torch.float32)}
        self.w1 = nn.Parameter(torch.empty(f, 3, **wide))
        self.b1 = nn.Parameter(torch.empty(f, **wide))
        self.w2 = nn.Parameter(torch.empty(f, f, **wide))
        self.b2 = nn.Parameter(torch.empty(f, **wide))
        self.w3 = nn.Parameter(torch.empty(f, f, **wide))
        self.b3 = nn.Parameter(torch.empty(f, **wide))
        self.w4 = nn.Parameter(torch.empty(e, f, **wide))
        self.freq = nn.Parameter(torch.empty(f, **wide))
        self.D = nn.Parameter(torch.empty(e, **wide))

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.b1, self.b2, self.b3, self.freq, self.D]

    def reset_parameters(self) -> None:
        for bias in (self.b1, self.b2, self.b3):
            nn.init.zeros_(bias)
        nn.init.ones_(self.freq)
        nn.init.normal_(self.D)

    def forward(self, num_taps: int) -> torch.Tensor:
        parts = (self.w1, self.b1, self.w2, self.b2, self.w3, self.b3, self.w4, self.freq)
        return hyena_filter(*parts, self.max_length, num_taps)


_MIXERS: dict[type[sizes.Mixer], Callable[[Any, int, dict[str, Any]], nn.Module]] = {
    GatedConvConfig: _GatedConv,
    GatedDeltaNetConfig: _GatedDeltaNet,
    LinearAttentionConfig: _LinearAttention,
    SlidingWindowConfig: _SoftmaxAttention,
    FullAttentionConfig: _SoftmaxAttention,
    SelectiveScanConfig: _SelectiveScan,
    PrefixLinearAttentionConfig: _PrefixLinearAttention,
    Rwkv4Config: _Rwkv4,
    H3Config: _H3,
    HyenaConfig: _Hyena,
    Mamba2Config: _Mamba2,
    GatedLinearAttentionConfig: _GatedLinearAttention,
    Rwkv7Config: _Rwkv7,
}


class _Mlp(nn.Module):
    """W₂(h[:m] ⊙ act(h[m:])) with h = W₁x + b₁ when gated, otherwise W₂ act(W₁x + b₁)."""

    def __init__(self, config: MlpConfig, d: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, _ACTIVATIONS[config.activation]
        rows = config.inner_size * (2 if config.gated else 1)
        self.fc1 = _Linear(d, rows, bias=config.fc1_bias, **factory)
        self.fc2 = _Linear(config.inner_size, d, bias=config.fc2_bias, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        if self.gated and self.activation is functional.silu:
            return self.fc2(ops.swiglu(h))
        if self.gated:
            value, gate = h.chunk(2, dim=-1)
            return self.fc2(value * self.activation(gate))
        return self.fc2(self.activation(h))
