"""The model and its engine behind the routes: loading, running completions, states, metrics, and the end."""

import asyncio
import contextlib
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import based
from based._outputs import RequestOutput, StreamChunk
from based.server import _logs
from based.server._bodies import Body, parse_object
from based.server._errors import ApiError, invalid
from based.server._metrics import Metrics
from based.server._options import Options
from based.server._requests import Completion, read_completion, sampling_error, takes_no_time
from based.server._scoring import PromptLogprobs, echoed_logprobs
from based.server._states import StateStore

if TYPE_CHECKING:
    from based import Engine, Model

T = TypeVar("T")

_LONGEST_WAIT = 60  # seconds that Retry-After names
_SHORT = 32 << 10  # bytes of a body that the event loop may read: they take less than a thread is waited for


class Face:
    """What clients meet: one model in this process, or several workers."""

    def __init__(self, options: Options, metrics: Metrics) -> None:
        self.options = options
        self.started = time.time()
        self.metrics = metrics
        self.is_draining = False

    def require(self) -> Any:
        """Raises ApiError when the server is about to end."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})

    def head_refused(self, status: int, message: str) -> str:
        """Counts and logs a request whose head is no HTTP, too large or too slow; the request's id."""
        identity = secrets.token_hex(8)
        self.metrics.count_response("other", status)
        if self.options.log_requests:
            fields = {"status": status, "request_id": identity, "error": message}
            _logs.info(f"a request refused with {status}: {message} [{identity}]", fields)
        return identity


class Host(Face, ABC):
    """The same with a life of its own: what a server of this process loads and ends."""

    failure: BaseException | None = None
    """Why the model could not be loaded."""

    @abstractmethod
    def start(self, when_loaded: Callable[[], None], when_failed: Callable[[], None]) -> None:
        """Begins to load, on the event loop; calls one of the two, from any thread, when that is done."""

    @abstractmethod
    async def drain(self, is_urgent: asyncio.Event) -> None:
        """Waits for what runs, for at most `drain_seconds` or until it is urgent, and ends the rest."""

    @abstractmethod
    def close(self) -> None:
        """The end, behind the event loop. Blocks."""


