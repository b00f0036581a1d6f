"""States that clients name: in memory, and in files that survive a restart."""

import contextlib
import errno
import json
import os
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from based.server._errors import ApiError, invalid
from based.server._options import NAME

if TYPE_CHECKING:
    from based import Model, State

_SUFFIX = ".safetensors"
_LONGEST_HEADER = 1 << 20  # bytes


@dataclass(slots=True)
class _Entry:
    state: "State"
    created: float
    saved: bool
    stamp: tuple[int, int] | None = None
    """Of the file that holds this very state; where the folder is shared."""


def check_name(name: Any, param: str) -> str:
    """The name itself, if a state may have it. Raises ApiError."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    shown = repr(name) if len(repr(name)) <= 100 else "a long one"
    raise invalid(
        f"{param}: {shown} is no name of a state, expected a text of 1 … 128 letters A-Z, a-z, digits, '_', '.' and "
        "'-', that begins with a letter or a digit",
        param=param,
        code="invalid_name",
    )


def new_name() -> str:
    """A name that nobody guesses."""
    return f"state-{secrets.token_hex(12)}"


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What another file of this name would not have, with very little chance."""
    return status.st_ino, status.st_mtime_ns


def _num_tokens(file: Path | None) -> int | None:
    """What a state's file says of its length; None when it is none."""
    try:
        assert file is not None
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            return int(json.loads(data.read(min(length, _LONGEST_HEADER)))["__metadata__"]["num_tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class StateStore:
    """States by name. From any thread.

    Memory holds the states used last, up to a number and to a number of bytes. One that has to go is written to the
    folder first; without a folder it is lost, and who names it later is told that there is none. A state in memory
    does not change: a name that is given again names another state from then on.

    Several processes may share the folder (`shared`). Then the files say which states there are: each state is written
    when it comes, and what memory holds is used as long as the file of its name is the one that was read or written.
    """

    def __init__(
        self,
        model: "Model",
        folder: Path | None,
        *,
        max_states: int,
        max_bytes: int,
        max_files: int,
        warn: Any,
        shared: bool = False,
        may_go: bool = False,
    ) -> None:
        """Raises OSError when the folder cannot be used, ValueError when there is none to share.

        Args:
            model: Of the states.
            folder: Where their files are; None: states are in memory alone.
            max_states: In memory.
            max_bytes: Of them.
            max_files: In the folder.
            warn: Called with a line, when a state is lost.
            shared: Other processes use the folder, too.
            may_go: Beyond max_files the file that was written first goes; else a new one is refused.
        """
        if shared and folder is None:
            raise ValueError("shared states need a folder: --state-dir")
        self._model = model
        self._folder = folder
        self._max_states, self._max_bytes, self._max_files = max_states, max_bytes, max_files
        self._warn = warn
        self._shared, self._may_go = shared, may_go
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # used last: last
        self._lock = threading.RLock()
        self.num_evicted = 0
        """States that were lost for want of room."""
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # conversations are their owner's
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()

    @property
    def in_memory(self) -> tuple[int, int]:
        """Number of states in memory, and their bytes."""
        with self._lock:
            return len(self._entries), sum(entry.state.nbytes for entry in self._entries.values())

    def add(self, name: str, state: "State") -> None:
        """Keeps a state; another one of this name is forgotten, its file as soon as this one is saved.

        Raises ApiError and OSError where the folder is shared and has no room.
        """
        with self._lock:
            self._add(name, state)

    def _add(self, name: str, state: "State", *, is_new: bool = False) -> None:
        entry = _Entry(state, time.time(), saved=False)
        if self._shared:
            entry.stamp, entry.saved = self._write(name, state, is_new=is_new), True
        self._entries.pop(name, None)
        self._entries[name] = entry
        self._make_room()

    def get(self, name: str, param: str = "id") -> "State":
        """The state, from memory or else from its file. Raises ApiError."""
        with self._lock:
            entry = self._entry(name)
            if entry is not None:
                self._entries.move_to_end(name)
                return entry.state
            return self._load(name, param)

    def load(self, name: str) -> dict[str, Any]:
        """Takes a state's file into memory, in place of the state that is there. Raises ApiError."""
        with self._lock:
            self._path(name, must_exist=True)
            self._load(name, "id")
            return self.info(name)

    def save(self, name: str, to: str | None = None) -> dict[str, Any]:
        """Writes a state's file, under its own name or another one. Raises ApiError, OSError."""
        with self._lock:
            state = self.get(name)
            target = name if to is None else to
            if self._folder is None:
                raise self._no_folder()
            stamp = self._write(target, state)
            if target in self._entries:
                entry = self._entries[target]
                entry.saved = entry.state is state
                entry.stamp = stamp if entry.saved else None
            return self.info(target)

    def fork(self, name: str, to: str) -> dict[str, Any]:
        """Gives a state one more name. Raises ApiError when another state has it."""
        with self._lock:
            state = self.get(name)
            if self._exists(to):
                raise self._taken(to)
            self._add(to, state, is_new=True)
            return self.info(to)

    def delete(self, name: str) -> None:
        """Forgets a state, and its file. Raises ApiError."""
        with self._lock:
            if not self._exists(name):
                raise self._missing(name, "id")
            self._entries.pop(name, None)
            if self._folder is not None:
                (self._folder / (name + _SUFFIX)).unlink(missing_ok=True)

    def everything(self) -> list[dict[str, Any]]:
        """All states, the newest first."""
        with self._lock:
            names = {*self._entries, *self._files()}
            found = []
            for name in names:
                with contextlib.suppress(ApiError):  # of a file that went away, or is none of ours
                    found.append(self.info(name))
            return sorted(found, key=lambda info: (-info["created"], info["id"]))

    def info(self, name: str) -> dict[str, Any]:
        """What there is of a state. Raises ApiError."""
        with self._lock:
            entry = self._entry(name)
            file = None if self._folder is None else self._folder / (name + _SUFFIX)
            try:
                status = None if file is None else file.stat()
            except FileNotFoundError:
                status = None
            if entry is None and status is None:
                raise self._missing(name, "id")
            created = entry.created if entry is not None else status.st_mtime if status is not None else 0.0
            return {
                "id": name,
                "object": "state",
                "created": int(created),
                "num_tokens": entry.state.num_tokens if entry is not None else _num_tokens(file),
                "in_memory": entry is not None,
                "saved": status is not None and (entry is None or entry.saved),
                "nbytes": entry.state.nbytes if entry is not None else status.st_size if status is not None else 0,
            }

    def save_all(self) -> tuple[int, list[str]]:
        """Writes what is in memory alone; how many, and what went wrong. Without a folder nothing."""
        if self._folder is None:
            return 0, []
        count, problems = 0, []
        with self._lock:
            for name, entry in self._entries.items():
                if entry.saved:
                    continue
                try:
                    self._write(name, entry.state)
                    entry.saved = True
                    count += 1
                except (OSError, ApiError) as error:
                    problems.append(f"state {name}: {error}")
        return count, problems

    @property
    def num_unsaved(self) -> int:
        """States that end with the process."""
        with self._lock:
            return sum(not entry.saved for entry in self._entries.values())

    def _load(self, name: str, param: str) -> "State":
        from based import FormatError, State, StateError

        path = self._path(name, param=param)
        try:
            status = path.stat()  # first: a file that takes its place now is read again next time
            state = State.load(path, self._model)
        except FileNotFoundError:
            raise self._missing(name, param) from None
        except (StateError, FormatError) as error:
            raise ApiError(409, f"state {name!r}: {error}", param=param, code="wrong_state") from error
        self._entries.pop(name, None)
        self._entries[name] = _Entry(state, status.st_mtime, saved=True, stamp=_stamp(status))
        self._make_room()
        return state

    def _entry(self, name: str) -> _Entry | None:
        """What memory holds of this name, unless another process has changed it."""
        entry = self._entries.get(name)
        if entry is None or not self._shared:
            return entry
        with contextlib.suppress(ApiError, FileNotFoundError):
            if _stamp(self._path(name).stat()) == entry.stamp:
                return entry
        del self._entries[name]
        return None

    def _write(self, name: str, state: "State", *, is_new: bool = False) -> tuple[int, int] | None:
        path = self._path(name)
        if not path.exists() and len(files := self._files()) >= self._max_files:
            if not self._may_go:
                raise ApiError(
                    507,
                    f"the folder of states holds {self._max_files} files: delete some first",
                    code="too_many_states",
                )
            self._drop_first(files)
        try:
            if not self._shared:
                state.save(path)
                return None
            draft = path.with_name(f".{name}-{secrets.token_hex(6)}{_SUFFIX}")
            try:
                state.save(draft)
                stamp = _stamp(draft.stat())
                if is_new:
                    os.link(draft, path)  # of two processes that make the same name, one fails
                else:
                    draft.replace(path)
                return stamp
            finally:
                draft.unlink(missing_ok=True)
        except FileExistsError:
            raise self._taken(name) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ApiError(507, f"state {name!r}: {error.strerror}", code="no_space") from error
            raise

    def _drop_first(self, names: list[str]) -> None:
        """Deletes the file that was written first, if no other process has done so."""
        assert self._folder is not None
        written: dict[str, float] = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                written[name] = (self._folder / (name + _SUFFIX)).stat().st_mtime
        first = min(written, key=written.__getitem__)
        (self._folder / (first + _SUFFIX)).unlink(missing_ok=True)
        self._entries.pop(first, None)
        self.num_evicted += 1
        self._warn(f"state {first} is lost: there are {self._max_files} files, and no --state-dir to keep more in")

    def _make_room(self) -> None:
        """Lets the states go that were not used for the longest time; never the last one that came."""
        nbytes = sum(entry.state.nbytes for entry in self._entries.values())
        while len(self._entries) > 1 and (len(self._entries) > self._max_states or nbytes > self._max_bytes):
            name, entry = next(iter(self._entries.items()))
            if not entry.saved:
                try:
                    if self._folder is None:
                        raise OSError("there is no --state-dir to keep it in")
                    self._write(name, entry.state)
                except (OSError, ApiError) as error:
                    self.num_evicted += 1
                    self._warn(f"state {name} is lost for want of memory: {error}")
            del self._entries[name]
            nbytes -= entry.state.nbytes

    def _files(self) -> list[str]:
        if self._folder is None:
            return []
        names = (entry.name.removesuffix(_SUFFIX) for entry in os.scandir(self._folder) if entry.name.endswith(_SUFFIX))
        return [name for name in names if NAME.fullmatch(name)]

    def _exists(self, name: str) -> bool:
        return (name in self._entries and not self._shared) or (
            self._folder is not None and (self._folder / (name + _SUFFIX)).exists()
        )

    def _path(self, name: str, *, param: str = "id", must_exist: bool = False) -> Path:
        if self._folder is None:
            raise self._no_folder() if must_exist else self._missing(name, param)
        path = self._folder / (name + _SUFFIX)
        if must_exist and not path.exists():
            raise self._missing(name, param)
        return path

    def _taken(self, name: str) -> ApiError:
        return ApiError(409, f"there is a state {name!r} already: delete it first", param="to", code="name_taken")

    def _no_folder(self) -> ApiError:
        return ApiError(409, "this server keeps no files of states: start it with --state-dir", code="no_state_dir")

    def _missing(self, name: str, param: str) -> ApiError:
        return ApiError(404, f"there is no state {name!r}", param=param, code="state_not_found")
