"""`based serve`: the routes, over real sockets, by plain requests and by the client of OpenAI."""

import asyncio
import contextlib
import gzip
import http.client
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import SamplingParams
from based.server import _logs
from based.server._app import _EventStream, make_app
from based.server._errors import ApiError
from based.server._requests import FIELDS, SAMPLING, UNSUPPORTED
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.server import damaged
from tests.python.description import Description
from tests.python.serving import PATIENCE, Answer, Running, serving

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model: based.Model) -> Iterator[Running]:
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def bundled() -> based.Model:
    """The model of the package, which has an end token."""
    return based.load()


@pytest.fixture(scope="module")
def bundled_server(bundled: based.Model) -> Iterator[Running]:
    with serving(bundled) as running:
        yield running


def expected(model: based.Model, prompt: Any, **params: Any) -> list[Any]:
    return model.generate([prompt], SamplingParams(**params))[0].outputs


# ---- completions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, [79, 110, 99, 101], "é—", [256]])
def test_a_completion_is_what_generate_gives(server: Running, model: based.Model, prompt: Any) -> None:
    answer = server.complete(prompt=prompt, max_tokens=9, **GREEDY)
    (wanted,) = expected(model, prompt, max_tokens=9, **GREEDY)
    length = len(model.encode(prompt)) if isinstance(prompt, str) else len(prompt)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": wanted.text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": length,
        "completion_tokens": 9,
        "total_tokens": length + 9,
        "prompt_tokens_details": None,
    }
    assert 0 <= answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= length


def test_several_prompts_and_samples(server: Running, model: based.Model) -> None:
    prompts: list[Any] = [PROMPT, [1, 2, 3], "x"]
    params = {"max_tokens": 6, "seed": 7, "n": 2, "ignore_eos": True}
    choices = server.complete(prompt=prompts, **params)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    wanted = [sample.text for prompt in prompts for sample in expected(model, prompt, **params)]
    assert [choice["text"] for choice in choices] == wanted
    assert len(set(wanted)) == 6


EFFECTS: dict[str, dict[str, Any]] = {
    "n": {"n": 3, "seed": 1},
    "max_tokens": {"max_tokens": 3, "temperature": 0},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": [97], "logit_bias": {97: 50}, "temperature": 0},
    "temperature": {"temperature": 0.5, "seed": 2},
    "top_p": {"top_p": 0.05, "seed": 3},
    "top_k": {"top_k": 2, "seed": 4},
    "min_p": {"min_p": 0.9, "seed": 5},
    "repetition_penalty": {"repetition_penalty": 5.0, "temperature": 0},
    "presence_penalty": {"presence_penalty": 2.0, "temperature": 0},
    "frequency_penalty": {"frequency_penalty": 2.0, "temperature": 0},
    "seed": {"seed": 6},
    "stop": {"stop": ["b", "a"], "logit_bias": {97: 100}, "max_tokens": 9, "temperature": 0},
    "stop_token_ids": {"stop_token_ids": [97], "logit_bias": {97: 100}, "temperature": 0},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {256: 100}, "temperature": 0},
    "logprobs": {"logprobs": 3, "temperature": 0},
    "logit_bias": {"logit_bias": {98: 100.0}, "temperature": 0},
    "include_stop_str_in_output": {
        "include_stop_str_in_output": True,
        "stop": "a",
        "logit_bias": {97: 100},
        "temperature": 0,
    },
    "skip_special_tokens": {
        "skip_special_tokens": False,
        "logit_bias": {256: 100},
        "temperature": 0,
        "ignore_eos": True,
    },
}


@pytest.mark.parametrize("field", SAMPLING)
def test_every_sampling_parameter(bundled_server: Running, bundled: based.Model, field: str) -> None:
    server, model = bundled_server, bundled
    params = EFFECTS[field]
    sent = json.loads(json.dumps(params))  # whose keys are texts
    wanted = expected(model, PROMPT, **params)
    for stream in (False, True):
        body = {"prompt": PROMPT, "stream": stream} | sent
        answer = server.ask("/v1/completions", body)
        choices = joined(answer.events) if stream else answer.json["choices"]
        assert [(c["text"], c["finish_reason"], c["stop_reason"]) for c in choices] == [
            (w.text, w.finish_reason, w.stop_reason) for w in wanted
        ]
    without = {name: value for name, value in params.items() if name != field} | {"max_tokens": 40}
    if field not in ("n", "seed", "logprobs"):  # which change no text, or all of it
        changed = expected(model, PROMPT, **({"seed": 1} | without))[0]
        assert (changed.text, changed.finish_reason) != (wanted[0].text, wanted[0].finish_reason)


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the events of a stream make together."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "stop_reason": None})
            assert choice.get("finish_reason") is None, "an event behind the last one"
            choice["text"] += piece["text"]
            choice |= {key: piece[key] for key in ("finish_reason", "stop_reason") if key in piece}
    return [choices[index] for index in sorted(choices)]


def test_the_default_of_max_tokens_is_openais(server: Running) -> None:
    assert server.complete(prompt=PROMPT, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_null_is_a_field_that_is_not_given(server: Running) -> None:
    nulls = dict.fromkeys([*FIELDS, *UNSUPPORTED])
    body = nulls | {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    assert server.text(**body) == server.text(prompt=PROMPT, temperature=0, max_tokens=4)


def test_best_of_gives_the_likeliest(server: Running, model: based.Model) -> None:
    params = {"max_tokens": 5, "seed": 11, "ignore_eos": True}
    samples = expected(model, PROMPT, n=6, **params)
    ranked = sorted(samples, key=lambda sample: -sample.cumulative_logprob / len(sample.token_ids))
    answer = server.complete(prompt=PROMPT, n=2, best_of=6, **params)
    assert [choice["text"] for choice in answer["choices"]] == [sample.text for sample in ranked[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 30
    server.refused(400, "best_of", prompt=PROMPT, n=2, best_of=1)
    server.refused(400, "best_of", prompt=PROMPT, n=2, best_of=3, stream=True)


def test_logprobs(server: Running, model: based.Model) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=5, logprobs=2, **GREEDY)
    (wanted,) = expected(model, PROMPT, max_tokens=5, logprobs=2, **GREEDY)
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == [model._tokenizer.detokenizer().token_text(token) for token in wanted.token_ids]
    for entry, token, logprob, top in zip(
        wanted.logprobs, wanted.token_ids, found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert logprob == pytest.approx(entry[token].logprob)
        assert sorted(top.values()) == pytest.approx(sorted(each.logprob for each in entry.values()))
    assert found["text_offset"] == [0, 1, 2, 3, 4] or len(wanted.text) < 5


def test_offsets_count_letters_of_the_text(server: Running) -> None:
    """é takes two tokens here: both begin at the same letter, and the next one behind it."""
    bias = {str(token): 100 for token in (0xC3,)}
    found = server.complete(prompt="aé—b", max_tokens=2, echo=True, logprobs=0, logit_bias=bias, **GREEDY)["choices"][0]
    assert found["text"].startswith("aé—b")
    assert found["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3, 4, 4]


def test_tokens_named_by_their_ids(server: Running) -> None:
    answer = server.complete(
        prompt=[65, 66], max_tokens=2, logprobs=0, return_tokens_as_token_ids=True, return_token_ids=True, **GREEDY
    )
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == [65, 66]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_echo(server: Running) -> None:
    alone = server.text(prompt=PROMPT, max_tokens=4, **GREEDY)
    for stream in (False, True):
        body = {"prompt": [PROMPT, [65, 66]], "max_tokens": 4, "echo": True, "stream": stream, **GREEDY}
        answer = server.ask("/v1/completions", body)
        choices = joined(answer.events) if stream else answer.json["choices"]
        assert choices[0]["text"] == PROMPT + alone
        assert choices[1]["text"].startswith("AB")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_echo_gives_the_prompts_logprobs(server: Running, model: based.Model, count: int) -> None:
    ids = model.encode(PROMPT)
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 2, "echo": True, "logprobs": count, "stream": stream, **GREEDY}
        answer = server.ask("/v1/completions", body)
        pieces = [c for e in answer.events for c in e["choices"]] if stream else answer.json["choices"]
        found = {key: [x for piece in pieces for x in piece["logprobs"][key]] for key in pieces[0]["logprobs"]}
        assert found["tokens"][: len(ids)] == list(PROMPT) and len(found["tokens"]) == len(ids) + 2
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], model.score(ids), rtol=1e-4, atol=1e-4)
        logits = model.forward(ids)
        for position, top in enumerate(found["top_logprobs"][1 : len(ids)]):
            assert 1 <= len(top) <= count + 1  # parts of characters share a name
            if count:
                row = logits[position].astype(np.float64)
                assert max(top.values()) == pytest.approx(row.max() - np.logaddexp.reduce(row), abs=1e-4)
        assert found["text_offset"][: len(ids)] == list(range(len(ids)))


def test_echo_without_new_tokens(server: Running) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == 0
    assert joined(
        server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 0, "echo": True, "stream": True}).events
    ) == [{"text": PROMPT, "finish_reason": "length", "stop_reason": None}]
    server.refused(400, "max_tokens", prompt=PROMPT, max_tokens=0)


