"""The command line as a user meets it: through a process of its own, on the golden model."""

import codecs
import contextlib
import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import cli, sizes
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "based-tiny"
COMMAND = [sys.executable, "-m", "based.cli"]
GREEDY = ["--temperature", "0"]
MAX_TOKENS = 256  # unless --max-tokens says otherwise


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in our format, with its tokenizer."""
    directory = tmp_path_factory.mktemp("cli") / "based-tiny"
    done = based_cli("convert", GOLDEN, directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="session")
def model(model_directory: Path) -> based.Model:
    return based.load(model_directory)


@pytest.fixture(scope="session")
def without_tokenizer(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "no-tokenizer"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((model_directory / name).read_bytes())
    return directory


def based_cli(*args: object, stdin: bytes | str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `based ARGS` with stdin from a pipe, or from nowhere."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    given: dict[str, Any] = {"input": data} if data is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, **given, **options)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def ok(*args: object, stdin: bytes | str | None = None, **options: Any) -> str:
    """stdout of a run that must succeed, silently."""
    done = based_cli(*args, stdin=stdin, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fails(status: int, fragment: str, *args: object, stdin: bytes | str | None = None) -> None:
    """Must exit with `status`, nothing on stdout, and one line of error that holds `fragment`."""
    done = based_cli(*args, stdin=stdin)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("based") and "error: " in last and fragment in last
    assert "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.strip().splitlines()) == 1


def objects(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# ---- the whole program -----------------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    for name in cli.COMMANDS:
        assert name in ok("--help")
    assert ok("--version") == f"based {based.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "based", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"based {based.__version__}\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(command: str) -> None:
    assert f"based {command}" in ok(command, "--help")


def test_help_of_the_program_imports_no_command() -> None:
    """`based --help` is to be instant."""
    code = "import sys, based.cli; based.cli.main(['--help']); print([m for m in sys.modules if 'based.cli.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("fragment", "args"),
    [
        ("required: COMMAND", []),
        ("invalid choice: 'dance'", ["dance"]),
        ("unrecognized arguments: --nonsense", ["generate", "-m", "x", "--nonsense"]),
        ("unrecognized arguments: --temp", ["generate", "-m", "x", "--temp", "0"]),
        ("required: SRC, DST", ["convert"]),
        ("FILE: it is empty", ["perplexity", ""]),
        ("--device: it is empty", ["perplexity", "x", "--device", ""]),
        ("--device: it is empty", ["bench", "--size", "tiny", "--device", ""]),
        ("--device: it is empty", ["recall", "-o", "x", "--device", ""]),
        ("-t/--threads: 1025 is outside its domain, expected 1 … 1024", ["bench", "--size", "tiny", "-t", "1,1025"]),
        ("--model: it is empty", ["bench", "-m", ""]),
        ("it is empty", ["inspect", ""]),
    ],
)
def test_usage_errors(fragment: str, args: list[str]) -> None:
    fails(2, fragment, *args)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["bench", "--size", "tiny", "--size", "60m"], {"size": ["tiny", "60m"], "batch": None}),
        (["bench", "--claim", "tiny", "--claim", "60m"], {"claim": ["tiny", "60m"]}),
        (["bench", "-m", "x", "-b", "1", "-b", "2,3", "-p", "4", "-p", "5"], {"batch": [1, 2, 3], "prompt": [4, 5]}),
        (["bench", "-m", "x", "-t", "1", "-t", "2", "-d", "0", "-d", "9"], {"threads": [1, 2], "depth": [0, 9]}),
        (["bench", "serve", "--goodput", "ttft:1", "--goodput", "tpot:2"], {"goodput": [("ttft", 1), ("tpot", 2)]}),
        (["eval", "--tasks", "a", "--tasks", "b,c"], {"tasks": ["a", "b", "c"]}),
        (["recall", "-o", "x", "--widths", "8", "--widths", "16,32"], {"widths": [8, 16, 32], "windows": None}),
        (["recall", "-o", "x", "--merge", "a", "--merge", "b", "c"], {"merge": [Path("a"), Path("b"), Path("c")]}),
    ],
)
def test_a_list_that_is_given_in_parts(args: list[str], expected: dict[str, Any]) -> None:
    found = vars(cli._make_parser().parse_args(args))
    assert {name: found[name] for name in expected} == expected


def test_a_failure_shows_its_traceback_with_debug(tmp_path: Path) -> None:
    done = based_cli("generate", "-m", tmp_path, "--debug", "x")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("based: error: ")


@pytest.mark.parametrize("command", ["generate", "inspect", "tokenize"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path) -> None:
    where = tmp_path / "absent"
    args = [command, str(where)] if command == "inspect" else [command, "-m", str(where), "text"]
    fails(1, str(where), *args)


# ---- generate: text in and out ---------------------------------------------------------------------------------------


def expected_text(model: based.Model, prompt: str, **params: Any) -> str:
    params = {"max_tokens": MAX_TOKENS} | params
    return model.generate(prompt, based.SamplingParams(temperature=0, **params))[0].outputs[0].text


def test_generate_matches_the_library(model: based.Model, model_directory: Path) -> None:
    text = ok("generate", "-m", model_directory, *GREEDY, "--max-tokens", 24, "Hello")
    assert text == expected_text(model, "Hello", max_tokens=24) + "\n"


def test_a_published_directory_is_converted_by_itself(model: based.Model, tmp_path: Path) -> None:
    environment = os.environ | {"BASED_CACHE": str(tmp_path)}
    text = ok("generate", "-m", GOLDEN, *GREEDY, "Hello", env=environment)
    assert text == expected_text(model, "Hello") + "\n"
    assert list(tmp_path.glob("based-tiny-*/model.safetensors"))


def test_prompt_from_argument_file_and_stdin(model_directory: Path, tmp_path: Path) -> None:
    prompt = "Grüße, 世界 🙂\nline two"
    file = tmp_path / "prompt.txt"
    file.write_text(prompt + "\n", encoding="utf-8")
    run = ["generate", "-m", model_directory, *GREEDY, "--json"]
    outputs = {ok(*run, prompt), ok(*run, "--file", file), ok(*run, stdin=prompt + "\n"), ok(*run, stdin=prompt)}
    outputs.add(ok(*run, "-f", "-", stdin=prompt + "\n"))
    assert len(outputs) == 1
    assert json.loads(outputs.pop())["num_prompt_tokens"] == len(prompt.encode())


def test_a_stream_without_an_end(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read up to a limit, and before the model is loaded."""
    length = len("Hello")
    code = "import sys; from based.cli import _common, main; _common._LONGEST_STREAM = 5; sys.exit(main(sys.argv[1:]))"
    for text, status in (("Hello", 0), ("Hello!", 1)):
        run = ["generate", "-m", str(model_directory), "--max-tokens", "1", "-f", "-"]
        done = subprocess.run([sys.executable, "-c", code, *run], input=text, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert (f"stdin is no regular file and has more than {length} bytes" in done.stderr) is (status == 1)

    monkeypatch.setattr("based.cli._common._LONGEST_STREAM", 5 << 20)
    for args in (["perplexity", "/dev/zero"], ["generate", "-f", "/dev/zero"], ["tokenize", "-f", "/dev/zero"]):
        assert cli.main([*args, "-m", "no-such-model"]) == 1
        expected = f"/dev/zero is no regular file and has more than {5 << 20} bytes: write the text into a file"
        assert expected in capsys.readouterr().err


def test_a_file_that_memory_does_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 36)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 35, 1 << 35)); "
        "from based.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "perplexity", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"based: error: {file}: the text is longer than memory holds\n"


