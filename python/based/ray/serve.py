"""A model behind Ray Serve: `application` makes what `serve.run` and `serve run` take. Needs the extra `ray`."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

    from based.server import _logs
    from based.server._app import make_app
    from based.server._relay import (
        Ask,
        Front,
        Head,
        Taker,
        Told,
        make_front_app,
        not_ready,
        worker_ended,
        worker_options,
    )
except ImportError as error:
    raise ImportError(f'based.ray.serve needs more ({error}): pip install "based[ray]" installs it') from error

from based import load
from based._loading import BUNDLED
from based.ray._data import _with_threads
from based.server._options import Limits, Options
from based.server._routing import Prefixes
from based.server._service import Service

_SECONDS_TO_TELL = 30.0
"""For the replicas' answers to what is asked of all of them."""


def application(
    model: str = BUNDLED,
    *,
    state_dir: str | os.PathLike[str],
    replicas: int | Literal["auto"] = 1,
    gpus: float = 0,
    cpus: float = 1,
    fronts: int = 1,
    name: str | None = None,
    api_keys: Sequence[str] = (),
    limits: Limits | None = None,
    engine: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An application of Ray Serve that answers as `based serve` does.

    Each replica has the model. A request goes to the one that has seen the longest beginning of its prompt, or else to
    the one with the fewest requests.

    Args:
        model: As of `based.load`.
        state_dir: A folder that all replicas see: named states are files in it.
        replicas: How many; "auto": as Ray Serve scales them.
        gpus: Of each replica.
        cpus: Of each replica; the threads of its model where it has no GPU.
        fronts: Processes that read requests and choose replicas. Each remembers what it has sent where.
        name: The model's name to clients; by default `model`.
        api_keys: Clients must send one of them; without any, everyone may ask.
        limits: Of requests.
        engine: Arguments of `Model.engine`.
        options: As of `based.load`.
    """
    served = Options(
        name or model,
        api_keys=list(api_keys),
        allowed_hosts=["*"],  # where Ray's proxies listen is for Ray to say
        state_dir=Path(state_dir).expanduser().absolute(),  # a replica has another working folder
        shared_states=True,
        limits=limits or Limits(),
    )
    at_once = served.limits.requests
    replica = serve.deployment(
        name="replica",
        num_replicas=replicas,
        max_ongoing_requests=at_once,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        graceful_shutdown_timeout_s=served.drain_seconds,
    )(Replica)
    front = serve.deployment(
        name="front",
        num_replicas=fronts,
        max_ongoing_requests=at_once * 16,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(_Ingress))
    return front.bind(replica.bind(model, options, dict(engine or {}), served), served)


class PrefixRouter(RequestRouter):
    """Ray Serve's choice of replicas, by the beginnings of prompts."""

    def initialize_state(self, **_: Any) -> None:
        """What was sent where, so far."""
        self._prefixes = Prefixes()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for this request; then all others, for when it takes no more."""
        given = pending_request.args if pending_request is not None else ()
        beginnings = next((each.beginnings for each in given if isinstance(each, Ask)), [])
        loads = {
            each.replica_id: self._replica_queue_len_cache.get(each.replica_id) or 0 for each in candidate_replicas
        }
        if not loads:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when none of them takes it
        chosen = self._prefixes.choose(beginnings, loads)
        first = [each for each in candidate_replicas if each.replica_id == chosen]
        return [first, [each for each in candidate_replicas if each.replica_id != chosen]]


class Replica:
    """A model of its own, and the server's application, without a socket."""

    def __init__(self, model: str, options: dict[str, Any], engine: dict[str, Any], served: Options) -> None:
        """Loads the model."""
        self._name = serve.get_replica_context().replica_id.unique_id
        _logs.set_up(served.log_json, self._name)

        def load_here() -> Any:
            loaded = load(model, **_with_threads(options))
            return loaded, loaded.engine(**engine)

        self._service = Service(load_here, worker_options(served, self._name))
        done = threading.Event()
        self._service.start(done.set, done.set)
        done.wait()
        if self._service.failure is not None:
            raise self._service.failure
        self._app = make_app(self._service)

    async def answer(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """The answer's head, then pieces of its body. Closed or cancelled, it ends the request."""
        async with contextlib.aclosing(_run(self._app, ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def tell(self, path: str) -> Told:
        """What is asked of all replicas."""
        head, body = Head(500, []), b""
        async with contextlib.aclosing(_run(self._app, Ask("GET", path))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Head):
                    head = piece
                else:
                    body += piece
        return Told(self._name, head.status, body)

    def check_health(self) -> None:
        """For Ray Serve, which replaces a replica for which this raises."""
        self._service.require()[1].stats()

    def __del__(self) -> None:
        """The end, when Ray Serve has waited for what runs."""
        if hasattr(self, "_service"):
            self._service.close()


class _Ingress:
    """What Ray's proxies send requests to."""

    def __init__(self, replicas: Any, served: Options) -> None:
        _logs.set_up(served.log_json, "front")
        self._front = _Replicas(replicas, served)

    def __serve_build_asgi_app__(self) -> Any:
        return make_front_app(self._front)


class _Replicas(Front):
    def __init__(self, handle: Any, options: Options) -> None:
        super().__init__(options)
        self._handle = handle

    async def answer(self, ask: Ask, taker: Taker) -> None:
        pieces = self._handle.options(stream=True).answer.remote(ask)
        is_whole = False
        try:
            async for piece in pieces:
                taker.take(piece)
                while taker.is_full:
                    room = asyncio.Event()
                    taker.on_room = room.set
                    await room.wait()
            is_whole = True
        except RayServeException as error:
            raise not_ready() from error
        except ray.exceptions.RayError as error:
            raise worker_ended("a replica") from error
        finally:
            if not is_whole:
                pieces.cancel()

    async def statuses(self) -> dict[str, str]:
        return {told.worker: "ok" if told.status == 200 else "loading" for told in await self.ask_all("/health")}

    async def ask_all(self, path: str) -> list[Told]:
        try:
            told = await self._handle.broadcast("tell", path).results_async(
                timeout_s=_SECONDS_TO_TELL, return_exceptions=True
            )
        except (TimeoutError, RayServeException, ray.exceptions.RayError):
            return []
        return sorted(one for one in told if isinstance(one, Told))


async def _run(app: Any, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
    """An application's answer, without a socket. Raises what it raises."""
    messages: asyncio.Queue[Any] = asyncio.Queue()
    gone = asyncio.Event()
    requests = [{"type": "http.request", "body": ask.body, "more_body": False}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(ask), receive, messages.put)
        finally:
            messages.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]  # the front gives it
                yield Head(message["status"], headers)
            elif message.get("body"):
                yield message["body"]
        await running
    finally:
        gone.set()
        await asyncio.gather(running, return_exceptions=True)


def _scope(ask: Ask) -> dict[str, Any]:
    path, _, query = ask.target.partition("?")
    client = ask.headers.get("x-forwarded-for")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": ask.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in ask.headers.items()],
        "client": None if client is None else (client, 0),
        "server": None,
    }
