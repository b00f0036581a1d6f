"""The forward pass of docs/model-format.md in NumPy float64, twice: in parallel and step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.files import read_model

Array = np.ndarray[Any, Any]
Config = Mapping[str, Any]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


ACTIVATIONS = {
    "identity": lambda x: x,
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


def taylor(s: Array) -> Array:
    return 1 + s + s**2 / 2


def taylor_features(x: Array) -> Array:
    """φ with φ(q)·φ(k) = taylor(q·k/√f). x (…, f) → (…, 1 + f + f(f+1)/2): [1, x_i / f^¼, x_i x_j / √f (i ≤ j)], the
    squares (i = j) over √2 more."""
    f = x.shape[-1]
    rows, cols = np.triu_indices(f)
    pairs = x[..., rows] * x[..., cols] / math.sqrt(f) / np.where(rows == cols, math.sqrt(2), 1)
    return np.concatenate([np.ones((*x.shape[:-1], 1)), x / f**0.25, pairs], axis=-1)


def rotate(x: Array, positions: Array, mixer: Config) -> Array:
    """Rotary embedding of x (T, heads, head_dim) at positions (T): pair i turns by position · base^(-2i/R)."""
    dims = mixer["rotary_dim"]
    n = -(-dims // 2)
    if n == 0:
        return x
    angle = positions[:, None] * float(mixer["rotary_base"]) ** (-2 * np.arange(n) / dims)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]  # (T, 1, n)
    if mixer["rotary_interleaved"]:
        first, second = slice(0, 2 * n, 2), slice(1, 2 * n, 2)
    else:
        first, second = slice(0, n), slice(n, 2 * n)
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., first] * sin + x[..., second] * cos
    return result


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclass
class Trace:
    """Values of one parallel forward pass of T tokens, float64."""

    embed: Array  # (T, d)
    mixer_out: Array  # (L, T, d)
    block_out: Array  # (L, T, d)
    final_norm: Array  # (T, d)
    logits: Array  # (T, padded_vocab_size)


@dataclass
class State:
    """What one sequence has seen, named and shaped as in a saved state (docs/state-format.md), float64.

    layers.{i}.conv (K-1, e) · layers.{i}.taylor (H, features, head_dim + 1) · layers.{i}.keys and .values
    (min(num_tokens, window), H_kv, head_dim), (num_tokens, H_kv, head_dim) with full attention · layers.{i}.scan
    (N, e) · layers.{i}.delta (H, key_dim, head_dim) · layers.{i}.shift (d), layers.{i}.wkv (3, e) · layers.{i}.modes
    (H, head_dim, head_dim, 2, M) · layers.{i}.products (max_length, e) · layers.{i}.matrix (H, rows, head_dim).
    """

    num_tokens: int = 0
    tensors: dict[str, Array] = field(default_factory=dict)

    def copy(self) -> State:
        return State(self.num_tokens, {name: values.copy() for name, values in self.tensors.items()})


class Model:
    """A model: config as in our config.json, tensors float64 by the names of our model.safetensors."""

    def __init__(self, config: Config, tensors: Mapping[str, Array]) -> None:
        self.config = config
        self.tensors = tensors
        self.layers: Sequence[Config] = config["layers"]

    @classmethod
    def load(cls, directory: Path) -> Model:
        return cls(*read_model(directory))

    # ---- pieces, for any number of tokens ----------------------------------------------------------------------

    def _linear(self, x: Array, name: str) -> Array:
        y = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Array, name: str) -> Array:
        norm = self.config["norm"]
        if norm["type"] == "rms_norm":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm["eps"]) * self.tensors[f"{name}.weight"]
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm["eps"])
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def _add_mlp(self, r: Array, layer: int) -> Array:
        """r + mlp(norm2(r)); r where the model has no MLP."""
        mlp = self.config["mlp"]
        if mlp is None:
            return r
        x = self._norm(r, f"layers.{layer}.norm2")
        act = ACTIVATIONS[mlp["activation"]]
        h = self._linear(x, f"layers.{layer}.mlp.fc1")
        if mlp["gated"]:
            value, gate = h[..., : mlp["inner_size"]], h[..., mlp["inner_size"] :]
            h = value * act(gate)
        else:
            h = act(h)
        return r + self._linear(h, f"layers.{layer}.mlp.fc2")

    def _head(self, x: Array) -> Array:
        name = "embedding.weight" if self.config["tie_embeddings"] else "lm_head.weight"
        return x @ self.tensors[name].T

    def _heads(self, x: Array, layer: int) -> tuple[Array, Array, Array]:
        """q, k, v of an attention layer, (T, heads, size) each."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t = x.shape[0]
        if mixer["mixer"] in ("linear_attention", "prefix_linear_attention"):
            projections = (x @ self.tensors[f"{name}.proj_{part}.weight"].T for part in "qkv")
            q, k, v = (projected.reshape(t, mixer["num_heads"], -1) for projected in projections)
            return q, k, v
        h, h_kv = mixer["num_heads"], mixer["num_kv_heads"]
        qkv = self._linear(x, f"{name}.qkv_proj").reshape(t, h + 2 * h_kv, mixer["head_dim"])
        return qkv[:, :h], qkv[:, h : h + h_kv], qkv[:, h + h_kv :]

    # ---- the whole sequence at once ----------------------------------------------------------------------------

    def forward(self, tokens: Sequence[int] | Array, prompt: int | None = None) -> Trace:
        """Logits and intermediate values of one sequence that starts from nothing.

        prompt: how many of the tokens were its first prompt, in which a prefix lies; by default all.
        """
        self.prompt = len(tokens) if prompt is None else prompt
        r = self.tensors["embedding.weight"][np.asarray(tokens)]
        embed, mixer_out, block_out = r, [], []
        for layer, mixer in enumerate(self.layers):
            mix = getattr(self, f"_{mixer['mixer']}")
            mixed = self._linear(mix(self._norm(r, f"layers.{layer}.norm1"), layer), f"layers.{layer}.mixer.out_proj")
            r = r + mixed
            r = self._add_mlp(r, layer)
            mixer_out.append(mixed)
            block_out.append(r)
        final_norm = self._norm(r, "final_norm")
        return Trace(embed, np.array(mixer_out), np.array(block_out), final_norm, self._head(final_norm))

    def _gated_conv(self, x: Array, layer: int) -> Array:
        u = self._linear(x, f"layers.{layer}.mixer.in_proj")
        e, taps = self.layers[layer]["inner_size"], self.tensors[f"layers.{layer}.mixer.conv.weight"]
        padded = np.concatenate([np.zeros((taps.shape[1] - 1, e)), u[:, :e]])
        conv = sum(taps[:, j] * padded[j : j + len(x)] for j in range(taps.shape[1]))
        return ACTIVATIONS["silu"](conv) * u[:, e:]

    def _linear_attention(self, x: Array, layer: int) -> Array:
        q, k, v = self._heads(x, layer)
        p = np.tril(taylor(np.einsum("thf,shf->hts", q, k) / math.sqrt(q.shape[-1])))
        y = np.einsum("hts,shd->thd", p, v)
        return (y / (p.sum(-1).T[..., None] + self.layers[layer]["eps"])).reshape(len(x), -1)

    def _prefix(self, x: Array, layer: int) -> tuple[Array, Array]:
        """The prefix's own keys and values, (M, heads, size) each, of its tokens x."""
        name, heads = f"layers.{layer}.mixer", self.layers[layer]["num_heads"]
        k, v = (x @ self.tensors[f"{name}.{part}.weight"].T for part in ("proj_k_enc", "proj_v_enc"))
        return k.reshape(len(x), heads, -1), v.reshape(len(x), heads, -1)

    def _prefix_linear_attention(self, x: Array, layer: int) -> Array:
        """y_t = (Σ_{j≤t} p_tj v_j + Σ_{m<M} p'_tm v'_m) / (Σ_{j≤t} p_tj + Σ_{m<M} p'_tm + eps)."""
        q, k, v = self._heads(x, layer)
        k_enc, v_enc = self._prefix(x[: min(self.layers[layer]["enc_length"], self.prompt)], layer)
        p = np.tril(taylor(np.einsum("thf,shf->hts", q, k) / math.sqrt(q.shape[-1])))
        p_enc = taylor(np.einsum("thf,mhf->htm", q, k_enc) / math.sqrt(q.shape[-1]))
        y = np.einsum("hts,shd->thd", p, v) + np.einsum("htm,mhd->thd", p_enc, v_enc)
        total = (p.sum(-1) + p_enc.sum(-1)).T[..., None]
        return (y / (total + self.layers[layer]["eps"])).reshape(len(x), -1)

    def _full_attention(self, x: Array, layer: int) -> Array:
        return self._sliding_window(x, layer, window=len(x))

    def _sliding_window(self, x: Array, layer: int, window: int | None = None) -> Array:
        q, k, v = self._heads(x, layer)
        mixer, positions = self.layers[layer], np.arange(len(x))
        group = mixer["num_heads"] // mixer["num_kv_heads"]
        q, k = rotate(q, positions, mixer), rotate(k, positions, mixer)
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        age = positions[:, None] - positions
        window = mixer["window"] if window is None else window
        scores = np.where((age >= 0) & (age < window), np.einsum("thd,shd->hts", q, k), -np.inf)
        return np.einsum("hts,shd->thd", softmax(scores * mixer["scale"]), v).reshape(len(x), -1)

    def _scan_inputs(self, u: Array, layer: int, before: Array) -> tuple[Array, ...]:
        """Of tokens u (T, d) after the last K − 1 values of x: x (T, e) after the convolution, z and Δ (T, e), B and C
        (T, N), A (N, e), and x before the convolution with what came before, (K − 1 + T, e)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        e, r, n = mixer["inner_size"], mixer["dt_rank"], mixer["state_size"]
        xz = self._linear(u, f"{name}.in_proj")
        taps = self.tensors[f"{name}.conv.weight"]
        padded = np.concatenate([before, xz[:, :e]])
        conv = sum(taps[:, j] * padded[j : j + len(u)] for j in range(taps.shape[1]))
        x = ACTIVATIONS["silu"](conv + self.tensors.get(f"{name}.conv.bias", 0))
        projected = self._linear(x, f"{name}.x_proj")
        delta = np.logaddexp(0, self._linear(projected[:, :r], f"{name}.dt_proj"))
        a = -np.exp(self.tensors[f"{name}.A_log"]).T
        return x, xz[:, e:], delta, projected[:, r : r + n], projected[:, r + n :], a, padded

    def _selective_scan(self, u: Array, layer: int) -> Array:
        """y_t = Σ_{j≤t} Σ_n C_t[n] exp(A[n] Σ_{j<i≤t} Δ_i) Δ_j B_j[n] x_j + D x_t, times SiLU(z_t)."""
        mixer = self.layers[layer]
        before = np.zeros((mixer["kernel_size"] - 1, mixer["inner_size"]))
        x, z, delta, b, c, a, _ = self._scan_inputs(u, layer, before)
        time = delta.cumsum(0)
        y = self.tensors[f"layers.{layer}.mixer.D"] * x
        causal = np.tri(len(u), dtype=bool)[..., None]
        for n in range(len(a)):
            decay = np.exp(np.where(causal, (time[:, None] - time) * a[n], -np.inf))  # (T, T, e)
            y = y + np.einsum("t,tje,j,je->te", c[:, n], decay, b[:, n], delta * x, optimize=True)
        return y * ACTIVATIONS["silu"](z)

    def _delta_inputs(self, x: Array, layer: int, before: Array) -> tuple[Array, ...]:
        """Of tokens x (T, d) after the last K − 1 rows of W_qkv u: q, k (T, H, key_dim), v (T, H, head_dim), β and
        log α (T, H), the gate (T, H, head_dim), and the rows of W_qkv u with what came before."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t, h, dk = len(x), mixer["num_heads"], mixer["key_dim"]
        padded = np.concatenate([before, self._linear(x, f"{name}.qkv_proj")])
        taps = self.tensors[f"{name}.conv.weight"]
        conv = ACTIVATIONS["silu"](sum(taps[:, j] * padded[j : j + t] for j in range(taps.shape[1])))
        q, k, v = (part.reshape(t, h, -1) for part in np.split(conv, [h * dk, 2 * h * dk], axis=-1))
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
        beta = ACTIVATIONS["sigmoid"](self._linear(x, f"{name}.b_proj"))
        log_alpha, gate = np.zeros((t, h)), np.ones_like(v)
        if mixer["decay"]:
            step = np.logaddexp(0, self._linear(x, f"{name}.a_proj") + self.tensors[f"{name}.dt_bias"])
            log_alpha = -np.exp(self.tensors[f"{name}.A_log"]) * step
        if mixer["output_gate"]:
            gate = ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")).reshape(v.shape)
        return q / math.sqrt(dk), k, v, beta, log_alpha, gate, padded

    def _delta_output(self, y: Array, gate: Array, layer: int) -> Array:
        """The norm of each head, and the gate: (T, H · head_dim) of y (T, H, head_dim)."""
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + self.layers[layer]["eps"])
        return (y * self.tensors[f"layers.{layer}.mixer.norm.weight"] * gate).reshape(len(y), -1)

    def _gated_delta_net(self, x: Array, layer: int) -> Array:
        """u_t + β_t Σ_{j<t} g_tj (k_t·k_j) u_j = β_t v_t, y_t = Σ_{j≤t} g_tj (q_t·k_j) u_j, g_tj = Π_{j<i≤t} α_i."""
        mixer, t = self.layers[layer], len(x)
        before = np.zeros((mixer["kernel_size"] - 1, len(self.tensors[f"layers.{layer}.mixer.conv.weight"])))
        q, k, v, beta, log_alpha, gate, _ = self._delta_inputs(x, layer, before)
        time = log_alpha.cumsum(0).T  # (H, T)
        decay = np.exp(np.where(np.tri(t, dtype=bool), time[:, :, None] - time[:, None], -np.inf))
        products = np.einsum("thd,shd->hts", k, k) * decay * beta.T[..., None]
        u = np.linalg.solve(np.eye(t) + np.tril(products, -1), (beta[..., None] * v).transpose(1, 0, 2))
        y = np.einsum("hts,hsd->thd", np.einsum("thd,shd->hts", q, k) * decay, u)
        return self._delta_output(y, gate, layer)

    def _rwkv4_inputs(self, x: Array, layer: int, before: Array) -> tuple[Array, Array, Array]:
        """k, v and r (T, e) of tokens x (T, d) after the token before (1, d)."""
        name, shifted = f"layers.{layer}.mixer", np.concatenate([before, x])[:-1]

        def project(part: str) -> Array:
            mix = self.tensors[f"{name}.time_mix_{part}"]
            return self._linear(mix * x + (1 - mix) * shifted, f"{name}.{part}_proj")

        return project("k"), project("v"), project("r")

    def _rwkv4(self, x: Array, layer: int) -> Array:
        """All weights of a channel, (T, T): e^((t−1−j) w + k_j) for j < t, and e^(time_first + k_t)."""
        name, t = f"layers.{layer}.mixer", len(x)
        k, v, r = self._rwkv4_inputs(x, layer, np.zeros((1, x.shape[1])))
        age = (np.arange(t)[:, None] - np.arange(t) - 1)[..., None]
        past = -np.exp(self.tensors[f"{name}.time_decay"]) * age
        exponents = k + np.where(age >= 0, past, np.where(age == -1, self.tensors[f"{name}.time_first"], -np.inf))
        weights = np.exp(exponents - exponents.max(1, keepdims=True))
        return sigmoid(r) * np.einsum("tje,je->te", weights, v) / weights.sum(1)

    def _h3_inputs(self, x: Array, layer: int, before: Array) -> tuple[Array, Array, Array, Array]:
        """q, k, v (T, H, head_dim) of tokens x (T, d), k after its convolution, and k before it with the last K − 1
        values of the tokens before."""
        name, h = f"layers.{layer}.mixer", self.layers[layer]["num_heads"]
        q, k, v = np.split(self._linear(x, f"{name}.qkv_proj"), 3, axis=-1)
        b, c = self.tensors[f"{name}.shift_B"], self.tensors[f"{name}.shift_C"]
        padded, taps = np.concatenate([before, k]), b.shape[1]
        k = self.tensors[f"{name}.shift_D"] * k
        for i in range(taps):  # tokens before
            k = k + (b[:, : taps - i] * c[:, i:]).sum(1) * padded[taps - 1 - i :][: len(x)]
        q, k, v = (part.reshape(len(x), h, -1) for part in (q, k, v))
        return q, k, v, padded

    def _h3_modes(self, layer: int) -> tuple[Array, Array]:
        """What the modes (H, M) decay by, and what they count, complex."""
        name = f"layers.{layer}.mixer"
        step = np.exp(self.tensors[f"{name}.log_dt"])[:, None]
        z = step / 2 * (-np.exp(self.tensors[f"{name}.A_log"]) + 1j * self.tensors[f"{name}.A_imag"])
        b, c = (self.tensors[f"{name}.{part}"] @ [1, 1j] for part in "BC")
        return (1 + z) / (1 - z), c * b * step / (1 - z)

    def _h3(self, x: Array, layer: int) -> Array:
        """S_t = Σ_{j≤t} 2 Re Σ_m w a^(t−j) k_j v_jᵀ + D k_t v_tᵀ."""
        mixer, t = self.layers[layer], len(x)
        before = np.zeros((mixer["kernel_size"] - 1, mixer["num_heads"] * mixer["head_dim"]))
        q, k, v, _ = self._h3_inputs(x, layer, before)
        a, w = self._h3_modes(layer)
        kernel = 2 * (w * a ** np.arange(t)[:, None, None]).real.sum(-1)  # (T, H)
        kernel[0] += self.tensors[f"layers.{layer}.mixer.D"]
        age = np.arange(t)[:, None] - np.arange(t)
        weights = np.where(age[..., None] >= 0, kernel[np.maximum(age, 0)], 0)  # (T, T, H)
        return np.einsum("thi,tsh,shi,shj->thj", q, weights, k, v, optimize=True).reshape(t, -1)

    def _hyena_inputs(self, x: Array, layer: int, before: Array) -> tuple[Array, Array, Array]:
        """v ⊙ x₁ and x₂ (T, e) of tokens x (T, d), and W_in x + b with the last K − 1 rows of the tokens before."""
        name = f"layers.{layer}.mixer"
        padded, taps = np.concatenate([before, self._linear(x, f"{name}.in_proj")]), self.tensors[f"{name}.conv.weight"]
        conv = sum(taps[:, j] * padded[j : j + len(x)] for j in range(taps.shape[1]))
        x1, x2, v = np.split(conv + self.tensors[f"{name}.conv.bias"], 3, axis=-1)
        return v * x1, x2, padded

    def _hyena_filter(self, layer: int, num_taps: int) -> Array:
        """(num_taps, e)."""
        w = {part: self.tensors[f"layers.{layer}.mixer.filter.{part}"] for part in ("w1", "w2", "w3", "w4", "freq")}
        n, length = np.arange(num_taps), self.layers[layer]["max_length"]
        time, angle = n / max(1, length - 1), 1e-4 * 2 * np.pi * n / length
        x = np.stack([time, np.cos(angle), -np.sin(angle)], -1)
        for i in (1, 2, 3):
            x = np.sin(w["freq"] * (x @ w[f"w{i}"].T + self.tensors[f"layers.{layer}.mixer.filter.b{i}"]))
        decay = np.abs(np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, self.layers[layer]["inner_size"]))
        return (x @ w["w4"].T) * np.exp(-time[:, None] * decay)

    def _hyena(self, x: Array, layer: int) -> Array:
        mixer, t = self.layers[layer], len(x)
        g, x2, _ = self._hyena_inputs(x, layer, np.zeros((mixer["kernel_size"] - 1, 3 * mixer["inner_size"])))
        h, y = self._hyena_filter(layer, t), self.tensors[f"layers.{layer}.mixer.filter.D"] * g
        for i in range(t):
            y[i:] += h[i] * g[: t - i]
        return y * x2

    def _mamba2_inputs(self, u: Array, layer: int, before: Array) -> tuple[Array, ...]:
        """Of tokens u (T, d) after the last K − 1 rows of W_xbc u: x (T, H, head_dim), B and C of each head (T, H, N),
        Δ and log α (T, H), z (T, e), and the rows of W_xbc u with what came before."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t, h, groups, n = len(u), mixer["num_heads"], mixer["num_groups"], mixer["state_size"]
        padded = np.concatenate([before, self._linear(u, f"{name}.xbc_proj")])
        taps = self.tensors[f"{name}.conv.weight"]
        conv = sum(taps[:, j] * padded[j : j + t] for j in range(taps.shape[1]))
        xbc = ACTIVATIONS["silu"](conv + self.tensors.get(f"{name}.conv.bias", 0))
        e = h * mixer["head_dim"]
        b, c = (part.reshape(t, groups, n).repeat(h // groups, axis=1) for part in np.split(xbc[:, e:], 2, axis=-1))
        delta = np.logaddexp(0, self._linear(u, f"{name}.dt_proj") + self.tensors[f"{name}.dt_bias"])
        log_alpha = -np.exp(self.tensors[f"{name}.A_log"]) * delta
        return xbc[:, :e].reshape(t, h, -1), b, c, delta, log_alpha, self._linear(u, f"{name}.z_proj"), padded

    def _mamba2_output(self, y: Array, x: Array, z: Array, layer: int) -> Array:
        """The norm of each group after the gate: (T, e) of Sᵀ C and x (T, H, head_dim)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        y = (y + self.tensors[f"{name}.D"][:, None] * x).reshape(z.shape) * ACTIVATIONS["silu"](z)
        y = y.reshape(len(y), mixer["num_groups"], -1)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + mixer["eps"])
        return y.reshape(z.shape) * self.tensors[f"{name}.norm.weight"]

    def _mamba2(self, u: Array, layer: int) -> Array:
        """Sᵀ C at t is Σ_{j≤t} g_tj (C_t·B_j) Δ_j x_j, g_tj = Π_{j<i≤t} α_i."""
        mixer, t = self.layers[layer], len(u)
        before = np.zeros((mixer["kernel_size"] - 1, len(self.tensors[f"layers.{layer}.mixer.conv.weight"])))
        x, b, c, delta, log_alpha, z, _ = self._mamba2_inputs(u, layer, before)
        time = log_alpha.cumsum(0).T  # (H, T)
        decay = np.exp(np.where(np.tri(t, dtype=bool), time[:, :, None] - time[:, None], -np.inf))
        y = np.einsum("hts,shd->thd", np.einsum("thn,shn->hts", c, b) * decay, delta[..., None] * x)
        return self._mamba2_output(y, x, z, layer)

    def _gated_linear_inputs(self, x: Array, layer: int) -> tuple[Array, ...]:
        """Of tokens x (T, d): q, k and log α (T, H, key_dim), v and the gate (T, H, head_dim)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t, h, dk = len(x), mixer["num_heads"], mixer["key_dim"]
        qkv = np.split(self._linear(x, f"{name}.qkv_proj"), [h * dk, 2 * h * dk], axis=-1)
        q, k, v = (part.reshape(t, h, -1) for part in qkv)
        a = self._linear(x @ self.tensors[f"{name}.a_down_proj.weight"].T, f"{name}.a_up_proj").reshape(t, h, dk)
        gate = ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")).reshape(v.shape)
        return q / math.sqrt(dk), k, -np.logaddexp(0, -a) / mixer["gate_normalizer"], v, gate

    def _gated_linear_attention(self, x: Array, layer: int) -> Array:
        """Sᵀq at t is Σ_{j≤t} Σ_i q_t[i] g_tj[i] k_j[i] v_j, g_tj = Π_{j<s≤t} α_s."""
        q, k, log_alpha, v, gate = self._gated_linear_inputs(x, layer)
        time, causal = log_alpha.cumsum(0), np.tri(len(x), dtype=bool)[..., None]
        y = np.zeros_like(v)
        for h in range(v.shape[1]):
            decay = np.exp(np.where(causal, time[:, None, h] - time[None, :, h], -np.inf))  # (T, T, key_dim)
            y[:, h] = np.einsum("ti,tsi,si->ts", q[:, h], decay, k[:, h]) @ v[:, h]
        return self._delta_output(y, gate, layer)

    def _rwkv7_inputs(self, x: Array, layer: int, before: Array) -> tuple[Array, ...]:
        """Of tokens x (T, d) after the token `before` (d): r, w, k, v, κ and κ ⊙ a, (T, H, head_dim), and the gate."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        change = np.concatenate([before[None], x[:-1]]) - x
        r, w, k, v, a, g = (x + change * self.tensors[f"{name}.mix_{part}"] for part in "rwkvag")
        r, k, v = (self._linear(m, f"{name}.{part}_proj") for part, m in (("r", r), ("k", k), ("v", v)))
        w, a, g = (
            self._linear(act(self._linear(m, f"{name}.{part}_down_proj")), f"{name}.{part}_up_proj")
            for part, m, act in (("w", w, np.tanh), ("a", a, lambda y: y), ("g", g, sigmoid))
        )
        w, a = np.exp(-np.exp(-0.5) * sigmoid(w)), sigmoid(a)
        kappa = k * self.tensors[f"{name}.k_k"]
        k = k * (1 + (a - 1) * self.tensors[f"{name}.k_a"])
        r, w, k, v, kappa, a = (part.reshape(len(x), mixer["num_heads"], -1) for part in (r, w, k, v, kappa, a))
        kappa = kappa / np.maximum(np.sqrt((kappa**2).sum(-1, keepdims=True)), 1e-12)
        return r, w, k, v, kappa, kappa * a, g

    def _rwkv7_output(self, y: Array, r: Array, k: Array, v: Array, g: Array, layer: int) -> Array:
        """The norm of each head, what a token adds to its own result, and the gate: (T, e) of y (T, H, head_dim)."""
        name = f"layers.{layer}.mixer"
        y = y - y.mean(-1, keepdims=True)
        y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + self.layers[layer]["eps"])).reshape(g.shape)
        y = y * self.tensors[f"{name}.norm.weight"] + self.tensors[f"{name}.norm.bias"]
        bonus = (r * k * self.tensors[f"{name}.r_k"].reshape(r.shape[1:])).sum(-1, keepdims=True) * v
        return (y + bonus.reshape(g.shape)) * g

    def _rwkv7(self, x: Array, layer: int) -> Array:
        """Sᵀr at t is Σ_{j≤t} (A_t … A_{j+1} k_j)·r_t v_j, A = diag(w) − (κ ⊙ a) κᵀ."""
        r, w, k, v, kappa, removed, g = self._rwkv7_inputs(x, layer, np.zeros(x.shape[-1]))
        y, carried = np.zeros_like(v), np.zeros((0, *k.shape[1:]))  # A_t … A_{j+1} k_j
        for t in range(len(x)):
            seen = (carried * kappa[t]).sum(-1, keepdims=True)
            carried = np.concatenate([carried * w[t] - seen * removed[t], k[t : t + 1]])
            y[t] = np.einsum("jh,jhd->hd", (carried * r[t]).sum(-1), v[: t + 1])
        return self._rwkv7_output(y, r, k, v, g, layer)

    # ---- token by token ----------------------------------------------------------------------------------------

    def fresh_state(self) -> State:
        """The state of a sequence that has seen nothing."""
        state = State()
        for i, mixer in enumerate(self.layers):
            if mixer["mixer"] == "gated_conv":
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, mixer["inner_size"]))
            elif mixer["mixer"] in ("linear_attention", "prefix_linear_attention"):
                f = mixer["feature_dim"]
                shape = (mixer["num_heads"], 1 + f + f * (f + 1) // 2, mixer["head_dim"] + 1)
                state.tensors[f"layers.{i}.taylor"] = np.zeros(shape)
            elif mixer["mixer"] == "selective_scan":
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, mixer["inner_size"]))
                state.tensors[f"layers.{i}.scan"] = np.zeros((mixer["state_size"], mixer["inner_size"]))
            elif mixer["mixer"] == "gated_delta_net":
                h, dk, dv = mixer["num_heads"], mixer["key_dim"], mixer["head_dim"]
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, h * (2 * dk + dv)))
                state.tensors[f"layers.{i}.delta"] = np.zeros((h, dk, dv))
            elif mixer["mixer"] == "rwkv4":
                state.tensors[f"layers.{i}.shift"] = np.zeros(mixer["hidden_size"])
                state.tensors[f"layers.{i}.wkv"] = np.zeros((3, mixer["inner_size"]))
            elif mixer["mixer"] == "h3":
                h, size, modes = mixer["num_heads"], mixer["head_dim"], mixer["num_modes"]
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, h * size))
                state.tensors[f"layers.{i}.modes"] = np.zeros((h, size, size, 2, modes))
            elif mixer["mixer"] == "hyena":
                e = mixer["inner_size"]
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, 3 * e))
                state.tensors[f"layers.{i}.products"] = np.zeros((mixer["max_length"], e))
            elif mixer["mixer"] == "mamba2":
                h, p, n = mixer["num_heads"], mixer["head_dim"], mixer["state_size"]
                channels = h * p + 2 * mixer["num_groups"] * n
                state.tensors[f"layers.{i}.conv"] = np.zeros((mixer["kernel_size"] - 1, channels))
                state.tensors[f"layers.{i}.matrix"] = np.zeros((h, n, p))
            elif mixer["mixer"] == "rwkv7":
                h, size = mixer["num_heads"], mixer["head_dim"]
                state.tensors[f"layers.{i}.shift"] = np.zeros(mixer["hidden_size"])
                state.tensors[f"layers.{i}.matrix"] = np.zeros((h, size, size))
            elif mixer["mixer"] == "gated_linear_attention":
                shape = (mixer["num_heads"], mixer["key_dim"], mixer["head_dim"])
                state.tensors[f"layers.{i}.matrix"] = np.zeros(shape)
            else:
                assert mixer["mixer"] in ("sliding_window", "full_attention"), f"{mixer['mixer']} has no state here"
                for name in ("keys", "values"):
                    state.tensors[f"layers.{i}.{name}"] = np.zeros((0, mixer["num_kv_heads"], mixer["head_dim"]))
        return state

    def step(self, state: State, token: int) -> Array:
        """Feeds one token to `state`, which it advances. Returns logits (padded_vocab_size)."""
        r = self.tensors["embedding.weight"][[token]]
        for layer, mixer in enumerate(self.layers):
            step = getattr(self, f"_{mixer['mixer']}_step")
            mixed = step(self._norm(r, f"layers.{layer}.norm1"), layer, state)
            r = r + self._linear(mixed, f"layers.{layer}.mixer.out_proj")
            r = self._add_mlp(r, layer)
        state.num_tokens += 1
        return self._head(self._norm(r, "final_norm"))[0]

    def decode(self, tokens: Sequence[int] | Array, state: State | None = None) -> tuple[Array, State]:
        """step() over all tokens: logits (T, padded_vocab_size), and the state after them."""
        state = self.fresh_state() if state is None else state
        return np.array([self.step(state, int(token)) for token in tokens]), state

    def _gated_conv_step(self, x: Array, layer: int, state: State) -> Array:
        u = self._linear(x, f"layers.{layer}.mixer.in_proj")
        e, taps = self.layers[layer]["inner_size"], self.tensors[f"layers.{layer}.mixer.conv.weight"]
        inputs = np.concatenate([state.tensors[f"layers.{layer}.conv"], u[:, :e]])  # (K, e)
        state.tensors[f"layers.{layer}.conv"] = inputs[1:]
        return ACTIVATIONS["silu"]((taps.T * inputs).sum(0, keepdims=True)) * u[:, e:]

    def _linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, v = (part[0] for part in self._heads(x, layer))  # (H, f), (H, f), (H, head_dim)
        extended = np.concatenate([v, np.ones((len(v), 1))], axis=-1)
        s = state.tensors[f"layers.{layer}.taylor"]
        s = s + taylor_features(k)[:, :, None] * extended[:, None, :]
        state.tensors[f"layers.{layer}.taylor"] = s
        y = np.einsum("hp,hpd->hd", taylor_features(q), s)
        return (y[:, :-1] / (y[:, -1:] + self.layers[layer]["eps"])).reshape(1, -1)

    def _prefix_linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        """The first token is a prompt of one, and its own prefix."""
        if state.num_tokens == 0:
            k, v = (part[0] for part in self._prefix(x, layer))
            extended = np.concatenate([v, np.ones((len(v), 1))], axis=-1)
            name = f"layers.{layer}.taylor"
            state.tensors[name] = state.tensors[name] + taylor_features(k)[:, :, None] * extended[:, None, :]
        return self._linear_attention_step(x, layer, state)

    def _full_attention_step(self, x: Array, layer: int, state: State) -> Array:
        return self._sliding_window_step(x, layer, state, window=state.num_tokens + 1)

    def _sliding_window_step(self, x: Array, layer: int, state: State, window: int | None = None) -> Array:
        q, k, v = self._heads(x, layer)
        mixer, position = self.layers[layer], np.array([state.num_tokens])
        q, k = rotate(q, position, mixer), rotate(k, position, mixer)
        window = mixer["window"] if window is None else window
        for name, new in (("keys", k), ("values", v)):
            kept = np.concatenate([state.tensors[f"layers.{layer}.{name}"], new])[-window:]
            state.tensors[f"layers.{layer}.{name}"] = kept
        group = mixer["num_heads"] // mixer["num_kv_heads"]
        keys = np.repeat(state.tensors[f"layers.{layer}.keys"], group, axis=1)
        values = np.repeat(state.tensors[f"layers.{layer}.values"], group, axis=1)
        scores = np.einsum("hd,shd->hs", q[0], keys) * mixer["scale"]
        return np.einsum("hs,shd->hd", softmax(scores), values).reshape(1, -1)

    def _selective_scan_step(self, u: Array, layer: int, state: State) -> Array:
        inputs = self._scan_inputs(u, layer, state.tensors[f"layers.{layer}.conv"])
        x, z, delta, b, c = (part[0] for part in inputs[:5])
        a, padded = inputs[5:]
        h = np.exp(delta * a) * state.tensors[f"layers.{layer}.scan"] + b[:, None] * (delta * x)
        state.tensors[f"layers.{layer}.conv"], state.tensors[f"layers.{layer}.scan"] = padded[1:], h
        y = c @ h + self.tensors[f"layers.{layer}.mixer.D"] * x
        return (y * ACTIVATIONS["silu"](z))[None]

    def _gated_delta_net_step(self, x: Array, layer: int, state: State) -> Array:
        inputs = self._delta_inputs(x, layer, state.tensors[f"layers.{layer}.conv"])
        q, k, v, beta, log_alpha, gate = (part[0] for part in inputs[:6])
        s = np.exp(log_alpha)[:, None, None] * state.tensors[f"layers.{layer}.delta"]
        change = beta[:, None] * (v - np.einsum("hkd,hk->hd", s, k))
        s = s + k[:, :, None] * change[:, None, :]
        state.tensors[f"layers.{layer}.conv"], state.tensors[f"layers.{layer}.delta"] = inputs[6][1:], s
        return self._delta_output(np.einsum("hkd,hk->hd", s, q)[None], gate[None], layer)

    def _rwkv4_step(self, x: Array, layer: int, state: State) -> Array:
        """The sums p and q are those of the recurrence over e^o."""
        name = f"layers.{layer}"
        k, v, r = (part[0] for part in self._rwkv4_inputs(x, layer, state.tensors[f"{name}.shift"][None]))
        p, q, o = state.tensors[f"{name}.wkv"]
        o = np.where(q == 0, -np.inf, o)  # nothing seen yet
        own = self.tensors[f"{name}.mixer.time_first"] + k
        most = np.maximum(o, own)
        y = (np.exp(o - most) * p + np.exp(own - most) * v) / (np.exp(o - most) * q + np.exp(own - most))
        o = o - np.exp(self.tensors[f"{name}.mixer.time_decay"])
        most = np.maximum(o, k)
        kept, added = np.exp(o - most), np.exp(k - most)
        state.tensors[f"{name}.shift"] = x[0]
        state.tensors[f"{name}.wkv"] = np.stack([kept * p + added * v, kept * q + added, most])
        return (sigmoid(r) * y)[None]

    def _h3_step(self, x: Array, layer: int, state: State) -> Array:
        name = f"layers.{layer}"
        q, k, v, padded = self._h3_inputs(x, layer, state.tensors[f"{name}.conv"])
        a, w = (part[:, None, None] for part in self._h3_modes(layer))
        kv = k[0][:, :, None] * v[0][:, None]  # (H, size of k, size of v)
        before = state.tensors[f"{name}.modes"]
        modes = a * (before[..., 0, :] + 1j * before[..., 1, :]) + kv[..., None]
        s = 2 * (w * modes).real.sum(-1) + self.tensors[f"{name}.mixer.D"][:, None, None] * kv
        state.tensors[f"{name}.conv"], state.tensors[f"{name}.modes"] = (
            padded[1:],
            np.stack([modes.real, modes.imag], -2),
        )
        return np.einsum("hi,hij->hj", q[0], s).reshape(1, -1)

    def _hyena_step(self, x: Array, layer: int, state: State) -> Array:
        name, seen = f"layers.{layer}", state.num_tokens
        g, x2, padded = self._hyena_inputs(x, layer, state.tensors[f"{name}.conv"])
        state.tensors[f"{name}.conv"] = padded[1:]
        products = state.tensors[f"{name}.products"] = state.tensors[f"{name}.products"].copy()
        products[seen] = g[0]
        h = self._hyena_filter(layer, seen + 1)
        y = (h[::-1] * products[: seen + 1]).sum(0) + self.tensors[f"{name}.mixer.filter.D"] * g
        return y * x2

    def _mamba2_step(self, u: Array, layer: int, state: State) -> Array:
        inputs = self._mamba2_inputs(u, layer, state.tensors[f"layers.{layer}.conv"])
        x, b, c, delta, log_alpha = (part[0] for part in inputs[:5])
        s = np.exp(log_alpha)[:, None, None] * state.tensors[f"layers.{layer}.matrix"]
        s = s + b[:, :, None] * (delta[:, None] * x)[:, None]
        state.tensors[f"layers.{layer}.conv"], state.tensors[f"layers.{layer}.matrix"] = inputs[6][1:], s
        return self._mamba2_output(np.einsum("hnd,hn->hd", s, c)[None], x[None], inputs[5], layer)

    def _gated_linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, log_alpha, v, gate = (part[0] for part in self._gated_linear_inputs(x, layer))
        s = np.exp(log_alpha)[..., None] * state.tensors[f"layers.{layer}.matrix"] + k[:, :, None] * v[:, None]
        state.tensors[f"layers.{layer}.matrix"] = s
        return self._delta_output(np.einsum("hkd,hk->hd", s, q)[None], gate[None], layer)

    def _rwkv7_step(self, x: Array, layer: int, state: State) -> Array:
        shift, matrix = f"layers.{layer}.shift", f"layers.{layer}.matrix"
        inputs = self._rwkv7_inputs(x, layer, state.tensors[shift])
        r, w, k, v, kappa, removed = (part[0] for part in inputs[:6])
        s = state.tensors[matrix]
        seen = np.einsum("hkd,hk->hd", s, kappa)
        s = w[..., None] * s - removed[..., None] * seen[:, None] + k[..., None] * v[:, None]
        state.tensors[shift], state.tensors[matrix] = x[0], s
        y = np.einsum("hkd,hk->hd", s, r)
        return self._rwkv7_output(y[None], r[None], k[None], v[None], inputs[6], layer)