def test_only_one_newline_at_the_end_is_dropped(model_directory: Path) -> None:
    run = ["generate", "-m", model_directory, "--json"]
    for text, expected in (("ab\n\n", 3), ("ab\r\n", 2), ("\nab", 3), ("ab ", 3)):
        assert json.loads(ok(*run, stdin=text))["num_prompt_tokens"] == expected


@pytest.mark.parametrize(
    ("status", "fragment", "args", "stdin"),
    [
        (2, "not both", ["--file", "x", "prompt"], None),
        (1, "no-such-file: No such file", ["--file", "no-such-file"], None),
        (1, "stdin: byte 2 is not UTF-8", [], b"ab\xff"),
        (1, "empty", [""], None),
        (1, "empty", [], b""),
        (2, "integers", ["--token-ids", "1 two 3"], None),
        (1, "258", ["--token-ids", "1 258"], None),
        (1, "-1", ["--token-ids", "--", "-1"], None),
        (2, "temperature", ["--temperature", "-1", "x"], None),
        (2, "temperature", ["--temperature", "nan", "x"], None),
        (2, "invalid float value", ["--top-p", "high", "x"], None),
        (2, "--top-p", ["--top-p", "1.5", "x"], None),
        (2, "-n: 0 is outside its domain, expected 1 … 16384", ["-n", "0", "x"], None),
        (2, "-n: 100000000000 is outside its domain, expected 1 … 16384", ["-n", "100000000000", "x"], None),
        (2, "--logprobs: 100000000000 is outside", ["--json", "--logprobs", "100000000000", "x"], None),
        (2, "--logprobs: -1 is outside its domain, expected 0 …", ["--json", "--logprobs", "-1", "x"], None),
        (2, "--max-tokens", ["--max-tokens", "0", "x"], None),
        (2, "--min-tokens", ["--min-tokens", "999", "x"], None),
        (2, "'many' is neither an integer nor none", ["--max-tokens", "many", "x"], None),
        (2, "is no escape", ["-e", "a\\q"], None),
        (2, "is no escape", ["-e", "--stop", "a\\", "x"], None),
        (2, "half of a character", ["-e", "\\ud83d"], None),
        (2, "logit-bias 5", ["--logit-bias", "5", "x"], None),
        (2, "logit-bias a:1", ["--logit-bias", "a:1", "x"], None),
        (1, "300", ["--logit-bias", "300:1", "x"], None),
        (1, "258", ["--stop-token-ids", "258", "x"], None),
        (2, "--stop-token-ids: token ids are integers", ["--stop-token-ids", "1,x", "x"], None),
        (2, "--json", ["--logprobs", "2", "x"], None),
        (2, "-n 2 must be 1", ["--session", "s", "-n", "2", "x"], None),
        (2, "--threads: 0 is outside its domain, expected 1 … 1024", ["--threads", "0", "x"], None),
        (2, "--threads: 1000000 is outside its domain, expected 1 … 1024", ["-t", "1000000", "x"], None),
        (2, "--threads: invalid int value: 'many'", ["-t", "many", "x"], None),
        (2, "--device: it is empty", ["--device", "", "x"], None),
        (2, "invalid choice: 'int3'", ["--dtype", "int3", "x"], None),
        (1, "tpu", ["--device", "tpu", "x"], None),
        (1, "revision", ["--revision", "v2", "x"], None),
        (1, "no-such-tokenizer", ["--tokenizer", "no-such-tokenizer", "x"], None),
    ],
)
def test_bad_arguments(status: int, fragment: str, args: list[str], stdin: bytes | None, model_directory: Path) -> None:
    fails(status, fragment, "generate", "-m", model_directory, *args, stdin=stdin)


def test_a_prompt_argument_that_is_not_utf8(model_directory: Path) -> None:
    done = subprocess.run([*COMMAND, "generate", "-m", model_directory, b"ab\xff"], capture_output=True)
    assert done.returncode == 1
    assert b"prompt is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--stop", "--separator"])