def test_a_stream_has_one_event_for_each_token(server: Running, model: based.Model) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    events = server.ask("/v1/completions", body).events
    assert [len(event["choices"]) for event in events] == [1] * 12 + [0]
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert len({event["id"] for event in events}) == 1
    (wanted,) = expected(model, PROMPT, max_tokens=12, **GREEDY)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == wanted.text
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 11 + ["length"]
    without = server.ask("/v1/completions", body | {"stream_options": None}).events
    assert len(without) == 12 and all("usage" not in event for event in without)
    each = server.ask("/v1/completions", body | {"stream_options": {"continuous_usage_stats": True}}).events
    assert [event["usage"]["completion_tokens"] for event in each] == list(range(1, 13))


def test_a_stream_of_several_prompts_and_samples(server: Running, model: based.Model) -> None:
    params = {"max_tokens": 5, "n": 2, "seed": 3, "ignore_eos": True}
    prompts: list[Any] = [PROMPT, "y", [5]]
    events = server.ask("/v1/completions", {"prompt": prompts, "stream": True} | params).events
    wanted = [sample.text for prompt in prompts for sample in expected(model, prompt, **params)]
    assert [choice["text"] for choice in joined(events)] == wanted


def test_a_model_without_tokenizer(mute_model: based.Model) -> None:
    with serving(mute_model) as server:
        server.refused(400, "prompt", prompt="text")
        answer = server.complete(prompt=[1, 2], max_tokens=3, return_token_ids=True, logprobs=1, echo=True, **GREEDY)
        assert answer["choices"][0]["text"] == "" and len(answer["choices"][0]["token_ids"]) == 3
        assert answer["choices"][0]["logprobs"]["tokens"][:2] == ["token_id:1", "token_id:2"]
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}), ("/tokenizer_info", None)):
            assert server.ask(path, body).error["code"] == "no_tokenizer"


def test_a_timeout_ends_a_request_with_what_it_has(server: Running) -> None:
    begin = time.monotonic()
    choice = server.complete(prompt=PROMPT, max_tokens=10**9, timeout=0.2, **GREEDY)["choices"][0]
    assert time.monotonic() - begin < 20
    assert choice["finish_reason"] == "abort" and choice["text"]


# ---- what is wrong ---------------------------------------------------------------------------------------------------


WRONG: list[tuple[str, Any]] = [
    ("model", 5),
    ("prompt", None),
    ("prompt", 5),
    ("prompt", {}),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [None]),
    ("prompt", [1.0]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [258]),
    ("prompt", [10**300]),
    ("prompt", ["a", 1]),
    ("prompt", [1, "a"]),
    ("prompt", [[1], [1, [2]]]),
    ("prompt", "\ud800"),
    ("prompt", ["a", "\udfff"]),
    ("n", 0),
    ("n", 129),
    ("n", 1.5),
    ("n", True),
    ("n", 10**30),
    ("best_of", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.0),
    ("max_tokens", "3"),
    ("max_tokens", 10**30),
    ("min_tokens", 99),
    ("min_tokens", -1),
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 10**350),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 0.5),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", "x"),
    ("stop", 5),
    ("stop", [5]),
    ("stop", [""]),
    ("stop", {}),
    ("stop", ["\ud83d"]),
    ("stop", ["a"] * 65),
    ("stop", "a" * 1025),
    ("stop_token_ids", 5),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [258]),
    ("stop_token_ids", [-1]),
    ("ignore_eos", 1),
    ("ignore_eos", "yes"),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("logit_bias", []),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1.0": 1}),
    ("logit_bias", {"258": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {"1": None}),
    ("include_stop_str_in_output", 0),
    ("skip_special_tokens", "no"),
    ("echo", 1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("user", 5),
    ("user", "\udc00"),
    ("priority", 1.5),
    ("priority", 2**31),
    ("timeout", 0),
    ("timeout", -1),
    ("timeout", True),
    ("timeout", 1e300),
    ("state_id", 5),
    ("state_id", "../etc/passwd"),
    ("state_id", ""),
    ("save_state", 1),
    ("save_state", "a/b"),
    ("save_state", ".hidden"),
    ("save_state", "x" * 129),
    ("split_special_tokens", 1),
    ("return_token_ids", 1),
    ("return_tokens_as_token_ids", 1),
    ("suffix", "end"),
    ("prompt_logprobs", 1),
    ("messages", []),
    ("temprature", 1),
    ("", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: str(value)[:30].encode("unicode_escape").decode())
def test_wrong_fields_are_named(server: Running, field: str, value: Any) -> None:
    error = server.refused(400, field, **({"prompt": "a"} | {field: value}))
    assert error["type"] == "invalid_request_error"
    if field:
        assert field in error["message"]


def test_the_description_refuses_what_the_server_refuses(server: Running) -> None:
    """Before it is asked: each wrong value is wrong by the schema, but for those that only the other fields make so."""
    validator = Description(server.ask("/openapi.json").json).body("/v1/completions")
    right = {"prompt": "a", "state_id": None, "save_state": "s", "stop": ["x"], "logit_bias": {"1": -5}, "top_k": -1}
    assert validator.is_valid(right) and validator.is_valid({"state_id": "s"})
    assert not validator.is_valid({}) and not validator.is_valid({"prompt": "a", "stream_options": {"include": True}})
    passed = [(field, value) for field, value in WRONG if validator.is_valid({"prompt": "a"} | {field: value})]
    contradictions = [("prompt", None), ("prompt", []), ("prompt", [[]]), ("min_tokens", 99),
                      ("logit_bias", {"258": 1}), ("stream_options", {"include_usage": True})]  # fmt: skip
    fractions = [("prompt", [1.0]), ("max_tokens", 1.0)]  # integers, to a schema
    surrogates = [(field, value) for field, value in passed if re.search(r"\\ud[89a-f]", json.dumps(value))]
    assert sorted(map(repr, passed)) == sorted(map(repr, [*contradictions, *fractions, *surrogates]))


def test_the_description_has_the_servers_own_bounds(model: based.Model) -> None:
    limits = {"n": 3, "logprobs": 2, "new_tokens": 7, "prompts": 2, "prompt_tokens": 20}
    with serving(model, api_keys=["k"], **limits) as server:
        server.headers["authorization"] = "Bearer k"
        document = server.ask("/openapi.json").json
        (scheme,) = document["components"]["securitySchemes"].values()
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        for path, operations in document["paths"].items():
            for operation in operations.values():
                is_open = path in ("/", "/health", "/ping", "/metrics")
                assert ("security" not in operation) == ("401" not in operation["responses"]) == is_open
                assert "403" not in operation["responses"] and "422" not in operation["responses"]
                assert ("requestBody" in operation) == ("413" in operation["responses"])
        validator = Description(document).body("/v1/completions")
        for right, wrong in (
            ({"prompt": [257] * 20}, {"prompt": [258]}),
            ({"prompt": ["a", [1]]}, {"prompt": ["a"] * 3}),
            ({"n": 3}, {"n": 4}),
            ({"best_of": 3}, {"best_of": 4}),
            ({"logprobs": 2}, {"logprobs": 3}),
            ({"max_tokens": 7}, {"max_tokens": 8}),
            ({"min_tokens": 7}, {"min_tokens": 8}),
            ({"model": "tiny"}, {"model": "other"}),
            ({"stop_token_ids": [257]}, {"stop_token_ids": [258]}),
            ({"suffix": None}, {"suffix": "x"}),
        ):
            assert server.ask("/v1/completions", {"prompt": "a"} | right).status == 200
            assert server.ask("/v1/completions", {"prompt": "a"} | wrong).status in (400, 404)
            assert validator.is_valid({"prompt": "a"} | right) and not validator.is_valid({"prompt": "a"} | wrong)
        properties = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]
        assert properties["properties"]["max_tokens"]["default"] == 7


def test_every_field_is_tried_with_a_wrong_value() -> None:
    assert {field for field, _ in WRONG} >= set(FIELDS)


def test_fields_that_contradict_each_other(server: Running) -> None:
    server.refused(400, "stream_options.include", prompt="a", stream=True, stream_options={"include": True})
    server.refused(400, "stream_options.include_usage", prompt="a", stream=True, stream_options={"include_usage": 1})
    server.refused(400, "save_state", prompt="a", n=2, save_state=True)
    server.refused(400, "save_state", prompt=["a", "b"], save_state=True)
    server.refused(404, "state_id", prompt="a", state_id="nobody")
    assert server.refused(404, "model", prompt="a", model="gpt-4")["code"] == "model_not_found"
    assert "'temperature'" in server.refused(400, "temprature", prompt="a", temprature=1)["message"]


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"5",
    b'{"prompt": "a",}',
    b'{"prompt": "a"} x',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a\x00"}',
    b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"prompt": ' + b"[" * 990 + b"]" * 990 + b"}",
    b'{"prompt": [' + b"[]," * 500_000 + b"[]]}",
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
]


