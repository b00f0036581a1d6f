"""What the server says of itself in /openapi.json, held against what it answers."""

import json
import re
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator

CONTRADICTIONS = re.compile(
    "|".join(
        (
            "best_of is .*, expected at least n ",
            "best_of: which samples are the likeliest is known at their ends",
            "save_state keeps the state of one sample",
            "(state_id|save_state) is about one sequence",
            "stream_options are for stream: true",
            "max_tokens is 0, expected at least 1",
            "min_tokens",
            "prompt is (missing|an empty list)",
            r"prompt(\[\d+\])? has no tokens",
            r"logit_bias: the key '\d+' is no token id",
            "echo with logprobs",
            "the model has a context of",
            r".* is the number -?\d+\.0, expected (an integer|a token id)",  # an integer of JSON Schema's
            ".* holds half of a surrogate pair",  # no text of JSON Schema's, which Python takes for one
        )
    )
)
"""Why a body is refused whose every field is right: what a schema does not say, and the description says in words."""


class Description:
    """An OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.paths = document["paths"]
        self._validators: dict[str, Draft202012Validator] = {}

    def validator(self, schema: dict[str, Any]) -> Draft202012Validator:
        """Of a schema of the document, which refers to its components."""
        text = json.dumps(schema)
        if text not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            Draft202012Validator.check_schema(whole)
            self._validators[text] = Draft202012Validator(whole)
        return self._validators[text]

    def body(self, path: str) -> Draft202012Validator:
        """Of what a POST to a path takes."""
        return self.validator(self.paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"])

    def check_body(self, path: str, body: Any, status: int, message: str) -> None:
        """Asserts that a POST's body is refused with 400 when, and but for contradictions only when, it says so."""
        is_right = self.body(path).is_valid(body)
        assert is_right or status in (400, 404), (path, body, status)
        assert not is_right or status != 400 or CONTRADICTIONS.match(message), (path, body, message)

    def find(self, path: str) -> dict[str, Any] | None:
        """The operations at the path of a request, as it is sent."""
        path = unquote(re.split("[?#]", path)[0])
        for template, operations in self.paths.items():
            one = ".*" if template.startswith("/v1/models/") else "[^/]+"
            if re.fullmatch(re.sub(r"\\{\w+\\}", one, re.escape(template)), path, re.DOTALL):
                return operations
        return None

    def check(self, method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """Asserts that an answer is one that the document has."""
        operations = self.find(path)
        operation = (operations or {}).get("get" if method == "HEAD" else method.lower())
        if operation is None:  # no path, or no method, of the document: the guard answers first, then the routes
            assert status in (401, 403, 431, 404 if operations is None else 405), (method, path, status)
            found = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        else:
            assert str(status) in operation["responses"], (method, path, status, body)
            found = operation["responses"][str(status)]
        for name, header in found.get("headers", {}).items():
            described = self.document["components"]["headers"][header["$ref"].rsplit("/", 1)[1]]
            if (value := headers.get(name.lower())) is None:
                assert not described.get("required"), (path, status, name)
            else:
                kind = int if described["schema"]["type"] == "integer" else str
                self.validator(described["schema"]).validate(kind(value))
        media_type = headers["content-type"].partition(";")[0]
        assert media_type in found["content"], (path, status, media_type)
        if method == "HEAD":
            assert not body
            return
        schema = found["content"][media_type]["schema"]
        if media_type == "application/json":
            self.validator(schema).validate(json.loads(body))
        elif media_type == "text/event-stream":
            *events, end = body.decode().split("\n\n")
            assert not end and events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events)
            _, of_json = self.document["components"]["schemas"]["Event"]["properties"]["data"]["anyOf"]
            validator = self.validator(of_json["contentSchema"])
            for event in events[:-1]:
                validator.validate(json.loads(event.removeprefix("data: ")))
