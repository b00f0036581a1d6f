"""Documents packed into streams of tokens, once per run, and the windows of them that a step learns from."""

import codecs
import contextlib
import glob
import hashlib
import json
import os
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from based._core import FormatError
from based.convert import atomic_directory, sync
from based.torch._running import remove_files
from based.torch.train.config import Config, Source
from based.torch.train.tokens import Encoder, Ids

_VERSION = 2
_BLOCK = 1 << 22  # tokens of an array that memory holds at a time
_READ = 1 << 20  # bytes of a text file that are read at a time
_PIECE = 1 << 18  # characters of a document that are tokenised by themselves: a tokenizer takes 200 bytes for each
_BATCH = 1 << 19  # characters that are tokenised at a time
_NAME = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}\.[0-9a-f]{8}\.(new|old)")  # of packings, and of half a one
_FILE = re.compile(r"meta\.json|(train-\d+|validation)\.bin")  # of a packing
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
    sources = _sources(config)
    target = folder / _key(config, sources, encoder, vocab_size, end)
    if not (target / "meta.json").exists():
        notify("packing documents …")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(None, target, overwrite=False) as new:
            _Packer(config, sources, encoder, vocab_size, end, new, notify).run()
        _clean(folder, target)
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


def _clean(folder: Path, target: Path) -> None:
    """Removes other packings, and what killed processes left of some; no other file."""
    for old in folder.iterdir():
        if old != target and _NAME.fullmatch(old.name) and old.is_dir():
            remove_files(old, _FILE.fullmatch)


# ---- files -----------------------------------------------------------------------------------------------------------


def _kind(source: Source) -> str:
    return next(kind for kind in ("text", "jsonl", "tokens") if getattr(source, kind) is not None)


def _sources(config: Config) -> dict[str, tuple[Source, list[Path]]]:
    """Every source and its files, by the source's place in the configuration."""
    sources: dict[str, tuple[Source, list[Path]]] = {}
    used: dict[_File, list[tuple[str, object]]] = {}  # places, and how they read it
    for name in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, name)):
            where = f"data.{name}[{index}]"
            files = _files(config, source, where)
            for path in files:
                how = (name, _kind(source), source.separator, source.field)
                file = _identity(str(path))
                for other, other_how in used.setdefault(file, []):
                    if other_how == how or other.startswith("data.train") != where.startswith("data.train"):
                        raise FormatError(
                            f"{where}: {path} is also in {other}, expected each file once: "
                            f"leave it out of one of them by exclude"
                        )
                used[file].append((where, how))
            sources[where] = source, files
    return sources


_File: TypeAlias = tuple[int, int]
"""What a file is whatever links lead to it, symbolic or hard: its device, and its number there."""


