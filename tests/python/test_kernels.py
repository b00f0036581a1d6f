"""What makes training's Triton kernels give the same bits in every run, read from their source: it needs no GPU."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "based" / "torch"
KERNELS = {
    f"{path.stem}.{function.name}": function
    for path in sorted((PACKAGE / "kernels").glob("*.py"))
    for function in ast.parse(path.read_text()).body
    if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list)
}


def calls(function: ast.FunctionDef, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def aliases(function: ast.FunctionDef, seeds: set[str]) -> set[str]:
    """The names whose values are made of `seeds`, directly or through other names."""
    found = set(seeds)
    while True:
        more = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign) and names(node.value) & found:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                more |= set().union(*map(names, targets))
        if more <= found:
            return found
        found |= more


def hazards(function: ast.FunctionDef) -> list[str]:
    """Loads of a single number from memory to which the same program stores."""
    vectors = {
        name
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and "tl.arange" in ast.unparse(node.value)
        for target in node.targets
        for name in names(target)
    }
    stored = [call.args[0] for call in calls(function, "tl.store")]
    found = []
    for parameter in (argument.arg for argument in function.args.args if argument.arg.endswith("_ptr")):
        pointers = aliases_of_pointer(function, parameter)
        if not any(names(address) & pointers for address in stored):
            continue
        for load in calls(function, "tl.load"):
            address = load.args[0]
            if names(address) & pointers and not names(address) & aliases(function, vectors):
                found.append(ast.unparse(load))
    return found


def aliases_of_pointer(function: ast.FunctionDef, parameter: str) -> set[str]:
    """The names that point where `parameter` does: sums that begin with it."""
    found = {parameter}
    while True:
        more = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and leftmost(node.value) in found:
                more |= set().union(*map(names, node.targets))
        if more <= found:
            return found
        found |= more


def leftmost(node: ast.AST) -> str | None:
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        node = node.left
    return node.id if isinstance(node, ast.Name) else None


def test_there_are_kernels() -> None:
    assert {"loss._cross_entropy", "gates._conv", "taylor._sums"} <= KERNELS.keys()


@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_reads_a_number_that_another_of_its_threads_may_have_replaced(name: str) -> None:
    """Every thread of a program loads a single number, and Triton puts no barrier between that and another's store.

    Blocks of numbers are loaded and stored by the same threads.
    """
    assert not hazards(KERNELS[name])


def test_the_check_finds_such_a_kernel() -> None:
    source = """
def kernel(x_ptr, y_ptr, BLOCK):
    x_ptr += tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = 3 + column
    x = tl.load(x_ptr + at)
    first = tl.load(x_ptr + 7)
    other = tl.load(y_ptr + 7)
    tl.store(x_ptr + at, x * first + other)
"""
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert hazards(function) == ["tl.load(x_ptr + 7)"]


def test_no_kernel_is_chosen_by_timing() -> None:
    """Another choice, another order of sums."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"autotune|do_bench|cudnn\.benchmark", path.read_text()), path


def test_no_kernel_adds_atomically() -> None:
    """Atomic additions come in any order."""
    for name, function in KERNELS.items():
        assert "tl.atomic" not in ast.unparse(function), name
