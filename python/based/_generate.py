"""From requests to text: runs the core's generator and turns its tokens into chunks."""

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from based import _core
from based._outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from based._text import IncrementalDecoder, StopStringFinder
from based._tokenizer import LazyTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


QUICK = 1 << 14
"""Characters, or tokens, of a prompt that takes some milliseconds to prepare."""


@dataclass(slots=True)
class Request:
    """A prompt in both forms (text None when ids were given) and how to continue it."""

    text: str | None
    token_ids: Any
    params: _core.SamplingParams


def make_requests(
    prompts: Sequence[Any],
    params: _core.SamplingParams | Sequence[_core.SamplingParams] | None,
    tokenizer: LazyTokenizer,
    add_special_tokens: Sequence[bool],
) -> list[Request]:
    """Pairs prompts with params, which may be one for all, and tokenizes what is text."""
    if params is None:
        params = _core.SamplingParams()
    each = [params] * len(prompts) if isinstance(params, _core.SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(each)} SamplingParams")
    for item in each:
        if not isinstance(item, _core.SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {type(item).__name__}")
    return [
        Request(
            prompt if isinstance(prompt, str) else None, encode(prompt, tokenizer, add_special_tokens=special), item
        )
        for prompt, item, special in zip(prompts, each, add_special_tokens, strict=True)
    ]


def encode(prompt: Any, tokenizer: LazyTokenizer, *, add_special_tokens: bool) -> Any:
    """Token ids of a text; anything else as it is."""
    if not isinstance(prompt, str):
        return prompt
    loaded = tokenizer.require("a text prompt")
    if len(prompt) > QUICK:  # a batch lets other threads run Python; encode() does not
        ids: list[int] = loaded.encode_batch_fast([prompt], add_special_tokens=add_special_tokens)[0].ids
    else:
        ids = loaded.encode(prompt, add_special_tokens=add_special_tokens).ids
    return ids


class Run:
    """Requests on their way through a core generator."""

    def __init__(
        self,
        core: "_core.Model | _core.Session",
        eos_token_id: int | None,
        requests: list[Request],
        tokenizer: LazyTokenizer,
        max_batch_size: int = 1,
    ) -> None:
        """Continues the sequences of a session, or starts new ones of a model, `max_batch_size` at a time."""
        ids, params = [r.token_ids for r in requests], [r.params for r in requests]
        self._continues_session = isinstance(core, _core.Session)
        if isinstance(core, _core.Session):
            self._generator = _core.Generator(core, ids, params)
        else:
            self._generator = _core.Generator(core, ids, params, max_batch_size)
        self.requests = requests
        wants_text = any(r.text is not None or r.params.stop for r in requests)
        if any(r.params.stop for r in requests):
            tokenizer.require("a stop string")
        loaded = tokenizer.get() if wants_text else tokenizer.get_or_warn()
        self._samples = [[_Sample(r, i, loaded, eos_token_id) for i in range(r.params.n)] for r in requests]

    def chunks(self) -> Generator[tuple[int, StreamChunk], None, None]:
        """(request, chunk), a chunk per token, until all have finished.

        When it is closed or raises, a session is left having seen every token that was yielded.
        """
        generator = self._generator
        read = True
        try:
            while not generator.done():
                read = False
                for event in generator.next():
                    chunk = self._samples[event.request][event.sample].add(event)
                    read = True
                    yield event.request, chunk
                    if chunk.finish_reason is not None and event.finish is _core.FinishReason.none:
                        generator.finish(event.request, event.sample)
        except BaseException:
            if self._continues_session:
                for request in range(len(self.requests)):
                    generator.finish(request, 0, unread=not read)
            raise

    def collect(self, *, progress: bool = False) -> list[RequestOutput]:
        """Runs to the end."""
        chunks: list[list[list[StreamChunk]]] = [[[] for _ in range(r.params.n)] for r in self.requests]
        shown = progress and sys.stderr is not None and sys.stderr.isatty()
        with _ProgressBar(sum(r.params.n for r in self.requests)) if shown else contextlib.nullcontext() as bar:
            for request, chunk in self.chunks():
                chunks[request][chunk.index].append(chunk)
                if bar is not None:
                    bar.add_token(finished=chunk.finish_reason is not None)
        return [
            RequestOutput(request.text, [int(token) for token in request.token_ids], [_join(c) for c in samples])
            for request, samples in zip(self.requests, chunks, strict=True)
        ]

    def cancel(self) -> None:
        """Makes chunks() raise soon, wherever it is. From any thread."""
        self._generator.cancel()


async def asynchronously(prepared: "Run | Callable[[], Run]") -> AsyncIterator[StreamChunk]:
    """chunks() of a run, or of one that is made in a thread; each step in a thread.

    When cancelled, waits for the step under way, which stops early.
    """
    import asyncio

    run = prepared if isinstance(prepared, Run) else await asyncio.to_thread(prepared)
    chunks = run.chunks()
    step: asyncio.Future[tuple[int, StreamChunk] | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
            item = await asyncio.shield(step)
            if item is None:
                return
            yield item[1]
    finally:
        if step is not None and not step.done():
            run.cancel()
            await asyncio.gather(step, return_exceptions=True)
        chunks.close()


class _Sample:
    """One sample's tokens, turned into chunks."""

    def __init__(self, request: Request, index: int, tokenizer: "Tokenizer | None", eos_token_id: int | None) -> None:
        self._index = index
        self._params = request.params
        self._tokenizer = tokenizer
        self._eos_token_id = None if request.params.ignore_eos else eos_token_id
        self._num_tokens = 0
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, request.token_ids)
        self._stops = StopStringFinder(request.params.stop, include=request.params.include_stop_str_in_output)

    def add(self, event: _core.TokenEvent) -> StreamChunk:
        if event.finish is _core.FinishReason.error:
            return self._failed(event.error)
        self._num_tokens += 1
        ended = event.finish is not _core.FinishReason.none
        chunk = StreamChunk(self._index, "", [event.token], event.logprob, self._logprobs(event))
        if ended:
            chunk.finish_reason = "stop" if event.finish is _core.FinishReason.stop else "length"
            chunk.stop_reason = event.stop_token if event.stop_token != self._eos_token_id else None
        if self._decoder is None:
            return chunk
        # A stop token's own text belongs to the output no more than a stop string does.
        hidden = event.stop_token is not None and not self._params.include_stop_str_in_output
        text = "" if hidden else self._decoder.add(event.token)
        if ended:
            text += self._decoder.flush()
        may_stop = self._num_tokens >= self._params.min_tokens
        chunk.text, stop = self._stops.add(text, may_stop=may_stop)
        if stop is not None:
            chunk.finish_reason, chunk.stop_reason = "stop", stop
        elif ended:
            chunk.text += self._stops.flush()
        return chunk

    def _failed(self, error: str) -> StreamChunk:
        """The last chunk of a sample that cannot go on, with the text that was held back."""
        text = "" if self._decoder is None else self._decoder.flush()
        text, _ = self._stops.add(text, may_stop=False)
        logprobs: list[dict[int, Logprob]] | None = None if self._params.logprobs is None else []
        return StreamChunk(self._index, text + self._stops.flush(), [], 0.0, logprobs, "error", None, error)

    def _logprobs(self, event: _core.TokenEvent) -> list[dict[int, Logprob]] | None:
        if self._params.logprobs is None:
            return None
        top = {
            token: Logprob(logprob, rank, self._decode(token))
            for rank, (token, logprob) in enumerate(event.top_logprobs, start=1)
        }
        top.setdefault(event.token, Logprob(event.logprob, None, self._decode(event.token)))
        return [top]

    def _decode(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text


def _join(chunks: list[StreamChunk]) -> CompletionOutput:
    """One sample's chunks as a whole."""
    last = chunks[-1]
    assert last.finish_reason is not None
    return CompletionOutput(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        cumulative_logprob=sum(chunk.logprob for chunk in chunks),
        logprobs=None if last.logprobs is None else [entry for chunk in chunks for entry in chunk.logprobs or ()],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
    )


class _ProgressBar:
    """A line on stderr: samples finished, tokens, tokens per second."""

    def __init__(self, num_samples: int) -> None:
        from tqdm import tqdm

        form = "{n_fmt}/{total_fmt} samples{postfix}"
        self._bar: Any = tqdm(total=num_samples, bar_format=form, miniters=0, file=sys.stderr)
        self._tokens = 0

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add_token(self, *, finished: bool) -> None:
        self._tokens += 1
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{self._tokens} tokens, {rate:.1f} tokens/s", refresh=False)
        self._bar.update(finished)
