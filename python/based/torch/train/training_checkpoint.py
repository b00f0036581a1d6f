"""Training checkpoints: a folder each, which is there whole or not at all, and says so of itself by checksums."""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from based import _core
from based._core import FormatError, ModelConfig
from based.convert import atomic_directory, stored_tensors, sync
from based.torch._running import remove_files

_VERSION = 1
_NAME = re.compile(r"step-(\d{9})")
_LEFTOVER = re.compile(r"\.(step-\d{9})\.(old|[0-9a-f]{8}\.(new|old))")
_UNFINISHED = re.compile(r"\.based-[0-9a-f]{8}-[0-9a-f]{8}-\d{1,9}-[0-9a-f]{8}\.(new|old)")  # of atomic_directory
_FILES = {"model.safetensors", "optimizer.safetensors", "config.json", "training.json"}
_OWN = _FILES | {"tokenizer.json", "sha256.json"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, besides its tensors. Nothing in training draws random numbers but by the step's number."""

    step: int
    """Updates made."""
    config: dict[str, Any]
    """`Config.fixed()`."""
    data: str
    """`Dataset.content`."""
    validation: str | None = None
    """Names the tokens that validations measure; None: none do, or the checkpoint is older than this field."""
    validation_from: int = 0
    """The step from which on they do: losses before it cannot be compared."""
    changes: tuple[dict[str, Any], ...] = ()
    """What was changed on purpose: `step`, `key`, `was`, `is`."""


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint:
    """A checkpoint on the disk."""

    path: Path
    progress: Progress

    def tensors(self, file: str) -> Tensors:
        """Those of model.safetensors or optimizer.safetensors, float32."""
        stored = stored_tensors(_core.SafetensorsFile(self.path / file))
        return {name: torch.from_numpy(tensor.bits) for name, tensor in stored.items()}


def save(
    folder: Path, progress: Progress, weights: Tensors, optimizer: Tensors, config: ModelConfig, tokenizer: bytes | None
) -> TrainingCheckpoint:
    """Writes a checkpoint, which is also a model directory. Raises OSError, and leaves nothing then."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{progress.step:09d}"
    kept = _gone(path)
    if path.is_dir() and not _holds_own(path):  # what others put into an earlier checkpoint of this step
        path.rename(kept)
    try:
        _write_whole(path, progress, weights, optimizer, config, tokenizer)
    finally:
        if kept.is_dir():
            _settle(kept, path)
    return TrainingCheckpoint(path, progress)


def _write_whole(
    path: Path, progress: Progress, weights: Tensors, optimizer: Tensors, config: ModelConfig, tokenizer: bytes | None
) -> None:
    with atomic_directory(None, path, overwrite=False) as new:
        _write_tensors(new / "model.safetensors", weights)
        _write_tensors(new / "optimizer.safetensors", optimizer)
        _write(new / "config.json", config.to_json().encode())
        if tokenizer is not None:
            _write(new / "tokenizer.json", tokenizer)
        _write(new / "training.json", json.dumps({"version": _VERSION, **asdict(progress)}, indent=1).encode())
        sums = {file.name: _sha256(file) for file in sorted(new.iterdir())}
        _write(new / "sha256.json", json.dumps(sums, indent=1).encode())


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    arrays = [(name, tensor.contiguous().numpy(), "float32") for name, tensor in tensors.items()]
    _core.write_safetensors(path, arrays, {"format": "based"})


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_saved(folder: Path) -> list[TrainingCheckpoint]:
    """The checkpoints of a folder, oldest first, without reading tensors; what cannot be read is left out."""
    saved = []
    for path in paths(folder):
        try:
            saved.append(TrainingCheckpoint(path, _read_progress(path)))
        except (OSError, FormatError):
            continue  # newest() speaks of it
    return saved


def paths(folder: Path) -> list[Path]:
    """Of the checkpoints of a folder, oldest first, damaged ones too; not of what else lies there."""
    named = [path for path in sorted(folder.glob("step-*")) if _NAME.fullmatch(path.name)]
    return [path for path in named if path.is_dir() and _holds_own(path)]


def _holds_own(path: Path) -> bool:
    """Whether a folder has any file of a checkpoint. What is left of one that was removed is what others put there."""
    return any((path / name).exists() for name in _OWN)


def newest(folder: Path) -> TrainingCheckpoint | None:
    """The last checkpoint that is what was written; None when there is none at all.

    Damaged ones are passed over with a warning. Raises FormatError when all are damaged.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            _verify(path)
            return TrainingCheckpoint(path, _read_progress(path))
        except (OSError, FormatError) as error:
            warnings.warn(f"this checkpoint is damaged and is passed over: {error}", RuntimeWarning, stacklevel=2)
    if found:
        raise FormatError(f"{folder}: every checkpoint is damaged; --restart begins anew")
    return None


def _verify(path: Path) -> None:
    where = path / "sha256.json"
    try:
        sums = dict(json.loads(where.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{where}: {error}") from None
    if missing := sorted(_FILES - sums.keys()):
        raise FormatError(f"{where}: says nothing of {missing[0]}")
    for name, expected in sums.items():
        if Path(name).name != name:
            raise FormatError(f"{where}: found {name!r}, expected the name of a file beside it")
        if (found := _sha256(path / name)) != expected:
            raise FormatError(f"{path / name}: its SHA-256 is {found[:16]}…, expected {str(expected)[:16]}…")


def _read_progress(path: Path) -> Progress:
    where = path / "training.json"
    try:
        document = json.loads(where.read_bytes())
        version = document.pop("version")
        if version != _VERSION:
            raise FormatError(f"{where}: version {version}, expected {_VERSION}")
        progress = Progress(**document)
        changes = tuple(map(dict, progress.changes))
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: damaged: {error!r}") from None
    for value, kind, name in (
        (progress.step, int, "step"),
        (progress.config, dict, "config"),
        (progress.data, str, "data"),
    ):
        if type(value) is not kind:
            raise FormatError(f"{where}: {name}: found {type(value).__name__}, expected {kind.__name__}")
    return dataclasses.replace(progress, changes=changes)


def prune(folder: Path, keep: int, best: Path | None) -> None:
    """Removes all but the last `keep` and the best."""
    for old in all_saved(folder)[:-keep]:
        if old.path != best:
            remove(old.path)


def remove(path: Path) -> None:
    """Removes a checkpoint; it is gone before its files are, so that none is ever seen half. Files of others stay."""
    gone = _gone(path)
    if gone.is_dir():
        _settle(gone, path)
    path.rename(gone)
    _settle(gone, path)


def _gone(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _settle(gone: Path, path: Path) -> None:
    """Removes a checkpoint's files from `gone`, and puts back into `path` what others have put there."""
    if remove_files(gone, _OWN.__contains__):
        return
    path.mkdir(exist_ok=True)
    for other in gone.iterdir():
        other.rename(path / other.name)
    gone.rmdir()


def clean(folder: Path) -> None:
    """Removes what a killed process left beside the checkpoints; files of others stay."""
    for leftover in [*folder.glob(".step-*"), *folder.glob(".based-*")]:
        if not leftover.is_dir():
            continue
        if name := _LEFTOVER.fullmatch(leftover.name):
            _settle(leftover, folder / name[1])
        elif _UNFINISHED.fullmatch(leftover.name):
            remove_files(leftover, _OWN.__contains__)
