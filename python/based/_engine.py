"""Continuous batching: one loop in the core runs the requests of all threads and event loops in one batch."""

import contextlib
import functools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from based import _core
from based._generate import PromptReader, Request, Sample, failed_output, request_output
from based._outputs import RequestOutput, StreamChunk
from based._prompts import Prompt, as_array
from based._tokenizer import LazyTokenizer

if TYPE_CHECKING:
    import asyncio

    _Listener: TypeAlias = tuple[asyncio.AbstractEventLoop, Callable[[], None]]
    """Whom to tell of news: what to call, on this loop."""

_PUMP_WAIT = 60.0  # seconds; the end of an engine wakes its pump
_LONGEST_WAIT = threading.TIMEOUT_MAX / 2  # seconds; what a condition can wait for
_MOST_UNREAD = 256
"""Chunks that a reader who has begun may leave unread before its request stops to take steps."""


def _bounded(timeout: float | None) -> float | None:
    """Seconds that can be waited for. Raises ValueError."""
    if timeout is None:
        return None
    if not (isinstance(timeout, (int, float)) and timeout >= 0):  # NaN is not
        raise ValueError(f"timeout is {timeout!r}, expected seconds, at least 0, or None")
    return min(timeout, _LONGEST_WAIT)


@dataclass(slots=True)
class RequestTimes:
    """When what happened to a request, in seconds of time.monotonic(); None: not yet."""

    arrival: float
    scheduled: float | None = None
    """It left the queue."""
    first_token: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class CacheTier:
    """States of a cache in one place: counts since the engine was made, and what it holds now."""

    num_states: int
    nbytes: int
    max_nbytes: int
    hit_tokens: int
    """Found there."""
    stored_tokens: int
    """That its new states save, each from the nearest state before it on."""
    evicted_tokens: int
    """The same of the states that it gave up."""
    num_evicted: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A cache of states."""

    device: CacheTier
    host: CacheTier
    files: CacheTier
    query_tokens: int
    """Of prompts that were looked for."""
    hit_tokens: int
    """Of these, that were found."""
    num_not_stored: int
    """States that found no room."""
    num_not_copied: int
    """States that were not copied to the host or to a file, since too many were waiting."""
    num_failed_copies: int
    num_refused_files: int
    """Files that are damaged, or hold something else than their name says."""
    last_error: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and has done since it was made."""

    running: int
    """Samples."""
    waiting_requests: int
    waiting_tokens: int
    """Of their prompts."""
    slots: int
    """Samples that the memory taken has room for."""
    max_batch_size: int
    step_budget: int
    """Tokens of prompts that the next step may take."""
    prompt_tokens: int
    """Of requests that have begun."""
    cached_tokens: int
    """Of these, that were not computed."""
    generated_tokens: int
    steps: int
    step_tokens: int
    """Of all steps."""
    cache: CacheStats


