"""Opens the socket, loads the model, serves until a signal, and ends in order."""

import asyncio
import contextlib
import gc
import http
import os
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from based.server import _logs
from based.server._app import make_app
from based.server._errors import ApiError, to_json
from based.server._options import Options
from based.server._service import Host, Service

if TYPE_CHECKING:
    from based import Engine, Model

_SECONDS_TO_LEAVE = 5  # for connections, behind the last answer


def serve(
    load: "Callable[[], tuple[Model, Engine]]",
    options: Options,
    *,
    when_listening: Callable[[str], None] | None = None,
    when_loaded: Callable[[], None] = lambda: None,
    when_ending: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, and then until what runs has ended.

    Args:
        load: Gives the model and its engine; called in a thread, while the socket is open.
        options: Where and how.
        when_listening: Called with the server's address.
        when_loaded: Called in a thread when requests are taken.
        when_ending: Called when they are taken no more.

    Raises:
        OSError: The address cannot be used, or a file of the options not be read.
        BaseException: What `load` raised.
    """
    _logs.set_up(options.log_json, options.worker)
    service = Service(load, options)
    serve_host(
        service, make_app(service), when_listening=when_listening, when_loaded=when_loaded, when_ending=when_ending
    )


def serve_host(
    host: Host,
    app: ASGIApp,
    *,
    when_listening: Callable[[str], None] | None = None,
    when_loaded: Callable[[], None] = lambda: None,
    when_ending: Callable[[], None] = lambda: None,
) -> None:
    """As serve(), of anything that is served; app: its application."""
    options = host.options
    with contextlib.closing(_listen(options)) as sock:

        def freeze_then_tell() -> None:
            gc.collect()
            gc.freeze()
            when_loaded()

        server = make_server(host, app, freeze_then_tell, when_ending)
        if options.socket is None:
            address, port = sock.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            url = f"{'http' if options.certificate is None else 'https'}://{shown}:{port}"
            _logs.info(f"listening on {url}, loading {options.model_name}")
            if when_listening is not None:
                when_listening(url)
        with _short_pauses():
            asyncio.run(server.serve([sock]))
    host.close()
    if host.failure is not None:
        raise host.failure


@contextlib.contextmanager
def _short_pauses() -> Iterator[None]:
    """Keeps tokens from waiting for other work of this process.

    Threads take turns each millisecond: some read long prompts. What is there when the model is loaded is frozen then:
    to go through it takes a garbage collection about 20 ms.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, 0.001))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


def make_server(
    service: Host,
    app: ASGIApp,
    when_loaded: Callable[[], None] = lambda: None,
    when_ending: Callable[[], None] = lambda: None,
) -> "Server":
    """The server of an application, which has not begun. Raises OSError for files of TLS."""
    options = service.options
    tls: dict[str, Any] = {}
    if options.certificate is not None:
        tls = {"ssl_certfile": options.certificate, "ssl_keyfile": options.key}
        if options.ca_certificates is not None:
            tls |= {"ssl_ca_certs": options.ca_certificates, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        app,
        http=protocol_class(options.limits.header_bytes, options.limits.read_seconds, service.head_refused),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=options.socket is not None,  # whoever may use it says for which client it asks
        forwarded_allow_ips="*",
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_LEAVE,
        **tls,
    )
    config.load()
    return Server(config, service, when_loaded, when_ending)


