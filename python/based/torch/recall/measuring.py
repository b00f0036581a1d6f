"""Recall as the runtime has it: what a session answers at each query, out of the state that it keeps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import based
from based.torch.recall.data import Examples

_SEQUENCES = 250  # of a session: 0.26 GB of states with windows of 1,024 keys of 128 numbers


def accuracies(
    directory: Path, examples: Sequence[Examples], device: str, interrupt: Callable[[], None] = lambda: None
) -> list[float]:
    """Shares of right answers of a model directory, for each of `examples`.

    The runtime reads the pairs of each text at once, and then, as in generation, token by token. An answer is right
    when of all tokens the value of the query's key has the largest logit. Computed in float32.

    Args:
        directory: A model.
        examples: Texts of any settings.
        device: See `based.load`.
        interrupt: Called again and again; what it raises ends the measurement.
    """
    model = based.load(directory, device=device, dtype="float32")
    return [_accuracy(model, part, interrupt) for part in examples]


def _accuracy(model: "based.Model", examples: Examples, interrupt: Callable[[], None]) -> float:
    right = 0
    for start in range(0, len(examples), _SEQUENCES):
        part = slice(start, start + _SEQUENCES)
        tokens, queries = examples.tokens[part].astype(np.int32), examples.queries[part].astype(np.int64)
        values = np.full(tokens.shape, -1)  # where a query is, its answer
        np.put_along_axis(values, queries, examples.answers[part], axis=1)
        session = model.session(len(tokens))
        session.prefill(list(tokens[:, : queries.min()]))
        for t in range(queries.min(), queries.max() + 1):
            interrupt()
            logits = np.asarray(session.step(tokens[:, t]))
            rows = np.flatnonzero(values[:, t] >= 0)
            right += int((logits[rows].argmax(axis=1) == values[rows, t]).sum())
    return right / examples.answers.size