@pytest.mark.parametrize("data", BODIES, ids=lambda data: repr(data[:20]))
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize", "/v1/states/a/fork"])
def test_bodies_that_are_no_request(server: Running, path: str, data: bytes) -> None:
    answer = server.ask(path, data)
    assert answer.status == (404 if path.endswith("fork") and not data else 400)
    assert answer.error["message"]


def test_a_packed_body_is_refused(server: Running) -> None:
    data = gzip.compress(b'{"prompt": "a"}')
    for path in ("/v1/completions", "/tokenize", "/v1/states/a/fork"):
        answer = server.ask(path, data, headers={"content-encoding": "gzip"})
        assert answer.status == 415 and answer.error["code"] == "unsupported_encoding"
        assert "'gzip'" in answer.error["message"]
    plain = {"content-encoding": "identity"}
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=plain).status == 200


def test_messages_speak_of_json(server: Running) -> None:
    """Not of Python's types, which the client did not send."""
    for field, value, message in (
        ("temperature", "hot", "temperature is the text 'hot', expected a number"),
        ("temperature", True, "temperature is true, expected a number"),
        ("temperature", -1, "temperature is the number -1, expected 0 … 1e+308"),
        ("top_p", 0, "top_p is the number 0, expected above 0 and at most 1"),
        ("top_k", 0.5, "top_k is the number 0.5, expected an integer"),
        ("seed", 2**64, "seed is the number 18446744073709551616, expected 0 … 18446744073709551615"),
        ("ignore_eos", 1, "ignore_eos is the number 1, expected true or false"),
        ("stop_token_ids", [None], "stop_token_ids[0] is null, expected a token id, 0 … 257"),
        ("stop", [""], "stop[0] is an empty text, which would stop everything"),
        ("logit_bias", {"1": True}, "logit_bias of token 1 is true, expected a number, -100 … 100"),
        ("prompt", [5, 1.0], "prompt[1] is the number 1.0, expected a token id, 0 … 257"),
        ("prompt", [[1], [258]], "prompt[1][0] is the number 258, expected a token id, 0 … 257"),
        ("timeout", 0, "timeout is the number 0, expected above 0 and at most 1e+09"),
    ):
        assert server.refused(400, field, **({"prompt": "a"} | {field: value}))["message"] == message
    words = re.compile(r"\b(str|float|bool|int|dict|NoneType|True|False|None)\b")
    for field, value in WRONG:
        message = server.refused(400, field, **({"prompt": "a"} | {field: value}))["message"]
        assert not words.search(message), message


