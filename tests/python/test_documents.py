"""The examples of the documents run, in order, in a folder of their own.

Blocks of Python, of YAML and of the shell in README.md, CONTRIBUTING.md and docs/ are taken as they stand but for the
changes below, which make them small. A block that cannot run in a test has a line `<!-- not run: why -->` before it;
its Python must be Python all the same, and its `based` commands must be ones.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from based import cli

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

import based
from based import sizes
from based.torch import BasedForCausalLM
from based.torch.train import read_config
from based.torch.train.tokens import byte_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("hazyresearch/based-360m", "hazyresearch/based-1b")
PUBLISHED = "path/to/published-model"
# What makes an example small, or lets it run here: no hub, no GPU, no minutes.
PYTHON = {'named_config("360m")': 'named_config("tiny")', '"cuda"': '"cpu"', "max_tokens=64": "max_tokens=3"}
SHELL = {
    r"pip install \S+( && |$)": "",
    r"--max-tokens \d+": "--max-tokens 3",
    r"based bench --size \S+ .*": "based bench --size tiny -p 4 -n 2 -b 1 -r 1",
    r"based recall -o (\S+).*": r"based recall -o \1 --quick --families window --epochs 1 --device cpu",
    r"based demo.*": "based demo --help",  # half a minute
    r"based eval.*": "based eval --help",  # the harness is an extra
    r"based bench serve.*": "based bench serve --port 8000 --num-prompts 2 --random-input-len 4 --random-output-len 2",
    r"based serve.*": "based serve --help",  # a server is there already
    r"\b8000\b": "${PORT}",
    r"based train config.yaml.*": "based train config.yaml --set training.steps=2 --set training.batch_size=1 "
    "--set optimizer.warmup_steps=1 --set training.device=cpu",
}
GIVEN = {"input_ids": torch.arange(12)[None]}  # names that an example leaves to its reader


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str
    line: int
    reason: str | None
    """Why it is not run; None: it is."""


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text()
    found = []
    for match in re.finditer(r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        reason, language, content = match.groups()
        found.append(Block(language, content, text[: match.start()].count("\n") + 1, reason))
    return found


def commands_of(block: Block) -> list[list[str]]:
    """The words of its `based` commands."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r" && |;", line.split(" # ")[0].split("     #")[0])]
    words = [shlex.split(part, comments=True) for part in parts]
    return [command[1:] for command in words if command[:1] == ["based"]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With what the examples speak of: a model of the hub's vocabulary, a published one, text files."""
    for name in MODELS:
        shape = sizes.recipe("cLW", 16, 2, 24, feature_dim=4, window=9, vocab_size=50257, end_token_id=50256)
        model = BasedForCausalLM(based.ModelConfig.from_json(json.dumps(shape)))
        model.tokenizer_json = byte_tokenizer("<|endoftext|>").to_str().encode()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        model.save(tmp_path / name)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / PUBLISHED).symlink_to(ROOT / "tests" / "golden" / "based-tiny")
    (tmp_path / "texts").mkdir()
    for index in range(3):
        (tmp_path / "texts" / f"{index}.txt").write_text("Once upon a time there was a state. " * 60)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once", "max_tokens": 2}\n')
    (tmp_path / "book.txt").write_text("Once upon a time there was a state. " * 20)
    for block in blocks_of(ROOT / "docs" / "training.md"):
        if block.language == "yaml":
            (tmp_path / "config.yaml").write_text(block.text)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "based").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m based.cli "$@"\n')
    (commands / "based").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("BASED_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(based.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server, as docs/server.md starts it; $PORT, too."""
    pytest.importorskip("openai")
    words = [sys.executable, "-m", "based.cli", "serve", "-m", MODELS[0], "--state-dir", "states", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while "is ready" not in (line := process.stderr.readline()):
            assert line, log
            log += line
        port = re.search(r"listening on http://127.0.0.1:(\d+)", log)
        assert port is not None
        monkeypatch.setenv("PORT", port[1])
        yield int(port[1])
        process.terminate()
        process.communicate()
        assert process.returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_examples_run(document: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    port = request.getfixturevalue("server") if document.name == "server.md" else 8000
    names: dict[str, Any] = dict(GIVEN)
    for block in blocks_of(document):
        where = f"{document.name}:{block.line}"
        if block.language == "python":
            text = block.text
            for old, new in (PYTHON | {":8000": f":{port}"}).items():
                text = text.replace(old, new)
            tree = compile("\n" * block.line + text, str(document), "exec", dont_inherit=True)
            if block.reason is None:
                exec(tree, names)  # its own line is in the traceback
        elif block.language == "yaml" and block.reason is None:
            (folder / "block.yaml").write_text(block.text)
            read_config(folder / "block.yaml", output=folder / "run")
        elif block.language in ("bash", "sh", "console"):
            for words in commands_of(block):
                cli_arguments(words, where)
            if block.reason is not None:
                continue
            text = block.text
            for pattern, new in SHELL.items():
                text = re.sub(pattern, new, text, flags=re.MULTILINE)
            done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, cwd=folder)
            assert done.returncode == 0, f"{where}:\n{text}\n{done.stderr}"


def cli_arguments(words: list[str], where: str) -> None:
    try:
        cli._make_parser().parse_args(words)
    except SystemExit as end:
        if end.code != 0:
            pytest.fail(f"{where}: based {shlex.join(words)}")


def test_every_reason_is_one() -> None:
    for document in DOCUMENTS:
        assert document.read_text().count("<!-- not run:") == sum(b.reason is not None for b in blocks_of(document))


def test_there_are_examples() -> None:
    run = [b.language for document in DOCUMENTS for b in blocks_of(document) if b.reason is None]
    assert run.count("python") >= 3 and run.count("bash") >= 6 and run.count("yaml") >= 1
    assert ast.parse("\n".join(b.text for b in blocks_of(ROOT / "README.md") if b.language == "python"))
