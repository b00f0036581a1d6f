"""Documents packed into streams of tokens, once per run, and the windows of them that a step learns from."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from based._core import FormatError
from based.convert import atomic_directory, sync
from based.torch.train.config import Config, Source
from based.torch.train.tokens import Encoder, Ids

_VERSION = 1
_BLOCK = 1 << 24  # tokens of an array that memory holds at a time
_BATCH = 1 << 20  # characters that are tokenised at a time
_ROUND = 1000  # windows in which every source has its share


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents one after the other, each with its end token."""

    file: str
    tokens: int
    documents: int
    nbytes: int | None
    """Of the documents' text; None where some came as token ids."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """What pack() made."""

    folder: Path
    dtype: str
    train: list[Stream]
    validation: Stream | None

    @property
    def content(self) -> str:
        """Names the tokens that training sees: equal for equal ones, wherever they come from."""
        return hashlib.sha256(json.dumps([s.sha256 for s in self.train]).encode()).hexdigest()

    def open(self, stream: Stream) -> Ids:
        """The tokens, memory-mapped."""
        return np.memmap(self.folder / stream.file, self.dtype, "r", shape=(stream.tokens,))


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(
    config: Config, folder: Path, encoder: Encoder | None, vocab_size: int, end: int, notify: Callable[[str], None]
) -> Dataset:
    """The run's tokens: from `folder` when the sources have not changed since, otherwise packed into it.

    Args:
        config: Says which documents.
        folder: Of all packings of this run.
        encoder: The tokenizer; None when all sources are token ids.
        vocab_size: Of the model; an id from there on is an error.
        end: The token that ends a document.
        notify: Is told what takes long.

    Raises:
        OSError: A file cannot be read, or the disk is full.
        FormatError: A source has no documents, or is not what it is said to be.
    """
    sources = {
        f"data.{name}[{i}]": (source, _files(config, source, f"data.{name}[{i}]"))
        for name in ("train", "validation")
        for i, source in enumerate(getattr(config.data, name))
    }
    target = folder / _key(config, sources, encoder, vocab_size, end)
    if not target.is_dir():
        notify("packing documents …")
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        with atomic_directory(None, target, overwrite=False) as new:
            _Packer(config, sources, encoder, vocab_size, end, new).run()
        for old in folder.iterdir():
            if old != target:
                shutil.rmtree(old)
    return open_dataset(target)


def open_dataset(folder: Path) -> Dataset:
    """A packing. Raises OSError, FormatError."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
        streams = [Stream(**stream) for stream in meta["train"]]
        validation = Stream(**meta["validation"]) if meta["validation"] else None
        dataset = Dataset(folder, meta["dtype"], streams, validation)
        for stream in [*streams, *([validation] if validation else [])]:
            expected, found = stream.tokens * np.dtype(dataset.dtype).itemsize, (folder / stream.file).stat().st_size
            if found != expected:
                raise FormatError(f"{folder / stream.file}: {found} bytes, expected {expected}: delete {folder}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: damaged ({error}): delete {folder}") from error
    return dataset