class EngineRequest:
    """A request on its way; made by `Engine.submit`.

    Read it in one of these ways: `for chunk in r`, `async for chunk in r`, `r.result()`, `await r.wait()`. A request
    that nobody holds any more is cancelled.
    """

    def __init__(
        self, engine: "Engine", request: Request, *, reader_ends: bool, every_token: bool, collects: bool
    ) -> None:
        self._engine = engine
        self._request = request
        self._every_token = every_token
        self._reader_ends = reader_ends  # the core waits for finish() before it gives a state
        self._collects = collects  # for result()
        self._samples = [
            Sample(request, i, engine._texts(request), engine._eos_token_id) for i in range(request.params.n)
        ]
        self._num_open = request.params.n
        self._id = 0
        self._raw: list[tuple[Any, ...]] = []  # events that become chunks when they are read
        self._chunks: deque[StreamChunk] = deque()
        self._failure: BaseException | None = None
        self._news = threading.Condition()
        self._num_sleeping = 0  # threads in _sleep()
        self._listeners: tuple[_Listener, ...] = ()  # changed under _news
        self._reads = self._paused = self._cancelled = False
        self._pausing = threading.Lock()
        self._on_chunk: Callable[[StreamChunk], None] | None = None
        self._on_end: Callable[[EngineRequest], None] | None = None
        self._states: list[_core.State | None] = [None] * request.params.n
        self.num_prompt_tokens = len(request.token_ids)
        self.num_cached_tokens = 0
        """Of the prompt, that were not computed."""
        self.times = RequestTimes(time.monotonic())

    # ---- reading ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[StreamChunk]:
        return self

    def __next__(self) -> StreamChunk:
        """A chunk per new token, as Model.stream gives them."""
        self._reads = True
        while (chunk := self._take()) is None:
            self._sleep(self._has_news)
            if self._is_read():
                raise StopIteration
        return chunk

    def __aiter__(self) -> AsyncIterator[StreamChunk]:
        return self

    async def __anext__(self) -> StreamChunk:
        """As __next__, for an event loop."""
        self._reads = True
        while (chunk := self._take()) is None:
            await self._wait_for_news()
            if self._is_read():
                raise StopAsyncIteration
        return chunk

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the end; what was read as chunks is in it, too. Raises TimeoutError after `timeout` seconds."""
        seconds = _bounded(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.ended:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"the request has not ended after {timeout} seconds")
            self._resume()
            self._sleep(lambda: self.ended, left)
        return self._output()

    async def wait(self) -> RequestOutput:
        """As result, for an event loop."""
        while self._num_open and self._failure is None:
            self._resume()
            await self._wait_for_news(only_end=True)
        if len(self._raw) > _MOST_UNREAD:
            import asyncio

            return await asyncio.to_thread(self._output)
        return self._output()

    def cancel(self) -> None:
        """Ends it at the next step, with finish_reason "abort". No effect on one that has ended. From any thread."""
        self._cancelled = True
        self._engine._core.cancel(self._id, "cancelled")

    @property
    def state(self) -> "_core.State | None":
        """What its first sample has seen, after the end, when keep_state was given: the prompt and all tokens."""
        return self._states[0]

    @property
    def states(self) -> "list[_core.State | None]":
        """The same of every sample."""
        return list(self._states)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._num_open == 0 or self._failure is not None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._id and not self.ended:
                self._engine._forget(self._id)

    def _has_news(self) -> bool:
        return bool(self._chunks or self._raw) or self.ended

    def _is_read(self) -> bool:
        return self.ended and not self._has_unread() and self._raise_failure()

    def _has_unread(self) -> bool:
        return bool(self._chunks or self._raw)

    def _raise_failure(self) -> bool:
        if self._failure is not None:
            raise self._failure
        return True

    def _take(self) -> StreamChunk | None:
        if self._raw and not self._chunks:
            self._read_raw()
        try:
            chunk = self._chunks.popleft()
        except IndexError:
            return None
        if self._paused and len(self._chunks) < _MOST_UNREAD // 4:
            self._resume()
        return chunk

    def _resume(self) -> None:
        with self._pausing:
            if self._paused:
                self._paused = False
                self._engine._core.pause(self._id, False)

    def _pause(self) -> None:
        with self._pausing:
            self._paused = True
            self._engine._core.pause(self._id, True)
        if len(self._chunks) < _MOST_UNREAD // 4 or self._engine._is_draining:  # read, or closed, meanwhile
            self._resume()

    def _output(self) -> RequestOutput:
        self._raise_failure()
        self._read_raw()
        return request_output(self._request, self._samples)

    async def _wait_for_news(self, *, only_end: bool = False) -> None:
        import asyncio  # slow to import, and not for everybody

        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        listener = loop, functools.partial(_set, waiter)
        with self._news:
            self._listeners += (listener,)
        try:
            # Looked for when the pump can see the listener, and not before: then news wakes it, or is here.
            if not (self.ended or (not only_end and self._has_news())):
                await waiter
        finally:
            with self._news:
                self._listeners = tuple(each for each in self._listeners if each is not listener)

    def _listen(self, on_news: Callable[[], None]) -> None:
        """Has on_news called on this event loop for all that is new and for the end: another way to read it.

        That costs less than `async for`, which wakes a task for each token. on_news must not raise; it finds the chunks
        by _take(), and may be called where there are none.
        """
        import asyncio

        self._reads = True
        loop = asyncio.get_running_loop()
        with self._news:
            self._listeners += ((loop, on_news),)
        if self._has_news():
            loop.call_soon(on_news)

    def _sleep(self, is_over: Callable[[], bool], seconds: float | None = None) -> None:
        """In a thread, until it is over, something is new, or the time has passed."""
        with self._news:
            self._num_sleeping += 1
            try:
                if not is_over():  # after the pump can see the sleeper
                    self._news.wait(seconds)
            finally:
                self._num_sleeping -= 1

    # ---- the pump's part -------------------------------------------------------------------------------------------

    def _add(self, event: tuple[Any, ...]) -> None:
        """Takes an event of the core. In the pump."""
        try:
            if self._every_token:
                self._add_chunk(event)
            else:
                self._raw.append(event)
                self._count(event)
        except BaseException as error:
            self._fail(error)

    def _count(self, event: tuple[Any, ...]) -> None:
        """Times, and the end of a sample."""
        (_, sample, token, _, _, finish, _, _, cached, scheduled, now, state) = event
        times = self.times
        if times.scheduled is None:
            times.scheduled = scheduled
            self.num_cached_tokens = cached
        if times.first_token is None and token >= 0:
            times.first_token = now
        if state is not None:
            self._states[sample] = state
        if finish is not None:
            self._close_one(now)

    def _close_one(self, now: float) -> None:
        if self._num_open == 1:
            self.times.end = now
        self._num_open -= 1  # a reader looks at this first: what it is to find is there

    def _add_chunk(self, event: tuple[Any, ...]) -> None:
        (_, index, token, logprob, top, finish, stop_token, error, _, _, now, state) = event
        sample = self._samples[index]
        if sample.ended:  # behind a stop string; or the state, for which the end has waited
            if state is not None:
                self._states[index] = state
            if sample.waits_for_state and finish is not None:
                sample.waits_for_state = False
                self._close_one(now)
            return
        chunk = sample.add(token, logprob, top, finish, stop_token, error)
        if self._collects:
            sample.output.add(chunk)
        self._chunks.append(chunk)
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        if chunk.finish_reason is None:
            self._count(event)
        else:
            ended_here = finish is None  # by a stop string
            reader_ends = self._reader_ends and chunk.finish_reason in ("stop", "length")
            if ended_here or reader_ends:
                self._engine._core.finish(self._id, index, sample.num_tokens)
            sample.waits_for_state = reader_ends
            self._count((*event[:5], None if reader_ends else chunk.finish_reason, *event[6:]))
        stands_still = self._reads and len(self._chunks) > _MOST_UNREAD
        if stands_still and not (self._paused or self.ended or self._engine._is_draining):
            self._pause()

    def _read_raw(self) -> None:
        """Makes chunks of events."""
        events, self._raw = self._raw, []
        for _, index, token, logprob, top, finish, stop_token, error, *_ in events:
            chunk = self._samples[index].add(token, logprob, top, finish, stop_token, error)
            if self._collects:
                self._samples[index].output.add(chunk)
            self._chunks.append(chunk)

    def _fail(self, error: BaseException) -> None:
        """What the reader is to get. The rest is nobody's."""
        self._failure = error
        self._engine._core.cancel(self._id, "its events could not be read")

    def _wake(self) -> "tuple[_Listener, ...]":
        """Wakes threads; returns whom to call. Behind what is new: who comes to sleep looks for that."""
        if self._num_sleeping:
            with self._news:
                self._news.notify_all()
        listeners = self._listeners  # the readers' to take away: they may be others by now
        if self.ended and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)
        return listeners

    def _after_fork(self) -> None:
        """In a forked child: nothing more will come."""
        self._news, self._num_sleeping = threading.Condition(), 0
        if not self.ended:
            self._failure = _core.EngineClosedError("this request runs in the process that forked this one")


