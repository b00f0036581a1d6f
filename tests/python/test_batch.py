"""`based batch`: a file of prompts, answered line by line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import based
import pytest
from based import cli

COMMAND = [sys.executable, "-m", "based.cli", "batch", "--device", "cpu", "-t", "1"]


@pytest.fixture(scope="module")
def model() -> based.Model:
    return based.load(device="cpu", num_threads=1)


def run(source: Path | str, target: Path | str, *args: str, stdin: str | None = None, status: int = 0) -> str:
    """Runs the command, and returns what it wrote to stderr."""
    command = [*COMMAND, str(source), str(target), *args]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    return done.stderr


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[int, Any]:
    """By line; each line has one answer."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["line"] for row in rows}) == len(rows)
    return {row["line"]: row for row in rows}


def test_lines_of_both_kinds(tmp_path: Path, model: based.Model) -> None:
    prompts = ["Once", "The capital", "2 and"]
    body = {"model": "any", "prompt": prompts[1], "max_tokens": 5, "temperature": 0, "n": 2, "logprobs": 1}
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": prompts[0], "max_tokens": 6, "temperature": 0, "custom_id": "one"},
        {"custom_id": "two", "method": "POST", "url": "/v1/completions", "body": body},
        "",
        {"prompt": [prompts[0], prompts[2]], "max_tokens": 3, "temperature": 0, "echo": True},
        {"prompt": "x", "max_tokens": 0, "echo": True},
    )
    target = tmp_path / "out.jsonl"
    err = run(source, target, "--stats")
    assert "4 lines answered; 22 tokens generated" in err
    found = answers(target)
    assert set(found) == {1, 2, 4, 5}

    def greedy(prompt: str, count: int) -> str:
        (output,) = model.generate([prompt], based.SamplingParams(max_tokens=count, temperature=0))
        return output.outputs[0].text

    assert found[1]["custom_id"] == "one"
    assert found[1]["choices"][0]["text"] == greedy(prompts[0], 6)
    assert found[1]["usage"]["completion_tokens"] == 6
    second = found[2]
    assert (second["custom_id"], second["error"], second["response"]["status_code"]) == ("two", None, 200)
    choices = second["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == [greedy(prompts[1], 5)] * 2
    assert len(choices[0]["logprobs"]["tokens"]) == 5
    texts = [choice["text"] for choice in found[4]["choices"]]
    assert texts == [prompt + greedy(prompt, 3) for prompt in (prompts[0], prompts[2])]
    assert found[5]["choices"][0]["text"] == "x"


def test_a_wrong_line_is_a_failed_answer(tmp_path: Path) -> None:
    lines = [
        "{",
        "[1]",
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "what": 1},
        {"prompt": "a", "stream": True},
        {"prompt": "a", "state_id": "x"},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": {}},
        {"custom_id": "c", "url": "/v1/completions", "body": 3},
        {"prompt": [1 << 40]},
        {"prompt": "a", "max_tokens": 1},
    ]
    target = tmp_path / "out.jsonl"
    err = run(write(tmp_path / "in.jsonl", *lines), target, "--stats")
    assert "10 lines answered, 9 of them with an error; 1 tokens generated" in err
    found = answers(target)
    assert len(found) == 10
    params = [found[n]["error"]["param"] for n in (3, 4, 5, 6)]
    assert params == ["max_tokens", "what", "stream", "state_id"]
    assert "not valid JSON" in found[1]["error"]["message"]
    assert found[7]["response"]["status_code"] == 400
    assert found[7]["response"]["body"]["error"]["param"] == "url"
    assert found[7]["custom_id"] == "b"
    assert found[8]["response"]["body"]["error"]["param"] == "body"
    assert "error" in found[9]
    assert "choices" in found[10]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """After kill -9 at any moment no line is lost, and none is answered twice."""
    lines = [{"prompt": f"{index} is", "max_tokens": 12, "temperature": 0} for index in range(120)]
    source, target, whole = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    sizes = []
    for least in (1, 40):
        process = subprocess.Popen([*COMMAND, str(source), str(target), "--max-batch-size", "2"])
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < least):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(target.read_bytes().count(b"\n"))
    assert sizes[0] >= 1 and sizes[1] >= 40
    with target.open("ab") as file:
        file.write(b'{"line":7')  # of a write that was cut short
    cut = target.read_bytes()
    run(source, target, "-m", str(tmp_path / "no-model"), status=1)
    assert target.read_bytes() == cut  # nothing changes before there is an answer
    err = run(source, target, "--stats", "--max-batch-size", "2")
    assert f"({sizes[1]} were answered before)" in err
    assert "0 lines answered (120 were answered before)" in run(source, target, "--stats")
    run(source, whole, "--in-order")
    found, expected = answers(target), answers(whole)
    assert list(expected) == list(range(1, 121))
    assert {n: row["choices"] for n, row in found.items()} == {n: row["choices"] for n, row in expected.items()}


def test_in_order_and_in_shards(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "max_tokens": 1 + 17 * (index % 3 == 0), "ignore_eos": True} for index in range(21)]
    source = write(tmp_path / "in.jsonl", *lines)
    found = []
    for index in (1, 2, 3):
        target = tmp_path / f"out-{index}.jsonl"
        run(source, target, "--in-order", "--shard", f"{index}/3", "--max-batch-size", "3")
        rows = [json.loads(line)["line"] for line in target.read_text().splitlines()]
        assert rows == list(range(index, 22, 3))
        found += rows
    assert sorted(found) == list(range(1, 22))