def _identity(path: str) -> _File:
    """Raises OSError where a link leads nowhere, or to itself."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _files(config: Config, source: Source, where: str) -> list[Path]:
    """The files of a source, each once, by whatever names links give it."""
    kind = _kind(source)
    found: dict[str, str] = {}  # the real path, and the first name
    for pattern in getattr(source, kind):
        name = str(config.path(pattern))
        if os.path.isdir(name):
            raise FormatError(
                f"{where}.{kind}: {name} is a folder, expected files: {pattern.rstrip('/')}/** is all in it"
            )
        paths = [path for path in _matches(name) if not os.path.isdir(path)]
        if not paths:
            raise FormatError(f"{where}.{kind}: no file matches {name}")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    everything = list(found)
    for index, pattern in enumerate(source.exclude):
        name = str(config.path(pattern))
        matches = _matches(name)
        left_out = {os.path.realpath(path) for path in matches}
        out = [path for path in everything if path in left_out or not left_out.isdisjoint(_folders_of(path))]
        if several := [path for path in everything if os.path.isfile(path) and os.stat(path).st_nlink > 1]:
            files = {_identity(path) for path in _files_below(matches)}
            out += [path for path in several if _identity(path) in files]
        if not out:
            raise FormatError(
                f"{where}.exclude[{index}]: {name} leaves out none of the {len(everything)} files of {kind}, "
                f"expected a path or a pattern of some of them, such as **/{os.path.basename(name)} in any folder"
            )
        for path in out:
            found.pop(path, None)
    if not found:
        names = ", ".join(str(config.path(pattern)) for pattern in getattr(source, kind))
        raise FormatError(f"{where}.{kind}: no file matches {names} and no exclude")
    once: dict[_File, str] = {}
    for path in found.values():
        if os.path.islink(path) and not os.path.exists(path):
            raise FormatError(
                f"{where}.{kind}: {path} is a link to {os.readlink(path)}, which leads to no file, expected a file: "
                "leave it out by exclude"
            )
        once.setdefault(_identity(path), path)
    for path in once.values():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{where}.{kind}: {path} is not a regular file")
    return [Path(path) for path in once.values()]


def _files_below(paths: list[str]) -> Iterator[str]:
    """The files among `paths` and in the folders among them."""
    for folder in _walk([path for path in paths if os.path.isdir(path)]):
        yield from (path for name in os.listdir(folder) if os.path.isfile(path := os.path.join(folder, name)))
    yield from (path for path in paths if os.path.isfile(path))


def _folders_of(path: str) -> Iterator[str]:
    while path != (path := os.path.dirname(path)):
        yield path


def _matches(pattern: str) -> list[str]:
    """What a path or pattern names, sorted; `**` enters each folder once, by whatever links it is reached."""
    if os.path.lexists(pattern):
        return [pattern]
    first, *others = re.split(r"(?:(?<=^)|/)\*\*(?:/|$)", pattern)
    found = glob.glob(first) if first else ["/"]
    for part in others:
        folders = list(_walk(found))
        if part:
            found = [path for folder in folders for path in glob.glob(os.path.join(glob.escape(folder), part))]
        else:
            found = [path for folder in folders for path in glob.glob(os.path.join(glob.escape(folder), "*"))]
    return sorted(dict.fromkeys(found))


def _walk(roots: list[str]) -> Iterator[str]:
    """The folders among `roots` and all below them that are not hidden, each once."""
    seen: set[str] = set()
    links: list[str] = []  # later: a folder has its own name where it has one
    waiting = sorted(roots, reverse=True)
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(folder)
        if real in seen or not os.path.isdir(folder):
            continue
        seen.add(real)
        yield folder
        with os.scandir(folder) as entries:
            # Not entry.is_dir(), which raises OSError for a link that leads to itself.
            below = [entry for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry)]
        for entry in sorted(below, key=lambda entry: entry.name, reverse=True):
            (links if entry.is_symlink() else waiting).append(entry.path)


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
    skip = config.data.skip_bad_documents
    text = json.dumps([_VERSION, tokenizer, vocab_size, end, split, skip, described])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- documents -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Share:
    """Which documents of a source are held out for validation."""

    fraction: float
    """Those whose place is below it."""
    to_validation: int | None = None
    """One place more, where there would be none."""
    to_train: int | None = None
    """One place less, where all would be."""
    train_tokens: int | None = None
    """Instead: all tokens after so many."""
    tokens: int = 0
    """Of all documents."""
    lowest: int = 1 << 48
    highest: int = -1
    """Of the places of all documents."""

    def takes(self, place: int, train_tokens: int) -> bool:
        """Whether a document is held out, after so many tokens that are not."""
        self.lowest, self.highest = min(self.lowest, place), max(self.highest, place)
        if self.train_tokens is not None:
            return train_tokens >= self.train_tokens
        return (place < self.fraction * 2**48 or place == self.to_validation) and place != self.to_train

    def room(self, train_tokens: int) -> int:
        """How many tokens more are not held out, at most."""
        return sys.maxsize if self.train_tokens is None else max(0, self.train_tokens - train_tokens)


class _Packer:
    def __init__(
        self,
        config: Config,
        sources: dict[str, tuple[Source, list[Path]]],
        encoder: Encoder | None,
        vocab_size: int,
        end: int,
        folder: Path,
        notify: Callable[[str], None],
    ) -> None:
        self._config, self._sources, self._encoder, self._notify = config, sources, encoder, notify
        self._vocab_size, self._end, self._folder = vocab_size, end, folder
        self._dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self._start = np.array(encoder.start_token_ids if encoder is not None else (), self._dtype)
        self._left_out = 0

    def run(self) -> None:
        """Writes the streams and meta.json. Few documents are packed twice, when a hash took none of them, or all."""
        count = len(self._config.data.train) if self._config.data.train[0].weight is not None else 1
        shares = [_Share(self._config.data.validation_fraction) for _ in range(count)]
        train, validation = self._pack(shares)
        if self._config.data.validation_fraction and self._adjust(shares, train):
            train, validation = self._pack(shares)
        for index, writer in enumerate(train):
            if writer.documents == 0:
                raise FormatError(
                    f"data.train[{index}]: all documents are held out for validation, expected more of them"
                )
        if self._left_out:
            self._notify(f"{self._left_out} documents left out, which are not what they are said to be")
        meta = {
            "dtype": self._dtype,
            "train": [asdict(writer.finish()) for writer in train],
            "validation": asdict(validation.finish()) if validation is not None else None,
        }
        path = self._folder / "meta.json"
        path.write_text(json.dumps(meta, indent=1))
        sync(path)

    def _adjust(self, shares: list[_Share], train: "list[_Writer]") -> bool:
        """Sees that each stream, that of validation included, has something. Whether that changes anything."""
        changed = False
        for share, writer in zip(shares, train, strict=True):
            if writer.documents == 0:
                share.to_train, changed = share.highest, True
        held_out = any(
            share.lowest < min(share.fraction * 2**48, share.highest if share.to_train is not None else 1 << 48)
            for share in shares
        )
        if held_out:
            return changed
        several = [share for share in shares if share.lowest < share.highest]
        if several:
            share = min(several, key=lambda share: share.lowest)
            share.to_validation = share.lowest
        else:  # each source is one document, or copies of one: the end of the longest
            share = max(shares, key=lambda share: share.tokens)
            if share.tokens < 2:
                raise FormatError("data.validation_fraction: one token in all, expected more, or data.validation")
            share.train_tokens = min(share.tokens - 1, int(share.tokens * (1 - share.fraction)))
            share.to_train = None
        return True

    def _pack(self, shares: list[_Share]) -> "tuple[list[_Writer], _Writer | None]":
        with contextlib.ExitStack() as files:
            return self._pack_into(shares, files)

    def _pack_into(self, shares: list[_Share], files: contextlib.ExitStack) -> "tuple[list[_Writer], _Writer | None]":
        def new_writer(name: str) -> _Writer:
            return files.enter_context(_Writer(self._folder / f"{name}.bin", self._dtype, self._end))

        self._left_out = 0
        fraction = self._config.data.validation_fraction
        train: list[_Writer] = []
        validation = new_writer("validation") if fraction or self._config.data.validation else None
        for where, (source, paths) in self._sources.items():
            share: _Share | None = None
            if validation is not None and where.startswith("data.validation"):
                writer = validation
            else:
                if len(train) < len(shares):
                    train.append(new_writer(f"train-{len(train)}"))
                writer = train[-1]
                share = shares[len(train) - 1] if fraction else None
            empty = True
            chosen = writer
            for ids, text, first, last in self._pieces(source, paths):
                if first:
                    empty = False
                    chosen = writer
                    if share is not None and validation is not None:
                        place = _place(ids.tobytes() if text is None else text)
                        chosen = validation if share.takes(place, writer.tokens) else writer
                    chosen.add(self._start, 0)
                nbytes = None if text is None else len(text)
                if share is not None and validation is not None:
                    share.tokens += len(ids)
                    room = share.room(writer.tokens)
                    if chosen is writer and room < len(ids):  # the end of the only document
                        writer.add(ids[:room], self._nbytes(ids[:room], nbytes))
                        writer.end_document()
                        chosen, ids = validation, ids[room:]
                        nbytes = self._nbytes(ids, nbytes)
                chosen.add(ids, nbytes)
                if last:
                    chosen.end_document()
            if empty:
                plural = f"{len(paths)} files, all" if len(paths) > 1 else f"{paths[0]} is"
                left_out = f", or left out ({self._left_out})" if self._left_out else ""
                raise FormatError(f"{where}: no documents: {plural} empty{left_out}")
        return train, validation

    def _nbytes(self, ids: Ids, whole: int | None) -> int | None:
        return None if whole is None or self._encoder is None else self._encoder.nbytes(ids)

    def _pieces(self, source: Source, files: list[Path]) -> Iterator[tuple[Ids, bytes | None, bool, bool]]:
        """Ids and text of the pieces of every document that is not empty; whether one is its first, its last."""
        if source.tokens is not None:
            for path in files:
                array = _read_array(path, source, self._vocab_size)
                for document in self._split(array, path):
                    for start in range(0, len(document), _BLOCK):
                        last = start + _BLOCK >= len(document)
                        yield document[start : start + _BLOCK], None, start == 0, last
            return
        assert self._encoder is not None
        first = True
        for batch in _batches(self._texts(source, files)):
            for (text, last), ids in zip(batch, self._encoder.encode([text for text, _ in batch]), strict=True):
                yield ids, text.encode(), first, last
                first = last

    def _split(self, array: Ids, path: Path) -> Iterator[Ids]:
        """The documents of an array, without their end tokens."""
        said = self._encoder is not None or self._config.data.end_token_id is not None
        said = said or self._config.model.from_ is not None
        start = empty = 0
        for block in range(0, len(array), _BLOCK):
            for position in np.flatnonzero(array[block : block + _BLOCK] == self._end) + block:
                if position > start:
                    yield array[start:position]
                elif position > 0:
                    if not said:
                        raise FormatError(
                            f"{path}: id {self._end} stands twice in a row, at {position - 1}. The last id of "
                            "model.vocab_size ends a document by default: expected data.end_token_id, or one id more"
                        )
                    empty += 1
                start = int(position) + 1
        if empty:
            self._notify(f"{path}: {empty} empty documents left out: end tokens in a row")
        if start < len(array):
            yield array[start:]

    def _texts(self, source: Source, files: list[Path]) -> Iterator[tuple[str, bool]]:
        """Pieces of documents that are not empty, and whether one is the last of its document."""
        skip = self._config.data.skip_bad_documents
        for path in files:
            if source.jsonl is not None:
                for document in self._read_jsonl(path, source.field or "text", skip):
                    yield from _cut(iter([(document, True)]))
            elif not (skip and self._is_bad(path)):
                yield from _cut(_read_text(path, source.separator))

    def _is_bad(self, path: Path) -> bool:
        try:
            for _ in _read_text(path, None):
                pass
        except FormatError:
            self._left_out += 1
            return True
        return False

    def _read_jsonl(self, path: Path, field: str, skip: bool) -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    yield _read_line(line, f"{path}:{number}", field)
                except FormatError:
                    if not skip:
                        raise
                    self._left_out += 1


def _place(content: bytes) -> int:
    """A number below 2⁴⁸ that only depends on the content: copies of a document are on one side of a split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest())


