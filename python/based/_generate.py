"""From requests to text: runs the core's generator and turns its tokens into chunks."""

import functools
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np

from based import _core
from based._outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, StreamChunk
from based._prompts import as_array
from based._text import Detokenizer, IncrementalDecoder, StopStringFinder
from based._tokenizer import LazyTokenizer

Params: TypeAlias = _core.SamplingParams | Iterable[_core.SamplingParams] | None
"""The same for all prompts (None: the defaults), or one each."""


@dataclass(slots=True)
class Request:
    """A prompt in both forms (text None when ids were given) and how to continue it."""

    text: str | None
    token_ids: Any
    params: _core.SamplingParams
    at_start: bool = True
    """The prompt begins its sequence."""
    index: int = 0
    """Position among the prompts."""
    error: str | None = None
    """What is wrong with the prompt; token_ids is empty then."""


@dataclass(slots=True, frozen=True)
class PromptReader:
    """How a model and its sessions read prompts."""

    tokenizer: LazyTokenizer
    config: _core.ModelConfig
    split_special_tokens: bool = False
    """A special token's text in a prompt is letters like any other."""
    max_context: int | None = None
    """The most tokens that a sequence may have."""

    def read(self, prompt: Any, *, at_start: bool = True) -> Any:
        """Token ids of a text; anything else as it is. An empty prompt that begins a sequence is the bos token."""
        prompt = as_array(prompt)
        if isinstance(prompt, str):
            if not prompt and not at_start:
                return []  # goes on, with a tokenizer or without one
            split = self.split_special_tokens
            prompt = self.tokenizer.encode(prompt, at_start=at_start, split_special_tokens=split)
        is_listed = isinstance(prompt, list | tuple) or (isinstance(prompt, np.ndarray) and prompt.ndim > 0)
        if at_start and self.bos is not None and is_listed and len(prompt) == 0:
            return [self.bos]
        return prompt

    @property
    def bos(self) -> int | None:
        """The token that starts a text; None if the model's vocabulary has none."""
        bos = self.config.bos_token_id
        return bos if bos is not None and bos < self.config.vocab_size else None

    def check_context(self, num_tokens: int, what: str) -> None:
        """Raises ValueError, which begins with `what`, when a sequence cannot have so many tokens."""
        if self.max_context is not None and num_tokens > self.max_context:
            is_longest = self.max_context == self.config.max_tokens
            raise ValueError(
                f"{what}: {num_tokens} tokens are more than the model's max_context, {self.max_context} tokens: "
                + ("a layer's max_length allows no more" if is_longest else "load it with a greater one")
            )

    def new_sequence(self, index: int, prompt: Any, params: _core.SamplingParams, *, may_fail: bool) -> Request:
        """A request of a sequence that starts. may_fail: the request says what is wrong with the prompt."""
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            self.tokenizer.require("a text prompt")
        try:
            ids = _core.check_prompt(self.read(prompt), self.config.vocab_size, f"prompt {index}")
            self.check_context(len(ids), f"prompt {index}")
        except (TypeError, ValueError) as error:
            if not may_fail:
                raise
            return Request(text, [], params, index=index, error=str(error))
        return Request(text, ids, params, index=index)


def make_requests(
    prompts: Sequence[Any], params: Params, reader: PromptReader, at_start: Sequence[bool]
) -> list[Request]:
    """Requests of prompts that must all be right."""
    pairs = zip(pair_params(prompts, params), at_start, strict=True)
    return [
        Request(prompt if isinstance(prompt, str) else None, reader.read(prompt, at_start=starts), each, starts, index)
        for index, ((prompt, each), starts) in enumerate(pairs)
    ]


def pair_params(prompts: Iterable[Any], params: Params) -> Iterator[tuple[Any, _core.SamplingParams]]:
    """Each prompt with its params: the same for all (None: the defaults), or one each."""
    if params is None:
        params = _core.SamplingParams()
    if not isinstance(params, Iterable) or isinstance(params, (Mapping, str)):
        one = _check_params(params)
        return ((prompt, one) for prompt in prompts)
    if isinstance(prompts, Sequence):
        params = [_check_params(item) for item in params]
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} SamplingParams")
    return _zip_params(prompts, iter(params))


def _zip_params(prompts: Iterable[Any], params: Iterator[Any]) -> Iterator[tuple[Any, _core.SamplingParams]]:
    for count, prompt in enumerate(prompts):
        found = [_check_params(item) for item in itertools.islice(params, 1)]
        if not found:
            raise ValueError(f"more than {count} prompts, but {count} SamplingParams")
        yield prompt, found[0]


def _check_params(params: Any) -> _core.SamplingParams:
    if isinstance(params, _core.SamplingParams):
        return params
    hint = ": write based.SamplingParams(**params)" if isinstance(params, Mapping) else ""
    raise TypeError(f"params must be SamplingParams, not {type(params).__name__}{hint}")


P = ParamSpec("P")
R = TypeVar("R")


