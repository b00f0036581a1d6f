"""What the server takes and answers, as OpenAPI: made from the tables by which requests are checked."""

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import based
from based._outputs import FinishReason
from based.server._bodies import Body
from based.server._errors import KINDS
from based.server._options import NAME, Limits

_JSON = "application/json"
_ALL = (
    "Completions by a base model. HEAD asks for the head of what GET gives. What is no request of HTTP/1.1 is answered "
    "with 400, a head that does not arrive in time with 408, another method than those of a path with 405, and another "
    "path with 404; all with an Error. Integers are written without a fraction."
)

_STATUSES = {
    400: "A field, the name of a state, or the JSON is wrong.",
    401: "The API key is missing or wrong.",
    403: "The header Host names another machine.",
    404: "There is no such route, model or state.",
    405: "The route takes other methods.",
    408: "The body did not arrive in time.",
    409: "The name of a state is taken, a state is another model's, or there is no folder of states.",
    413: "The body is too large.",
    415: "The body is not said to be JSON, or is packed.",
    429: "There are too many requests.",
    431: "The head of the request is too large.",
    500: "A fault of the server, or of the device.",
    503: "The model is being loaded, the server shuts down, or memory is short.",
    507: "There is no room for the file of a state.",
}
_BODY_STATUSES = (400, 408, 413, 415)
_ALWAYS = (431, 500, 503)


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What a route takes and answers, beside what all of them do.

    Attributes:
        content: Of status 200: schema by media type. A text is the name of one of SCHEMAS.
        errors: Statuses of this route's own.
        body: The name of a body of `bodies()`; None: it takes none.
        needs_body: The body may not be left out.
        unhealthy: The schema of a 503 that is not an error object.
        state: The field of the answer that names a state.
    """

    content: Mapping[str, Body | str]
    errors: tuple[int, ...] = ()
    body: str | None = None
    needs_body: bool = False
    unhealthy: str | None = None
    state: str | None = None


def about(answer: Body | str, *errors: int, **more: Any) -> dict[str, About]:
    """For `openapi_extra` of a route that answers with JSON."""
    return {"about": About({_JSON: answer}, errors, **more)}


def about_text(media_type: str) -> dict[str, About]:
    """The same for one that answers with text."""
    return {"about": About({media_type: {"type": "string"}})}


def document(
    routes: Iterable[Any], bodies: Mapping[str, Body], *, names_are_checked: bool, open_paths: set[str] | None
) -> Body:
    """The description.

    Args:
        routes: Of the application; those that have no `about` are left out.
        bodies: What bodies may be.
        names_are_checked: A request by another name of this machine is refused.
        open_paths: What is answered without a key; None: no keys are asked for.
    """
    paths: dict[str, Any] = {}
    described = [route for route in routes if "about" in (getattr(route, "openapi_extra", None) or {})]
    of_states = [route.name for route in described if route.path_format.startswith("/v1/states/")]
    for route in described:
        found = route.openapi_extra["about"]
        path = route.path_format
        more = [403] if names_are_checked else []
        is_closed = open_paths is not None and path not in open_paths
        operation = _operation(route, found, bodies, [*more, 401] if is_closed else more)
        if is_closed:
            operation["security"] = [{"key": []}]
        if found.state is not None:
            named = {"name": f"$response.body#/{found.state}"}
            operation["responses"]["200"]["links"] = {
                name: {"operationId": name, "parameters": named} for name in of_states
            }
        (method,) = route.methods - {"HEAD"}
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "based",
            "version": based.__version__,
            "description": _ALL,
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "headers": {
                "X-Request-Id": {
                    "description": "The client's, if it sent one of at most 128 visible ASCII letters, or a new one.",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
                },
                "Retry-After": {
                    "description": "Seconds, after which to come again.",
                    "schema": {"type": "integer", "minimum": 1},
                },
                "Allow": {"description": "The methods of the route.", "required": True, "schema": {"type": "string"}},
                "WWW-Authenticate": {
                    "description": "What is missing.",
                    "required": True,
                    "schema": {"type": "string", "const": "Bearer"},
                },
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "A key of --api-key."}},
        },
    }


_HEADERS = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After", 503: "Retry-After"}


def _operation(route: Any, found: About, bodies: Mapping[str, Body], more: list[int]) -> Body:
    summary, _, description = (inspect.getdoc(route.endpoint) or "").partition("\n\n")
    operation: Body = {"operationId": route.name, "summary": summary}
    if description:
        operation["description"] = description.replace("\n", " ")
    names = list(route.param_convertors)
    if names:
        of_state = {"type": "string", "pattern": f"^{NAME.pattern}$"}
        schema = of_state if route.path_format.startswith("/v1/states/") else {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    if found.body is not None:
        content = {_JSON: {"schema": bodies[found.body]}}
        operation["requestBody"] = {"required": found.needs_body, "content": content}
    statuses = {*found.errors, *more, *_ALWAYS, *(_BODY_STATUSES if found.body is not None else ())}
    answers: Body = {"200": _response("The answer.", {kind: _reference(each) for kind, each in found.content.items()})}
    for status in sorted(statuses):
        error = _reference("Error")
        if status == 503 and found.unhealthy is not None:
            error = {"anyOf": [_reference(found.unhealthy), error]}
        answers[str(status)] = _response(_STATUSES[status], {_JSON: error}, _HEADERS.get(status))
    return operation | {"responses": answers}


def _response(text: str, content: Mapping[str, Body], header: str | None = None) -> Body:
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", header) if name is not None}
    return {
        "description": text,
        "headers": headers,
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }


def _reference(schema: Body | str) -> Body:
    return {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema


# ---- what is answered ------------------------------------------------------------------------------------------------


def _object(properties: Mapping[str, Body | str], *optional: str) -> Body:
    """An object with these properties and no others. A text is the name of a schema."""
    return {
        "type": "object",
        "properties": {name: _reference(schema) for name, schema in properties.items()},
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _or_null(schema: Body | str) -> Body:
    return {"anyOf": [_reference(schema), {"type": "null"}]}


def _list(items: Body | str) -> Body:
    return {"type": "array", "items": _reference(items)}


def _always(value: Any) -> Body:
    return {"const": value}


_TEXT: Body = {"type": "string"}
_TEXT_OR_NULL: Body = {"type": ["string", "null"]}
_YES: Body = {"type": "boolean"}
_COUNT: Body = {"type": "integer", "minimum": 0}
_COUNT_OR_NULL: Body = {"type": ["integer", "null"], "minimum": 0}
_NUMBER: Body = {"type": "number"}
_IDS: Body = _list(_COUNT)
_FINISH: Body = {"enum": [*typing.get_args(FinishReason)]}
_STOP: Body = {"type": ["string", "integer", "null"]}
_HEAD: dict[str, Body | str] = {
    "id": _TEXT,
    "object": _always("text_completion"),
    "created": _COUNT,
    "model": _TEXT,
    "system_fingerprint": _TEXT,
}
_STATE_ID: Body = _TEXT | {"description": "The name of the state behind the answer."}


_USE: dict[str, Body | str] = {
    "engine": _object(dict.fromkeys(("max_batch_size", "running", "waiting_requests", "waiting_tokens"), _COUNT)),
    "states": _object({"in_memory": _COUNT, "nbytes": _COUNT, "files": _YES}),
}


def _limits() -> Body:
    """An object of what Limits holds."""
    kinds = {int: "integer", float: "number", type(None): "null"}
    properties: dict[str, Body | str] = {}
    for name, hint in typing.get_type_hints(Limits).items():
        properties[name] = {"type": [kinds[each] for each in typing.get_args(hint) or (hint,)]}
    return _object(properties)


SCHEMAS: dict[str, Body] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": {"enum": KINDS},
                    "param": _TEXT_OR_NULL | {"description": "The field that is wrong."},
                    "code": _TEXT_OR_NULL,
                }
            )
        }
    ),
    "Completion": _object({**_HEAD, "choices": _list("Choice"), "usage": "Usage", "state_id": _STATE_ID}, "state_id"),
    "Choice": _object(
        {
            "index": _COUNT,
            "text": _TEXT,
            "logprobs": _or_null("Logprobs"),
            "finish_reason": _FINISH,
            "stop_reason": _STOP,
            "token_ids": _IDS,
            "prompt_token_ids": _IDS,
            "error": _TEXT,
        },
        "token_ids",
        "prompt_token_ids",
        "error",
    ),
    "Logprobs": _object(
        {
            "tokens": _list(_TEXT),
            "token_logprobs": _list({"type": ["number", "null"]}),
            "top_logprobs": _list({"type": ["object", "null"], "additionalProperties": _NUMBER}),
            "text_offset": _IDS,
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        }
    ),
    "CompletionEvent": _object(
        {**_HEAD, "choices": _list("ChoiceEvent"), "usage": _or_null("Usage"), "state_id": _STATE_ID},
        "usage",
        "state_id",
    ),
    "ChoiceEvent": _object(
        {
            "index": _COUNT,
            "text": _TEXT,
            "logprobs": _or_null("Logprobs"),
            "finish_reason": _FINISH | {"enum": [*_FINISH["enum"], None]},
            "stop_reason": _STOP,
            "token_ids": _IDS,
            "prompt_token_ids": _IDS,
            "error": _TEXT,
        },
        "stop_reason",
        "token_ids",
        "prompt_token_ids",
        "error",
    ),
    "Event": {
        "type": "object",
        "description": "One of the server-sent events: those of the answer, an error if it fails, and [DONE].",
        "properties": {
            "data": {
                "type": "string",
                "anyOf": [
                    {"const": "[DONE]"},
                    {
                        "contentMediaType": _JSON,
                        "contentSchema": {"anyOf": [_reference("CompletionEvent"), _reference("Error")]},
                    },
                ],
            }
        },
        "required": ["data"],
    },
    "Model": _object(
        {
            "id": _TEXT,
            "object": _always("model"),
            "created": _COUNT,
            "owned_by": _TEXT,
            "root": _TEXT,
            "parent": {"type": "null"},
            "max_model_len": _COUNT_OR_NULL | {"description": "null: a sequence may have any number of tokens."},
        }
    ),
    "ModelList": _object({"object": _always("list"), "data": _list("Model")}),
    "State": _object(
        {
            "id": _TEXT,
            "object": _always("state"),
            "created": _COUNT,
            "num_tokens": _COUNT_OR_NULL | {"description": "null: the file is none of a state."},
            "in_memory": _YES,
            "saved": _YES,
            "nbytes": _COUNT,
        }
    ),
    "StateList": _object({"object": _always("list"), "data": _list("State")}),
    "DeletedState": _object({"id": _TEXT, "object": _always("state.deleted"), "deleted": _always(True)}),
    "Tokens": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT_OR_NULL,
            "tokens": _IDS,
            "token_strs": {"type": ["array", "null"], "items": _TEXT_OR_NULL},
        }
    ),
    "Text": _object({"prompt": _TEXT}),
    "TokenizerInfo": _object(
        {
            "tokenizer_class": _TEXT,
            "vocab_size": _COUNT,
            "model_max_length": _COUNT_OR_NULL,
            "bos_token": _TEXT_OR_NULL,
            "bos_token_id": _COUNT_OR_NULL,
            "eos_token": _TEXT_OR_NULL,
            "eos_token_id": _COUNT_OR_NULL,
            "pad_token": _TEXT_OR_NULL,
            "special_tokens": {"type": "object", "additionalProperties": _TEXT},
            "chat_template": {"type": "null"},
        }
    ),
    "ServerInfo": _object(
        {
            "version": _TEXT,
            "uptime_seconds": _NUMBER,
            "model": _object(
                {
                    "id": _TEXT,
                    "num_parameters": _COUNT,
                    "dtype": _TEXT,
                    "device": _TEXT,
                    "kernel_isa": _TEXT,
                    "fingerprint": _TEXT,
                    "vocab_size": _COUNT,
                    "state_nbytes": _COUNT,
                    "max_model_len": _COUNT_OR_NULL,
                }
            ),
            **_USE,
            "limits": _limits(),
            "workers": _list(_object({"worker": _TEXT, "device": _TEXT, "uptime_seconds": _NUMBER, **_USE})),
        },
        "workers",
    ),
    "Health": _object(
        {
            "status": {"enum": ["ok", "loading", "shutting down", "not answering"]},
            "workers": {"type": "object", "additionalProperties": _TEXT},
        },
        "workers",
    ),
    "Version": _object({"version": _TEXT}),
}
"""The bodies of answers, by their names in the description."""
