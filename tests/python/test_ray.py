"""Prompts on a cluster of Ray: two workers of this machine."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GREEDY = {"max_tokens": 5, "temperature": 0}


def test_the_extra_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; import based.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "based[ray]"' in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def completer() -> Any:
    """In this process, without a cluster."""
    pytest.importorskip("ray.data", reason="the extra `ray` is missing")
    from based.ray import Completer

    return Completer(params=GREEDY, row_params="params", num_threads=1, device="cpu")


def expected(prompt: Any, **params: Any) -> str:
    return based.load(device="cpu", num_threads=1).generate([prompt], based.SamplingParams(**params))[0].outputs[0].text


def column(*values: Any) -> Any:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_rows_and_their_failures(completer: Any) -> None:
    prompts = column("def f(", [1, 2, 3], [1, -1], "import ", "x = ", "for ", 5)
    params = column(None, None, None, {"max_tokens": 2, "stop": None}, {"temperature": -1}, {"frequency": 1}, None)
    found = completer({"prompt": prompts, "params": params, "id": np.arange(7)})
    assert list(found["id"]) == list(range(7))
    assert found["completion"][0] == expected("def f(", **GREEDY)
    assert found["completion"][1] == expected([1, 2, 3], **GREEDY)
    assert [len(ids) for ids in found["token_ids"]] == [5, 5, 0, 2, 0, 0, 0]
    assert list(found["finish_reason"]) == ["length", "length", "error", "length", "error", "error", "error"]
    errors = found["error"]
    assert [error is None for error in errors] == [True, True, False, True, False, False, False]
    assert "-1" in errors[2] and "temperature" in errors[4] and "frequency" in errors[5] and "int" in errors[6]


def test_several_samples_of_a_row(completer: Any) -> None:
    two = type(completer)(params={"n": 2, "max_tokens": 5, "seed": 1}, row_params="params", num_threads=1, device="cpu")
    found = two({"prompt": column("def f(", "x", "y"), "params": column(None, {"temperature": -1}, {"n": 3})})
    assert [len(texts) for texts in found["completion"]] == [2, 2, 2] and len(found["token_ids"][0][1]) == 5
    assert [reasons[0] for reasons in found["finish_reason"]] == ["length", "error", "error"]
    assert "temperature" in found["error"][1] and "n is of all rows" in found["error"][2]


def test_a_batch_of_wrong_rows_and_an_empty_one(completer: Any) -> None:
    found = completer({"prompt": column([1 << 40]), "params": column(None)})
    assert list(found["finish_reason"]) == ["error"] and found["error"][0]
    assert len(completer({"prompt": column(), "params": column()})["completion"]) == 0
    with pytest.raises(ValueError, match="no column 'prompt'"):
        completer({"text": column("a")})
    with pytest.raises(ValueError, match=r"no column 'params' .* row_params="):
        completer({"prompt": column("a")})


MARKED = """
import os, sys, complete

class Marked(complete.Completer):
    def __call__(self, batch):
        found = super().__call__(batch)
        return found | {"process": [os.getpid()] * len(found["error"])}

complete.Completer = Marked
complete.main(*sys.argv[1:], batch_size=5)
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A temporary folder with a name so short that sockets in it have names of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield folder


def test_two_workers(tmp_path: Path, short_folder: str) -> None:
    """The example, on a cluster of its own: a row that is wrong has an error, all others are answered."""
    pytest.importorskip("ray.data", reason="the extra `ray` is missing")
    rows: list[dict[str, Any]] = [{"prompt": f"x{i} = "} for i in range(20)]
    rows[7]["params"] = {"max_tokens": 3}
    rows[9]["params"] = {"max_tokens": -3}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(Path(based.__file__).parents[1]), str(ROOT / "examples" / "ray"))),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": short_folder,
        "BASED_DEVICE": "cpu",
    }
    words = [sys.executable, "-c", MARKED, str(tmp_path / "in.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    by_prompt = {row["prompt"]: row for row in found}
    assert len(found) == 20 and set(by_prompt) == {row["prompt"] for row in rows}
    assert by_prompt["x3 = "]["completion"] == expected("x3 = ", max_tokens=32, temperature=0)
    assert len({row["process"] for row in found}) == 2
    assert by_prompt["x7 = "]["error"] is None, by_prompt["x7 = "]["error"]
    assert len(by_prompt["x7 = "]["token_ids"]) == 3
    assert by_prompt["x9 = "]["finish_reason"] == "error" and "max_tokens" in by_prompt["x9 = "]["error"]
    assert sum(row["error"] is not None for row in found) == 1