def test_a_body_must_say_that_it_is_json(server: Running) -> None:
    """Browsers send forms and plain text to other sites without asking those."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.ask("/v1/completions", b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status == 415 and answer.error
    assert server.ask(
        "/v1/completions", b'{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
    )


def test_routes_that_are_not_there(server: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        answer = server.ask(path, {"messages": []})
        assert answer.status == 404 and "base model" in answer.error["message"]
    assert server.ask("/v1/embeddings", {}).status == 404
    assert server.ask("/nothing").error["code"] == "not_found"
    assert server.ask("/docs").status == 404  # it would take scripts from elsewhere
    answer = server.ask("/v1/completions")
    assert answer.status == 405 and answer.error["code"] == "method_not_allowed" and answer.headers["allow"] == "POST"


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["a", "../x", "\ud800", "x" * 200, 2**31, 2**63, 2**64, 10**350, -0.0, 1e308, [1], ["a"]])
)
LISTS = LEAVES | st.lists(LEAVES, max_size=4)
VALUES = st.deferred(
    lambda: LISTS | st.lists(LISTS, max_size=3) | st.dictionaries(st.text(max_size=3), LISTS, max_size=3)
)
REQUESTS = st.fixed_dictionaries(
    {"prompt": st.just("ab") | VALUES},
    optional={name: VALUES for name in [*FIELDS, "unknown", "suffix"] if name != "prompt"},
)


@pytest.fixture(scope="module")
def small_server(model: based.Model) -> Iterator[Running]:
    with serving(model, new_tokens=4, n=4, prompts=4, log_requests=False) as running:
        yield running


@settings(max_examples=1000)
@given(body=REQUESTS)
def test_no_request_is_an_error_of_the_server(small_server: Running, body: dict[str, Any]) -> None:
    answer = small_server.ask("/v1/completions", body)
    assert answer.status in (200, 400, 404), answer.body
    message = "" if answer.status == 200 else answer.error["message"]
    small_server.description.check_body("/v1/completions", body, answer.status, message)
    if answer.status != 200:
        assert answer.error["type"] in ("invalid_request_error", "not_found_error")
        return
    objects = answer.events if body.get("stream") else [answer.json]
    assert not any("error" in each for each in objects)
    assert all(math.isfinite(value) for value in numbers(objects))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


@settings(max_examples=300)
@given(data=st.binary(max_size=60) | st.binary(max_size=20).map(lambda data: b'{"prompt": "' + data + b'"}'))
def test_no_body_is_an_error_of_the_server(small_server: Running, data: bytes) -> None:
    answer = small_server.ask("/v1/completions", data)
    assert answer.status == 200 or (answer.status == 400 and answer.error)


@settings(max_examples=200)
@given(
    path=st.sampled_from(["/tokenize", "/detokenize", "/v1/states/s/save", "/v1/states/s/fork", "/v1/states/s/load"]),
    body=st.dictionaries(st.sampled_from(["prompt", "tokens", "to", "model", "add_special_tokens", "x"]), VALUES),
)
def test_no_other_request_is_one(small_server: Running, path: str, body: Any) -> None:
    answer = small_server.ask(path, body)
    assert answer.status == 200 or (answer.status in (400, 404, 409) and answer.error)
    if answer.status != 409:
        message = "" if answer.status == 200 else answer.error["message"]
        template = re.sub("/s/", "/{name}/", path)
        small_server.description.check_body(template, body, answer.status, message)


@settings(max_examples=200)
@given(path=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30))
def test_no_path_is_one(small_server: Running, path: str) -> None:
    for method in ("GET", "DELETE", "POST"):
        answer = small_server.ask("/v1/states/" + path, method=method)
        assert answer.status in (200, 400, 404, 405, 409), answer.body


@settings(max_examples=200)
@given(data=st.binary(min_size=1, max_size=200))
def test_no_bytes_are_one(small_server: Running, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", small_server.port), timeout=20) as connection:
        connection.sendall(data + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert re.match(rb"$|HTTP/1.1 [2-4]\d\d ", received), received


def test_no_damaged_request_is_one(small_server: Running) -> None:
    assert damaged(small_server.port, 600, seed=1) == []


# ---- the other routes ------------------------------------------------------------------------------------------------


def test_head_is_get_without_a_body(server: Running) -> None:
    for path in ("/", "/health", "/ping", "/metrics", "/v1/models", "/v1/models/tiny", "/server_info", "/v1/states",
                 "/tokenizer_info", "/openapi.json", "/v1/states/none", "/nothing"):  # fmt: skip
        with_body, answer = server.ask(path), server.ask(path, method="HEAD")
        assert answer.status == with_body.status and not answer.body and answer.headers["x-request-id"]
        assert answer.headers["content-type"] == with_body.headers["content-type"]
    assert "head" not in server.ask("/openapi.json").json["paths"]["/health"]


def test_allow_names_all_methods_of_a_path(server: Running) -> None:
    for path, method, allow in (
        ("/v1/completions", "GET", "POST"),
        ("/v1/completions", "HEAD", "POST"),
        ("/health", "POST", "GET, HEAD"),
        ("/v1/states/a", "PUT", "DELETE, GET, HEAD"),
        ("/v1/states/a/fork", "DELETE", "POST"),
        ("/v1/models", "DELETE", "GET, HEAD"),
    ):
        answer = server.ask(path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        assert method == "HEAD" or answer.error["message"].endswith(f"takes no {method}, expected {allow}")


def test_models(server: Running, models: Any) -> None:
    listed = server.ask("/v1/models").json
    (card,) = listed["data"]
    assert listed["object"] == "list" and card["id"] == "tiny" and card["max_model_len"] is None
    assert server.ask("/v1/models/tiny").json == card
    assert server.ask("/v1/models/other/name").error["code"] == "model_not_found"
    with serving(models("attn-tiny")) as other:
        (card,) = other.ask("/v1/models").json["data"]
        assert card["max_model_len"] == models("attn-tiny").max_context


def test_health_while_loading(model: based.Model) -> None:
    go_on = threading.Event()

    def load() -> Any:
        assert go_on.wait(60)
        return model, model.engine(max_batch_size=2)

    with serving(load, wait=False) as server:
        answer = server.ask("/health")
        assert (answer.status, answer.json) == (503, {"status": "loading"})
        for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            answer = server.ask(path, body)
            assert answer.status == 503 and answer.error["code"] == "loading" and int(answer.headers["retry-after"]) > 0
        assert server.ask("/metrics").status == 200
        go_on.set()
        server.until(lambda: server.ask("/health").status == 200)
        assert server.text(prompt="a", max_tokens=1) is not None


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Any:
        raise FileNotFoundError("no model")

    with serving(load) as server:
        assert isinstance(server.service.failure, FileNotFoundError)


def test_tokenize_and_back(server: Running, bundled_server: Running, model: based.Model) -> None:
    for text in (PROMPT, "", "é\U0001f600", "<eos>"):
        found = server.ask("/tokenize", {"prompt": text, "return_token_strs": True}).json
        assert found["tokens"] == model.encode(text) and found["count"] == len(found["tokens"])
        assert len(found["token_strs"]) == found["count"] and found["max_model_len"] is None
    ids = model.encode("é<eos>")
    assert server.ask("/detokenize", {"tokens": ids}).json == {"prompt": "é<eos>"}
    assert server.ask("/detokenize", {"tokens": []}).json == {"prompt": ""}
    split = server.ask("/tokenize", {"prompt": "<eos>", "split_special_tokens": True}).json
    assert split["count"] == 5
    for body in ({}, {"prompt": 5}, {"prompt": "\ud800"}, {"prompt": "a", "x": 1}, {"prompt": "a", "model": "x"}):
        assert server.ask("/tokenize", body).error["param"] in ("prompt", "x", "model")
    for tokens in (None, "a", [258], [1.5], [[1]], [-1], [True]):
        assert server.ask("/detokenize", {"tokens": tokens}).error["param"] == "tokens"
    info = server.ask("/tokenizer_info").json
    assert info["vocab_size"] == 258 and info["eos_token"] is None
    assert bundled_server.ask("/tokenizer_info").json["eos_token"] == "<|endoftext|>"


def test_server_info(server: Running, model: based.Model) -> None:
    info = server.ask("/server_info").json
    assert info["version"] == based.__version__
    assert info["model"]["fingerprint"] == model.fingerprint and info["model"]["state_nbytes"] == model.state_nbytes
    assert info["engine"]["max_batch_size"] == 8 and info["limits"]["n"] == 128


def test_the_page_takes_nothing_from_elsewhere(server: Running) -> None:
    answer = server.ask("/")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    page = answer.body.decode()
    assert "/v1/completions" in page and not re.search(
        r"https?:(?!//www\.w3\.org)|src=|@import|<link (?!rel=.icon. href=.data:)", page
    )
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_request_ids(server: Running) -> None:
    assert server.ask("/health", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("x" * 129, "a b", ""):
        found = server.ask("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{16}", found)
    answer = server.ask("/v1/completions", {"prompt": 5}, headers={"X-Request-ID": "mine-2"})
    assert answer.status == 400 and answer.headers["x-request-id"] == "mine-2"


def test_refused_heads_have_request_ids(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "based.server")
    for head, status in ((b"nonsense\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 431)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head)
            received = b"".join(iter(lambda c=connection: c.recv(1 << 16), b"")).decode()
        assert received.startswith(f"HTTP/1.1 {status} ")
        identity = re.search(r"\r\nx-request-id: ([0-9a-f]{16})\r\n", received)[1]
        assert any(identity in record.getMessage() for record in caplog.records)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def read_metrics(server: Running) -> dict[str, float]:
    lines = server.ask("/metrics").body.decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_count_what_happened(model: based.Model) -> None:
    label = '{model_name="tiny"}'
    with serving(model, metrics_prefix="vllm") as server:
        server.complete(prompt=[1, 2, 3], max_tokens=5, **GREEDY)
        server.ask("/v1/completions", {"prompt": [1, 2], "max_tokens": 4, "n": 2, "stream": True, **GREEDY})
        server.refused(400, "n", prompt="a", n=0)
        found = read_metrics(server)
        assert found[f"vllm:prompt_tokens_total{label}"] == 5
        assert found[f"vllm:generation_tokens_total{label}"] == 13
        assert found[f"vllm:num_requests_running{label}"] == found[f"vllm:num_requests_waiting{label}"] == 0
        assert found['vllm:request_success_total{finished_reason="length",model_name="tiny"}'] == 3
        assert found['vllm:http_responses_total{route="/v1/completions",status="200"}'] == 2
        assert found['vllm:http_responses_total{route="/v1/completions",status="400"}'] == 1
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time",
                     "request_decode_time", "request_inference_time", "request_time_per_output_token"):  # fmt: skip
            assert found[f"vllm:{name}_seconds_count{label}"] == 2, name
            assert found[f'vllm:{name}_seconds_bucket{{le="+Inf",model_name="tiny"}}'] == 2
            assert f'vllm:{name}_seconds_bucket{{le="0.001",model_name="tiny"}}' in found
        assert found[f"vllm:inter_token_latency_seconds_count{label}"] == 4 + 2 * 3
        assert found[f"vllm:request_prompt_tokens_sum{label}"] == 5
        assert found[f"vllm:num_preemptions_total{label}"] == 0
        by_source = [found[f'vllm:prompt_tokens_by_source_total{{model_name="tiny",source="{source}"}}'] for source in
                     ("local_compute", "local_cache_hit")]  # fmt: skip
        assert sum(by_source) == 5
        assert found[f"vllm:prefix_cache_hits_total{label}"] == by_source[1]
        assert found[f"vllm:prompt_tokens_cached_total{label}"] == by_source[1]
    assert not any(name.startswith("based:") for name in found)


def test_a_prompt_that_was_seen_is_not_computed_again(model: based.Model) -> None:
    body = {"prompt": [index % 200 for index in range(600)], "max_tokens": 3, **GREEDY}
    with serving(model, engine={"cache_bytes": 1 << 28}) as server:
        first, second = server.complete(**body), server.complete(**body)
        assert first["choices"] == second["choices"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert 512 <= cached < 600
        found = read_metrics(server)
        assert found['based:prefix_cache_hits_total{model_name="tiny"}'] == cached
        assert found['based:prefix_cache_queries_total{model_name="tiny"}'] >= cached
        assert found['based:prompt_tokens_cached_total{model_name="tiny"}'] == cached
        assert found['based:cached_states{model_name="tiny",tier="device"}'] > 0
        assert found['based:request_prefill_kv_computed_tokens_sum{model_name="tiny"}'] == 1200 - cached
    with serving(model, engine={"cache_bytes": 0}) as server:
        for _ in range(2):
            assert server.complete(**body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_conversation_by_states_is_one_of_a_session(server: Running, model: based.Model) -> None:
    session = model.session()
    state = None
    for turn in ("Once upon", " a time", ""):
        (wanted,) = session.generate([turn] if turn else [[]], SamplingParams(max_tokens=5, **GREEDY))
        body = {"prompt": turn, "max_tokens": 5, "save_state": True, **GREEDY} | ({"state_id": state} if state else {})
        answer = server.complete(**body)
        assert answer["choices"][0]["text"] == wanted.outputs[0].text
        state = answer["state_id"]
        assert server.ask(f"/v1/states/{state}").json["num_tokens"] == session.num_tokens[0]


def stream_through(app: Any, body: dict[str, Any], send: Any) -> None:
    """A stream of an application without a server, whose client stays."""

    async def run() -> None:
        request: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if not request:
                await asyncio.Event().wait()
            return request.pop()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        path = {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
        about = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"}
        await app(about | path | {"headers": headers, "client": None, "server": None}, receive, send)

    asyncio.run(run())


def test_a_stream_waits_for_a_server_that_takes_its_parts_slowly(model: based.Model) -> None:
    """Of ASGI alone, without what our own server gives besides."""
    body = {"prompt": [PROMPT, "def f("], "max_tokens": 400, "stream": True, **GREEDY}
    with serving(model) as server:
        expected = {number: "" for number in range(2)}
        for event in server.ask("/v1/completions", body).events:
            expected[event["choices"][0]["index"]] += event["choices"][0]["text"]
        sent: list[Any] = []
        num_open = 0

        async def send(message: Any) -> None:
            nonlocal num_open
            num_open += 1
            assert num_open == 1  # one at a time
            await asyncio.sleep(0.01)
            sent.append(message)
            num_open -= 1

        stream_through(make_app(server.service), body, send)
        data = b"".join(message.get("body", b"") for message in sent)
        *events, done, end = data.decode().split("\n\n")
        assert (done, end, sent[-1]["more_body"]) == ("data: [DONE]", "", False)
        texts = {number: "" for number in range(2)}
        for event in events:
            [choice] = json.loads(event.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == expected and len(sent) < len(events)

        async def fail(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise OSError("this server takes no more")

        with pytest.raises(OSError, match="takes no more"):
            stream_through(make_app(server.service), body, fail)
        server.until(lambda: server.service._num_requests == 0 and server.engine.stats().running == 0)


def test_a_state_in_a_stream(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "save_state": "streamed", "stream": True, **GREEDY}
    events = server.ask("/v1/completions", body).events
    assert events[-1]["state_id"] == "streamed" and events[-1]["choices"] == []
    assert server.ask("/v1/states/streamed").json["num_tokens"] == len(PROMPT) + 3


def test_a_whole_answer_leaves_its_state_though_nobody_reads_it(
    model: based.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a client goes away, the state stays if the answer had come to its end before."""
    send_events = _EventStream._send_events

    async def send_when_gone(self: _EventStream, scope: Any, send: Any) -> None:
        while not self._is_gone:
            await asyncio.sleep(0.005)
        await send_events(self, scope, send)

    with serving(model) as server:
        connection, response = begin_stream(server, save_state="cut")
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        server.until(lambda: server.service._num_requests == 0)
        assert server.ask("/v1/states/cut").status == 404
        assert "state_id" not in server.complete(prompt="x", max_tokens=10**9, timeout=0.2, save_state="late", **GREEDY)
        assert server.ask("/v1/states/late").status == 404

        monkeypatch.setattr(_EventStream, "_send_events", send_when_gone)
        generated = server.engine.stats().generated_tokens
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        body = {"prompt": PROMPT, "max_tokens": 40, "stream": True, "save_state": "whole", **GREEDY}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        server.until(lambda: server.engine.stats().generated_tokens == generated + 40)
        server.until(lambda: server.engine.stats().running == 0)
        connection.sock.shutdown(socket.SHUT_RDWR)
        response.close()
        connection.close()
        server.until(lambda: server.service._num_requests == 0)
        assert server.ask("/v1/states/whole").json["num_tokens"] == len(PROMPT) + 40


