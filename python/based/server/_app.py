"""The routes."""

import asyncio
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import based
from based.server import _logs
from based.server._answers import DONE, Answer, Usage
from based.server._bodies import (
    Body,
    check_fields,
    describe,
    get_bool,
    get_text,
    parse_object,
    read_ids,
    refuse_media_type,
)
from based.server._errors import ApiError, invalid, to_json
from based.server._openapi import About, about, about_text, document
from based.server._options import Options
from based.server._requests import DETOKENIZE, STATE_FIELDS, TOKENIZE, bodies, check_model
from based.server._service import ClientGoneError, Face, Running, Service
from based.server._states import check_name, new_name

if TYPE_CHECKING:
    from based import Model

Write: TypeAlias = Callable[[bytes], Awaitable[None] | None]
"""Writes a part of a body, and returns what to wait for before the next one, if the connection takes no more now. A
server may give it as "based.write" in a request's scope; it costs less than the `send` of ASGI."""

_PAGE = Path(__file__).with_name("page.html")
_OPEN_PATHS = {"/", "/health", "/ping", "/metrics"}
"""What is answered without an API key: nothing of it tells what clients ask."""

_CLIENT_GONE = 499
"""The status of an answer that nobody gets, in the log."""

_OTHER_ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/api/chat": "chat",
    "/v1/conversations": "chat",
    "/v1/assistants": "chat",
    "/v1/threads": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "ranking",
    "/v1/moderations": "moderation",
    "/v1/audio/transcriptions": "audio",
    "/v1/images/generations": "images",
}


