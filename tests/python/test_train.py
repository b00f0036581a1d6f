"""`based train`: configurations, packed documents, the loop, and runs that are killed, stopped, or go wrong."""

import csv
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import cli, sizes
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")
torch.set_num_threads(1)  # tensors are small here, and a thread that waits for its turn stops all

from based.torch import BasedForCausalLM
from based.torch.train import Meter, Result, data, loop, read_config, tokens, train, training_checkpoint
from based.torch.train.config import Config, tables
from based.torch.train.data import Dataset, Windows, pack, validation_windows
from based.torch.train.tokens import byte_tokenizer, make_encoder

ROOT = Path(__file__).parents[2]
END = 256
BASE: dict[str, Any] = {
    "output": "run",
    "model": {"layers": "cLW", "hidden_size": 16, "num_heads": 2, "inner_size": 24, "window": 9, "feature_dim": 4},
    "data": {"tokenizer": "bytes", "sequence_length": 33, "train": [{"text": "*.txt"}], "validation_fraction": 0.3},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "training": {"steps": 6, "batch_size": 4, "precision": "float32", "device": "cpu"},
    "checkpoint": {"every": 3},
}


def words(seed: int, count: int = 60) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(["alpha", "beta", "gamma", "délta"]) for _ in range(count))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """BASE in a folder with eight documents."""
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text(words(index))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def run(path: Path, *sets: str, output: Path | None = None, **options: Any) -> Result:
    return train(read_config(path, sets, output), **options)


def losses(output: Path) -> list[list[str]]:
    """Step, loss, norm and rate of every step, as text."""
    with (output / "train.csv").open() as file:
        return [row[:4] for row in csv.reader(file)][1:]


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: array.copy()
        for name, array in based._core.SafetensorsFile(directory / "model.safetensors").tensors().items()
    }


