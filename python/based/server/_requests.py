"""From the body of a completion to what the engine is asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from based import _core
from based.server._bodies import (
    Body,
    check_fields,
    check_letters,
    describe,
    get_bool,
    get_int,
    get_number,
    get_object,
    get_text,
    named_field,
    read_ids,
)
from based.server._errors import ApiError, invalid
from based.server._options import NAME, Limits
from based.server._states import check_name, new_name

if TYPE_CHECKING:
    from based import Model, State

_MOST_STOPS, _LONGEST_STOP = 64, 1024
_MOST = (1 << 63) - 1  # of an integer
_MOST_BIAS = 100

_INTEGER: Body = {"type": ["integer", "null"]}
_NUMBER: Body = {"type": ["number", "null"]}
_BOOLEAN: Body = {"type": ["boolean", "null"]}
_TEXT: Body = {"type": ["string", "null"]}
_IDS: Body = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STATE: Body = {"type": ["string", "null"], "pattern": f"^{NAME.pattern}$"}
_STOP: Body = {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}


def _described(schema: Body, text: str, **more: Any) -> Body:
    return {**schema, "description": text, **more}


SAMPLING: dict[str, Body] = {
    "n": _described(_INTEGER, "Samples of each prompt.", default=1, minimum=1),
    "max_tokens": _described(
        _INTEGER, "Tokens to generate at most; 0 only with echo.", default=16, minimum=0, maximum=_MOST
    ),
    "min_tokens": _described(
        _INTEGER, "Nothing stops a sample before so many tokens.", default=0, minimum=0, maximum=_MOST
    ),
    "temperature": _described(_NUMBER, "0 is greedy.", default=1.0, minimum=0, maximum=1e308),
    "top_p": _described(_NUMBER, "Above 0, at most 1.", default=1.0, exclusiveMinimum=0, maximum=1),
    "top_k": _described(_INTEGER, "0 or -1: all tokens.", default=0, minimum=-1, maximum=_MOST),
    "min_p": _described(_NUMBER, "0 … 1.", default=0.0, minimum=0, maximum=1),
    "repetition_penalty": _described(
        _NUMBER, "Above 0; counts tokens of prompt and output.", default=1.0, exclusiveMinimum=0, maximum=1e308
    ),
    "presence_penalty": _described(_NUMBER, "-2 … 2.", default=0.0, minimum=-2, maximum=2),
    "frequency_penalty": _described(_NUMBER, "-2 … 2.", default=0.0, minimum=-2, maximum=2),
    "seed": _described(_INTEGER, "The same seed gives the same samples.", minimum=0, maximum=(1 << 64) - 1),
    "stop": {
        "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": _MOST_STOPS}, {"type": "null"}],
        "description": "Texts that end a sample, which is cut before them.",
    },
    "stop_token_ids": {"anyOf": [_IDS, {"type": "null"}], "description": "Tokens that end a sample."},
    "ignore_eos": _described(_BOOLEAN, "Do not end at the model's end token.", default=False),
    "logprobs": _described(_INTEGER, "Log-probabilities of each token and of this many likeliest ones.", minimum=0),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -_MOST_BIAS, "maximum": _MOST_BIAS},
        "description": "Number that is added to a token's logit, by token id.",
    },
    "include_stop_str_in_output": _described(_BOOLEAN, "Cut behind what ended the sample instead.", default=False),
    "skip_special_tokens": _described(_BOOLEAN, "Leave special tokens out of the text.", default=True),
}
"""The fields of SamplingParams."""

FIELDS: dict[str, Body] = {
    "model": _described(_TEXT, "The name of the model, as /v1/models has it."),
    "prompt": {
        "anyOf": [
            {"type": "string"},
            _IDS,
            {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}},
            {"type": "null"},
        ],
        "description": "A text, token ids, or a list of both. May be left out with state_id.",
    },
    **SAMPLING,
    "best_of": _described(_INTEGER, "Samples to make of each prompt; the n likeliest are given.", minimum=1),
    "echo": _described(_BOOLEAN, "Give the prompt before its continuation.", default=False),
    "stream": _described(_BOOLEAN, "Send each token as it comes, as server-sent events.", default=False),
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": _BOOLEAN, "continuous_usage_stats": _BOOLEAN},
        "additionalProperties": False,
        "description": "include_usage: numbers of tokens in an event at the end. continuous_usage_stats: in each one.",
    },
    "user": _described(_TEXT, "Whom the request is for. Nothing depends on it."),
    "priority": _described(_INTEGER, "Smaller ones go first.", default=0, minimum=-(1 << 31), maximum=(1 << 31) - 1),
    "timeout": _described(
        _NUMBER, "Seconds, after which the samples end as they are.", exclusiveMinimum=0, maximum=1e9
    ),
    "state_id": _described(_STATE, "The state to go on from; the prompt stands behind what it has seen."),
    "save_state": {
        "type": ["boolean", "string", "null"],
        "pattern": _STATE["pattern"],
        "description": "Keep the state behind the answer: true under a new name, a text under that one.",
    },
    "split_special_tokens": _described(
        _BOOLEAN, "A special token's text in the prompt is letters like any other.", default=False
    ),
    "return_token_ids": _described(_BOOLEAN, "Give token ids, of the prompt too.", default=False),
    "return_tokens_as_token_ids": _described(
        _BOOLEAN, "Name tokens 'token_id:123' in logprobs, not by their texts.", default=False
    ),
}
"""The fields of a completion, as JSON schemas."""

TOKENIZE: dict[str, Body] = {
    "model": FIELDS["model"],
    "prompt": {"type": "string", "description": "The text."},
    "add_special_tokens": _described(_BOOLEAN, "As a prompt begins.", default=True),
    "split_special_tokens": FIELDS["split_special_tokens"],
    "return_token_strs": _described(_BOOLEAN, "Also the tokens' texts.", default=False),
}
DETOKENIZE: dict[str, Body] = {"model": FIELDS["model"], "tokens": _described(_IDS, "Token ids.")}
STATE_FIELDS: dict[str, dict[str, Body]] = {
    "save": {"to": _described(_STATE, "The file's name; by default the state's.")},
    "fork": {"to": _described(_STATE, "The other name; by default a new one.")},
    "load": {},
}

UNSUPPORTED: dict[str, str] = {
    "suffix": "this model continues a text and does not fill one in",
    "prompt_logprobs": "give echo and logprobs",
    "messages": "this is a base model, which continues a prompt",
    "guided_json": "output is not constrained",
    "guided_regex": "output is not constrained",
    "guided_choice": "output is not constrained",
    "response_format": "output is not constrained",
    "use_beam_search": "give best_of",
    "truncate_prompt_tokens": "give a shorter prompt",
    "add_special_tokens": "a prompt begins as the model's tokenizer says; give token ids for another beginning",
    "bad_words": "give logit_bias",
}
"""Fields of other servers, and why there is none here."""


def _bounds(limits: Limits) -> dict[str, Body]:
    """The integers that a server bounds further."""
    most = _MOST if limits.new_tokens is None else limits.new_tokens
    return {
        "n": FIELDS["n"] | {"maximum": limits.n},
        "best_of": FIELDS["best_of"] | {"maximum": limits.n},
        "logprobs": FIELDS["logprobs"] | {"maximum": limits.logprobs},
        "min_tokens": FIELDS["min_tokens"] | {"maximum": most},
        "max_tokens": FIELDS["max_tokens"] | {"maximum": most, "default": min(FIELDS["max_tokens"]["default"], most)},
    }


def bodies(limits: Limits, model_name: str, vocab_size: int | None) -> dict[str, Body]:
    """What each body may be, as JSON schemas with a server's own bounds. vocab_size: None while there is no model."""
    ids = {"type": "array", "items": _IDS["items"] | ({} if vocab_size is None else {"maximum": vocab_size - 1})}
    prompt = ids | ({} if limits.prompt_tokens is None else {"maxItems": limits.prompt_tokens})
    prompts = {"type": "array", "items": {"anyOf": [{"type": "string"}, prompt]}, "maxItems": limits.prompts}
    own = {
        **_bounds(limits),
        "model": FIELDS["model"] | {"enum": [model_name, None]},
        "prompt": FIELDS["prompt"] | {"anyOf": [{"type": "string"}, prompt, prompts, {"type": "null"}]},
        "stop_token_ids": FIELDS["stop_token_ids"] | {"anyOf": [ids, {"type": "null"}]},
    }
    refused = {name: {"type": "null", "description": f"Not supported: {why}."} for name, why in UNSUPPORTED.items()}
    return {
        "completion": _object(
            {**FIELDS, **own, **refused}, anyOf=[{"required": ["prompt"]}, {"required": ["state_id"]}]
        ),
        "tokenize": _object(TOKENIZE | {"model": own["model"]}, required=["prompt"]),
        "detokenize": _object({"model": own["model"], "tokens": DETOKENIZE["tokens"] | ids}, required=["tokens"]),
        **{verb: _object(fields) for verb, fields in STATE_FIELDS.items()},
    }


