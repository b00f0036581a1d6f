"""GPT-2's tokenizer of 50,257 tokens, which the published models use: as a user has it, in a tokenizer.json."""

import subprocess
import sys
from pathlib import Path

import based
from tokenizers import Tokenizer

TEXT = (
    "It's the state, isn't it?  Two  spaces,\ttabs\n\n\nlines; 1234567 3.14 US$5\r\n"
    "Grüße, 世界 🙂 👩‍👩‍👧 naïve Ελλάδα русский עברית\u00a0\u200b\ufeff <|endoftext|> def f(x):\n    return x**2\n"
)


def run(*args: str, stdin: str) -> str:
    command = [sys.executable, "-m", "based.cli", "tokenize", *args, "-f", "-"]
    return subprocess.run(command, input=stdin.encode(), capture_output=True, check=True).stdout.decode()


def test_tokenize_is_the_tokenizers_own(gpt2_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(gpt2_tokenizer))
    text = TEXT + Path(based.__file__).read_text() + (Path(__file__).parents[2] / "docs" / "decisions.md").read_text()
    ids = [int(word) for word in run("--tokenizer", str(gpt2_tokenizer), stdin=text + "\n").split()]
    assert ids == tokenizer.encode(text).ids and 50256 in ids and max(ids) == 50256
    back = run("--tokenizer", str(gpt2_tokenizer), "--decode", stdin=" ".join(map(str, ids)))
    assert back == text + "\n"


def test_known_ids(gpt2_tokenizer: Path) -> None:
    assert run("--tokenizer", str(gpt2_tokenizer), stdin="Hello, world!").split() == ["15496", "11", "995", "0"]