def assert_same_run(a: Path, b: Path, step: int = 6) -> None:
    """Weights, moments and losses, bit for bit."""
    assert losses(a) == losses(b)
    for file in ("model.safetensors", "optimizer.safetensors"):
        left, right = ((x / "checkpoints" / f"step-{step:09d}" / file).read_bytes() for x in (a, b))
        assert left == right, file
    assert (a / "validation.csv").read_text() == (b / "validation.csv").read_text()


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does something in the update after `step` others, before it changes a weight."""
    update = torch.optim.AdamW.step

    def patched(self: Any) -> None:
        if max((int(state["step"]) for state in self.state.values()), default=0) == step:
            action()
        update(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", patched)


class Broken(Exception):  # noqa: N818
    pass


def stop_with(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# ---- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ("training.step=3", "training.step: unknown key, expected one of steps, batch_size"),
        ("speed=3", "speed: unknown key, expected one of output, model"),
        ("training.steps=many", 'training.steps: found "many", expected an integer'),
        ("training.steps=2.5", "training.steps: found 2.5, expected an integer"),
        ("training.steps=true", "training.steps: found true, expected an integer"),
        ("training.steps=0", "training.steps: found 0, expected an integer ≥ 1"),
        ("training.steps=", "training.steps: found nothing, expected an integer"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: found Infinity, expected a number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: found 0.0, expected a number > 0"),
        ("optimizer.beta2=1", "optimizer.beta2: found 1.0, expected a number ≤ 0.999999"),
        ("optimizer.min_learning_rate=1", "optimizer.min_learning_rate: found 1, expected at most learning_rate, 0.01"),
        ("optimizer.warmup_steps=7", "optimizer.warmup_steps: found 7, expected at most training.steps, 6"),
        ("training.precision=int8", 'training.precision: found "int8", expected auto or bfloat16 or float32'),
        ("training.device=tpu", "training.device: found 'tpu', expected auto, cpu, cuda or cuda:N"),
        ("training.deterministic=1", "training.deterministic: found 1, expected true or false"),
        (
            "training.micro_batch_size=3",
            "training.batch_size: found 4, expected a multiple of 1 processes · micro_batch_size 3",
        ),
        ("training.micro_batch_size=8", "training.batch_size: found 4, expected a multiple of 1 processes"),
        ("optimizer=fast", 'optimizer: found "fast", expected keys and values'),
        ("model.size=360m", "model: found size and layers, expected size, from, or a shape"),
        ("model={}", "model: found none of them, expected size, from, or a shape"),
        ("model={size: 2m}", "model.size: found '2m', expected one of tiny"),
        ("model.layers=cLX", "model.layers: found 'cLX', expected letters c, L, W"),
        ("model.inner_size=", "model.inner_size: missing"),
        ("model.window=", "model.window: missing, and layers has W"),
        ("model.layers=cP", "model.layers: found 'cP', expected letters c, L, W"),
        ("model.layers=Y", "model.max_length: missing, and layers has Y"),
        (
            "model={layers: M, hidden_size: 16, num_heads: 2, inner_size: 24, conv_size: 20}",
            "a multiple of a head's size",
        ),
        ("model.num_heads=3", "model.num_heads: found 3, expected a divisor of hidden_size 16"),
        ("model.vocab_size=99", "model.vocab_size: found 99, expected none: the tokenizer says 257"),
        ("model={from: x, special_initializer: true}", "model.special_initializer: found beside from"),
        ("data.tokenizer=", "data.tokenizer: missing, expected bytes, a tokenizer.json, or none"),
        ("data.tokenizer=none", "data.tokenizer: found none, expected bytes or a tokenizer.json"),
        ("data.tokenizer=absent.json", "absent.json"),
        ("data.train=[]", "data.train: found an empty list, expected sources"),
        ("data.train=x", 'data.train: found "x", expected a list'),
        ("data.train=[{}]", "data.train[0]: found none, expected one of text, jsonl, tokens"),
        ("data.train=[{text: a, jsonl: b}]", "data.train[0]: found text and jsonl, expected one of"),
        ("data.train=[{text: []}]", "data.train[0].text: found an empty list, expected paths"),
        ("data.train=[{text: [3]}]", "data.train[0].text[0]: found 3, expected a text"),
        ("data.train=[{text: '*.txt', field: x}]", "data.train[0].field: found beside text, expected with jsonl only"),
        ("data.train=[{text: '*.txt', separator: ''}]", "data.train[0].separator: found an empty text"),
        ("data.train=[{text: '*.txt', weight: 0}]", "data.train[0].weight: found 0.0, expected a number > 0"),
        ("data.train=[{text: a, weight: 1}, {text: b}]", "data.train[1].weight: missing; either all sources have one"),
        ("data.validation=[{text: a, weight: 1}]", "data.validation[0].weight: found, expected in data.train only"),
        ("data.validation=[{text: a}]", "data.validation_fraction: found beside data.validation"),
        ("data.train.1.weight=2", "--set data.train.1.weight: there is no '1' in data.train"),
        ("training.steps.x=2", "--set training.steps.x: there is no 'x' in training.steps"),
        ("training", "--set training: expected KEY.PATH=VALUE"),
        ("training.steps=[", "--set training.steps: line 1: not YAML"),
        ("output=", "output: missing, expected the folder of the run"),
    ],
)
def test_bad_configurations(config: Path, setting: str, fragment: str) -> None:
    with pytest.raises((based.FormatError, OSError)) as error:
        run(config, setting)
    assert fragment in str(error.value)
    assert not (config.parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: [1", "line 1: not YAML"),
        ("training:\n  steps: 1\n  steps: 2\n", "line 3: not YAML: key 'steps' twice"),
        ("", "model: missing"),
        ("- 1", "the file: found [1], expected keys and values"),
        ("model: &a [*a]", "model: found"),
        (b"\xff", "not YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str | bytes, fragment: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(based.FormatError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ") and fragment in str(error.value)


NESTED = "output: [&a [1,1,1,1,1,1,1,1,1,1]" + "".join(
    f", &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(8)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 10)}]}}\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (NESTED + "]", "output: found [[1, 1, 1, 1"),  # ten to the power of nine numbers, written out
        (MERGED, "key"),  # an unknown one; "more than 10000 keys" with a PyYAML that keeps what << adds twice
        ("? [a, b]\n: 1", "a key is a list or a mapping, expected a name"),
        ("model: !!map foo", 'line 1: not YAML: found "foo", expected keys and values'),
        ("training: {steps: 2020-13-45}", 'training.steps: found "2020-13-45", expected an integer'),
        (
            "training: {steps: 2020-01-01T99:00:00Z}",
            'training.steps: found "2020-01-01T99:00:00Z", expected an integer',
        ),
        ("training: {steps: !!int x}", "line 1: not YAML: steps: \"x\" is not of the type 'int'"),
        ('training: {steps: !!int ""}', "steps: \"\" is not of the type 'int'"),
        ("training: {steps: !!float x}", "steps: \"x\" is not of the type 'float'"),
        ("training: {steps: !!bool x}", "steps: \"x\" is not of the type 'bool'"),
        ("training: {steps: !!timestamp x}", "steps: \"x\" is not of the type 'timestamp'"),
        ("training: {steps: [1], batch_size: !!int x}", "batch_size: "),
        ("training: {steps: !!python/name:os.system x}", "steps: could not determine a constructor"),
        ("training: {steps: " + "1" * 5000 + "}", 'steps: "1111'),
        ("training: {steps: 1, batch_size: 1, seed: 0x" + "f" * 5000 + "}", "training.seed: found "),
        ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "optimizer.learning_rate: found 1000"),
        ("training: {steps: 010}", "steps: YAML reads 010 as 8, in base 8: write 8 for that number, 10 for another"),
        ("training: {steps: 1:30}", "steps: YAML reads 1:30 as 90, in base 60"),
        ("training: {steps: 1:30.5}", "steps: YAML reads 1:30.5 in base 60"),
        ('"\\e[31mX": 1', "\\x1b[31mX: unknown key"),
        ("a: b\n" * 300000, "expected at most 1048576"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_is_no_configuration(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    sections = {
        "model": "{}",
        "data": "{sequence_length: 9, train: []}",
        "optimizer": "{learning_rate: 1}",
        "training": "",
    }
    filled = text + "".join(f"\n{k}: {v}" for k, v in sections.items() if not text.startswith((k, '"', "?", "a:")))
    path.write_text(filled)
    with pytest.raises(based.FormatError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ") and fragment in str(error.value)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()


def test_a_date_is_a_text(config: Path) -> None:
    assert read_config(config, ["output=2020-01-01"]).output == "2020-01-01"


def test_numbers_paths_and_settings(config: Path) -> None:
    read = read_config(config, ["optimizer.learning_rate=1e-4", "optimizer.clip_norm=", "data.train.0.exclude=[1.txt]"])
    assert read.optimizer.learning_rate == 1e-4 and read.optimizer.clip_norm is None
    assert read.data.train[0].text == ("*.txt",) and read.data.train[0].exclude == ("1.txt",)
    assert read.output_folder() == config.parent / "run"
    assert read_config(config, output=Path("elsewhere")).output_folder() == Path("elsewhere").absolute()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations(path: Path) -> None:
    read = read_config(path, output=Path("x"))
    assert read.training.batch_size % (read.training.micro_batch_size or 1) == 0
    if read.model.from_ is not None:
        before = read_config(path.parent / f"{Path(read.model.from_).parent.name}.yaml")
        assert read.path(read.model.from_).resolve() == (before.output_folder() / "model").resolve()
        return
    shape = loop.model_config(read.model, 257 if read.data.tokenizer == "bytes" else 50257, 256)
    if read.model.size is not None:
        assert shape.layers == sizes.named_config(read.model.size).layers
    else:
        assert 5e6 <= shape.num_parameters <= 10e6
        assert {type(mixer).__name__ for mixer in shape.layers} == {
            "GatedConvConfig",
            "LinearAttentionConfig",
            "SlidingWindowConfig",
        }


@pytest.mark.parametrize("letter", sorted(set(sizes.LETTERS) - {"P"}))
def test_a_letter_of_each_kind_trains(config: Path, letter: str) -> None:
    """And what it saves is read by the runtime, which predicts as the training does."""
    sets = (f"model.layers=c{letter}", "model.max_length=40", "training.steps=3", "checkpoint.dtype=float32")
    result = run(config, *sets)
    runtime, trained = based.load(result.model, device="cpu"), BasedForCausalLM.load(result.model)
    assert [mixer.letter for mixer in runtime.config.layers] == ["c", letter]
    ids = np.frombuffer(words(3).encode()[:30], np.uint8).astype(np.int64)
    with torch.no_grad():
        expected = trained(torch.from_numpy(ids)[None])[0, :, : runtime.config.vocab_size].numpy()
    assert np.abs(runtime.forward(ids) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_there_are_ready_configurations() -> None:
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert names == {"based-360m", "based-1.3b", "based-bytes", "based-bytes-anneal"}


def test_the_document_shows_every_key() -> None:
    assert tables() in (ROOT / "docs" / "training.md").read_text()


# ---- documents -------------------------------------------------------------------------------------------------------


def packed(config: Config, folder: Path) -> Dataset:
    encoder = make_encoder(config)
    size, end = (encoder.vocab_size, encoder.end_token_id) if encoder else (257, END)
    return pack(config, folder, encoder, size, end, lambda _: None)


def documents(dataset: Dataset, stream: Any) -> list[bytes]:
    tokens = dataset.open(stream)
    assert tokens[-1] == END and len(tokens) == stream.tokens
    ends = np.flatnonzero(tokens == END)
    return [bytes(part[part != END].astype(np.uint8)) for part in np.split(tokens, ends[:-1] + 1)]


def test_all_kinds_of_sources_give_the_same_tokens(config: Path) -> None:
    folder = config.parent
    texts = [(folder / f"{i}.txt").read_text() for i in range(8)]
    (folder / "all.sep").write_text("\0\0".join(texts).replace("\0\0", "<sep>"))
    (folder / "all.jsonl").write_text("\n\n".join(json.dumps({"body": t}) for t in texts) + "\n")
    ids = np.concatenate([[*text.encode(), END] for text in texts])
    np.save(folder / "all.npy", ids.astype(np.uint16))
    ids[:-1].astype("<u4").tofile(folder / "all.bin")  # the last end may be missing
    seen = []
    for source in (
        "{text: '*.txt'}",
        "{text: all.sep, separator: <sep>}",
        "{jsonl: all.jsonl, field: body}",
        "{tokens: all.npy}",
        "{tokens: all.bin, dtype: uint32}",
    ):
        read = read_config(config, [f"data.train=[{source}]", "data.validation_fraction=0"])
        dataset = packed(read, folder / "data")
        assert documents(dataset, dataset.train[0]) == [text.encode() for text in texts]
        assert dataset.train[0].documents == 8 and dataset.validation is None
        assert dataset.train[0].nbytes == (None if "tokens" in source else len(ids) - 8)
        seen.append((dataset.content, dataset.train[0].sha256))
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{text: 't/**/*.txt'}", "ab"),
        ("{text: 't/**/*.txt', exclude: t/held-out}", "a"),
        ("{text: 't/**/*.txt', exclude: t/held-out/}", "a"),
        ("{text: 't/**/*.txt', exclude: 't/held-out/**'}", "a"),
        ("{text: 't/**/*.txt', exclude: '**/b.txt'}", "a"),
        ("{text: 't/**/*.txt', exclude: '../{}/t/held-out/*.txt'}", "a"),
        ("{text: '../{}/t/**/*.txt', exclude: t/held-out/b.txt}", "a"),
        ("{text: 't/**', exclude: t/a.txt}", "b"),
        ("{text: ['t/**', 't/a.txt']}", "ab"),
    ],
)
def test_files_of_a_source(config: Path, source: str, expected: str) -> None:
    folder = config.parent
    (folder / "t" / "held-out").mkdir(parents=True)
    (folder / "t" / "a.txt").write_text("a")
    (folder / "t" / "held-out" / "b.txt").write_text("b")
    read = read_config(config, [f"data.train=[{source.replace('{}', folder.name)}]", "data.validation_fraction=0"])
    for links in ({}, {"t/self": ".", "t/more": ".", "t/twin.txt": "a.txt"}):
        for name, target in links.items():
            (folder / name).symlink_to(target)
        if links:
            os.link(folder / "t" / "a.txt", folder / "t" / "z-hard.txt")
            os.link(folder / "t" / "held-out" / "b.txt", folder / "t" / "y-hard.txt")
        dataset = packed(read, folder / "data")
        assert sorted(documents(dataset, dataset.train[0])) == [letter.encode() for letter in expected]


@pytest.mark.parametrize("pattern", ["t/**/*.txt", "t/*/*.txt", "t/a/*.txt"])
def test_links_that_lead_nowhere(config: Path, pattern: str) -> None:
    folder = config.parent
    (folder / "t" / "a").mkdir(parents=True)
    (folder / "t" / "a" / "a.txt").write_text("a")
    for place in ("t", "t/a"):  # none of which matches
        (folder / place / "loop").symlink_to("loop")
        (folder / place / "dead").symlink_to("nothing")
    source, whole = f"text: '{pattern}'", ["data.validation_fraction=0"]
    dataset = packed(read_config(config, [f"data.train=[{{{source}}}]", *whole]), folder / "data")
    assert documents(dataset, dataset.train[0]) == [b"a"]
    for name, target in (("dead.txt", "nothing"), ("loop.txt", "loop.txt")):
        (folder / "t" / "a" / name).symlink_to(target)
        with pytest.raises(based.FormatError) as error:
            packed(read_config(config, [f"data.train=[{{{source}}}]", *whole]), folder / "data")
        found = f"data.train[0].text: {folder}/t/a/{name} is a link to {target}, which leads to no file"
        assert f"{found}, expected a file: leave it out by exclude" in str(error.value)
        left_out = f"data.train=[{{{source}, exclude: '**/{name}'}}]"
        dataset = packed(read_config(config, [left_out, *whole]), folder / "data")
        assert documents(dataset, dataset.train[0]) == [b"a"]
        (folder / "t" / "a" / name).unlink()


@pytest.mark.parametrize("pattern", ["t/heldout/**", "b.txt", "t", "missing.txt", "elsewhere/*"])
def test_an_exclude_that_leaves_out_nothing(config: Path, pattern: str) -> None:
    folder = config.parent
    (folder / "t").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "c.txt").write_text("c")
    read = read_config(config, [f"data.train=[{{text: '*.txt', exclude: ['0.txt', '{pattern}']}}]"])
    with pytest.raises(based.FormatError) as error:
        packed(read, folder / "data")
    assert f"data.train[0].exclude[1]: {folder / pattern} leaves out none of the 8 files" in str(error.value)


@pytest.mark.parametrize(
    ("train", "validation", "fragment"),
    [
        ("[{text: '*.txt'}]", "[{text: 3.txt}]", "data.validation[0]: {}/3.txt is also in data.train[0]"),
        ("[{text: '*.txt'}]", "[{text: link.txt}]", "data.validation[0]: {}/link.txt is also in data.train[0]"),
        ("[{text: '*.txt'}]", "[{text: hard.data}]", "data.validation[0]: {}/hard.data is also in data.train[0]"),
        ("[{text: '*.txt'}]", "[{text: 3.txt, separator: a}]", "is also in data.train[0]"),
        ("[{text: [1.txt, 2.txt]}, {text: 2.txt}]", "[]", "data.train[1]: {}/2.txt is also in data.train[0]"),
    ],
)
def test_a_file_of_two_sources(config: Path, train: str, validation: str, fragment: str) -> None:
    (config.parent / "link.txt").symlink_to("3.txt")
    os.link(config.parent / "3.txt", config.parent / "hard.data")
    sets = ["data.validation_fraction=0", f"data.train={train}", f"data.validation={validation}"]
    with pytest.raises(based.FormatError) as error:
        packed(read_config(config, sets), config.parent / "data")
    assert fragment.format(config.parent) in str(error.value)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_fraction_is_never_nothing_and_never_all(config: Path, fraction: float, count: int, weighted: bool) -> None:
    """At least one document is held out, or the end of the only one; every source keeps one."""
    folder = config.parent
    for seed in range(4):
        texts = [words(seed * 100 + i, 50) for i in range(count)]
        for i, text in enumerate(texts):
            (folder / f"{i}.part").write_text(text)
        names = [f"{i}.part" for i in range(count)]
        sources = [{"text": [name], "weight": 1} for name in names] if weighted else [{"text": names}]
        read = read_config(config, [f"data.train={json.dumps(sources)}", f"data.validation_fraction={fraction}"])
        dataset = packed(read, folder / "data")
        assert dataset.validation is not None and dataset.validation.documents >= 1
        assert all(stream.documents >= 1 for stream in dataset.train)
        train = [text for stream in dataset.train for text in documents(dataset, stream)]
        held_out = documents(dataset, dataset.validation)
        assert dataset.validation.nbytes == sum(map(len, held_out))
        whole = sorted(text.encode() for text in texts)
        if len(train) + len(held_out) == count:
            assert sorted(train + held_out) == whole
        else:
            (end,) = held_out
            assert (weighted or count == 1) and len(train) == count
            assert any(sorted([*train[:i], train[i] + end, *train[i + 1 :]]) == whole for i in range(count))
            assert len(end) == pytest.approx(max(1, fraction * len(texts[0])), abs=0.2 * len(texts[0]) * fraction + 2)


def test_a_long_document_is_packed_in_pieces(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size of blocks: the same tokens, with separators and characters across their borders."""
    folder = config.parent
    rng = random.Random(0)
    texts = ["".join(rng.choice("ab é\n\U0001f600") for _ in range(n)) for n in (1000, 0, 1, 700, 33)]
    texts = [re.sub(r"\n+", "\n", text).strip("\n") for text in texts]
    (folder / "all.sep").write_bytes("\n\n".join(texts).encode())
    (folder / "crlf.sep").write_bytes("\ufeff".encode() + "\r\n\r\n".join(texts).encode())
    expected = [text.encode() for text in texts if text]
    for read_size, piece in ((1, 7), (2, 50), (64, 10), (1 << 20, 1 << 18)):
        monkeypatch.setattr(data, "_READ", read_size)
        monkeypatch.setattr(data, "_PIECE", piece)
        monkeypatch.setattr(data, "_BATCH", 2 * piece)
        for name in ("all.sep", "crlf.sep"):
            sets = [f'data.train=[{{text: {name}, separator: "\\n\\n"}}]', "data.validation_fraction=0"]
            dataset = packed(read_config(config, sets), folder / f"data-{read_size}-{name}")
            assert documents(dataset, dataset.train[0]) == expected
            assert dataset.train[0].nbytes == sum(map(len, expected))