class Service(Host):
    """One model, loaded while the server answers already that it is loading."""

    def __init__(self, load: "Callable[[], tuple[Model, Engine]]", options: Options) -> None:
        super().__init__(options, Metrics(options.metrics_prefix, options.model_name, self._gauges))
        self._load = load
        self._loaded: tuple[Model, Engine, StateStore] | None = None
        self._loading: threading.Thread | None = None
        self._num_requests = 0
        self._running: set[Running] = set()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="based-request")
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="based-score")  # one prompt's logits at a time

    # ---- loading and ending ----------------------------------------------------------------------------------------

    def start(self, when_loaded: Callable[[], None], when_failed: Callable[[], None]) -> None:
        """Loads the model in a thread, which calls one of the two at its end."""

        def load() -> None:
            try:
                begin = time.perf_counter()
                model, engine = self._load()
                options = self.options
                states = StateStore(
                    model,
                    options.state_dir,
                    max_states=options.max_states,
                    max_bytes=options.max_state_bytes,
                    max_files=options.max_state_files,
                    warn=lambda line: _logs.LOGGER.warning("%s", line),
                    shared=options.shared_states,
                    may_go=options.states_may_go,
                )
                _ = model.tokenizer  # found out now whether it can be read
                self._loaded = model, engine, states
                _logs.info(
                    f"{options.model_name} is ready after {time.perf_counter() - begin:.1f} s: "
                    f"{model.num_parameters / 1e6:,.1f} M parameters, {model.dtype} on {model.device}, "
                    f"{engine.stats().max_batch_size} sequences at once"
                )
                when_loaded()
            except BaseException as error:
                self.failure = error
                when_failed()

        self._loading = threading.Thread(target=load, name="based-load", daemon=True)
        self._loading.start()

    @property
    def is_ready(self) -> bool:
        """The model is loaded, and the server is not about to end."""
        return self._loaded is not None and not self.is_draining

    @property
    def vocab_size(self) -> int | None:
        """Of the model; None while there is none."""
        return None if self._loaded is None else self._loaded[0].config.vocab_size

    def require(self) -> "tuple[Model, Engine, StateStore]":
        """What is loaded. Raises ApiError while it is not, and when the server is about to end."""
        super().require()
        if self._loaded is None:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"retry-after": "2"})
        return self._loaded

    async def drain(self, is_urgent: asyncio.Event) -> None:
        """Waits for what runs, for at most `drain_seconds` or until it is urgent, and ends the rest."""
        self.is_draining = True
        if self._num_requests:
            _logs.info(f"requests that have {self.options.drain_seconds:g} s to end: {self._num_requests}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._until_idle(is_urgent), self.options.drain_seconds)
        left = len(self._running)
        for running in list(self._running):
            running.cancel()
        if left:
            _logs.LOGGER.warning("%s", f"requests ended by the shutdown: {left}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until_idle(asyncio.Event()), 5)

    async def _until_idle(self, is_urgent: asyncio.Event) -> None:
        while self._num_requests and not is_urgent.is_set():
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Saves the states and ends the engine. Blocks."""
        self.is_draining = True
        if self._loading is not None:
            self._loading.join(self.options.drain_seconds)
        if self._loaded is None:
            return
        _, engine, states = self._loaded
        engine.close(drain=False)
        self._pool.shutdown(wait=True)
        self._scoring.shutdown(wait=True)
        count, problems = states.save_all()
        if count:
            _logs.info(f"states saved in {self.options.state_dir}: {count}")
        for problem in problems:
            _logs.LOGGER.error("%s", problem)
        if lost := states.num_unsaved:
            _logs.LOGGER.warning(
                "%s", f"states in memory that end with this process (--state-dir would keep them): {lost}"
            )

    # ---- work ------------------------------------------------------------------------------------------------------

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Work that would keep the event loop from other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def enter(self) -> None:
        """Counts a request that computes. Raises ApiError when there are too many; leave() ends it."""
        if self._num_requests >= self.options.limits.requests:
            raise self.busy(f"{self._num_requests} requests are under way, the most of this server")
        self._num_requests += 1

    def leave(self) -> None:
        """The end of a request that entered."""
        self._num_requests -= 1

    async def begin(self, data: bytes) -> "Running":
        """Reads a completion, and hands it to the engine. Raises ApiError."""
        self.require()
        if len(data) > _SHORT:
            running = await self.in_thread(lambda: self._begin(parse_object(data)))
        elif takes_no_time(body := parse_object(data)):
            running = self._begin(body)
        else:
            running = await self.in_thread(partial(self._begin, body))
        self._running.add(running)
        return running

    def _begin(self, body: Body) -> "Running":
        model, engine, states = self.require()
        completion = read_completion(body, model, self.options.model_name, self.options.limits, states.get)
        running = Running(self, model, states, completion)
        if completion.max_tokens == 0:
            return running
        try:
            for prompt in completion.prompts:
                running.requests.append(
                    engine.submit(
                        prompt.token_ids,
                        completion.params,
                        priority=completion.priority,
                        timeout=completion.timeout,
                        state=completion.state,
                        keep_state=completion.save_as is not None,
                        every_token=completion.stream or bool(completion.params.stop),
                    )
                )
        except BaseException as error:
            running.cancel()
            raise self._refused(error) from error
        return running

    def _refused(self, error: BaseException) -> BaseException:
        """What the engine's refusal is to a client."""
        if isinstance(error, based.EngineBusyError):
            return self.busy(str(error))
        if isinstance(error, based.EngineClosedError):
            return ApiError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})
        if isinstance(error, based.StateError):
            return ApiError(409, str(error), param="state_id", code="wrong_state")
        if isinstance(error, based.UnsupportedError):
            return invalid(str(error), code="unsupported")
        if isinstance(error, based.Error):
            return error
        if isinstance(error, TypeError | ValueError):
            refused = sampling_error(error)
            refused.param = refused.param or "prompt"
            return refused
        if isinstance(error, MemoryError):
            return self.busy(f"memory is short: {error}")
        return error

    def busy(self, message: str) -> ApiError:
        """Too much at once: 429, and when to come again."""
        return ApiError(429, message, code="busy", headers={"retry-after": str(self._seconds_to_wait())})

    def _seconds_to_wait(self) -> int:
        """About when one of the requests that run has ended: the mean time of a request, over those at once."""
        buckets, total = self.metrics.histograms["e2e_request_latency_seconds"].cumulative()
        count = buckets[-1][1]
        mean = total / count if count else 1.0
        return min(max(math.ceil(mean / max(self._num_requests, 1)), 1), _LONGEST_WAIT)

    async def echoed(self, running: "Running") -> list[PromptLogprobs | None]:
        """As echoed_logprobs. Raises ClientGoneError when the request was cancelled."""

        async def score(work: Callable[[], PromptLogprobs]) -> PromptLogprobs:
            if running.is_cancelled:
                raise ClientGoneError
            return await asyncio.get_running_loop().run_in_executor(self._scoring, work)

        return await echoed_logprobs(running.model, running.completion, score)

    def ended(self, running: "Running") -> None:
        """Counts a request at its end, however it ended."""
        self._running.discard(running)

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _gauges(self) -> dict[str, tuple[str, str, Any]]:
        loaded = self._loaded
        found: dict[str, tuple[str, str, Any]] = {
            "http_requests_running": ("gauge", "Requests over HTTP that compute or wait.", self._num_requests),
        }
        if loaded is None:
            return found
        model, engine, states = loaded
        stats = engine.stats()
        cached, cache = stats.cached_tokens, stats.cache

        def by_tier(name: str) -> dict[tuple[tuple[str, str], ...], float]:
            tiers = {"device": cache.device, "host": cache.host, "files": cache.files}
            return {(("tier", tier),): getattr(found, name) for tier, found in tiers.items()}

        number, nbytes = states.in_memory
        found |= {
            "num_requests_running": ("gauge", "Samples that run.", stats.running),
            "num_requests_waiting": ("gauge", "Requests that wait for a slot.", stats.waiting_requests),
            "num_waiting_tokens": ("gauge", "Tokens of the prompts of waiting requests.", stats.waiting_tokens),
            "max_num_seqs": ("gauge", "Samples that may run at once.", stats.max_batch_size),
            "num_preemptions_total": ("counter", "Running requests that were put back: none ever is.", 0),
            "prompt_tokens_total": ("counter", "Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens_total": ("counter", "Tokens generated.", stats.generated_tokens),
            "prompt_tokens_cached_total": ("counter", "Tokens of prompts that were taken from a state.", cached),
            "prompt_tokens_by_source_total": (
                "counter",
                "Tokens of prompts, computed or taken from a state.",
                {
                    (("source", "local_compute"),): stats.prompt_tokens - cached,
                    (("source", "local_cache_hit"),): cached,
                },
            ),
            "prefix_cache_queries_total": ("counter", "Tokens of prompts that were looked for.", cache.query_tokens),
            "prefix_cache_hits_total": ("counter", "Tokens of prompts that were found.", cache.hit_tokens),
            "cached_states": ("gauge", "States of prompts that are kept.", by_tier("num_states")),
            "cached_states_bytes": ("gauge", "Their bytes.", by_tier("nbytes")),
            "cached_states_max_bytes": ("gauge", "The most that they may take.", by_tier("max_nbytes")),
            "cache_hit_tokens_total": ("counter", "Tokens that were found there.", by_tier("hit_tokens")),
            "cache_stored_tokens_total": ("counter", "Tokens that new states save.", by_tier("stored_tokens")),
            "cache_evicted_tokens_total": ("counter", "Tokens of states given up.", by_tier("evicted_tokens")),
            "cache_errors_total": (
                "counter",
                "States that could not be copied to the host or to a file, and files that are no state.",
                cache.num_failed_copies + cache.num_refused_files,
            ),
            "steps_total": ("counter", "Steps of the engine.", stats.steps),
            "iteration_tokens_total": ("counter", "Tokens of all steps.", stats.step_tokens),
            "named_states": ("gauge", "States of clients in memory.", number),
            "named_states_bytes": ("gauge", "Their bytes.", nbytes),
            "named_states_lost_total": ("counter", "States lost for want of memory.", states.num_evicted),
            "memory_bytes": (
                "gauge",
                "Memory of the device, by use.",
                {
                    (("use", "weights"),): model.memory.weights,
                    (("use", "states"),): model.memory.states,
                    (("use", "workspace"),): model.memory.workspace,
                },
            ),
        }
        return found


class ClientGoneError(Exception):
    """The client went away: there is nobody to answer."""


class Running:
    """A completion under way: the engine's requests, one for each prompt. On the event loop, but for cancel()."""

    def __init__(self, service: Service, model: "Model", states: StateStore, completion: Completion) -> None:
        self.completion = completion
        self.model = model
        self.requests: list[Any] = []
        self.is_cancelled = False
        self.arrival = time.monotonic()
        self.num_tokens: list[dict[int, int]] = [{} for _ in completion.prompts]
        """Generated tokens, by sample of each prompt."""
        self.first_token: float | None = None
        """time.monotonic() of the first token of all."""
        self._service = service
        self._states = states
        self._last: list[dict[int, float]] = [{} for _ in completion.prompts]  # time of the last token, as num_tokens
        self._between_tokens = service.metrics.histograms["inter_token_latency_seconds"]
        self._counted = False
        self._num_finished = 0

    def cancel(self) -> None:
        """Ends it at the engine's next step."""
        self.is_cancelled = True
        for request in self.requests:
            request.cancel()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.completion.prompts)

    @property
    def num_cached_tokens(self) -> int:
        """Of all prompts, that were not computed."""
        return sum(request.num_cached_tokens or 0 for request in self.requests)

    @property
    def num_generated(self) -> int:
        """Tokens so far."""
        return sum(sum(samples.values()) for samples in self.num_tokens)

    async def outputs(self) -> list[RequestOutput]:
        """Waits for all of it. Raises what the engine raises."""
        outputs: list[RequestOutput] = list(await asyncio.gather(*(request.wait() for request in self.requests)))
        for number, output in enumerate(outputs):
            self.num_tokens[number] = {sample.index: len(sample.token_ids) for sample in output.outputs}
            for sample in output.outputs:
                self._finish(sample.finish_reason)
            times = self.requests[number].times
            if times.first_token is not None and times.end is not None:
                for count in self.num_tokens[number].values():
                    self._service.metrics.count_tokens_not_streamed(times.end - times.first_token, count)
        return outputs

    def listen(self, on_news: Callable[[int], None]) -> None:
        """Has on_news(prompt) called on this event loop when chunks of a prompt are new, and at its end.

        It must not raise.
        """
        for number, request in enumerate(self.requests):
            request._listen(partial(on_news, number))

    def take(self, number: int) -> StreamChunk | None:
        """The next chunk of a prompt, which is counted; None while there is none."""
        chunk: StreamChunk | None = self.requests[number]._take()
        if chunk is not None:
            self._count(number, chunk)
        return chunk

    def is_taken(self, number: int) -> bool:
        """Whether no more chunks of a prompt will come. Raises what the engine raises."""
        taken: bool = self.requests[number]._is_read()
        return taken

    def _count(self, number: int, chunk: StreamChunk) -> None:
        if chunk.token_ids:
            index, now = chunk.index, time.monotonic()
            samples, times = self.num_tokens[number], self._last[number]
            samples[index] = samples.get(index, 0) + 1
            if (before := times.get(index)) is not None:
                self._between_tokens.add(now - before)
            times[index] = now
        if chunk.finish_reason is not None:
            self._finish(chunk.finish_reason)

    def _finish(self, reason: str) -> None:
        self._service.metrics.finished[reason] += 1
        self._num_finished += 1

    async def keep_state(self) -> str | None:
        """Keeps the state behind the answer, if it is asked for; its name."""
        name = self.completion.save_as
        if name is None:
            return None
        state = self.requests[0].state
        if state is None:  # it failed or was cancelled
            return None
        await self._service.in_thread(partial(self._states.add, name, state))
        return name

    def end(self) -> None:
        """Counts it. However it ended: what still runs is cancelled."""
        if self._counted:
            return
        self._counted = True
        self._service.ended(self)
        self._service.metrics.finished["abort"] += len(self.requests) * self.completion.params.n - self._num_finished
        for number, request in enumerate(self.requests):
            times = request.times
            if times.end is None:
                request.cancel()
            if times.first_token is not None and (self.first_token is None or times.first_token < self.first_token):
                self.first_token = times.first_token
            prompt = self.completion.prompts[number]
            counts = list(self.num_tokens[number].values())
            self._service.metrics.count_request(times, len(prompt.token_ids), request.num_cached_tokens or 0, counts)
