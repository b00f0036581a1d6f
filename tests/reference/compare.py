"""Measures of disagreement."""

from __future__ import annotations

from typing import Any

import numpy as np


def rel_l2(a: Any, b: Any) -> float:
    """‖a-b‖₂ / ‖b‖₂ over whole arrays."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def max_abs(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