class _Writer:
    """Appends documents to a file."""

    def __init__(self, path: Path, dtype: str, end: int) -> None:
        self._path, self._dtype = path, dtype
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._end = np.array([end], dtype)
        self.documents = self.tokens = 0
        self._nbytes: int | None = 0

    def add(self, ids: Ids, nbytes: int | None) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)
        self._nbytes = None if nbytes is None or self._nbytes is None else self._nbytes + nbytes

    def end_document(self) -> None:
        self.add(self._end, 0)
        self.documents += 1

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> Stream:
        sync(self._path)
        return Stream(self._path.name, self.tokens, self.documents, self._nbytes, self._hash.hexdigest())


def _read_text(path: Path, separator: str | None) -> Iterator[tuple[str, bool]]:
    """Pieces of a file's documents, about _READ characters at most; whether one is the last of its document.

    A line feed of the separator may have a carriage return before it. A byte order mark at the start is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    pattern, longest = None, 1
    if separator is not None:
        parts = [
            r"\r?\n" if c == "\n" and separator[i - 1 : i] != "\r" else re.escape(c) for i, c in enumerate(separator)
        ]
        pattern, longest = re.compile("".join(parts)), 2 * len(separator)
    rest, position, begun = "", 0, False
    with path.open("rb") as file:
        while True:
            data = file.read(_READ)
            if position == 0 and data.startswith(b"\x1f\x8b"):
                raise FormatError(f"{path}: compressed by gzip, expected text: unpack it first")
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = position - waiting + error.start
                raise FormatError(f"{path}: byte {where} is not UTF-8 ({error.reason}), expected text") from None
            if (zero := data.find(0)) >= 0:
                raise FormatError(f"{path}: byte {position + zero} is zero, expected text")
            if text and not begun:
                text, begun = text.removeprefix("\ufeff"), True
            position += len(data)
            rest += text
            start = 0
            if pattern is not None:
                for match in pattern.finditer(rest):
                    yield rest[start : match.start()], True
                    start = match.end()
            if not data:
                yield rest[start:], True
                return
            # Of the separator, a part may be here.
            end = max(start, len(rest) - longest + 1)
            yield rest[start:end], False
            rest = rest[end:]


def _cut(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Pieces of about _PIECE characters, cut before white space where there is some; without empty documents."""
    rest = ""
    begun = False  # whether a piece of the document has been given
    for text, last in pieces:
        rest += text
        while len(rest) > _PIECE:
            near = max(1, _PIECE - 4096)
            spaces = [match.start() for match in re.finditer(r"(?<=\S)\s", rest[near:_PIECE])]
            end = near + spaces[-1] if spaces else _PIECE
            yield rest[:end], False
            rest, begun = rest[end:], True
        if last:
            if rest or begun:
                yield rest, True
            rest, begun = "", False