class _Inbox:
    """Where the pump finds the requests. It does not keep them, nor the engine."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: dict[int, weakref.ref[EngineRequest]] = {}

    def deliver(self, core: _core.Engine, events: Sequence[tuple[Any, ...]]) -> None:
        changed: dict[int, EngineRequest] = {}
        for event in events:
            id = event[0]
            request = changed.get(id)
            if request is None:
                with self.lock:  # a submit() under way enters it first
                    entry = self.requests.get(id)
                request = None if entry is None else entry()
                if request is None:
                    core.cancel(id, "nobody reads it")
                    continue
                changed[id] = request
            request._add(event)
        by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for id, request in changed.items():
            if request.ended:
                self.requests.pop(id, None)
            for loop, callback in request._wake():
                by_loop.setdefault(loop, []).append(callback)
        for loop, callbacks in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_call_all, callbacks)

    def end(self) -> None:
        """No events are to come."""
        for entry in list(self.requests.values()):
            request = entry()
            if request is not None and not request.ended:
                request._failure = _core.EngineClosedError("the engine has ended")
                for loop, callback in request._wake():
                    with contextlib.suppress(RuntimeError):
                        loop.call_soon_threadsafe(callback)


def _set(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()


def _pump(core: _core.Engine, inbox: _Inbox) -> None:
    """Takes the core's events until the engine has ended."""
    while (events := core.wait(_PUMP_WAIT)) is not None:
        inbox.deliver(core, events)
        del events  # states
    inbox.end()


