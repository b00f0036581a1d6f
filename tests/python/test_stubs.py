"""The committed stub is what the built module says. `python tests/python/test_stubs.py` writes it anew."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def generate(directory: Path) -> Path:
    """Runs pybind11-stubgen on the installed module."""
    from based import _core
    from pybind11_stubgen import main

    for value in vars(_core).values():
        if isinstance(value, type):
            value.__module__ = "based._core"  # where the stub is, not where users find it
    main(["based._core", "--exit-code", "-o", str(directory)])
    return directory / "based" / "_core.pyi"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Pythons describe enums in other words")
def test_stub_is_current(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # away from the source tree
    assert result.returncode == 0, result.stderr
    committed = ROOT / "python" / "based" / "_core.pyi"
    assert (tmp_path / "based" / "_core.pyi").read_text() == committed.read_text()


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "python")