def make_app(service: Service) -> ASGIApp:
    """The application, in its layers: log and errors, size and key, CORS, routes."""
    app = FastAPI(
        title="based",
        version=based.__version__,
        openapi_url=None,  # ours is made from the tables of _requests.py
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_routes(app, service)
    return layers(app, service)


def layers(app: FastAPI, service: Face) -> ASGIApp:
    """An application's routes, and what is around them."""
    if service.options.worker is not None:  # the front has done this
        return _Outermost(app, service)
    layered: ASGIApp = _Guard(app, service)
    if service.options.allowed_origins:
        layered = CORSMiddleware(
            layered,
            allow_origins=service.options.allowed_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return _Outermost(layered, service)


# ---- around the routes -----------------------------------------------------------------------------------------------


class _Outermost:
    """Gives each answer the request's id, counts and logs it, and makes an error of what nobody caught."""

    def __init__(self, app: ASGIApp, service: Face) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        identity = _request_id(scope)
        scope["based.id"], scope["based.log"] = identity, {}
        status, is_whole = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
                if self._service.is_draining:
                    message["headers"].append((b"connection", b"close"))
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _logs.LOGGER.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if status == 0:
                await _error_response(_server_error(error))(scope, receive, send_with_id)
            elif not is_whole:  # cut off: a client must not take it for whole
                raise
        finally:
            self._log(scope, status, time.perf_counter() - begin)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        fields: dict[str, Any] = scope["based.log"]
        if fields.pop("relayed", False):  # the worker that answered has counted and logged it
            return
        route = getattr(scope.get("route"), "path", None) or "other"
        self._service.metrics.count_response(route, status)
        if not self._service.options.log_requests or (status == 200 and scope["path"] in ("/health", "/metrics")):
            return
        client = scope.get("client")
        line = f"{scope['method']} {scope['path'][:200]} {status or 'unanswered'} in {_duration(seconds)}"
        if "prompt_tokens" in fields:
            cached = f" ({fields['cached_tokens']} cached)" if fields["cached_tokens"] else ""
            line += f", {fields['prompt_tokens']} tokens{cached} + {fields['completion_tokens']} new"
        if fields.get("first_token_seconds") is not None:
            line += f", the first after {_duration(fields['first_token_seconds'])}"
        for name in ("error", "note"):
            if name in fields:
                line += f": {fields[name][:300]}"
        line += f" [{scope['based.id']}]"
        about = {
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 6),
            "request_id": scope["based.id"],
            "client": None if client is None else client[0],
        }
        _logs.info(line, about | fields)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _request_id(scope: Scope) -> str:
    """The one of the client, if an answer's header may hold it, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= 128 and all(0x21 <= byte < 0x7F for byte in value):
            text: str = value.decode()
            return text
    return secrets.token_hex(8)


class _Guard:
    """Refuses a request to another host, or without the key, before anything of it is read."""

    def __init__(self, app: ASGIApp, service: Face) -> None:
        self._app = app
        self._keys = [key.encode() for key in service.options.api_keys]
        self._hosts = _own_names(service.options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check_host(scope)
                self._check_key(scope)
            except ApiError as error:
                scope["based.log"]["error"] = error.message
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """Refuses a request that names another host.

        A page of another site can have that site's name mean this machine, and then read what it asks for. A request
        that names no host comes from no browser.
        """
        if self._hosts is None:
            return
        for header, value in scope["headers"]:
            if header != b"host":
                continue
            name = _host_name(value.decode("latin-1"))
            if name not in self._hosts and not _is_this_machine(name):
                raise ApiError(
                    403,
                    f"the header Host names {name[:100]!r}, and this server does not answer to that name: ask it as "
                    "localhost, or start based serve with --allowed-host NAME (* for any) or with an --api-key",
                    code="host_not_allowed",
                )

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in _OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # All keys are compared, each in constant time: time tells nothing about them.
        right = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        if kind.lower() != b"bearer" or not any(right):
            raise ApiError(
                401,
                "the API key is wrong" if given else "there is no API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _own_names(options: Options) -> set[str] | None:
    """Names of this server, beside those of this machine; None: any name is right."""
    if "*" in options.allowed_hosts:
        return None
    if options.allowed_hosts or (not options.api_keys and _is_this_machine(options.host.lower())):
        return {_host_name(name) for name in (options.host, *options.allowed_hosts)}
    return None


def _host_name(value: str) -> str:
    """The name or address in a header Host, without its port and in small letters."""
    value = value.strip().lower()
    found = re.fullmatch(r"\[(.+)\](?::\d*)?|([^:]+):\d*", value)
    return ((found[1] or found[2]) if found else value).removesuffix(".")


def _is_this_machine(name: str) -> bool:
    """Whether nobody can make this name mean another machine."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _add_errors(app: FastAPI) -> None:
    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        request.scope["based.log"]["error"] = error.message
        return _error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        message = f"there is nothing at {path[:200]}"
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if (what := _OTHER_ROUTES.get(path.rstrip("/"))) is not None:
            message = f"{path} is not served: this is a base model, which has no {what}; POST /v1/completions"
        elif error.status_code == 405:
            headers["allow"] = ", ".join(_methods_at(app, request.scope))
            message = f"{path[:200]} takes no {request.method}, expected {headers['allow']}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        api_error = ApiError(error.status_code, message if code else str(error.detail), code=code, headers=headers)
        return await on_api_error(request, api_error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        return await on_api_error(request, invalid(str(error)))

    async def on_client_gone(request: Request, error: Exception) -> Response:
        request.scope["based.log"]["note"] = "the client went away"
        return Response(status_code=_CLIENT_GONE)

    async def on_failure(request: Request, error: Exception) -> Response:
        return _error_response(_server_error(error))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(Exception, on_failure)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def _methods_at(app: FastAPI, scope: Scope) -> list[str]:
    """What the routes of a path take, together."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", set())
    return sorted(found)


def _error_response(error: ApiError) -> Response:
    return Response(to_json(error.body()), error.status, error.headers, "application/json")


def _server_error(error: BaseException) -> ApiError:
    """What is our own fault, or the machine's."""
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return ApiError(503, f"memory is short: {error}", code="out_of_memory", headers={"retry-after": "5"})
    message = f"{kind}: {error}" if isinstance(error, based.Error | OSError) else f"an error of the server: {kind}"
    return ApiError(500, message, code="server_error")


def _json_response(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def _read(request: Request, service: Face, *, needs_body: bool = True) -> bytes:
    """The body, of a bounded size and in a bounded time."""
    limits = service.options.limits
    data = bytearray()
    encoding = ", ".join(request.headers.getlist("content-encoding")).strip()
    if encoding.lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"the body's Content-Encoding is {encoding[:100]!r}, expected none: send the JSON as it is",
            code="unsupported_encoding",
        )

    too_large = ApiError(
        413,
        f"the body has more than {limits.body_bytes} bytes, the most of this server",
        code="body_too_large",
        headers={"connection": "close"},  # the rest of it is not read
    )
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_large
    try:
        async with asyncio.timeout(limits.read_seconds):
            async for piece in request.stream():
                data.extend(piece)
                if len(data) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.read_seconds:g} s",
            code="timeout",
            headers={"connection": "close"},
        ) from None
    except Exception as error:
        if type(error).__name__ == "ClientDisconnect":
            raise ClientGoneError from None
        raise
    if data or needs_body:
        refuse_media_type(request.headers.get("content-type", ""))
    return bytes(data)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- routes ----------------------------------------------------------------------------------------------------------


