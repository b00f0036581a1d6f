"""How likely continuations of contexts are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from based import _core
from based._generate import PromptReader
from based._prompts import as_rows


@dataclass(slots=True, frozen=True)
class ContinuationScore:
    """How likely a continuation is, behind its context."""

    logprob: float
    """Natural logarithm of its probability: the sum of `logprobs`."""
    is_greedy: bool
    """Each token is the likeliest one at its place: greedy sampling would give this continuation."""
    token_ids: list[int]
    logprobs: list[float]
    """Of each token, given the context and the tokens before it."""


def read_pairs(context: Any, continuation: Any, reader: PromptReader) -> tuple[list[tuple[Any, Any]], bool]:
    """Pairs of token ids, and whether there was one continuation. A single context is that of all continuations."""
    contexts, one_context = as_rows(context)
    continuations, one = as_rows(continuation)
    if one and not contexts:  # of no tokens
        contexts = [[]]
    elif one_context:
        contexts = contexts * len(continuations)
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts, but {len(continuations)} continuations")
    pairs = [_read_pair(i, *pair, reader) for i, pair in enumerate(zip(contexts, continuations, strict=True))]
    return pairs, one


def _read_pair(index: int, context: Any, continuation: Any, reader: PromptReader) -> tuple[Any, Any]:
    """Ids of both. Of two texts: the tokens of the whole, from the first on that the context alone does not have."""
    vocab_size = reader.config.vocab_size
    names = f"context {index}", f"continuation {index}"
    if isinstance(context, str) and isinstance(continuation, str):
        alone, whole = reader.read(context), reader.read(context + continuation)
        if not context:
            whole = whole if whole[: len(alone)] == alone else [*alone, *whole]
        common = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        context, continuation = whole[:common], whole[common:]
    else:
        context, continuation = reader.read(context), reader.read(continuation, at_start=False)
    tokens = _core.check_prompt(continuation, vocab_size, names[1])
    before = _core.check_prompt(reader.read(context), vocab_size, names[0])
    reader.check_context(len(before) + len(tokens) - 1, f"{names[0]} and its continuation")  # the last is not fed
    return before, tokens


def score_pairs(
    core: _core.Model, pairs: Sequence[tuple[Any, Any]], max_batch_size: int, vocab_size: int
) -> Iterator[ContinuationScore]:
    """The pairs' scores, in order. Pairs of a batch that have the same context share its prefill."""
    rows = iter(pairs)
    while batch := list(islice(rows, max_batch_size)):
        yield from _score_batch(core, batch, vocab_size)


def _score_batch(core: _core.Model, pairs: Sequence[tuple[Any, Any]], vocab_size: int) -> Iterator[ContinuationScore]:
    session = _core.Session(core, len(pairs))
    first: dict[bytes, int] = {}  # where each context stands for the first time
    sources = [first.setdefault(context.tobytes(), i) for i, (context, _) in enumerate(pairs)]
    fed = sorted(first.values())
    prefilled = session.prefill([pairs[i][0] for i in fed], fed)
    for i, source in enumerate(sources):
        if source != i:
            session.copy(source, i)
    logits = np.asarray(prefilled.columns(vocab_size))[[fed.index(source) for source in sources]]

    yield from score_continuations(session, logits, [continuation.tolist() for _, continuation in pairs], vocab_size)


def score_continuations(
    session: Any, logits: npt.NDArray[np.float32], tokens: Sequence[list[int]], vocab_size: int
) -> Iterator[ContinuationScore]:
    """Scores of one continuation a sequence of a session, which has read the contexts.

    session: A Session, of the core or of the package. logits: (B, vocab_size), behind the contexts.
    """
    logprobs: list[list[float]] = [[] for _ in tokens]
    is_greedy = [True] * len(tokens)
    running = list(range(len(tokens)))
    position = 0
    while True:
        chosen = np.array([tokens[i][position] for i in running])
        for i, logprob, best in zip(running, _log_probs(logits, chosen), _are_best(logits, chosen), strict=True):
            logprobs[i].append(float(logprob))
            is_greedy[i] &= bool(best)
        position += 1
        running = [i for i in running if position < len(tokens[i])]
        if not running:
            break
        stepped = session.step([tokens[i][position - 1] for i in running], running)
        logits = np.asarray(stepped)[:, :vocab_size]
    for i in range(len(tokens)):
        yield ContinuationScore(sum(logprobs[i]), is_greedy[i], tokens[i], logprobs[i])


def _log_probs(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Log softmax(logits)[tokens] of each row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(wide, tokens[:, None], axis=1)[:, 0]
    found: npt.NDArray[np.float64] = chosen - np.log(np.exp(wide).sum(axis=1))
    return found


def _are_best(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = logits.argmax(axis=1) == tokens
    return found
