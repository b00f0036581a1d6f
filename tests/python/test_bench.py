"""`based bench`: its formats and figures; how fast anything is, tests/bench tells."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from based import FormatError, Model, _core, cli, sizes
from based.cli import _claim, _plot, bench

GOLDEN = Path(__file__).parent.parent / "golden"

COMMAND = [sys.executable, "-m", "based.cli", "bench", "--device", "cpu", "--size", "tiny"]
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
        assert result["tflops"] == pytest.approx(operations * mean / count / 1e12)
        assert result["gbytes_per_second"] is None
    else:
        assert result["tflops"] is None
        weights = 2 * 1286528  # bfloat16; vectors are float32
        assert result["gbytes_per_second"] > weights * mean / count * 4 / 1e9
        assert (result["memory_bandwidth"] is not None) is bandwidth
    if bandwidth and result["test"].startswith("tg"):
        assert 0.5 < result["memory_bandwidth"] < 10000
        share = result["gbytes_per_second"] / result["memory_bandwidth"]
        assert result["bandwidth_share"] == pytest.approx(share, rel=0.5)


def test_json() -> None:
    document = json.loads(run(*SMALL, "-o", "json", "--no-bandwidth").stdout)
    assert document["model"] == "tiny"
    assert document["dtype"] == "bfloat16"
    assert document["num_parameters"] == 1286528
    assert document["version"] == _core.build_info()["version"]
    assert document["cpu"]
    assert document["kernel_isa"]
    assert document["device"] == "cpu"
    assert document["load_seconds"] is None  # nothing was read
    assert document["bandwidth_kind"] is None
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
        assert result["bandwidth_kind"] == "read"
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
    assert columns == ["test", "batch", "depth", "threads", "tok/s", "GB/s", "of bandwidth", "TFLOP/s"]
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
    model = Model.random(sizes.named_config("tiny"), device="cpu")._core
    measured = bench.Bench(model, seed=0, repetitions=1, warm_up=True, bandwidth=None)
    session = measured.session(2, 20)
    assert session.num_tokens == [20, 20]
    measured.prefill(session, 20, 8)
    measured.decode(session, 20, 4)
    assert session.num_tokens == [20, 20]


def test_decoding_generates_as_many_tokens_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.random(sizes.named_config("tiny"), device="cpu")._core
    measured = bench.Bench(model, seed=0, repetitions=1, warm_up=False, bandwidth=None)
    session = measured.session(2, 3)
    generators = []
    make = measured._generator
    monkeypatch.setattr(measured, "_generator", lambda *a: generators.append(make(*a)) or generators[-1])
    monkeypatch.setattr(session.__class__, "rollback", lambda *_: None)
    measured.decode(session, 3, 5)
    assert session.num_tokens == [3 + 1 + 3 + 5] * 2  # its own first token, three that are not timed, one per step
    assert not generators[0].done()


def test_step_bytes() -> None:
    """Weights once; states once per sequence and what changes of them twice, windows only as far as they are filled."""
    config = sizes.named_config("tiny")
    model = Model.random(config, device="cpu", dtype="float32")._core
    one, two = (bench.step_nbytes(model, batch, 100) for batch in (1, 2))
    linear = 2 * 4 * 153 * 33 * 4  # two layers of four heads
    conv, row = 4 * 2 * 256 * 4, 2 * 128 * 4
    assert two - one == 2 * (linear + conv) + 9 * row + row
    assert one == model.weight_nbytes + two - one
    assert bench.step_nbytes(model, 1, 100) - bench.step_nbytes(model, 1, 4) == 5 * row
    assert bench.step_nbytes(model, 1, 100) == bench.step_nbytes(model, 1, 65536)


def test_step_bytes_on_a_gpu() -> None:
    """Sums are written by one step in W, 0 … W - 1 tokens are read beside them; convolutions keep bfloat16."""
    tiny = sizes.named_config("tiny")
    model = SimpleNamespace(config=tiny, device="cuda:0", dtype="bfloat16", weight_nbytes=1000)
    one, two = (bench.step_nbytes(model, batch, 100) for batch in (1, 2))
    w = sizes.PENDING_TOKENS
    sums, token = 2 * 4 * 153 * 33 * 4, 2 * 4 * (16 + 32) * 2  # two layers of four heads
    steps = [sums + n * token + (sums if n == w - 1 else token) for n in range(w)]
    conv, row = 4 * 2 * 256 * 2, 2 * 128 * 2
    assert two - one == pytest.approx(sum(steps) / w + 2 * conv + 9 * row + row)
    assert one == pytest.approx(1000 + two - one)


def test_pending_tokens_are_those_of_the_kernels() -> None:
    header = Path(__file__).parents[2] / "cuda" / "kernels.h"
    assert f"constexpr int kPendingTokens = {sizes.PENDING_TOKENS};" in header.read_text()


def test_load_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "based.cli", "bench", "--device", "cpu", "-m", str(GOLDEN / "based-tiny")]
    options = ["-p", "4", "-n", "0", "-r", "1", "--no-bandwidth", "-o", "jsonl"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert 0 < json.loads(done.stdout)["load_seconds"] < 60


def test_bandwidth_of_a_gpu_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The share is left out, aloud."""
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    model = SimpleNamespace(device="cuda:0")
    assert bench.memory_bandwidth(model) is None
    assert "needs PyTorch with CUDA" in capsys.readouterr().err


