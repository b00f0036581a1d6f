"""Files that a clone without Git LFS has in the place of large ones."""

from pathlib import Path

from based._core import FormatError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(data: bytes, path: Path) -> None:
    """Raises FormatError when a file that begins with `data` is a pointer. The core does the same (io/text.h)."""
    if data.startswith(_START):
        raise FormatError(
            f"{path}: found a Git LFS pointer, expected the file that it stands for: "
            "run `git lfs pull` in its repository, or download the file"
        )
