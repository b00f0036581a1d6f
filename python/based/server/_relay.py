"""One application for several workers of one model: a worker answers, and what is asked of all is joined.

A worker is a process of this machine (`_devices`), or a replica of Ray's (`based.ray`).
"""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import based
from based.server import _app
from based.server._answers import DONE
from based.server._errors import ApiError, to_json
from based.server._metrics import Metrics
from based.server._options import Options
from based.server._routing import fingerprints, made_by, of_state
from based.server._service import Face

_LARGE = 1 << 18  # bytes of a body that the event loop does not parse
_OWN_HEADERS = 1 << 16
"""Bytes of a request's head that the front may add."""

FRONT = "front"
"""The label `worker` of this process's own numbers."""


class Head(NamedTuple):
    """How an answer begins."""

    status: int
    headers: list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, as a worker gets it."""

    method: str
    target: str
    """Path and query, as the client has sent them."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    beginnings: list[bytes] = field(default_factory=list)
    """Of a completion's prompt: `fingerprints`."""


class Taker(ABC):
    """Whom a worker's answer is given as it comes. On the event loop."""

    on_room: Callable[[], None] | None = None
    """Called when it is full no more; set by who gives the answer."""

    @property
    @abstractmethod
    def is_full(self) -> bool:
        """It keeps what it is given now: better wait for on_room."""

    @abstractmethod
    def take(self, piece: Head | bytes) -> None:
        """The head, then parts of the body."""


class Told(NamedTuple):
    """A worker's answer to what is asked of all."""

    worker: str
    status: int
    body: bytes


class Front(Face, ABC):
    """What stands between clients and workers."""

    def __init__(self, options: Options) -> None:
        metrics = Metrics(options.metrics_prefix, options.model_name, self.gauges, of_requests=False)
        super().__init__(options, metrics)
        self.num_requests = 0
        """That wait for a worker's answer."""

    @abstractmethod
    async def answer(self, ask: Ask, taker: Taker) -> None:
        """Gives a worker's answer to the taker.

        Where the client goes away this is cancelled, and then the worker ends the request. Raises ApiError when the
        worker does not answer, or not to the end.
        """

    @abstractmethod
    async def statuses(self) -> dict[str, str]:
        """Of each worker: "ok", or what it does instead."""

    @abstractmethod
    async def ask_all(self, path: str) -> list[Told]:
        """GETs a path of each worker that is there."""

    def gauges(self) -> dict[str, tuple[str, str, Any]]:
        """As Metrics wants them."""
        return {}


