"""Which of several processes, each with a copy of the model, answers a request: one that has read its beginning."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

_TOKENS, _LETTERS = 64, 256
"""Of a block. An engine on a CPU keeps states at multiples of 64 tokens; a token has about four letters."""

ANSWER = 4
"""Blocks that cost about as much as an answer, which runs in one batch with others."""


def prefixes(body: Any) -> list[int]:
    """A number for each block of a completion's prompt, which stands for all of the prompt up to the block's end.

    A state that the completion goes on from is a block before them. Of several prompts the first one counts. What is
    wrong in the body is none of this function's business: it then finds fewer blocks.
    """
    if not isinstance(body, dict):
        return []
    found = []
    last = 0
    state = body.get("state_id")
    if isinstance(state, str):
        last = hash(state_key(state))
        found.append(last)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str | list):
        size = _LETTERS if isinstance(prompt, str) else _TOKENS
        for begin in range(0, len(prompt) - size + 1, size):
            piece = prompt[begin : begin + size]
            if isinstance(piece, list):
                if not all(isinstance(token, int) for token in piece):
                    break
                piece = tuple(piece)
            last = hash((last, piece))
            found.append(last)
    return found


def state_key(name: str) -> int:
    """The number of a named state, as prefixes() has it."""
    return hash(("state", name))


class Routes:
    """Who has read which beginnings of prompts. One thread at a time.

    The work of a request is counted in blocks: those of its prompt that a worker has not read, and ANSWER. A request
    goes where this work and the work that is under way there are least together. So one that shares a long beginning
    with others follows them, until waiting for them costs more than reading the beginning again: then a second worker
    reads it.
    """

    def __init__(self, most_blocks: int = 1 << 16) -> None:
        """most_blocks: Those that are remembered, the ones used last; 65,536 are 4 million tokens, and 15 MB."""
        self._readers: OrderedDict[int, set[Hashable]] = OrderedDict()  # used last: last
        self._most_blocks = most_blocks

    def missing(self, blocks: Sequence[int], worker: Hashable) -> int:
        """How many of the blocks a worker has not read: all behind the first one that it has not."""
        for index, block in enumerate(blocks):
            if worker not in self._readers.get(block, ()):
                return len(blocks) - index
        return 0

    def order(self, blocks: Sequence[int], loads: Mapping[Any, float]) -> list[Any]:
        """The workers, the best one first. loads: The work under way of each, in blocks. Equals stay in their order."""
        return sorted(loads, key=lambda worker: loads[worker] + self.missing(blocks, worker))

    def remember(self, blocks: Sequence[int], worker: Hashable) -> None:
        """A worker reads these."""
        for block in reversed(blocks):  # the first ones, which others may share, are forgotten last
            self._readers.setdefault(block, set()).add(worker)
            self._readers.move_to_end(block)
        while len(self._readers) > self._most_blocks:
            self._readers.popitem(last=False)

    def forget(self, worker: Hashable) -> None:
        """A worker has ended."""
        for block in [block for block, readers in self._readers.items() if worker in readers]:
            self._readers[block].discard(worker)
            if not self._readers[block]:
                del self._readers[block]
