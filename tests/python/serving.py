"""A server of its own for a test: real sockets on this machine, and a small client."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import based
import pytest

pytest.importorskip("fastapi", reason="the extra `server` is missing")
pytest.importorskip("prometheus_client", reason="the extra `server` is missing")

from based.server import _run
from based.server._app import make_app
from based.server._options import Limits, Options
from based.server._service import Service

from tests.python.description import Description

PATIENCE = 60.0  # seconds


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Of an answer that must be an error object."""
        assert self.headers["content-type"] == "application/json"
        error = self.json["error"]
        assert set(self.json) == {"error"} and set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"]
        return error

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream that must be whole."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@dataclass
class Running:
    """A server under way."""

    port: int
    service: Service | None
    """Where it runs in this process."""
    headers: dict[str, str] = field(default_factory=dict)
    description: Description | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Any:
        assert self.service is not None and self.service._loaded is not None
        return self.service._loaded[1]

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request, whose answer must be one of /openapi.json. body: bytes as they are, anything else as JSON."""
        if self.description is None:
            keys = [] if self.service is None else self.service.options.api_keys
            key = {"authorization": f"Bearer {keys[0]}"} if keys else {}
            self.description = Description(self._ask("/openapi.json", None, "GET", self.headers | key).json)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = ({} if data is None else {"content-type": "application/json"}) | self.headers | (headers or {})
        method = method or ("GET" if data is None else "POST")
        answer = self._ask(path, data, method, given)
        if method != "OPTIONS":  # which CORS answers
            self.description.check(method, path, answer.status, answer.headers, answer.body)
        return answer

    def _ask(self, path: str, data: bytes | None, method: str, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            found = [(name.lower(), value) for name, value in response.getheaders()]
            assert len(dict(found)) == len(found), found
            return Answer(response.status, dict(found), response.read())

    def complete(self, **body: Any) -> Any:
        """The answer to a completion that must succeed."""
        answer = self.ask("/v1/completions", body)
        assert answer.status == 200, answer.body
        return answer.json

    def text(self, **body: Any) -> str:
        """Of the only choice."""
        choices = self.complete(**body)["choices"]
        assert len(choices) == 1
        return choices[0]["text"]

    def refused(self, status: int, param: str | None, **body: Any) -> dict[str, Any]:
        """The error of a completion that must be refused because of `param`."""
        answer = self.ask("/v1/completions", body)
        assert answer.status == status, answer.body
        assert answer.error["param"] == param, answer.error
        return answer.error

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what must come."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    load: based.Model | Callable[[], Any], *, engine: dict[str, Any] | None = None, wait: bool = True, **options: Any
) -> Iterator[Running]:
    """A server of a model, or of what a function loads. options: of Options, and of Limits."""
    limits = Limits(**{name: options.pop(name) for name in Limits.__slots__ if name in options})
    given = Options(**({"model_name": "tiny", "port": 0, "limits": limits} | options))

    def default_load() -> Any:
        return load, load.engine(**({"max_batch_size": 8} | (engine or {})))

    service = Service(default_load if isinstance(load, based.Model) else load, given)
    sock = _run._listen(given)
    server = _run.make_server(service, make_app(service))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([sock])))
    thread.start()
    running = Running(sock.getsockname()[1], service)
    try:
        running.until(lambda: server.started)
        if wait:
            running.until(lambda: service._loaded is not None or service.failure is not None)
        yield running
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        loop.close()
        sock.close()
        service.close()
