"""From a path or a hub name to a model."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from based import _core
from based._model import Model, core_options
from based._paths import check_path
from based._tokenizer import (
    GPT2_VOCAB_SIZE,
    LazyTokenizer,
    cached_gpt2_tokenizer,
    fetch_gpt2_tokenizer,
    read_tokenizer,
)
from based._tokenizer_files import TOKENIZER_FILES
from based._tokenizer_files import find_tokenizer as find_tokenizer_file

BUNDLED = "based-bytes"
"""The name of the model that comes with the package."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAFETENSORS = ["config.json", *TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def load(
    path_or_id: str | os.PathLike[str] = BUNDLED,
    *,
    device: str = "auto",
    dtype: str = "auto",
    num_threads: int | None = None,
    deterministic: bool = False,
    max_context: int | None = None,
    revision: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Model:
    """Loads a model.

    A published model is converted once, into $BASED_CACHE (by default $XDG_CACHE_HOME/based or ~/.cache/based);
    what lies there may be deleted at any time.

    Args:
        path_or_id: A directory, in our format or as published; or a name "owner/name" at the hub. A directory wins.
            By default "based-bytes", the small model that comes with the package; a directory of this name is
            "./based-bytes".
        device: "cpu", "cuda" or "cuda:N"; "auto" is $BASED_DEVICE if that is set, otherwise the first GPU that can be
            used, otherwise the CPU, which a RuntimeWarning says once.
        dtype: Of the weights: "float32", "bfloat16", on a GPU also "float16". "auto" is the files' own when that has 16
            bits and the device takes it; for others float32 on the CPU and bfloat16 on a GPU.
        num_threads: CPU threads of this model; None for the CPUs that this process may use.
        deterministic: A sequence's results do not depend, to the bit, on what else is in its batch. On a GPU every
            matrix product then runs by one algorithm for any number of rows, which is slower (docs/performance.md). On
            the CPU it is always so, and this changes nothing.
        max_context: Tokens that a sequence may have in a model with full attention, up to 2^24; None for as many as
            there is memory for now, for one sequence. Memory is taken as a sequence grows. A model with hyena layers
            has at most their max_length. Other models have no such limit, and take none.
        revision: Branch, tag or commit at the hub.
        tokenizer: A tokenizer.json, or a directory that holds one, or vocab.json and merges.txt (GPT-2's form). By
            default the model's own; the published models have none and use GPT-2's, which is fetched from the hub when
            text is first needed.

    Raises:
        FileNotFoundError: Neither a directory nor at the hub; or a file is missing.
        OSError: A file cannot be read or written, or the hub cannot be reached.
        FormatError: A file contradicts its format, or describes a model that `based` does not run.
        UnsupportedError: This build or machine lacks the device.
        MemoryError: The device has less memory than the weights need.
        ValueError: An argument outside its domain.
    """
    options = core_options(device, dtype, num_threads, deterministic, max_context)
    source = _locate(path_or_id, revision)
    lazy_tokenizer = _tokenizer_of(source, tokenizer)
    return Model(_core.Model.load(_in_our_format(source, tokenizer), **options), lazy_tokenizer)


