"""What schemathesis checks beside its own, and the few names of states that it shall use, so that it meets them."""

import re
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import RejectedPositiveData, positive_data_acceptance

from tests.python.description import CONTRADICTIONS

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def _known(name: Any) -> Any:
    """One of three in place of a name that a state may have; anything else as it is."""
    return f"s{len(name) % 3}" if isinstance(name, str) and _NAME.fullmatch(name) else name


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Names of states in paths."""
    of_state = context.operation is not None and context.operation.path.startswith("/v1/states/")
    if not of_state or not isinstance(path_parameters, dict):
        return path_parameters
    return {key: _known(value) for key, value in path_parameters.items()}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Names of states in bodies; completions of a few fields keep theirs, so that there are some."""
    if not isinstance(body, dict):
        return body
    if context.operation is not None and context.operation.path == "/v1/completions" and len(body) < 6:
        body = {"save_state": f"s{len(body) % 3}", **body}
    return {key: _known(value) if key in ("state_id", "save_state", "to") else value for key, value in body.items()}


@schemathesis.check
def right_data_is_taken(ctx: Any, response: Any, case: Any) -> None:
    """positive_data_acceptance, but for fields that contradict each other."""
    try:
        positive_data_acceptance(ctx, response, case)
    except RejectedPositiveData:
        if not CONTRADICTIONS.match(response.json()["error"]["message"]):
            raise
