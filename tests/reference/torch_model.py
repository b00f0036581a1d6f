"""The equations in plain PyTorch, quadratic in the number of tokens, in whatever dtype is asked for.

In float64 the mixers are what gradients are compared with: autograd differentiates them. In bfloat16 the model says
whether model.py rounds where PyTorch does: weights and activations are bfloat16 tensors and every operation rounds its
result, as the authors' model does when cast to bfloat16; only the residual stream and the norms' insides are float32
(`residual_in_fp32`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tests.reference.model import taylor_features

ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


# ---- mixers: (B, T, H, size of a head) -------------------------------------------------------------------------------


def taylor_reference(q: Any, k: Any, v: Any, eps: float = 1e-12, dtype: torch.dtype = torch.float64) -> Any:
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT / math.sqrt(q.shape[-1])
    p = (1 + s + s * s / 2).tril()
    return (p @ v / (p.sum(-1, keepdim=True) + eps)).transpose(1, 2)


def state_reference(k: Any, v: Any) -> Any:
    features = torch.from_numpy(taylor_features(k.double().cpu().numpy())).to(v.device)
    ones = torch.cat([v.double(), torch.ones_like(v[..., :1]).double()], -1)
    return torch.einsum("bthf,bthd->bhfd", features, ones)


def window_reference(q: Any, k: Any, v: Any, window: int, scale: float, dtype: torch.dtype = torch.float64) -> Any:
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    age = torch.arange(q.shape[2], device=q.device)
    age = age[:, None] - age
    scores = (q @ k.mT * scale).masked_fill((age < 0) | (age >= window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def conv_reference(u: Any, weight: Any, before: Any = None, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The result, and the last K − 1 values of u₁."""
    e, taps = weight.shape
    u1, u2 = u.to(dtype).chunk(2, dim=-1)
    if before is None:
        before = u1.new_zeros(len(u), taps - 1, e)
    padded = torch.cat([before.to(dtype), u1], 1)
    conv = functional.conv1d(padded.mT.contiguous(), weight.to(dtype)[:, None], groups=e).mT
    return functional.silu(conv) * u2, padded[:, padded.shape[1] - (taps - 1) :]