def _add_routes(app: FastAPI, service: Service) -> None:
    options = service.options

    @app.get("/", openapi_extra=about_text("text/html"))
    async def page() -> Response:
        """A page to try it with."""
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
        return Response(_PAGE.read_bytes(), headers=headers, media_type="text/html; charset=utf-8")

    @app.get("/health", openapi_extra=about("Health", unhealthy="Health"))
    async def health() -> Response:
        """200 when requests are taken."""
        status = "ok" if service.is_ready else "shutting down" if service.is_draining else "loading"
        return _json_response({"status": status}, 200 if service.is_ready else 503)

    @app.get("/ping", openapi_extra=about("Health", unhealthy="Health"))
    async def ping() -> Response:
        """The same."""
        return await health()

    @app.get("/metrics", openapi_extra=about_text("text/plain"))
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        text = await service.in_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", openapi_extra=about("Version"))
    async def version() -> Response:
        """The version of `based`."""
        return _json_response({"version": based.__version__})

    def model_card() -> dict[str, Any]:
        model, _, _ = service.require()
        return {
            "id": options.model_name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "based",
            "root": options.model_name,
            "parent": None,
            "max_model_len": model.max_context,
        }

    @app.get("/v1/models", openapi_extra=about("ModelList"))
    async def models() -> Response:
        """The model that is served."""
        return _json_response({"object": "list", "data": [model_card()]})

    @app.get("/v1/models/{name:path}", openapi_extra=about("Model", 404))
    async def one_model(name: str) -> Response:
        """The same, by its name."""
        check_model({"model": name}, options.model_name)
        return _json_response(model_card())

    completes = About(
        {"application/json": "Completion", "text/event-stream": "Event"},
        (404, 409, 429, *([507] if options.shared_states else [])),
        body="completion",
        needs_body=True,
        state="state_id",
    )

    @app.post("/v1/completions", openapi_extra={"about": completes})
    async def completions(request: Request) -> Response:
        """Continues prompts.

        Fields that are right each may contradict each other, and are refused then: best_of is at least n, and is n in
        a stream; min_tokens is at most max_tokens; max_tokens is 0 only with echo and without save_state;
        stream_options are for stream; save_state is for one sample of one prompt, state_id for one prompt, which alone
        it lets be left out or be without tokens; echo with logprobs is for a prompt that begins its sequence. The
        prompt and max_tokens together keep within the model's context, where it has one.
        """
        service.require()
        data = await _read(request, service)
        service.enter()
        stays = False
        try:
            running = await service.begin(data)
            try:
                if running.completion.stream:
                    stays = True
                    return _EventStream(service, running)
                return await _answer(service, running, request)
            finally:
                if not stays:
                    running.end()
                    _note(request.scope, running)
        finally:
            if not stays:
                service.leave()

    @app.get("/server_info", openapi_extra=about("ServerInfo"))
    async def server_info() -> Response:
        """What runs, and its limits."""
        model, engine, states = service.require()
        stats = engine.stats()
        limits = options.limits
        number, nbytes = await service.in_thread(lambda: states.in_memory)
        return _json_response(
            {
                "version": based.__version__,
                "uptime_seconds": round(time.time() - service.started, 3),
                "model": {
                    "id": options.model_name,
                    "num_parameters": model.num_parameters,
                    "dtype": model.dtype,
                    "device": model.device,
                    "kernel_isa": model.kernel_isa,
                    "fingerprint": model.fingerprint,
                    "vocab_size": model.config.vocab_size,
                    "state_nbytes": model.state_nbytes,
                    "max_model_len": model.max_context,
                },
                "engine": {
                    "max_batch_size": stats.max_batch_size,
                    "running": stats.running,
                    "waiting_requests": stats.waiting_requests,
                    "waiting_tokens": stats.waiting_tokens,
                },
                "states": {"in_memory": number, "nbytes": nbytes, "files": options.state_dir is not None},
                "limits": {name: getattr(limits, name) for name in limits.__slots__},
            }
        )

    _add_tokenizer_routes(app, service)
    _add_state_routes(app, service)

    @app.get("/openapi.json", openapi_extra=about({"type": "object"}))
    async def openapi() -> Response:
        """This description."""
        vocab_size = service.vocab_size
        if vocab_size not in descriptions:
            described = document(
                app.routes,
                bodies(options.limits, options.model_name, vocab_size),
                names_are_checked=_own_names(options) is not None,
                open_paths=_OPEN_PATHS if options.api_keys else None,
            )
            descriptions[vocab_size] = to_json(described)
        return Response(descriptions[vocab_size], media_type="application/json")

    descriptions: dict[int | None, bytes] = {}  # before the model is loaded, and behind
    for route in app.routes:
        methods: set[str] = getattr(route, "methods", set())
        if "GET" in methods:
            methods.add("HEAD")


