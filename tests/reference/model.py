"""The forward pass of docs/model-format.md in NumPy float64, twice: in parallel and step by step.

With bfloat16 as its rounding it is a plain bfloat16 evaluation: weights and activations are bfloat16, every operation
rounds its result and sums in float32, as PyTorch does; only the residual stream, the norms' insides and, as in the
authors' kernels, the recurrences' are wider. Arrays are float32 then and hold bfloat16 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.files import read_model

Array = np.ndarray[Any, Any]
Config = Mapping[str, Any]
Rounding = Callable[[Array], Array]

RECURRENCES = ("selective_scan", "gated_delta_net", "rwkv4", "h3", "mamba2", "gated_linear_attention", "rwkv7")
"""Kernels compute these token by token."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def exact(x: Array) -> Array:
    return x


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


def taylor(s: Array, round: Rounding = exact) -> Array:
    return round(round(1 + s) + round(round(s * s) / 2))


def taylor_features(x: Array) -> Array:
    """φ with φ(q)·φ(k) = taylor(q·k/√f). x (…, f) → (…, 1 + f + f(f+1)/2): [1, x_i / f^¼, x_i x_j / √f (i ≤ j)], the
    squares (i = j) over √2 more."""
    f = x.shape[-1]
    rows, cols = np.triu_indices(f)
    pairs = x[..., rows] * x[..., cols] / math.sqrt(f) / np.where(rows == cols, math.sqrt(2), 1)
    return np.concatenate([np.ones((*x.shape[:-1], 1)), x / f**0.25, pairs], axis=-1)