def _object(properties: dict[str, Body], **more: Any) -> Body:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


@dataclass(slots=True)
class Prompt:
    """What one prompt is."""

    text: str | None
    """None when token ids were given."""
    token_ids: Any
    """An integer array."""


@dataclass(slots=True)
class Completion:
    """A request for completions whose every field is right."""

    prompts: list[Prompt]
    params: _core.SamplingParams
    """n is best_of."""
    n: int
    max_tokens: int
    """0: nothing is generated."""
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    priority: int
    timeout: float | None
    state: "State | None"
    save_as: str | None
    """The name of the state behind the answer; None: it is not kept."""
    return_token_ids: bool
    tokens_as_ids: bool


def read_completion(
    body: Body, model: "Model", model_name: str, limits: Limits, get_state: Callable[[str, str], "State"]
) -> Completion:
    """Checks every field, and reads the prompts. Takes time for long texts: not on the event loop. Raises ApiError."""
    check_fields(body, FIELDS, UNSUPPORTED)
    check_model(body, model_name)
    stream = get_bool(body, "stream")
    echo = get_bool(body, "echo")
    include_usage, continuous = _stream_options(body, stream)
    bounds = _bounds(limits)
    n = get_int(body, "n", bounds["n"], ", the most that this server gives") or 1
    best_of = get_int(body, "best_of", bounds["best_of"], ", the most that this server makes") or n
    if best_of < n:
        raise invalid(f"best_of is {best_of}, expected at least n ({n})", param="best_of")
    if stream and best_of > n:
        raise invalid("best_of: which samples are the likeliest is known at their ends: leave stream out", "best_of")
    get_text(body, "user")
    save_as = _save_as(body)
    if save_as is not None and best_of > 1:
        raise invalid(f"save_state keeps the state of one sample: n is {best_of}, expected 1", param="save_state")
    logprobs = get_int(body, "logprobs", bounds["logprobs"], ", the most that this server gives")
    max_tokens = get_int(body, "max_tokens", bounds["max_tokens"], ", the most that this server generates")
    if max_tokens is None:
        max_tokens = bounds["max_tokens"]["default"]
    if max_tokens == 0 and (not echo or save_as is not None):
        raise invalid("max_tokens is 0, expected at least 1: without new tokens there is only echo", param="max_tokens")
    state_name = body.get("state_id")
    state = None if state_name is None else get_state(check_name(state_name, "state_id"), "state_id")
    params = _sampling(body, SAMPLING | bounds, best_of, max_tokens, model.config.vocab_size)
    prompts = _prompts(body, model, limits, state)
    if len(prompts) > 1 and (state is not None or save_as is not None):
        name = "state_id" if state is not None else "save_state"
        raise invalid(f"{name} is about one sequence: {len(prompts)} prompts, expected 1", param=name)
    if echo and logprobs is not None:
        _check_echo(model, prompts, logprobs, state)
    for prompt in prompts:
        _check_length(model, prompt, limits, state, max_tokens)
    priority = get_int(body, "priority", FIELDS["priority"]) or 0
    timeout = get_number(body, "timeout", FIELDS["timeout"])
    if limits.request_seconds is not None:
        timeout = limits.request_seconds if timeout is None else min(timeout, limits.request_seconds)
    return Completion(
        prompts=prompts,
        params=params,
        n=n,
        max_tokens=max_tokens,
        echo=echo,
        logprobs=logprobs,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        priority=priority,
        timeout=timeout,
        state=state,
        save_as=save_as,
        return_token_ids=get_bool(body, "return_token_ids"),
        tokens_as_ids=get_bool(body, "return_tokens_as_token_ids"),
    )


