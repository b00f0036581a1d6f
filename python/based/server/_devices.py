"""`based serve --devices`: a process for each device, behind one address.

This process has the clients' connections, and no model. Each worker is a server of its own at a Unix socket, in a
folder that nobody else may enter. Named states are files that all of them share.
"""

import asyncio
import contextlib
import ctypes
import os
import pickle
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httptools

from based.server import _logs
from based.server._options import Options
from based.server._relay import (
    Ask,
    Front,
    Head,
    Taker,
    Told,
    make_front_app,
    not_answering,
    not_ready,
    worker_ended,
    worker_options,
)
from based.server._routing import Prefixes
from based.server._run import serve, serve_host, short_address
from based.server._service import Host

if TYPE_CHECKING:
    from based import Engine, Model

_ATTEMPTS = 3
"""Starts of a worker that has run before, one after the other, that may fail."""

_SECONDS_TO_END = 60.0
"""Behind --drain-timeout: for a worker to write what it has and to end."""

_SECONDS_IN_HASTE = 10.0
"""The same behind a second signal."""

_SECONDS_TO_TELL = 5.0
"""For a worker's answer to what is asked of all of them: whoever scrapes metrics waits 10 s."""

_SECONDS_BETWEEN_LOOKS = 2.0
"""At a worker, whether it answers."""

_READY, _ENDING = b"+", b"-"
"""What a worker writes when it takes requests, and when it takes no more; then the pickled error by which it ends, if
there is one."""

_OF_THE_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"date", b"x-request-id"}
"""Headers of an answer that the front makes itself."""

_BEGIN = (
    "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); from based.server._devices import work; work()"
)


def serve_devices(
    loads: "list[tuple[str, Callable[[], tuple[Model, Engine]]]]", prepare: Callable[[], None], options: Options
) -> None:
    """Serves until SIGTERM or SIGINT, and then until what runs has ended.

    Args:
        loads: Of each worker: its device, and what loads the model there, which can be pickled.
        prepare: What is done, or refused, once for all before they begin; called in a thread.
        options: Where and how.

    Raises:
        OSError: The address cannot be used, or a file of the options not be read.
        Exception: What `prepare` raised, or why a worker could not begin.
    """
    _logs.set_up(options.log_json)
    with tempfile.TemporaryDirectory(prefix="based-") as folder:
        states = options.state_dir or Path(folder) / "states"
        shared = replace(options, state_dir=states, shared_states=True, states_may_go=options.state_dir is None)
        front = Devices(loads, prepare, shared, Path(folder))
        serve_host(front, make_front_app(front))


@dataclass(eq=False, slots=True)
class _Worker:
    name: str
    load: Any
    socket: Path | None = None
    """Of the process that runs now."""
    process: asyncio.subprocess.Process | None = None
    is_ready: bool = False
    is_silent: bool = False
    """It hangs: it did not answer when it was asked last."""
    num_ready: int = 0
    """How often it has become so."""
    num_starts: int = 0
    num_requests: int = 0

    @property
    def takes_requests(self) -> bool:
        """Whether it is there and answers."""
        return self.is_ready and not self.is_silent


