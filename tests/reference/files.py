"""A second, minimal reader and writer of safetensors and of our model directories, for tests only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "bool": "BOOL"}
_NUMPY = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}


def bfloat16(x: Any) -> Array:
    """The nearest bfloat16 values, ties to even, in float32."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + np.uint32(0x7FFF) + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def round_to(values: Array, dtype: str) -> Array:
    """The bits of `values` in `dtype`, rounded to nearest even; bfloat16 as uint16."""
    single = np.asarray(values, np.float32)
    if dtype == "float32":
        return single
    if dtype == "float16":
        return single.astype(np.float16)
    assert dtype == "bfloat16", dtype
    assert np.isfinite(single).all()
    return (bfloat16(single).view(np.uint32) >> 16).astype(np.uint16)


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


def read_layers(path: Path) -> dict[int, dict[str, tuple[str, Array]]]:
    """The layers' tensors of a state file by sequence: name → (dtype, bits). What going on needs is left out."""
    result: dict[int, dict[str, tuple[str, Array]]] = {}
    for name, tensor in read_safetensors(path).items():
        _, sequence, rest = name.split(".", 2)
        if rest.startswith("layers."):
            result.setdefault(int(sequence), {})[rest] = tensor
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


def fnv1a(data: bytes) -> str:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return f"{value:016x}"


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_CRC32C = _crc32c_table()


def crc32c(data: bytes) -> str:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return f"{crc ^ 0xFFFFFFFF:08x}"


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_state(path: Path, states: Sequence[tuple[int, Mapping[str, tuple[str, Array]]]], **metadata: str) -> None:
    """A state file from scratch (docs/state-format.md), with a true checksum unless `metadata` says otherwise."""
    header: dict[str, Any] = {}
    data = hashed = b""
    for b, (num_tokens, tensors) in enumerate(states):
        hashed += f"{num_tokens};".encode()
        for name, (dtype, bits) in sorted(tensors.items(), key=lambda item: _natural(item[0])):
            shape, raw = list(bits.shape), bits.tobytes()
            header[f"sequences.{b}.{name}"] = {
                "dtype": _CODES[dtype],
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
            hashed += f"{name};{dtype};({', '.join(map(str, shape))});".encode() + raw
    counts = ",".join(str(num_tokens) for num_tokens, _ in states)
    checksum = (fnv1a if metadata.get("format_version") in ("1", "2") else crc32c)(hashed)
    known = {"format": "based-state", "format_version": "3", "num_tokens": counts, "checksum": checksum}
    text = json.dumps({"__metadata__": known | metadata} | header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
