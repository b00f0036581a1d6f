"""Every kind of mixer: the bindings, the sizes, `based inspect` and the documents say what its description says.

`python -m tests.python.test_mixers` writes the tables of fields in docs/model-format.md anew.
"""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import cli, sizes
from based._core import MIXERS

from tests.reference import checkpoints
from tests.reference.files import read_layers, write_model

ROOT = Path(__file__).parents[2]
MODEL_FORMAT = ROOT / "docs" / "model-format.md"
STATE_FORMAT = ROOT / "docs" / "state-format.md"

HIDDEN_SIZE = 6
KINDS = pytest.mark.parametrize("kind", MIXERS, ids=lambda kind: kind.mixer)


def example(kind: Any, **values: Any) -> dict[str, Any]:
    """A layer of config.json: integers 2 (or what the model asks), reals 0.5, flags true, but for `values`."""
    layer = {"mixer": kind.mixer} | {
        field.key: HIDDEN_SIZE if field.domain == "hidden_size" else {"int": 2, "float": 0.5, "bool": True}[field.type]
        for field in kind.fields()
    }
    if "max_length" in layer:
        layer["max_length"] = 16  # the tests feed 6 tokens
    return layer | {field.key: HIDDEN_SIZE for field in kind.fields() if field.domain == "hidden_size"} | values


def config_of(*layers: dict[str, Any]) -> based.ModelConfig:
    config = sizes.recipe("c", HIDDEN_SIZE, 1, 5, vocab_size=11, end_token_id=None) | {"layers": list(layers)}
    return based.ModelConfig.from_json(json.dumps(config))


def weights_of(config: based.ModelConfig) -> dict[str, np.ndarray]:
    """Random weights by the names and shapes that the descriptions give."""
    d, mlp = config.hidden_size, config.mlp
    assert mlp is not None and mlp.gated
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.padded_vocab_size, d), "final_norm.weight": (d,)}
    for i, layer in enumerate(config.layers):
        shapes |= {f"layers.{i}.norm{n}.weight": (d,) for n in (1, 2)}
        shapes[f"layers.{i}.mlp.fc1.weight"] = (2 * mlp.inner_size, d)
        shapes[f"layers.{i}.mlp.fc2.weight"] = (d, mlp.inner_size)
        for p in layer.projections(d):
            shapes[f"layers.{i}.mixer.{p.name}.weight"] = (p.rows, p.cols)
            if p.bias:
                shapes[f"layers.{i}.mixer.{p.name}.bias"] = (p.rows,)
        shapes |= {f"layers.{i}.mixer.{p.name}": tuple(p.shape) for p in layer.parameters}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@KINDS
def test_the_bindings_know_every_field(kind: Any) -> None:
    layer = example(kind)
    (mixer,) = config_of(layer).layers
    assert type(mixer) is kind and kind.__name__ in based.__all__ and getattr(based, kind.__name__) is kind
    for field in kind.fields():
        value = getattr(mixer, field.key)
        assert type(value).__name__ == field.type and value == layer[field.key], field.key
        assert getattr(kind, field.key).__doc__ == field.meaning


@KINDS
def test_a_missing_and_a_foreign_kind_of_field_are_refused(kind: Any) -> None:
    for field in kind.fields():
        layer = example(kind)
        del layer[field.key]
        with pytest.raises(based.FormatError, match=re.escape(f"layers[0].{field.key}: found no such key")):
            config_of(layer)
        with pytest.raises(based.FormatError, match=re.escape(f"layers[0].{field.key}: found null")):
            config_of(layer | {field.key: None})


def test_every_kind_has_its_letter_in_the_recipe() -> None:
    kinds = {kind.letter for kind in MIXERS}
    assert kinds == set(sizes.LETTERS)
    for letter in kinds:
        text = json.dumps(sizes.recipe(letter, 64, 4, 20, window=5, vocab_size=9, end_token_id=None))
        assert based.ModelConfig.from_json(text).layers[0].letter == letter


@pytest.mark.parametrize(("layers", "letter"), [("u", "u"), ("cLWw", "w"), ("c ", " "), ("cLé", "é")])
def test_an_unknown_letter_is_answered_with_all_letters(layers: str, letter: str) -> None:
    with pytest.raises(ValueError, match=f"^layers: found letter '{letter}', expected letters among c, ") as error:
        sizes.recipe(layers, 64, 4, 20, vocab_size=9, end_token_id=None)
    assert str(error.value).endswith(", ".join(sizes.LETTERS))


