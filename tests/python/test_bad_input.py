"""Damaged model directories, state files, disks and callers: an exception that says what, where and what was expected.

After each of them the same process, model and session go on as if nothing had been tried.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.checkpoints import RandomModel, golden_like
from tests.reference.files import read_layers, read_safetensors, write_safetensors, write_state

GOLDEN = Path(__file__).parent.parent / "golden"
PROMPT = [1, 2, 3, 4, 5, 6, 7]
MODEL = RandomModel(golden_like().expected, 0, "float32")  # a layer of each mixer, width 8, 21 tokens


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "model"
    MODEL.write(directory)
    return directory


@pytest.fixture
def directory(pristine, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="module")
def small(pristine):
    return based.load(pristine)


@pytest.fixture
def session(small):
    session = small.session(2)
    session.prefill([PROMPT, PROMPT[:3]])
    return session


@pytest.fixture(autouse=True)
def everything_goes_on(small, session, pristine):
    """Whatever a test does to its session in vain, and to the process."""
    before = session.fork()
    yield
    assert session.num_tokens == [7, 3]
    np.testing.assert_array_equal(session.step([8, 9]), before.step([8, 9]))
    np.testing.assert_array_equal(based.load(pristine).forward(PROMPT), small.forward(PROMPT))


def assert_refused(directory: Path, *fragments: str, error: type[Exception] = based.FormatError) -> None:
    with pytest.raises(error) as caught:
        based.load(directory)
    for fragment in (str(directory), *fragments):
        assert fragment in str(caught.value)


# ---- config.json -----------------------------------------------------------------------------------------------------

Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, (dict, list)) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def objects(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    if isinstance(value, dict):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from objects(item, (*path, key))


def changed(path: Path_, change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """The config after change(the object that holds the key, the key)."""
    config = json.loads(json.dumps(MODEL.config))
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return config


def spelled(path: Path_) -> str:
    """As messages name it: layers[2].window."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


BAD_VALUES: dict[type, list[Any]] = {
    bool: [None, 0, 1, "true", [], {}],
    int: [None, "7", 7.0, 7.5, True, [7], {}, 0, -1, (1 << 24) + 1, 1 << 63, -(1 << 63), 10**30],
    float: [None, "1", True, [1.0], {}, -1.0, -1e308],
    str: [None, "", "x", 3, True, [], {}],
    type(None): ["7", 7.0, True, [7], {}, -1, 21, 10**30],  # a token that the vocabulary may lack
}
LEGAL = {("layers", 2, "rotary_dim"): [0]}
DAMAGE = [
    (path, value)
    for path, old in leaves(MODEL.config)
    for value in BAD_VALUES[type(old)]
    if not any(value is legal or (value == legal and type(value) is int) for legal in LEGAL.get(path, []))
]


def write_config(directory: Path, config: Any) -> None:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


@pytest.mark.parametrize("path", [path for path, _ in leaves(MODEL.config)], ids=spelled)
def test_config_values(directory, path):
    def put(value: Any) -> Callable[[Any, Any], None]:
        return lambda place, key: place.__setitem__(key, value)

    tried = [value for damaged, value in DAMAGE if damaged == path]
    assert len(tried) >= 6
    for value in tried:
        write_config(directory, changed(path, put(value)))
        with contextlib.ExitStack() as stack:
            if path == ("format",):  # then it is a published directory, or nothing we know
                caught = stack.enter_context(pytest.raises((based.FormatError, FileNotFoundError)))
            else:
                caught = stack.enter_context(pytest.raises(based.FormatError))
            based.load(directory)
        assert path == ("format",) or f"config.json: {spelled(path)}: found" in str(caught.value), value
    write_config(directory, changed(path, lambda place, key: place.pop(key)))
    if path != ("format",):
        assert_refused(directory, f"config.json: {spelled(path)}: found no such key")
    text = json.dumps(MODEL.config)
    for number in ("1e999", "NaN", "-Infinity", "01", "0x1"):
        marked = json.dumps(changed(path, put("mark")))
        write_config(directory, marked.replace('"mark"', number))
        assert marked != text
        assert_refused(directory, "config.json")


