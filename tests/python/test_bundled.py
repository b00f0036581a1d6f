"""The model that comes with the package: its files, what its card says of it, and `based demo`."""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import based
import numpy as np
import pytest
from based.cli import inspect
from based.models import pairs

HELD_OUT = Path(__file__).parents[1] / "held-out"
FILES = [HELD_OUT / "Lib" / "textwrap.py", HELD_OUT / "Doc" / "heapq.rst"]
DIRECTORY = Path(based.__file__).parent / "models" / "based-bytes"
COMMAND = [sys.executable, "-m", "based.cli"]


@pytest.fixture(scope="module")
def model() -> based.Model:
    return based.load(dtype="float32")


def ok(*args: object, **options: object) -> str:
    """stdout of `based ARGS`, which must succeed, silently."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", **options
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# ---- the package -----------------------------------------------------------------------------------------------------


def test_the_package_has_the_model_and_its_papers() -> None:
    files = importlib.metadata.files("based")
    assert files is not None
    ours = {path.name: path.size for path in files if path.parent.name == "based-bytes"}
    assert ours.keys() == {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"}
    assert sum(size or 0 for size in ours.values()) <= 20_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DIRECTORY / "LICENSE").read_text()


def test_the_package_has_its_licence() -> None:
    metadata = importlib.metadata.metadata("based")
    assert metadata["License-Expression"] == "Apache-2.0 AND PSF-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "python/based/models/based-bytes/LICENSE"]
    files = importlib.metadata.files("based") or []
    licence = next(path.read_text() for path in files if path.match("licenses/LICENSE"))
    assert "Apache License" in licence and "Copyright 2026 The based authors" in licence


def test_its_shape() -> None:
    config, dtype, _ = inspect.read_directory(DIRECTORY)
    assert dtype == "bfloat16"
    assert 1e6 <= config.num_parameters <= 10e6
    assert (config.vocab_size, config.eos_token_id) == (257, 256)


def test_its_name_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: based.Model) -> None:
    """What a command does must not depend on where it is given."""
    monkeypatch.chdir(tmp_path)
    Path("based-bytes").mkdir()
    assert based.load("based-bytes", dtype="float32").fingerprint == model.fingerprint
    for here in (Path("based-bytes"), "./based-bytes"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            based.load(here)
    with pytest.raises(ValueError, match="revision"):
        based.load(revision="main")


def test_commands_without_a_model() -> None:
    prompt = "def fibonacci("
    expected = based.load().generate(prompt, based.SamplingParams(max_tokens=40, temperature=0))[0].outputs[0].text
    assert ok("generate", "--temperature", 0, "--max-tokens", 40, prompt) == expected + "\n"
    assert ok("tokenize", "añ") == "97 195 177\n"
    assert "257 tokens" in ok("inspect", "based-bytes")


# ---- what it can -----------------------------------------------------------------------------------------------------


def test_it_recalls_pairs_that_nobody_has_seen() -> None:
    assert pairs.accuracy(based.load(), 32, 1024, seed=20_000_001) >= 0.95


def test_it_reads_python() -> None:
    """Bits per byte of files it has not seen; the card has more of them."""
    model = based.load()
    bits, count = 0.0, 0
    for path in FILES:
        ids = np.array([256, *path.read_bytes()])
        bits -= float(model.score(ids).sum(dtype=np.float64)) / math.log(2)
        count += len(ids) - 1
    assert bits / count <= 1.3


def test_bits_per_byte_are_those_of_torch(model: based.Model) -> None:
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM

    reference = BasedForCausalLM.load("based-bytes", device="cpu")
    for path in FILES:
        ids = np.array([256, *path.read_bytes()[:2500]])
        with torch.no_grad():
            expected = float(reference(torch.from_numpy(ids)[None], labels=torch.from_numpy(ids)[None]))
        found = -float(model.score(ids).mean(dtype=np.float64))
        assert abs(found - expected) / math.log(2) <= 1e-3


def test_greedy_tokens_are_those_of_torch(model: based.Model) -> None:
    """Each of 256 tokens is torch's likeliest after those before it: torch would have chosen the same."""
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM

    reference = BasedForCausalLM.load("based-bytes", device="cpu")
    for prompt in ("def fibonacci(", pairs.statement(pairs.random_pairs(random.Random(1), 32))):
        params = based.SamplingParams(max_tokens=256, temperature=0, ignore_eos=True)
        output = model.generate(prompt, params)[0]
        chosen = output.outputs[0].token_ids
        ids = torch.tensor([[*output.prompt_token_ids, *chosen[:-1]]])
        with torch.no_grad():
            logits = reference(ids)[0, -256:, :257]
        assert logits.argmax(-1).tolist() == list(chosen)


# ---- documents of pairs ----------------------------------------------------------------------------------------------


def test_documents_ask_for_what_they_said() -> None:
    texts = list(pairs.documents(1000, 5))
    counts = []
    for text in texts:
        told, asked = text.removeprefix(pairs.REMEMBER).split(pairs.RECALL)
        said = dict(line.split("=") for line in told.splitlines())
        counts.append(len(said))
        assert len(said) == told.count("\n") and text.endswith("\n")
        assert all(re.fullmatch(r"[a-z]+", key) and re.fullmatch(r"\d+", value) for key, value in said.items())
        assert len({len(value) for value in said.values()}) == 1
        questions = [line.split("=") for line in asked.splitlines()]
        assert all(said[key] == value for key, value in questions)
        assert {key for key, _ in questions} == said.keys()
    assert min(counts) == 1 and 32 < max(counts) <= 64 and counts.count(2) > 2 * counts.count(8)
    assert len({text.splitlines()[1] for text in texts}) > 990