def takes_no_time(body: Body) -> bool:
    """Whether read_completion takes less than 1 ms for a short body: no text to tokenize, no state to read."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int) and body.get("state_id") is None


def check_model(body: Body, model_name: str) -> None:
    """Refuses another model than the one that is served."""
    name = get_text(body, "model")
    if name is not None and name != model_name:
        shown = name if len(name) <= 200 else name[:200] + "…"
        raise ApiError(
            404, f"the model {shown!r} is not served here, {model_name!r} is", param="model", code="model_not_found"
        )


def _stream_options(body: Body, stream: bool) -> tuple[bool, bool]:
    options = get_object(body, "stream_options")
    if options is None:
        return False, False
    if not stream:
        raise invalid("stream_options are for stream: true", param="stream_options")
    try:
        check_fields(options, FIELDS["stream_options"]["properties"])
        return get_bool(options, "include_usage"), get_bool(options, "continuous_usage_stats")
    except ApiError as error:
        error.param = f"stream_options.{error.param}"
        raise


def _save_as(body: Body) -> str | None:
    value = body.get("save_state")
    if value is None or value is False:
        return None
    return new_name() if value is True else check_name(value, "save_state")


def _sampling(
    body: Body, fields: Mapping[str, Body], best_of: int, max_tokens: int, vocab_size: int
) -> _core.SamplingParams:
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    for name in given.keys() - {"n", "max_tokens", "logprobs"}:  # which are read
        kind = fields[name].get("type", [""])[0]
        if kind == "integer":
            get_int(body, name, fields[name])
        elif kind == "number":
            get_number(body, name, fields[name])
        elif kind == "boolean":
            get_bool(body, name)
    given |= {"n": best_of, "max_tokens": max(max_tokens, 1)}
    stops = given.get("stop", [])
    stops = stops if isinstance(stops, list) else [stops]
    if len(stops) > _MOST_STOPS:
        raise invalid(f"stop has {len(stops)} texts, expected at most {_MOST_STOPS}", param="stop")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise invalid(f"stop[{index}] is {describe(stop)}, expected a text", param="stop")
        check_letters(stop, f"stop[{index}]", "stop")
        if not stop:
            raise invalid(f"stop[{index}] is an empty text, which would stop everything", param="stop")
        if len(stop) > _LONGEST_STOP:
            raise invalid(f"stop[{index}] has {len(stop)} letters, expected at most {_LONGEST_STOP}", param="stop")
    if (ids := given.get("stop_token_ids")) is not None:
        if not isinstance(ids, list):
            raise invalid(f"stop_token_ids is {describe(ids)}, expected a list of token ids", param="stop_token_ids")
        if ids:
            read_ids(ids, vocab_size, "stop_token_ids", "stop_token_ids")
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"], vocab_size)
    try:
        return _core.SamplingParams(**given)
    except (TypeError, ValueError) as error:
        raise sampling_error(error) from None


def sampling_error(error: Exception) -> ApiError:
    """What SamplingParams, or the engine, says of them."""
    message = str(error).removeprefix("SamplingParams: ").removeprefix("submit: ")
    return invalid(message, param=named_field(message, SAMPLING))


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if not isinstance(value, dict):
        raise invalid(f"logit_bias is {describe(value)}, expected an object", param="logit_bias")
    result = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < vocab_size):
            message = f"logit_bias: the key {token[:40]!r} is no token id, expected 0 … {vocab_size - 1}"
            raise invalid(message, param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise invalid(
                f"logit_bias of token {token} is {describe(bias)}, expected a number, -{_MOST_BIAS} … {_MOST_BIAS}",
                param="logit_bias",
            )
        result[int(token)] = bias
    return result


def _prompts(body: Body, model: "Model", limits: Limits, state: "State | None") -> list[Prompt]:
    value = body.get("prompt")
    if value is None:
        if state is None:
            raise invalid("prompt is missing: give a text, token ids, or a list of both", param="prompt")
        value = []
    at_start = state is None or state.num_tokens == 0
    split = get_bool(body, "split_special_tokens")
    if isinstance(value, str):
        return [_prompt(value, "prompt", model, limits, at_start, split)]
    if not isinstance(value, list):
        raise invalid(f"prompt is {describe(value)}, expected a text, token ids, or a list of both", param="prompt")
    if not value and state is None:
        raise invalid("prompt is an empty list, expected at least one prompt", param="prompt")
    if value and isinstance(value[0], str | list):
        if len(value) > limits.prompts:
            raise invalid(
                f"prompt has {len(value)} prompts, expected at most {limits.prompts}, the most of this server",
                param="prompt",
            )
        return [_prompt(item, f"prompt[{index}]", model, limits, at_start, split) for index, item in enumerate(value)]
    return [_prompt(value, "prompt", model, limits, at_start, split)]


def _prompt(value: Any, name: str, model: "Model", limits: Limits, at_start: bool, split: bool) -> Prompt:
    if isinstance(value, str):
        check_letters(value, name, "prompt")
    elif not isinstance(value, list):
        raise invalid(f"{name} is {describe(value)}, expected a text or token ids", param="prompt")
    most = limits.prompt_tokens
    if most is not None and isinstance(value, list) and len(value) > most:
        raise _too_long(name, len(value), most)
    vocab_size = model.config.vocab_size
    ids: Any = []
    if isinstance(value, list):
        if value:
            ids = read_ids(value, vocab_size, name, "prompt")
    elif value or at_start:
        try:
            ids = model.encode(value, at_start=at_start, split_special_tokens=split)
            ids = _core.check_prompt(ids, vocab_size, name) if ids else []
        except ValueError as error:
            raise invalid(str(error), param="prompt") from None
    if at_start and len(ids) == 0:
        raise invalid(f"{name} has no tokens, expected at least one", param="prompt")
    if most is not None and len(ids) > most:
        raise _too_long(name, len(ids), most)
    return Prompt(value if isinstance(value, str) else None, ids)


def _too_long(name: str, count: int, most: int) -> ApiError:
    return invalid(
        f"{name} has {count} tokens, expected at most {most}, the most of this server",
        param="prompt",
        code="context_length_exceeded",
    )


def _check_length(model: "Model", prompt: Prompt, limits: Limits, state: "State | None", max_tokens: int) -> None:
    if model.max_context is None:
        return
    before = 0 if state is None else state.num_tokens
    total = before + len(prompt.token_ids) + max(max_tokens - 1, 0)  # the last new token is not fed
    if total > model.max_context:
        seen = f"{before} of the state, " if before else ""
        raise invalid(
            f"the model has a context of {model.max_context} tokens, but {seen}{len(prompt.token_ids)} of the prompt "
            f"and {max_tokens} new ones are asked for",
            param="prompt",
            code="context_length_exceeded",
        )


MOST_ECHOED_LOGITS = 1 << 28
"""Numbers: 1 GiB."""


def _check_echo(model: "Model", prompts: list[Prompt], logprobs: int, state: "State | None") -> None:
    """Logprobs of a prompt."""
    if state is not None:
        raise invalid("echo with logprobs is for a prompt that begins its sequence: leave state_id out", param="echo")
    if logprobs == 0:
        return
    if model.config.prefix_tokens:
        raise invalid(
            "echo with logprobs: a model that reads a prefix as a whole gives its prompt no likeliest tokens; "
            "logprobs: 0 gives the probabilities of the prompt's own tokens",
            param="logprobs",
        )
    most = MOST_ECHOED_LOGITS // model.config.padded_vocab_size
    for prompt in prompts:
        if len(prompt.token_ids) > most:
            raise invalid(
                f"echo with logprobs: a prompt has {len(prompt.token_ids)} tokens, expected at most {most}; any number "
                "with logprobs: 0, which gives the probabilities of the prompt's own tokens",
                param="prompt",
            )