@pytest.mark.parametrize("path", list(objects(MODEL.config)), ids=lambda path: spelled(path) or "top")
def test_unknown_and_duplicate_config_keys(directory, path):
    write_config(directory, changed((*path, "dropout"), lambda place, key: place.__setitem__(key, 0)))
    assert_refused(directory, f"{spelled((*path, 'dropout'))}: found an unknown key, expected only")
    text = json.dumps(changed((*path, "twice"), lambda place, key: place.__setitem__(key, 0)))
    write_config(directory, text.replace('"twice": 0', '"twice": 0, "twice": 0'))
    assert_refused(directory, "twice")


def top(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(changes)


def layer(i: int, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["layers"][i].update(changes)


def mlp(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["mlp"].update(changes)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (top(padded_vocab_size=20), ["padded_vocab_size: found 20, expected an integer from 21"]),
        (top(eos_token_id=21), ["eos_token_id: found 21, expected an integer from 0 to 20"]),
        (top(layers=[]), ["layers: found 0 layers"]),
        (layer(2, num_kv_heads=3), ["layers[2].num_kv_heads: found 3"]),
        (layer(2, rotary_dim=5), ["layers[2].rotary_dim: found 5"]),
        (layer(1, mixer="gated_conv"), ["layers[1]"]),
        # Contradicting the tensors: both sides are named.
        (top(hidden_size=16), ["tensor embedding.weight has shape (24, 8), the config makes it (24, 16)"]),
        (top(hidden_size=1 << 24), ["(24, 8)", "(24, 16777216)"]),
        (top(padded_vocab_size=32), ["(24, 8)", "(32, 8)"]),
        (top(vocab_size=1 << 20, padded_vocab_size=1 << 20), ["(1048576, 8)"]),
        (top(tie_embeddings=False), ["tensor lm_head.weight (24, 8) is missing"]),
        (top(norm={"type": "layer_norm", "eps": 1e-5}), ["norm1.bias (8) is missing"]),
        (mlp(gated=False), ["mlp.fc1.weight has shape (512, 8), the config makes it (256, 8)"]),
        (mlp(inner_size=128), ["mlp.fc1.weight has shape (512, 8), the config makes it (256, 8)"]),
        (mlp(inner_size=1 << 24), ["(33554432, 8)"]),
        (mlp(fc2_bias=True), ["mlp.fc2.bias (8) is missing"]),
        (top(mlp=None), ["9 tensors that the config has no place for: layers.0.mlp.fc1.weight"]),
        (top(mlp=[]), ["mlp: found an array of 0, expected an object or null"]),
        (lambda config: config.pop("mlp"), ["mlp: found no such key, expected an object or null"]),
        (layer(0, kernel_size=4), ["conv.weight has shape (16, 3), the config makes it (16, 4)"]),
        (layer(0, bias=False), ["tensors that the config has no place for: layers.0.mixer.in_proj.bias"]),
        (layer(1, num_heads=1 << 16), ["proj_q.weight has shape (8, 8), the config makes it (262144, 8)"]),
        (layer(1, feature_dim=2), ["proj_q.weight has shape (8, 8), the config makes it (4, 8)"]),
        (layer(2, num_kv_heads=1), ["qkv_proj.weight has shape (24, 8), the config makes it (16, 8)"]),
        (layer(2, out_bias=True), ["out_proj.bias (8) is missing"]),
        (lambda config: config["layers"].pop(), ["tensors that the config has no place for", "layers.2."]),
        (lambda config: config["layers"].append(config["layers"][0]), ["layers.3.", "is missing"]),
        (lambda config: config["layers"].reverse(), ["layers.0.mixer"]),
        # Sizes whose product would overflow.
        (layer(1, num_heads=1 << 16, feature_dim=4096, head_dim=1 << 16), ["layers[1]", "found"]),
    ],
)
def test_contradictory_configs(directory, change, fragments):
    config = json.loads(json.dumps(MODEL.config))
    change(config)
    write_config(directory, config)
    assert_refused(directory, *fragments)


def test_truncated_config(directory):
    text = (directory / "config.json").read_text()
    for cut in range(1, len(text) - 1):
        write_config(directory, text[:cut])
        assert_refused(directory, "config.json")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "\ufeff{}", "{" * 100_000, '{"format": "based"}', "\0" * 9])
