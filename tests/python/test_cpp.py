"""Builds the C++ tests with plain CMake and runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_cpp() -> None:
    """`cmake && ctest`, as a user without Python would run it; `build/tests` is kept for the next run."""
    cmake = shutil.which("cmake")
    ctest = shutil.which("ctest")
    assert cmake and ctest, "cmake is not on PATH: pip install '.[test]' brings it"
    build = ROOT / "build" / "tests"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *ninja, f"-DPython_EXECUTABLE={sys.executable}"],
        [cmake, "--build", str(build), "-j", jobs],
        [ctest, "--test-dir", str(build), "--output-on-failure", "-j", jobs],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20000:]}\n{result.stderr[-5000:]}"
    assert "100% tests passed" in result.stdout, result.stdout[-2000:]
