"""Recall as the runtime has it: what a session answers at each query, out of the state that it keeps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.utils.dlpack

import based
from based.torch.recall.data import Examples

_SEQUENCES = 250  # of a session: 0.26 GB of states with windows of 1,024 keys of 128 numbers


def accuracies(
    directory: Path, examples: Sequence[Examples], device: str, interrupt: Callable[[], None] = lambda: None
) -> list[float]:
    """Shares of right answers of a model directory, for each of `examples`.

    The runtime reads each text from the start up to a query, and on from there to the next one. An answer is right when
    of all tokens the value of the query's key has the largest logit. Computed in float32.

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
        rows = slice(start, start + _SEQUENCES)
        tokens, answers = examples.tokens[rows].astype(np.int32), examples.answers[rows]
        ends = examples.queries[rows].astype(np.int64) + 1
        starts = np.concatenate([np.zeros((len(tokens), 1), np.int64), ends[:, :-1]], axis=1)
        session = model.session(len(tokens))
        for query in range(answers.shape[1]):
            interrupt()
            pieces = [text[a:b] for text, a, b in zip(tokens, starts[:, query], ends[:, query], strict=True)]
            logits = torch.utils.dlpack.from_dlpack(session.prefill(pieces))  # the same memory, wherever it is
            right += int((logits.argmax(dim=1).cpu().numpy() == answers[:, query]).sum())
    return right / examples.answers.size
