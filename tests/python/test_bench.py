"""`based bench`: its formats and figures; how fast anything is, tests/bench tells."""

import csv
import io
import json
import math
import subprocess
import sys
from typing import Any

import pytest
from based import Model, _core, sizes
from based.cli import bench

COMMAND = [sys.executable, "-m", "based.cli", "bench", "--size", "tiny"]
SMALL = ["-p", "16,8", "-n", "4", "-b", "1,3", "-d", "0,20", "-r", "2", "-t", "1"]
TESTS = [(test, batch, depth) for batch in (1, 3) for depth in (0, 20) for test in ("pp16", "pp8", "tg4")]


def run(*args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def check(result: dict[str, Any], bandwidth: bool) -> None:
    """The figures of one result fit each other."""
    count = int(result["test"][2:]) * result["batch"]
    seconds = result["seconds"]
    assert len(seconds) == result["repetitions"] == 2
    assert result["threads"] == 1
    speeds = [count / s for s in seconds]
    mean = sum(speeds) / 2
    assert result["tokens_per_second"] == pytest.approx(mean)
    assert result["tokens_per_second_sd"] == pytest.approx(abs(speeds[0] - speeds[1]) / math.sqrt(2))
    if result["test"].startswith("pp"):
        operations = bench.prefill_operations(sizes.named_config("tiny"), int(result["test"][2:])) * result["batch"]
        assert result["gflops"] == pytest.approx(operations * mean / count / 1e9)
        assert result["gbytes_per_second"] is None
    else:
        assert result["gflops"] is None
        weights = 2 * 1286528  # bfloat16; vectors are float32
        assert result["gbytes_per_second"] > weights * mean / count * 4 / 1e9
        assert (result["read_bandwidth"] is not None) is bandwidth
    if bandwidth and result["test"].startswith("tg"):
        assert 0.5 < result["read_bandwidth"] < 10000
        share = result["gbytes_per_second"] / result["read_bandwidth"]
        assert result["bandwidth_share"] == pytest.approx(share, rel=0.5)


def test_json() -> None:
    document = json.loads(run(*SMALL, "-o", "json", "--no-bandwidth").stdout)
    assert document["model"] == "tiny"
    assert document["dtype"] == "bfloat16"
    assert document["num_parameters"] == 1286528
    assert document["version"] == _core.build_info()["version"]
    assert document["cpu"]
    assert document["kernel_isa"]
    results = document["results"]
    assert [(r["test"], r["batch"], r["depth"]) for r in results] == TESTS
    for result in results:
        check(result, bandwidth=False)


def test_json_lines_with_bandwidth() -> None:
    lines = run(*SMALL[:-6], "-r", "2", "-t", "1", "-o", "jsonl").stdout.splitlines()
    results = [json.loads(line) for line in lines]
    assert [r["test"] for r in results] == ["pp16", "pp8", "tg4"] * 2
    for result in results:
        assert result["model"] == "tiny"
        check(result, bandwidth=True)


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(run(*SMALL, "-o", "csv", "--no-bandwidth").stdout)))
    assert [(r["test"], int(r["batch"]), int(r["depth"])) for r in rows] == TESTS
    for row in rows:
        result: dict[str, Any] = {
            name: None if value == "" else value if name == "test" else _number(value) for name, value in row.items()
        }
        result["seconds"] = [float(s) for s in row["seconds"].split()]
        check(result, bandwidth=False)


def _number(text: str) -> float | str:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text


def test_markdown() -> None:
    done = run(*SMALL, "--no-bandwidth", "--dtype", "float32", "--stats")
    header, empty, names, rule, *rows = done.stdout.splitlines()
    assert header.startswith(f"based {_core.build_info()['version']}")
    assert "tiny: 1.3 M parameters, " in header
    assert "float32" in header
    assert empty == ""
    columns = [cell.strip() for cell in names.strip("|").split("|")]
    assert columns == ["test", "batch", "depth", "threads", "tok/s", "GB/s", "of bandwidth", "GFLOP/s"]
    assert rule.count("---") == len(columns)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(c[0], int(c[1]), int(c[2])) for c in cells] == TESTS
    for row in cells:
        assert len(row) == len(columns)
        assert float(row[4].split(" ± ")[0]) > 0
    assert "decode of 4, batch 3, depth 20" in done.stderr


def test_zero_leaves_a_test_out() -> None:
    assert json.loads(run("-p", "0", "-n", "2", "-r", "1", "-o", "jsonl", "--no-bandwidth").stdout)["test"] == "tg2"
    record = json.loads(run("-p", "8", "-n", "0", "-r", "1", "-o", "jsonl", "--no-warmup").stdout)
    assert (record["test"], record["tokens_per_second_sd"]) == ("pp8", 0)


@pytest.mark.parametrize(
    ("fragment", "args"),
    [
        ("nothing to measure", ["-p", "0", "-n", "0"]),
        ("-1 is not ≥ 0", ["-p", "-1"]),
        ("0 is not ≥ 1", ["-b", "1,0"]),
        ("invalid list of integers value: '1,x'", ["-d", "1,x"]),
        ("0 is not ≥ 1", ["-r", "0"]),
        ("invalid choice: 'xml'", ["-o", "xml"]),
        ("not allowed with argument", ["-m", "x"]),
    ],
)
def test_usage_errors(fragment: str, args: list[str]) -> None:
    done = run(*args, status=2)
    assert fragment in done.stderr
    assert done.stdout == ""


def test_a_test_leaves_the_session_as_it_was() -> None:
    model = Model.random(sizes.named_config("tiny"))._core
    measured = bench.Bench(model, seed=0, repetitions=1, warm_up=True, bandwidth=False)
    session = measured.session(2, 20)
    assert session.num_tokens == [20, 20]
    measured.prefill(session, 20, 8)
    measured.decode(session, 20, 4)
    assert session.num_tokens == [20, 20]


def test_decoding_generates_as_many_tokens_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.random(sizes.named_config("tiny"))._core
    measured = bench.Bench(model, seed=0, repetitions=1, warm_up=False, bandwidth=False)
    session = measured.session(2, 3)
    generators = []
    make = measured._generator
    monkeypatch.setattr(measured, "_generator", lambda *a: generators.append(make(*a)) or generators[-1])
    monkeypatch.setattr(session.__class__, "rollback", lambda *_: None)
    measured.decode(session, 3, 5)
    assert session.num_tokens == [3 + 1 + 5] * 2  # its own first token, then one per step
    assert not generators[0].done()


def test_step_bytes() -> None:
    """Weights once; states once per sequence, windows only as far as they are filled."""
    model = Model.random(sizes.named_config("tiny"), dtype="float32")._core
    one, two = (bench.step_nbytes(model, batch, 100) for batch in (1, 2))
    assert two - one == sizes.state_nbytes(model.config, "float32")
    assert one == model.weight_nbytes + two - one
    assert bench.step_nbytes(model, 1, 100) - bench.step_nbytes(model, 1, 4) == 2 * 5 * 128 * 4
    assert bench.step_nbytes(model, 1, 100) == bench.step_nbytes(model, 1, 65536)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_read_bandwidth(threads: int | None) -> None:
    assert 0.5e9 < _core.measure_read_bandwidth(threads, 1 << 26) < 1e13


@pytest.mark.parametrize(
    ("threads", "nbytes", "fragment"),
    [(-1, 1 << 26, "num_threads is -1"), (1025, 1 << 26, "num_threads is 1025"), (1, 1 << 20, "nbytes is 1048576")],
)
def test_read_bandwidth_bad_arguments(threads: int, nbytes: int, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        _core.measure_read_bandwidth(threads, nbytes)