def test_an_unknown_kind_is_answered_with_all_kinds() -> None:
    with pytest.raises(based.FormatError, match="expected one of " + ", ".join(kind.mixer for kind in MIXERS)):
        config_of({"mixer": "gru"})


@KINDS
def test_a_model_runs_and_its_sizes_are_those_told(kind: Any, tmp_path: Path, capsys: Any) -> None:
    config = config_of(example(kind), example(kind))
    weights = weights_of(config)
    write_model(tmp_path / "model", json.loads(config.to_json()), weights, "float32")
    assert cli.main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert f"{kind.letter} {kind.mixer}" in text and f"2 x {config.layers[0].summary}" in text

    model = based.load(tmp_path / "model", device="cpu")
    assert facts["num_parameters"] == model.num_parameters == sum(array.size for array in weights.values())
    assert facts["pattern"] == 2 * kind.letter
    products = sum(rows * cols for rows, cols in sizes.gemm_shapes(config))
    matrices = {n: a for n, a in weights.items() if a.ndim == 2 and re.search(r"mlp|mixer", n)}
    parameters = {f"layers.{i}.mixer.{p.name}" for i in (0, 1) for p in config.layers[i].parameters}
    assert products == sum(array.size for name, array in matrices.items() if name not in parameters)

    session = model.session()
    for count in (1, 5):  # tokens seen: before and after a ring of 2 is full
        session.reset()
        session.prefill([list(range(count))])
        session.save_state(tmp_path / "state")
        saved = read_layers(tmp_path / "state")[0]
        assert sum(bits.nbytes for _, bits in saved.values()) == sizes.state_nbytes(config, "float32", count)
        names = {n for n in saved if n.startswith("layers.1.")}
        kept = {t.name for t in config.layers[1].state if t.kind != "pending"}
        assert names == {f"layers.1.{name}" for name in kept}
    full = sizes.state_nbytes(config, "float32")
    assert facts["state_nbytes"] == {"total": full, kind.mixer: full}
    assert facts["token_nbytes"] == sizes.token_nbytes(config, "float32")
    assert full + 5 * facts["token_nbytes"] >= sizes.state_nbytes(config, "float32", 5) > 0
    if facts["token_nbytes"]:
        assert full == 0 and facts["max_context"] > 5 and model.max_context > 5
        assert sizes.state_nbytes(config, "float32", 5) <= model.state_nbytes_at(5) <= model.state_nbytes
    else:
        assert facts["max_context"] == model.max_context == config.max_tokens
        assert ("longest sequence" in text) == (config.max_tokens is not None)
        assert 0 < full <= model.state_nbytes

    other = model.session()
    other.load_state(tmp_path / "state")
    np.testing.assert_array_equal(np.asarray(other.step([3])), np.asarray(session.step([3])))


def test_the_laws_are_tested_for_every_kind() -> None:
    """By the random models of tests/reference, which compare with the float64 reference."""
    assert set(checkpoints.MIXERS) == {kind.mixer for kind in MIXERS}


@KINDS
def test_a_step_moves_at_most_the_state_twice(kind: Any) -> None:
    (mixer,) = config_of(example(kind)).layers
    whole = sizes.mixer_nbytes(mixer, "float32", 5)
    for on_gpu in (False, True):
        assert 0 < sizes.mixer_step_nbytes(mixer, "float32", 5, on_gpu=on_gpu) <= 2.5 * whole


# ---- documents -------------------------------------------------------------------------------------------------------

_EXPONENTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def field_table(kind: Any) -> str:
    """The kind's table in docs/model-format.md."""

    def power(match: re.Match[str]) -> str:
        value = int(match[0])
        exponent = value.bit_length() - 1
        return f"2{str(exponent).translate(_EXPONENTS)}" if exponent > 12 and value == 1 << exponent else match[0]

    rows = ["| key | meaning | domain |", "|---|---|---|"]
    for field in kind.fields():
        domain = re.sub(r"\d+", power, field.domain)
        rows.append(f"| `{field.key}` | {field.meaning} | {domain} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def with_field_tables(text: str) -> str:
    """The document, the table below each line that starts with a mixer's name being the description's."""
    for kind in MIXERS:
        text, count = re.subn(rf"(?m)^(`{kind.mixer}`: .*\n\n)(\|.*\n)+", lambda m, k=kind: m[1] + field_table(k), text)
        assert count == 1, f"{MODEL_FORMAT.name} has {count} tables below a line that starts with `{kind.mixer}`:"
    return text


def test_the_documented_fields_are_those_of_the_descriptions() -> None:
    text = MODEL_FORMAT.read_text(encoding="utf-8")
    assert with_field_tables(text) == text, "run python -m tests.python.test_mixers"


def with_letters(kind: Any) -> tuple[Any, dict[str, int]]:
    """A mixer whose sizes differ, and its sizes by their keys and by the letters that their meanings begin with."""
    layer = example(kind)
    primes = iter((3, 5, 7, 11, 13, 17, 19, 23))
    for field in kind.fields():
        if field.type == "int" and field.domain != "hidden_size":
            layer[field.key] = next(primes)
    for field in kind.fields():
        if field.domain.startswith("a divisor of "):
            layer[field.domain.removeprefix("a divisor of ")] *= layer[field.key]
        elif field.type == "int" and field.high is None and field.domain != "hidden_size":
            layer[field.key] = field.low
    values = {key: value for key, value in layer.items() if type(value) is int} | {"d": HIDDEN_SIZE}
    for field in kind.fields():
        if field.type == "int" and (symbol := re.match(r"([A-Za-z]|[A-Z]_\w+)(?=[,;]|$)", field.meaning)):
            values[symbol[1]] = layer[field.key]
    return config_of(layer).layers[0], values


def first_shape(text: str, values: dict[str, int]) -> list[int]:
    """The first (…, …) of the text, computed: `2e`, `2 H_kv`, `f(f + 1)/2` and `head_dim` mean what they say."""
    depth, begin = 0, text.index("(")
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            break
    python = text[begin + 1 : i].replace("−", "-").replace("·", "*").replace("/", "//")
    python = re.sub(r"\b(\d+) ?(?=[A-Za-z])", r"\1*", python)
    python = re.sub(r"\b([a-z])\(", r"\1*(", python)
    return list(eval(f"({python},)", {"min": min}, values))


@KINDS
def test_the_documented_weights_are_those_of_the_descriptions(kind: Any) -> None:
    mixer, values = with_letters(kind)
    section = re.search(
        rf"(?m)^\| \*\*{kind.mixer}\*\* \|.*\n((?:\| `.*\n)+)", MODEL_FORMAT.read_text(encoding="utf-8")
    )
    assert section, f"{MODEL_FORMAT.name} has no tensors of **{kind.mixer}**"
    documented = {}
    for row in section[1].splitlines():
        tensors, shape, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:4])
        for name in re.findall(r"layers\.\{i\}\.mixer\.([\w.]+)", tensors):
            documented[name] = (first_shape(shape, values), "`.bias`" in tensors)
    expected = {f"{p.name}.weight": ([p.rows, p.cols], p.bias) for p in mixer.projections(HIDDEN_SIZE)}
    expected |= {p.name: (p.shape, False) for p in mixer.parameters}
    assert documented == expected


@KINDS
def test_the_documented_states_are_those_of_the_descriptions(kind: Any) -> None:
    mixer, values = with_letters(kind)
    values |= {"num_tokens": 1000, "n": 0}  # a full ring, nothing pending
    documented = {}
    for row in STATE_FORMAT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        if len(cells) == 4 and f"`{kind.mixer}`" in cells[3]:
            for name in re.findall(r"`(\w+)`", cells[0]):
                documented[name] = (first_shape(cells[1], values), cells[2])
    dtypes = {"float32": "float32", "projection": "float32", "model": "float32, bfloat16 or float16"}
    rows = {"context": [1000]}  # of a description: none
    expected = {t.name: (rows.get(t.kind, t.shape[:1]) + t.shape[1:], dtypes[t.dtype]) for t in mixer.state}
    assert documented == expected
    assert all(prod(shape) > 0 or "pending" in name for name, (shape, _) in documented.items())


if __name__ == "__main__":
    MODEL_FORMAT.write_text(with_field_tables(MODEL_FORMAT.read_text(encoding="utf-8")), encoding="utf-8")