def test_fork_and_rollback(server: Running) -> None:
    first = server.complete(prompt=PROMPT, max_tokens=4, save_state="root", **GREEDY)
    assert first["state_id"] == "root"
    body = {"state_id": "root", "prompt": " and", "max_tokens": 6, **GREEDY}
    text = server.text(**body)
    server.complete(**(body | {"save_state": "left", "prompt": " but"}))
    assert server.text(**body) == text  # a state is not changed by what goes on from it
    forked = server.ask("/v1/states/root/fork", {"to": "right"}).json
    assert forked["id"] == "right" and forked["num_tokens"] == server.ask("/v1/states/root").json["num_tokens"]
    assert server.text(**(body | {"state_id": "right"})) == text
    assert server.ask("/v1/states/root/fork", {"to": "right"}).status == 409
    assert server.ask("/v1/states/root/fork", method="POST").json["id"].startswith("state-")
    names = [state["id"] for state in server.ask("/v1/states").json["data"]]
    assert {"root", "left", "right"} <= set(names)
    assert server.ask("/v1/states/root", method="DELETE").json["deleted"]
    assert server.ask("/v1/states/root", method="DELETE").status == 404
    server.refused(404, "state_id", **body)
    assert server.text(**(body | {"state_id": "right"})) == text


def test_samples_of_a_state(server: Running) -> None:
    server.complete(prompt=PROMPT, max_tokens=4, save_state="many", **GREEDY)
    choices = server.complete(state_id="many", n=3, max_tokens=8, seed=1, ignore_eos=True)["choices"]
    assert len({choice["text"] for choice in choices}) == 3


def test_files_of_states(model: based.Model, tmp_path: Path) -> None:
    body = {"state_id": "kept", "prompt": " and", "max_tokens": 6, **GREEDY}
    with serving(model, state_dir=tmp_path / "states") as server:
        server.complete(prompt=PROMPT, max_tokens=4, save_state="kept", **GREEDY)
        server.complete(prompt="x", max_tokens=4, save_state="other", **GREEDY)
        assert not server.ask("/v1/states/kept").json["saved"]
        assert server.ask("/v1/states/kept/save", method="POST").json["saved"]
        assert server.ask("/v1/states/kept/save", {"to": "copy"}).json["id"] == "copy"
        assert {path.name for path in (tmp_path / "states").iterdir()} == {"kept.safetensors", "copy.safetensors"}
        text = server.text(**body)
        for name in ("..", "a%2Fb", "..%2Fkept", "%2e%2e", ".probe", "x" * 200, "a%00", "%ff"):
            for verb in ("", "/save", "/load", "/fork"):
                answer = server.ask(f"/v1/states/{name}{verb}", method="POST" if verb else "DELETE")
                assert answer.status in (400, 404, 405), (name, verb)
        assert server.ask("/v1/states/kept/save", {"to": "../out"}).error["param"] == "to"
    assert (tmp_path / "states" / "other.safetensors").exists()  # saved at the end
    with serving(model, state_dir=tmp_path / "states") as server:
        found = {state["id"]: state for state in server.ask("/v1/states").json["data"]}
        assert set(found) == {"kept", "copy", "other"}
        assert found["kept"]["saved"] and not found["kept"]["in_memory"]
        assert found["kept"]["num_tokens"] == len(PROMPT) + 4
        assert server.text(**body) == text
        assert server.ask("/v1/states/copy/load", method="POST").json["in_memory"]
        assert server.text(**(body | {"state_id": "copy"})) == text
        assert server.ask("/v1/states/kept", method="DELETE").status == 200
        assert server.ask("/v1/states/kept/load", method="POST").status == 404
        (tmp_path / "states" / "broken.safetensors").write_bytes(b"nonsense")
        assert server.refused(409, "state_id", prompt="a", state_id="broken")["code"] == "wrong_state"
    assert not (tmp_path / "states" / "kept.safetensors").exists()


def test_a_state_of_another_model(model: based.Model, models: Any, tmp_path: Path) -> None:
    session = models("mamba-tiny").session()
    session.prefill([[1, 2]])
    session.state().save(tmp_path / "alien.safetensors")
    with serving(model, state_dir=tmp_path) as server:
        assert server.refused(409, "state_id", prompt="a", state_id="alien")["code"] == "wrong_state"


def test_states_without_a_folder(server: Running) -> None:
    server.complete(prompt=PROMPT, max_tokens=1, save_state="here")
    for verb in ("save", "load"):
        answer = server.ask(f"/v1/states/here/{verb}", method="POST")
        assert answer.status == 409 and answer.error["code"] == "no_state_dir"