def test_an_option_that_is_not_utf8(option: str, model_directory: Path, tmp_path: Path) -> None:
    """Wrong usage, before anything is generated or saved."""
    run = ["generate", "-m", model_directory, "--session", tmp_path / "state", option, b"a\x80", "Hello"]
    done = subprocess.run([*COMMAND, *run], capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"argument {option}: the text is not UTF-8".encode() in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_no_prompt_at_a_terminal_is_a_usage_error(model_directory: Path) -> None:
    terminal, its_end = pty.openpty()
    done = subprocess.run(
        [*COMMAND, "generate", "-m", model_directory], stdin=its_end, capture_output=True, text=True, timeout=60
    )
    os.close(its_end)
    os.close(terminal)
    assert done.returncode == 2
    assert "no prompt" in done.stderr


# ---- generate: sampling ----------------------------------------------------------------------------------------------


def sample(model_directory: Path, *args: object) -> dict[str, Any]:
    (record,) = objects(ok("generate", "-m", model_directory, "--json", *args, "Hello, world"))
    return record


def greedy_ids(model: based.Model, count: int = MAX_TOKENS, **params: Any) -> list[int]:
    ids = list(b"Hello, world")
    return model.generate(ids, based.SamplingParams(temperature=0, max_tokens=count, **params))[0].outputs[0].token_ids


def test_every_field_of_sampling_params_is_a_flag() -> None:
    from based.cli import generate

    fields = [name for name in dir(based.SamplingParams) if not name.startswith("_")]
    fields = [name for name in fields if not callable(getattr(based.SamplingParams, name))]
    assert sorted(generate._FIELDS) == sorted(fields)


def test_the_most_samples_are_those_of_sampling_params() -> None:
    from based.cli import generate

    assert based.SamplingParams(n=generate._MOST_SAMPLES).n == generate._MOST_SAMPLES
    with pytest.raises(ValueError, match=f"expected 1 … {generate._MOST_SAMPLES}$"):
        based.SamplingParams(n=generate._MOST_SAMPLES + 1)


def test_defaults_are_those_of_sampling_params_but_for_max_tokens(model: based.Model, model_directory: Path) -> None:
    record = sample(model_directory, "--seed", 3)
    params = based.SamplingParams(seed=3, max_tokens=MAX_TOKENS)
    assert record["token_ids"] == model.generate("Hello, world", params)[0].outputs[0].token_ids
    assert len(record["token_ids"]) == params.max_tokens


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--max-tokens", "5"], {"max_tokens": 5}),
        (["--temperature", "0.3"], {"temperature": 0.3}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--top-k", "3"], {"top_k": 3}),
        (["--min-p", "0.4"], {"min_p": 0.4}),
        (["--temperature", "0", "--repetition-penalty", "3"], {"temperature": 0, "repetition_penalty": 3}),
        (
            ["--temperature", "0", "--max-tokens", "64", "--presence-penalty", "2"],
            {"temperature": 0, "max_tokens": 64, "presence_penalty": 2},
        ),
        (
            ["--temperature", "0", "--max-tokens", "64", "--frequency-penalty", "2"],
            {"temperature": 0, "max_tokens": 64, "frequency_penalty": 2},
        ),
        (["--seed", "8"], {"seed": 8}),
        (["--logit-bias", "65:60", "--logit-bias", "66:60"], {"logit_bias": {65: 60, 66: 60}}),
    ],
)
def test_sampling_flags_reach_the_sampler(
    flags: list[str], params: dict[str, Any], model: based.Model, model_directory: Path
) -> None:
    """Same ids as the library gives for these params, and other ids than without the flag."""
    plain = {
        "seed": 7,
        "temperature": params.get("temperature", 1.0),
        "max_tokens": params.get("max_tokens", MAX_TOKENS),
    }
    seed = [] if "--seed" in flags else ["--seed", "7"]
    ids = sample(model_directory, *seed, *flags)["token_ids"]
    alone = len(params) == 1 and set(params) & {"temperature", "max_tokens"}
    params = {"seed": 7, "max_tokens": MAX_TOKENS} | params
    assert ids == model.generate("Hello, world", based.SamplingParams(**params))[0].outputs[0].token_ids
    if alone:
        plain |= {"temperature": 1.0, "max_tokens": MAX_TOKENS}
    assert ids != model.generate("Hello, world", based.SamplingParams(**plain))[0].outputs[0].token_ids


def test_stop_token_ids_and_min_tokens(model: based.Model, model_directory: Path) -> None:
    ids = greedy_ids(model)
    stop = ids[4]
    first = ids.index(stop)
    record = sample(model_directory, *GREEDY, "--stop-token-ids", f"{stop},{stop}")
    assert record["token_ids"] == ids[: first + 1]
    assert (record["finish_reason"], record["stop_reason"]) == ("stop", stop)
    other = next(id for id in range(256) if id not in ids)
    for repeated in ((stop, other), (other, stop)):
        flags = [flag for id in repeated for flag in ("--stop-token-ids", id)]
        assert sample(model_directory, *GREEDY, *flags)["token_ids"] == ids[: first + 1]
    record = sample(model_directory, *GREEDY, "--stop-token-ids", stop, "--min-tokens", 12)
    assert len(record["token_ids"]) >= 12
    assert stop not in record["token_ids"][:11]


def test_stop_strings_that_shells_and_parsers_spoil(model_directory: Path) -> None:
    for letter, flag in (("-", ["--stop=--"]), ("\n", ["-e", "--stop", "\\n\\n"]), ("\n", ["--stop", "\n\n"])):
        bias = ["--logit-bias", f"{ord(letter)}:100", *GREEDY, "--max-tokens", 9]
        record = sample(model_directory, *bias, *flag)
        assert (record["stop_reason"], record["text"], len(record["token_ids"])) == (letter * 2, "", 2)
    record = sample(model_directory, *GREEDY, "--logit-bias", f"{ord(chr(92))}:100", "--stop", "\\n", "--max-tokens", 9)
    assert record["text"] == "\\" * 9


def test_no_limit_and_special_tokens(model_directory: Path) -> None:
    bias = [*GREEDY, "--logit-bias", "257:100"]  # <eos>, which does not end this model's texts
    record = sample(model_directory, *bias, "--max-tokens", "none", "--stop", "<eos>")
    assert (record["text"], record["token_ids"], record["stop_reason"]) == ("", [257], "<eos>")
    record = sample(model_directory, *bias, "--max-tokens", 2, "--no-skip-special-tokens")
    assert record["text"] == "<eos><eos>"


def test_an_empty_prompt() -> None:
    (record,) = objects(ok("generate", "--json", "--max-tokens", 2, ""))
    assert record["num_prompt_tokens"] == 1  # the model's start token


def test_stop_strings(model_directory: Path) -> None:
    """Bias makes the model say A and B only; stop strings are cut off, or kept with the flag."""
    bias = ["--logit-bias", "65:100", "--logit-bias", "66:100", "--seed", 1, "--max-tokens", 64]
    text = sample(model_directory, *bias)["text"]
    assert set(text) == {"A", "B"}
    stops = ["--stop", "zzz", "--stop", "BA"]
    record = sample(model_directory, *bias, *stops)
    assert record["text"] == text[: text.index("BA")]
    assert (record["finish_reason"], record["stop_reason"]) == ("stop", "BA")
    record = sample(model_directory, *bias, *stops, "--include-stop-str-in-output")
    assert record["text"] == text[: text.index("BA") + 2]