def _listen(options: Options) -> socket.socket:
    """A socket that takes connections. Raises OSError."""
    if options.socket is not None:
        with short_address(options.socket) as path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(path)
        sock.listen(2048)
        sock.setblocking(False)
        return sock
    family, kind, protocol, _, address = socket.getaddrinfo(
        options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{error.strerror}: {options.host}:{options.port}") from error
    return sock


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """Another name of a Unix socket, in less than the 108 bytes that it may have."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Server(uvicorn.Server):
    """uvicorn's, which loads the model when it has begun, and drains it at the end."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Host,
        when_loaded: Callable[[], None],
        when_ending: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._when_loaded, self._when_ending = when_loaded, when_ending
        self._num_signals = 0
        self._is_urgent = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to load when the socket is open."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()

        def when_failed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.stop)

        self._service.start(self._when_loaded, when_failed)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers new requests with 503 until those that run have ended, and closes the socket then."""
        self._when_ending()
        clock = asyncio.create_task(self._keep_time())
        await self._service.drain(self._is_urgent)
        clock.cancel()
        await super().shutdown(sockets)

    async def _keep_time(self) -> None:
        """The header Date, which uvicorn's main loop sets until the end begins."""
        while True:
            await self.on_tick(0)
            await asyncio.sleep(1)

    def stop(self) -> None:
        """Makes it end as a signal does. On the event loop."""
        self._service.is_draining = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal drains, the second one ends what runs at once.

        To a worker SIGTERM says the one, and SIGINT the other: it may have SIGTERM from its front and from who ends all
        processes of a service.
        """
        loop = asyncio.get_running_loop()
        is_worker = self._service.options.worker is not None

        def on_signal(number: int) -> None:
            self._num_signals += 1
            _logs.info(f"{signal.Signals(number).name}: shutting down")
            self.stop()
            if number == signal.SIGINT if is_worker else self._num_signals > 1:
                self._is_urgent.set()

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
            signals.append(signal.SIGHUP)
        try:
            for each in signals:
                loop.add_signal_handler(each, on_signal, each)
        except (ValueError, RuntimeError):  # not the main thread, which alone gets signals
            signals = []
        try:
            yield
        finally:
            for each in signals:
                loop.remove_signal_handler(each)


def _write_part(cycle: RequestResponseCycle, data: bytes) -> Awaitable[None] | None:
    """As `send` of a part of a body, without a coroutine."""
    if cycle.disconnected:
        return None
    if cycle.chunked_encoding:
        data = b"%x\r\n%b\r\n" % (len(data), data)
    else:
        cycle.expected_content_length -= len(data)
        if cycle.expected_content_length < 0:
            raise RuntimeError("the body is longer than its Content-Length")
    cycle.transport.write(data)
    return cycle.flow.drain() if cycle.flow.write_paused else None


def protocol_class(
    max_header_bytes: int, seconds: float, when_refused: Callable[[int, str], str]
) -> type[HttpToolsProtocol]:
    """The HTTP protocol of uvicorn, with a bound on the bytes of a request's head and on the time that it takes.

    when_refused: Told the status and the message of a head that is refused; gives the request's id.
    """

    class Protocol(HttpToolsProtocol):
        _head_bytes = 0
        _deadline: asyncio.TimerHandle | None = None
        _is_in_head = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_here()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._is_in_head:
                self._head_bytes += len(data)
                if self._head_bytes > max_header_bytes:
                    # What counts are the bytes of the head: with it, much of a body may have come.
                    head = data.find(b"\r\n\r\n")
                    seen = self._head_bytes - len(data) + (len(data) if head < 0 else head)
                    if seen > max_header_bytes:
                        self._refuse(431, f"the head of the request has more than {max_header_bytes} bytes")
                        return
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if not self._is_in_head:  # another request on this connection
                self._is_in_head, self._head_bytes = True, 0
                self._await_head()

        def on_headers_complete(self) -> None:
            self._head_is_here()
            super().on_headers_complete()
            if self.cycle is not None:
                self.scope["based.write"] = partial(_write_part, self.cycle)  # type: ignore[typeddict-unknown-key]

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is no valid HTTP/1.1 request")

        def _refuse(self, status: int, message: str) -> None:
            self._head_is_here()
            if self.cycle is None or self.cycle.response_complete:  # else its answer is on the way
                body = to_json(ApiError(status, message, code="invalid_http").body())
                head = (
                    f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\nx-request-id: {when_refused(status, message)}\r\n"
                    "connection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + body)
            self.transport.close()

        def _await_head(self) -> None:
            self._head_is_here()
            self._is_in_head = True
            self._deadline = self.loop.call_later(seconds, self._head_is_late)

        def _head_is_late(self) -> None:
            if not self.transport.is_closing():
                if self._head_bytes:
                    self._refuse(408, f"the head of the request did not arrive within {seconds:g} s")
                else:
                    self.transport.close()

        def _head_is_here(self) -> None:
            self._is_in_head = False
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