def _add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    def tokenizer() -> Any:
        model, _, _ = service.require()
        if model.tokenizer is None:
            raise invalid("this model has no tokenizer: give token ids", code="no_tokenizer")
        return model.tokenizer

    async def answer(request: Request, fields: dict[str, Body], work: Callable[["Model", Body], Any]) -> Response:
        """What `work`, in a thread, makes of the body."""
        model, _, _ = service.require()
        data = await _read(request, service)

        def in_thread() -> Any:
            body = parse_object(data)
            check_fields(body, fields)
            check_model(body, service.options.model_name)
            return work(model, body)

        return _json_response(await service.in_thread(in_thread))

    @app.post("/tokenize", openapi_extra=about("Tokens", 404, body="tokenize", needs_body=True))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text."""
        return await answer(request, TOKENIZE, do_tokenize)

    def do_tokenize(model: "Model", body: Body) -> dict[str, Any]:
        text = get_text(body, "prompt")
        if text is None:
            raise invalid("prompt is missing: give a text", param="prompt")
        at_start = get_bool(body, "add_special_tokens", True)
        of = tokenizer()
        ids = []
        if text or at_start:
            try:
                split = get_bool(body, "split_special_tokens")
                ids = model.encode(text, at_start=at_start, split_special_tokens=split)
            except ValueError as error:
                raise invalid(str(error), param="prompt") from None
        names = [of.id_to_token(token) for token in ids] if get_bool(body, "return_token_strs") else None
        return {"count": len(ids), "max_model_len": model.max_context, "tokens": ids, "token_strs": names}

    @app.post("/detokenize", openapi_extra=about("Text", 404, body="detokenize", needs_body=True))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await answer(request, DETOKENIZE, do_detokenize)

    def do_detokenize(model: "Model", body: Body) -> dict[str, Any]:
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise invalid(f"tokens is {describe(tokens)}, expected a list of token ids", param="tokens")
        of = tokenizer()
        if tokens:
            tokens = read_ids(tokens, model.config.vocab_size, "tokens", "tokens").tolist()
        return {"prompt": of.decode(tokens, skip_special_tokens=False)}

    @app.get("/tokenizer_info", openapi_extra=about("TokenizerInfo", 400))
    async def tokenizer_info() -> Response:
        """Special tokens, and how texts begin."""
        model, _, _ = service.require()
        of = tokenizer()
        config = model.config

        def name(token: int | None) -> str | None:
            return None if token is None or token >= config.vocab_size else of.id_to_token(token)

        special = {str(id): token.content for id, token in of.get_added_tokens_decoder().items() if token.special}
        bos, eos = name(config.bos_token_id), name(config.eos_token_id)
        return _json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": config.vocab_size,
                "model_max_length": model.max_context,
                "bos_token": bos,
                "bos_token_id": config.bos_token_id,
                "eos_token": eos,
                "eos_token_id": config.eos_token_id,
                "pad_token": eos,
                "special_tokens": special,
                "chat_template": None,
            }
        )


def _add_state_routes(app: FastAPI, service: Service) -> None:
    def store() -> Any:
        return service.require()[2]

    @app.get("/v1/states", openapi_extra=about("StateList"))
    async def list_states() -> Response:
        """All states that have names."""
        found = await service.in_thread(store().everything)
        return _json_response({"object": "list", "data": found})

    @app.get("/v1/states/{name}", openapi_extra=about("State", 400, 404))
    async def one_state(name: str) -> Response:
        """What there is of one."""
        found = await service.in_thread(partial(store().info, check_name(name, "id")))
        return _json_response(found)

    @app.delete("/v1/states/{name}", openapi_extra=about("DeletedState", 400, 404))
    async def delete_state(name: str) -> Response:
        """Forgets one, and its file."""
        await service.in_thread(partial(store().delete, check_name(name, "id")))
        return _json_response({"id": name, "object": "state.deleted", "deleted": True})

    async def read(request: Request, verb: str) -> str | None:
        """The field `to`."""
        data = await _read(request, service, needs_body=False)
        body = parse_object(data) if data else {}
        check_fields(body, STATE_FIELDS[verb])
        return None if body.get("to") is None else check_name(body["to"], "to")

    @app.post("/v1/states/{name}/save", openapi_extra=about("State", 404, 409, 507, body="save"))
    async def save_state(name: str, request: Request) -> Response:
        """Writes one to a file, in the server's folder of states."""
        states = store()
        to = await read(request, "save")
        return _json_response(await service.in_thread(partial(states.save, check_name(name, "id"), to)))

    @app.post("/v1/states/{name}/load", openapi_extra=about("State", 404, 409, body="load"))
    async def load_state(name: str, request: Request) -> Response:
        """Takes one from its file into memory."""
        states = store()
        await read(request, "load")
        return _json_response(await service.in_thread(partial(states.load, check_name(name, "id"))))

    forks = about("State", 404, 409, *([507] if service.options.shared_states else []), body="fork", state="id")

    @app.post("/v1/states/{name}/fork", openapi_extra=forks)
    async def fork_state(name: str, request: Request) -> Response:
        """Gives one a second name."""
        states = store()
        to = await read(request, "fork") or new_name()
        return _json_response(await service.in_thread(partial(states.fork, check_name(name, "id"), to)))