RIVALS = {
    "decode": [
        {"rival": "transformer", "batch": 1, "context": 1024, "tokens_per_second": 338.0},
        {"rival": "transformer", "batch": 1, "context": 8192, "tokens_per_second": 274.0},
        {"rival": "transformer", "batch": 2, "context": 1024, "tokens_per_second": 600.0},
        {"rival": "upstream's arithmetic", "batch": 1, "context": None, "tokens_per_second": 335.0},
    ]
}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    rivals, target = tmp_path / "rivals.json", tmp_path / f"figure.{suffix}"
    rivals.write_text(json.dumps(RIVALS))
    done = run("-p", "0", *SMALL[2:], "--no-bandwidth", "-o", "json", "--plot", str(target), "--rivals", str(rivals))
    assert len(json.loads(done.stdout)["results"]) == 4
    data = target.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        for label in ("tiny, state", "transformer, KV cache", "upstream's arithmetic", "transformer, context 8,192"):
            assert f"<!-- {label} -->" in data.decode()


def test_plot_of_several_kinds_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each other, without a file of rivals."""
    pytest.importorskip("matplotlib")
    target = tmp_path / "figure.svg"
    shapes = {"tiny-attn": ("cA", 0), "tiny-mamba": ("S", 0)}
    for name, (layers, inner) in shapes.items():
        recipe = sizes.recipe(layers, 64, 4, inner, scan_state=4, vocab_size=100, end_token_id=None)
        monkeypatch.setitem(sizes.SIZES, name, lambda recipe=recipe: recipe)
    options = [
        "-p",
        "0",
        "-n",
        "3",
        "-b",
        "1,2",
        "-d",
        "0,9",
        "-r",
        "1",
        "-t",
        "1",
        "--no-bandwidth",
        "--device",
        "cpu",
    ]
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    names = ["tiny", *shapes]
    assert (
        cli.main(
            ["bench", "--device", "cpu", "--size", ",".join(names), *options, "-o", "jsonl", "--plot", str(target)]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [row["model"] for row in rows] == [name for name in names for _ in range(4)]
    figure = target.read_text()
    for name in names:
        assert figure.count(f"<!-- {name} -->") == 2  # of speed, and of time
        assert f"<!-- {name}, state -->" in figure


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--size", "tiny", "--plot", str(tmp_path / "figure.png")]) == 1
    assert 'pip install "based[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fragment", "args", "status"),
    [
        ("--rivals is drawn by --plot", ["--rivals", "x.json"], 2),
        ("is none of .png", ["--plot", "figure.bmp"], 2),
        ("--output json is of one model, --size lists 2", ["--size", "60m", "-o", "json"], 2),
        ("is not a directory", ["--plot", "missing/figure.png"], 1),
    ],
)
def test_plot_errors(fragment: str, args: list[str], status: int) -> None:
    done = run(*args, status=status)
    assert fragment in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("text", ["", "[]", '{"decode": 1}', '{"decode": [{"rival": "x"}]}'])
def test_damaged_rivals(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rivals.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"rivals\.json"):
        _plot.read_rivals(path)


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


# ---- --claim ---------------------------------------------------------------------------------------------------------


def claim(*args: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "based.cli", "bench", "--device", "cpu", "-r", "1", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def test_claim(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "claim.svg"
    shape = ["-b", "3", "-p", "9", "-n", "5"]
    document = json.loads(claim("--claim", "tiny,tiny", *shape, "-o", "json", "--plot", str(figure)).stdout)
    assert (document["prompt"], document["generated"]) == (9, 5)
    assert document["device"]
    assert len(document["results"]) == 2
    config = sizes.named_config("tiny")
    for result in document["results"]:
        assert (result["model"], result["runtime"], result["batch"]) == ("tiny", "based", 3)
        assert result["num_parameters"] == config.num_parameters
        assert result["state_nbytes"] >= sizes.state_nbytes(config, "bfloat16", 13)
        assert 10 < result["tokens_per_second"] < 1e7
        assert 10 < result["prompt_tokens_per_second"] < 1e7
    assert "prompts of 9" in figure.read_text()
    lines = claim("--claim", "tiny", *shape).stdout.splitlines()
    assert lines[0].endswith("5 tokens generated behind prompts of 9")
    assert lines[-1].startswith("| tiny | based | 3 | 1 M | ")


def generation(batch: int, speed: float) -> _claim.Generation:
    return _claim.Generation("tiny", "based", batch, 1, 1, None, speed)


@pytest.mark.parametrize(
    ("speeds", "asked", "best"),
    [
        ({}, [256], None),
        ({256: 150, 512: 151}, [256, 512], 512),  # the search ends where twice as many gain little
        ({256: 150, 512: 140, 1024: 999}, [256, 512], 256),
        ({256: 99, 512: 999}, [256], None),
        ({256: 150, 512: 200, 1024: 300, 2048: 400, 4096: 500}, [256, 512, 1024, 2048], 2048),
    ],
)
def test_claim_looks_for_the_fastest_batch(speeds: dict[int, float], asked: list[int], best: int | None) -> None:
    tried = []

    def measured(batch: int) -> _claim.Generation:
        tried.append(batch)
        if batch not in speeds:
            raise MemoryError
        return generation(batch, speeds[batch])

    found = _claim._fastest(measured, generation(128, 100))
    assert tried == asked
    assert [result.batch for result in found] == ([] if best is None else [best])


def test_claim_without_what_it_needs() -> None:
    message = claim("--claim", "tiny,huge", status=2).stderr
    assert "size is 'huge', expected one of tiny" in message
    for option in (["-d", "1"], ["--no-warmup"], ["--no-bandwidth"], ["--rivals", "x"]):
        assert "has no effect with --claim: leave it out" in claim("--claim", "tiny", *option, status=2).stderr
    assert "--claim writes md or json" in claim("--claim", "tiny", "-o", "csv", status=2).stderr
    assert "--batch lists 2 numbers, expected one" in claim("--claim", "tiny", "-b", "1,2", status=2).stderr
    assert "at least 2 generated tokens" in claim("--claim", "tiny", "-n", "1", status=2).stderr


def test_the_rival_is_a_transformer() -> None:
    """A step behind a prompt gives the token that the prompt with one more token gives."""
    torch = pytest.importorskip("torch")
    from based.torch import _rival

    torch.manual_seed(0)
    transformer = _rival.Transformer(_rival.Weights("cpu", torch.float64), _rival.Shape(20, 2, 2, 24, 50))
    with torch.inference_mode():
        tokens = torch.randint(50, (3, 7))
        caches: list[Any] = [None, None]

        def attend(i: int, q: Any, k: Any, v: Any) -> Any:
            if caches[i] is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(caches[i], (k, v), strict=True))
            caches[i] = (k, v)
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        expected = transformer._next(tokens, torch.arange(7), attend)
        caches[:] = [None, None]
        transformer._next(tokens[:, :6], torch.arange(6), attend)
        assert torch.equal(transformer._next(tokens[:, 6:], torch.tensor([6]), attend), expected)
        assert transformer.step(3, 5)().shape == transformer.prefill(3, 5)().shape == (3, 1)
        q, k, v = torch.randn(3, 2, 5, 2, 10, dtype=torch.float64)
        y = transformer._attention(q, transformer._padded(k), transformer._padded(v), True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(y, whole)
    assert transformer.cache_nbytes(3, 5) == 2 * 2 * 3 * 5 * (2 * 16) * 2  # heads of 10 numbers, kept as 16
