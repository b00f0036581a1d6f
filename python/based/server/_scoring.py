"""Log-probabilities of a prompt's own tokens: `echo` with `logprobs`."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from based._outputs import Logprob

if TYPE_CHECKING:
    from based import Model
    from based.server._requests import Completion

_ROWS = 64  # of logits that are worked on at once

PromptLogprobs = list[dict[int, Logprob] | None]


async def echoed_logprobs(
    model: "Model", completion: "Completion", in_thread: Callable[[Callable[[], PromptLogprobs]], Awaitable[Any]]
) -> list[PromptLogprobs | None]:
    """Of each prompt, its tokens' log-probabilities, where echo and logprobs ask for them."""
    if not completion.echo or completion.logprobs is None:
        return [None] * len(completion.prompts)
    count = completion.logprobs
    return [await in_thread(partial(prompt_logprobs, model, each.token_ids, count)) for each in completion.prompts]


def prompt_logprobs(model: "Model", token_ids: Any, count: int) -> PromptLogprobs:
    """Each token's log-probability given those before it, with the `count` likeliest ones; None for the first token."""
    texts = model._tokenizer.detokenizer_or_warn()

    def name(token: int) -> str | None:
        return None if texts is None else texts.token_text(token)

    if len(token_ids) < 2:
        return [None] * len(token_ids)
    if count == 0:
        scores = model.score(token_ids).tolist()
        chosen = zip(token_ids[1:].tolist(), scores, strict=True)
        return [None, *({token: Logprob(score, None, name(token))} for token, score in chosen)]
    logits = np.asarray(model.forward(token_ids))
    count = min(count, logits.shape[1])
    found: PromptLogprobs = [None]
    for begin in range(0, len(token_ids) - 1, _ROWS):
        rows = logits[begin : begin + _ROWS][: len(token_ids) - 1 - begin].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        best = np.argpartition(-rows, count - 1, axis=1)[:, :count]
        for row, tokens, token in zip(rows, best, token_ids[begin + 1 :].tolist(), strict=False):
            ranked = sorted(tokens.tolist(), key=lambda each: (-row[each], each))
            entry = {each: Logprob(float(row[each]), rank, name(each)) for rank, each in enumerate(ranked, start=1)}
            entry.setdefault(token, Logprob(float(row[token]), None, name(token)))
            found.append(entry)
    return found