def names_sampling_fields(method: Callable[P, R]) -> Callable[P, R]:
    """Makes a sampling parameter that is given to the method itself an error that says where it belongs."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if isinstance(getattr(_core.SamplingParams, name, None), property):
                raise TypeError(
                    f"{method.__name__} takes no {name}: it is a sampling parameter, "
                    f"{method.__name__}(…, based.SamplingParams({name}=…))"
                )
        return method(*args, **kwargs)

    return wrapper


_FINISH: dict[_core.FinishReason, FinishReason | None] = {
    _core.FinishReason.none: None,
    _core.FinishReason.stop: "stop",
    _core.FinishReason.length: "length",
    _core.FinishReason.error: "error",
}


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
        self._eos_token_id = eos_token_id
        self._tokenizer = tokenizer
        self._running: dict[int, tuple[Request, list[Sample]]] = {}
        self.num_running = 0
        """Samples that have not ended."""
        for number, request in enumerate(requests):
            self._begin(number, request)

    def add(self, request: Request) -> None:
        """One more request, which starts a sequence. Not of a session's run."""
        self._begin(self._generator.add(request.token_ids, request.params), request)

    def _begin(self, number: int, request: Request) -> None:
        if request.params.stop:
            self._tokenizer.require("a stop string")
        wants_text = request.text is not None or request.params.stop
        loaded = self._tokenizer.detokenizer() if wants_text else self._tokenizer.detokenizer_or_warn()
        samples = [Sample(request, i, loaded, self._eos_token_id) for i in range(request.params.n)]
        self._running[number] = (request, samples)
        self.num_running += len(samples)

    def chunks(self) -> Generator[tuple[int, StreamChunk], None, None]:
        """(request, chunk), a chunk per token, until all have finished.

        When it is closed or raises, a session is left having seen every token that was yielded.
        """
        generator = self._generator
        try:
            while not generator.done():
                for event in generator.next():
                    sample = self._running[event.request][1][event.sample]
                    chunk = sample.add(
                        event.token,
                        event.logprob,
                        event.top_logprobs,
                        _FINISH[event.finish],
                        event.stop_token,
                        event.error,
                    )
                    if chunk.finish_reason is not None:
                        self.num_running -= 1
                    sample.num_read += len(chunk.token_ids)
                    yield event.request, chunk
                    if chunk.finish_reason is not None and event.finish is _core.FinishReason.none:
                        generator.finish(event.request, event.sample)
        except BaseException:
            if self._continues_session:
                for request, (_, samples) in self._running.items():
                    generator.finish(request, 0, samples[0].num_read)
            raise

    def outputs(self, on_chunk: Callable[[StreamChunk], None] | None = None) -> Iterator[RequestOutput]:
        """Each request's output as it ends; between two of them `add` may be called."""
        for number, chunk in self.chunks():
            request, samples = self._running[number]
            sample = samples[chunk.index]
            sample.output.add(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
            if chunk.finish_reason is not None and all(sample.output.ended for sample in samples):
                yield request_output(request, samples)
                del self._running[number]

    def collect(self) -> list[RequestOutput]:
        """Runs to the end; outputs in the order of the requests, of which there must be no more."""
        return sorted(self.outputs(), key=lambda output: output.index)

    def cancel(self) -> None:
        """Makes chunks() raise soon, wherever it is. From any thread."""
        self._generator.cancel()


def run_all(
    start: Callable[[list[Request]], Run],
    requests: Iterator[Request],
    max_batch_size: int,
    on_chunk: Callable[[StreamChunk], None] | None = None,
) -> Iterator[RequestOutput]:
    """Each request's output as it ends, a wrong prompt's at once. Takes two batches of requests at most ahead."""
    ahead = 2 * max_batch_size
    first: list[Request] = []
    size = 0
    for request in requests:
        if request.error is not None:
            yield failed_output(request)
            continue
        first.append(request)
        size += request.params.n
        if size >= ahead:
            break
    if not first:
        return
    run = start(first)
    for output in run.outputs(on_chunk):
        while run.num_running < ahead and (more := next(requests, None)) is not None:
            if more.error is not None:
                yield failed_output(more)
            else:
                run.add(more)
        yield output


def in_order(outputs: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
    """The outputs of prompts 0, 1, …, each as soon as those before it are there."""
    early: dict[int, RequestOutput] = {}
    wanted = 0
    for output in outputs:
        early[output.index] = output
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def request_output(request: Request, samples: "Sequence[Sample]") -> RequestOutput:
    """What the samples, all of which have ended, were given."""
    return _output_of(request, [sample.output.completion() for sample in samples])


def _output_of(request: Request, completions: list[CompletionOutput]) -> RequestOutput:
    return RequestOutput(request.text, [int(token) for token in request.token_ids], completions, request.index)


def failed_output(request: Request) -> RequestOutput:
    """That of a wrong prompt."""
    logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
    failed = [CompletionOutput(i, "", [], 0.0, logprobs, "error", None, request.error) for i in range(request.params.n)]
    return _output_of(request, failed)


class Sample:
    """One sample's tokens, turned into chunks."""

    def __init__(self, request: Request, index: int, texts: Detokenizer | None, eos_token_id: int | None) -> None:
        params = self._params = request.params
        self.output = Output(index)
        self.num_read = 0  # tokens whose chunks were yielded
        self.ended = False
        self.waits_for_state = False
        """It has ended; its state is still to come."""
        self.num_tokens = 0
        self._index = index
        self._texts = texts
        self._eos_token_id = None if params.ignore_eos else eos_token_id
        stops = params.stop
        with_hidden = []
        self._hidden: dict[int, str] = {}  # the texts of special tokens, where stop strings may hold them
        self._decoder = None
        if texts is not None:
            self._decoder = IncrementalDecoder(
                texts, request.token_ids, skip_special_tokens=params.skip_special_tokens, at_start=request.at_start
            )
            if params.skip_special_tokens and (with_hidden := [stop for stop in stops if texts.holds_special(stop)]):
                self._hidden = texts.special
        self._stops = StopStringFinder(
            stops, include=params.include_stop_str_in_output, with_hidden=frozenset(with_hidden)
        )

    def add(
        self,
        token: int,
        logprob: float,
        top_logprobs: Sequence[tuple[int, float]] | None,
        finish: FinishReason | None,
        stop_token: int | None,
        error: str,
    ) -> StreamChunk:
        """The chunk of a token, or of an end without one."""
        if finish == "error" or finish == "abort":
            chunk = self._failed(finish, error)
        else:
            self.num_tokens += 1
            chunk = self._chunk(token, logprob, top_logprobs, finish, stop_token)
        self.ended = chunk.finish_reason is not None
        return chunk

    def _chunk(
        self,
        token: int,
        logprob: float,
        top_logprobs: Sequence[tuple[int, float]] | None,
        finish: FinishReason | None,
        stop_token: int | None,
    ) -> StreamChunk:
        chunk = StreamChunk(self._index, "", [token], logprob, self._logprobs(token, logprob, top_logprobs or ()))
        ended = finish is not None
        if ended:
            chunk.finish_reason = finish
            chunk.stop_reason = stop_token if stop_token != self._eos_token_id else None
        if self._decoder is None:
            return chunk
        # A stop token's own text belongs to the output no more than a stop string does.
        unseen = stop_token is not None and not self._params.include_stop_str_in_output
        text = "" if unseen else self._decoder.add(token)
        if ended:
            text += self._decoder.flush()
        may_stop = self.num_tokens >= self._params.min_tokens
        hidden = "" if unseen else self._hidden.get(token, "")
        chunk.text, stop = self._stops.add(text, may_stop=may_stop, hidden=hidden)
        if stop is not None:
            chunk.finish_reason, chunk.stop_reason = "stop", stop
        elif ended:
            chunk.text += self._stops.flush()
        return chunk

    def _failed(self, finish: FinishReason, error: str) -> StreamChunk:
        """The last chunk of a sample that cannot go on, with the text that was held back."""
        text = "" if self._decoder is None else self._decoder.flush()
        text, _ = self._stops.add(text, may_stop=False)
        logprobs: list[dict[int, Logprob]] | None = None if self._params.logprobs is None else []
        return StreamChunk(self._index, text + self._stops.flush(), [], 0.0, logprobs, finish, None, error)

    def _logprobs(
        self, token: int, logprob: float, top_logprobs: Sequence[tuple[int, float]]
    ) -> list[dict[int, Logprob]] | None:
        if self._params.logprobs is None:
            return None
        top = {
            each: Logprob(value, rank, self._token_text(each))
            for rank, (each, value) in enumerate(top_logprobs, start=1)
        }
        top.setdefault(token, Logprob(logprob, None, self._token_text(token)))
        return [top]

    def _token_text(self, token: int) -> str | None:
        return None if self._texts is None else self._texts.token_text(token)


class Output:
    """One sample's chunks as a whole."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._last: StreamChunk | None = None

    @property
    def ended(self) -> bool:
        return self._last is not None

    def add(self, chunk: StreamChunk) -> None:
        self._text.append(chunk.text)
        self._token_ids += chunk.token_ids
        self._logprobs += chunk.logprobs or ()
        self._cumulative_logprob += chunk.logprob
        if chunk.finish_reason is not None:
            self._last = chunk

    def completion(self) -> CompletionOutput:
        last = self._last
        assert last is not None and last.finish_reason is not None
        return CompletionOutput(
            index=self._index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=self._cumulative_logprob,
            logprobs=None if last.logprobs is None else self._logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
        )


class ProgressBar:
    """A line on stderr: samples finished, tokens, tokens per second."""

    def __init__(self, num_samples: int) -> None:
        from tqdm import tqdm

        form = "{n_fmt}/{total_fmt} samples{postfix}"
        self._bar: Any = tqdm(total=num_samples, bar_format=form, miniters=0, file=sys.stderr)
        self._tokens = 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, chunk: StreamChunk) -> None:
        """Counts a chunk of any sample."""
        self._tokens += len(chunk.token_ids)
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{self._tokens} tokens, {rate:.1f} tokens/s", refresh=False)
        self._bar.update(chunk.finish_reason is not None)