class Engine:
    """Runs the requests of any number of threads and event loops in one batch. Made by `Model.engine`.

    Requests join and leave while others run. What a request yields does not depend on the others. Close it, or use it
    in a `with` statement: it holds memory for `max_batch_size` states.
    """

    def __init__(
        self,
        model: _core.Model,
        tokenizer: LazyTokenizer,
        max_batch_size: int,
        *,
        max_waiting_requests: int | None = None,
        max_waiting_tokens: int | None = None,
        max_step_tokens: int | None = None,
        elastic: bool = False,
        cache_bytes: int = 0,
        host_cache_bytes: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_dir_bytes: int = 0,
    ) -> None:
        self._core = _core.Engine(
            model,
            max_batch_size,
            max_waiting_requests,
            max_waiting_tokens,
            max_step_tokens,
            elastic,
            cache_bytes,
            host_cache_bytes,
            cache_dir,
            cache_dir_bytes,
        )
        self._tokenizer = tokenizer
        self._config = model.config
        self._max_context = model.max_context
        self._eos_token_id = model.config.eos_token_id
        self._inbox = _Inbox()
        self._pump_thread: threading.Thread | None = None
        self._is_draining = False  # no reader holds a request back
        self._process = os.getpid()
        self.max_batch_size = max_batch_size
        """Samples that run at once."""
        # Python ends while threads wait for results: they are not to be woken by an error then.
        weakref.finalize(self, self._core.shutdown, False, 0.0).atexit = False
        _alive.add(self)

    def submit(
        self,
        prompt: Prompt,
        params: _core.SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        state: "_core.State | None" = None,
        keep_state: bool = False,
        every_token: bool = True,
        split_special_tokens: bool = False,
    ) -> EngineRequest:
        """Puts a request in line and returns at once.

        Args:
            prompt: A text, which is tokenized here, or token ids.
            params: None for the defaults.
            priority: Smaller is sooner. Of equal ones, that comes first which has waited longest for each of its
                prompt's tokens.
            timeout: Seconds from now, after which it ends with finish_reason "abort".
            state: What the sequence has seen before; the prompt may then be empty.
            keep_state: Keep each sample's state at its end, for `state`.
            every_token: False: all chunks come at the end, which costs less.
            split_special_tokens: As Model.generate.

        Raises:
            ValueError, TypeError: The prompt or the parameters are wrong.
            EngineBusyError: The queue is full.
            EngineClosedError: The engine was closed.
        """
        reader = PromptReader(self._tokenizer, self._config, split_special_tokens, self._max_context)
        if params is None:
            params = _core.SamplingParams()
        if not isinstance(params, _core.SamplingParams):
            raise TypeError(f"params must be SamplingParams, not {type(params).__name__}")
        timeout = _bounded(timeout)
        prompt = as_array(prompt)
        if state is None:
            request = reader.new_sequence(0, prompt, params, may_fail=False)
        else:
            if not isinstance(state, _core.State):
                raise TypeError(f"state must be based.State, not {type(state).__name__}")
            request = Request(
                prompt if isinstance(prompt, str) else None,
                reader.read(prompt, at_start=state.num_tokens == 0),
                params,
                at_start=state.num_tokens == 0,
            )
        return self._submit(request, priority, timeout, state, keep_state, every_token)

    def _submit(
        self,
        request: Request,
        priority: int = 0,
        timeout: float | None = None,
        state: "_core.State | None" = None,
        keep_state: bool = False,
        every_token: bool = True,
        on_chunk: Callable[[StreamChunk], None] | None = None,
        on_end: Callable[[EngineRequest], None] | None = None,
        collects: bool = True,
    ) -> EngineRequest:
        if self.is_parents:
            raise _core.EngineClosedError("this engine runs in the process that forked this one: make one here")
        params = request.params
        if params.stop:
            self._tokenizer.require("a stop string")
            every_token = True  # somebody has to look for it
        reader_ends = bool(keep_state and params.stop)
        running = EngineRequest(self, request, reader_ends=reader_ends, every_token=every_token, collects=collects)
        running._on_chunk, running._on_end = on_chunk, on_end
        inbox = self._inbox
        with inbox.lock:
            if self._pump_thread is None:
                thread = threading.Thread(target=_pump, args=(self._core, inbox), name="based-engine", daemon=True)
                thread.start()
                self._pump_thread = thread
            id = self._core.submit(
                request.token_ids, params, priority, timeout, state, keep_state, reader_ends, every_token
            )
            running._id = id
            inbox.requests[id] = weakref.ref(running)
        return running

    @property
    def is_parents(self) -> bool:
        """This process is a child of the one that has it."""
        return self._process != os.getpid()

    def _texts(self, request: Request) -> Any:
        wants_text = request.text is not None or request.params.stop
        return self._tokenizer.detokenizer() if wants_text else self._tokenizer.detokenizer_or_warn()

    def _forget(self, id: int) -> None:
        self._inbox.requests.pop(id, None)
        self._core.cancel(id, "nobody reads it")

    def stats(self) -> EngineStats:
        """What it does now, and has done since it was made."""
        stats: dict[str, Any] = self._core.stats()
        cache: dict[str, Any] = stats["cache"]
        tiers = {name: CacheTier(**cache[name]) for name in ("device", "host", "files")}
        stats["cache"] = CacheStats(**(cache | tiers))
        return EngineStats(**stats)

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that it has. Leaving a `with` block does so.

        Args:
            drain: They run to their ends, also those whose readers stand still. False: they end at the next step, with
                finish_reason "abort".
            timeout: Seconds to wait; None: as long as it takes. What runs then goes on: close(drain=False) ends it.

        Returns:
            Whether all have ended.
        """
        if self.is_parents:
            return True
        timeout = _bounded(timeout)
        self._is_draining = True
        for reference in list(self._inbox.requests.values()):
            if (request := reference()) is not None:
                request._resume()
        return self._core.shutdown(drain, timeout)

    async def aclose(self, drain: bool = True, timeout: float | None = None) -> bool:
        """As close, for an event loop."""
        import asyncio

        return await asyncio.to_thread(self.close, drain, timeout)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> "Engine":
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self.aclose(drain=kind is None)

    def __repr__(self) -> str:
        return f"<based.Engine: {self.max_batch_size} samples at once>"

    def _after_fork(self) -> None:
        """In a forked child, which has none of its threads."""
        self._inbox.lock = threading.Lock()
        for entry in list(self._inbox.requests.values()):
            if (request := entry()) is not None:
                request._after_fork()


def run_requests(
    engine: Engine,
    requests: Iterator[Request],
    ahead: int,
    on_chunk: Callable[[StreamChunk], None] | None = None,
) -> Iterator[RequestOutput]:
    """Each request's output as it ends, a wrong prompt's at once. Takes `ahead` samples at most ahead."""
    ended: queue.SimpleQueue[EngineRequest] = queue.SimpleQueue()
    running: set[EngineRequest] = set()
    num_samples = 0
    try:
        while True:
            while num_samples < ahead and (request := next(requests, None)) is not None:
                if request.error is not None:
                    yield failed_output(request)
                    continue
                running.add(
                    engine._submit(request, every_token=on_chunk is not None, on_chunk=on_chunk, on_end=ended.put)
                )
                num_samples += request.params.n
            if not running:
                return
            done = ended.get()
            running.remove(done)
            num_samples -= done._request.params.n
            yield done._output()
    finally:
        for unread in running:
            unread.cancel()


def stream_request(start: Callable[[], EngineRequest]) -> Generator[StreamChunk, None, None]:
    """Chunks of a request that is submitted when the first one is asked for."""
    request = start()
    try:
        yield from request
    finally:
        if not request.ended:
            request.cancel()


async def astream_request(start: "Callable[[], EngineRequest]", *, in_thread: bool) -> AsyncIterator[StreamChunk]:
    """The same for an event loop; in_thread: starting takes long."""
    import asyncio

    request: EngineRequest | None = None
    try:
        if in_thread:
            starting = asyncio.ensure_future(asyncio.to_thread(start))
            try:
                request = await asyncio.shield(starting)
            except asyncio.CancelledError:
                starting.add_done_callback(_cancel_started)
                raise
        else:
            request = start()
        async for chunk in request:
            yield chunk
    finally:
        if request is not None and not request.ended:
            request.cancel()


def _cancel_started(starting: "asyncio.Future[EngineRequest]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()


_alive: "weakref.WeakSet[Engine]" = weakref.WeakSet()


_making = threading.Lock()


def making() -> threading.Lock:
    """For whoever makes an engine that several threads share."""
    return _making


def _end_after_fork() -> None:
    global _making
    _making = threading.Lock()  # a thread of the parent may have it
    for engine in list(_alive):
        engine._after_fork()


os.register_at_fork(after_in_child=_end_after_fork)
