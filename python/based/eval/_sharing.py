"""Prefills of prompts that begin alike: what several have in common is read once, and its state forked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from based import Model, Session, State

Tokens: TypeAlias = npt.NDArray[np.int64]

WORTH = 64
"""Tokens that a fork must save: a prefill reads all weights, so it costs about as much as this many tokens."""


@dataclass(slots=True)
class Batch:
    """Sequences of a session that have read their prompts."""

    members: list[int]
    """Positions of the prompts; sequence i of the session has read prompt members[i]."""
    session: "Session"
    logits: list[npt.NDArray[np.float32] | None]
    """Behind each prompt; None behind one of no tokens."""
    num_fed: int
    """Tokens that were read for this batch."""


def common_length(a: Tokens, b: Tokens) -> int:
    """Number of tokens that two prompts have in common at their beginnings."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def prefilled(model: "Model", prompts: Sequence[Tokens], batch_size: int, *, share: bool = True) -> Iterator[Batch]:
    """All prompts, in batches, ordered so that prompts that begin alike are neighbours.

    States have a fixed size, so memory is that of batch_size states, and of one that goes from a batch to the next.
    share: False reads every prompt by itself, for comparison.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">u4").tobytes())
    common = [0, *(common_length(prompts[a], prompts[b]) for a, b in pairwise(order))] if share else [0] * len(order)
    carried: tuple[State, int] | None = None
    for begin in range(0, len(order), batch_size):
        members = order[begin : begin + batch_size]
        session = model.session(len(members))
        batch = _Prefill(session, [prompts[i] for i in members], common[begin : begin + batch_size], share)
        end = begin + len(members)
        # A prompt's last token is read again, for its logits.
        keep = (
            min(_keep(common[end : end + _AHEAD * batch_size]), len(prompts[order[end]]) - 1) if end < len(order) else 0
        )
        carried = batch.run(carried, keep if keep >= WORTH else 0)
        yield Batch(members, session, batch.logits, batch.num_fed)


_AHEAD = 64  # batches


def _keep(common: Sequence[int]) -> int:
    """How long a beginning goes on to the next batches: a little less than the next prompt's, if many share that."""
    kept = shared = common[0]
    for length in common[1:]:
        shared = min(shared, length)
        if shared < common[0] - WORTH:
            break
        kept = shared
    return kept


class _Prefill:
    """One batch of sorted prompts: a walk down the tree of their prefixes, all branches of a level at once."""

    def __init__(self, session: "Session", prompts: list[Tokens], common: list[int], share: bool) -> None:
        self._session = session
        self._prompts = prompts
        self._common = common  # with the prompt before: of sorted prompts, the least of some is what all of them share
        self._share = share
        self.logits: list[npt.NDArray[np.float32] | None] = [None] * len(prompts)
        self.num_fed = 0

    def run(self, carried: "tuple[State, int] | None", keep: int) -> "tuple[State, int] | None":
        """Reads all prompts.

        carried: The state behind this many first tokens of prompt 0, and that number.
        keep: The state behind so many first tokens of the last prompt is returned with their number; 0: None.
        """
        last = len(self._prompts) - 1
        waiting = self._begin(carried)
        kept = carried if carried is not None and carried[1] == keep and waiting[0][1] > last else None
        while waiting:
            groups, waiting = waiting, []
            targets = [self._target(*group, keep if group[1] > last else 0) for group in groups]
            self._feed([(first, fed, to) for (first, _, fed), to in zip(groups, targets, strict=True) if to > fed])
            for (first, end, _), fed in zip(groups, targets, strict=True):
                if end > last and fed == keep and keep and kept is None:
                    kept = self._session.state(first), keep
                waiting += self._split(first, end, fed)
        return kept

    def _begin(self, carried: "tuple[State, int] | None") -> list[tuple[int, int, int]]:
        """Groups (first, end, fed): prompts first … end − 1 share what sequence `first` has read, `fed` tokens."""
        end = 0
        if carried is not None:
            self._session.restore(0, carried[0])
            end = 1
            while end < len(self._prompts) and self._common[end] >= carried[1]:
                end += 1
        groups = [(0, end, carried[1])] if carried is not None else []
        if end == len(self._prompts):
            return groups
        if self._share:
            return [*groups, (end, len(self._prompts), 0)]
        return [(i, i + 1, 0) for i in range(len(self._prompts))]

    def _shared(self, first: int, end: int) -> int:
        return min((self._common[i] for i in range(first + 1, end)), default=len(self._prompts[first]))

    def _target(self, first: int, end: int, fed: int, keep: int) -> int:
        """How far to read now."""
        shared = self._shared(first, end)
        if fed < keep <= shared:
            return keep
        few = end - first > 1 and (end - first - 1) * (shared - fed) < WORTH
        return fed if few else shared

    def _feed(self, feeds: list[tuple[int, int, int]]) -> None:
        if not feeds:
            return
        rows = [row for row, _, _ in feeds]
        logits = np.asarray(self._session.prefill([self._prompts[row][a:b] for row, a, b in feeds], rows))
        self.num_fed += sum(b - a for _, a, b in feeds)
        for row, (_, _, end), found in zip(rows, feeds, logits, strict=True):
            if end == len(self._prompts[row]):
                self.logits[row] = found

    def _split(self, first: int, end: int, fed: int) -> list[tuple[int, int, int]]:
        """The groups that go on: by the token that comes next. Prompts that end here are done."""
        shared = self._shared(first, end)
        if fed < shared and end - first > 1 and (end - first - 1) * (shared - fed) >= WORTH:
            return [(first, end, fed)]  # it stopped on the way, to keep a state
        if end - first == 1:
            return [] if fed == len(self._prompts[first]) else [(first, end, fed)]
        starts = [first, *(i for i in range(first + 1, end) if self._common[i] == shared)]
        found = []
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            if start != first and fed:
                self._session.copy(first, start)
            if fed == len(self._prompts[start]):
                self.logits[start] = self.logits[first]
            if stop - start > 1 or fed < len(self._prompts[start]):
                found.append((start, stop, fed))
        return found
