"""Multi-query associative recall (MQAR; Arora et al., "Zoology", arXiv:2312.04927): texts of random keys and values.

A text of T tokens begins with N pairs of a key and a value, all keys different, all values different. Behind them
every other place may hold a query: each key comes once more, and its value is to be predicted there. All other places
hold random tokens. The gap between the pairs and a query follows a power law: place g of (T − 2N)/2 is drawn with a
probability proportional to g^(power − 1), without replacement. Keys are tokens 1 … V/2 − 1, values V/2 … V − 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

POWER = 0.01
"""The authors' `power_a`."""
MAX_VOCAB_SIZE = 1 << 16

Array = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """How long a text is, and how many pairs it has to remember."""

    length: int
    """T, tokens."""
    pairs: int
    """N, and as many queries."""

    def __str__(self) -> str:
        return f"{self.length}/{self.pairs}"

    def check(self, vocab_size: int) -> None:
        """Raises ValueError when there are no such texts."""
        if self.length % 2 or self.pairs < 1 or 4 * self.pairs > self.length:
            raise ValueError(f"setting {self}: expected an even length of at least 4 tokens per pair")
        if not 2 * self.pairs < vocab_size <= MAX_VOCAB_SIZE or vocab_size % 2:
            expected = f"an even number from {2 * self.pairs + 2} to {MAX_VOCAB_SIZE}"
            raise ValueError(f"vocab_size is {vocab_size}, expected {expected}: setting {self}")


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts of one setting."""

    tokens: Array
    """(count, T)."""
    queries: Array
    """Places of the queries, ascending, (count, N)."""
    answers: Array
    """The value of each query's key, (count, N)."""

    def __len__(self) -> int:
        return len(self.tokens)


def make_examples(setting: Setting, count: int, vocab_size: int, seed: Sequence[int], power: float = POWER) -> Examples:
    """Random texts.

    Args:
        setting: Their length and pairs.
        count: How many.
        vocab_size: V, even, at most 65,536.
        seed: Any numbers ≥ 0; equal ones give equal texts, others independent ones.
        power: Of the law that the gaps follow, > 0; at 1 they are uniform.
    """
    setting.check(vocab_size)
    rng = np.random.default_rng([*seed, setting.length, setting.pairs])
    n, context = setting.pairs, 2 * setting.pairs
    keys = distinct(rng, count, n, 1, vocab_size // 2)
    values = distinct(rng, count, n, vocab_size // 2, vocab_size)
    tokens = rng.integers(0, vocab_size, (count, setting.length), dtype=np.uint16)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    # Exponential clocks of rate w run out in the order of draws without replacement of probability ∝ w.
    gaps = np.arange(1, (setting.length - context) // 2 + 1)
    clocks = rng.exponential(size=(count, len(gaps))) / gaps ** (power - 1)
    queries = context + 2 * np.argsort(clocks, axis=1, kind="stable")[:, :n]
    np.put_along_axis(tokens, queries, keys, axis=1)
    order = np.argsort(queries, axis=1)
    return Examples(
        tokens,
        np.take_along_axis(queries, order, axis=1).astype(np.uint16),
        np.take_along_axis(values, order, axis=1),
    )


def distinct(rng: np.random.Generator, count: int, size: int, low: int, high: int) -> Array:
    """Rows of `size` different numbers in [low, high), every such row equally probable.

    Repetitions are drawn again until there are none. Nothing here depends on which number is which, so no row is
    preferred to another.
    """
    rows = rng.integers(low, high, (count, size), dtype=np.uint16)
    left = np.arange(count)
    while len(left):
        part = rows[left]
        order = np.argsort(part, axis=1, kind="stable")  # of equal numbers the first one stays
        ascending: Any = np.take_along_axis(part, order, axis=1)
        repeated = np.zeros(part.shape, bool)
        np.put_along_axis(repeated, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], axis=1)
        part[repeated] = rng.integers(low, high, int(repeated.sum()), dtype=np.uint16)
        rows[left] = part
        left = left[repeated.any(axis=1)]
    return rows