def test_packing_takes_little_memory(config: Path) -> None:
    """Of a document of 8 MB, with a tokenizer that merges. Each of its threads has memory of its own: take two."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = config.parent
    (folder / "long.text").write_text("lorem ipsum dolor " * (8_000_000 // 18))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<|endoftext|>"])
    tokenizer.train_from_iterator(["lorem ipsum dolor"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    program = """
import sys
from pathlib import Path
from based.torch.train.config import read_config
from based.torch.train.data import pack
from based.torch.train.tokens import make_encoder
config = read_config(Path(sys.argv[1]), sys.argv[2:])
encoder = make_encoder(config)
def peak():  # of this program alone: ru_maxrss begins with that of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
before = peak()
pack(config, config.folder / "data", encoder, encoder.vocab_size, encoder.end_token_id, lambda _: None)
print(peak() - before)
"""
    for tokenizer_name in ("bytes", "tokenizer.json"):
        sets = [f"data.tokenizer={tokenizer_name}", "data.train=[{text: long.text}]", "data.validation_fraction=0"]
        done = subprocess.run(
            [sys.executable, "-c", program, str(config), *sets],
            env=os.environ | {"RAYON_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 300_000, tokenizer_name  # kB; whole, the document takes 1.7 GB


def test_bad_documents_can_be_left_out(config: Path) -> None:
    folder = config.parent
    (folder / "a.bad").write_bytes(b"x" * 100 + b"\xff")
    (folder / "b.bad").write_bytes(b"y\0")
    (folder / "c.bad").write_bytes(b"\xef\xbb\xbfgood")
    (folder / "d.lines").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n{"text": 3}\n{"text": "\\u0000"}\nx\n{"text": "two"}\n'
    )
    notes: list[str] = []
    read = read_config(
        config,
        [
            "data.train=[{text: '*.bad'}, {jsonl: d.lines}]",
            "data.validation_fraction=0",
            "data.skip_bad_documents=true",
        ],
    )
    encoder = make_encoder(read)
    assert encoder is not None
    dataset = pack(read, folder / "data", encoder, 257, END, notes.append)
    assert documents(dataset, dataset.train[0]) == [b"good", b"one", b"two"]
    assert "5 documents left out, which are not what they are said to be" in notes


def test_ids_that_end_documents(config: Path) -> None:
    folder = config.parent
    np.save(folder / "ids.npy", np.array([1, 3, 3, 5, 2, 4, 2], np.uint16))
    shape = "model={layers: c, hidden_size: 16, num_heads: 2, inner_size: 24, vocab_size: 4}"
    sets = [
        "data.tokenizer=none",
        "data.train=[{tokens: ids.npy}]",
        "data.validation_fraction=0",
        "data.sequence_length=2",
    ]
    np.save(folder / "twice.npy", np.array([1, 3, 3, 2], np.uint16))
    with pytest.raises(based.FormatError, match=r"twice.npy: id 3 stands twice in a row, at 1\. .* data.end_token_id"):
        run(config, *sets, shape, "data.train=[{tokens: twice.npy}]")
    shape = shape.replace("vocab_size: 4", "vocab_size: 6")
    run(config, *sets, shape, "data.end_token_id=2", "training.steps=2")
    dataset_folder = next(path for path in (folder / "run" / "data").iterdir())
    assert np.fromfile(dataset_folder / "train-0.bin", np.uint16).tolist() == [1, 3, 3, 5, 2, 4, 2]
    assert based.load(folder / "run" / "model").config.eos_token_id == 2
    for setting, fragment in (
        ("data.end_token_id=6", r"data.end_token_id: found 6, expected an id in \[0, 6\)"),
        ("data.end_token=</s>", "data.end_token: found beside tokenizer none, expected data.end_token_id"),
    ):
        with pytest.raises(based.FormatError, match=fragment):
            run(config, *sets, shape, setting, restart=True)
    with pytest.raises(based.FormatError, match=r"data.end_token_id: found, expected with tokenizer none only"):
        run(config, "data.end_token_id=3")


@pytest.mark.parametrize(
    ("source", "files", "fragment"),
    [
        ("{text: a}", {"a": b""}, "data.train[0]: no documents: {}/a is empty"),
        ("{text: [a, b]}", {"a": b"", "b": b""}, "data.train[0]: no documents: 2 files, all empty"),
        ("{text: '*.none'}", {}, "data.train[0].text: no file matches {}/*.none"),
        ("{text: .}", {}, "data.train[0].text: {} is a folder, expected files: ./** is all in it"),
        ("{text: a}", {"a": b"\x1f\x8b\x08"}, "{}/a: compressed by gzip, expected text: unpack it first"),
        (
            "{jsonl: a}",
            {"a": b"\x1f\x8b\x08"},
            "{}/a:1: byte 1 is not UTF-8 (invalid start byte), expected text; is it",
        ),
        ("{jsonl: a}", {"a": b'{"text": "x\\u0000"}'}, "{}/a:1: character 1 of the text is zero, expected text"),
        ("{text: a}", {"a": b"x" * (1 << 20) + b"\xc3"}, "{}/a: byte 1048576 is not UTF-8 (unexpected end of data)"),
        ("{text: a, exclude: '?'}", {"a": b"x"}, "data.train[0].text: no file matches {}/a and no exclude"),
        ("{text: a}", {"a": b"abc\xff"}, "{}/a: byte 3 is not UTF-8 (invalid start byte), expected text"),
        ("{text: a}", {"a": b"\x7fELF\0\0"}, "{}/a: byte 4 is zero, expected text"),
        (
            "{jsonl: a}",
            {"a": b'{"text": "x"}\n{"text": 3}'},
            "{}/a:2: found int, expected an object with a text at 'text'",
        ),
        ("{jsonl: a}", {"a": b'{"body": "x"}'}, "{}/a:1: found no such key, expected an object with a text at 'text'"),
        ("{jsonl: a}", {"a": b"[]"}, "{}/a:1: found list, expected an object"),
        ("{jsonl: a}", {"a": b'\n{"text": '}, "{}/a:2: not JSON"),
        ("{jsonl: a}", {"a": b"\x80"}, "{}/a:1: byte 0 is not UTF-8"),
        ("{jsonl: a}", {"a": b'{"text": "\\ud800"}'}, "{}/a:1: the text is not Unicode"),
        ("{jsonl: a}", {"a": b'{"text": ""}\n'}, "data.train[0]: no documents: {}/a is empty"),
        ("{tokens: a.npy}", {"a.npy": b"junk"}, "{}/a.npy: not an array that NumPy can map"),
        (
            "{tokens: a.npy}",
            {"a.npy": np.zeros((2, 2), np.uint16)},
            "{}/a.npy: found uint16 (2, 2), expected uint16 or",
        ),
        ("{tokens: a.npy}", {"a.npy": np.zeros(2, np.int64)}, "{}/a.npy: found int64 (2,), expected uint16 or"),
        (
            "{tokens: a.npy}",
            {"a.npy": np.array([1, 257], np.uint16)},
            "{}/a.npy: token 1 is 257, expected ids in [0, 257)",
        ),
        ("{tokens: a.npy}", {"a.npy": np.array([], np.uint16)}, "data.train[0]: no documents: {}/a.npy is empty"),
        ("{tokens: a.npy}", {"a.npy": np.array([END], np.uint16)}, "data.train[0]: no documents: {}/a.npy is empty"),
        ("{tokens: a.bin}", {"a.bin": b"1234"}, "{}/a.bin: a .bin file says nothing of its numbers"),
        ("{tokens: a.bin, dtype: uint32}", {"a.bin": b"12345"}, "{}/a.bin: 5 bytes, expected a multiple of 4"),
        ("{tokens: a.bin, dtype: uint32}", {"a.bin": b""}, "data.train[0]: no documents: {}/a.bin is empty"),
        ("{tokens: a.txt}", {"a.txt": b"1 2"}, "{}/a.txt: found .txt, expected .npy or .bin"),
        ("{text: a}", {"a": b"x" * 20}, "data.train: 21 tokens, expected at least sequence_length, 33"),
    ],
)
def test_bad_data(config: Path, source: str, files: dict[str, Any], fragment: str) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (config.parent / name).write_bytes(content)
        else:
            np.save(config.parent / name, content)
    with pytest.raises(based.FormatError) as error:
        run(config, f"data.train=[{source}]", "data.validation_fraction=0")
    assert fragment.format(config.parent) in str(error.value)
    assert not list((config.parent / "run" / "data").glob(".*"))


def test_the_split_is_by_content(config: Path) -> None:
    folder = config.parent
    for index in range(400):
        (folder / f"{index}.txt").write_text(f"document {index // 2}")  # each twice
    dataset = packed(read_config(config), folder / "data")
    assert dataset.validation is not None
    left, right = documents(dataset, dataset.train[0]), documents(dataset, dataset.validation)
    assert len(left) + len(right) == 400 and not set(left) & set(right)
    assert 80 <= len(right) <= 160
    again = packed(read_config(config, ["data.train=[{text: ['[5-9]*.txt', '[0-4]*.txt']}]"]), folder / "other")
    assert again.validation is not None
    assert set(documents(again, again.validation)) == set(right)


def test_documents_are_packed_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.parent / "data"
    first = packed(read_config(config), folder)
    monkeypatch.setattr("based.torch.train.tokens.ByteEncoder.encode", lambda *_: stop_with(Broken())())
    assert packed(read_config(config), folder) == first
    (config.parent / "3.txt").write_text("another text")
    with pytest.raises(Broken):
        packed(read_config(config), folder)
    assert [path.name for path in folder.iterdir()] == [first.folder.name]  # not lost for a failure
    monkeypatch.undo()
    (folder / ".0123456789abcdef.01234567.new").mkdir()  # as a killed process leaves it
    for stray in (".DS_Store", "README.md"):
        (folder / stray).write_text("of somebody")
    second = packed(read_config(config), folder)
    assert second.content != first.content
    assert {path.name for path in folder.iterdir()} == {second.folder.name, ".DS_Store", "README.md"}


def test_a_cut_packing_is_an_error(config: Path) -> None:
    dataset = packed(read_config(config), config.parent / "data")
    path = dataset.folder / dataset.train[0].file
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(based.FormatError, match=r"train-0.bin: \d+ bytes, expected \d+: delete "):
        packed(read_config(config), config.parent / "data")


def test_a_full_disk_while_packing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = stop_with(OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr("based.torch.train.data.sync", lambda _: full())
    with pytest.raises(OSError, match="full"):
        run(config)
    assert not list((config.parent / "run" / "data").iterdir())


@given(text=st.text(), end=st.sampled_from(["<|endoftext|>", "</s>"]))
def test_the_byte_tokenizer_is_exact(text: str, end: str) -> None:
    tokenizer = byte_tokenizer(end)
    assert tokenizer.get_vocab_size() == 257 and tokenizer.token_to_id(end) == END
    if end not in text:
        assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text + end + text).ids, skip_special_tokens=False) == text + end + text
    assert tokenizer.decode([*text.encode(), END]) == text


def test_an_end_token_in_a_text_is_text(config: Path) -> None:
    (config.parent / "tokenizer.json").write_text(byte_tokenizer("<|endoftext|>").to_str())
    for tokenizer in ("bytes", "tokenizer.json", "."):
        encoder = make_encoder(read_config(config, [f"data.tokenizer={tokenizer}"]))
        assert encoder is not None and (encoder.vocab_size, encoder.end_token_id) == (257, END)
        assert encoder.encode(["a<|endoftext|>é"])[0].tolist() == list("a<|endoftext|>é".encode())
    with pytest.raises(based.FormatError, match=r"data.end_token: .* has no token '</s>'"):
        make_encoder(read_config(config, ["data.tokenizer=tokenizer.json", "data.end_token=</s>"]))


def test_whole_documents_whatever_the_tokenizer_cuts(config: Path) -> None:
    """What is stored beside the model reads whole texts, too."""
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64, pad_id=256)
    (config.parent / "tokenizer.json").write_text(tokenizer.to_str())
    encoder = make_encoder(read_config(config, ["data.tokenizer=tokenizer.json"]))
    assert encoder is not None
    assert encoder.encode(["a" * 9])[0].tolist() == [97] * 9
    stored = json.loads(encoder.json)
    assert (stored["truncation"], stored["padding"]) == (None, None)
    direct = tokens.FileEncoder(tokenizer, "<|endoftext|>", "here")
    assert direct.json == encoder.json


# ---- windows ---------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(2, 200), length=st.integers(2, 40), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_predicts_every_token_once(tokens: int, length: int, seed: int, epoch: int) -> None:
    length = min(length, tokens)
    count = tokens // (length - 1)
    windows = Windows([np.arange(tokens)], None, length, seed).batch(epoch * count, count)
    assert ((windows[:, 1:] - windows[:, :-1]) % tokens == 1 % tokens).all()
    predicted = windows[:, 1:].flatten()
    assert len(set(predicted)) == len(predicted) > tokens - length


def test_windows_follow_from_seed_and_number() -> None:
    streams = [np.arange(1000), np.arange(5000, 5300)]
    for weights in (None, [3.0, 1.0]):
        given_streams = streams if weights else streams[:1]
        whole = Windows(given_streams, weights, 20, 7).batch(0, 4000)
        parts = [Windows(given_streams, weights, 20, 7).batch(first, 8) for first in (3200, 40, 999)]
        assert all((part == whole[first : first + 8]).all() for part, first in zip(parts, (3200, 40, 999), strict=True))
        assert not (Windows(given_streams, weights, 20, 8).batch(0, 100) == whole[:100]).all()
        epochs = [{tuple(w) for w in whole[i * 52 : i * 52 + 52].tolist()} for i in range(2)]
        assert epochs[0] != epochs[1]  # cut elsewhere


def test_weights_are_shares_of_every_round() -> None:
    streams = [np.full(500, 1), np.full(90, 2), np.full(900, 3)]
    windows = Windows(streams, [5, 3.5, 1.5], 10, 0).batch(0, 3000)[:, 0]
    for turn in windows.reshape(3, 1000):
        assert np.bincount(turn, minlength=4).tolist() == [0, 500, 350, 150]
    assert len(set(windows[:12])) > 1
    with pytest.raises(based.FormatError, match=r"data.train\[1\].weight: less than 1 / 1000"):
        Windows(streams[:2], [10000, 1], 10, 0)


def test_validation_windows() -> None:
    tokens = np.arange(101)
    windows = validation_windows(tokens, 10, None)
    predicted = [token for window in windows for token in tokens[window][1:]]
    assert predicted == list(range(1, 101))
    some = validation_windows(tokens, 10, 40)
    assert len(some) == 4 and some[0] == windows[0] and some[-1].start > 60
    assert validation_windows(tokens, 10, 1000) == windows


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_run_gives_a_model_that_the_runtime_measures_alike(config: Path) -> None:
    result = run(config, "training.steps=30", "checkpoint.dtype=float32", "checkpoint.every=10")
    output = config.parent / "run"
    rows = [[float(x) for x in row] for row in losses(output)]
    assert [row[0] for row in rows] == list(range(1, 31))
    assert rows[0][1] > 5 and rows[-1][1] < 3.2
    assert [row[3] for row in rows[:2]] == [0.005, 0.01] and rows[-1][3] < 1e-4
    assert result.model == output / "model" and result.step == result.model_step == 30

    model = based.load(result.model)
    dataset = packed(read_config(config), output / "data")
    stream = dataset.validation
    assert stream is not None and stream.nbytes is not None
    tokens = dataset.open(stream)
    scores = np.concatenate([model.score(tokens[w].astype(np.int64)) for w in validation_windows(tokens, 33, None)])
    assert len(scores) == stream.tokens - 1
    assert result.validation_loss == pytest.approx(-scores.mean(), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(-scores.mean()), abs=1e-3)
    bits = -scores.mean() / math.log(2) * len(tokens) / (len(tokens) - stream.documents)
    assert result.bits_per_byte == pytest.approx(bits, abs=1e-3)
    with (output / "validation.csv").open() as file:
        logged = list(csv.reader(file))
    assert [row[0] for row in logged] == ["step", "10", "20", "30"]
    assert [float(x) for x in logged[-1][1:]] == [result.validation_loss, result.perplexity, result.bits_per_byte]

    assert model.tokenizer is not None and model.config.eos_token_id == END
    text = model.generate("alpha b", based.SamplingParams(max_tokens=5, temperature=0))[0].outputs[0].text
    assert len(text.encode(errors="replace")) >= 5
    for saved in training_checkpoint.all_saved(output / "checkpoints"):
        assert based.load(saved.path).tokenizer is not None


def test_accumulation_is_the_large_batch(config: Path) -> None:
    whole, parts = config.parent / "whole", config.parent / "parts"
    run(config, output=whole)
    run(config, "training.micro_batch_size=1", "training.activation_checkpointing=true", output=parts)
    a, b = tensors(whole / "checkpoints/step-000000006"), tensors(parts / "checkpoints/step-000000006")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5)
    np.testing.assert_allclose(np.float64(losses(whole)), np.float64(losses(parts)), rtol=1e-5)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic(config: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    seen = []
    fail_at(monkeypatch, 0, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    run(config, f"training.deterministic={wanted}".lower(), "training.steps=2")
    assert seen == [wanted] and not torch.are_deterministic_algorithms_enabled()


def test_bfloat16_is_near(config: Path) -> None:
    run(config, output=config.parent / "a")
    run(config, "training.precision=bfloat16", output=config.parent / "b")
    a, b = (np.float64(losses(config.parent / name))[:, 1] for name in "ab")
    assert (a != b).all()
    np.testing.assert_allclose(a, b, rtol=1e-2)


def test_only_matrices_decay(config: Path) -> None:
    before = BasedForCausalLM(
        based.ModelConfig.from_json((run(config, "optimizer.learning_rate=1e-12").model / "config.json").read_text())
    )
    optimizer = loop._make_optimizer(
        before, read_config(config, ["optimizer.weight_decay=0.5"]).optimizer, torch.device("cpu")
    )
    decays = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.5 for p in group["params"]}
    others = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in before.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name and "conv.weight" not in name
        assert (id(parameter) in decays, id(parameter) in others) == (matrix, not matrix), name


def test_the_rate_warms_up_and_falls_along_a_cosine(config: Path) -> None:
    optimizer = read_config(config, ["optimizer={learning_rate: 1, min_learning_rate: 0.1, warmup_steps: 4}"]).optimizer
    rates = [loop.learning_rate(optimizer, step, 14) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates[9] == pytest.approx(0.55) and rates[14] == pytest.approx(0.1)
    assert sorted(rates[4:], reverse=True) == rates[4:]


def test_clipping(config: Path) -> None:
    """Of AdamW's update only the moments show a smaller gradient."""
    for clip in ("1e-3", ""):
        run(
            config,
            f"optimizer.clip_norm={clip}",
            "training.steps=1",
            "optimizer.warmup_steps=0",
            output=config.parent / f"clip{clip}",
        )
    norms = [float(losses(config.parent / f"clip{clip}")[0][2]) for clip in ("1e-3", "")]
    assert norms[0] == norms[1] > 0.1
    stored = [training_checkpoint.newest(config.parent / f"clip{clip}" / "checkpoints") for clip in ("1e-3", "")]
    moments = [s.tensors("optimizer.safetensors") for s in stored if s is not None]
    sums = [math.sqrt(sum(float((m[name] * 10).square().sum()) for name in m if "exp_avg." in name)) for m in moments]
    assert sums == pytest.approx([1e-3, norms[1]], rel=1e-3)