def test_stdin(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    run("-", target, stdin='{"prompt": "a", "max_tokens": 1}\r\n{"prompt": "b", "max_tokens": 1}')
    assert set(answers(target)) == {1, 2}


@pytest.mark.parametrize(
    ("fragment", "before", "source", "status"),
    [
        ("line 1 is no answer of `based batch`", "hello\n", None, 1),
        ("line 1 is no answer of `based batch`", '{"line": 0, "checksum": "00"}\n', None, 1),
        ("line 1 is no answer of `based batch`", f'{{"line": 1, "checksum": "{1 << 64:x}"}}\n', None, 1),
        ("line 1 is no answer of `based batch`", "[" * 100_000 + "\n", None, 1),
        ("line 1 is no answer of `based batch`", '{"a": ' * 100_000 + "\n", None, 1),
        ("line 1 is no answer of `based batch`", "notes without an end", None, 1),
        ("line 1 is no answer of `based batch`", '{"prompt": "without an end"}', None, 1),
        ("line 2 is no answer of `based batch`", '{"line": 1, "checksum": "00000001"}\nhello\nno end', None, 1),
        ("has the answer to another line 1 than", '{"line": 1, "checksum": "00000001"}\n{"line', None, 1),
        ("are one file", '{"prompt": "without an end"}', "out.jsonl", 2),
        ("are one file", '{"line":1,"checksum":"0', "out.jsonl", 2),
        ("INPUT: it is empty", "notes", "", 2),
        ("has the answer to another line 1 than", '{"line": 1, "checksum": "00000001"}\n', None, 1),
        ("No such file", None, "missing.jsonl", 1),
        ("are one file", None, "out.jsonl", 2),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path,
    fragment: str,
    before: str | None,
    source: str | None,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text(before or "")
    given = write(tmp_path / "in.jsonl", {"prompt": "a"}) if source is None else source and tmp_path / source
    assert cli.main(["batch", str(given), str(target), "--device", "cpu"]) == status
    assert fragment in capsys.readouterr().err
    assert target.read_text() == (before or "")


def test_one_writer(tmp_path: Path) -> None:
    """A second run of the same output ends at once."""
    target = tmp_path / "out.jsonl"
    first = subprocess.Popen([*COMMAND, "-", str(target)], stdin=subprocess.PIPE)
    try:
        assert first.stdin is not None
        first.stdin.write(b'{"prompt": "a", "max_tokens": 1}\n')
        first.stdin.flush()
        while not (target.exists() and target.stat().st_size):
            assert first.poll() is None
            time.sleep(0.01)
        assert "another `based batch` is writing it" in run(os.devnull, target, status=1)
        first.stdin.close()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()


def test_a_byte_order_mark(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}\n')
    run(source, target)
    assert "choices" in answers(target)[1]
    assert "0 lines answered (1 were answered before)" in run(source, target, "--stats")


@pytest.mark.parametrize("before", ["", '{"line":1,"checksum":"0', '{"id":"batch_req_1","custom_id"'])
def test_a_first_line_that_was_cut_short(tmp_path: Path, before: str) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text(before)
    run(write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 1}), target)
    assert set(answers(target)) == {1}


def test_the_answers_on_stdin_too(tmp_path: Path) -> None:
    target = write(tmp_path / "one.jsonl", {"prompt": "a"})
    before = target.read_bytes()
    for output in (str(target), "-"):
        with target.open("rb") as source, target.open("ab") as sink:
            command = [*COMMAND, "-", output]
            done = subprocess.run(command, stdin=source, stdout=sink, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60)
        assert done.returncode == 2
        assert b"are one file" in done.stderr
    assert target.read_bytes() == before


def test_streams_are_written_and_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 1})
    for output in ("-", "/dev/stdout"):
        done = subprocess.run([*COMMAND, str(source), output], capture_output=True, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert {json.loads(line)["line"] for line in done.stdout.splitlines()} == {1, 2}
    assert list(tmp_path.iterdir()) == [source]
    run(source, "/dev/null")
    assert "No space left" in run(source, "/dev/full", status=1)

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([*COMMAND, str(source), str(pipe)]) as process:
        assert {json.loads(line)["line"] for line in pipe.read_text().splitlines()} == {1, 2}
        assert process.wait(60) == 0


def test_lines_of_a_file_that_have_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a file of zeros nor a long line is read whole."""
    source, target = write(tmp_path / "in.jsonl", {"prompt": "a", "max_tokens": 1}), tmp_path / "out.jsonl"
    with target.open("wb") as file:
        file.truncate(1 << 40)
    assert cli.main(["batch", str(source), str(target), "--device", "cpu"]) == 1
    assert "line 1 is no answer of `based batch`: expected" in capsys.readouterr().err
    assert target.stat().st_size == 1 << 40

    monkeypatch.setattr("based.cli.batch._LONGEST_ANSWER", 100)
    long = '{"line":1,"checksum":"00000001","text":"' + "x" * 100
    target.write_text(long)
    assert cli.main(["batch", str(source), str(target), "--device", "cpu"]) == 1
    assert "of at most 100 bytes" in capsys.readouterr().err
    assert target.read_text() == long

    target.write_text("")  # an answer that could not be read again is not written
    assert cli.main(["batch", str(source), str(target), "--device", "cpu", "-t", "1"]) == 0
    assert "expected at most 50" in answers(target)[1]["error"]["message"]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_shards_that_are_none(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["batch", "a", "b", "--shard", shard]) == 2
    assert "is no shard, expected 1/4" in capsys.readouterr().err
