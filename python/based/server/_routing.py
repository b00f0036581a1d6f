"""Which of several workers gets a request: who has seen the longest beginning of its prompt, or who is least busy.

A worker is a process with a model of its own, and a cache of states of its own. What is in those caches is not asked:
a worker that was sent a prompt is taken to hold it.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

W = TypeVar("W", bound=Hashable)

_TOKENS, _BYTES = 64, 256
"""What a block holds: of token ids, and of a text. An engine's states lie at multiples of 64 tokens."""

_BLOCKS = 64
"""Blocks of one length; the next ones are twice as long, so that 16 MB of text have fewer than 800."""

_KEPT = 1 << 17
"""Beginnings that are remembered: some 20 MB."""

_SPARE = 8
"""Requests that a worker may have more than twice those of the least busy one, before its prompts go elsewhere."""


def fingerprints(body: bytes) -> list[bytes]:
    """Of a completion's JSON: a hash of each beginning of its first prompt that ends with a block, the shortest first.

    Names of states stand for beginnings, too: that of the state to go on from, in place of the prompt's, and that of
    the state to make. A body that is wrong has none: the worker says what is wrong with it.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    # Who makes a state has it in memory. Its name comes first: any beginning of the prompt says more.
    found = [of_state(name)] if isinstance(name := fields.get("save_state"), str) else []
    if isinstance(name := fields.get("state_id"), str):
        return [*found, of_state(name)]
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return found + _beginnings(b"text", prompt.encode("utf-8", "surrogatepass"), _BYTES)
    try:
        return found + _beginnings(b"tokens", array("q", prompt or ()).tobytes(), 8 * _TOKENS)
    except (TypeError, OverflowError):
        return []


def made_by(body: bytes) -> list[bytes]:
    """Of the JSON of a fork: what stands for the new name."""
    try:
        fields = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return []
    name = fields.get("to") if isinstance(fields, dict) else None
    return [of_state(name)] if isinstance(name, str) else []


def of_state(name: str) -> bytes:
    """What stands for a named state."""
    return hashlib.blake2b(b"state" + name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _beginnings(kind: bytes, data: bytes, size: int) -> list[bytes]:
    hasher, found, begin = hashlib.blake2b(kind, digest_size=8), [], 0
    while begin + size <= len(data):
        hasher.update(data[begin : begin + size])
        found.append(hasher.digest())
        begin += size
        if len(found) % _BLOCKS == 0:
            size *= 2
    return found


class Prefixes:
    """Which workers were sent which beginnings. On one thread."""

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, set[Any]] = OrderedDict()  # used last: last
        self._turns: dict[Any, int] = {}
        self._num_chosen = 0

    def choose(self, beginnings: list[bytes], loads: Mapping[W, int]) -> W:
        """A worker for a prompt, which is taken to hold it from now on.

        Args:
            beginnings: As `fingerprints` gives them.
            loads: The workers that may get it, at least one, and the number of requests that each has.
        """
        least = min(loads.values())
        chosen = None
        for each in reversed(beginnings):
            holders = [worker for worker in self._holders.get(each, ()) if worker in loads]
            if holders:
                chosen = min(holders, key=loads.__getitem__)
                break
        if chosen is None or loads[chosen] > 2 * least + _SPARE:
            chosen = min(loads, key=lambda worker: (loads[worker], self._turns.get(worker, 0)))
        self._num_chosen += 1
        self._turns[chosen] = self._num_chosen  # of those equally busy, the one that had no request for longest
        for each in beginnings:
            self._holders.setdefault(each, set()).add(chosen)
            self._holders.move_to_end(each)
        while len(self._holders) > _KEPT:
            self._holders.popitem(last=False)
        return chosen

    def forget(self, worker: Hashable) -> None:
        """A worker holds nothing any more."""
        self._turns.pop(worker, None)
        for holders in self._holders.values():
            holders.discard(worker)
