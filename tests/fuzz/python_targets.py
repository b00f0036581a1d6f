"""Fuzz targets in Python: each takes bytes, and lets through only the exceptions that damaged bytes may raise."""

import json
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from based import FormatError
from based._json import read_json
from based._pickle import read_torch_file
from based._published import translate
from based._published_mamba import is_mamba, translate_mamba
from based._tokenizer_files import read_tokenizer_json
from based._tokenizer_json import parse_tokenizer, tokenizer_errors

_FOLDER = Path(tempfile.mkdtemp(prefix="based-fuzz-"))


def _check_names(error: FormatError, *names: str) -> None:
    if not any(name in str(error) for name in names) or not all(c.isprintable() or c == "\n" for c in str(error)):
        raise AssertionError(f"not a good message: {error!r}")


def pickle(data: bytes) -> None:
    """data.pkl of a PyTorch file whose storages "0" and "1" have 16 bytes each."""
    path = _FOLDER / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in (("data.pkl", data), ("data/0", bytes(16)), ("data/1", bytes(range(16)))):
            archive.writestr(f"a/{name}", member)
    _read(path)


def torch_file(data: bytes) -> None:
    """A whole PyTorch file."""
    path = _FOLDER / "y.bin"
    path.write_bytes(data)
    _read(path)


def _read(path: Path) -> None:
    try:
        for tensor in read_torch_file(path).values():
            tensor.bits.tobytes()
    except FormatError as error:
        _check_names(error, str(path))


def published(data: bytes) -> None:
    """config.json of a published model, with the tensor shapes that `shapes` of the same file lists."""
    path = _FOLDER / "config.json"
    path.write_bytes(data)
    try:
        config = read_json(path, 4 << 20)
        shapes = config.pop("shapes", {}) if isinstance(config, dict) else {}
        if not isinstance(shapes, dict):
            return
        known = {
            name: tuple(x for x in shape if type(x) is int) for name, shape in shapes.items() if type(shape) is list
        }
        translation = translate_mamba if is_mamba(config) else translate
        translated, _ = translation(config, known, False, str(path), "weights")
        json.dumps(translated)
    except FormatError as error:
        _check_names(error, str(path), "weights")


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, and a text through it."""
    try:
        found = parse_tokenizer(data, "fuzz")
        found.no_truncation()
        found.no_padding()
        with tokenizer_errors("fuzz"):
            ids = found.encode("Hello, wörld! 123 aaaaaaaaaaaaaaab").ids
            found.decode(ids, skip_special_tokens=False)
    except FormatError as error:
        _check_names(error, "fuzz")


def bpe_files(data: bytes) -> None:
    """vocab.json, merges.txt, tokenizer_config.json and added_tokens.json, separated by lines of "---"."""
    folder = _FOLDER / "bpe"
    folder.mkdir(exist_ok=True)
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name, part in zip(names, [*data.split(b"\n---\n"), b"", b""], strict=False):
        if part or name in names[:2]:
            (folder / name).write_bytes(part)
    if not (folder / "merges.txt").exists():
        return
    try:
        tokenizer(read_tokenizer_json(folder))
    except FormatError as error:
        _check_names(error, str(folder))


def train_yaml(data: bytes) -> None:
    """A training configuration."""
    from based.torch.train.config import read_config

    path = _FOLDER / "train.yaml"
    path.write_bytes(data)
    with suppress(FormatError):
        read_config(path)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pickle": pickle,
    "torch_file": torch_file,
    "published": published,
    "tokenizer": tokenizer,
    "bpe_files": bpe_files,
    "train_yaml": train_yaml,
}