def test_configs_that_are_none(directory, text):
    write_config(directory, text)
    assert_refused(directory, "config.json")


def test_config_of_no_text_and_of_no_end(directory):
    (directory / "config.json").write_bytes(b'{"format": "\xff"}')
    assert_refused(directory, "config.json")
    with (directory / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    assert_refused(directory, "config.json", "1073741824 bytes, expected at most")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150)
@given(path=st.sampled_from([path for path, _ in leaves(MODEL.config)]), value=JSON)
def test_any_value_anywhere_is_taken_or_refused(path, value):
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder))
        write_config(Path(folder), changed(path, lambda place, key: place.__setitem__(key, value)))
        with contextlib.suppress(based.FormatError):
            model = based.load(folder)
            assert model.forward([0, 1]).shape == (2, model.config.vocab_size)


# ---- model.safetensors -----------------------------------------------------------------------------------------------


def split(directory: Path) -> tuple[dict[str, Any], bytes]:
    content = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_weights(directory: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
    def apply(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        change(header)
        return header, data

    return apply


NAME = "final_norm.weight"


def move_last(header: dict[str, Any], nbytes: int) -> None:
    last = max(header.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + nbytes for offset in last["data_offsets"]]


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda header, data: (b"", data), ["a header that starts with", "expected {"]),
        (lambda header, data: (b"hello", data), ["a header that starts with", "expected {"]),
        (lambda header, data: (b"{]", data), ["model.safetensors"]),
        (lambda header, data: (b'{"\xff": 1}', data), ["model.safetensors"]),
        (lambda header, data: (b"{" + b'"a":{' * 100_000, data), ["model.safetensors"]),
        (lambda header, data: (json.dumps(header).encode()[:-1] + b',"final_norm.weight":0}', data), [NAME, "twice"]),
        (lambda header, data: (header, data[:-1]), ["bytes of data", "truncated?"]),
        (lambda header, data: (header, data + b"\0"), ["bytes of data, expected the"]),
        (change_header(lambda h: h[NAME].update(dtype="F99")), [NAME, 'dtype: found "F99", expected one of F32']),
        (change_header(lambda h: h[NAME].update(dtype="BF16")), [NAME, "data_offsets: found"]),
        (change_header(lambda h: h[NAME].update(dtype="I32")), [NAME, "has dtype int32, expected float32, bfloat16"]),
        (change_header(lambda h: h[NAME].update(shape=[2, 4])), [NAME, "has shape (2, 4), the config makes it (8)"]),
        (change_header(lambda h: h[NAME].update(shape=[-8])), [NAME, "shape: found -8, expected integers >= 0"]),
        (change_header(lambda h: h[NAME].update(shape=[1 << 62, 1 << 62])), [NAME, "shape: found"]),
        (change_header(lambda h: h[NAME].update(shape="8")), [NAME, "shape"]),
        (change_header(lambda h: h[NAME].update(data_offsets=[0])), [NAME, "data_offsets: found 1 numbers"]),
        (change_header(lambda h: move_last(h, -4)), ["found an overlap: data from byte"]),
        (change_header(lambda h: move_last(h, 4)), ["found a hole: data from byte"]),
        (change_header(lambda h: move_last(h, 1 << 40)), ["found a hole: data from byte"]),
        (change_header(lambda h: h[NAME].update(data_offsets=[32, 0])), [NAME, "data_offsets: found [32, 0]"]),
        (change_header(lambda h: h[NAME].update(extra=1)), [NAME, "extra: found an unknown key"]),
        (change_header(lambda h: h[NAME].pop("shape")), [NAME, "shape: found no such key"]),
        (change_header(lambda h: h.update(__metadata__={"a": 1})), ["__metadata__", "a: found 1"]),
        (change_header(lambda h: h.update(other=h.pop(NAME))), [f"tensor {NAME} (8) is missing"]),
        (
            change_header(lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
            ["1 tensors that the config has no place for: extra"],
        ),
    ],
)
def test_damaged_weights(directory, damage, fragments):
    write_weights(directory, *damage(*split(directory)))
    assert_refused(directory, *fragments)