# ---- completions -----------------------------------------------------------------------------------------------------


def _answer_of(service: Service, running: Running, echoed: Any) -> Answer:
    identity = f"cmpl-{secrets.token_hex(12)}"
    return Answer(running.completion, running.model, service.options.model_name, identity, echoed)


def _usage(running: Running) -> Usage:
    usage = Usage()
    usage.prompt_tokens = running.num_prompt_tokens
    usage.completion_tokens = running.num_generated
    usage.cached_tokens = running.num_cached_tokens
    return usage


def _note(scope: Scope, running: Running) -> None:
    """What the log says of a request."""
    first = running.first_token
    scope["based.log"] |= {
        "prompt_tokens": running.num_prompt_tokens,
        "cached_tokens": running.num_cached_tokens,
        "completion_tokens": running.num_generated,
        "first_token_seconds": None if first is None else round(first - running.arrival, 6),
    }


async def _answer(service: Service, running: Running, request: Request) -> Response:
    """The whole answer. A client that goes away ends the request."""

    async def work() -> bytes:
        echoed = await service.echoed(running)
        outputs = await running.outputs()
        name = await running.keep_state()
        usage = _usage(running)
        answer = _answer_of(service, running, echoed)
        if running.completion.logprobs is None and usage.completion_tokens < 10_000:
            return answer.whole(outputs, usage, name)
        return await service.in_thread(partial(answer.whole, outputs, usage, name))

    working = asyncio.create_task(work())
    watching = asyncio.create_task(_until_disconnect(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            running.cancel()
            await asyncio.gather(working, return_exceptions=True)
            raise ClientGoneError
        return Response(await working, media_type="application/json")
    finally:
        watching.cancel()


class _EventStream(Response):
    """Server-sent events, one for each token.

    They are written where the engine's news arrive, on the event loop, and not by a task that would be woken for each.
    """

    def __init__(self, service: Service, running: Running) -> None:
        super().__init__(media_type="text/event-stream")
        self._service = service
        self._running = running
        self._is_gone = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = set(range(len(running.requests)))  # prompts of which more events may come
        self._late: set[int] = set()  # prompts with news since the connection took no more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = self._running
        watching = asyncio.create_task(self._watch(receive))
        try:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await self._send_events(scope, send)
            except Exception as error:
                if self._is_gone:
                    raise ClientGoneError from None
                _logs.LOGGER.error("a stream failed", exc_info=error)
                failed = error if isinstance(error, ApiError) else _server_error(error)
                scope["based.log"]["error"] = failed.message
                await send(_body(b"data: " + to_json(failed.body()) + b"\n\n"))
            if self._is_gone:
                scope["based.log"]["note"] = "the client went away"
            await send(_body(DONE, more=False))
        finally:
            watching.cancel()
            running.end()
            self._service.leave()
            _note(scope, running)

    async def _watch(self, receive: Receive) -> None:
        await _until_disconnect(receive)
        self._is_gone = True
        self._running.cancel()

    async def _send_events(self, scope: Scope, send: Send) -> None:
        running, completion = self._running, self._running.completion
        self._answer = answer = _answer_of(self._service, running, await self._service.echoed(running))
        if completion.echo:
            for number in range(len(completion.prompts)):
                for index in range(completion.n):
                    await send(_body(answer.echo_event(number, index)))
        if running.requests:
            self._parts = Parts(scope, send, self._on_room)
            running.listen(self._on_news)
            try:
                await self._over
            except Exception:
                await self._parts.flush()  # what comes next is behind it
                raise
            await self._parts.flush()
        name = await running.keep_state()
        if not self._is_gone and (completion.include_usage or name is not None):
            usage = _usage(running) if completion.include_usage else None
            await send(_body(answer.last_event(usage, name)))

    def _on_news(self, number: int) -> None:
        """Writes the events of a prompt's new chunks, or leaves them where the connection takes no more."""
        if self._parts.is_full:
            self._late.add(number)
            return
        if self._over.done():
            return
        try:
            running, with_usage = self._running, self._running.completion.continuous_usage
            events = []
            while (chunk := running.take(number)) is not None:
                events.append(self._answer.event(number, chunk, _usage(running) if with_usage else None))
            # When the client is gone, what is left comes with the next step, and its end says whether all came.
            if not self._is_gone:
                self._parts.write(b"".join(events))
            if running.is_taken(number):
                self._left.discard(number)
                if not self._left:
                    self._over.set_result(None)
        except Exception as error:
            self._over.set_exception(error)

    def _on_room(self) -> None:
        late, self._late = self._late, set()
        for number in late:
            self._on_news(number)


class Parts:
    """Writes parts of an answer's body as they come, on the event loop: no task is woken for each.

    While the connection takes no more, parts are kept: whoever makes them should look at `is_full`.
    """

    def __init__(self, scope: Scope, send: Send, on_room: Callable[[], None]) -> None:
        """on_room: Called when the connection takes more again."""
        self._send = send
        self._write: Write = scope.get("based.write") or (lambda data: send(_body(data)))
        self._on_room = on_room
        self._room: asyncio.Future[None] | None = None  # while it takes no more
        self._kept = b""
        self._failure: BaseException | None = None

    @property
    def is_full(self) -> bool:
        """The connection takes no more."""
        return self._room is not None

    def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the head."""
        self._wait(self._send({"type": "http.response.start", "status": status, "headers": headers}))

    def write(self, data: bytes) -> None:
        """Writes a part, or keeps it."""
        if self._room is not None:
            self._kept += data
        elif data and (waiting := self._write(data)) is not None:
            self._wait(waiting)

    async def flush(self) -> None:
        """Waits until all is written. Raises what sending has raised."""
        while self._room is not None:
            await asyncio.wait({self._room})
        if self._failure is not None:
            raise self._failure

    def _wait(self, waiting: Awaitable[None]) -> None:
        self._room = asyncio.ensure_future(waiting)
        self._room.add_done_callback(self._has_room)

    def _has_room(self, room: asyncio.Future[None]) -> None:
        self._room = None
        if not room.cancelled():
            self._failure = self._failure or room.exception()
        kept, self._kept = self._kept, b""
        self.write(kept)
        if self._room is None:
            self._on_room()


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
