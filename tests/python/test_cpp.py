"""Builds the C++ tests with plain CMake and runs them; what CMake says where something is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def configure(build: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Exit status and all words of `cmake -B BUILD` with Makefiles, CMake's default generator."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not on PATH: pip install '.[test]' brings it"
    command = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Unix Makefiles", *options]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    done = subprocess.run([*command, python], capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_makefiles_and_what_is_said_about_cuda(tmp_path: Path) -> None:
    status, text = configure(tmp_path, "-DBASED_BUILD_TESTS=OFF")
    assert status == 0, text
    assert re.search(r"based: (no CUDA code: there is no|no CUDA code: .* is needed|CUDA [\d.]+ code for) ", text), text


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("package", "name"), [("nlohmann_json", "nlohmann-json"), ("GTest", "GoogleTest")])
def test_without_network_a_line_says_what_to_install(tmp_path: Path, package: str, name: str) -> None:
    """Where neither apt nor pip brought a package and no host can be reached."""
    nowhere = "http://127.0.0.1:9"
    options = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{package}=ON", "-DBASED_CUDA=OFF"]
    modules = tmp_path / "modules"  # wheels of these names without their files, before those that are installed
    (modules / "nlohmann_json").mkdir(parents=True)
    (modules / "ros_gtest_vendor-0.dist-info").mkdir()
    if package == "nlohmann_json":
        (modules / "nlohmann_json" / "__init__.py").touch()
    else:
        (modules / "nlohmann_json").rmdir()
        (modules / "ros_gtest_vendor-0.dist-info" / "METADATA").write_text("Name: ros-gtest-vendor\nVersion: 0\n")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), nowhere)
    status, text = configure(tmp_path / "build", *options, PYTHONPATH=str(modules), no_proxy="", **proxies)
    assert status != 0
    assert f"{name} is not installed" in text
    assert "apt install nlohmann-json3-dev libgtest-dev, or pip install nlohmann-json ros-gtest-vendor" in text