def scan_reference(
    x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, before: Any = None, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """Token by token, before the gate: the result (B, T, e) and h after the last token, (B, e, N).

    x, dt (B, T, e); a (e, N); b, c (B, T, N); d (e).
    """
    x, dt, a, b, c, d = (part.to(dtype) for part in (x, dt, a, b, c, d))
    delta = torch.where(dt > 20, dt, dt.clamp(max=20).exp().log1p())
    h = x.new_zeros(len(x), *a.shape) if before is None else before.to(dtype)
    y = []
    for t in range(x.shape[1]):
        h = (delta[:, t, :, None] * a).exp() * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        y.append((h @ c[:, t, :, None])[..., 0] + d * x[:, t])
    return torch.stack(y, 1), h


def delta_reference(
    q: Any, k: Any, v: Any, beta: Any, log_alpha: Any = None, before: Any = None, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    """Token by token: Sᵀq (B, T, H, d_v), and S after the last token, (B, H, d_k, d_v)."""
    q, k, v, beta = (part.to(dtype) for part in (q, k, v, beta))
    s = q.new_zeros(len(q), *q.shape[2:], v.shape[-1]) if before is None else before.to(dtype)
    y = []
    for t in range(q.shape[1]):
        if log_alpha is not None:
            s = log_alpha[:, t, :, None, None].to(dtype).exp() * s
        change = beta[:, t, :, None] * (v[:, t] - (k[:, t, :, None] @ s)[:, :, 0])
        s = s + k[:, t, :, :, None] * change[:, :, None]
        y.append((q[:, t, :, None] @ s)[:, :, 0])
    return torch.stack(y, 1), s


def rwkv4_reference(k: Any, v: Any, decay: Any, first: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Token by token: y (B, T, e) of k and v (B, T, e), decay ≤ 0 and first (e)."""
    k, v, decay, first = (part.to(dtype) for part in (k, v, decay, first))
    p, q, o = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e30)
    y = []
    for t in range(k.shape[1]):
        own = first + k[:, t]
        most = torch.maximum(o, own)
        past, present = (o - most).exp(), (own - most).exp()
        y.append((past * p + present * v[:, t]) / (past * q + present))
        most = torch.maximum(o + decay, k[:, t])
        kept, added = (o + decay - most).exp(), (k[:, t] - most).exp()
        p, q, o = kept * p + added * v[:, t], kept * q + added, most
    return torch.stack(y, 1)


def decayed_reference(
    q: Any,
    k: Any,
    v: Any,
    log_alpha: Any,
    before: Any = None,
    p: Any = None,
    b: Any = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, Any]:
    """Token by token, S ← diag(α) S + b (Sᵀp)ᵀ + k vᵀ: Sᵀq (B, T, H, d_v), and S after the last token.

    log_alpha: (B, T, H), or (B, T, H, d_k). Without p and b, without their term.
    """
    q, k, v, log_alpha = (part.to(dtype) for part in (q, k, v, log_alpha))
    p, b = (torch.zeros_like(k) if part is None else part.to(dtype) for part in (p, b))
    alpha = (log_alpha if log_alpha.ndim == 4 else log_alpha[..., None]).exp()
    s = q.new_zeros(len(q), *q.shape[2:], v.shape[-1]) if before is None else before.to(dtype)
    y = []
    for t in range(q.shape[1]):
        change = b[:, t, :, :, None] * (p[:, t, :, None] @ s)
        s = alpha[:, t, ..., None] * s + change + k[:, t, :, :, None] * v[:, t, :, None]
        y.append((q[:, t, :, None] @ s)[:, :, 0])
    return torch.stack(y, 1), s


def rotary_reference(x: Any, layer: Mapping[str, Any]) -> Any:
    n = -(-layer["rotary_dim"] // 2)
    if n == 0:
        return x
    exponents = -2 * torch.arange(n, dtype=torch.float64) / layer["rotary_dim"]
    angle = torch.arange(x.shape[1])[:, None] * layer["rotary_base"] ** exponents
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    interleaved = layer["rotary_interleaved"]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    result = x.clone()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., first] * sin + x[..., second] * cos
    return result


# ---- the model -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def forward(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    tokens: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Logits (T, padded_vocab_size), float64 NumPy, of one sequence. `tensors`: NumPy arrays by our names."""
    wide = torch.promote_types(dtype, torch.float32)
    w = {name: torch.from_numpy(np.asarray(values, np.float32)).to(dtype) for name, values in tensors.items()}
    norm_config, mlp = config["norm"], config["mlp"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x[0], w[f"{name}.weight"], w.get(f"{name}.bias"))[None]  # one rounding, of the sum

    def norm(r: torch.Tensor, name: str) -> torch.Tensor:
        weight = w[f"{name}.weight"].to(wide)
        if norm_config["type"] == "rms_norm":
            y = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + norm_config["eps"]) * weight
        else:
            y = functional.layer_norm(r, (r.shape[-1],), weight, w[f"{name}.bias"].to(wide), norm_config["eps"])
        return y.to(dtype)

    def scan(u: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        a_log, d, dt_bias = (
            torch.from_numpy(np.asarray(tensors[f"{name}.{part}"], np.float32)).to(wide)
            for part in ("A_log", "D", "dt_proj.bias")
        )
        (e, n), taps = a_log.shape, w[f"{name}.conv.weight"]
        x, z = linear(u, f"{name}.in_proj").split(e, -1)
        padded = functional.pad(x.mT, (taps.shape[1] - 1, 0))
        x = functional.silu(functional.conv1d(padded, taps[:, None], w.get(f"{name}.conv.bias"), groups=e)).mT
        step, b, c = linear(x, f"{name}.x_proj").split([layer["dt_rank"], n, n], -1)
        dt = functional.linear(step, w[f"{name}.dt_proj.weight"]).to(wide) + dt_bias
        y = scan_reference(x, dt, -a_log.exp(), b, c, d, dtype=wide)[0]
        return y.to(dtype) * functional.silu(z)

    def kept_in(name: str) -> Callable[[str], torch.Tensor]:
        return lambda part: torch.from_numpy(np.asarray(tensors[f"{name}.{part}"], np.float32)).to(wide)

    def mamba2(u: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        kept, taps = kept_in(name), w[f"{name}.conv.weight"]
        h, groups, e = layer["num_heads"], layer["num_groups"], layer["num_heads"] * layer["head_dim"]
        padded = functional.pad(linear(u, f"{name}.xbc_proj").mT, (taps.shape[1] - 1, 0))
        conv = functional.conv1d(padded, taps[:, None], w.get(f"{name}.conv.bias"), groups=len(taps)).mT
        x, bc = functional.silu(conv).split([e, len(taps) - e], -1)
        x = x.unflatten(-1, (h, -1)).to(wide)
        b, c = (part.unflatten(-1, (groups, -1)).repeat_interleave(h // groups, 2) for part in bc.chunk(2, -1))
        delta = functional.softplus(linear(u, f"{name}.dt_proj").to(wide) + kept("dt_bias"))
        y = decayed_reference(c, b, delta[..., None] * x, -kept("A_log").exp() * delta, dtype=wide)[0]
        y = (y + kept("D")[:, None] * x).to(dtype).to(wide).flatten(2)
        y = (y * functional.silu(linear(u, f"{name}.z_proj").to(wide))).unflatten(-1, (groups, -1))
        y = functional.rms_norm(y, y.shape[-1:], eps=layer["eps"]).flatten(2)
        return (y * kept("norm.weight")).to(dtype)

    def gated_linear(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        kept, h, dk = kept_in(name), layer["num_heads"], layer["key_dim"]
        u = linear(x, f"{name}.qkv_proj")
        q, k, v = (part.unflatten(-1, (h, -1)) for part in u.split([h * dk, h * dk, u.shape[-1] - 2 * h * dk], -1))
        a = linear(linear(x, f"{name}.a_down_proj"), f"{name}.a_up_proj").to(wide).unflatten(-1, (h, -1))
        log_alpha = functional.logsigmoid(a) / layer["gate_normalizer"]
        y = decayed_reference(q.to(wide) / math.sqrt(dk), k, v, log_alpha, dtype=wide)[0].to(dtype).to(wide)
        y = functional.rms_norm(y, y.shape[-1:], kept("norm.weight"), layer["eps"])
        return (y.flatten(2) * functional.silu(linear(x, f"{name}.g_proj").to(wide))).to(dtype)

    def rwkv7(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        kept, h = kept_in(name), layer["num_heads"]
        change = functional.pad(x, (0, 0, 1, 0))[:, :-1].to(wide) - x.to(wide)
        m = {part: (x.to(wide) + change * kept(f"mix_{part}")).to(dtype) for part in "rwkvag"}
        r, k, v = (linear(m[part], f"{name}.{part}_proj").to(wide).unflatten(-1, (h, -1)) for part in "rkv")
        low = {part: linear(m[part], f"{name}.{part}_down_proj") for part in "wag"}
        low["w"], low["g"] = low["w"].tanh(), low["g"].sigmoid()
        w, a, g = (linear(low[part], f"{name}.{part}_up_proj").to(wide) for part in "wag")
        w, a = (part.sigmoid().unflatten(-1, (h, -1)) for part in (w, a))
        kappa = functional.normalize(k * kept("k_k").unflatten(0, (h, -1)), dim=-1).to(dtype).to(wide)
        k = (k * (1 + (a - 1) * kept("k_a").unflatten(0, (h, -1)))).to(dtype).to(wide)
        y = decayed_reference(r, k, v, -math.exp(-0.5) * w, p=kappa, b=(-kappa * a).to(dtype), dtype=wide)[0]
        y = functional.layer_norm(y.to(dtype).to(wide), y.shape[-1:], eps=layer["eps"]).flatten(2)
        bonus = (r * k * kept("r_k").unflatten(0, (h, -1))).sum(-1, keepdim=True) * v
        return ((y * kept("norm.weight") + kept("norm.bias") + bonus.flatten(2)) * g).to(dtype)

    def delta(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        kept = kept_in(name)
        h, dk, taps = layer["num_heads"], layer["key_dim"], w[f"{name}.conv.weight"]
        padded = functional.pad(linear(x, f"{name}.qkv_proj").mT, (taps.shape[1] - 1, 0))
        u = functional.silu(functional.conv1d(padded, taps[:, None], groups=len(taps)).mT)
        q, k, v = (part.unflatten(-1, (h, -1)) for part in u.split([h * dk, h * dk, len(taps) - 2 * h * dk], -1))
        q, k = (
            (part.to(wide) / (part.to(wide).square().sum(-1, keepdim=True) + 1e-6).sqrt()).to(dtype) for part in (q, k)
        )
        beta, log_alpha = torch.sigmoid(linear(x, f"{name}.b_proj")), None
        if layer["decay"]:
            step = functional.softplus(linear(x, f"{name}.a_proj").to(wide) + kept("dt_bias"))
            log_alpha = -kept("A_log").exp() * step
        y = delta_reference(q.to(wide) / math.sqrt(dk), k, v, beta, log_alpha, dtype=wide)[0].to(dtype).to(wide)
        y = functional.rms_norm(y, y.shape[-1:], kept("norm.weight"), layer["eps"])
        if layer["output_gate"]:
            y = y * functional.silu(linear(x, f"{name}.g_proj").to(wide)).unflatten(-1, (h, -1))
        return y.to(dtype).flatten(2)

    def kept(name: str) -> torch.Tensor:
        """What a 16-bit model keeps in float32."""
        return torch.from_numpy(np.asarray(tensors[name], np.float32)).to(wide)

    def rwkv4(x: torch.Tensor, name: str) -> torch.Tensor:
        before = functional.pad(x, (0, 0, 1, -1)).to(wide)
        k, v, r = (
            linear((mu * x.to(wide) + (1 - mu) * before).to(dtype), f"{name}.{part}_proj")
            for part, mu in ((part, kept(f"{name}.time_mix_{part}")) for part in "kvr")
        )
        y = rwkv4_reference(k, v, -kept(f"{name}.time_decay").exp(), kept(f"{name}.time_first"), dtype=wide)
        return torch.sigmoid(r) * y.to(dtype)

    def h3(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        """As the authors' code, which makes 16-bit numbers float32 between the projections."""
        heads, t = layer["num_heads"], x.shape[1]
        q, k, v = linear(x, f"{name}.qkv_proj").to(wide).chunk(3, -1)
        b, c, taps = kept(f"{name}.shift_B"), kept(f"{name}.shift_C"), layer["kernel_size"]
        padded, k = functional.pad(k, (0, 0, taps - 1, 0)), kept(f"{name}.shift_D") * k
        for i in range(taps):
            k = k + (b[:, : taps - i] * c[:, i:]).sum(1) * padded[:, taps - 1 - i :][:, :t]
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        step = kept(f"{name}.log_dt").exp()[:, None]
        z = step / 2 * torch.complex(-kept(f"{name}.A_log").exp(), kept(f"{name}.A_imag"))
        b, c = (torch.view_as_complex(kept(f"{name}.{part}")) for part in "BC")
        decay, weight = ((1 + z) / (1 - z))[:, None, None], (b * c * step / (1 - z))[:, None, None]
        modes, y = torch.zeros(1, dtype=z.dtype), []
        for n in range(t):
            kv = k[:, n, :, :, None] * v[:, n, :, None]
            modes = decay * modes + kv[..., None]
            s = 2 * (weight * modes).real.sum(-1) + kept(f"{name}.D")[:, None, None] * kv
            y.append((q[:, n, :, :, None] * s).sum(2))
        return torch.stack(y, 1).to(dtype).flatten(2)

    def hyena(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        """Likewise."""
        t, length, taps = x.shape[1], layer["max_length"], w[f"{name}.conv.weight"].to(wide)
        u = functional.pad(linear(x, f"{name}.in_proj").to(wide).mT, (taps.shape[1] - 1, 0))
        conv = functional.conv1d(u, taps[:, None], w[f"{name}.conv.bias"].to(wide), groups=len(taps)).mT
        x1, x2, v = conv.chunk(3, -1)
        time = torch.arange(t, dtype=wide) / max(1, length - 1)
        angle = torch.arange(t, dtype=wide) * (2e-4 * math.pi / length)
        h = torch.stack([time, angle.cos(), -angle.sin()], -1)
        for i in (1, 2, 3):
            h = h @ kept(f"{name}.filter.w{i}").T + kept(f"{name}.filter.b{i}")
            h = (kept(f"{name}.filter.freq") * h).sin()
        decay = torch.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, layer["inner_size"], dtype=wide)
        h = h @ kept(f"{name}.filter.w4").T * (-time[:, None] * decay).exp()
        g = v * x1
        y = kept(f"{name}.filter.D") * g
        y = y + torch.stack([(h[: n + 1].flip(0) * g[:, : n + 1]).sum(1) for n in range(t)], 1)
        return (y * x2).to(dtype)

    def mix(x: torch.Tensor, layer: Mapping[str, Any], name: str) -> torch.Tensor:
        if layer["mixer"] == "gated_conv":
            return conv_reference(linear(x, f"{name}.in_proj"), w[f"{name}.conv.weight"], dtype=dtype)[0]
        if layer["mixer"] == "linear_attention":
            q, k, v = (linear(x, f"{name}.proj_{part}").unflatten(-1, (layer["num_heads"], -1)) for part in "qkv")
            return taylor_reference(q, k, v, layer["eps"], dtype).flatten(2)
        if layer["mixer"] == "selective_scan":
            return scan(x, layer, name)
        if layer["mixer"] == "gated_delta_net":
            return delta(x, layer, name)
        if layer["mixer"] == "rwkv4":
            return rwkv4(x, name)
        if layer["mixer"] in ("h3", "hyena"):
            return (h3 if layer["mixer"] == "h3" else hyena)(x, layer, name)
        if layer["mixer"] == "mamba2":
            return mamba2(x, layer, name)
        if layer["mixer"] == "gated_linear_attention":
            return gated_linear(x, layer, name)
        if layer["mixer"] == "rwkv7":
            return rwkv7(x, layer, name)
        if layer["mixer"] == "prefix_linear_attention":  # the prefix's keys and values stand before all others
            prefix = x[:, : layer["enc_length"]]
            parts = [(part, x) for part in ("q", "k", "v")] + [("k_enc", prefix), ("v_enc", prefix)]
            q, k, v, k_enc, v_enc = (
                linear(rows, f"{name}.proj_{part}").unflatten(-1, (layer["num_heads"], -1)) for part, rows in parts
            )
            q, k, v = torch.cat([torch.zeros_like(k_enc), q], 1), torch.cat([k_enc, k], 1), torch.cat([v_enc, v], 1)
            return taylor_reference(q, k, v, layer["eps"], dtype)[:, prefix.shape[1] :].flatten(2)
        h, h_kv = layer["num_heads"], layer["num_kv_heads"]
        qkv = linear(x, f"{name}.qkv_proj").unflatten(-1, (h + 2 * h_kv, -1))
        q, k, v = qkv.split([h, h_kv, h_kv], dim=2)
        q, k = rotary_reference(q, layer), rotary_reference(k, layer)
        return window_reference(q, k, v, layer.get("window", len(tokens)), layer["scale"], dtype).flatten(2)

    r = w["embedding.weight"][torch.as_tensor(np.asarray(tokens, np.int64))][None].to(wide)
    for i, layer in enumerate(config["layers"]):
        name = f"layers.{i}"
        r = r + linear(mix(norm(r, f"{name}.norm1"), layer, f"{name}.mixer"), f"{name}.mixer.out_proj").to(wide)
        if mlp is None:
            continue
        h = linear(norm(r, f"{name}.norm2"), f"{name}.mlp.fc1")
        act = ACTIVATIONS[mlp["activation"]]
        if mlp["gated"]:
            value, gate = h.chunk(2, dim=-1)
            h = value * act(gate)
        else:
            h = act(h)
        r = r + linear(h, f"{name}.mlp.fc2").to(wide)
    head = w["embedding.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return functional.linear(norm(r, "final_norm"), head)[0].double().numpy()
