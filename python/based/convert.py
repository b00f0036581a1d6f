"""Translates the directory of a published model into a model directory of `based`, without torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from based import _core
from based._core import FormatError
from based._json import read_json
from based._pickle import Storage, StoredTensor, read_torch_file
from based._published import EMBEDDING, HEAD, Recipe, normalise_names, translate
from based._published_mamba import EMBEDDING as MAMBA_EMBEDDING
from based._published_mamba import has_gpt2_tokens, is_mamba, translate_mamba
from based._tokenizer import GPT2_VOCAB_SIZE
from based._tokenizer_files import find_tokenizer, read_tokenizer_json
from based._tokenizer_json import Vocabulary, read_vocabulary

StrPath = str | os.PathLike[str]
Tensors = dict[str, StoredTensor]

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_CONFIG = 4 << 20  # bytes; 4,096 layers take 1 MB
_MAX_INDEX = 16 << 20  # of 685 billion parameters: 9 MB
_BLOCK = 1 << 20  # elements that memory holds at a time
_OUTPUTS = {"config.json", "model.safetensors", "tokenizer.json"}
# Where the weights are, best first; the copies are equal where there are several.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def convert(
    src: StrPath,
    dst: StrPath,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: StrPath | None = None,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Writes the model directory `dst` from the published directory `src`.

    src: holds config.json and the weights as model.safetensors or pytorch_model.bin, either of them possibly in shards
    with an index. dtype: of the weights written; None keeps each tensor's own. tokenizer: a tokenizer.json, or a
    directory that holds one, or vocab.json and merges.txt, of which one is made; by default that of `src`, if it has
    one. dst: must not exist, or be an empty directory;
    with `overwrite` it may also be a model directory, which is replaced. It appears whole or not at all.

    Returns what the config says otherwise than the published one, a sentence each: a vocabulary larger than the
    tokenizer is cut to its size, so that no token without text is sampled.

    Raises FormatError (config or weights say something wrong, contradictory or unsupported: the message names it),
    ValueError (dtype), and OSError: FileNotFoundError, FileExistsError, a full disk.
    """
    source, target = Path(src), Path(dst)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(_DTYPES)}, or None")
    config_path = source / "config.json"
    config = read_json(config_path, _MAX_CONFIG)
    if isinstance(config, dict) and config.get("format") == "based":
        raise FormatError(f"{config_path}: already in the format of based, expected a published model")
    tokenizer_path = find_tokenizer(source, tokenizer)
    weights_path, stored = open_weights(source)
    names = normalise_names(list(stored), str(weights_path))
    tensors = {short: stored[name] for short, name in names.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    mamba = is_mamba(config)
    head_differs = _head_differs(tensors, MAMBA_EMBEDDING if mamba else EMBEDDING)
    translated, recipes = (translate_mamba if mamba else translate)(
        config, shapes, head_differs, str(config_path), str(weights_path)
    )
    notes = _fit_vocabulary(
        translated, config, None if tokenizer_path is None else read_vocabulary(read_tokenizer_json(tokenizer_path))
    )
    text = _core.check_config(json.dumps(translated), f"{config_path} (translated)")
    for recipe in recipes:
        for name in recipe.sources:
            if tensors[name].dtype not in (*_DTYPES, "float64" if dtype else None):
                raise FormatError(
                    f"{weights_path}: {name}: found dtype {tensors[name].dtype}, expected one of {', '.join(_DTYPES)}"
                    + (": --dtype converts it" if tensors[name].dtype == "float64" else "")
                )

    with atomic_directory(source, target, overwrite) as directory:
        _write_weights(directory, recipes, tensors, dtype, str(weights_path))
        if tokenizer_path is not None:
            if tokenizer_path.is_dir():
                (directory / "tokenizer.json").write_bytes(read_tokenizer_json(tokenizer_path))
            else:
                shutil.copyfile(tokenizer_path, directory / "tokenizer.json")
            sync(directory / "tokenizer.json")
        (directory / "config.json").write_text(text, encoding="utf-8")
        sync(directory / "config.json")
    return notes


def _fit_vocabulary(translated: dict[str, Any], config: Any, vocabulary: Vocabulary | None) -> list[str]:
    """Cuts vocab_size to the tokens that there are; what is to be said of it.

    A Mamba's config has no word of its end token: that is the tokenizer's.
    """
    published = translated["vocab_size"]
    reason = "its tokenizer has no more tokens"
    if vocabulary is None and is_mamba(config) and has_gpt2_tokens(config):
        vocabulary, reason = Vocabulary(GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1), "the authors' models use GPT-2's tokens"
    if vocabulary is None:
        return []
    translated["vocab_size"] = min(published, vocabulary.num_tokens)
    for key in ("bos_token_id", "eos_token_id"):
        if is_mamba(config) and key not in config:
            translated[key] = vocabulary.end_token_id
        if translated[key] is not None and translated[key] >= translated["vocab_size"]:
            translated[key] = None
    if translated["vocab_size"] == published:
        return []
    return [f"vocab_size is {translated['vocab_size']}, not {published}: {reason}"]


def changed_vocabulary(source: Path, tokenizer: StrPath) -> Vocabulary | None:
    """What convert() makes another config of with this tokenizer than without; None where it makes the same."""
    config = read_json(source / "config.json", _MAX_CONFIG)
    vocabulary = read_vocabulary(read_tokenizer_json(find_tokenizer(source, tokenizer)))
    if vocabulary is None or not isinstance(config, dict):
        return None
    size = config.get("vocab_size")
    changes = is_mamba(config) or (type(size) is int and vocabulary.num_tokens < size)
    return vocabulary if changes else None


def is_published(directory: StrPath) -> bool:
    """Whether `directory` holds a config.json that is not in our own format. Raises OSError, FormatError."""
    path = Path(directory) / "config.json"
    config = read_json(path, _MAX_CONFIG)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: found {type(config).__name__}, expected an object")
    return config.get("format") != "based"


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_weights(directory: Path) -> tuple[Path, Tensors]:
    """The file that names the weights, and every tensor in it or in its shards."""
    for name in _WEIGHT_FILES:
        path = directory / name
        if path.exists():
            return path, _read_shards(path) if name.endswith(".index.json") else _read_weights(path)
    raise FileNotFoundError(
        errno.ENOENT, f"no weights in this directory: expected one of {', '.join(_WEIGHT_FILES)}", str(directory)
    )


def _read_weights(path: Path) -> Tensors:
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    return stored_tensors(_core.SafetensorsFile(path))


def stored_tensors(file: _core.SafetensorsFile) -> Tensors:
    """Every tensor of the file, of which nothing is read yet."""
    dtypes = file.dtypes()
    return {
        name: StoredTensor(Storage(dtypes[name], bits.dtype, bits.size, partial(file.read, name)), bits.shape)
        for name, bits in file.tensors().items()  # mapped, but not looked at
    }


def read_weight_map(index_path: Path) -> dict[str, str]:
    """Tensor name → name of the file beside the index that has it. Raises OSError, FormatError."""
    index = read_json(index_path, _MAX_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{index_path}: expected an object with weight_map: tensor name to file name")
    suffix = ".safetensors" if index_path.name.startswith("model.") else ".bin"
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or "\0" in shard or not shard.endswith(suffix):
            raise FormatError(
                f"{index_path}: weight_map: found file {shard!r}, expected the name of a {suffix} file beside it"
            )
    return weight_map


def _read_shards(index_path: Path) -> Tensors:
    weight_map = read_weight_map(index_path)
    tensors: Tensors = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in _read_weights(index_path.parent / shard).items():
            if weight_map.get(name) != shard:
                raise FormatError(
                    f"{index_path}: tensor {name} is in {shard}, but weight_map says {weight_map.get(name)!r}"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise FormatError(f"{index_path}: weight_map says that tensor {name} is in {shard}, but it is not")
    return tensors


def _head_differs(tensors: Tensors, embedding_name: str) -> bool:
    """Whether there is an output head that is not bit for bit the embedding."""
    head, embedding = tensors.get(HEAD), tensors.get(embedding_name)
    if head is None or embedding is None:
        return head is not None
    if head.dtype != embedding.dtype or head.shape != embedding.shape:
        return True
    if head == embedding:
        return False  # one storage
    if not head.shape:
        return True  # translation refuses its shape
    blocks = zip(head.row_blocks(_BLOCK), embedding.row_blocks(_BLOCK), strict=True)
    return any(x.tobytes() != y.tobytes() for x, y in blocks)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_weights(directory: Path, recipes: list[Recipe], tensors: Tensors, dtype: str | None, where: str) -> None:
    """Writes model.safetensors.

    A tensor that can be written as it lies in the source is; the others are made in a scratch file, some rows at a
    time, so that memory holds no more than these.
    """
    scratch = directory / "scratch"
    output: list[tuple[str, np.ndarray[Any, Any] | StoredTensor, str]] = []
    with scratch.open("wb") as file:
        for recipe in recipes:
            parts = [tensors[name] for name in recipe.sources]
            common = parts[0].dtype if len({part.dtype for part in parts}) == 1 else "float32"
            target = "float32" if dtype and recipe.wide else dtype or common
            if len(parts) == 1 and parts[0].dtype == target and parts[0].contiguous:
                output.append((recipe.name, replace(parts[0], shape=recipe.shape, strides=None), target))
                continue
            offset = file.tell()
            for part, name in zip(parts, recipe.sources, strict=True):
                for block in part.row_blocks(_BLOCK):
                    bits = _convert_dtype(block, part.dtype, target, f"{where}: {name}")
                    file.write(bits.data)
            file.flush()
            output.append((recipe.name, np.memmap(scratch, bits.dtype, "r", offset, recipe.shape), target))
    _core.write_safetensors(directory / "model.safetensors", output, {"format": "based"})
    scratch.unlink()


def _convert_dtype(bits: np.ndarray[Any, Any], source: str, target: str, where: str) -> np.ndarray[Any, Any]:
    if source == target:
        return bits
    if source == "float64":
        with np.errstate(over="ignore"):
            single = bits.astype(np.float32)
        if np.count_nonzero(np.isinf(single)) > np.count_nonzero(np.isinf(bits)):
            raise FormatError(f"{where}: holds values beyond the range of float32, expected smaller ones")
        return _convert_dtype(single, "float32", target, where)
    result = _core.convert_dtype(bits, source, target)
    if target != "float32" and _count_infinite(result, target) > _count_infinite(bits, source):
        raise FormatError(f"{where}: holds values beyond the range of {target}, expected a wider dtype")
    return result


def _count_infinite(bits: np.ndarray[Any, Any], dtype: str) -> int:
    return int(np.count_nonzero((bits & 0x7FFF) == 0x7F80 if dtype == "bfloat16" else np.isinf(bits)))


@contextmanager
def atomic_directory(source: Path | None, target: Path, overwrite: bool) -> Iterator[Path]:
    """A new directory beside `target`, which takes its place when the block ends well, and is removed otherwise.

    `source` is what it is made from, if that is a directory: it is not replaced. As with files of states: a symbolic
    link stays, and what it leads to is written; what is replaced passes on its permissions, owner and group.
    """
    target = Path(os.path.realpath(target))
    if target.parent.is_dir():
        _remove_leftovers(target)
    if target.exists():
        if not target.is_dir():
            raise FileExistsError(errno.EEXIST, "expected a new or empty directory, found a file", str(target))
        found = {path.name for path in target.iterdir()}
        if found and not overwrite:
            other = found - _OUTPUTS
            way_out = f"it holds {min(other)!r}" if other else "--overwrite, overwrite=True, replaces this model"
            reason = f"expected a new or empty directory, found a full one ({way_out})"
            raise FileExistsError(errno.EEXIST, reason, str(target))
        if found - _OUTPUTS:  # nothing that conversion did not write is ever deleted
            raise FileExistsError(errno.EEXIST, f"not a model directory: holds {min(found - _OUTPUTS)!r}", str(target))
        if source is not None and target.samefile(source):
            raise FileExistsError(errno.EEXIST, "source and destination are the same", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (_beside(target, f"{os.getpid()}-{secrets.token_hex(4)}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if target.exists():
            _keep_permissions(new, target.stat())
        sync(new)
        if overwrite and target.exists():
            if _core.exchange_paths(new, target):
                new.rename(old)
            else:  # for a moment there is no target; _remove_leftovers puts the old one back if this process ends there
                target.rename(old)
                _rename_or(new, target, lambda: old.rename(target))
        else:
            new.rename(target)
    except BaseException:
        _remove_tree(new)
        raise
    sync(target.parent)
    if old.exists():
        _remove_tree(old)


def _rename_or(source: Path, target: Path, undo: Callable[[], object]) -> None:
    try:
        source.rename(target)
    except BaseException:
        undo()
        raise


def _beside(target: Path, rest: str) -> Path:
    """A name for what stands beside `target` while it is made. Not of its name: that may have the longest length."""
    names = (os.fsencode(target.name), socket.gethostname().encode())
    return target.parent / f".based-{'-'.join(hashlib.sha256(name).hexdigest()[:8] for name in names)}-{rest}"


def _remove_leftovers(target: Path) -> None:
    """Clears up behind processes of this machine that were killed while they made `target`."""
    prefix = _beside(target, "").name
    try:
        paths = sorted(target.parent.iterdir(), reverse=True)  # ".old" before ".new"
    except PermissionError:  # a folder that may be written to, and not listed
        return
    for path in paths:
        pid = re.fullmatch(r"(\d{1,9})-[0-9a-f]{8}\.(?:new|old)", path.name.removeprefix(prefix))
        if pid is None or not path.name.startswith(prefix) or _lives(int(pid[1])):
            continue
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        else:
            _remove_tree(path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _remove_tree(path: Path) -> None:
    """Removes a directory of files. shutil.rmtree needs a descriptor for it, and there may be none left."""
    try:
        for name in os.listdir(path):
            with suppress(OSError):
                os.unlink(path / name)
        os.rmdir(path)
    except OSError:  # of another user, or being written to: it stays, and the next conversion tries again
        return


def _keep_permissions(new: Path, old: os.stat_result) -> None:
    """Of what `new` will replace; owner and group where this process may give files to them."""
    mode = stat.S_IMODE(old.st_mode)
    for owner in (old.st_uid, os.geteuid()):
        try:
            os.chown(new, owner, old.st_gid)
            break
        except PermissionError:
            continue
    else:
        mode &= ~stat.S_IRWXG  # what the old group may do is not handed to another group
    new.chmod(mode)


def sync(path: Path) -> None:
    """Puts a file, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