def rotate(x: Array, positions: Array, mixer: Config, round: Rounding = exact) -> Array:
    """Rotary embedding of x (T, heads, head_dim) at positions (T): pair i turns by position · base^(-2i/R)."""
    dims = mixer["rotary_dim"]
    n = -(-dims // 2)
    if n == 0:
        return x
    angle = positions[:, None] * float(mixer["rotary_base"]) ** (-2 * np.arange(n) / dims)
    cos, sin = round(np.cos(angle))[:, None], round(np.sin(angle))[:, None]  # (T, 1, n)
    if mixer["rotary_interleaved"]:
        first, second = slice(0, 2 * n, 2), slice(1, 2 * n, 2)
    else:
        first, second = slice(0, n), slice(n, 2 * n)
    result = x.copy()
    result[..., first] = round(round(x[..., first] * cos) - round(x[..., second] * sin))
    result[..., second] = round(round(x[..., first] * sin) + round(x[..., second] * cos))
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

    def __init__(self, config: Config, tensors: Mapping[str, Array], round: Rounding = exact) -> None:
        self.config = config
        self.tensors = tensors
        self.round = round
        self.narrow = tensors if round is exact else {name: round(values) for name, values in tensors.items()}
        """Of `tensors`, a 16-bit model keeps in float32 what is used unrounded."""
        self.layers: Sequence[Config] = config["layers"]

    @classmethod
    def load(cls, directory: Path) -> Model:
        return cls(*read_model(directory))

    # ---- all tokens from nothing, or from a state ----------------------------------------------------------------

    def forward(self, tokens: Sequence[int] | Array, prompt: int | None = None) -> Trace:
        """Logits and intermediate values of one sequence that starts from nothing, in parallel.

        prompt: how many of the tokens were its first prompt, in which a prefix lies; by default all.
        """
        self.prompt = len(tokens) if prompt is None else prompt
        return self._run(tokens, self.fresh_state(), by_token=())

    def step(self, state: State, token: int) -> Array:
        """Feeds one token to `state`, which it advances. Returns logits (padded_vocab_size)."""
        return self._run([token], state, by_token=[mixer["mixer"] for mixer in self.layers]).logits[0]

    def decode(self, tokens: Sequence[int] | Array, state: State | None = None) -> tuple[Array, State]:
        """step() over all tokens: logits (T, padded_vocab_size), and the state after them."""
        state = self.fresh_state() if state is None else state
        return np.array([self.step(state, int(token)) for token in tokens]), state

    def prefill(self, tokens: Sequence[int] | Array) -> tuple[Array, State]:
        """As kernels read a prompt, of recurrences alone token by token: what decode() gives, up to rounding."""
        state, self.prompt = self.fresh_state(), len(tokens)
        return self._run(tokens, state, by_token=RECURRENCES).logits, state

    def _run(self, tokens: Sequence[int] | Array, state: State, by_token: Collection[str]) -> Trace:
        """Mixers in `by_token` go on from `state` and advance it, token by token. All others compute all tokens at
        once, and but for RECURRENCES advance the state, too."""
        r = self.narrow["embedding.weight"][np.asarray(tokens)]
        embed, mixer_out, block_out = r, [], []
        for layer, mixer in enumerate(self.layers):
            mix = getattr(self, f"_{mixer['mixer']}_step" if mixer["mixer"] in by_token else f"_{mixer['mixer']}")
            x = self._norm(r, f"layers.{layer}.norm1")
            mixed = self._linear(mix(x, layer, state), f"layers.{layer}.mixer.out_proj")
            r = r + mixed
            r = self._add_mlp(r, layer)
            mixer_out.append(mixed)
            block_out.append(r)
        state.num_tokens += len(tokens)
        final_norm = self._norm(r, "final_norm")
        head = self.narrow["embedding.weight" if self.config["tie_embeddings"] else "lm_head.weight"]
        return Trace(embed, np.array(mixer_out), np.array(block_out), final_norm, self.round(final_norm @ head.T))

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

    # ---- pieces, for any number of tokens ----------------------------------------------------------------------

    def _linear(self, x: Array, name: str) -> Array:
        y = x @ self.narrow[f"{name}.weight"].T
        bias = self.narrow.get(f"{name}.bias")
        return self.round(y if bias is None else y + bias)

    def _norm(self, x: Array, name: str) -> Array:
        norm, weight = self.config["norm"], self.narrow[f"{name}.weight"]
        if norm["type"] == "rms_norm":
            return self.round(x / np.sqrt((x**2).mean(-1, keepdims=True) + norm["eps"]) * weight)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm["eps"])
        return self.round(scaled * weight + self.narrow[f"{name}.bias"])

    def _add_mlp(self, r: Array, layer: int) -> Array:
        """r + mlp(norm2(r)); r where the model has no MLP."""
        mlp = self.config["mlp"]
        if mlp is None:
            return r
        h = self._linear(self._norm(r, f"layers.{layer}.norm2"), f"layers.{layer}.mlp.fc1")
        value, gate = (h[..., : mlp["inner_size"]], h[..., mlp["inner_size"] :]) if mlp["gated"] else (1, h)
        h = self.round(value * self.round(ACTIVATIONS[mlp["activation"]](gate)))
        return r + self._linear(h, f"layers.{layer}.mlp.fc2")

    def _heads(self, x: Array, layer: int) -> tuple[Array, Array, Array]:
        """q, k, v of an attention layer, (T, heads, size) each."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t = x.shape[0]
        if mixer["mixer"] in ("linear_attention", "prefix_linear_attention"):
            q, k, v = (self._linear(x, f"{name}.proj_{part}").reshape(t, mixer["num_heads"], -1) for part in "qkv")
            return q, k, v
        h, h_kv = mixer["num_heads"], mixer["num_kv_heads"]
        qkv = self._linear(x, f"{name}.qkv_proj").reshape(t, h + 2 * h_kv, mixer["head_dim"])
        return qkv[:, :h], qkv[:, h : h + h_kv], qkv[:, h + h_kv :]

    def _conv(self, u: Array, layer: int, state: State) -> Array:
        """The short convolution of u (T, channels), after the last K − 1 rows before them."""
        name, taps = f"layers.{layer}.conv", self.narrow[f"layers.{layer}.mixer.conv.weight"]
        padded = np.concatenate([state.tensors[name], u]).astype(u.dtype)
        state.tensors[name] = padded[len(u) :]
        conv = sum(taps[:, j] * padded[j : j + len(u)] for j in range(taps.shape[1]))
        return conv + self.narrow.get(f"layers.{layer}.mixer.conv.bias", 0)

    def _shifted(self, x: Array, layer: int, state: State) -> Array:
        """Of each token (T, d) the one before."""
        name = f"layers.{layer}.shift"
        shifted = np.concatenate([state.tensors[name][None], x[:-1]]).astype(x.dtype)
        state.tensors[name] = x[-1]
        return shifted

    # ---- gated convolution ---------------------------------------------------------------------------------------

    def _gated_conv(self, x: Array, layer: int, state: State) -> Array:
        u, e = self._linear(x, f"layers.{layer}.mixer.in_proj"), self.layers[layer]["inner_size"]
        conv = self.round(self._conv(u[:, :e], layer, state))
        return self.round(self.round(ACTIVATIONS["silu"](conv)) * u[:, e:])

    _gated_conv_step = _gated_conv

    # ---- Taylor linear attention ---------------------------------------------------------------------------------

    def _add_features(self, k: Array, v: Array, layer: int, state: State) -> None:
        """Of keys and values (H, T, size)."""
        extended = np.concatenate([v, np.ones((*v.shape[:2], 1))], axis=-1)
        seen = np.einsum("htp,htd->hpd", taylor_features(k.astype(np.float64)), extended)
        state.tensors[f"layers.{layer}.taylor"] = state.tensors[f"layers.{layer}.taylor"] + seen

    def _linear_attention(self, x: Array, layer: int, state: State, prefix: Array | None = None) -> Array:
        """y_t = (Σ_{j≤t} p_tj v_j + Σ_{m<M} p'_tm v'_m) / (Σ_{j≤t} p_tj + Σ_{m<M} p'_tm + eps), m over a prefix."""
        round = self.round
        q, k, v = (part.transpose(1, 0, 2) for part in self._heads(x, layer))  # (H, T, size)

        def weights(keys: Array) -> Array:
            return taylor(round(round(q @ keys.mT) / math.sqrt(q.shape[-1])), round)

        self._add_features(k, v, layer, state)
        p = np.tril(weights(k))
        if prefix is not None:
            k_enc, v_enc = self._prefix(prefix, layer)
            self._add_features(k_enc, v_enc, layer, state)
            p, v = np.concatenate([weights(k_enc), p], -1), np.concatenate([v_enc, v], 1)
        y = round(round(p @ v) / round(round(p.sum(-1, keepdims=True)) + self.layers[layer]["eps"]))
        return y.transpose(1, 0, 2).reshape(len(x), -1)

    def _linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, v = (part.transpose(1, 0, 2) for part in self._heads(x, layer))  # (H, 1, size)
        self._add_features(k, v, layer, state)
        y = np.einsum("hp,hpd->hd", taylor_features(q[:, 0]), state.tensors[f"layers.{layer}.taylor"])
        return (y[:, :-1] / (y[:, -1:] + self.layers[layer]["eps"])).reshape(1, -1)

    def _prefix(self, x: Array, layer: int) -> tuple[Array, Array]:
        """The prefix's own keys and values, (H, M, size) each, of its tokens x."""
        name, heads = f"layers.{layer}.mixer", self.layers[layer]["num_heads"]
        k, v = (self._linear(x, f"{name}.{part}") for part in ("proj_k_enc", "proj_v_enc"))
        return k.reshape(len(x), heads, -1).transpose(1, 0, 2), v.reshape(len(x), heads, -1).transpose(1, 0, 2)

    def _prefix_linear_attention(self, x: Array, layer: int, state: State) -> Array:
        return self._linear_attention(x, layer, state, x[: min(self.layers[layer]["enc_length"], self.prompt)])

    def _prefix_linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        """The first token is a prompt of one, and its own prefix."""
        if state.num_tokens == 0:
            self._add_features(*self._prefix(x, layer), layer, state)
        return self._linear_attention_step(x, layer, state)

    # ---- softmax attention ---------------------------------------------------------------------------------------

    def _rotated(self, x: Array, layer: int, state: State) -> tuple[Array, Array, Array, int]:
        """q, k, v (T, heads, head_dim), of which the state keeps those of the window, and the window."""
        q, k, v = self._heads(x, layer)
        mixer, positions = self.layers[layer], state.num_tokens + np.arange(len(x))
        q, k = rotate(q, positions, mixer, self.round), rotate(k, positions, mixer, self.round)
        window = mixer.get("window", state.num_tokens + len(x))
        for name, new in ((f"layers.{layer}.keys", k), (f"layers.{layer}.values", v)):
            state.tensors[name] = np.concatenate([state.tensors[name], new])[-window:]
        return q, k, v, window

    def _sliding_window(self, x: Array, layer: int, state: State) -> Array:
        *qkv, window = self._rotated(x, layer, state)
        mixer, round = self.layers[layer], self.round
        q, k, v = (np.repeat(y.transpose(1, 0, 2), mixer["num_heads"] // y.shape[1], axis=0) for y in qkv)
        age = np.arange(len(x))[:, None] - np.arange(len(x))
        scores = np.where((age >= 0) & (age < window), round(round(q @ k.mT) * mixer["scale"]), -np.inf)
        return round(round(softmax(scores)) @ v).transpose(1, 0, 2).reshape(len(x), -1)

    def _sliding_window_step(self, x: Array, layer: int, state: State) -> Array:
        q, mixer = self._rotated(x, layer, state)[0], self.layers[layer]
        group = mixer["num_heads"] // mixer["num_kv_heads"]
        keys = np.repeat(state.tensors[f"layers.{layer}.keys"], group, axis=1)
        values = np.repeat(state.tensors[f"layers.{layer}.values"], group, axis=1)
        scores = np.einsum("hd,shd->hs", q[0], keys) * mixer["scale"]
        return np.einsum("hs,shd->hd", softmax(scores), values).reshape(1, -1)

    _full_attention, _full_attention_step = _sliding_window, _sliding_window_step

    # ---- selective scan ------------------------------------------------------------------------------------------

    def _scan_inputs(self, u: Array, layer: int, state: State) -> tuple[Array, ...]:
        """Of tokens u (T, d): x (T, e) after the convolution, the gate and Δ (T, e), B and C (T, N), A (N, e)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        e, r, n = mixer["inner_size"], mixer["dt_rank"], mixer["state_size"]
        xz = self._linear(u, f"{name}.in_proj")
        x = self.round(ACTIVATIONS["silu"](self.round(self._conv(xz[:, :e], layer, state))))
        projected = self._linear(x, f"{name}.x_proj")
        step = self.round(projected[:, :r] @ self.narrow[f"{name}.dt_proj.weight"].T)
        delta = np.logaddexp(0, step + self.tensors[f"{name}.dt_proj.bias"])
        a, gate = -np.exp(self.tensors[f"{name}.A_log"]).T, self.round(ACTIVATIONS["silu"](xz[:, e:]))
        return x, gate, delta, projected[:, r : r + n], projected[:, r + n :], a

    def _selective_scan(self, u: Array, layer: int, state: State) -> Array:
        """y_t = Σ_{j≤t} Σ_n C_t[n] exp(A[n] Σ_{j<i≤t} Δ_i) Δ_j B_j[n] x_j + D x_t, times SiLU(z_t)."""
        x, gate, delta, b, c, a = self._scan_inputs(u, layer, state)
        time = delta.cumsum(0)
        y = self.tensors[f"layers.{layer}.mixer.D"] * x
        causal = np.tri(len(u), dtype=bool)[..., None]
        for n in range(len(a)):
            decay = np.exp(np.where(causal, (time[:, None] - time) * a[n], -np.inf))  # (T, T, e)
            y = y + np.einsum("t,tje,j,je->te", c[:, n], decay, b[:, n], delta * x, optimize=True)
        return self.round(self.round(y) * gate)

    def _selective_scan_step(self, u: Array, layer: int, state: State) -> Array:
        x, gate, delta, b, c, a = self._scan_inputs(u, layer, state)
        h, y = state.tensors[f"layers.{layer}.scan"], np.zeros(x.shape)
        for t in range(len(u)):
            h = np.exp(delta[t] * a) * h + b[t, :, None] * (delta[t] * x[t])
            y[t] = c[t] @ h + self.tensors[f"layers.{layer}.mixer.D"] * x[t]
        state.tensors[f"layers.{layer}.scan"] = h
        return self.round(self.round(y) * gate)

    # ---- Gated DeltaNet ------------------------------------------------------------------------------------------

    def _delta_inputs(self, x: Array, layer: int, state: State) -> tuple[Array, ...]:
        """Of tokens x (T, d): q, k (T, H, key_dim), v (T, H, head_dim), β and log α (T, H), the gate (shape of v)."""
        name, mixer, round = f"layers.{layer}.mixer", self.layers[layer], self.round
        t, h, dk = len(x), mixer["num_heads"], mixer["key_dim"]
        conv = round(ACTIVATIONS["silu"](round(self._conv(self._linear(x, f"{name}.qkv_proj"), layer, state))))
        q, k, v = (part.reshape(t, h, -1) for part in np.split(conv, [h * dk, 2 * h * dk], axis=-1))
        q, k = (round(part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6)) for part in (q, k))
        beta = round(ACTIVATIONS["sigmoid"](self._linear(x, f"{name}.b_proj")))
        log_alpha, gate = np.zeros((t, h)), np.ones_like(v)
        if mixer["decay"]:
            step = np.logaddexp(0, self._linear(x, f"{name}.a_proj") + self.tensors[f"{name}.dt_bias"])
            log_alpha = -np.exp(self.tensors[f"{name}.A_log"]) * step
        if mixer["output_gate"]:
            gate = ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")).reshape(v.shape)
        return q, k, v, beta, log_alpha, gate

    def _delta_output(self, y: Array, gate: Array, layer: int) -> Array:
        """The norm of each head, and the gate: (T, H · head_dim) of Sᵀq (T, H, head_dim)."""
        y = self.round(y / math.sqrt(self.layers[layer]["key_dim"]))
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + self.layers[layer]["eps"])
        return self.round(y * self.tensors[f"layers.{layer}.mixer.norm.weight"] * gate).reshape(len(y), -1)

    def _gated_delta_net(self, x: Array, layer: int, state: State) -> Array:
        """u_t + β_t Σ_{j<t} g_tj (k_t·k_j) u_j = β_t v_t, y_t = Σ_{j≤t} g_tj (q_t·k_j) u_j, g_tj = Π_{j<i≤t} α_i."""
        q, k, v, beta, log_alpha, gate = self._delta_inputs(x, layer, state)
        t, time = len(x), log_alpha.cumsum(0).T  # (H, T)
        decay = np.exp(np.where(np.tri(t, dtype=bool), time[:, :, None] - time[:, None], -np.inf))
        products = np.einsum("thd,shd->hts", k, k) * decay * beta.T[..., None]
        u = np.linalg.solve(np.eye(t) + np.tril(products, -1), (beta[..., None] * v).transpose(1, 0, 2))
        y = np.einsum("hts,hsd->thd", np.einsum("thd,shd->hts", q, k) * decay, u)
        return self._delta_output(y, gate, layer)

    def _gated_delta_net_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, v, beta, log_alpha, gate = self._delta_inputs(x, layer, state)
        alpha, s, y = np.exp(log_alpha), state.tensors[f"layers.{layer}.delta"], np.zeros(v.shape)
        for t in range(len(x)):
            s = alpha[t, :, None, None] * s
            change = beta[t, :, None] * (v[t] - np.einsum("hkd,hk->hd", s, k[t]))
            s = s + k[t, :, :, None] * change[:, None]
            y[t] = np.einsum("hkd,hk->hd", s, q[t])
        state.tensors[f"layers.{layer}.delta"] = s
        return self._delta_output(y, gate, layer)

    # ---- RWKV-4 --------------------------------------------------------------------------------------------------

    def _rwkv4_inputs(self, x: Array, layer: int, state: State) -> tuple[Array, ...]:
        """k, v and r (T, e) of tokens x (T, d), float64 in any case."""
        name, shifted = f"layers.{layer}.mixer", self._shifted(x, layer, state)
        mixes = ((part, self.tensors[f"{name}.time_mix_{part}"]) for part in "kvr")
        mixed = ((part, self.round(mix * x + (1 - mix) * shifted)) for part, mix in mixes)
        return tuple(self._linear(values, f"{name}.{part}_proj").astype(np.float64) for part, values in mixed)

    def _rwkv4(self, x: Array, layer: int, state: State) -> Array:
        """All weights of a channel, (T, T): e^((t−1−j) w + k_j) for j < t, and e^(time_first + k_t)."""
        name, t = f"layers.{layer}.mixer", len(x)
        k, v, r = self._rwkv4_inputs(x, layer, state)
        age = (np.arange(t)[:, None] - np.arange(t) - 1)[..., None]
        past = -np.exp(self.tensors[f"{name}.time_decay"]) * age
        exponents = k + np.where(age >= 0, past, np.where(age == -1, self.tensors[f"{name}.time_first"], -np.inf))
        weights = np.exp(exponents - exponents.max(1, keepdims=True))
        y = np.einsum("tje,je->te", weights, v) / weights.sum(1)
        return self.round(self.round(sigmoid(r)) * self.round(y))

    def _rwkv4_step(self, x: Array, layer: int, state: State) -> Array:
        """The sums p and q are those of the recurrence over e^o."""
        name = f"layers.{layer}"
        k, v, r = self._rwkv4_inputs(x, layer, state)
        p, q, o = state.tensors[f"{name}.wkv"]
        o, y = np.where(q == 0, -np.inf, o), np.zeros(k.shape)  # nothing seen yet
        for t in range(len(x)):
            own = self.tensors[f"{name}.mixer.time_first"] + k[t]
            most = np.maximum(o, own)
            past, present = np.exp(o - most), np.exp(own - most)
            y[t] = (past * p + present * v[t]) / (past * q + present)
            o = o - np.exp(self.tensors[f"{name}.mixer.time_decay"])
            most = np.maximum(o, k[t])
            kept, added = np.exp(o - most), np.exp(k[t] - most)
            p, q, o = kept * p + added * v[t], kept * q + added, most
        state.tensors[f"{name}.wkv"] = np.stack([p, q, o])
        return self.round(self.round(sigmoid(r)) * self.round(y))

    # ---- H3, as the authors' code float64 between the projections in any case ------------------------------------

    def _h3_inputs(self, x: Array, layer: int, state: State) -> tuple[Array, ...]:
        """q, k, v (T, H, head_dim) of tokens x (T, d), k after its convolution."""
        name, h, t = f"layers.{layer}.mixer", self.layers[layer]["num_heads"], len(x)
        q, k, v = np.split(self._linear(x, f"{name}.qkv_proj").astype(np.float64), 3, axis=-1)
        b, c = self.tensors[f"{name}.shift_B"], self.tensors[f"{name}.shift_C"]
        padded, taps = np.concatenate([state.tensors[f"layers.{layer}.conv"], k]), b.shape[1]
        state.tensors[f"layers.{layer}.conv"] = padded[t:]
        k = self.tensors[f"{name}.shift_D"] * k
        for i in range(taps):  # tokens before
            k = k + (b[:, : taps - i] * c[:, i:]).sum(1) * padded[taps - 1 - i :][:t]
        return tuple(part.reshape(t, h, -1) for part in (q, k, v))

    def _h3_modes(self, layer: int) -> tuple[Array, Array]:
        """What the modes (H, M) decay by, and what they count, complex."""
        name = f"layers.{layer}.mixer"
        step = np.exp(self.tensors[f"{name}.log_dt"])[:, None]
        z = step / 2 * (-np.exp(self.tensors[f"{name}.A_log"]) + 1j * self.tensors[f"{name}.A_imag"])
        b, c = (self.tensors[f"{name}.{part}"] @ [1, 1j] for part in "BC")
        return (1 + z) / (1 - z), b * c * step / (1 - z)

    def _h3(self, x: Array, layer: int, state: State) -> Array:
        """S_t = Σ_{j≤t} 2 Re Σ_m w a^(t−j) k_j v_jᵀ + D k_t v_tᵀ."""
        q, k, v = self._h3_inputs(x, layer, state)
        (a, w), t = self._h3_modes(layer), len(x)
        kernel = 2 * (w * a ** np.arange(t)[:, None, None]).real.sum(-1)  # (T, H)
        kernel[0] += self.tensors[f"layers.{layer}.mixer.D"]
        age = np.arange(t)[:, None] - np.arange(t)
        weights = np.where(age[..., None] >= 0, kernel[np.maximum(age, 0)], 0)  # (T, T, H)
        return self.round(np.einsum("thi,tsh,shi,shj->thj", q, weights, k, v, optimize=True)).reshape(t, -1)

    def _h3_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, v = self._h3_inputs(x, layer, state)
        a, w = (part[:, None, None] for part in self._h3_modes(layer))
        before, y = state.tensors[f"layers.{layer}.modes"], np.zeros(v.shape)
        modes = before[..., 0, :] + 1j * before[..., 1, :]
        for t in range(len(x)):
            kv = k[t][:, :, None] * v[t][:, None]  # (H, size of k, size of v)
            modes = a * modes + kv[..., None]
            s = 2 * (w * modes).real.sum(-1) + self.tensors[f"layers.{layer}.mixer.D"][:, None, None] * kv
            y[t] = np.einsum("hi,hij->hj", q[t], s)
        state.tensors[f"layers.{layer}.modes"] = np.stack([modes.real, modes.imag], -2)
        return self.round(y).reshape(len(x), -1)

    # ---- Hyena, likewise -----------------------------------------------------------------------------------------

    def _hyena_inputs(self, x: Array, layer: int, state: State) -> tuple[Array, Array]:
        """v ⊙ x₁ and x₂ (T, e) of tokens x (T, d)."""
        u = self._linear(x, f"layers.{layer}.mixer.in_proj").astype(np.float64)
        x1, x2, v = np.split(self._conv(u, layer, state), 3, axis=-1)
        return v * x1, x2

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

    def _hyena(self, x: Array, layer: int, state: State) -> Array:
        g, x2 = self._hyena_inputs(x, layer, state)
        t, y = len(x), self.tensors[f"layers.{layer}.mixer.filter.D"] * g
        h = self._hyena_filter(layer, t)
        for i in range(t):
            y[i:] += h[i] * g[: t - i]
        state.tensors[f"layers.{layer}.products"][:t] = g
        return self.round(y * x2)

    def _hyena_step(self, x: Array, layer: int, state: State) -> Array:
        name, seen = f"layers.{layer}", state.num_tokens
        g, x2 = self._hyena_inputs(x, layer, state)
        products = state.tensors[f"{name}.products"] = state.tensors[f"{name}.products"].copy()
        products[seen] = g[0]
        h = self._hyena_filter(layer, seen + 1)
        y = (h[::-1] * products[: seen + 1]).sum(0) + self.tensors[f"{name}.mixer.filter.D"] * g
        return y * x2

    # ---- Mamba-2 -------------------------------------------------------------------------------------------------

    def _mamba2_inputs(self, u: Array, layer: int, state: State) -> tuple[Array, ...]:
        """Of tokens u (T, d): x (T, H, head_dim), B and C of each head (T, H, N), Δ and log α (T, H), z (T, e)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t, h, groups, n = len(u), mixer["num_heads"], mixer["num_groups"], mixer["state_size"]
        conv = self._conv(self._linear(u, f"{name}.xbc_proj"), layer, state)
        xbc = self.round(ACTIVATIONS["silu"](self.round(conv)))
        e = h * mixer["head_dim"]
        b, c = (part.reshape(t, groups, n).repeat(h // groups, axis=1) for part in np.split(xbc[:, e:], 2, axis=-1))
        delta = np.logaddexp(0, self._linear(u, f"{name}.dt_proj") + self.tensors[f"{name}.dt_bias"])
        log_alpha = -np.exp(self.tensors[f"{name}.A_log"]) * delta
        return xbc[:, :e].reshape(t, h, -1), b, c, delta, log_alpha, self._linear(u, f"{name}.z_proj")

    def _mamba2_output(self, y: Array, x: Array, z: Array, layer: int) -> Array:
        """The norm of each group after the gate: (T, e) of Sᵀ C and x (T, H, head_dim)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        y = self.round(y + self.tensors[f"{name}.D"][:, None] * x).reshape(z.shape) * ACTIVATIONS["silu"](z)
        y = y.reshape(len(y), mixer["num_groups"], -1)
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + mixer["eps"])
        return self.round(y.reshape(z.shape) * self.tensors[f"{name}.norm.weight"])

    def _mamba2(self, u: Array, layer: int, state: State) -> Array:
        """Sᵀ C at t is Σ_{j≤t} g_tj (C_t·B_j) Δ_j x_j, g_tj = Π_{j<i≤t} α_i."""
        x, b, c, delta, log_alpha, z = self._mamba2_inputs(u, layer, state)
        time = log_alpha.cumsum(0).T  # (H, T)
        decay = np.exp(np.where(np.tri(len(u), dtype=bool), time[:, :, None] - time[:, None], -np.inf))
        y = np.einsum("hts,shd->thd", np.einsum("thn,shn->hts", c, b) * decay, delta[..., None] * x)
        return self._mamba2_output(y, x, z, layer)

    def _mamba2_step(self, u: Array, layer: int, state: State) -> Array:
        x, b, c, delta, log_alpha, z = self._mamba2_inputs(u, layer, state)
        alpha, s, y = np.exp(log_alpha), state.tensors[f"layers.{layer}.matrix"], np.zeros(x.shape)
        for t in range(len(u)):
            s = alpha[t, :, None, None] * s + b[t, :, :, None] * (delta[t, :, None] * x[t])[:, None]
            y[t] = np.einsum("hnd,hn->hd", s, c[t])
        state.tensors[f"layers.{layer}.matrix"] = s
        return self._mamba2_output(y, x, z, layer)

    # ---- gated linear attention ----------------------------------------------------------------------------------

    def _gated_linear_inputs(self, x: Array, layer: int) -> tuple[Array, ...]:
        """Of tokens x (T, d): q, k and log α (T, H, key_dim), v and the gate (T, H, head_dim)."""
        name, mixer = f"layers.{layer}.mixer", self.layers[layer]
        t, h, dk = len(x), mixer["num_heads"], mixer["key_dim"]
        qkv = np.split(self._linear(x, f"{name}.qkv_proj"), [h * dk, 2 * h * dk], axis=-1)
        q, k, v = (part.reshape(t, h, -1) for part in qkv)
        a = self._linear(self._linear(x, f"{name}.a_down_proj"), f"{name}.a_up_proj").reshape(t, h, dk)
        gate = ACTIVATIONS["silu"](self._linear(x, f"{name}.g_proj")).reshape(v.shape)
        return q, k, -np.logaddexp(0, -a) / mixer["gate_normalizer"], v, gate

    def _gated_linear_attention(self, x: Array, layer: int, _: State) -> Array:
        """Sᵀq at t is Σ_{j≤t} Σ_i q_t[i] g_tj[i] k_j[i] v_j, g_tj = Π_{j<s≤t} α_s."""
        q, k, log_alpha, v, gate = self._gated_linear_inputs(x, layer)
        time, causal = log_alpha.cumsum(0), np.tri(len(x), dtype=bool)[..., None]
        y = np.zeros_like(v)
        for h in range(v.shape[1]):
            decay = np.exp(np.where(causal, time[:, None, h] - time[None, :, h], -np.inf))  # (T, T, key_dim)
            y[:, h] = np.einsum("ti,tsi,si->ts", q[:, h], decay, k[:, h]) @ v[:, h]
        return self._delta_output(y, gate, layer)

    def _gated_linear_attention_step(self, x: Array, layer: int, state: State) -> Array:
        q, k, log_alpha, v, gate = self._gated_linear_inputs(x, layer)
        alpha, s, y = np.exp(log_alpha), state.tensors[f"layers.{layer}.matrix"], np.zeros(v.shape)
        for t in range(len(x)):
            s = alpha[t, :, :, None] * s + k[t, :, :, None] * v[t, :, None]
            y[t] = np.einsum("hkd,hk->hd", s, q[t])
        state.tensors[f"layers.{layer}.matrix"] = s
        return self._delta_output(y, gate, layer)

    # ---- RWKV-7 --------------------------------------------------------------------------------------------------

    def _rwkv7_inputs(self, x: Array, layer: int, state: State) -> tuple[Array, ...]:
        """Of tokens x (T, d): r, w, k, v, κ and κ ⊙ a, (T, H, head_dim), and the gate."""
        name, mixer, round = f"layers.{layer}.mixer", self.layers[layer], self.round
        change = self._shifted(x, layer, state) - x
        r, w, k, v, a, g = (round(x + change * self.tensors[f"{name}.mix_{part}"]) for part in "rwkvag")
        r, k, v = (self._linear(m, f"{name}.{part}_proj") for part, m in (("r", r), ("k", k), ("v", v)))
        w, a, g = (
            self._linear(round(act(self._linear(m, f"{name}.{part}_down_proj"))), f"{name}.{part}_up_proj")
            for part, m, act in (("w", w, np.tanh), ("a", a, exact), ("g", g, sigmoid))
        )
        w, a = np.exp(-np.exp(-0.5) * sigmoid(w)), sigmoid(a)
        kappa = k * self.tensors[f"{name}.k_k"]
        k = round(k * (1 + (a - 1) * self.tensors[f"{name}.k_a"]))
        r, w, k, v, kappa, a = (part.reshape(len(x), mixer["num_heads"], -1) for part in (r, w, k, v, kappa, a))
        kappa = round(kappa / np.maximum(np.sqrt((kappa**2).sum(-1, keepdims=True)), 1e-12))
        return r, w, k, v, kappa, round(kappa * a), g

    def _rwkv7_output(self, y: Array, r: Array, k: Array, v: Array, g: Array, layer: int) -> Array:
        """The norm of each head, what a token adds to its own result, and the gate: (T, e) of y (T, H, head_dim)."""
        name, y = f"layers.{layer}.mixer", self.round(y)
        y = y - y.mean(-1, keepdims=True)
        y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + self.layers[layer]["eps"])).reshape(g.shape)
        y = y * self.tensors[f"{name}.norm.weight"] + self.tensors[f"{name}.norm.bias"]
        bonus = (r * k * self.tensors[f"{name}.r_k"].reshape(r.shape[1:])).sum(-1, keepdims=True) * v
        return self.round((y + bonus.reshape(g.shape)) * g)

    def _rwkv7(self, x: Array, layer: int, state: State) -> Array:
        """Sᵀr at t is Σ_{j≤t} (A_t … A_{j+1} k_j)·r_t v_j, A = diag(w) − (κ ⊙ a) κᵀ."""
        r, w, k, v, kappa, removed, g = self._rwkv7_inputs(x, layer, state)
        y, carried = np.zeros_like(v), np.zeros((0, *k.shape[1:]))  # A_t … A_{j+1} k_j
        for t in range(len(x)):
            seen = (carried * kappa[t]).sum(-1, keepdims=True)
            carried = np.concatenate([carried * w[t] - seen * removed[t], k[t : t + 1]])
            y[t] = np.einsum("jh,jhd->hd", (carried * r[t]).sum(-1), v[: t + 1])
        return self._rwkv7_output(y, r, k, v, g, layer)

    def _rwkv7_step(self, x: Array, layer: int, state: State) -> Array:
        r, w, k, v, kappa, removed, g = self._rwkv7_inputs(x, layer, state)
        s, y = state.tensors[f"layers.{layer}.matrix"], np.zeros(v.shape)
        for t in range(len(x)):
            seen = np.einsum("hkd,hk->hd", s, kappa[t])
            s = w[t, ..., None] * s - removed[t, ..., None] * seen[:, None] + k[t, ..., None] * v[t, :, None]
            y[t] = np.einsum("hkd,hk->hd", s, r[t])
        state.tensors[f"layers.{layer}.matrix"] = s
        return self._rwkv7_output(y, r, k, v, g, layer)