def make_front_app(front: Front) -> ASGIApp:
    """The application: one server's, of which a worker answers all but what is about all workers."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    _app._add_errors(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/ping", methods=["GET", "HEAD"])
    async def health() -> Response:
        found = await front.statuses()
        is_ready = "ok" in found.values() and not front.is_draining
        silent = "not answering" in found.values()
        other = "shutting down" if front.is_draining else "not answering" if silent else "loading"
        status = "ok" if is_ready else other
        return _app._json_response({"status": status, "workers": found}, 200 if is_ready else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        pages = [(told.worker, told.body) for told in await front.ask_all("/metrics") if told.status == 200]
        pages.append((FRONT, await asyncio.to_thread(front.metrics.text)))
        text = await asyncio.to_thread(joined_metrics, pages)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/server_info", methods=["GET", "HEAD"])
    async def server_info() -> Response:
        front.require()
        told = await front.ask_all("/server_info")
        workers = [{"worker": one.worker, **json.loads(one.body)} for one in told if one.status == 200]
        if not workers:
            raise not_ready()
        return _app._json_response(_joined_info(workers, time.time() - front.started))

    @app.api_route("/v1/states", methods=["GET", "HEAD"])
    async def states() -> Response:
        front.require()
        lists = [json.loads(one.body)["data"] for one in await front.ask_all("/v1/states") if one.status == 200]
        if not lists:
            raise not_ready()
        found: dict[str, Any] = {}
        for state in (state for each in lists for state in each):
            if state["in_memory"] or state["id"] not in found:  # who has it in memory knows its bytes there
                found[state["id"]] = state
        data = sorted(found.values(), key=lambda state: (-state["created"], state["id"]))
        return _app._json_response({"object": "list", "data": data})

    async def relay(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        front.require()
        body = await _app._read(request, front, needs_body=False) if request.method == "POST" else b""
        beginnings: list[bytes] = []
        path = request.url.path
        if path.startswith("/v1/states/"):
            beginnings = [*made_by(body), of_state(path.split("/")[3])]
        elif path == "/v1/completions":
            in_thread = len(body) > _LARGE
            beginnings = await asyncio.to_thread(fingerprints, body) if in_thread else fingerprints(body)
        front.require()  # again: reading took its time
        await _Relayed(front, _ask(request, body, beginnings))(scope, receive, send)

    app.router.default = relay  # what is at no path above
    return _app.layers(app, front)


def _ask(request: Request, body: bytes, beginnings: list[bytes]) -> Ask:
    scope = request.scope
    raw: bytes = scope.get("raw_path") or request.url.path.encode()
    query: bytes = scope["query_string"]
    headers = {"x-request-id": scope["based.id"]}
    if (kind := request.headers.get("content-type")) is not None:
        headers["content-type"] = kind
    if scope.get("client"):
        headers["x-forwarded-for"] = scope["client"][0]
    return Ask(scope["method"], (raw + (b"?" + query if query else b"")).decode("latin-1"), headers, body, beginnings)


def not_ready() -> ApiError:
    """No worker can answer now."""
    return ApiError(503, "the model is being loaded", code="loading", headers={"retry-after": "2"})


def not_answering() -> ApiError:
    """All workers that could answer hang."""
    return ApiError(
        503,
        "no process of this server answers: send it again later",
        code="not_answering",
        headers={"retry-after": "5"},
    )


def worker_ended(name: str) -> ApiError:
    """What a client is told whose request a worker has not answered to the end."""
    return ApiError(
        503,
        f"the process of {name}, which answered this request, has ended; another one takes its place: send it again",
        code="worker_ended",
        headers={"retry-after": "1"},
    )


class _Relayed(Response):
    """A worker's answer, passed on piece by piece."""

    def __init__(self, front: Front, ask: Ask) -> None:
        super().__init__()
        self._front = front
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._front.num_requests += 1
        passing = asyncio.create_task(self._pass_on(scope, send))
        watching = asyncio.create_task(_app._until_disconnect(receive))
        try:
            await asyncio.wait({passing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                await passing
            else:
                scope["based.log"]["relayed"] = True  # the worker sees that the client went away, and says so
        finally:
            passing.cancel()
            watching.cancel()
            await asyncio.gather(passing, watching, return_exceptions=True)
            self._front.num_requests -= 1

    async def _pass_on(self, scope: Scope, send: Send) -> None:
        client = _Client(scope, send)
        try:
            await self._front.answer(self._ask, client)
        except ApiError as error:
            scope["based.log"].pop("relayed", None)
            if not client.has_begun:
                raise
            scope["based.log"]["error"] = error.message
            await client.parts.flush()
            if not client.is_stream:  # it stays without an end: a client must not take it for whole
                return
            client.held = b"data: " + to_json(error.body()) + b"\n\n" + DONE
        await client.parts.flush()
        await send(_app._body(client.held, more=False))


class _Client(Taker):
    """Of a stream it gets whole events, so that an error may follow any of them."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.parts = _app.Parts(scope, send, self._has_room)
        self.has_begun = self.is_stream = False
        self.held = b""
        """The beginning of an event."""
        self._log = scope["based.log"]

    @property
    def is_full(self) -> bool:
        return self.parts.is_full

    def take(self, piece: Head | bytes) -> None:
        if isinstance(piece, Head):
            self.is_stream = dict(piece.headers).get(b"content-type", b"").startswith(b"text/event-stream")
            self.has_begun = self._log["relayed"] = True
            self.parts.begin(piece.status, piece.headers)
        elif self.is_stream:
            self.held += piece
            end = self.held.rfind(b"\n\n") + 2
            if end > 1:
                self.parts.write(self.held[:end])
                self.held = self.held[end:]
        else:
            self.parts.write(piece)

    def _has_room(self) -> None:
        if self.on_room is not None:
            self.on_room()


def _joined_info(workers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """/server_info of all: what is alike once, what each does added up, and each by itself."""
    first = workers[0]
    sums = {
        part: {name: sum(worker[part][name] for worker in workers) for name in first[part]}
        for part in ("engine", "states")
    }
    sums["states"]["files"] = first["states"]["files"]
    devices = ",".join(worker["model"]["device"] for worker in workers)
    own = [{name: worker[name] for name in ("worker", "uptime_seconds", "engine", "states")} for worker in workers]
    for each, worker in zip(own, workers, strict=True):
        each["device"] = worker["model"]["device"]
    return {
        "version": based.__version__,
        "uptime_seconds": round(seconds, 3),
        "model": first["model"] | {"device": devices},
        **sums,
        "limits": first["limits"],
        "workers": own,
    }


class _Families:
    """What prometheus_client writes."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._families = families

    def collect(self) -> Iterable[Any]:
        return self._families


def joined_metrics(pages: list[tuple[str, bytes]]) -> bytes:
    """One page of several, in which each number has its worker as a label."""
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Any] = {}
    for name, page in pages:
        for family in text_string_to_metric_families(page.decode()):
            samples = [sample._replace(labels={"worker": name, **sample.labels}) for sample in family.samples]
            family.samples = families[family.name].samples + samples if family.name in families else samples
            families[family.name] = family
    registry: Any = _Families(families.values())
    return generate_latest(registry)


def worker_options(options: Options, name: str) -> Options:
    """The options of a worker. Who may ask is for the front to check, and for the worker to describe."""
    limits = replace(options.limits, header_bytes=options.limits.header_bytes + _OWN_HEADERS)
    return replace(options, worker=name, limits=limits, certificate=None, key=None, ca_certificates=None)