def test_servers_that_share_their_states(model: based.Model, tmp_path: Path) -> None:
    """What one of them keeps, changes or deletes is so for the other at once."""
    options: dict[str, Any] = {"state_dir": tmp_path / "states", "shared_states": True}
    with serving(model, **options) as one, serving(model, **options) as two:
        one.complete(prompt="My name is Ada.", max_tokens=4, save_state="ada", temperature=0)
        expected = one.complete(state_id="ada", prompt=" You", max_tokens=6, temperature=0)["choices"][0]["text"]
        assert two.text(state_id="ada", prompt=" You", max_tokens=6, temperature=0) == expected
        assert two.ask("/v1/states/ada").json["num_tokens"] == one.ask("/v1/states/ada").json["num_tokens"]
        # Another state of this name takes the place of the one that the other server has in memory.
        before = one.ask("/v1/states/ada").json["num_tokens"]
        two.complete(state_id="ada", prompt=" More", max_tokens=3, save_state="ada", ignore_eos=True)
        assert one.ask("/v1/states/ada").json["num_tokens"] > before
        assert one.service._loaded is not None
        assert one.service._loaded[2].get("ada").num_tokens == two.service._loaded[2].get("ada").num_tokens
        # A name is given once.
        assert one.ask("/v1/states/ada/fork", {"to": "bob"}).status == 200
        assert two.ask("/v1/states/ada/fork", {"to": "bob"}).status == 409
        with pytest.raises(ApiError, match="already"):  # also where both find that it is free
            two.service._loaded[2]._add("bob", two.service._loaded[2].get("ada"), is_new=True)
        assert {state["id"] for state in one.ask("/v1/states").json["data"]} == {"ada", "bob"}
        assert two.ask("/v1/states/bob", method="DELETE").status == 200
        one.refused(404, "state_id", state_id="bob", prompt="a", max_tokens=1)
        assert {state["id"] for state in one.ask("/v1/states").json["data"]} == {"ada"}
        assert sorted(file.name for file in (tmp_path / "states").iterdir()) == ["ada.safetensors"]
    with serving(model, **options) as three:
        three.complete(state_id="ada", prompt="a", max_tokens=1)


def test_memory_for_states_is_bounded(model: based.Model, tmp_path: Path, caplog: Any) -> None:
    def fill(server: Running) -> None:
        for index in range(4):
            server.complete(prompt=f"{index}", max_tokens=1, save_state=f"s{index}", **GREEDY)
        assert server.service._loaded[2].in_memory[0] == 2

    with serving(model, max_states=2) as server:
        fill(server)
        server.refused(404, "state_id", state_id="s0")
        assert read_metrics(server)['based:named_states_lost_total{model_name="tiny"}'] == 2
    with serving(model, max_state_bytes=int(2.5 * model.state_nbytes), state_dir=tmp_path, max_state_files=3) as server:
        fill(server)
        assert server.text(state_id="s0", max_tokens=1) is not None  # from its file
        assert len(server.ask("/v1/states").json["data"]) == 4
        assert server.ask("/v1/states/s0/save", {"to": "one-more"}).status == 507


# ---- access, limits --------------------------------------------------------------------------------------------------


def test_api_keys(model: based.Model) -> None:
    with serving(model, api_keys=["secret", "other"]) as server:
        for key, status in ((None, 401), ("wrong", 401), ("", 401), ("secret", 200), ("other", 200)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
            assert answer.status == status
            if status == 401:
                assert answer.error["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
        assert server.ask("/v1/models", headers={"authorization": "Basic secret"}).status == 401
        assert server.ask("/v1/states/x", method="DELETE").status == 401
        assert [server.ask(path).status for path in ("/", "/health", "/metrics")] == [200] * 3


def test_other_names_of_this_machine_are_refused(model: based.Model, server: Running) -> None:
    """A page of another site whose name was made to mean this machine must not read what the server answers."""

    def status(server: Running, host: str, path: str = "/v1/models") -> int:
        answer = server.ask(path, headers={"host": host})
        if answer.status == 403:
            assert answer.error["code"] == "host_not_allowed" and "--allowed-host" in answer.error["message"]
        return answer.status

    ours = ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.0.0.2", "[::1]", "[::1]:80", "localhost.:80")
    others = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1",
              "[::2]", "[::1].evil.example", "[::1", "", "0.0.0.0", "a:b:c")  # fmt: skip
    assert [status(server, host) for host in ours] == [200] * len(ours)
    assert [status(server, host) for host in others] == [403] * len(others)
    assert [status(server, "evil.example", path) for path in ("/", "/health", "/metrics", "/nothing")] == [403] * 4
    with serving(model, allowed_hosts=["box.example", "[::2]"]) as named:
        hosts = ("box.example:8000", "Box.Example", "[::2]:1", "localhost", "evil.example")
        assert [status(named, host) for host in hosts] == [200, 200, 200, 200, 403]
    with serving(model, allowed_hosts=["*"]) as open_server:
        assert status(open_server, "evil.example") == 200
    with serving(model, api_keys=["k"]) as with_key:
        assert status(with_key, "evil.example") == 401  # the key is what a page does not have
    with serving(model, host="0.0.0.0") as everywhere:
        assert status(everywhere, "box.example") == 200
    with serving(model, api_keys=["k"], allowed_hosts=["box.example"]) as both:
        assert [status(both, host) for host in ("box.example", "evil.example")] == [401, 403]


def test_cors(model: based.Model, server: Running) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST",
             "access-control-request-headers": "content-type"}  # fmt: skip
    assert "access-control-allow-origin" not in server.ask("/health", headers=asked).headers
    with serving(model, allowed_origins=["https://a.example"], api_keys=["k"]) as open_server:
        answer = open_server.ask("/v1/completions", method="OPTIONS", headers=asked)
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = open_server.ask("/v1/models", headers={"origin": "https://a.example"})  # an error is readable, too
        assert answer.status == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = open_server.ask("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_sizes_are_bounded(model: based.Model) -> None:
    limits = {"body_bytes": 1000, "header_bytes": 2000, "prompt_tokens": 20, "n": 3, "prompts": 2, "new_tokens": 7}
    with serving(model, logprobs=2, **limits) as server:
        answer = server.ask("/v1/completions", {"prompt": "a" * 1000})
        assert answer.status == 413 and "1000" in answer.error["message"]
        assert chunked(server, [b"x" * 600, b"x" * 600]).status == 413
        assert server.ask("/health", headers={"x-a": "a" * 2000}).status == 431
        assert server.ask("/" + "a" * 2100).status == 431
        assert server.ask("/health", headers={f"x-{i}": "a" for i in range(400)}).status == 431
        for fields, param in (
            ({"prompt": "a" * 21}, "prompt"),
            ({"prompt": [1] * 21}, "prompt"),
            ({"prompt": "a", "n": 4}, "n"),
            ({"prompt": "a", "best_of": 4}, "best_of"),
            ({"prompt": ["a"] * 3}, "prompt"),
            ({"prompt": "a", "max_tokens": 8}, "max_tokens"),
            ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ):
            server.refused(400, param, **fields)
        assert server.complete(prompt=["a" * 20] * 2, n=3, max_tokens=7, logprobs=2)
        assert server.complete(prompt="a", ignore_eos=True)["usage"]["completion_tokens"] == 7


def chunked(server: Running, pieces: list[bytes]) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", iter(pieces), {"content-type": "application/json"},
                           encode_chunked=True)  # fmt: skip
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())


def test_slow_requests_are_given_up(model: based.Model) -> None:
    with serving(model, read_seconds=0.3) as server:
        for sent in (b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
                     b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: 50\r\n\r\n{"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(sent)
                received = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))
            assert received.startswith(b"HTTP/1.1 408 ") if sent else not received
            assert not sent or b"\r\nx-request-id: " in received


def test_a_context_that_is_too_long(models: Any) -> None:
    small = based.load(GOLDEN / "attn-tiny", dtype="float32", max_context=16)
    with serving(small) as server:
        assert server.complete(prompt=[1] * 10, max_tokens=7, **GREEDY)["choices"][0]["finish_reason"] == "length"
        for tokens, new in ((10, 8), (17, 1), (10, 10**12)):
            error = server.refused(400, "prompt", prompt=[1] * tokens, max_tokens=new)
            assert error["code"] == "context_length_exceeded" and "16" in error["message"]


