"""The mixers in float64 PyTorch, by their definitions: quadratic in the number of tokens."""

from __future__ import annotations

from typing import Any

import torch

from tests.reference.model import taylor_features


def taylor_reference(q: Any, k: Any, v: Any, eps: float = 1e-12) -> Any:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    p = (1 + s + s * s / 2).tril()
    return (p @ v / (p.sum(-1, keepdim=True) + eps)).transpose(1, 2)


def state_reference(k: Any, v: Any) -> Any:
    features = torch.from_numpy(taylor_features(k.double().cpu().numpy())).to(v.device)
    ones = torch.cat([v.double(), torch.ones_like(v[..., :1]).double()], -1)
    return torch.einsum("bthf,bthd->bhfd", features, ones)


def window_reference(q: Any, k: Any, v: Any, window: int, scale: float) -> Any:
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    age = torch.arange(q.shape[2], device=q.device)
    age = age[:, None] - age
    scores = (q @ k.mT * scale).masked_fill((age < 0) | (age >= window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def conv_reference(u: Any, weight: Any, before: Any = None) -> tuple[Any, Any]:
    e, taps = weight.shape
    u1, u2 = u.double().chunk(2, dim=-1)
    if before is None:
        before = u1.new_zeros(len(u), taps - 1, e)
    padded = torch.cat([before.double(), u1], 1)
    conv = sum(weight[:, j].double() * padded[:, j : j + u.shape[1]] for j in range(taps))
    return torch.nn.functional.silu(conv) * u2, padded[:, padded.shape[1] - (taps - 1) :]