class Devices(Front, Host):
    """The workers of this machine, and who of them answers."""

    def __init__(
        self,
        loads: "list[tuple[str, Callable[[], tuple[Model, Engine]]]]",
        prepare: Callable[[], None],
        options: Options,
        folder: Path,
    ) -> None:
        """As serve_devices. folder: for sockets."""
        devices = [device for device, _ in loads]
        names = [
            device if devices.count(device) == 1 else f"{device}-{devices[:number].count(device)}"
            for number, device in enumerate(devices)
        ]
        self._workers = [_Worker(name, load) for name, (_, load) in zip(names, loads, strict=True)]
        self._prepare = prepare
        self._folder = folder
        self._prefixes = Prefixes()
        self._keepers: list[asyncio.Task[None]] = []
        super().__init__(options)

    # ---- their life --------------------------------------------------------------------------------------------------

    def start(self, when_loaded: Callable[[], None], when_failed: Callable[[], None]) -> None:
        """Prepares in a thread, and starts the workers then."""
        loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self._when_failed = when_failed

        def prepare() -> None:
            try:
                self._prepare()
            except BaseException as error:
                self.failure = error
                when_failed()
                return
            when_loaded()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(begin)

        def begin() -> None:
            if not self.is_draining:
                self._keepers = [asyncio.create_task(self._keep(worker)) for worker in self._workers]

        threading.Thread(target=prepare, name="based-prepare", daemon=True).start()

    async def _keep(self, worker: _Worker) -> None:
        """Starts a worker, and again whenever it ends."""
        num_failed = 0
        while not self.is_draining:
            num_ready = worker.num_ready
            try:
                failure = await self._run(worker)
            except OSError as error:  # no process, for want of memory
                failure = error
            if self.is_draining:
                return
            num_failed = 0 if worker.num_ready > num_ready else num_failed + 1
            if num_failed and (worker.num_ready == 0 or num_failed == _ATTEMPTS):
                _logs.LOGGER.error("%s", f"{worker.name}: the process cannot begin, so that this server ends")
                self.failure = self.failure or failure
                self._when_failed()
                return
            _logs.LOGGER.error("%s", f"{worker.name}: {failure}; it is started again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), 2.0**num_failed - 1)

    async def _run(self, worker: _Worker) -> Exception:
        """Runs a worker's process to its end; why it ended."""
        self._prefixes.forget(worker)
        worker.num_starts += 1
        worker.socket = self._folder / f"{worker.name}.{worker.num_starts}"
        options = replace(worker_options(self.options, worker.name), socket=worker.socket)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _BEGIN, f"based serve: {worker.name}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # Ctrl-C is for this process, which tells the workers
        )
        worker.process = process
        watching = asyncio.create_task(self._watch(worker))
        if self.is_draining:
            _signal(worker, signal.SIGTERM)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(pickle.dumps(sys.path) + pickle.dumps((worker.load, options, os.getpid())))
            process.stdin.close()
            while (told := await process.stdout.read(1)) in (_READY, _ENDING):
                worker.is_ready = told == _READY
                worker.num_ready += worker.is_ready
            told += await process.stdout.read()
            await process.wait()
        except BaseException:
            _signal(worker, signal.SIGKILL)
            raise
        finally:
            watching.cancel()
            worker.process, worker.is_ready, worker.is_silent = None, False, False
            worker.socket.unlink(missing_ok=True)
        status = process.returncode or 0
        if status == 1 and told:
            failure: Exception = pickle.loads(told)
            return failure
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return ChildProcessError(f"the process of {worker.name} ended {how}")

    async def _watch(self, worker: _Worker) -> None:
        """Sees whether a worker answers. One that hangs gets no requests until it does again."""
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            if not worker.is_ready:
                continue
            was_silent, worker.is_silent = worker.is_silent, await self._tell(worker, "/health") is None
            if worker.is_ready and worker.is_silent != was_silent:
                silent = f"does not answer within {_SECONDS_TO_TELL:g} s: the others get its requests"
                _logs.LOGGER.error("%s", f"{worker.name}: {silent if worker.is_silent else 'answers again'}")

    async def drain(self, is_urgent: asyncio.Event) -> None:
        """Each worker drains itself; one that does not end is killed."""
        self.is_draining = True
        self._ending.set()
        if self.num_requests:
            _logs.info(f"requests that have {self.options.drain_seconds:g} s to end: {self.num_requests}")
        for worker in self._workers:
            _signal(worker, signal.SIGTERM)
        everyone: asyncio.Future[Any] = asyncio.gather(*self._keepers, return_exceptions=True)
        urgent = asyncio.create_task(is_urgent.wait())
        seconds = self.options.drain_seconds + _SECONDS_TO_END
        await asyncio.wait([everyone, urgent], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if urgent.done():
            for worker in self._workers:
                _signal(worker, signal.SIGINT)
            await asyncio.wait({everyone}, timeout=_SECONDS_IN_HASTE)
        urgent.cancel()
        for worker in self._workers:
            if worker.process is not None:
                _logs.LOGGER.error("%s", f"{worker.name}: the process does not end, and is killed")
                _signal(worker, signal.SIGKILL)
        for error in await everyone:
            if isinstance(error, Exception):
                self.failure = self.failure or error

    def close(self) -> None:
        """Nothing is left to end."""

    # ---- their answers -----------------------------------------------------------------------------------------------

    async def answer(self, ask: Ask, taker: Taker) -> None:
        """By the worker that has the longest beginning of the prompt; while none is ready, by any that says so."""
        tried: set[_Worker] = set()
        while True:
            there = [
                worker
                for worker in self._workers
                if worker.socket is not None and not worker.is_silent and worker not in tried
            ]
            if not there:
                raise not_answering() if any(worker.is_silent for worker in self._workers) else not_ready()
            ready = {worker: worker.num_requests for worker in there if worker.is_ready}
            loads = ready or dict.fromkeys(there, 0)
            worker = self._prefixes.choose(ask.beginnings if ready else [], loads)
            worker.num_requests += 1
            try:
                if await _exchange(worker, ask, taker):
                    return
                tried.add(worker)
            except (OSError, httptools.HttpParserError) as error:
                raise worker_ended(worker.name) from error
            finally:
                worker.num_requests -= 1

    async def statuses(self) -> dict[str, str]:
        """What this process knows of each."""
        return {
            worker.name: "not answering" if worker.is_silent else "ok" if worker.is_ready else "loading"
            for worker in self._workers
        }

    async def ask_all(self, path: str) -> list[Told]:
        """At once."""
        told = await asyncio.gather(*(self._tell(worker, path) for worker in self._workers))
        return [one for one in told if one is not None]

    async def _tell(self, worker: _Worker, path: str) -> Told | None:
        whole = _Whole()
        try:
            async with asyncio.timeout(_SECONDS_TO_TELL):
                is_there = await _exchange(worker, Ask("GET", path), whole)
        except (OSError, httptools.HttpParserError):  # TimeoutError, too
            return None
        return Told(worker.name, whole.status, bytes(whole.body)) if is_there else None

    def gauges(self) -> dict[str, tuple[str, str, Any]]:
        """Of the workers, as this process sees them."""

        def each(value: Callable[[_Worker], int]) -> dict[tuple[tuple[str, str], ...], float]:
            return {(("worker", worker.name),): value(worker) for worker in self._workers}

        return {
            "worker_ready": ("gauge", "Whether a worker takes requests.", each(lambda worker: worker.takes_requests)),
            "worker_requests": ("gauge", "Requests that a worker answers.", each(lambda worker: worker.num_requests)),
            "worker_starts_total": ("counter", "Starts of a worker.", each(lambda worker: worker.num_starts)),
        }


def _signal(worker: _Worker, number: signal.Signals) -> None:
    if worker.process is not None:
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(number)


# ---- HTTP to a worker ------------------------------------------------------------------------------------------------


async def _exchange(worker: _Worker, ask: Ask, taker: Taker) -> bool:
    """Sends a request, and gives its answer to the taker as it comes. False: there is nobody to ask.

    Raises OSError and HttpParserError when the answer is not whole. Cancelled, it ends the connection.
    """
    if worker.socket is None:
        return False
    try:
        with short_address(worker.socket) as path:
            transport, exchange = await asyncio.get_running_loop().create_unix_connection(
                lambda: _Exchange(ask, taker), path
            )
    except OSError:
        return False
    try:
        await exchange.end
    finally:
        transport.abort()
    return True


class _Exchange(asyncio.Protocol):
    """A connection of one request. On the event loop."""

    def __init__(self, ask: Ask, taker: Taker) -> None:
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ask, self._taker = ask, taker
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._is_whole = False
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        ask = self._ask
        headers = {"host": "localhost", "connection": "close", "content-length": str(len(ask.body)), **ask.headers}
        head = f"{ask.method} {ask.target} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers.items()
        )
        transport.write(head.encode("latin-1") + b"\r\n" + ask.body)
        self._transport = transport
        self._taker.on_room = transport.resume_reading

    def data_received(self, data: bytes) -> None:
        if self.end.done():
            return
        try:
            self._parser.feed_data(data)
            if self._body:
                self._taker.take(b"".join(self._body))
                self._body.clear()
        except Exception as error:
            self.end.set_exception(error)
            return
        if self._is_whole:
            self.end.set_result(None)
        elif self._taker.is_full:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.end.done():
            self.end.set_exception(exc or ConnectionError("the answer is not whole"))

    # ---- of the parser -----------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _OF_THE_CONNECTION:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._taker.take(Head(self._parser.get_status_code(), self._headers))
        self._is_whole = self._ask.method == "HEAD"

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._is_whole = True