def test_from_a_model(config: Path) -> None:
    first = run(config, "checkpoint.dtype=float32")
    tuned = config.parent / "tuned"
    sets = ["model={from: run/model}", "data.tokenizer=", "training.steps=1", "optimizer.learning_rate=1e-9"]
    result = run(config, *sets, "optimizer.warmup_steps=0", "optimizer.weight_decay=0", output=tuned)
    assert result.validation_loss == pytest.approx(first.validation_loss, abs=1e-5)
    assert (tuned / "model/tokenizer.json").read_bytes() == (first.model / "tokenizer.json").read_bytes()
    tokenizer = byte_tokenizer("<|endoftext|>")
    tokenizer.add_tokens([f"word{i}" for i in range(43)])
    (config.parent / "large.json").write_text(tokenizer.to_str())
    with pytest.raises(based.FormatError, match=r"data.tokenizer: found 300 tokens, expected at most 257"):
        run(config, *sets, "optimizer.warmup_steps=0", "data.tokenizer=large.json", output=config.parent / "x")


def test_token_arrays_without_a_tokenizer(config: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 1000)
    ids[::100] = 299
    np.save(config.parent / "ids.npy", ids.astype(np.uint32))
    sets = ["data.train=[{tokens: ids.npy}]", "data.tokenizer=none", "training.steps=1", "optimizer.warmup_steps=0"]
    result = run(config, *sets, "model.vocab_size=300")
    assert result.bits_per_byte is None and result.validation_loss is not None
    model = based.load(result.model)
    assert model.tokenizer is None and (model.config.vocab_size, model.config.eos_token_id) == (300, 299)
    with pytest.raises(based.FormatError, match=r"model.vocab_size: missing"):
        run(config, *sets, output=config.parent / "x")


