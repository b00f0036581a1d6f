"""What long runs share: signals that end them in good order, files replaced or removed, a folder of one's own."""

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from based._core import FormatError
from based.convert import sync


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Makes the folder, and holds it. Raises FormatError when another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormatError(f"{folder}: another process is training there") from None
        yield


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """A file to write text to, UTF-8 with newlines as they are, which takes the place of `path` when it is complete."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8", newline="") as file:
        yield file
    sync(new)
    os.replace(new, path)


def remove_files(folder: Path, is_own: Callable[[str], object]) -> bool:
    """Removes the files whose names are a run's own, then the folder, if that is empty now. Whether it is gone.

    A folder in it, and a file of another name, stay; so does a folder that is a symbolic link.
    """
    for path in folder.iterdir():
        if is_own(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    if folder.is_symlink() or any(folder.iterdir()):
        return False
    folder.rmdir()
    return True


class Signals:
    """Which of SIGINT and SIGTERM came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
