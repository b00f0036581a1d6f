"""What generation returns, under vLLM's names."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error", "abort"]
"""error: this sample cannot go on, and `error` says why; other samples and requests are not concerned. abort: a request
of an engine was cancelled, was too late or was shut down, and `error` says which."""


@dataclass(slots=True, frozen=True)
class Logprob:
    """Log-probability of one token under the model's own distribution."""

    logprob: float
    rank: int | None
    """1 is the likeliest; None for a chosen token that is not among the `logprobs` likeliest."""
    decoded_token: str | None
    """None without a tokenizer."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample of one request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    """Per token, the likeliest tokens and the chosen one; None unless SamplingParams.logprobs is set."""
    finish_reason: FinishReason
    stop_reason: int | str | None
    """The token of stop_token_ids or the stop string that ended it; None for the model's end token."""
    error: str | None = None
    """Why it did not go on, when finish_reason is "error" or "abort"; text and token_ids have what came before."""


@dataclass(slots=True)
class RequestOutput:
    """All samples of one request."""

    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    """Empty when the prompt was refused: every output then has finish_reason "error"."""
    outputs: list[CompletionOutput]
    index: int = field(default=0, compare=False)
    """Position of the prompt among those that were given."""


@dataclass(slots=True)
class StreamChunk:
    """What one new token adds to sample `index`."""

    index: int
    text: str
    """May be empty: while a character is incomplete, or while a stop string may be beginning."""
    token_ids: list[int]
    """The new token; empty when finish_reason is "error" or "abort"."""
    logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None = None
    """Set on a sample's last chunk."""
    stop_reason: int | str | None = None
    error: str | None = None
    """Why there is no token, when finish_reason is "error" or "abort"."""