def _clean(folder: Path) -> None:
    """Removes what a killed process left."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover)


def _files(config: Config, source: Source, where: str) -> list[Path]:
    kind = next(kind for kind in ("text", "jsonl", "tokens") if getattr(source, kind) is not None)
    left_out = {path for pattern in source.exclude for path in glob.glob(str(config.path(pattern)), recursive=True)}
    files: list[Path] = []
    for pattern in getattr(source, kind):
        name = str(config.path(pattern))
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        chosen = [Path(path) for path in found if path not in left_out and not os.path.isdir(path)]
        for path in chosen:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise FormatError(f"{where}.{kind}: {path}: not a regular file")
        if not chosen:
            raise FormatError(f"{where}.{kind}: no file matches {name}" + (" and no exclude" if found else ""))
        files += chosen
    return list(dict.fromkeys(files))


def _key(config: Config, sources: Any, encoder: Encoder | None, vocab_size: int, end: int) -> str:
    """Changes whenever the packing may."""
    described = []
    for source, files in sources.values():
        stats = [
            (str(path.resolve()), status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]
        ]
        how = [source.text is None, source.jsonl is None, source.separator, source.field, source.dtype]
        described.append([*how, source.weight is None, stats])
    tokenizer = encoder and hashlib.sha256(encoder.json).hexdigest()
    split = [len(config.data.train), config.data.validation_fraction]
    text = json.dumps([_VERSION, tokenizer, vocab_size, end, split, described])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Packer:
    def __init__(
        self,
        config: Config,
        sources: dict[str, tuple[Source, list[Path]]],
        encoder: Encoder | None,
        vocab_size: int,
        end: int,
        folder: Path,
    ) -> None:
        self._config, self._sources, self._encoder = config, sources, encoder
        self._vocab_size, self._end, self._folder = vocab_size, end, folder
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"

    def run(self) -> None:
        with contextlib.ExitStack() as files:
            self._run(files)

    def _run(self, files: contextlib.ExitStack) -> None:
        def new_writer(name: str) -> _Writer:
            return files.enter_context(_Writer(self._folder / f"{name}.bin", self._dtype, self._end))

        fraction = self._config.data.validation_fraction
        weighted = self._config.data.train[0].weight is not None
        train: list[_Writer] = []
        validation = new_writer("validation") if fraction or self._config.data.validation else None
        for where, (source, paths) in self._sources.items():
            held_out = fraction
            if validation is not None and where.startswith("data.validation"):
                writer, held_out = validation, 0.0
            elif weighted or not train:
                writer = new_writer(f"train-{len(train)}")
                train.append(writer)
            else:
                writer = train[-1]
            empty = True
            for ids, text in self._documents(source, paths):
                chosen = held_out and _place(ids.tobytes() if text is None else text) < held_out
                (validation if validation is not None and chosen else writer).add(
                    ids, None if text is None else len(text)
                )
                empty = False
            if empty:
                plural = f"{len(paths)} files, all" if len(paths) > 1 else f"{paths[0]} is"
                raise FormatError(f"{where}: no documents: {plural} empty")
        if validation is not None and validation.documents == 0:
            found = f"{fraction:g} of {sum(w.documents for w in train)} documents is none"
            raise FormatError(f"data.validation_fraction: {found}, expected a larger one, or data.validation")
        for index, writer in enumerate(train):
            if writer.documents == 0:
                raise FormatError(
                    f"data.train[{index}]: all documents are held out for validation, expected more of them"
                )
        meta = {
            "dtype": self._dtype,
            "train": [asdict(writer.finish()) for writer in train],
            "validation": asdict(validation.finish()) if validation is not None else None,
        }
        path = self._folder / "meta.json"
        path.write_text(json.dumps(meta, indent=1))
        sync(path)

    def _documents(self, source: Source, files: list[Path]) -> Iterator[tuple[Ids, bytes | None]]:
        """Ids and text of every document that is not empty."""
        if source.tokens is not None:
            for path in files:
                for ids in _split(_read_array(path, source, self._vocab_size), self._end):
                    yield ids, None
            return
        assert self._encoder is not None
        for texts in _batches(_texts(source, files)):
            for text, ids in zip(texts, self._encoder.encode(texts), strict=True):
                yield ids, text.encode()


def _place(content: bytes) -> float:
    """A number in [0, 1) that only depends on the content: copies of a document are on one side of a split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest()) / 2**48


class _Writer:
    """Appends documents to a file."""

    def __init__(self, path: Path, dtype: str, end: int) -> None:
        self._path, self._dtype = path, dtype
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._end = np.array([end], dtype)
        self.documents = self._tokens = 0
        self._nbytes: int | None = 0

    def add(self, ids: Ids, nbytes: int | None) -> None:
        data = np.concatenate([ids.astype(self._dtype), self._end]).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.documents += 1
        self._tokens += len(ids) + 1
        self._nbytes = None if nbytes is None or self._nbytes is None else self._nbytes + nbytes

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> Stream:
        self._file.close()
        sync(self._path)
        return Stream(self._path.name, self._tokens, self.documents, self._nbytes, self._hash.hexdigest())


def _texts(source: Source, files: list[Path]) -> Iterator[str]:
    for path in files:
        if source.jsonl is not None:
            yield from _read_jsonl(path, source.field or "text")
        else:
            text = _decode(path.read_bytes(), str(path))
            yield from text.split(source.separator) if source.separator is not None else [text]


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: byte {error.start} is not UTF-8 ({error.reason}), expected text") from None
    if (zero := data.find(0)) >= 0:
        raise FormatError(f"{where}: byte {zero} is zero, expected text")
    return text


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                value = json.loads(_decode(line, where))
            except (ValueError, RecursionError) as error:
                if isinstance(error, FormatError):
                    raise
                raise FormatError(f"{where}: not JSON: {error}") from None
            if not isinstance(value, dict) or not isinstance(value.get(field), str):
                found = type(value).__name__ if not isinstance(value, dict) else type(value.get(field)).__name__
                found = "no such key" if isinstance(value, dict) and field not in value else found
                raise FormatError(f"{where}: found {found}, expected an object with a text at {field!r}")
            try:
                value[field].encode()
            except UnicodeEncodeError as error:
                raise FormatError(f"{where}: the text is not Unicode: {error}") from None
            yield value[field]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts that are not empty, many at a time."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_array(path: Path, source: Source, vocab_size: int) -> Ids:
    if path.suffix == ".npy":
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise FormatError(f"{path}: not an array that NumPy can map: it does not begin with \\x93NUMPY")
        try:
            array: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OverflowError, EOFError, MemoryError) as error:  # of what a header says
            raise FormatError(f"{path}: not an array that NumPy can map: {error or type(error).__name__}") from None
        if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
            raise FormatError(f"{path}: found {array.dtype} {array.shape}, expected uint16 or uint32 (N,)")
    elif path.suffix == ".bin":
        if source.dtype is None:
            raise FormatError(f"{path}: a .bin file says nothing of its numbers: expected dtype beside tokens")
        size, item = path.stat().st_size, np.dtype(source.dtype).itemsize
        if size % item:
            raise FormatError(f"{path}: {size} bytes, expected a multiple of {item}")
        array = np.memmap(path, source.dtype, "r") if size else np.zeros(0, source.dtype)
    else:
        raise FormatError(f"{path}: found {path.suffix or 'no ending'}, expected .npy or .bin")
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK]
        if (largest := int(block.max())) >= vocab_size:
            where = start + int(block.argmax())
            raise FormatError(f"{path}: token {where} is {largest}, expected ids in [0, {vocab_size})")
    return array