def test_weighted_sources_are_streams_of_their_own(config: Path) -> None:
    (config.parent / "x.md").write_text("x" * 200)
    sources = "[{text: '*.txt', weight: 1}, {text: x.md, weight: 3}]"
    sets = [f"data.train={sources}", "data.validation_fraction=0", "training.steps=25"]
    result = run(config, *sets)
    assert result.validation_loss is None and result.model_step == 25
    assert float(losses(config.parent / "run")[-1][1]) < 2.2  # most of it is x


# ---- killed, stopped, damaged ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from based.torch import BasedForCausalLM
from based.torch.train import read_config, train, training_checkpoint

def patch(owner, name, when):
    function = getattr(owner, name)
    def patched(*args, **options):
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    setattr(owner, name, patched)

point, config, output = sys.argv[1:]
if point == "step":
    patch(torch.optim.AdamW, "step", lambda self: any(state["step"] == 4 for state in self.state.values()))
elif point == "checkpoint":
    patch(training_checkpoint, "sync", lambda path: path.name == "training.json" and b'"step": 6' in path.read_bytes())
else:
    patch(BasedForCausalLM, "save", lambda model, path: (path.parent / "checkpoints/step-000000006").exists())
train(read_config(Path(config), output=Path(output)))
"""


@pytest.mark.parametrize("point", ["step", "checkpoint", "export"])
def test_a_killed_run_goes_on_bit_for_bit(config: Path, point: str) -> None:
    whole, killed = config.parent / "whole", config.parent / "killed"
    expected = run(config, output=whole)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, point, str(config), str(killed)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in (killed / "checkpoints").glob("step-*")}
    assert names == {"step-000000003"} | ({"step-000000006"} if point == "export" else set())
    result = run(config, output=killed, must_resume=True)
    assert dataclasses.replace(result, model=whole / "model") == expected
    assert_same_run(whole, killed)
    assert (whole / "model/model.safetensors").read_bytes() == (killed / "model/model.safetensors").read_bytes()
    assert not list((killed / "checkpoints").glob(".*")) and not list(killed.glob(".model*"))


@pytest.mark.parametrize(("number", "status", "step"), [(signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 3)])
def test_a_stopped_run_goes_on_bit_for_bit(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
    step: int,
) -> None:
    whole, stopped = config.parent / "whole", config.parent / "stopped"
    run(config, output=whole)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        fail_at(patch, step - 1, lambda: os.kill(os.getpid(), number))
        assert cli.main(["train", str(config), "-o", str(stopped)]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    name = signal.Signals(number).name
    assert captured.err == f"based: stopped by {name} after step {step}; the same command goes on from there\n"
    assert signal.getsignal(number) == before
    assert cli.main(["train", str(config), "-o", str(stopped), "--resume"]) == 0
    assert capsys.readouterr().out == f"{stopped / 'model'}\n"
    assert_same_run(whole, stopped)


def test_a_second_interrupt_ends_at_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    fail_at(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert [s.progress.step for s in training_checkpoint.all_saved(config.parent / "run" / "checkpoints")] == [3]


def test_a_full_disk_leaves_the_last_checkpoint(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file of the checkpoint meets it."""
    run(config, output=config.parent / "whole")
    output = config.parent / "run"
    for name in ("config.json", "training.json", "sha256.json", "model.safetensors"):
        with monkeypatch.context() as patch:

            def full(path: Path, *arguments: Any, name: str, function: Any) -> None:
                folder = output / "checkpoints"  # of the second checkpoint: the first one is there
                if path.name == name and path.parent.parent == folder and (folder / "step-000000003").exists():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                function(path, *arguments)

            for owner, function in ((training_checkpoint, "sync"), (based._core, "write_safetensors")):
                patched = functools.partial(full, name=name, function=getattr(owner, function))
                patch.setattr(owner, function, patched)
            with pytest.raises(OSError, match="No space left on device"):
                run(config)
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000000003"]
        assert based.load(output / "model").tokenizer is not None
    run(config)
    assert_same_run(config.parent / "whole", output)