def test_header_lengths(directory):
    content = (directory / "model.safetensors").read_bytes()
    for length, fragment in [
        (1 << 62, "a header length of 4611686018427387904 bytes, expected at most 16777216"),
        (100_000_001, "a header length of 100000001 bytes, expected at most 16777216"),
        (len(content) - 7, "truncated?"),
        (0, "a header that starts with"),
    ]:
        (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
        assert_refused(directory, "model.safetensors", fragment)


def test_truncated_weights(directory):
    content = (directory / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cuts = {*range(0, len(content), 997), *range(20), *range(header - 3, header + 9), len(content) - 1}
    for cut in sorted(cuts):
        (directory / "model.safetensors").write_bytes(content[:cut])
        assert_refused(directory, "model.safetensors")


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_headers_are_refused_or_mean_something(pristine, data):
    content = bytearray((pristine / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        MODEL.write(Path(folder))
        (Path(folder) / "model.safetensors").write_bytes(content)
        with contextlib.suppress(based.FormatError):
            assert based.load(folder).forward([0, 1]).shape == (2, 21)


def test_misaligned_weights_are_legal(directory, small):
    header, data = split(directory)
    for spaces in range(1, 5):
        write_weights(directory, json.dumps(header).encode() + b" " * spaces, data)
        np.testing.assert_array_equal(based.load(directory).forward(PROMPT), small.forward(PROMPT))


def test_shards(directory, small):
    tensors = read_safetensors(directory / "model.safetensors")
    names, index = list(tensors), directory / "model.safetensors.index.json"
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, part in shards.items():
        write_safetensors(directory / shard, {name: tensors[name] for name in part})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(directory, "found both model.safetensors and model.safetensors.index.json")
    (directory / "model.safetensors").unlink()
    np.testing.assert_array_equal(based.load(directory).forward(PROMPT), small.forward(PROMPT))

    def refused(new_map: Any, *fragments: str, error: type[Exception] = based.FormatError) -> None:
        index.write_text(json.dumps({"weight_map": new_map}))
        assert_refused(directory, *fragments, error=error)

    refused([], "weight_map", "expected an object")
    refused(weight_map | {NAME: "../one.safetensors"}, NAME, "expected the name of a file in the same folder")
    refused(weight_map | {NAME: "three.safetensors"}, "three.safetensors", error=FileNotFoundError)
    refused(weight_map | {"extra": "one.safetensors"}, 'found no tensor "extra"')
    refused({name: shard for name, shard in weight_map.items() if name != NAME}, NAME, "in no shard")
    swapped = next(shard for shard in shards if shard != weight_map[NAME])
    refused(weight_map | {NAME: swapped}, NAME, "as the index says")
    index.write_text(json.dumps({"weight_map": weight_map})[:-1])
    assert_refused(directory, "index.json")


# ---- files that are not there, or not files --------------------------------------------------------------------------


def test_missing_files(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    assert_refused(directory, "model.safetensors", error=FileNotFoundError)
    (directory / "config.json").unlink()
    assert_refused(directory, "config.json", error=FileNotFoundError)
    assert_refused(tmp_path / "none", "neither an existing directory", error=FileNotFoundError)
    (tmp_path / "file").write_bytes(b"")
    assert_refused(tmp_path / "file", "a model is a directory", error=NotADirectoryError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_other_kinds(directory, name):
    """None of them is waited for."""
    path = directory / name
    path.unlink()
    path.mkdir()
    assert_refused(directory, name, error=IsADirectoryError)
    path.rmdir()
    os.mkfifo(path)
    assert_refused(directory, name, "not a regular file", error=OSError)
    path.unlink()
    path.symlink_to(path)
    assert_refused(directory, name, error=OSError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_unreadable_files(directory, name):
    (directory / name).chmod(0)
    if os.access(directory / name, os.R_OK):
        pytest.skip("root reads everything")
    assert_refused(directory, name, error=PermissionError)


def test_damaged_tokenizer(directory):
    """It is read when text is first needed; token ids go without."""
    (directory / "tokenizer.json").write_text('{"version": 1}')
    model = based.load(directory)
    greedy = based.SamplingParams(temperature=0, max_tokens=2)
    with pytest.raises(based.FormatError, match=r"tokenizer\.json: not a tokenizer"):
        model.generate("text", greedy)
    with pytest.warns(RuntimeWarning, match="generated text will be empty"):
        assert len(model.generate([1, 2], greedy)[0].outputs[0].token_ids) == 2


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        based.load(GOLDEN / "based-tiny")
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    assert based.load(GOLDEN / "based-tiny").forward([1]).shape == (1, 258)


# ---- numbers that are none -------------------------------------------------------------------------------------------


def test_weights_that_are_not_numbers(directory):
    header, data = split(directory)
    begin, end = header[NAME]["data_offsets"]
    write_weights(directory, header, data[:begin] + np.full(8, np.nan, np.float32).tobytes() + data[end:])
    broken = based.load(directory)
    assert np.isnan(broken.forward(PROMPT)).all()
    session = broken.session()
    session.prefill(PROMPT)
    for count, temperature in enumerate((0, 1), start=8):
        (output,) = session.generate([1], based.SamplingParams(temperature=temperature))[0].outputs
        assert (output.finish_reason, output.token_ids) == ("error", [])
        assert "all 21 logits are NaN or -inf" in output.error
        assert session.num_tokens == [count]  # it has seen its prompt


# ---- state files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(session, small, tmp_path):
    """(path, states): the session's state in a file, and as write_state() takes it."""
    path = tmp_path / "state.safetensors"
    session.save_state(path)
    states: list[Any] = [(7, {}), (3, {})]
    for b, layers in read_layers(path).items():
        states[b][1].update(layers)
    for _, tensors in states:
        assert list(tensors) == ["layers.0.conv", "layers.1.taylor", "layers.2.keys", "layers.2.values"]
    write_state(path, states, fingerprint=small.fingerprint)
    session.load_state(path)  # so the damage below is what is refused
    return path, states


def assert_state_refused(session, path: Path, fragment: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        session.load_state(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)


def changed_tensor(name: str, tensor: tuple[str, np.ndarray] | None) -> Callable[[list[Any]], None]:
    def change(states: list[Any]) -> None:
        if tensor is None:
            del states[1][1][name]
        else:
            states[1][1][name] = tensor

    return change


def zeros(*shape: int, dtype: str = "float32") -> tuple[str, np.ndarray]:
    return dtype, np.zeros(shape, np.uint16 if dtype == "bfloat16" else dtype)


def test_keys_and_values_in_float16(small, saved):
    """As a GPU saves them: every float16 is a float32."""
    path, states = saved
    random = np.random.default_rng(0)
    for _, tensors in states:
        for name in ("layers.2.keys", "layers.2.values"):
            shape = tensors[name][1].shape
            half = random.normal(0, 1, shape).astype(np.float16)
            half.flat[:4] = [0.0, -6e-8, 6.1e-5, 65504.0]  # two subnormals, the largest
            tensors[name] = "float16", half
    write_state(path, states, fingerprint=small.fingerprint)
    other = small.session(2)
    other.load_state(path)
    other.save_state(path)
    for b, layers in read_layers(path).items():
        for name, (dtype, found) in layers.items():
            assert dtype == "float32"
            np.testing.assert_array_equal(found, states[b][1][name][1].astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("change", "metadata", "error", "fragment"),
    [
        (None, {"format": "pt"}, based.FormatError, 'format: found "pt", expected "based-state"'),
        (None, {"format_version": "4"}, based.StateError, 'format_version: found "4", expected "1", "2" or "3"'),
        (None, {"fingerprint": "0" * 16}, based.StateError, 'the state of the model "0000000000000000", expected'),
        (None, {"checksum": "0" * 8}, based.FormatError, "damaged file"),
        (None, {"extra": "x"}, based.FormatError, "unknown keys in the metadata"),
        (None, {"num_tokens": "7,x"}, based.FormatError, "num_tokens"),
        (None, {"num_tokens": "7,-3"}, based.FormatError, "num_tokens"),
        (None, {"num_tokens": "7,9007199254740993"}, based.FormatError, "num_tokens"),
        (None, {"num_tokens": "7"}, based.FormatError, "sequences.1"),
        (list.pop, {}, based.StateError, "holds 1 sequences, the session has 2"),
        (lambda states: states.append(states[0]), {}, based.StateError, "holds 3 sequences, the session has 2"),
        (changed_tensor("layers.1.taylor", None), {}, based.FormatError, "tensor layers.1.taylor is missing"),
        (changed_tensor("layers.3.conv", zeros(2)), {}, based.FormatError, "layers.3.conv has no place"),
        (changed_tensor("layers.0.conv", zeros(16, 2)), {}, based.FormatError, "has shape (16, 2), expected (2, 16)"),
        (
            changed_tensor("layers.0.conv", zeros(2, 16, dtype="bfloat16")),
            {},
            based.FormatError,
            "layers.0.conv has dtype bfloat16, expected float32",
        ),
        (
            changed_tensor("layers.2.keys", zeros(3, 2, 4, dtype="int32")),
            {},
            based.FormatError,
            "layers.2.keys has dtype int32, expected float32, bfloat16 or float16",
        ),
        (
            changed_tensor("layers.1.taylor", zeros(2, 6, 5, dtype="float16")),
            {},
            based.FormatError,
            "layers.1.taylor has ",
        ),
        # As many keys as tokens, up to the window.
        (lambda states: states.__setitem__(1, (2, states[1][1])), {}, based.FormatError, "expected (2, 2, 4)"),
        (lambda states: states.__setitem__(1, (0, states[1][1])), {}, based.FormatError, "expected (0, 2, 4)"),
        (lambda states: states.__setitem__(1, (1 << 53, states[1][1])), {}, based.FormatError, "expected (4, 2, 4)"),
    ],
)
def test_foreign_and_damaged_states(session, small, saved, change, metadata, error, fragment):
    path, states = saved
    if change is not None:
        change(states)
    write_state(path, states, **({"fingerprint": small.fingerprint} | metadata))
    assert_state_refused(session, path, fragment, error)


def pending(n: int, *, f: int = 4, dtype: str = "float32", of: str = "both") -> Callable[[list[Any]], None]:
    """n pending tokens for the second sequence."""

    def change(states: list[Any]) -> None:
        for name, width in (("keys", f), ("values", 4)):
            if of in ("both", name):
                states[1][1][f"layers.1.pending_{name}"] = zeros(n, 2, width, dtype=dtype)

    return change


@pytest.mark.parametrize(
    ("change", "version", "fragment"),
    [
        (pending(2), "1", 'sequences.1.layers.1.pending_keys", expected none such in format_version "1"'),
        (pending(2, of="keys"), "3", "tensor layers.1.pending_values is missing"),
        (pending(2, of="values"), "2", "tensor layers.1.pending_keys is missing"),
        (pending(4), "3", "layers.1.pending_keys has 4 tokens, expected at most 3, the number seen"),
        (pending(2, f=3), "2", "layers.1.pending_keys has shape (2, 2, 3), expected (2, 2, 4)"),
        (pending(2, dtype="int32"), "3", "has dtype int32, expected float32, bfloat16 or float16"),
    ],
)
def test_pending_tokens_that_cannot_be(session, small, saved, change, version, fragment):
    path, states = saved
    change(states)
    write_state(path, states, fingerprint=small.fingerprint, format_version=version)
    assert_state_refused(session, path, fragment, based.FormatError)


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_states_of_every_version(small, saved, version):
    path, states = saved
    write_state(path, states, fingerprint=small.fingerprint, format_version=version)
    other = small.session(2)
    other.load_state(path)
    other.save_state(path)
    content = path.read_bytes()
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["format_version"] == "3"
    for b, layers in read_layers(path).items():
        for name, (dtype, found) in layers.items():
            assert dtype == states[b][1][name][0]
            np.testing.assert_array_equal(found, states[b][1][name][1], err_msg=name)


def test_files_that_are_no_states(session, pristine, tmp_path):
    assert_state_refused(session, pristine / "model.safetensors", "found no format in the metadata", based.FormatError)
    assert_state_refused(session, pristine / "config.json", "header length", based.FormatError)
    assert_state_refused(session, tmp_path / "none", "cannot open", FileNotFoundError)
    assert_state_refused(session, tmp_path, "cannot read", IsADirectoryError)
    (tmp_path / "empty").write_bytes(b"")
    assert_state_refused(session, tmp_path / "empty", "found 0 bytes", based.FormatError)
    os.mkfifo(tmp_path / "pipe")
    assert_state_refused(session, tmp_path / "pipe", "not a regular file", OSError)


@pytest.mark.parametrize(
    ("path", "error", "found"),
    [
        ("a\0b", ValueError, r"'a\x00b', expected a path: those have no NUL byte"),
        (b"a\0b", ValueError, r"'a\x00b', expected a path: those have no NUL byte"),
        (3, TypeError, "int 3, expected a str, or a path such as Path"),
    ],
)
def test_what_names_no_file_of_states(session, path, error, found):
    for call in (session.save_state, session.load_state, lambda path: session.load_state(path, 0)):
        with pytest.raises(error) as caught:
            call(path)
        assert str(caught.value) == f"path: found {found}"


@pytest.mark.parametrize(
    ("path", "error", "found"),
    [
        ("a\0b", ValueError, r"'a\x00b', expected a path: those have no NUL byte"),
        (b"m", TypeError, "bytes b'm', expected a str, or a path such as Path"),
        (3, TypeError, "int 3, expected a str, or a path such as Path"),
    ],
)
def test_what_names_no_model(pristine, path, error, found):
    with pytest.raises(error) as caught:
        based.load(path)
    assert str(caught.value) == f"path_or_id: found {found}"
    with pytest.raises(error) as caught:
        based.load(pristine, tokenizer=path)
    assert str(caught.value) == f"tokenizer: found {found}"


def test_truncated_and_damaged_states(session, saved):
    path, _ = saved
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for cut in sorted({*range(0, len(content), 97), *range(20), *range(header - 3, header + 9), len(content) - 1}):
        path.write_bytes(content[:cut])
        assert_state_refused(session, path, "", based.FormatError)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :])
        with pytest.raises((based.FormatError, based.StateError), match="state"):
            session.load_state(path)


# ---- full disks, places that cannot be written -----------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Stands for a full disk: writing beyond it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk(session, tmp_path):
    path = tmp_path / "state"
    session.fork().save_state(path)
    before = path.read_bytes()
    for target in (path, tmp_path / "new"):
        with file_size_limit(1000), pytest.raises(OSError, match=str(target)) as caught:
            session.save_state(target)
        assert caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert path.read_bytes() == before


def test_full_disk_while_converting(tmp_path, monkeypatch):
    monkeypatch.setenv("BASED_CACHE", str(tmp_path / "cache"))
    with file_size_limit(10_000), pytest.raises(OSError, match="cache") as caught:
        based.load(GOLDEN / "based-tiny")
    assert caught.value.errno == errno.EFBIG
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert based.load(GOLDEN / "based-tiny").forward([1]).shape == (1, 258)


def test_states_replace_files_only(session, tmp_path):
    """No folder, device or pipe: /dev/null is to stay what it is."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=name):
            session.save_state(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(OSError, match="nowhere"):
        session.save_state(tmp_path / "nowhere" / "state")
    with pytest.raises(OSError, match="config"):
        session.save_state(GOLDEN / "based-tiny" / "config.json" / "state")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe"}


def test_folders_that_cannot_be_written(session, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes everywhere")
    with pytest.raises(PermissionError, match="state"):
        session.save_state(tmp_path / "state")
    tmp_path.chmod(0o700)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_not_enough_memory(directory):
    """In a process of limited memory."""
    code = """
import json, pathlib, resource, sys
import based
import numpy as np

directory = pathlib.Path(sys.argv[1])
model = based.load(directory, num_threads=1)
session = model.session()
session.prefill([1, 2, 3])
expected = session.fork().step([4])
config = json.loads((directory / "config.json").read_text())
config["layers"][2]["window"] = 1 << 19  # 32 MB of state
(directory / "config.json").write_text(json.dumps(config))
wide = based.load(directory, num_threads=1)
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (500 << 20), resource.RLIM_INFINITY))
batch = [[1]] * 20
for attempt in (
    lambda: model.session(1 << 20),
    lambda: wide.session(20),
    lambda: wide.generate(batch, max_batch_size=20),
    lambda: wide.engine(20, cache_bytes=0),
):
    try:
        attempt()
    except MemoryError:
        continue
    sys.exit("no MemoryError")
np.testing.assert_array_equal(session.step([4]), expected)
# What has no batch of its own runs as many at once as there is memory for.
assert {output.outputs[0].finish_reason for output in wide.generate(batch)} == {"length"}
"""
    result = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