def _split(array: Ids, end: int) -> Iterator[Ids]:
    """The documents, without their end tokens."""
    start = 0
    for block in range(0, len(array), _BLOCK):
        for position in np.flatnonzero(array[block : block + _BLOCK] == end) + block:
            if position > start:
                yield array[start:position]
            start = int(position) + 1
    if start < len(array):
        yield array[start:]


# ---- windows ---------------------------------------------------------------------------------------------------------


class Windows:
    """The windows of training in their order: number i is a function of (seed, i) alone.

    A stream is a ring. An epoch cuts it, from a random place on, into windows that share one token with the next, so
    that each token is predicted once but for a rest shorter than a window, and takes them in random order. With
    weights, every 1,000 windows hold each stream's share, in random order.
    """

    def __init__(self, streams: list[Ids], weights: list[float] | None, length: int, seed: int) -> None:
        self._streams, self._length, self._seed = streams, length, seed
        for index, stream in enumerate(streams):
            if len(stream) < length:
                where = f"data.train[{index}]" if weights else "data.train"
                raise FormatError(f"{where}: {len(stream)} tokens, expected at least sequence_length, {length}")
        self._ends = _shares(weights) if weights else np.array([_ROUND])
        self._orders: dict[object, tuple[object, int, Ids]] = {}

    def batch(self, first: int, count: int) -> Ids:
        """Windows first … first + count − 1, (count, length) int64."""
        return np.stack([self._window(first + i) for i in range(count)])

    def _window(self, number: int) -> Ids:
        source, index = 0, number
        if len(self._streams) > 1:
            turn, place = divmod(number, _ROUND)
            place = int(self._order("round", turn, _ROUND)[1][place])
            source = int(np.searchsorted(self._ends, place, side="right"))
            start = int(self._ends[source - 1]) if source else 0
            index = turn * int(self._ends[source] - start) + place - start
        stream = self._streams[source]
        count = len(stream) // (self._length - 1)
        epoch, place = divmod(index, count)
        offset, order = self._order(source, epoch, count, len(stream))
        start = (offset + int(order[place]) * (self._length - 1)) % len(stream)
        window = stream[start : start + self._length]
        if len(window) < self._length:
            window = np.concatenate([window, stream[: self._length - len(window)]])
        return window.astype(np.int64)

    def _order(self, kind: object, turn: int, count: int, places: int = 1) -> tuple[int, Ids]:
        """A random place and a random order of `count` things, kept while turns are the same."""
        kept = self._orders.get(kind)
        if kept is None or kept[0] != turn:
            tag = 0 if kind == "round" else int(str(kind)) + 1
            random = np.random.Generator(np.random.PCG64([self._seed, tag, turn]))
            kept = turn, int(random.integers(places)), random.permutation(count)
            self._orders[kind] = kept
        return kept[1], kept[2]


def _shares(weights: list[float]) -> Ids:
    """Where each stream's part of a round ends: largest remainders."""
    exact = np.array(weights) / sum(weights) * _ROUND
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: _ROUND - int(counts.sum())]
    counts[rest] += 1
    if (counts == 0).any():
        index = int(np.flatnonzero(counts == 0)[0])
        raise FormatError(f"data.train[{index}].weight: less than 1 / {_ROUND} of all weights, expected more")
    return np.cumsum(counts)


def validation_windows(tokens: Ids, length: int, limit: int | None) -> list[slice]:
    """Windows that predict each token once, the last one shorter; with a limit some of them, evenly spread."""
    windows = [slice(start, min(start + length, len(tokens))) for start in range(0, len(tokens) - 1, length - 1)]
    if limit is not None and limit < len(tokens):
        count = max(1, limit // length)
        windows = [windows[i * len(windows) // count] for i in range(min(count, len(windows)))]
    return windows