class _Whole(Taker):
    """Keeps an answer."""

    is_full = False

    def __init__(self) -> None:
        self.status, self.body = 0, bytearray()

    def take(self, piece: Head | bytes) -> None:
        if isinstance(piece, Head):
            self.status = piece.status
        else:
            self.body += piece


# ---- in a worker's process -------------------------------------------------------------------------------------------


def work() -> None:
    """The life of a worker: what it is told on stdin; that it is ready, and why it ends, on stdout."""
    load, options, parent = pickle.load(sys.stdin.buffer)
    _end_with(parent)
    with os.fdopen(os.dup(1), "wb") as told:
        os.dup2(2, 1)  # what others print is no answer

        def show(message: Any, *_: Any, **__: Any) -> None:
            _logs.LOGGER.warning("%s", message)

        def tell(what: bytes) -> None:
            told.write(what)
            told.flush()

        warnings.showwarning = show
        try:
            serve(load, options, when_loaded=partial(tell, _READY), when_ending=partial(tell, _ENDING))
        except Exception as error:
            told.write(_pickled(error))
            sys.exit(1)


def _end_with(parent: int) -> None:
    """This process ends when its parent does, however that ends: files of states are whole at any time."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it has ended before
        sys.exit(1)


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # of a class whose instances are not made from their args
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
