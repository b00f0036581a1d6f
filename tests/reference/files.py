"""A second, minimal reader and writer of safetensors and of our model directories, for tests only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
_NUMPY = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "I64": "<i8"}


def round_to(values: Array, dtype: str) -> Array:
    """The bits of `values` in `dtype`, rounded to nearest even; bfloat16 as uint16."""
    single = np.asarray(values, np.float32)
    if dtype == "float32":
        return single
    if dtype == "float16":
        return single.astype(np.float16)
    assert dtype == "bfloat16", dtype
    assert np.isfinite(single).all()
    word = single.view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """tensors: name → (dtype, bits)."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, bits) in tensors.items():
        header[name] = {"dtype": _CODES[dtype], "shape": list(bits.shape), "data_offsets": [end, end + bits.nbytes]}
        end += bits.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, bits in tensors.values():
            file.write(np.ascontiguousarray(bits).tobytes())


def read_safetensors(path: Path) -> dict[str, tuple[str, Array]]:
    """name → (dtype, bits)."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    names = {code: name for name, code in _CODES.items()}
    result = {}
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            first, last = (begin + offset for offset in entry["data_offsets"])
            bits = np.frombuffer(data[first:last], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
            result[name] = (names[entry["dtype"]], bits)
    return result


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json and the weights in float64 of a model directory with one model.safetensors."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = read_safetensors(directory / "model.safetensors")
    return config, {name: to_float64(bits, dtype) for name, (dtype, bits) in stored.items()}


def write_model(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], dtype: str) -> None:
    """A model directory of ours; the weights are rounded to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(
        directory / "model.safetensors", {name: (dtype, round_to(values, dtype)) for name, values in tensors.items()}
    )