def test_a_loss_that_is_not_finite(config: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"^step 2: the loss is (nan|inf), .* the checkpoint of step 1 is intact"
    ):
        run(config, "optimizer.learning_rate=1e30", "checkpoint.every=1", "data.validation_fraction=0")
    saved = training_checkpoint.newest(config.parent / "run" / "checkpoints")
    assert saved is not None and saved.progress.step == 1
    assert [row[0] for row in losses(config.parent / "run")] == ["1", "2"]


def test_a_damaged_checkpoint_is_passed_over(config: Path) -> None:
    whole, output = config.parent / "whole", config.parent / "run"
    run(config, output=whole)
    run(config)
    for name, damage in (("optimizer.safetensors", b"x"), ("training.json", b""), ("sha256.json", b"{")):
        path = output / "checkpoints/step-000000006" / name
        path.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match=f"damaged and is passed over: .*{name}"):
            run(config)
        assert_same_run(whole, output)
    for saved in (output / "checkpoints").iterdir():
        (saved / "model.safetensors").unlink()
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        pytest.raises(based.FormatError, match="every checkpoint is damaged; --restart"),
    ):
        run(config)


def test_the_last_and_the_best_are_kept(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = config.parent / "run"
    run(config, "checkpoint.every=1", "checkpoint.keep=1")
    assert [s.progress.step for s in training_checkpoint.all_saved(output / "checkpoints")] == [6]
    better = itertools.count(1)
    measure = loop._Run._validate

    def pretend(self: Any) -> None:
        """The second validation is the best one."""
        measure(self)
        self.losses[self.step] = abs(2 - next(better))

    monkeypatch.setattr(loop._Run, "_validate", pretend)
    result = run(config, "checkpoint.every=1", "checkpoint.keep=1", restart=True)
    assert [s.progress.step for s in training_checkpoint.all_saved(output / "checkpoints")] == [2, 6]
    assert (result.model_step, result.step, result.validation_loss) == (2, 6, 0)
    best = tensors(output / "checkpoints/step-000000002")
    for name, weight in tensors(result.model).items():
        assert (based._core.convert_dtype(best[name], "float32", "bfloat16") == weight).all()


def test_another_configuration_is_refused(config: Path) -> None:
    run(config, "training.steps=3")
    with pytest.raises(based.FormatError) as error:
        run(config, "training.seed=5", "optimizer.beta1=0.8", "data.sequence_length=30", "model.hidden_size=8")
    message = str(error.value)
    assert "holds a run of another configuration: model.hidden_size was 16, is 8; " in message
    assert (
        "data.sequence_length was 33, is 30; optimizer.beta1 was 0.9, is 0.8; and 2 more. Use another output, or"
        in message
    )
    sets = ["training.steps=3", "training.micro_batch_size=2", "checkpoint.keep=5", "logging.every=1"]
    assert run(config, *sets).step == 3  # which change no result
    (config.parent / "2.txt").write_text("something else, " * 9)
    with pytest.raises(based.FormatError, match=r"holds a run on other data: data.train has changed since"):
        run(config, "training.steps=3")
    assert run(config, restart=True).step == 6
    assert [row[0] for row in losses(config.parent / "run")] == list("123456")


def test_resume_wants_a_checkpoint(config: Path) -> None:
    with pytest.raises(based.FormatError, match="no checkpoint to resume from"):
        run(config, must_resume=True)


def test_one_run_at_a_time(config: Path) -> None:
    (config.parent / "run").mkdir()
    with (config.parent / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(based.FormatError, match="another process is training there"):
            run(config)


def test_a_log_that_a_kill_cut(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, output = config.parent / "whole", config.parent / "run"
    run(config, output=whole)
    with monkeypatch.context() as patch:
        fail_at(patch, 4, stop_with(Broken()))
        with pytest.raises(Broken):
            run(config, "logging.every=1")
    assert len(losses(output)) == 4
    with (output / "train.csv").open("a") as file:
        file.write("5,3.2,0.")
    run(config)
    assert_same_run(whole, output)


# ---- devices, processes, TensorBoard, the command --------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(based.UnsupportedError, match=f"training.device is {device}: PyTorch"):
            run(config, f"training.device={device}")
    monkeypatch.setenv("BASED_DEVICE", "cuda")
    with pytest.raises(based.UnsupportedError):
        run(config, "training.device=auto")
    monkeypatch.delenv("BASED_DEVICE")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["train", str(config), "--set", "training.device=auto"]) == 0
    err = capsys.readouterr().err
    assert "based: warning: training.device 'auto' is the CPU: PyTorch" in err
    assert ". Set training.device: cpu to say that this is meant.\n" in err


# ---- what may change -------------------------------------------------------------------------------------------------


def validations(output: Path) -> dict[int, float]:
    with (output / "validation.csv").open() as file:
        return {int(row[0]): float(row[1]) for row in list(csv.reader(file))[1:]}


@pytest.mark.parametrize("by", ["content", "name", "tokens"])
def test_losses_of_other_validation_documents_are_not_compared(config: Path, by: str) -> None:
    """The best checkpoint of what is measured now becomes the model, however good an older one was on other text."""
    folder = config.parent
    (folder / "easy").write_text("alpha beta gamma " * 40)
    (folder / "hard").write_text("".join(chr(33 + random.Random(i).randrange(90)) for i in range(700)))
    sets = ["data.validation_fraction=0", "checkpoint.every=2", "validation.every=2", "optimizer.warmup_steps=0"]
    run(config, *sets, "data.validation=[{text: easy}]", "training.steps=4")
    before = validations(folder / "run")
    sets += ["training.steps=8"]
    if by == "content":
        (folder / "easy").write_text((folder / "hard").read_text())
        sets.append("data.validation=[{text: easy}]")
    elif by == "name":
        sets.append("data.validation=[{text: hard}]")
    else:
        sets += ["data.validation=[{text: easy}]", "validation.tokens=40"]
    result = run(config, *sets, change=["training.steps"])
    after = validations(folder / "run")
    assert list(after) == [2, 4, 6, 8] and after[2] == before[2] and after[4] != before[4]  # measured again
    measured = {step: loss for step, loss in after.items() if step >= 4}
    assert result.model_step == min(measured, key=lambda step: measured[step])
    assert result.validation_loss == measured[result.model_step]


def test_validation_may_begin_later(config: Path) -> None:
    run(config, "data.validation_fraction=0", "training.steps=3", "data.train=[{text: '[0-6].txt'}]")
    sets = ["data.validation_fraction=0", "data.train=[{text: '[0-6].txt'}]", "data.validation=[{text: 7.txt}]"]
    result = run(config, *sets, change=["training.steps"])
    assert result.validation_loss is not None and list(validations(config.parent / "run")) == [3, 6]


def test_a_run_is_changed_on_purpose(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config)
    output = config.parent / "run"
    sets = ["training.steps=9", "optimizer.learning_rate=5e-3", "optimizer.clip_norm=0.5", "training.seed=3"]
    keys = [setting.partition("=")[0] for setting in sets]
    flags = [word for setting in sets for word in ("--set", setting)]
    assert cli.main(["train", str(config), *flags]) == 1
    message = capsys.readouterr().err
    assert "training.steps was 6, is 9" in message and all(f"--change {key}" in message for key in keys)
    flags += [word for key in keys for word in ("--change", key)]
    assert cli.main(["train", str(config), *flags, "--stats"]) == 0
    assert "from step 6 on, training.steps is 9; it was 6" in capsys.readouterr().err
    assert [int(row[0]) for row in losses(output)] == list(range(1, 10))
    rates = [float(row[3]) for row in losses(output)]
    assert rates[6:] == [
        loop.learning_rate(dataclasses.replace(read_config(config, sets).optimizer), step, 9) for step in (6, 7, 8)
    ]
    saved = training_checkpoint.newest(output / "checkpoints")
    assert saved is not None and saved.progress.step == 9
    changes = {change["key"]: (change["step"], change["was"], change["is"]) for change in saved.progress.changes}
    assert changes["training.steps"] == (6, 6, 9) and changes["optimizer.clip_norm"] == (6, 1.0, 0.5)
    assert set(changes) == set(keys)
    assert run(config, *sets).step == 9  # what was changed is now the run's
    for setting, change, fragment in (
        (
            "training.steps=4",
            ["training.steps"],
            "training.steps: found 4, expected at least 9, which the run has made",
        ),
        ("data.sequence_length=17", ["data.sequence_length"], "--change data.sequence_length: expected one of"),
        ("data.sequence_length=17", ["training.steps"], "data.sequence_length was 33, is 17"),
    ):
        with pytest.raises(based.FormatError) as error:
            run(config, *sets, setting, change=change)
        assert fragment in str(error.value)


def test_a_way_on_after_a_loss_that_is_not_finite(config: Path) -> None:
    run(config, "training.steps=2")
    rate = ["optimizer.learning_rate", "optimizer.clip_norm", "training.steps"]
    bad = ["optimizer.learning_rate=1e30", "optimizer.clip_norm=", "logging.every=1"]
    message = r"the checkpoint of step 2 is intact\. .*--change optimizer.learning_rate, or training.seed"
    with pytest.raises(FloatingPointError, match=message):
        run(config, *bad, change=rate)
    result = run(config, "optimizer.learning_rate=1e-3", "training.seed=1", change=[*rate, "training.seed"])
    assert result.step == 6 and all(math.isfinite(float(row[1])) for row in losses(config.parent / "run"))


def test_windows_of_a_loss_that_is_not_finite_are_left_out(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one window is not finite: its step is passed over, and a run that is cut there is the same."""
    culprit: list[Any] = []
    forward = BasedForCausalLM.forward

    def broken(self: Any, tokens: Any, **kwargs: Any) -> Any:
        loss = forward(self, tokens, **kwargs)
        bad = self.training and any(torch.equal(window, culprit[0]) for window in tokens)
        return loss * math.nan if bad else loss

    gather = loop._Run._gather_windows

    def remembered(self: Any, step: int) -> Any:
        windows = gather(self, step)
        if step == 4:
            culprit[:] = [windows[1].clone()]
        return windows

    monkeypatch.setattr(loop._Run, "_gather_windows", remembered)
    run(config, output=config.parent / "sound")
    monkeypatch.setattr(BasedForCausalLM, "forward", broken)
    output, whole = config.parent / "run", config.parent / "whole"
    advice = re.escape("--change training.skip_steps --set 'training.skip_steps=[5]'")
    with pytest.raises(FloatingPointError, match="^step 5: the loss is nan.*checkpoint of step 3 is intact.*" + advice):
        run(config)
    with pytest.raises(based.FormatError, match=r"skip_steps was None, is \[5\].*--change training.skip_steps"):
        run(config, "training.skip_steps=[5]")
    with pytest.raises(based.FormatError, match="a change of step 2, expected later ones than 3"):
        run(config, "training.skip_steps=[2, 5]", change=["training.skip_steps"])
    skip = ["training.skip_steps=[5]", "checkpoint.every=1"]
    assert run(config, *skip, change=["training.skip_steps"]).step == 6
    assert [int(row[0]) for row in losses(output)] == [1, 2, 3, 4, 6]
    saved = training_checkpoint.newest(output / "checkpoints")
    assert saved is not None
    assert saved.progress.changes == ({"step": 3, "key": "training.skip_steps", "was": None, "is": [5]},)

    run(config, *skip, output=whole)
    found, expected = ({row[0]: row[1:4] for row in losses(folder)} for folder in (output, whole))
    assert found == expected
    sound = {row[0]: row[1:4] for row in losses(config.parent / "sound")}
    assert all(found[step] == sound[step] for step in "1234") and found["6"] != sound["6"]
    name = "checkpoints/step-000000006/model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
    # Cut behind the step that was skipped: the optimizer's own count goes on too.
    cut = config.parent / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_finish", lambda self: (_ for _ in ()).throw(RuntimeError("cut")))
        with pytest.raises(RuntimeError, match="cut"):
            run(config, *skip, output=cut)
    shutil.rmtree(cut / "checkpoints" / "step-000000006")
    assert (cut / "checkpoints" / "step-000000005").is_dir()
    run(config, *skip, output=cut)
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_the_first_steps_may_be_skipped(config: Path) -> None:
    run(config, "training.skip_steps=[1, 2, 3]", output=config.parent / "whole")
    run(config, "training.skip_steps=[1, 2, 3]", "training.steps=3")
    run(config, "training.skip_steps=[1, 2, 3]", change=["training.steps"])
    assert [int(row[0]) for row in losses(config.parent / "run")] == [4, 5, 6]
    assert_same_run(config.parent / "whole", config.parent / "run")
    with pytest.raises(based.FormatError, match=r"skip_steps\[0\]: found 0, expected an integer ≥ 1"):
        run(config, "training.skip_steps=[0]")


def test_files_of_others_stay(config: Path) -> None:
    output = config.parent / "run"
    run(config, "training.steps=3")
    for place in ("model", "data", "checkpoints", "."):
        for name in ("README.md", ".DS_Store", ".step-x", "step-000000009", ".model.x"):
            (output / place / name).write_text(place)
    (output / "model" / "evaluation").mkdir()
    (output / "model" / "evaluation" / "a.json").write_text("{}")
    (config.parent / "9.txt").write_text(words(9))  # packed again
    (config.parent / "9.txt").unlink()
    os.utime(config.parent / "1.txt")
    assert run(config, change=["training.steps"]).step == 6
    assert run(config, restart=True).step == 6
    for place in ("data", "."):
        for name in ("README.md", ".DS_Store", ".step-x", "step-000000009", ".model.x"):
            assert (output / place / name).read_text() == place
    assert based.load(output / "model").config.hidden_size == 16


OTHERS = {
    *("model/README.md", "model/evaluation/model.safetensors", "checkpoints/notes.txt", "checkpoints/.based-notes/a"),
    *("checkpoints/step-000000003/notes.txt", "checkpoints/step-000000003/eval/a.json", "tensorboard/notes.txt"),
    *("tensorboard/mine/events.out.tfevents.1", "data/0123456789abcdef/picture.png", "notes.txt"),
}


def write_others(output: Path) -> None:
    for name in OTHERS:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(f"of others: {name}")


def assert_others_stay(output: Path) -> None:
    for name in OTHERS:
        assert (output / name).read_text() == f"of others: {name}"


def test_a_restart_where_there_is_no_run_removes_nothing(config: Path) -> None:
    output = config.parent / "run"
    write_others(output)
    assert run(config, restart=True).step == 6
    assert_others_stay(output)


def test_a_restart_removes_what_a_run_has_written(config: Path) -> None:
    output, whole = config.parent / "run", config.parent / "whole"
    run(config, "training.seed=9")
    (output / "tensorboard").mkdir()
    (output / "tensorboard" / "events.out.tfevents.1").write_text("of the run")
    write_others(output)
    assert run(config, restart=True).step == 6
    run(config, output=whole)
    assert_same_run(whole, output)
    assert_others_stay(output)
    assert not (output / "tensorboard" / "events.out.tfevents.1").exists()
    assert run(config, "training.seed=8", restart=True).step == 6
    assert_others_stay(output)


def test_what_others_put_into_a_checkpoint_stays_when_it_is_removed(config: Path) -> None:
    output = config.parent / "run"
    run(config, "training.steps=3")
    write_others(output)
    old = output / "checkpoints" / ".step-000000002.old"  # of a process that was killed
    old.mkdir()
    (old / "config.json").write_text("of the run")
    (old / "notes.txt").write_text("of others")
    sets = ["checkpoint.keep=1", "data.validation_fraction=0"]
    assert run(config, *sets, restart=True).step == 6
    assert [saved.progress.step for saved in training_checkpoint.all_saved(output / "checkpoints")] == [6]
    assert_others_stay(output)
    assert sorted(path.name for path in (output / "checkpoints" / "step-000000003").iterdir()) == ["eval", "notes.txt"]
    assert [path.name for path in (output / "checkpoints" / "step-000000002").iterdir()] == ["notes.txt"]
    assert run(config, *sets).step == 6


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["train.csv", "validation.csv", "model/model.safetensors", "model/config.json"])
def test_files_of_others_are_not_written_over(config: Path, name: str, restart: bool) -> None:
    file = config.parent / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("text,label\nmine,1\n")
    (config.parent / ".lock").write_text("mine")
    before = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    with pytest.raises(based.FormatError) as error:
        run(config, "output=.", restart=restart)
    found = "a file of another model" if "model" in name else "a file that begins with 'text,label'"
    assert f"{file}: found {found}, expected no such file" in str(error.value)
    assert f"Move it, or use another output than {config.parent}" in str(error.value)
    assert {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()} == before
    file.unlink()
    assert run(config, "output=.").step == 6 and run(config, "output=.").step == 6
    assert (config.parent / ".lock").read_text() == "mine"


def test_a_log_that_others_have_replaced(config: Path) -> None:
    run(config, "training.steps=3")
    for name in ("train.csv", "validation.csv"):
        log = (config.parent / "run" / name).read_text()
        (config.parent / "run" / name).write_text("text,label\nmine,1\n")
        with pytest.raises(based.FormatError, match=f"run/{name}: found a file that begins with 'text,label'"):
            run(config, change=["training.steps"])
        assert (config.parent / "run" / name).read_text() == "text,label\nmine,1\n"
        (config.parent / "run" / name).write_text(log)
    (config.parent / "run" / "train.csv").unlink()
    (config.parent / "run" / "train.csv").mkdir()
    with pytest.raises(based.FormatError, match=r"run/train\.csv: found a folder, expected no such file"):
        run(config, change=["training.steps"])


def test_exports_leave_a_model_card(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = config.parent / "run"
    run(config, "training.steps=3")
    (output / "model" / "README.md").write_text("card")
    (output / "model" / "evaluation").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(BasedForCausalLM, "save", lambda *_, **__: stop_with(OSError(errno.ENOSPC, "full"))())
        with pytest.raises(OSError, match="full"):
            run(config, change=["training.steps"])
    assert (output / "model" / "README.md").read_text() == "card"
    assert run(config, change=["training.steps"]).step == 6
    assert (output / "model" / "README.md").read_text() == "card" and (output / "model" / "evaluation").is_dir()
    assert not (output / ".beside-model").exists()


@pytest.mark.parametrize("fast", [False, True])
def test_precision_auto(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fast: bool
) -> None:
    """What the device is faster in; a run keeps what it began with, on whatever device it goes on."""
    monkeypatch.setattr(loop, "multiplies_bfloat16", lambda _: fast)
    precision = "bfloat16" if fast else "float32"
    assert cli.main(["train", str(config), "--stats", "--set", "training.precision=auto"]) == 0
    errors = capsys.readouterr().err
    assert f"1 × cpu in {precision}" in errors and "for 5 more steps, at " in errors
    saved = training_checkpoint.newest(config.parent / "run" / "checkpoints")
    assert saved is not None and saved.progress.config["training.precision"] == precision
    monkeypatch.setattr(loop, "multiplies_bfloat16", lambda _: not fast)
    for same in ("auto", precision):
        assert run(config, f"training.precision={same}").step == 6
    run(config, f"training.precision={precision}", output=config.parent / "named")
    assert losses(config.parent / "named") == losses(config.parent / "run")
    assert (
        read_config(config, ["training.precision=auto"]).training
        == read_config(write_without_precision(config)).training
    )


def write_without_precision(config: Path) -> Path:
    tree = yaml.safe_load(config.read_text())
    del tree["training"]["precision"]
    config.write_text(yaml.safe_dump(tree))
    return config


def template_tokenizer(path: Path, template: str) -> None:
    """A tokenizer of letters with a post-processor, which has been used with truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {
        token: i for i, token in enumerate(["<s>", "<|endoftext|>", "<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz é"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>", "<pad>", "<unk>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(token, letters[token]) for token in ("<s>", "<|endoftext|>")]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32, pad_token="<pad>", pad_id=2)
    path.write_text(tokenizer.to_str())


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A <|endoftext|>", "$A <|endoftext|>", "$A"])
def test_a_document_begins_as_a_prompt_does(config: Path, template: str) -> None:
    """With what the post-processor puts before it, and whole, whatever the tokenizer was last used for."""
    folder = config.parent
    template_tokenizer(folder / "tokenizer.json", template)
    has_start = template.startswith("<s>")
    dataset = packed(
        read_config(config, ["data.tokenizer=tokenizer.json", "data.validation_fraction=0"]), folder / "data"
    )
    tokens = dataset.open(dataset.train[0])
    begins = [0, *(np.flatnonzero(tokens == 1)[:-1] + 1)]
    assert np.array_equal(np.flatnonzero(tokens == 0), begins if has_start else [])
    assert len(begins) == 8 and not (tokens == 2).any()
    result = run(config, "data.tokenizer=tokenizer.json")
    model = based.load(result.model)
    assert model.config.bos_token_id == (0 if has_start else 1) and model.config.eos_token_id == 1
    stored = json.loads((result.model / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None
    session = model.session()
    session.prefill(["alpha beta gamma"])
    assert session.num_tokens == [has_start + len("alpha beta gamma")]
    assert model.tokenizer.encode("ab").ids == [0] * has_start + [4, 5]


def test_inductor_takes_what_a_deterministic_run_asks_of_it() -> None:
    compiled = torch.compile(lambda x: 2 * x, options={"deterministic": True})
    assert compiled(torch.ones(3)).tolist() == [2, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_on_a_gpu_a_run_goes_on_bit_for_bit(config: Path, monkeypatch: pytest.MonkeyPatch, compiled: str) -> None:
    sets = ["training.device=cuda", "training.precision=bfloat16", "model.feature_dim=16", "data.sequence_length=65"]
    sets.append(f"training.compile={compiled}")
    run(config, *sets, output=config.parent / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 4, stop_with(Broken()))
        with pytest.raises(Broken):
            run(config, *sets, output=config.parent / "again")
    run(config, *sets, output=config.parent / "again", must_resume=True)
    assert_same_run(config.parent / "whole", config.parent / "again")


@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_a_compiled_run_is_the_same_run(config: Path, monkeypatch: pytest.MonkeyPatch, deterministic: str) -> None:
    """By a backend that takes the graphs as they are; Inductor rounds otherwise."""
    torch._dynamo.reset()  # of what other tests have compiled, which counts against the limit of recompilations
    run(config, output=config.parent / "whole")
    compiled = []

    def traced(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return compile_(function, backend="aot_eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    sets = ["training.steps=6", "training.compile=true", f"training.deterministic={deterministic}"]
    run(config, *sets, output=config.parent / "again")
    # Otherwise Inductor times kernels and takes the fastest.
    timing = {"options": {"deterministic": True}} if deterministic == "true" else {}
    assert compiled == 3 * [{"fullgraph": True, "dynamic": False, **timing}]
    assert_same_run(config.parent / "whole", config.parent / "again")


def torchrun(config: Path, output: Path, *sets: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [word for setting in sets for word in ("--set", setting)]
    return subprocess.run(
        [*command, "-m", "based.cli", "train", str(config), "-o", str(output), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_share_a_batch(config: Path) -> None:
    alone, two = config.parent / "alone", config.parent / "two"
    run(config, output=alone)
    done = torchrun(config, two, "training.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{two / 'model'}\n"
    np.testing.assert_allclose(np.float64(losses(alone)), np.float64(losses(two)), atol=1e-5)
    validations = [np.loadtxt(x / "validation.csv", delimiter=",", skiprows=1) for x in (alone, two)]
    np.testing.assert_allclose(*validations, rtol=1e-5)


def test_two_processes_in_shards_go_on_with_a_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shards = config.parent / "alone", config.parent / "shards"
    run(config, output=alone)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, stop_with(Broken()))
        with pytest.raises(Broken):
            run(config, output=shards)
    done = torchrun(config, shards, "training.micro_batch_size=1", "training.parallel=fsdp")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.float64(losses(alone)), np.float64(losses(shards)), atol=1e-5)
    for file in ("model.safetensors", "optimizer.safetensors"):
        saved = [training_checkpoint.newest(x / "checkpoints") for x in (alone, shards)]
        a, b = (s.tensors(file) for s in saved if s is not None)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


def test_tensorboard(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config, "logging.tensorboard=true")
    events = EventAccumulator(str(config.parent / "run" / "tensorboard")).Reload()
    rows = losses(config.parent / "run")
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([float(row[1]) for row in rows])
    assert [e.step for e in events.Scalars("validation/bits_per_byte")] == [3, 6]


def test_tensorboard_is_missing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "based\[tensorboard\]"'):
        run(config, "logging.tensorboard=true")
    assert not (config.parent / "run").exists()


def test_yaml_is_missing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'training needs PyYAML, .*pip install "based\[train\]"'):
        read_config(config)


def test_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", str(config), "--set", "training.steps=4", "--set", "logging.every=2", "--stats", "--json"])
        == 0
    )
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["model"] == str(config.parent / "run" / "model") and record["step"] == 4
    lines = captured.err.splitlines()
    assert lines[0] == "packing documents …" and "tokens in" in lines[1]
    assert any(line.startswith("step 2/4  loss ") and "tokens/s" in line for line in lines)
    assert any(line.startswith("step 4: validation loss ") and "bits per byte" in line for line in lines)
    assert cli.main(["generate", "-m", record["model"], "--max-tokens", "3", "alpha"]) == 0


def test_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter(wanted=True)
    meter.show(5, 10, 1.5, 1234, 3700)
    meter.note("a line")
    meter.close()
    bar = "[##########..........] step 5/10  loss 1.5000  1,234 tokens/s  1:01:40 left"
    # The bar; it makes way for the line, and comes back below; its end, on a line of its own.
    assert capsys.readouterr().err == f"\r{bar}\r{' ' * len(bar)}\ra line\n\r{bar}\r{bar}\n"
    silent = Meter(wanted=False)
    silent.show(5, 10, 1.5, 1234, 3700)
    silent.note("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sets", [["--set", "training.steps=x"], ["--set", "data.train.0.text=no.txt"]])
def test_failures_of_the_command(config: Path, capsys: pytest.CaptureFixture[str], sets: list[str]) -> None:
    assert cli.main(["train", str(config), *sets]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("based: error: ") and captured.err.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from based import cli; cli.main(['train', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--restart" in done.stdout
    code = "import sys; sys.modules['torch'] = None; from based import cli; sys.exit(cli.main(['train', 'x.yaml']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "based[train]"' in done.stderr