def test_ignore_eos(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    ids = greedy_ids(model)
    directory = tmp_path / "with-eos"
    directory.mkdir()
    for path in model_directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": ids[3]}))
    record = sample(directory, *GREEDY)
    assert record["token_ids"] == ids[: ids.index(ids[3]) + 1]
    assert record["finish_reason"] == "stop"
    record = sample(directory, *GREEDY, "--ignore-eos")
    assert (record["token_ids"], record["finish_reason"]) == (ids, "length")


def test_logprobs(model: based.Model, model_directory: Path) -> None:
    record = sample(model_directory, *GREEDY, "--logprobs", 3, "--max-tokens", 4)
    assert len(record["logprobs"]) == 4
    ids = list(b"Hello, world") + record["token_ids"]
    scores = model.score(ids)[-4:]
    for token, score, top in zip(record["token_ids"], scores, record["logprobs"], strict=True):
        assert [entry["rank"] for entry in top] == [1, 2, 3]
        assert top[0]["token_id"] == token
        assert top[0]["logprob"] == pytest.approx(float(score), abs=1e-4)
        assert top[0]["logprob"] >= top[1]["logprob"] >= top[2]["logprob"]
    assert record["cumulative_logprob"] == pytest.approx(float(np.sum(scores)), abs=1e-3)
    assert "logprobs" not in sample(model_directory, *GREEDY)


def test_several_samples(model: based.Model, model_directory: Path) -> None:
    run = ["generate", "-m", model_directory, "-n", 3, "--seed", 5, "--logit-bias", "65:100", "--logit-bias", "66:100"]
    records = objects(ok(*run, "--json", "Hi"))
    assert [record["index"] for record in records] == [0, 1, 2]
    texts = [record["text"] for record in records]
    assert len(set(texts)) == 3
    assert ok(*run, "Hi") == "\n---\n".join(texts) + "\n"


# ---- generate: ids, dtype, threads -----------------------------------------------------------------------------------


def test_token_ids_in_and_out(model: based.Model, without_tokenizer: Path) -> None:
    expected = " ".join(map(str, greedy_ids(model, 6))) + "\n"
    prompt = ", ".join(map(str, b"Hello, world"))
    run = ["generate", "-m", without_tokenizer, "--token-ids", *GREEDY, "--max-tokens", 6]
    assert ok(*run, prompt) == expected
    assert ok(*run, stdin=prompt.replace(",", "\n")) == expected
    assert objects(ok(*run, "--json", prompt))[0]["text"] == ""


def test_text_without_a_tokenizer(without_tokenizer: Path, model: based.Model) -> None:
    fails(1, "--token-ids", "generate", "-m", without_tokenizer, "text")
    named = ["--tokenizer", GOLDEN / "tokenizer.json"]
    assert ok("generate", "-m", without_tokenizer, *named, *GREEDY, "text") == expected_text(model, "text") + "\n"


def test_dtype_threads_and_statistics(model_directory: Path) -> None:
    run = ["generate", "-m", model_directory, "--stats", "--device", "cpu", "Hello"]
    stderr = based_cli(*run, "--dtype", "bfloat16", "--threads", 1, "--max-tokens", 7).stderr
    assert "prompt 5 tokens, " in stderr
    assert "output 7 tokens, " in stderr
    assert "after 12 tokens" in stderr
    assert "bfloat16, 1 threads" in stderr
    assert "float32" in based_cli(*run).stderr
    assert len(stderr.splitlines()) == 1


def test_statistics_only_at_a_terminal(model_directory: Path) -> None:
    run = [*COMMAND, "generate", "-m", str(model_directory), "Hello"]
    for extra, expected in (([], True), (["--no-stats"], False)):
        terminal, its_end = pty.openpty()
        subprocess.run(run + extra, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=its_end, check=True)
        os.write(its_end, b"END")
        assert (b"tok/s" in os.read(terminal, 10000)) is expected
        os.close(its_end)
        os.close(terminal)


# ---- generate: sessions ----------------------------------------------------------------------------------------------


def test_a_session_in_pieces_is_one_long_sequence(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    run = ["generate", "-m", model_directory, *GREEDY, "--json", "--session", file, "--max-tokens", 20]
    greedy = based.SamplingParams(temperature=0, max_tokens=20)
    prompts, seen, sizes_seen = ["The first part.", " And then, ", "x"], [], []
    for prompt in prompts:
        (record,) = objects(ok(*run, prompt))
        seen += list(prompt.encode())
        whole = model.generate(seen, greedy)[0].outputs[0]
        assert record["token_ids"] == whole.token_ids
        assert record["num_prompt_tokens"] == len(prompt)
        seen += record["token_ids"]
        sizes_seen.append(file.stat().st_size)
    assert sizes_seen[1] == sizes_seen[2]  # 17 keys of window are full: a state of constant size
    # Without a prompt it goes on where it stopped.
    (record,) = objects(ok(*run))
    assert record["num_prompt_tokens"] == 0
    assert record["token_ids"] == model.generate(seen, greedy)[0].outputs[0].token_ids
    seen += record["token_ids"]
    session = model.session()
    session.load_state(file)
    assert session.num_tokens == [len(seen)]
    assert sorted(tmp_path.iterdir()) == [file, file.with_name("state.safetensors.before")]


def test_a_sample_that_cannot_go_on(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    """What came before is shown, the reason is on stderr, the status is 1, and a saved session stays as it was."""
    file = tmp_path / "state.safetensors"
    before = file.with_name("state.safetensors.before")
    run = ["generate", "-m", model_directory, "--session", file, "--max-tokens", 3]
    stop_ids = ",".join(map(str, range(model.config.vocab_size)))

    def cannot_go_on(*flags: str) -> None:
        done = based_cli(*run, "--min-tokens", 1, "--stop-token-ids", stop_ids, *flags, "Hello")
        assert done.returncode == 1
        assert done.stdout == "\n" if not flags else objects(done.stdout)[0]["finish_reason"] == "error"
        assert done.stderr.startswith("based: error: ") and "leave no token" in done.stderr

    cannot_go_on()
    assert list(tmp_path.iterdir()) == []
    ok(*run, "One")
    ok(*run, "Two")
    saved = file.read_bytes(), before.read_bytes()
    cannot_go_on()
    cannot_go_on("--json")
    assert (file.read_bytes(), before.read_bytes()) == saved
    assert sorted(tmp_path.iterdir()) == [file, before]


def test_a_failed_run_leaves_the_session_file(model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    run = ["generate", "-m", model_directory, "--session", file]
    ok(*run, "Hello")
    before = file.read_bytes()
    fails(1, "300", *run, "--token-ids", "300")
    assert file.read_bytes() == before
    file.write_bytes(before[:-1])
    fails(1, "state.safetensors", *run, "Hello")
    assert file.read_bytes() == before[:-1]
    fails(1, "a: No such file or directory", "generate", "-m", model_directory, "--session", tmp_path / "a" / "b", "x")


def session_tokens(model: based.Model, file: Path) -> int:
    session = model.session()
    session.load_state(file)
    return session.num_tokens[0]


def test_undo(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    run = ["generate", "-m", model_directory, *GREEDY, "--session", file, "--max-tokens", 4]
    fails(1, "no turn to undo", *run, "--undo")
    ok(*run, "One")
    fails(1, "no turn to undo", *run, "--undo")
    first = file.read_bytes()
    two = ok(*run, "Two")
    assert session_tokens(model, file) == 2 * (3 + 4)
    assert ok(*run, "--undo") == ""
    assert file.read_bytes() == first
    fails(1, "no turn to undo", *run, "--undo")
    ok(*run, "Another")
    assert ok(*run, "--undo", "Two") == two  # another second turn in the place of the one that was
    assert session_tokens(model, file) == 2 * (3 + 4)
    second = file.read_bytes()
    assert ok(*run, "--undo", "Two") == two
    assert file.read_bytes() == second
    fails(1, "300", *run, "--undo", "--token-ids", "300")  # a failed run changes nothing
    assert file.read_bytes() == second
    ok(*run, "--undo")
    assert file.read_bytes() == first
    # A conversation that begins anew has nothing of the old one.
    ok(*run, "Two")
    file.unlink()
    ok(*run, "New")
    assert list(tmp_path.iterdir()) == [file]
    fails(2, "--session FILE", "generate", "--undo", "x")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_turn_after_one_that_was_killed_while_it_was_saved(
    has_links: bool, model: based.Model, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves beside the session keeps no later turn of the same process id from being saved."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    file = tmp_path / "state.safetensors"
    run = ["generate", "-m", str(model_directory), "--session", str(file), "--max-tokens", "2", "Hello"]
    assert cli.main(run) == 0
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as killed:
        killed.setattr(based.Session, "save_state", fail)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        assert cli.main(run) == 130
    assert session_tokens(model, file) == 5 + 2
    assert len(list(tmp_path.iterdir())) == 3  # the lock, and the state that was put aside
    assert cli.main(run) == 0
    assert session_tokens(model, file) == 2 * (5 + 2)
    assert sorted(tmp_path.iterdir()) == [file, file.with_name("state.safetensors.before")]
    assert cli.main([*run[:-1], "--undo", ""]) == 0
    assert session_tokens(model, file) == 5 + 2


def test_separator(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    run = ["generate", "-m", model_directory, *GREEDY, "--session", file, "--max-tokens", 2, "--separator", "\n--\n"]
    (first,) = objects(ok(*run, "--json", "One"))
    assert first["num_prompt_tokens"] == 3
    (second,) = objects(ok(*run, "--json", "Two"))
    assert second["num_prompt_tokens"] == 4 + 3
    seen = [*b"One", *first["token_ids"], *b"\n--\nTwo"]
    params = based.SamplingParams(temperature=0, max_tokens=2)
    assert second["token_ids"] == model.generate(seen, params)[0].outputs[0].token_ids
    assert objects(ok(*run, "--json"))[0]["num_prompt_tokens"] == 0  # goes on: no turn begins
    fails(2, "--session FILE", "generate", "-m", model_directory, "--separator", "x", "Hello")
    fails(2, "--token-ids", *run, "--token-ids", "1")


def test_one_process_at_a_time_continues_a_session(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    (tmp_path / "link").symlink_to(file)
    ok("generate", "-m", model_directory, "--session", file, "--max-tokens", 2, "Hello")
    run = ["generate", "-m", model_directory, "--max-tokens", 10_000_000, "--session", file, "Hello"]
    with start(*run) as process:
        assert process.stdout
        assert process.stdout.read(10)
        for name in (file, tmp_path / "link"):
            fails(1, "another process", "generate", "-m", model_directory, "--session", name, "Hello")
            fails(1, "another process", "generate", "-m", model_directory, "--session", name, "--undo")
        other = tmp_path / "other.safetensors"
        ok("generate", "-m", model_directory, "--session", other, "--max-tokens", 2, "Hello")
    # The one that held it was killed: nothing stays locked.
    ok("generate", "-m", model_directory, "--session", file, "--max-tokens", 2, "Hello")
    assert session_tokens(model, file) == 2 * (5 + 2)
    assert not list(tmp_path.glob(".*"))


def test_no_turn_is_lost(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    """Many at once: each has its turn in the file, or failed and said so."""
    file = tmp_path / "state.safetensors"
    run = [*COMMAND, "generate", "-m", str(model_directory), "--session", str(file), "--max-tokens", "5", "Hello"]
    processes = [
        subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    outcomes = [(process.communicate(timeout=120), process.returncode) for process in processes]
    done = sum(status == 0 for _, status in outcomes)
    assert done >= 1
    assert session_tokens(model, file) == done * (5 + 5)
    for (_, errors), status in outcomes:
        assert status == 0 or b"another process continues this conversation" in errors


def test_a_session_of_another_model_is_refused(model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    based.Model.random(sizes.named_config("tiny"), 1).session().save_state(file)
    fails(1, "state.safetensors", "generate", "-m", model_directory, "--session", file, "Hello")


# ---- generate: pipes and interrupts ----------------------------------------------------------------------------------


@contextlib.contextmanager
def start(*args: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command, under way, and killed in the end."""
    with subprocess.Popen(
        [*COMMAND, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_text_streams_and_a_closed_pipe_ends_it_quietly(model_directory: Path) -> None:
    with start("generate", "-m", model_directory, "--max-tokens", 10_000_000, "Hello") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(10)  # long before the end
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_interrupt(flags: list[str], model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    ok("generate", "-m", model_directory, "--session", file, "Hello")
    before = file.read_bytes()
    run = ["generate", "-m", model_directory, "--session", file, "--max-tokens", 10_000_000, *flags, "Hello"]
    with start(*run) as process:
        assert process.stdout and process.stderr
        if flags:
            time.sleep(2)
        else:
            process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        process.communicate(timeout=20)
        assert process.returncode == 130
        assert time.monotonic() - asked < 5
    assert file.read_bytes() == before


# ---- generate: streams that are closed, or lack letters --------------------------------------------------------------


def shell(redirection: str, *args: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`based ARGS` with what only a shell can do to its streams."""
    command = 'exec "$@" ' + redirection
    return subprocess.run(
        ["sh", "-c", command, "sh", *COMMAND, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("flags", [[], ["--json"], ["--stats"]])
def test_closed_streams_are_the_null_device(flags: list[str], model_directory: Path, tmp_path: Path) -> None:
    run = ["generate", "-m", model_directory, *GREEDY, "--max-tokens", 3, *flags, "--session"]
    null = shell("2>/dev/null", *run, tmp_path / "null", "hi")
    assert (null.returncode, null.stderr) == (0, b"") and null.stdout
    closed = shell("2>&-", *run, tmp_path / "closed", "hi")
    assert (closed.returncode, closed.stdout) == (0, null.stdout)
    failed = shell("2>&-", *run, tmp_path / "absent" / "s", "hi")
    assert (failed.returncode, failed.stdout) == (1, b"")
    silent = shell(">&-", *run, tmp_path / "silent", "hi")
    assert silent.returncode == 0
    neither = shell(">&- 2>&-", *run, tmp_path / "neither", "hi")
    assert neither.returncode == 0
    nothing = shell("<&- >&- 2>&-", *run, tmp_path / "nothing", "hi")
    assert nothing.returncode == 0
    states = {(tmp_path / name).read_bytes() for name in ("null", "closed", "silent", "neither", "nothing")}
    assert len(states) == 1


def test_other_commands_with_a_closed_stderr(model_directory: Path, tmp_path: Path) -> None:
    for args in (["inspect", model_directory], ["tokenize", "-m", model_directory, "hi"]):
        done = shell("2>&-", *args)
        assert (done.returncode, done.stdout) == (0, shell("2>/dev/null", *args).stdout)
    assert shell("2>&-", "convert", GOLDEN, tmp_path / "converted").returncode == 0
    usage = shell("2>&-", "dance")
    assert (usage.returncode, usage.stdout) == (2, b"")


def test_progress_without_a_stderr(model: based.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert model.generate("a", progress=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_stdout_lacks(encoding: str, model_directory: Path, tmp_path: Path) -> None:
    """They are escaped; neither the output nor the session is lost."""
    biases = [f"--logit-bias={byte}:100" for byte in "é→".encode()]
    run = ["generate", "-m", model_directory, "--seed", 1, "--max-tokens", 40, *biases, "--session"]
    environment = {"PYTHONIOENCODING": encoding}
    plain = shell("", *run, tmp_path / "plain", "caf", **environment)
    assert (plain.returncode, plain.stderr) == (0, b"")
    text = shell("", *run, tmp_path / "utf8", "caf", PYTHONIOENCODING="utf-8").stdout.decode()
    assert not text.isascii()
    assert plain.stdout == text.encode(encoding, "backslashreplace")
    as_json = shell("", *run, tmp_path / "json", "--json", "caf", **environment)
    assert as_json.returncode == 0
    assert json.loads(as_json.stdout.decode(encoding))["text"] + "\n" == text
    assert len({(tmp_path / name).read_bytes() for name in ("plain", "utf8", "json")}) == 1
    tokens = shell("", "tokenize", "-m", model_directory, "--json", "é→", **environment)
    assert json.loads(tokens.stdout.decode(encoding))["text"] == "é→"
    decoded = shell("", "tokenize", "-m", model_directory, "-d", " ".join(map(str, "é→".encode())), **environment)
    assert decoded.stdout == "é→\n".encode(encoding, "backslashreplace")


@pytest.mark.parametrize(
    ("status", "fragment", "args"),
    [
        (2, "--max-tokens", ["--max-tokens", "0"]),
        (2, "--min-tokens", ["--min-tokens", "9", "--max-tokens", "3"]),
        (2, "--top-p", ["--top-p", "2"]),
        (2, "--temperature", ["--temperature", "-1"]),
        (2, "--repetition-penalty", ["--repetition-penalty", "0"]),
        (2, "--stop", ["--stop", ""]),
        (1, "--device", ["--device", "gpu"]),
        (1, "--stop-token-ids", ["--stop-token-ids", "100000"]),
    ],
)
def test_messages_name_options_as_they_are_typed(
    status: int, fragment: str, args: list[str], model_directory: Path
) -> None:
    done = based_cli("generate", "-m", model_directory, *args, "x")
    assert done.returncode == status
    error = done.stderr.strip().splitlines()[-1].split("error: ", 1)[1]
    assert fragment in error
    for name in ("max_tokens", "min_tokens", "top_p", "repetition_penalty", "stop_token_ids"):
        assert name not in error


# ---- convert ---------------------------------------------------------------------------------------------------------


def test_convert(model_directory: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in model_directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert based.load(model_directory).num_parameters == sizes.named_config("tiny").num_parameters
    for dtype, bytes_each in (("bfloat16", 2), ("float16", 2), ("float32", 4)):
        target = tmp_path / dtype
        done = based_cli("convert", GOLDEN, target, "--dtype", dtype, "--stats")
        assert done.returncode == 0
        assert f"{target}: " in done.stderr
        size = (target / "model.safetensors").stat().st_size
        assert size == pytest.approx(bytes_each * sizes.named_config("tiny").num_parameters, rel=0.02)


def test_convert_with_a_tokenizer_and_overwrite(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (source / name).symlink_to(GOLDEN / name)
    ok("convert", source, target)
    assert not (target / "tokenizer.json").exists()
    fails(1, f"{target}: ", "convert", source, target)
    ok("convert", source, target, "--overwrite", "--tokenizer", GOLDEN / "tokenizer.json")
    assert (target / "tokenizer.json").exists()
    fails(1, "absent", "convert", tmp_path / "absent", tmp_path / "x")
    fails(2, "invalid choice", "convert", source, tmp_path / "x", "--dtype", "int8")


# ---- tokenize --------------------------------------------------------------------------------------------------------

TEXTS = ["Hello", "Grüße, 世界 🙂", "a\tb\n\nc", "  spaces  ", "\x00\x7f\u2028", "it's <bos>? no"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_round_trip(text: str) -> None:
    run = ["tokenize", "-m", GOLDEN]
    ids = ok(*run, stdin=text)
    assert ok(*run, "--decode", stdin=ids) == text + "\n"
    record = json.loads(ok(*run, "--json", stdin=text))
    assert record["text"] == text
    assert record["token_ids"] == list(map(int, ids.split()))
    assert len(record["tokens"]) == len(record["token_ids"])


def test_tokenize_from_argument_and_file(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("Hi!\n")
    assert ok("tokenize", "-m", GOLDEN, "Hi!") == ok("tokenize", "-m", GOLDEN, "--file", file) == "72 105 33\n"
    assert ok("tokenize", "-m", GOLDEN, "--decode", "72,105 33") == "Hi!\n"


def test_tokenize_bad_input(without_tokenizer: Path) -> None:
    fails(1, "no tokenizer", "tokenize", "-m", without_tokenizer, "x")
    fails(1, "258", "tokenize", "-m", GOLDEN, "--decode", "258")
    fails(2, "integers", "tokenize", "-m", GOLDEN, "--decode", "x")


def test_escapes_and_special_tokens_of_arguments() -> None:
    run = ["tokenize", "-m", GOLDEN]
    spelled = r"a\n\t\r\\\0\x41\u00e9\ud83d\ude00\'\""
    text = "a\n\t\r\\\0\x41\u00e9\U0001f600'\""
    assert json.loads(ok(*run, "--json", "-e", spelled))["text"] == text
    assert json.loads(ok(*run, "--json", spelled))["text"] == spelled
    assert json.loads(ok(*run, "--json", "-e", stdin=spelled))["text"] == spelled  # an argument's alone
    assert ok(*run, "<eos>") == "257\n"
    assert ok(*run, "--split-special-tokens", "<eos>") == "60 101 111 115 62\n"


def test_a_truncating_tokenizer_truncates_nothing(model_directory: Path, tmp_path: Path) -> None:
    for change in ("truncation", "padding"):
        tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
        if change == "truncation":
            tokenizer.enable_truncation(3)
        else:
            tokenizer.enable_padding(length=32, pad_id=256)
        file = tmp_path / f"{change}.json"
        file.write_text(tokenizer.to_str())
        assert ok("tokenize", "-m", model_directory, "--tokenizer", file, "Hello") == "72 101 108 108 111\n"
        (record,) = objects(
            ok("generate", "-m", model_directory, "--tokenizer", file, "--json", "--max-tokens", 1, "Hello")
        )
        assert record["num_prompt_tokens"] == 5


# ---- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity(model: based.Model, model_directory: Path, tmp_path: Path) -> None:
    text = "Grüße, 世界! <eos> " * 9
    file = tmp_path / "text.txt"
    file.write_text(text)
    ids = list(text.encode())
    run = ["perplexity", "-m", model_directory]
    whole = json.loads(ok(*run, "--json", file))
    loss = -model.score(ids).mean(dtype=np.float64)
    assert (whole["tokens"], whole["bytes"], whole["window"], whole["stride"]) == (
        len(ids) - 1,
        len(ids) - 1,
        None,
        None,
    )
    assert whole["loss"] == pytest.approx(loss, rel=1e-5)
    assert whole["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert whole["bits_per_byte"] == pytest.approx(loss / np.log(2), rel=1e-5)
    assert ok(*run, "-", stdin=text) == ok(*run, file)
    assert f"{len(ids) - 1} tokens, {len(ids) - 1} bytes (whole)\n" in ok(*run, file)
    assert f"{whole['bits_per_byte']:.4f}\n" in ok(*run, file)

    for window, stride in ((40, 13), (50, None), (9, 8), (500, 100)):
        flags = [] if stride is None else ["--stride", stride]
        found = json.loads(ok(*run, "--json", "--window", window, *flags, file))
        stride = stride or window // 2
        total, counted = 0.0, 1
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            if end > counted:
                total -= model.score(ids[begin:end])[counted - end :].sum(dtype=np.float64)
                counted = end
        assert (found["tokens"], found["window"], found["stride"]) == (len(ids) - 1, window, stride)
        assert found["loss"] * (len(ids) - 1) == pytest.approx(total, rel=1e-5)
    if window >= len(ids):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_byte_order_mark_is_no_text(model_directory: Path, tmp_path: Path) -> None:
    """As in training: at the beginning of a file or of stdin."""
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(b"Hello, world")
    marked.write_bytes(codecs.BOM_UTF8 + plain.read_bytes())
    run = ["perplexity", "-m", model_directory, "--json"]
    expected = ok(*run, plain)
    assert ok(*run, marked) == expected
    assert ok(*run, "-", stdin=marked.read_bytes()) == expected
    marked.write_bytes(marked.read_bytes() + codecs.BOM_UTF8)  # in a text it is a letter
    assert json.loads(ok(*run, marked))["bytes"] == json.loads(expected)["bytes"] + 3

    marked.write_bytes(codecs.BOM_UTF8 + plain.read_bytes())
    run = ["generate", "-m", model_directory, *GREEDY, "--max-tokens", 3, "--json"]
    expected = ok(*run, "-f", plain)
    assert ok(*run, "-f", marked) == expected
    assert ok(*run, stdin=marked.read_bytes()) == expected
    assert ok("tokenize", "-f", marked) == ok("tokenize", "-f", plain)


def test_perplexity_begins_with_the_start_token(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("def f(x):\n")
    model = based.load()
    found = json.loads(ok("perplexity", "--json", file))
    assert (found["tokens"], found["bytes"]) == (10, 10)
    assert found["loss"] == pytest.approx(-model.score([256, *b"def f(x):\n"]).mean(dtype=np.float64), rel=1e-5)


def test_perplexity_bad_input(model_directory: Path, without_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a")
    run = ["perplexity", "-m", model_directory]
    fails(1, "expected a longer text", *run, file)
    fails(1, "No such file", *run, tmp_path / "absent")
    fails(1, "stdin: byte 1 is not UTF-8", *run, "-", stdin=b"a\xff")
    fails(1, "no tokenizer", "perplexity", "-m", without_tokenizer, file)
    fails(2, "--window", *run, "--stride", 5, file)
    for window, stride in ((1, 1), (8, 8), (8, 9)):
        fails(2, "expected a window", *run, "--window", window, "--stride", stride, file)


@pytest.mark.parametrize("flags", [[], ["--json"], ["--window", "4"]])
def test_perplexity_that_is_no_number(flags: list[str], model_directory: Path, tmp_path: Path) -> None:
    """A model whose logits are NaN is an error: no NaN is shown, which is no JSON."""
    broken = tmp_path / "broken"
    shutil.copytree(model_directory, broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:begin])["final_norm.weight"]["data_offsets"]
    data[begin + first : begin + last] = b"\xff" * (last - first)
    weights.write_bytes(data)
    file = tmp_path / "text.txt"
    file.write_text("Hello, world")
    fails(
        1, "the log-probability of token 1 is nan, expected a finite number", "perplexity", "-m", broken, *flags, file
    )


def test_the_golden_tokenizer_is_of_bytes() -> None:
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    text = "".join(map(chr, [*range(0x300), 0x4E16, 0xFFFD, 0x1F642, 0x10FFFF]))
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert [tokenizer.token_to_id(token) for token in ("<bos>", "<eos>")] == [256, 257]
    assert tokenizer.get_vocab_size() == 258


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect(model: based.Model, model_directory: Path) -> None:
    facts = json.loads(ok("inspect", model_directory, "--json"))
    assert facts["num_parameters"] == model.num_parameters == 1286528
    assert facts["pattern"] == "cLWcccL"
    assert facts["dtype"] == "float32"
    assert facts["files"] == {"model.safetensors": (model_directory / "model.safetensors").stat().st_size}
    assert based.ModelConfig.from_json(json.dumps(facts["config"])) == model.config
    # conv 4 layers × 2 × 256, Taylor 2 layers × 4 heads × 153 × 33, window 9 keys and values × 128, float32
    state = {"gated_conv": 4 * 2 * 256 * 4, "linear_attention": 2 * 4 * 153 * 33 * 4, "sliding_window": 2 * 9 * 128 * 4}
    assert facts["state_nbytes"] == {"total": sum(state.values()), **state}
    assert facts["state_nbytes"]["total"] <= model.state_nbytes <= 1.4 * facts["state_nbytes"]["total"]
    # 7 layers, a key and a value of 128 float32 each
    expected = {str(tokens): 7 * 2 * 128 * 4 * tokens for tokens in (1024, 8192, 131072)}
    assert facts["transformer_kv_cache_nbytes"] == expected
    text = ok("inspect", model_directory)
    assert "1,286,528 parameters, float32, 5.2 MB in 1 file" in text
    assert "7: cLWcccL" in text
    assert "128" in text


def test_inspect_a_model_without_mlp(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config = json.loads(sizes.named_config("tiny").to_json()) | {"mlp": None}
    model = based.Model.random(based.ModelConfig.from_json(json.dumps(config)), device="cpu")
    assert model.config.mlp is None
    (tmp_path / "config.json").write_text(model.config.to_json())
    save_file({"embedding.weight": np.zeros((264, 128), np.float32)}, tmp_path / "model.safetensors")
    facts = json.loads(ok("inspect", tmp_path, "--json"))
    assert facts["config"]["mlp"] is None
    # a norm of 128 and an MLP of 3 · 128 · 256 less in each of 7 layers
    assert facts["num_parameters"] == model.num_parameters == 1286528 - 7 * (128 + 3 * 128 * 256)
    assert "  mlp         none" in ok("inspect", tmp_path)


def test_the_saved_state_has_the_size_that_inspect_tells(model: based.Model, tmp_path: Path) -> None:
    session = model.session()
    session.prefill([list(range(40))])
    session.save_state(tmp_path / "state")
    stored = (tmp_path / "state").stat().st_size
    told = sizes.state_nbytes(model.config, "float32")
    assert told < stored < told + 8192  # the header


def test_inspect_loads_no_weights(model_directory: Path, tmp_path: Path) -> None:
    """The data of the weight file may even be nonsense."""
    directory = tmp_path / "nonsense"
    directory.mkdir()
    (directory / "config.json").write_bytes((model_directory / "config.json").read_bytes())
    weights = bytearray((model_directory / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(weights[:8], "little")
    weights[header:] = b"\xff" * (len(weights) - header)
    (directory / "model.safetensors").write_bytes(weights)
    assert json.loads(ok("inspect", directory, "--json"))["num_parameters"] == 1286528
    (directory / "model.safetensors").write_bytes(weights[:-1])
    fails(1, "model.safetensors", "inspect", directory)


def test_inspect_sharded_files(model_directory: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model_directory / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, tensor) in enumerate(tensors.items()):
        shards["ab"[i % 2] + ".safetensors"][name] = tensor
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    index = {"weight_map": {tensor: name for name, shard in shards.items() for tensor in shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((model_directory / "config.json").read_bytes())
    facts = json.loads(ok("inspect", tmp_path, "--json"))
    assert sorted(facts["files"]) == ["a.safetensors", "b.safetensors"]
    assert "in 2 files" in ok("inspect", tmp_path)


def test_inspect_published_directory_and_sizes(tmp_path: Path) -> None:
    environment = os.environ | {"BASED_CACHE": str(tmp_path)}
    assert json.loads(ok("inspect", GOLDEN, "--json", env=environment))["pattern"] == "cLWcccL"
    facts = json.loads(ok("inspect", "--size", "1.3b", "--json"))
    assert facts["num_parameters"] == 1349453056
    assert facts["pattern"] == "cLWcccLWcccLWcccLWcccLWccccLWccccLWc"
    fails(2, "a model or --size", "inspect")
    fails(2, "a model or --size", "inspect", GOLDEN, "--size", "1.3b")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes(model: based.Model) -> None:
    config = sizes.named_config("360m")
    assert config.num_parameters == 362620928
    kinds = [layer.mixer for layer in config.layers]
    assert [i for i, kind in enumerate(kinds) if kind == "linear_attention"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds) if kind == "sliding_window"] == [2, 7, 12, 17, 22]
    assert config.layers[2].window == 129
    assert (config.hidden_size, config.mlp.inner_size, config.padded_vocab_size) == (1024, 2048, 50264)
    # "tiny" is the golden model's shape, whose published config names no token to end with.
    golden, tiny = (json.loads(c.to_json()) for c in (model.config, sizes.named_config("tiny")))
    assert golden | {"bos_token_id": 257, "eos_token_id": 257} == tiny
    with pytest.raises(ValueError, match="size is '7b', expected one of tiny"):
        sizes.named_config("7b")


@pytest.mark.parametrize(
    ("name", "width", "layers", "parameters", "state"),
    [
        ("mamba-360m", 1024, 46, 358_190_080, 7_159_808),
        ("mamba-1b", 2048, 46, 1_319_311_360, 14_319_616),
        ("mamba-130m", 768, 24, 129_135_360, 2_801_664),
        ("mamba-370m", 1024, 48, 371_516_416, 7_471_104),
        ("mamba-790m", 1536, 48, 793_204_224, 11_206_656),
        ("mamba-1.4b", 2048, 48, 1_372_178_432, 14_942_208),
        ("mamba-2.8b", 2560, 64, 2_768_345_600, 24_903_680),
    ],
)
def test_sizes_of_mamba(name: str, width: int, layers: int, parameters: int, state: int) -> None:
    """State: layers · 2 · width · (16 + 3) float32, whatever the model's dtype is on a CPU."""
    config = sizes.named_config(name)
    assert (config.hidden_size, len(config.layers), config.num_parameters) == (width, layers, parameters)
    assert state == layers * 2 * width * 19 * 4
    assert sizes.state_nbytes(config, "float32") == sizes.state_nbytes(config, "bfloat16") == state
    assert config.mlp is None and {layer.mixer for layer in config.layers} == {"selective_scan"}
    authors = name in ("mamba-360m", "mamba-1b")
    assert (config.vocab_size, config.padded_vocab_size) == ((50257, 50288) if authors else (50277, 50280))
    assert config.eos_token_id == (50256 if authors else 0)
    if authors:
        assert sizes.named_config({"mamba-360m": "mamba-360M-30B", "mamba-1b": "mamba-1b-50b"}[name]) == config


@pytest.mark.parametrize("name", ["tiny", "60m"])
def test_products_account_for_the_parameters(name: str) -> None:
    """All matrices but the embedding; the rest is vectors: norms, biases, taps."""
    config = sizes.named_config(name)
    matrices = sum(rows * columns for rows, columns in sizes.gemm_shapes(config))
    embedding = config.padded_vocab_size * config.hidden_size
    vectors = (2 * len(config.layers) + 1) * config.hidden_size
    for mixer in config.layers:
        if mixer.mixer == "gated_conv":
            vectors += mixer.inner_size * (mixer.kernel_size + 2) + config.hidden_size
    assert matrices + embedding + vectors == config.num_parameters


# ---- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("two\nlines"), 1, "based: error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), 1, "based: error: x/y: No such file or directory\n"),
        (MemoryError(), 1, "based: error: MemoryError\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    module: Callable[..., None] = fail
    monkeypatch.setattr("based.convert.convert", module)
    assert cli.main(["convert", "a", "b"]) == status
    assert capsys.readouterr().err == text


# ---- documentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    """docs/cli.md names every flag of every command, and docs/server.md those of the server."""
    document = "server.md" if command == "serve" else "cli.md"
    text = (Path(__file__).parents[2] / "docs" / document).read_text()
    flags = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", ok(command, "--help"))) - {"-h", "--help"}
    assert len(flags) >= 3
    assert [flag for flag in sorted(flags) if not re.search(rf"`{flag}[^a-z-]", text)] == []


def test_every_size_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    sizes_of_bench = text[text.index("`--size`, a list as above") :].split(") with random weights")[0]
    assert set(re.findall(r"`([\w.-]+)`", sizes_of_bench)) - {"--size"} == {*sizes.SIZES, "based-1b", "based-1.3b"}
