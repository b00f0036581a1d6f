"""Reads what clients send: JSON whose every field is known and right."""

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from based import _core
from based.server._errors import ApiError, invalid

_LARGE = 1 << 20  # bytes
_MOST_DIGITS = 400  # of a number: more of them are no float
# Or a text. From where digits begin: from each of them, the time of a search would be their number squared.
_LONG_NUMBER = re.compile(rb"[^0-9][0-9]{%d}" % (_MOST_DIGITS + 1))

Body = dict[str, Any]


def parse_object(data: bytes) -> Body:
    """A JSON object without duplicate keys, NaN or Infinity. Raises ApiError."""
    try:
        if len(data) > _LARGE:  # lists of lists take 30 times their text
            _core.check_json(data, "the body")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer if _LONG_NUMBER.search(data) else None,  # half of the time for a prompt of ids
            parse_float=_float,
        )
    except RecursionError:
        raise invalid("the body's JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # no UTF-8, no JSON, or what check_json refuses
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(f"the body is {describe(value)}, expected a JSON object", code="invalid_json")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Body:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:100]!r} twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, expected at most {_MOST_DIGITS}")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def describe(value: Any) -> str:
    """A JSON value in few words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}" if len(str(value)) <= 40 else f"a number of {len(str(value))} digits"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"a text of {len(value)} letters"
    return f"a list of {len(value)} items" if isinstance(value, list) else f"an object of {len(value)} keys"


def check_fields(body: Mapping[str, Any], known: Mapping[str, Any], unsupported: Mapping[str, str] = {}) -> None:
    """Refuses fields that are not known. null stands for a field that is not given: an unsupported one may be null."""
    for name, value in body.items():
        if name in known:
            continue
        shown = name if len(name) <= 100 else name[:100] + "…"
        if name not in unsupported:
            like = difflib.get_close_matches(shown, known, 1)
            hint = f"; is it {like[0]!r} that is meant?" if like else ""
            raise invalid(f"the field {shown!r} is unknown here{hint}", param=shown, code="unknown_field")
        if value is not None:
            raise invalid(
                f"the field {name!r} is not supported: {unsupported[name]}", param=name, code="unsupported_field"
            )


def get_text(body: Mapping[str, Any], name: str) -> str | None:
    """A field that is a text. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(f"{name} is {describe(value)}, expected a text", param=name)
    check_letters(value, name, name)
    return value


def check_letters(text: str, name: str, param: str) -> None:
    """Refuses half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(
            f"{name} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), "
            "expected characters that UTF-8 has",
            param=param,
        ) from None


def get_bool(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"{name} is {describe(value)}, expected true or false", param=name)
    return value


def get_int(body: Mapping[str, Any], name: str, schema: Mapping[str, Any], why: str = "") -> int | None:
    """A field that is an integer within its schema's bounds. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"{name} is {describe(value)}, expected an integer", param=name)
    low, high = schema["minimum"], schema["maximum"]
    if not low <= value <= high:
        raise invalid(f"{name} is {describe(value)}, expected {low} … {high}{why}", param=name)
    return value


def get_number(body: Mapping[str, Any], name: str, schema: Mapping[str, Any]) -> float | None:
    """A field that is a number within its schema's bounds. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"{name} is {describe(value)}, expected a number", param=name)
    is_open = "exclusiveMinimum" in schema
    low, high = schema["exclusiveMinimum" if is_open else "minimum"], schema["maximum"]
    if value < low or (is_open and value == low) or value > high:
        domain = f"above {low:g} and at most {high:g}" if is_open else f"{low:g} … {high:g}"
        raise invalid(f"{name} is {describe(value)}, expected {domain}", param=name)
    return float(value)


def read_ids(value: list[Any], vocab_size: int, name: str, param: str) -> Any:
    """Token ids, at least one, as an integer array. Raises ApiError, which names the first wrong one."""
    try:
        return _core.check_prompt(value, vocab_size, name)
    except (TypeError, ValueError) as error:
        for index, item in enumerate(value):
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                message = f"{name}[{index}] is {describe(item)}, expected a token id, 0 … {vocab_size - 1}"
                raise invalid(message, param=param) from None
        raise invalid(str(error), param=param) from None


def get_object(body: Mapping[str, Any], name: str) -> Body | None:
    """A field that is an object. Raises ApiError."""
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise invalid(f"{name} is {describe(value)}, expected an object", param=name)
    return value


def named_field(message: str, names: Mapping[str, Any]) -> str | None:
    """The field that a message of SamplingParams speaks of: the first one in it."""
    found = re.search(rf"\b({'|'.join(names)})\b", message)
    return None if found is None else found[1]


def refuse_media_type(content_type: str) -> None:
    """Refuses what does not say that it is JSON: a page of another site can send that without the browser asking us."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415,
            f"the request's Content-Type is {content_type[:100]!r}, expected application/json",
            code="unsupported_media_type",
        )
