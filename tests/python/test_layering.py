"""The direction of the arrows in docs/architecture.md, held by reading the #include and import lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Folder → the folders whose headers it may include besides its own.
MAY_INCLUDE = {
    "cpp/include/based": {"based"},
    "cpp/include/based/mixers": {"based/mixers"},
    "cpp/io": {"based", "io"},
    "cpp/model": {"based", "io", "model", "backend/backend.h"},
    "cpp/session": {"based", "io", "model", "session", "backend/backend.h"},
    # DType, Activation and Isa are enums: nothing of those headers may be called (see the next test).
    "cpp/backend/cpu/kernels": {
        "backend/cpu/kernels",
        "backend/cpu/cpu_features.h",
        "based/config.h",
        "based/tensor.h",
    },
    "cpp/backend/cpu": {"based", "backend"},
    "cpp/backend": {"based", "backend", "io/convert_dtype.h"},
    "cuda": {
        "based",
        "kernels",
        "backend/backend.h",
        "backend/cuda_ops.h",
        "backend/state_layout.h",
        "io/convert_dtype.h",
    },
    "cuda/kernels": {"kernels", "kernels.h", "cuda_error.h", "based/config.h", "based/sampling.h"},
    "bindings": {"based", "bindings", "io", "backend/cpu/bandwidth.h"},
}


def sources(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).glob("*") if p.suffix in {".h", ".cc", ".cuh", ".cu"}]


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_includes_point_one_way(folder: str) -> None:
    files = sources(folder)
    assert files, f"{folder} has no sources"
    wrong = []
    for path in files:
        for target in re.findall(r'#include "([^"]+)"', path.read_text()):
            same_folder = "/" not in target and (path.parent / target).exists()
            if not same_folder and not any(target == m or target.startswith(m + "/") for m in MAY_INCLUDE[folder]):
                wrong.append(f"{path.relative_to(ROOT)} includes {target}")
    assert not wrong, "\n".join(wrong)


def test_kernels_use_no_standard_library() -> None:
    """Inline functions compiled for AVX-512 must not leak into code that other machines run (simd.h)."""
    allowed = {"cstddef", "cstdint", "immintrin.h", "arm_neon.h", "math.h"}
    for path in sources("cpp/backend/cpu/kernels"):
        for header in re.findall(r"#include <([^>]+)>", path.read_text()):
            assert header in allowed, f"{path.relative_to(ROOT)} includes <{header}>"


def test_no_third_party_types_in_public_headers() -> None:
    for path in [*sources("cpp/include/based"), *sources("cpp/include/based/mixers")]:
        for header in re.findall(r"#include <([^>]+)>", path.read_text()):
            assert "/" not in header and "." not in header, f"{path.name} includes <{header}>"


def test_the_core_knows_no_device_api() -> None:
    for path in (ROOT / "cpp").rglob("*"):
        if path.suffix in {".h", ".cc"}:
            assert not re.search(r"#include [<\"](cuda|nccl|torch|ATen)", path.read_text()), path


def test_torch_is_imported_only_for_training() -> None:
    package = ROOT / "python" / "based"
    importers = set()
    for path in package.rglob("*.py"):
        if re.search(
            r"^\s*(import|from) (torch|based\.torch)\b|^\s*from based import .*\btorch\b", path.read_text(), re.M
        ):
            importers.add(path.relative_to(package).parts[0])
    assert importers == {"torch"}


def test_nothing_ends_the_process_on_user_input() -> None:
    for folder in ("cpp", "bindings"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".h", ".cc"}:
                found = re.search(r"\b(std::)?(abort|exit|_exit|terminate)\s*\(|\bassert\s*\(", path.read_text())
                assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"