def test_documents_are_the_same_everywhere() -> None:
    """Of one seed, on every machine: the bundled model can be made again."""
    texts = list(pairs.documents(20, 0))
    assert texts == list(pairs.documents(20, 0)) != list(pairs.documents(20, 1))
    done = subprocess.run(
        [sys.executable, "-m", "based.models.pairs", "20"], capture_output=True, text=True, check=True
    )
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == texts


@pytest.mark.parametrize("args", [["0"], ["-3"], ["many"]], ids=" ".join)
def test_documents_that_there_are_not(args: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "based.models.pairs", *args], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "error: " in done.stderr


def test_numbers_of_pairs_and_questions(model: based.Model) -> None:
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"{count} pairs, expected 1 to 1000"):
            pairs.random_pairs(random.Random(), count)
    with pytest.raises(ValueError, match="0 questions"):
        pairs.accuracy(model, 4, 0, seed=1)


def test_accuracy_counts_whole_values(model: based.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two questions one answered right, one nearly: a half."""
    told = dict(pairs.random_pairs(random.Random(3), 2))
    first = next(iter(told))
    answers = [value if key == first else value + "0" for key, value in told.items()]
    monkeypatch.setattr(pairs, "ask", lambda session, keys: answers)
    assert pairs.accuracy(model, 2, 1, seed=3) == 0.5


# ---- based demo ------------------------------------------------------------------------------------------------------

QUICK = ["--pairs", "8", "--max-tokens", "24"]


def test_demo() -> None:
    first = ok("demo", *QUICK, "--seed", "1", "class Stack")
    titles = re.findall(r"^== (.*)", first, re.M)
    assert [title.split()[0] for title in titles] == ["A", "Recall", "The", "The", "What"]
    completion = first.split("== ")[1]
    assert "\n\nclass Stack" in completion and "\n24 tokens, " in completion
    recall = first.split("== ")[2]
    told, asked = (re.findall(r"(\w+)=(\d+)", part) for part in recall.split("Now each is asked for"))
    right = int(re.search(r"(\d+) of 8 right", recall)[1])  # type: ignore[index]
    assert right == recall.count("✓") == len(set(told) & set(asked)) >= 7
    assert recall.count("✗") == 8 - right
    assert "This process says the same." in first
    assert len(re.findall(r"^class Queue:", first, re.M)) == 3
    assert re.search(r"^ +16,384 +[\d,]+ +[\d.]+ kB +184\.5 MB$", first, re.M)
    assert "\x1b" not in first
    again = ok("demo", *QUICK, "--seed", "1", "class Stack")
    before_costs = [re.sub(r"[\d,]+ a second", "", text).split("== What")[0] for text in (first, again)]
    assert before_costs[0] == before_costs[1]


def test_demo_of_another_model(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "based-tiny"
    text = ok("demo", "-m", golden, "--dtype", "float32", "-t", 1, *QUICK)
    assert f"{golden}: 1.3 M parameters, float32, on cpu, 1 thread\n" in text
    assert "0 of 8 right" in text and "This process says the same." in text


@pytest.mark.parametrize(
    ("status", "fragment", "args"),
    [
        (2, "0 is not in [1, 1000]", ["--pairs", "0"]),
        (2, "1001 is not in [1, 1000]", ["--pairs", "1001"]),
        (2, "0 is not ≥ 1", ["--max-tokens", "0"]),
        (2, "unrecognized arguments", ["--temperature", "0"]),
        (1, "has no tokenizer", ["-m", str(Path(__file__).parents[1] / "golden" / "based-tiny-bf16")]),
        (1, "nowhere", ["-m", "nowhere"]),
    ],
)
def test_demo_of_what_cannot_be_shown(status: int, fragment: str, args: list[str]) -> None:
    done = subprocess.run([*COMMAND, "demo", *args], capture_output=True, encoding="utf-8")
    assert done.returncode == status and fragment in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_demo_fits_the_terminal(columns: int) -> None:
    """As many pairs a line as fit, and no sentence of ours that wraps at 80 columns."""
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen([*COMMAND, "demo", *QUICK], stdin=its_end, stdout=its_end, env=environment) as process:
        os.close(its_end)
        shown = b""
        with contextlib.suppress(OSError):  # what reading gives when the other end is closed
            while chunk := os.read(terminal, 10000):
                shown += chunk
    os.close(terminal)
    assert process.returncode == 0
    sections = re.sub(r"\x1b\[\d+m", "", shown.decode()).replace("\r\n", "\n").split("== ")
    pairs_told = re.findall(r"^\w+=\d+.*$", sections[2], re.M)
    assert len(pairs_told[0]) <= columns and pairs_told[0].count("=") == min(8, (columns + 2) // 10)
    lines = [line for i in (2, 3, 5) for line in sections[i].splitlines()]
    assert max(map(len, lines)) <= max(columns, 80)


@pytest.fixture
def demo_at_a_terminal() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    terminal, its_end = pty.openpty()
    process = subprocess.Popen([*COMMAND, "demo", "--max-tokens", "1000000"], stdin=its_end, stdout=its_end)
    os.close(its_end)
    yield process, terminal
    process.kill()
    process.wait()
    os.close(terminal)


def test_demo_at_a_terminal_is_interrupted(demo_at_a_terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, terminal = demo_at_a_terminal
    shown = b""
    while b"== A completion" not in shown:
        shown += os.read(terminal, 100)
    assert b"\x1b[1m== A completion\x1b[0m" in shown
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    with contextlib.suppress(OSError):  # what reading gives when the other end is closed
        while os.read(terminal, 10000):
            pass
    assert process.wait(timeout=10) == 130
    assert time.monotonic() - asked < 5