def _read_line(line: bytes, where: str, field: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        packed = "; is it compressed?" if line.startswith(b"\x1f\x8b") else ""
        raise FormatError(f"{where}: byte {error.start} is not UTF-8 ({error.reason}), expected text{packed}") from None
    if (zero := line.find(0)) >= 0:
        raise FormatError(f"{where}: byte {zero} is zero, expected text")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        found = type(value).__name__ if not isinstance(value, dict) else type(value.get(field)).__name__
        found = "no such key" if isinstance(value, dict) and field not in value else found
        raise FormatError(f"{where}: found {found}, expected an object with a text at {field!r}")
    document: str = value[field]
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: the text is not Unicode: {error}") from None
    if (zero := document.find("\0")) >= 0:
        raise FormatError(f"{where}: character {zero} of the text is zero, expected text")
    return document


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Many pieces at a time."""
    batch, size = [], 0
    for text, last in pieces:
        batch.append((text, last))
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
        except (ValueError, OverflowError, EOFError, MemoryError, zipfile.BadZipFile) as error:  # of what a header says
            raise FormatError(f"{path}: not an array that NumPy can map: {error or type(error).__name__}") from None
        if not isinstance(array, np.ndarray):
            raise FormatError(f"{path}: found an archive of arrays, expected one array")
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