def model_directory(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory in our format that load() would read, made if need be. Raises as load()."""
    return _in_our_format(_locate(path_or_id, revision))


def find_tokenizer(
    path_or_id: str | os.PathLike[str], revision: str | None = None, tokenizer: str | os.PathLike[str] | None = None
) -> LazyTokenizer:
    """The tokenizer that load() would give the model. Raises as load()."""
    return _tokenizer_of(_locate(path_or_id, revision), tokenizer)


@dataclass(slots=True, frozen=True)
class _Source:
    directory: Path
    name: str
    identity: list[object]
    """Changes whenever what the files say may have changed."""


def _locate(path_or_id: str | os.PathLike[str], revision: str | None) -> _Source:
    if not (name := check_path(path_or_id, "path_or_id")):  # Path("") is the current directory
        raise FileNotFoundError(
            errno.ENOENT, "an empty text, neither an existing directory nor a model's name at the hub (owner/name)", ""
        )
    path = Path(path_or_id)
    if path_or_id == BUNDLED:
        path = Path(__file__).parent / "models" / BUNDLED
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models at the hub, but {str(path)!r} is a directory")
        path = path.resolve()
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".txt", ".bin", ".safetensors"))
        stats = [(file.name, *_size_and_time(file)) for file in files]
        return _Source(path, path.name, [str(path), stats])
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, "a model is a directory, this is a file", str(path))
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            errno.ENOENT, "neither an existing directory nor a model's name at the hub (owner/name)", name
        )
    directory = _download(name, revision)
    return _Source(directory, name.replace("/", "--"), [name, directory.name])  # a snapshot's folder is its commit


def _download(name: str, revision: str | None) -> Path:
    """The hub's files of a model in the hub's own cache; pickles only when there is nothing safer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=_SAFETENSORS))
        if not any(directory.glob("model*.safetensors")):
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SAFETENSORS, *_PICKLES]))
    except LocalEntryNotFoundError as error:  # the network's failure, which says nothing about the name
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else _one_line(error.__cause__ or error)
        raise FileNotFoundError(
            errno.ENOENT,
            f"no such directory, not in the hub's cache here, and the hub cannot be reached: {reason}",
            name,
        ) from error
    except GatedRepoError as error:
        reason = "the hub gives this model to those who accepted its conditions and are logged in (hf auth login)"
        raise PermissionError(errno.EACCES, f"no such directory, and {reason}", name) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, f"the hub's model of this name has no revision {revision!r}", name
        ) from error
    except RepositoryNotFoundError as error:
        reason = "private ones need hf auth login or HF_TOKEN"
        raise FileNotFoundError(
            errno.ENOENT, f"no such directory, and the hub does not give a model of this name ({reason})", name
        ) from error
    except Exception as error:  # httpx's, the hub's, the system's
        reason = _one_line(error)
        raise OSError(errno.EIO, f"no such directory, and fetching it from the hub failed: {reason}", name) from error
    return directory


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _in_our_format(source: _Source, tokenizer: str | os.PathLike[str] | None = None) -> Path:
    """The source itself, or its conversion in the cache; one of its own for a tokenizer that changes it."""
    from based.convert import changed_vocabulary, convert, is_published

    if not is_published(source.directory):
        return source.directory
    parts = [_core.build_info()["version"], *source.identity]
    if tokenizer is not None:
        if (vocabulary := changed_vocabulary(source.directory, tokenizer)) is None:
            tokenizer = None
        else:
            parts.append([vocabulary.num_tokens, vocabulary.end_token_id])
    identity = json.dumps(parts).encode()
    cache = _cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    # Of a name only as much as leaves room for the rest: a file's name has at most 255 bytes.
    name = os.fsdecode(os.fsencode(source.name)[:150])
    converted = cache / f"{name}-{hashlib.sha256(identity).hexdigest()[:16]}"
    if _is_whole(converted):
        return converted
    with open(cache / f"{converted.name}.lock", "w") as lock:  # another process may be at it: one converts
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(converted):
            for leftover in cache.glob(f".{glob.escape(converted.name)}.*"):  # of a process that was killed
                shutil.rmtree(leftover)
            shutil.rmtree(converted, ignore_errors=True)  # somebody deleted or damaged a file in it
            convert(source.directory, converted, tokenizer=tokenizer)
    return converted


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:  # a link that leads nowhere: whoever needs it will say so
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _is_whole(directory: Path) -> bool:
    """Whether a directory of the cache has what conversion writes, and no file of it was cut short."""
    try:
        config = directory / "config.json"
        _core.ModelConfig.from_json(config.read_text(encoding="utf-8"), str(config))
        _core.SafetensorsFile(directory / "model.safetensors")
    except (OSError, ValueError):
        return False
    return True


def _cache_directory() -> Path:
    if own := os.environ.get("BASED_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "based"


def _tokenizer_of(source: _Source, tokenizer: str | os.PathLike[str] | None) -> LazyTokenizer:
    if tokenizer is not None:
        check_path(tokenizer, "tokenizer")
    path = find_tokenizer_file(source.directory, tokenizer)
    if path is not None:
        return LazyTokenizer(lambda: read_tokenizer(path))
    config = _in_our_format(source) / "config.json"
    vocab_size = _core.ModelConfig.from_json(config.read_text(encoding="utf-8"), str(config)).vocab_size
    if vocab_size != GPT2_VOCAB_SIZE:
        return LazyTokenizer(None)
    return LazyTokenizer(fetch_gpt2_tokenizer, cached_gpt2_tokenizer)
