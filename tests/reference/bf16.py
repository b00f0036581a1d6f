"""The same equations in plain bfloat16 NumPy: the yardstick for the runtime's bfloat16 error that needs no torch.

Weights and activations are bfloat16, every operation rounds its result and sums in float32, as torch_model does, with
which it must agree; only the residual stream and the norms' insides are float32. Arrays are float32 and hold bfloat16
values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.reference.model import ACTIVATIONS, Array, Config, State, softmax, taylor_features


def bf16(x: Any) -> Array:
    """The nearest bfloat16 values, ties to even, in float32."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + np.uint32(0x7FFF) + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def forward_bf16(config: Config, tensors: Mapping[str, Array], tokens: Sequence[int] | Array) -> tuple[Array, State]:
    """Logits (T, padded_vocab_size) of one sequence, and the state after it, from its bfloat16 keys, values and u₁."""
    return _Forward(config, tensors).run(np.asarray(tokens))


class _Forward:
    def __init__(self, config: Config, tensors: Mapping[str, Array]) -> None:
        self.config = config
        self.w = {name: bf16(values) for name, values in tensors.items()}
        self.wide = tensors  # what a 16-bit model keeps in float32
        self.state = State()

    def run(self, tokens: Array) -> tuple[Array, State]:
        r = self.w["embedding.weight"][tokens]
        for i, layer in enumerate(self.config["layers"]):
            y = getattr(self, f"_{layer['mixer']}")(self._norm(r, f"layers.{i}.norm1"), layer, i)
            r = r + self._linear(y, f"layers.{i}.mixer.out_proj")
            if self.config["mlp"] is not None:
                r = r + self._mlp(self._norm(r, f"layers.{i}.norm2"), f"layers.{i}.mlp")
        head = self.w["embedding.weight" if self.config["tie_embeddings"] else "lm_head.weight"]
        self.state.num_tokens = len(tokens)
        return bf16(self._norm(r, "final_norm") @ head.T), self.state

    def _linear(self, x: Array, name: str) -> Array:
        bias = self.w.get(f"{name}.bias")
        y = x @ self.w[f"{name}.weight"].T
        return bf16(y if bias is None else y + bias)

    def _norm(self, r: Array, name: str) -> Array:
        norm, weight = self.config["norm"], self.w[f"{name}.weight"]
        if norm["type"] == "rms_norm":
            return bf16(r / np.sqrt((r**2).mean(-1, keepdims=True) + np.float32(norm["eps"])) * weight)
        centred = r - r.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(norm["eps"]))
        return bf16(scaled * weight + self.w[f"{name}.bias"])

    def _mlp(self, x: Array, name: str) -> Array:
        mlp = self.config["mlp"]
        h = self._linear(x, f"{name}.fc1")
        if mlp["gated"]:
            value, gate = np.split(h, 2, axis=-1)
            h = bf16(value * bf16(ACTIVATIONS[mlp["activation"]](gate)))
        else:
            h = bf16(ACTIVATIONS[mlp["activation"]](h))
        return self._linear(h, f"{name}.fc2")

    def _gated_conv(self, x: Array, layer: Config, i: int) -> Array:
        e, taps = layer["inner_size"], self.w[f"layers.{i}.mixer.conv.weight"]
        u = self._linear(x, f"layers.{i}.mixer.in_proj")
        padded = np.concatenate([np.zeros((layer["kernel_size"] - 1, e), np.float32), u[:, :e]])
        self.state.tensors[f"layers.{i}.conv"] = padded[len(x) :].astype(np.float64)
        conv = bf16(sum(taps[:, j] * padded[j : j + len(x)] for j in range(taps.shape[1])))
        return bf16(bf16(ACTIVATIONS["silu"](conv)) * u[:, e:])

    def _linear_attention(self, x: Array, layer: Config, i: int) -> Array:
        projections = (self._linear(x, f"layers.{i}.mixer.proj_{part}") for part in "qkv")
        q, k, v = (y.reshape(len(x), layer["num_heads"], -1).transpose(1, 0, 2) for y in projections)  # (H, T, …)
        extended = np.concatenate([v, np.ones((*v.shape[:2], 1))], axis=-1)
        taylor = np.einsum("htp,htd->hpd", taylor_features(k.astype(np.float64)), extended)
        self.state.tensors[f"layers.{i}.taylor"] = taylor
        s = bf16(bf16(q @ k.transpose(0, 2, 1)) / np.float32(math.sqrt(layer["feature_dim"])))
        p = np.tril(bf16(bf16(1 + s) + bf16(bf16(s * s) / 2)))
        y = bf16(bf16(p @ v) / bf16(bf16(p.sum(-1, keepdims=True)) + np.float32(layer["eps"])))
        return y.transpose(1, 0, 2).reshape(len(x), -1)

    def _full_attention(self, x: Array, layer: Config, i: int) -> Array:
        return self._sliding_window(x, layer, i)

    def _selective_scan(self, u: Array, layer: Config, i: int) -> Array:
        """As the authors' kernel: bfloat16 inputs and result, float32 inside, and of A, D and the bias of Δ."""
        name, e, r, n = f"layers.{i}.mixer", layer["inner_size"], layer["dt_rank"], layer["state_size"]
        xz, taps = self._linear(u, f"{name}.in_proj"), self.w[f"{name}.conv.weight"]
        padded = np.concatenate([np.zeros((layer["kernel_size"] - 1, e), np.float32), xz[:, :e]])
        self.state.tensors[f"layers.{i}.conv"] = padded[len(u) :].astype(np.float64)
        conv = sum(taps[:, j] * padded[j : j + len(u)] for j in range(taps.shape[1]))
        x = bf16(ACTIVATIONS["silu"](bf16(conv + self.w.get(f"{name}.conv.bias", np.float32(0)))))
        projected = self._linear(x, f"{name}.x_proj")
        step = bf16(projected[:, :r] @ self.w[f"{name}.dt_proj.weight"].T)
        delta = np.logaddexp(0, step + self.wide[f"{name}.dt_proj.bias"])
        a, h, y = -np.exp(self.wide[f"{name}.A_log"]).T, np.zeros((n, e)), np.zeros((len(u), e))
        for t in range(len(u)):
            h = np.exp(delta[t] * a) * h + projected[t, r : r + n, None] * (delta[t] * x[t])
            y[t] = projected[t, r + n :] @ h + self.wide[f"{name}.D"] * x[t]
        self.state.tensors[f"layers.{i}.scan"] = h
        return bf16(bf16(y) * bf16(ACTIVATIONS["silu"](xz[:, e:])))

    def _prefix_linear_attention(self, x: Array, layer: Config, i: int) -> Array:
        """One prompt."""
        prefix = x[: layer["enc_length"]]
        parts = [(part, x) for part in ("q", "k", "v")] + [("k_enc", prefix), ("v_enc", prefix)]
        projections = (self._linear(rows, f"layers.{i}.mixer.proj_{part}") for part, rows in parts)
        q, k, v, k_enc, v_enc = (y.reshape(len(y), layer["num_heads"], -1).transpose(1, 0, 2) for y in projections)
        taylor = np.zeros(())
        for keys, values in ((k, v), (k_enc, v_enc)):
            extended = np.concatenate([values, np.ones((*values.shape[:2], 1))], axis=-1)
            taylor = taylor + np.einsum("htp,htd->hpd", taylor_features(keys.astype(np.float64)), extended)
        self.state.tensors[f"layers.{i}.taylor"] = taylor

        def weights(keys: Array) -> Array:
            s = bf16(bf16(q @ keys.transpose(0, 2, 1)) / np.float32(math.sqrt(layer["feature_dim"])))
            return bf16(bf16(1 + s) + bf16(bf16(s * s) / 2))

        # The prefix's keys and values stand before all others: one sum of both.
        p, v = np.concatenate([weights(k_enc), np.tril(weights(k))], -1), np.concatenate([v_enc, v], 1)
        y = bf16(bf16(p @ v) / bf16(bf16(p.sum(-1, keepdims=True)) + np.float32(layer["eps"])))
        return y.transpose(1, 0, 2).reshape(len(x), -1)

    def _gated_delta_net(self, x: Array, layer: Config, i: int) -> Array:
        """As the authors' kernels: bfloat16 inputs and results, float32 inside, and of A_log, dt_bias and the norm."""
        name, t, h, dk = f"layers.{i}.mixer", len(x), layer["num_heads"], layer["key_dim"]
        dv, taps = layer["head_dim"], self.w[f"layers.{i}.mixer.conv.weight"]
        padded = np.concatenate(
            [np.zeros((layer["kernel_size"] - 1, len(taps)), np.float32), self._linear(x, f"{name}.qkv_proj")]
        )
        self.state.tensors[f"layers.{i}.conv"] = padded[t:].astype(np.float64)
        conv = bf16(ACTIVATIONS["silu"](bf16(sum(taps[:, j] * padded[j : j + t] for j in range(taps.shape[1])))))
        q, k, v = (part.reshape(t, h, -1) for part in np.split(conv, [h * dk, 2 * h * dk], axis=-1))
        q, k = (bf16(part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6)) for part in (q, k))
        beta = bf16(ACTIVATIONS["sigmoid"](self._linear(x, f"{name}.b_proj")))
        alpha = np.ones((t, h))
        if layer["decay"]:
            step = np.logaddexp(0, self._linear(x, f"{name}.a_proj") + self.wide[f"{name}.dt_bias"])
            alpha = np.exp(-np.exp(self.wide[f"{name}.A_log"]) * step)
        s, y = np.zeros((h, dk, dv)), np.zeros((t, h, dv))
        for n in range(t):
            s = alpha[n, :, None, None] * s
            s = s + k[n, :, :, None] * (beta[n, :, None] * (v[n] - np.einsum("hkd,hk->hd", s, k[n])))[:, None]
            y[n] = np.einsum("hkd,hk->hd", s, q[n]) / math.sqrt(dk)
        self.state.tensors[f"layers.{i}.delta"] = s
        y = bf16(y)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + np.float32(layer["eps"])) * self.wide[f"{name}.norm.weight"]
        if layer["output_gate"]:
            y = y * ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")).reshape(y.shape)
        return bf16(y).reshape(t, -1)

    def _rwkv4(self, x: Array, layer: Config, i: int) -> Array:
        """As the authors' kernel: bfloat16 inputs and result, float32 inside, and of all that is no matrix."""
        name, zeros = f"layers.{i}.mixer", np.zeros((1, x.shape[1]), np.float32)
        shifted = np.concatenate([zeros, x])[:-1]

        def project(part: str) -> Array:
            mix = self.wide[f"{name}.time_mix_{part}"]
            return self._linear(bf16(mix * x + (1 - mix) * shifted), f"{name}.{part}_proj")

        k, v, r = (project(part).astype(np.float64) for part in "kvr")
        p, q, o = np.zeros_like(k[0]), np.zeros_like(k[0]), np.full_like(k[0], -np.inf)
        y = np.zeros_like(k)
        for t in range(len(x)):
            own = self.wide[f"{name}.time_first"] + k[t]
            most = np.maximum(o, own)
            past, present = np.exp(o - most), np.exp(own - most)
            y[t] = (past * p + present * v[t]) / (past * q + present)
            o = o - np.exp(self.wide[f"{name}.time_decay"])
            most = np.maximum(o, k[t])
            kept, added = np.exp(o - most), np.exp(k[t] - most)
            p, q, o = kept * p + added * v[t], kept * q + added, most
        self.state.tensors[f"layers.{i}.shift"] = x[-1].astype(np.float64)
        self.state.tensors[f"layers.{i}.wkv"] = np.stack([p, q, o])
        return bf16(bf16(ACTIVATIONS["sigmoid"](r)) * bf16(y))

    def _h3(self, x: Array, layer: Config, i: int) -> Array:
        """As the authors' code, which makes 16-bit numbers float32 between the projections."""
        name, t, h = f"layers.{i}.mixer", len(x), layer["num_heads"]
        q, k, v = np.split(self._linear(x, f"{name}.qkv_proj").astype(np.float64), 3, axis=-1)
        b, c, taps = self.wide[f"{name}.shift_B"], self.wide[f"{name}.shift_C"], layer["kernel_size"]
        padded = np.concatenate([np.zeros((taps - 1, k.shape[1])), k])
        self.state.tensors[f"layers.{i}.conv"] = padded[t:]
        k = self.wide[f"{name}.shift_D"] * k
        for j in range(taps):
            k = k + (b[:, : taps - j] * c[:, j:]).sum(1) * padded[taps - 1 - j :][:t]
        q, k, v = (part.reshape(t, h, -1) for part in (q, k, v))
        step = np.exp(self.wide[f"{name}.log_dt"])[:, None]
        z = step / 2 * (-np.exp(self.wide[f"{name}.A_log"]) + 1j * self.wide[f"{name}.A_imag"])
        weight = (self.wide[f"{name}.B"] @ [1, 1j]) * (self.wide[f"{name}.C"] @ [1, 1j]) * step / (1 - z)
        decay, modes = ((1 + z) / (1 - z))[:, None, None], np.zeros((h, k.shape[2], k.shape[2], z.shape[1]), complex)
        y = np.zeros((t, h, k.shape[2]))
        for n in range(t):
            kv = k[n][:, :, None] * v[n][:, None]
            modes = decay * modes + kv[..., None]
            s = 2 * (weight[:, None, None] * modes).real.sum(-1) + self.wide[f"{name}.D"][:, None, None] * kv
            y[n] = np.einsum("hi,hij->hj", q[n], s)
        self.state.tensors[f"layers.{i}.modes"] = np.stack([modes.real, modes.imag], -2)
        return bf16(y).reshape(t, -1)

    def _hyena(self, x: Array, layer: Config, i: int) -> Array:
        """Likewise."""
        name, t, length = f"layers.{i}.mixer", len(x), layer["max_length"]
        w = {part: self.wide[f"{name}.filter.{part}"].astype(np.float64) for part in ("w1", "w2", "w3", "w4", "freq")}
        u, taps = self._linear(x, f"{name}.in_proj").astype(np.float64), self.w[f"{name}.conv.weight"]
        padded = np.concatenate([np.zeros((layer["kernel_size"] - 1, u.shape[1])), u])
        self.state.tensors[f"layers.{i}.conv"] = padded[t:]
        conv = sum(taps[:, j] * padded[j : j + t] for j in range(taps.shape[1])) + self.w[f"{name}.conv.bias"]
        x1, x2, v = np.split(conv, 3, axis=-1)
        time, angle = np.arange(t) / max(1, length - 1), 2e-4 * np.pi * np.arange(t) / length
        h = np.stack([time, np.cos(angle), -np.sin(angle)], -1)
        for n in (1, 2, 3):
            h = np.sin(w["freq"] * (h @ w[f"w{n}"].T + self.wide[f"{name}.filter.b{n}"]))
        decay = np.linspace(-np.log(0.01) / 1.5, -np.log(0.01) / 0.3, layer["inner_size"])
        h = (h @ w["w4"].T) * np.exp(-time[:, None] * decay)
        g = v * x1
        y = self.wide[f"{name}.filter.D"] * g
        for n in range(t):
            y[n:] += h[n] * g[: t - n]
        self.state.tensors[f"layers.{i}.products"] = np.concatenate([g, np.zeros((length - t, g.shape[1]))])
        return bf16(y * x2)

    def _mamba2(self, u: Array, layer: Config, i: int) -> Array:
        """As the authors' kernels: bfloat16 inputs and results, float32 inside, and of A_log, D, dt_bias, the norm."""
        name, t, h, n = f"layers.{i}.mixer", len(u), layer["num_heads"], layer["state_size"]
        e, groups, taps = h * layer["head_dim"], layer["num_groups"], self.w[f"layers.{i}.mixer.conv.weight"]
        padded = np.concatenate(
            [np.zeros((layer["kernel_size"] - 1, len(taps)), np.float32), self._linear(u, f"{name}.xbc_proj")]
        )
        self.state.tensors[f"layers.{i}.conv"] = padded[t:].astype(np.float64)
        conv = sum(taps[:, j] * padded[j : j + t] for j in range(taps.shape[1]))
        xbc = bf16(ACTIVATIONS["silu"](bf16(conv + self.w.get(f"{name}.conv.bias", np.float32(0)))))
        x, z = xbc[:, :e].reshape(t, h, -1), self._linear(u, f"{name}.z_proj")
        b, c = (part.reshape(t, groups, n).repeat(h // groups, axis=1) for part in np.split(xbc[:, e:], 2, axis=-1))
        delta = np.logaddexp(0, self._linear(u, f"{name}.dt_proj") + self.wide[f"{name}.dt_bias"])
        alpha = np.exp(-np.exp(self.wide[f"{name}.A_log"]) * delta)
        s, y = np.zeros((h, n, layer["head_dim"])), np.zeros((t, h, layer["head_dim"]))
        for m in range(t):
            s = alpha[m, :, None, None] * s + b[m, :, :, None] * (delta[m, :, None] * x[m])[:, None]
            y[m] = np.einsum("hnd,hn->hd", s, c[m]) + self.wide[f"{name}.D"][:, None] * x[m]
        self.state.tensors[f"layers.{i}.matrix"] = s
        gated = (bf16(y).reshape(t, e) * ACTIVATIONS["silu"](z)).reshape(t, groups, -1)
        gated = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + np.float32(layer["eps"]))
        return bf16(gated.reshape(t, e) * self.wide[f"{name}.norm.weight"])

    def _gated_linear_attention(self, x: Array, layer: Config, i: int) -> Array:
        """As the authors' kernels: bfloat16 inputs and results, float32 inside, and of the norm."""
        name, t, h, dk = f"layers.{i}.mixer", len(x), layer["num_heads"], layer["key_dim"]
        qkv = np.split(self._linear(x, f"{name}.qkv_proj"), [h * dk, 2 * h * dk], axis=-1)
        q, k, v = (part.reshape(t, h, -1) for part in qkv)
        a = self._linear(bf16(x @ self.w[f"{name}.a_down_proj.weight"].T), f"{name}.a_up_proj").reshape(t, h, dk)
        alpha = np.exp(-np.logaddexp(0, -a) / layer["gate_normalizer"])
        s, y = np.zeros((h, dk, v.shape[-1])), np.zeros(v.shape)
        for m in range(t):
            s = alpha[m, :, :, None] * s + k[m, :, :, None] * v[m, :, None]
            y[m] = np.einsum("hkd,hk->hd", s, q[m]) / math.sqrt(dk)
        self.state.tensors[f"layers.{i}.matrix"] = s
        y = bf16(y)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + np.float32(layer["eps"])) * self.wide[f"{name}.norm.weight"]
        return bf16(y.reshape(t, -1) * ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")))

    def _rwkv7(self, x: Array, layer: Config, i: int) -> Array:
        """As torch_model: bfloat16 inputs and results, float32 inside, and of what is no matrix."""
        name, t, h = f"layers.{i}.mixer", len(x), layer["num_heads"]
        self.state.tensors[f"layers.{i}.shift"] = x[-1].astype(np.float64)
        change = np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x
        m = {part: bf16(x + change * self.wide[f"{name}.mix_{part}"]) for part in "rwkvag"}
        r, k, v = (self._linear(m[part], f"{name}.{part}_proj").reshape(t, h, -1) for part in "rkv")
        low = {part: self._linear(m[part], f"{name}.{part}_down_proj") for part in "wag"}
        low["w"], low["g"] = bf16(np.tanh(low["w"])), bf16(ACTIVATIONS["sigmoid"](low["g"]))
        w, a, g = (self._linear(low[part], f"{name}.{part}_up_proj") for part in "wag")
        w, a = (ACTIVATIONS["sigmoid"](part).reshape(r.shape) for part in (w, a))
        k_k, k_a, r_k = (self.wide[f"{name}.{part}"].reshape(h, -1) for part in ("k_k", "k_a", "r_k"))
        kappa = k * k_k
        kappa = bf16(kappa / np.maximum(np.sqrt((kappa**2).sum(-1, keepdims=True)), 1e-12))
        k, removed, w = bf16(k * (1 + (a - 1) * k_a)), bf16(kappa * a), np.exp(-np.exp(-0.5) * w)
        s, y = np.zeros((h, v.shape[-1], v.shape[-1])), np.zeros(v.shape)
        for n in range(t):
            seen = np.einsum("hkd,hk->hd", s, kappa[n])
            s = w[n][..., None] * s - removed[n][..., None] * seen[:, None] + k[n][..., None] * v[n][:, None]
            y[n] = np.einsum("hkd,hk->hd", s, r[n])
        self.state.tensors[f"layers.{i}.matrix"] = s
        y = bf16(y)
        y = y - y.mean(-1, keepdims=True)
        y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + np.float32(layer["eps"]))).reshape(t, -1)
        y = y * self.wide[f"{name}.norm.weight"] + self.wide[f"{name}.norm.bias"]
        return bf16((y + ((r * k * r_k).sum(-1, keepdims=True) * v).reshape(t, -1)) * g)

    def _sliding_window(self, x: Array, layer: Config, i: int) -> Array:
        t, h, h_kv, window = len(x), layer["num_heads"], layer["num_kv_heads"], layer.get("window", len(x))
        qkv = self._linear(x, f"layers.{i}.mixer.qkv_proj").reshape(t, h + 2 * h_kv, layer["head_dim"])
        q, k, v = _rotate(qkv[:, :h], layer), _rotate(qkv[:, h : h + h_kv], layer), qkv[:, h + h_kv :]
        for name, kept in (("keys", k), ("values", v)):
            self.state.tensors[f"layers.{i}.{name}"] = kept[-window:].astype(np.float64)
        q, k, v = (np.repeat(part.transpose(1, 0, 2), h // part.shape[1], axis=0) for part in (q, k, v))
        scores = bf16(bf16(q @ k.transpose(0, 2, 1)) * np.float32(layer["scale"]))
        age = np.arange(t)[:, None] - np.arange(t)
        weights = bf16(softmax(np.where((age >= 0) & (age < window), scores, np.float32(-np.inf))))
        return bf16(weights @ v).transpose(1, 0, 2).reshape(t, -1)


def _rotate(x: Array, layer: Config) -> Array:
    n = -(-layer["rotary_dim"] // 2)
    if n == 0:
        return x
    angle = np.arange(len(x))[:, None] * float(layer["rotary_base"]) ** (-2 * np.arange(n) / layer["rotary_dim"])
    cos, sin = bf16(np.cos(angle))[:, None], bf16(np.sin(angle))[:, None]
    interleaved = layer["rotary_interleaved"]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    result = x.copy()
    result[..., first] = bf16(bf16(x[..., first] * cos) - bf16(x[..., second] * sin))
    result[..., second] = bf16(bf16(x[..., first] * sin) + bf16(x[..., second] * cos))
    return result
