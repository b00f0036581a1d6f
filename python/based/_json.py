"""Reads JSON files that somebody else wrote."""

import errno
import json
import stat
from pathlib import Path
from typing import NoReturn

from based._core import FormatError, check_json, parse_limit
from based._lfs import refuse_lfs_pointer

_LARGE = 1 << 20  # bytes


def read_json(path: Path, real_limit: int) -> object:
    """A JSON value without duplicate keys, NaN or Infinity. Raises OSError, and FormatError that names the file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    limit = parse_limit(real_limit)
    with path.open("rb") as file:
        data = file.read(limit + 1)
    refuse_lfs_pointer(data, path)
    if len(data) > limit:
        raise FormatError(f"{path}: {max(status.st_size, len(data))} bytes, expected at most {limit}")
    if len(data) > _LARGE:  # lists of lists take 30 times their text
        check_json(data, str(path))

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {key!r} twice in one object")
            result[key] = value
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
