"""The same equations as plain bfloat16 PyTorch: the yardstick for the runtime's bfloat16 error.

Weights and activations are bfloat16 tensors and every operation rounds its result, as the authors' model does when cast
to bfloat16; only the residual stream and the norms' insides are float32 (`residual_in_fp32`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


@torch.inference_mode()
def forward_bf16(config: Mapping[str, Any], tensors: Mapping[str, Any], tokens: Sequence[int]) -> Any:
    """Logits (T, padded_vocab_size), float64 NumPy, of one sequence. `tensors`: NumPy arrays by our names."""
    w = {name: torch.from_numpy(np.asarray(values, np.float32)).bfloat16() for name, values in tensors.items()}
    norm_config, mlp = config["norm"], config["mlp"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(r: torch.Tensor, name: str) -> torch.Tensor:
        weight = w[f"{name}.weight"].float()
        if norm_config["type"] == "rms_norm":
            y = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + norm_config["eps"]) * weight
        else:
            y = functional.layer_norm(r, (r.shape[-1],), weight, w[f"{name}.bias"].float(), norm_config["eps"])
        return y.bfloat16()

    r = w["embedding.weight"][torch.as_tensor(np.asarray(tokens, np.int64))].float()
    for i, layer in enumerate(config["layers"]):
        name = f"layers.{i}"
        y = _MIXERS[layer["mixer"]](norm(r, f"{name}.norm1"), layer, f"{name}.mixer", w, linear)
        r = r + linear(y, f"{name}.mixer.out_proj").float()
        if mlp is None:
            continue
        h = linear(norm(r, f"{name}.norm2"), f"{name}.mlp.fc1")
        act = ACTIVATIONS[mlp["activation"]]
        if mlp["gated"]:
            value, gate = h.chunk(2, dim=-1)
            h = value * act(gate)
        else:
            h = act(h)
        r = r + linear(h, f"{name}.mlp.fc2").float()
    head = w["embedding.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return functional.linear(norm(r, "final_norm"), head).double().numpy()


def _gated_conv(x: Any, layer: Any, name: str, w: Any, linear: Any) -> Any:
    u1, u2 = linear(x, f"{name}.in_proj").chunk(2, dim=-1)
    k, e = layer["kernel_size"], layer["inner_size"]
    padded = functional.pad(u1.T[None], (k - 1, 0))
    conv = functional.conv1d(padded, w[f"{name}.conv.weight"][:, None], groups=e)[0].T
    return functional.silu(conv) * u2


def _linear_attention(x: Any, layer: Any, name: str, w: Any, linear: Any) -> Any:
    t, h, f = len(x), layer["num_heads"], layer["feature_dim"]
    q, k = (linear(x, f"{name}.proj_{part}").view(t, h, f).transpose(0, 1) for part in "qk")
    v = linear(x, f"{name}.proj_v").view(t, h, -1).transpose(0, 1)
    s = q @ k.transpose(1, 2) / math.sqrt(f)
    p = (1 + s + s * s / 2).tril()
    y = (p @ v) / (p.sum(-1, keepdim=True) + layer["eps"])
    return y.transpose(0, 1).reshape(t, -1)


def _sliding_window(x: Any, layer: Any, name: str, w: Any, linear: Any) -> Any:
    t, h, h_kv = len(x), layer["num_heads"], layer["num_kv_heads"]
    q, k, v = linear(x, f"{name}.qkv_proj").view(t, h + 2 * h_kv, -1).split([h, h_kv, h_kv], dim=1)
    q, k = _rotate(q, layer), _rotate(k, layer)
    q, k, v = (part.transpose(0, 1).repeat_interleave(h // part.shape[1], dim=0) for part in (q, k, v))
    scores = q @ k.transpose(1, 2) * layer["scale"]
    age = torch.arange(t)[:, None] - torch.arange(t)
    scores = scores.masked_fill((age < 0) | (age >= layer["window"]), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(t, -1)


def _rotate(x: Any, layer: Any) -> Any:
    n = -(-layer["rotary_dim"] // 2)
    if n == 0:
        return x
    exponents = -2 * torch.arange(n, dtype=torch.float64) / layer["rotary_dim"]
    angle = torch.arange(len(x))[:, None] * layer["rotary_base"] ** exponents
    cos, sin = angle.cos()[:, None].bfloat16(), angle.sin()[:, None].bfloat16()
    interleaved = layer["rotary_interleaved"]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    result = x.clone()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., first] * sin + x[..., second] * cos
    return result


_MIXERS = {"gated_conv": _gated_conv, "linear_attention": _linear_attention, "sliding_window": _sliding_window}
