"""The direction of the arrows in docs/architecture.md, held by reading the #include and import lines."""

import ast
import graphlib
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
    # DType, Activation and Isa are enums: nothing of those headers may be called (see the next test). What io/half.h
    # has is compiled into each kernel.
    "cpp/backend/cpu/kernels": {
        "backend/cpu/kernels",
        "backend/cpu/cpu_features.h",
        "based/config.h",
        "based/tensor.h",
        "io/half.h",
    },
    "cpp/backend/cpu": {"based", "backend", "io/half.h"},
    "cpp/backend": {"based", "backend", "io/convert_dtype.h"},
    "cuda": {
        "based",
        "kernels",
        "backend/backend.h",
        "backend/cuda.h",
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


def test_ray_is_imported_only_in_its_own_package() -> None:
    package = ROOT / "python" / "based"
    importers = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (ray|based\.ray)\b|^\s*from based import .*\bray\b", path.read_text(), re.M)
    }
    assert importers == {"ray"}


def test_nothing_ends_the_process_on_user_input() -> None:
    for folder in ("cpp", "bindings"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".h", ".cc"}:
                found = re.search(r"\b(std::)?(abort|exit|_exit|terminate)\s*\(|\bassert\s*\(", path.read_text())
                assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


def imports(package: Path) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports anywhere: at its top, in a function, for type checkers."""
    modules = {}
    for path in package.rglob("*.py*"):
        if path.suffix in {".py", ".pyi"}:
            parts = [package.name, *path.relative_to(package).with_suffix("").parts]
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}: a relative import"
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    found.add(name if name in modules else node.module)
        graph[module] = found & modules.keys() - {module}
    return graph


def test_python_modules_do_not_import_in_circles() -> None:
    graph = imports(ROOT / "python" / "based")
    assert "based._core" in graph["based._generate"] and "based" in graph["based.cli._common"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_circles_of_imports_are_found(tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from p import b\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import f\n")
    assert imports(package) == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.a"}}
