"""What may name a file."""

import os
from typing import Any


def check_path(path: Any, what: str) -> str:
    """The path as a str. Raises TypeError, ValueError, which begin with `what`, where it cannot name a file."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path  # Python code of a path runs here
    if not isinstance(text, str):
        raise TypeError(f"{what}: found {type(text).__name__} {text!r:.80}, expected a str, or a path such as Path")
    if "\0" in text:
        raise ValueError(f"{what}: found {text!r}, expected a path: those have no NUL byte")
    return text