def begin_stream(server: Running, **body: Any) -> tuple[http.client.HTTPConnection, Any]:
    """A stream of which the first event has come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = json.dumps({"prompt": PROMPT, "max_tokens": 10**8, "stream": True, **GREEDY} | body)
    connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return connection, response


def test_too_many_requests(model: based.Model) -> None:
    with serving(model, engine={"max_batch_size": 1, "max_waiting_requests": 1}) as server:
        connection, response = begin_stream(server)
        with contextlib.closing(connection), response:
            waiting = threading.Thread(target=server.ask, args=("/v1/completions", {"prompt": "a", "max_tokens": 1}))
            waiting.start()
            server.until(lambda: server.engine.stats().waiting_requests == 1)
            answer = server.ask("/v1/completions", {"prompt": "a"})
            assert answer.status == 429 and answer.error["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            answer = server.ask("/v1/completions", {"prompt": ["a", "b"]})
            assert answer.status == 429
        waiting.join(60)
        server.until(lambda: server.service._num_requests == 0)
        assert server.text(prompt="a", max_tokens=1) is not None
    with serving(model, requests=1) as server:
        connection, response = begin_stream(server)
        with contextlib.closing(connection), response:
            assert server.ask("/v1/completions", {"prompt": "a"}).status == 429
            assert server.ask("/health").status == 200
        server.until(lambda: server.service._num_requests == 0)
        assert server.text(prompt="a", max_tokens=1) is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(model: based.Model, stream: bool) -> None:
    with serving(model) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"prompt": [PROMPT, "b"], "max_tokens": 10**8, "n": 2, "stream": stream, **GREEDY}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        server.until(lambda: server.engine.stats().running == 4)
        begin = time.monotonic()
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        server.until(lambda: server.engine.stats().running == 0)
        assert time.monotonic() - begin < 5
        server.until(lambda: server.service._num_requests == 0)
        found = read_metrics(server)
        assert found['based:request_success_total{finished_reason="abort",model_name="tiny"}'] == 4
        assert server.text(prompt="a", max_tokens=1) is not None


def test_many_clients_at_once(server: Running, model: based.Model) -> None:
    prompts = [f"{index} bottles" for index in range(24)]
    wanted = [output.outputs[0].text for output in model.generate(prompts, SamplingParams(max_tokens=9, **GREEDY))]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        body = {"prompt": prompts[index], "max_tokens": 9, "stream": index % 2 == 0, **GREEDY}
        answer = server.ask("/v1/completions", body)
        choices = joined(answer.events) if index % 2 == 0 else answer.json["choices"]
        found[index] = choices[0]["text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(len(prompts))] == wanted


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_the_end_lets_a_stream_come_to_its_own(model: based.Model) -> None:
    with serving(model, drain_seconds=60) as server:
        connection, response = begin_stream(server, max_tokens=300)
        with contextlib.closing(connection), response:
            server.service.is_draining = True
            assert server.ask("/v1/completions", {"prompt": "a"}).error["code"] == "shutting_down"
            assert server.ask("/health").status == 503
            rest = response.read()
        assert rest.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in rest


def test_states_that_may_go_make_room_for_new_ones(model: based.Model, tmp_path: Path) -> None:
    """Those of a folder that ends with the server."""
    options = {"state_dir": tmp_path, "shared_states": True, "max_state_files": 2}
    with serving(model, states_may_go=True, **options) as server:
        for number in range(3):
            server.complete(prompt="a", max_tokens=1, save_state=f"s{number}", **GREEDY)
            os.utime(tmp_path / f"s{number}.safetensors", (number, number))
        assert server.ask("/v1/states/s0").status == 404
        assert {state["id"] for state in server.ask("/v1/states").json["data"]} == {"s1", "s2"}
    with serving(model, **options) as server:
        server.refused(507, None, prompt="a", max_tokens=1, save_state="s3")


def test_a_time_limit_ends_what_runs(model: based.Model, tmp_path: Path) -> None:
    with serving(model, drain_seconds=0.2, state_dir=tmp_path) as server:
        connection, response = begin_stream(server, save_state="unfinished")
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda: rest.append(response.read()))
        reader.start()
    reader.join(60)
    connection.close()
    assert rest[0].endswith(b"data: [DONE]\n\n") and b'"finish_reason":"abort"' in rest[0]
    with pytest.raises(OSError, match="refused"):
        server.ask("/health")


# ---- log -------------------------------------------------------------------------------------------------------------


def test_a_message_is_one_line() -> None:
    """A path cannot make a line of its own; a traceback has its lines."""
    forged = "POST /v1/states/x\n01:00:00 POST /v1/states/bank 200\x1b[1m"
    record = logging.LogRecord("based.server", logging.INFO, "", 0, "%s", (forged,), None)
    (line,) = _logs._Lines().format(record).split("\n")
    assert line.endswith("POST /v1/states/x\\n01:00:00 POST /v1/states/bank 200\\x1b[1m")
    try:
        raise ValueError(forged)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert len(_logs._Lines().format(record).splitlines()) > 3


def test_log_lines(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "based.server")
    server.complete(prompt="secret text", max_tokens=3, **GREEDY)
    server.refused(400, "n", prompt="a", n=0)

    def lines(*words: str) -> list[logging.LogRecord]:
        return [record for record in caplog.records if all(word in record.getMessage() for word in words)]

    server.until(lambda: bool(lines("POST /v1/completions 200") and lines("POST /v1/completions 400", "n is")))
    (done,) = lines("POST /v1/completions 200")
    assert "11 tokens" in done.getMessage() and "3 new" in done.getMessage() and "the first after" in done.getMessage()
    assert done.fields["completion_tokens"] == 3 and done.fields["status"] == 200
    assert not lines("secret")


def test_log_formats() -> None:
    from based.server._logs import _Json, _Lines

    record = logging.LogRecord("based.server", logging.WARNING, "", 0, "a\x1b[31m %s", ("b",), None)
    record.fields = {"status": 200}
    assert _Lines().format(record).endswith("warning: a\\x1b[31m b")
    found = json.loads(_Json().format(record))
    assert found["message"] == "a\x1b[31m b" and found["status"] == 200 and found["level"] == "warning"


# ---- the client of OpenAI --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai() -> Any:
    return pytest.importorskip("openai")


@pytest.fixture
def client(openai: Any, server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openai_completions(client: Any, model: based.Model) -> None:
    (wanted,) = expected(model, PROMPT, max_tokens=6, temperature=0)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    assert answer.choices[0].text == wanted.text and answer.usage.completion_tokens == 6
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id
    more = {"repetition_penalty": 1.1, "ignore_eos": True, "save_state": True}
    answer = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=2, extra_body=more)
    assert answer.state_id.startswith("state-")
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len is None


def test_openai_streams(client: Any, model: based.Model) -> None:
    (wanted,) = expected(model, PROMPT, max_tokens=6, temperature=0)
    with client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted.text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6


def test_openai_cancels_a_stream(client: Any, server: Running) -> None:
    before = server.engine.stats().running
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10**8, stream=True, temperature=0)
    next(iter(stream))
    assert server.engine.stats().running == before + 1
    stream.close()
    server.until(lambda: server.engine.stats().running == before)


def test_openai_async(openai: Any, server: Running, model: based.Model) -> None:
    prompts = [f"{index} green" for index in range(6)]
    wanted = [output.outputs[0].text for output in model.generate(prompts, SamplingParams(max_tokens=5, temperature=0))]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.completions.create

            async def one(prompt: str) -> str:
                stream = await create(model="tiny", prompt=prompt, max_tokens=5, temperature=0, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    assert asyncio.run(ask()) == wanted


def test_openai_errors(openai: Any, client: Any, model: based.Model) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="base model"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(model, api_keys=["right"], requests=1))
        url = f"{server.url}/v1"
        wrong = stack.enter_context(openai.OpenAI(base_url=url, api_key="wrong", max_retries=0))
        with pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="tiny", prompt=PROMPT)
        right = stack.enter_context(openai.OpenAI(base_url=url, api_key="right", max_retries=0))
        stream = right.completions.create(model="tiny", prompt=PROMPT, max_tokens=10**8, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            right.completions.create(model="tiny", prompt=PROMPT)
        stream.close()


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(*options: object) -> Iterator[tuple[subprocess.Popen[str], Running, list[str]]]:
    """`based serve` of the golden model, when it is ready; and the lines of its log so far."""
    words = [sys.executable, "-m", "based", "serve", "--port", 0, "-m", GOLDEN / "based-tiny", *options]
    lines: list[str] = []
    with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True) as process:
        try:
            while "is ready" not in (line := process.stderr.readline()):
                assert line, "".join(lines)
                lines.append(line)
            reader = threading.Thread(target=lambda: lines.extend(process.stderr))
            reader.start()
            port = int(re.search(r"listening on https?://127\.0\.0\.1:(\d+)", "".join(lines))[1])
            yield process, Running(port, None), lines
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            reader.join(PATIENCE)
        finally:
            process.kill()


def test_the_command_ends_in_order_and_goes_on_from_states(tmp_path: Path) -> None:
    options = ["--state-dir", tmp_path, "--served-model-name", "m"]
    body = {"state_id": "chat", "prompt": " and", "max_tokens": 5, **GREEDY}
    with command(*options) as (process, server, lines):
        server.complete(prompt=PROMPT, max_tokens=5, save_state="chat", model="m", **GREEDY)
        text = server.text(**body)
        connection, response = begin_stream(server, max_tokens=400)
        process.send_signal(signal.SIGTERM)
        with contextlib.closing(connection), response:
            assert b'"finish_reason":"length"' in response.read()
        assert process.wait(PATIENCE) == 0
    assert any("SIGTERM" in line for line in lines) and any("states saved" in line for line in lines)
    assert (tmp_path / "chat.safetensors").exists()
    with command(*options, "--log-json") as (process, server, lines):
        assert server.text(**body) == text
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    logged = [json.loads(line) for line in lines]  # from the first line on
    assert any(entry.get("completion_tokens") == 5 for entry in logged)


def test_a_second_signal_ends_what_runs() -> None:
    with command("--drain-timeout", 1000) as (process, server, _):
        connection, response = begin_stream(server)
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup, for this process and the server
        process.send_signal(signal.SIGTERM if is_ignored else signal.SIGHUP)
        server.until(lambda: server.ask("/health").status == 503)
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/models", None)):  # over new connections
            answer = server.ask(path, body)
            assert answer.status == 503 and answer.error["code"] == "shutting_down"
            assert answer.headers["retry-after"] == "5" and answer.headers["connection"] == "close"
        assert process.poll() is None
        server.until(lambda: server.ask("/health").headers["date"] != answer.headers["date"])
        process.send_signal(signal.SIGTERM)
        with contextlib.closing(connection), response:
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(PATIENCE) == 0


def test_tls(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is missing")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with command("--ssl-certfile", certificate, "--ssl-keyfile", key, "--api-key", "k") as (_, server, _):
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=30)
        with contextlib.closing(connection):
            body = json.dumps({"prompt": "a", "max_tokens": 2})
            headers = {"content-type": "application/json", "authorization": "Bearer k"}
            connection.request("POST", "/v1/completions", body, headers)
            assert connection.getresponse().status == 200


def test_what_the_command_refuses(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(taken):
        port = taken.getsockname()[1]
        for status, fragment, options in (
            (1, "in use", ["--port", port]),
            (1, "No such file", ["--ssl-certfile", tmp_path / "none.pem"]),
            (2, "--ssl-certfile", ["--ssl-keyfile", tmp_path / "none.pem"]),
            (2, "--port", ["--port", 70000]),
            (2, "--max-n", ["--max-n", 0]),
            (2, "--api-key: it is empty", ["--api-key", ""]),
            (2, "--state-dir: it is empty", ["--state-dir", ""]),
            (2, "--metrics-prefix", ["--metrics-prefix", "a-b"]),
            (1, "neither an existing directory", ["--port", 0, "-m", tmp_path / "none"]),
            (1, "", ["--port", 0, "--state-dir", GOLDEN / "README.md"]),
        ):
            words = [sys.executable, "-m", "based", "serve", *map(str, options)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            assert done.returncode == status and fragment in done.stderr, (options, done.stderr)
            assert "Traceback" not in done.stderr and "error: " in done.stderr.splitlines()[-1]


def test_nothing_of_it_is_imported_before() -> None:
    script = (
        "import sys, based, based.cli.serve; "
        "based.Model.engine; "
        "print([name for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client', 'httptools') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


DOCUMENT = Path(__file__).parents[2] / "docs" / "server.md"


def test_the_document_names_every_metric(server: Running) -> None:
    names = {name.partition("{")[0] for name in read_metrics(server)}
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in names if name.startswith("based:")}
    text = DOCUMENT.read_text()
    assert len(ours) > 30
    assert [name for name in sorted(ours) if not re.search(rf"`{name.removeprefix('based:')}[`{{]", text)] == []


def test_the_document_names_every_option_field_and_route(server: Running) -> None:
    text = DOCUMENT.read_text()
    for words in (["serve"], ["bench", "serve"]):
        done = subprocess.run([sys.executable, "-m", "based", *words, "--help"], capture_output=True, text=True)
        options = set(re.findall(r"(?<!\S)(--[a-z][a-z-]+)", done.stdout)) - {
            "--help",
            "--debug",
            "--stats",
            "--no-stats",
        }
        assert len(options) > 20
        assert [option for option in sorted(options) if f"`{option}" not in text and f" {option}" not in text] == []
    assert [field for field in FIELDS if f"`{field}`" not in text] == []
    paths = server.ask("/openapi.json").json["paths"]
    for path in paths:
        assert (
            f"`{path}`" in text or f" {path}`" in text or path.rsplit("/", 1)[1] in ("save", "load", "fork", "{name}")
        )


# ---- based bench serve -----------------------------------------------------------------------------------------------


def bench_serve(server: Running, *options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "based", "bench", "serve", "--port", server.port, *options]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)


def test_bench_serve_counts_what_the_server_counts(model: based.Model, tmp_path: Path) -> None:
    with serving(model) as server:
        options = ["--num-prompts", 9, "--random-input-len", 20, "--random-output-len", 6, "--ignore-eos", "--json",
                   "--max-concurrency", 3, "--goodput", "ttft:60000", "e2el:0.001", "--save-detailed",
                   "--result-dir", tmp_path, "--result-filename", "r.json"]  # fmt: skip
        done = bench_serve(server, *options)
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["completed"] == 9 and found["failed"] == 0 and found["max_concurrent_requests"] <= 3
        assert found["total_input_tokens"] == 180 and found["total_output_tokens"] == 54
        assert found["request_goodput"] == 0
        for name in ("ttft", "e2el"):
            assert 0 < found[f"median_{name}_ms"] <= found[f"p99_{name}_ms"]
        assert found["median_ttft_ms"] <= found["median_e2el_ms"]
        saved = json.loads((tmp_path / "r.json").read_text())
        assert [len(gaps) for gaps in saved["itls"]] == [5] * 9 and saved["duration"] == found["duration"]
        # Tokens that one packet brings have gaps of 0 s, so only the figures' relations are certain.
        gaps = [1e3 * gap for request in saved["itls"] for gap in request]
        assert min(gaps) >= 0 and found["p99_itl_ms"] <= max(gaps)
        assert found["median_itl_ms"] == pytest.approx(statistics.median(gaps), abs=1e-9)
        assert found["mean_itl_ms"] == pytest.approx(statistics.mean(gaps), abs=1e-9)
        assert found["mean_tpot_ms"] == pytest.approx(statistics.mean(gaps), abs=1e-9)
        metrics = read_metrics(server)
        assert metrics['based:generation_tokens_total{model_name="tiny"}'] == 54


@pytest.mark.parametrize("head", ["", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
                                  "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda",
                                  "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"])  # fmt: skip
def test_bench_serve_says_when_an_answer_is_cut_off(head: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head.encode())

        thread = threading.Thread(target=answer)
        thread.start()
        server = Running(listening.getsockname()[1], None)
        done = bench_serve(server, "--model", "m", "--vocab-size", 9, "--num-prompts", 1, "--num-warmups", 0)
        thread.join()
    assert done.returncode == 1
    assert "a request failed: the server closed the connection before its answer was whole" in done.stderr


def test_bench_serve_shares_prefixes(model: based.Model, tmp_path: Path) -> None:
    with serving(model) as server:
        done = bench_serve(
            server, "--dataset-name", "prefix_repetition", "--num-prompts", 8, "--prefix-repetition-num-prefixes", 2,
            "--prefix-repetition-prefix-len", 600, "--prefix-repetition-suffix-len", 10,
            "--prefix-repetition-output-len", 2, "--max-concurrency", 1, "--json", "--no-stream", "--ignore-eos",
        )  # fmt: skip
        found = json.loads(done.stdout)
        assert found["total_input_tokens"] == 8 * 610
        assert found["total_cached_tokens"] >= 5 * 512
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
        done = bench_serve(server, "--dataset-name", "custom", "--dataset-path", texts, "--num-prompts", 4,
                           "--custom-output-len", 3, "--request-rate", 50, "--ignore-eos")  # fmt: skip
        assert done.returncode == 0
        for line in ("Successful requests: 4", "Total input tokens: 12", "Request rate configured (RPS): 50.00"):
            assert line in re.sub(" +", " ", done.stdout)
        assert "Mean TTFT (ms):" in done.stdout and "P99 ITL (ms):" in done.stdout


def test_bench_serve_says_what_went_wrong(model: based.Model) -> None:
    with serving(model, new_tokens=4) as server:
        done = bench_serve(server, "--num-prompts", 2, "--random-input-len", 3, "--random-output-len", 9)
        assert done.returncode == 1 and "max_tokens is the number 9" in done.stderr
        assert "Failed requests:                         2" in done.stdout
        for options in (["--goodput", "x:1"], ["--request-rate", "0"], ["--dataset-name", "custom"],
                        ["--base-url", "ftp://x"], ["--random-range-ratio", "1"]):  # fmt: skip
            assert bench_serve(server, *options).returncode == 2
    done = bench_serve(server, "--num-prompts", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
