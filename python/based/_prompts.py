"""The forms that a prompt may have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from based._core import MAX_TOKEN_IDS

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
"""A list or tuple of ints, a 1-D integer array, or anything that NumPy takes by DLPack."""
Prompt: TypeAlias = str | TokenIds
Prompts: TypeAlias = Iterable[Prompt | int] | npt.NDArray[np.integer[Any]]
"""A prompt or several (a str is an Iterable of str). Flat, because that is how mypy infers mixed lists."""

_DLPACK_CPU = 1


def as_array(value: Any) -> Any:
    """A tensor of another library as a NumPy array, on the same memory if it is the CPU's; anything else as it is."""
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        if value.__dlpack_device__()[0] != _DLPACK_CPU and hasattr(value, "cpu"):
            value = value.cpu()
        return np.from_dlpack(value)
    return value


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several as a list of prompts. What is neither is left for the core to refuse."""
    return as_rows(prompts)[0]


def as_rows(prompts: Any) -> tuple[list[Any], bool]:
    """The same list, and whether it was one prompt."""
    prompts = as_array(prompts)
    if isinstance(prompts, np.ndarray):
        if prompts.ndim == 2 and prompts.size > MAX_TOKEN_IDS:  # which an array of stride 0 may claim
            raise ValueError(f"prompts has {prompts.size} token ids, expected at most {MAX_TOKEN_IDS}")
        return (list(prompts), False) if prompts.ndim == 2 else ([prompts], True)
    if isinstance(prompts, Iterable) and not isinstance(prompts, Sequence | Mapping | set | frozenset):
        prompts = list(prompts)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return [prompts], True
    first = as_array(prompts[0]) if prompts else None
    is_one = first is not None and not isinstance(first, (str, Sequence)) and np.ndim(first) == 0
    return ([prompts], True) if is_one else (list(prompts), False)
