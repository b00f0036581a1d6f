"""Published checkpoints become model directories of ours, or a clear error; nothing in them ever runs."""

import builtins
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path

import based
import numpy as np
import pytest
from based import FormatError, _core, sizes
from based.convert import convert, is_published
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.checkpoints import (
    DEFAULTS,
    Checkpoint,
    Pickle,
    Seeded,
    checkpoints,
    contiguous_strides,
    first_upload,
    golden_like,
    random_checkpoint,
    write_torch,
    write_zip,
)
from tests.reference.compare import rel_l2
from tests.reference.files import read_model, read_safetensors, round_to, to_float64, write_safetensors
from tests.reference.model import Model

GOLDEN = Path(__file__).parent.parent / "golden"
EMBEDDING = "model.transformer.embeddings.word_embeddings.weight"


def assert_converted(checkpoint: Checkpoint, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config == checkpoint.expected
    tensors, expected = read_safetensors(directory / "model.safetensors"), checkpoint.expected_tensors()
    assert list(tensors) == [name for name in tensors if name in expected]
    assert len(tensors) == len(expected)
    for name, (dtype, bits) in tensors.items():
        assert dtype == expected[name][0], name
        np.testing.assert_array_equal(bits, expected[name][1], err_msg=name)


def assert_refused(source: Path, fragment: str, error: type[Exception] = FormatError, **options) -> str:
    """Conversion raises `error` with `fragment` in its text, and leaves nothing behind."""
    parent = source.parent / "results"
    parent.mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        convert(source, parent / "model", **options)
    assert fragment in str(caught.value)
    assert list(parent.iterdir()) == []
    return str(caught.value)


# ---- what converts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "dtype"), [("based-tiny", "float32"), ("based-tiny-bf16", "bfloat16")])
def test_golden(tmp_path, case, dtype):
    assert is_published(GOLDEN / case)
    convert(GOLDEN / case, tmp_path / "model")
    assert not is_published(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names - {"tokenizer.json"} == {"config.json", "model.safetensors"}
    assert ("tokenizer.json" in names) == (GOLDEN / case / "tokenizer.json").exists()
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    assert {dtype for dtype, _ in stored.values()} == {dtype}
    assert "lm_head.weight" not in stored
    assert stored["layers.0.mixer.conv.weight"][1].shape == (256, 3)
    config, _ = read_model(tmp_path / "model")
    assert [layer["mixer"] for layer in config["layers"]].count("gated_conv") == 4
    assert config["eos_token_id"] is None
    assert config["layers"][2]["window"] == 9


def test_published_360m_config_layout(tmp_path):
    """The golden config with the sizes of based-360m: translation alone, on tensors of one shared byte."""
    from based._published import translate

    config = json.loads((GOLDEN / "based-tiny" / "config.json").read_text())
    config |= {"n_embd": 1024, "n_layer": 27, "n_head": 16, "n_inner": None, "vocab_size": 50257}
    config |= {"alt_mixer_layers": [1, 6, 11, 16, 21], "alt_mixer_2_layers": [2, 7, 12, 17, 22]}
    config["alt_mixer"]["num_heads"] = 16
    config["alt_mixer_2"]["window_size"] = 256
    config["n_inner"] = 2048
    shapes = {"transformer.embeddings.word_embeddings.weight": (50264, 1024), "transformer.ln_f.weight": (1024,)}
    for i in range(27):
        layer = f"transformer.layers.{i}"
        shapes |= {f"{layer}.norm1.weight": (1024,), f"{layer}.norm2.weight": (1024,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4096, 1024), f"{layer}.mlp.fc2.weight": (1024, 2048)}
        if i in config["alt_mixer_layers"]:
            shapes |= {f"{layer}.mixer.{name}.weight": (256, 1024) for name in ("proj_q", "proj_k")}
            shapes |= {f"{layer}.mixer.{name}.weight": (1024, 1024) for name in ("proj_v", "out_proj")}
        elif i in config["alt_mixer_2_layers"]:
            shapes |= {f"{layer}.mixer.Wqkv.weight": (3072, 1024), f"{layer}.mixer.out_proj.weight": (1024, 1024)}
        else:
            shapes |= {f"{layer}.mixer.in_proj.weight": (4096, 1024), f"{layer}.mixer.in_proj.bias": (4096,)}
            shapes |= {f"{layer}.mixer.out_proj.weight": (1024, 2048), f"{layer}.mixer.out_proj.bias": (1024,)}
            shapes |= {f"{layer}.mixer.conv.conv.weight": (2048, 1, 3)}
    ours, recipes = translate(config, shapes, False, "config.json", "weights")
    assert ours["eos_token_id"] == ours["bos_token_id"] == 50256
    assert ours["layers"][2]["window"] == 129
    assert ours["layers"][1]["head_dim"] == ours["layers"][2]["rotary_dim"] == 64
    assert 355e6 < sum(np.prod(recipe.shape) for recipe in recipes) < 365e6
    assert json.loads(_core.check_config(json.dumps(ours), "ours")) == ours


@settings(max_examples=120, deadline=None)
@given(checkpoint=checkpoints())
def test_any_architecture(tmp_path_factory, checkpoint: Checkpoint):
    directory = tmp_path_factory.mktemp("any")
    checkpoint.write(directory / "published")
    convert(directory / "published", directory / "model")
    assert_converted(checkpoint, directory / "model")
    shutil.rmtree(directory)


@pytest.mark.parametrize("container", ["bin", "safetensors", "bin-shards", "safetensors-shards"])
@pytest.mark.parametrize("head", ["shared", "copy", "absent"])
def test_containers(tmp_path, container, head):
    checkpoint = golden_like(container=container, head=head)
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "model." + name,
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    ],
    ids=["DDP", "compile", "both", "Lightning", "bare", "compiled layer"],
)
def test_names_in_wrappers(tmp_path, wrap):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    tensors = {wrap(name): tensor for name, tensor in checkpoint.published_tensors().items()}
    write_torch(tmp_path / "published" / "pytorch_model.bin", tensors)
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")
    tensors = {"net." + name: tensor for name, tensor in checkpoint.published_tensors().items()}
    write_torch(tmp_path / "published" / "pytorch_model.bin", tensors)
    found = r"found tensors net\.model\..*, expected names like transformer\.embeddings\.word_embeddings\.weight"
    with pytest.raises(FormatError, match=found):
        convert(tmp_path / "published", tmp_path / "other")


def test_float64_is_converted_on_request(tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    path = tmp_path / "published" / "pytorch_model.bin"
    tensors = {name: tensor.double() for name, tensor in torch.load(path).items()}
    torch.save(tensors, path)
    assert_refused(tmp_path / "published", "found dtype float64, expected one of float32, bfloat16, float16: --dtype")
    convert(tmp_path / "published", tmp_path / "model", dtype="float32")
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    for name, (dtype, bits) in checkpoint.expected_tensors().items():
        assert stored[name][0] == dtype == "float32"
        np.testing.assert_array_equal(stored[name][1], bits)
    torch.save({name: tensor * 1e300 for name, tensor in tensors.items()}, path)
    assert_refused(tmp_path / "published", "holds values beyond the range of float32", dtype="float32")


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_head_that_differs_is_kept(tmp_path, tie_word_embeddings):
    checkpoint = golden_like(head="copy")
    checkpoint.config["tie_word_embeddings"] = tie_word_embeddings
    published = tmp_path / "published"
    checkpoint.write(published)
    tensors = checkpoint.published_tensors()
    head = tensors["model.lm_head.weight"][1].copy()
    head[-1, -1] += 1
    tensors["model.lm_head.weight"] = ("float32", head)
    write_torch(published / "pytorch_model.bin", tensors)
    convert(published, tmp_path / "model")
    config, weights = read_model(tmp_path / "model")
    assert config["tie_embeddings"] is False
    np.testing.assert_array_equal(weights["lm_head.weight"], head)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path, source, target):
    checkpoint = random_checkpoint(Seeded(5))
    checkpoint = Checkpoint(checkpoint.config, checkpoint.expected, seed=1, dtype=source)
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model", dtype=target)
    tensors = read_safetensors(tmp_path / "model" / "model.safetensors")
    for name, (dtype, bits) in checkpoint.expected_tensors().items():
        assert tensors[name][0] == target
        np.testing.assert_array_equal(tensors[name][1], round_to(to_float64(bits, dtype), target))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_alternative_mlp_of_two_dtypes(tmp_path):
    checkpoint = golden_like()
    checkpoint.config.update({"mlp_type": "alt", "ff_mult": 48})  # int(2 · 8 · 48 / 3) = 256
    del checkpoint.config["n_inner"]
    published = tmp_path / "published"
    checkpoint.write(published)
    tensors = checkpoint.published_tensors()
    for name, (_, bits) in list(tensors.items()):
        if name.endswith("fc3.weight"):
            tensors[name] = ("bfloat16", round_to(bits, "bfloat16"))
    write_torch(published / "pytorch_model.bin", tensors)
    convert(published, tmp_path / "model")
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    dtype, bits = stored["layers.1.mlp.fc1.weight"]
    expected = checkpoint.expected_tensors()["layers.1.mlp.fc1.weight"][1]
    assert dtype == "float32"
    np.testing.assert_array_equal(bits[256:], expected[256:])
    np.testing.assert_array_equal(bits[:256], to_float64(round_to(expected[:256], "bfloat16"), "bfloat16"))


def test_gated_mlp_takes_its_width_from_the_tensors(tmp_path):
    """n_inner is rounded up to a multiple of 256; a file whose tensors are not says the same."""
    checkpoint = golden_like()
    checkpoint.config["n_inner"] = checkpoint.expected["mlp"]["inner_size"] = 24
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_max_position_embeddings_wins(tmp_path):
    checkpoint = golden_like()
    checkpoint.config.update({"n_positions": 1024, "max_position_embeddings": 0})
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("vocab_size", [50256, 50257])
def test_absent_token_ids_are_those_of_gpt2(tmp_path, vocab_size):
    checkpoint = golden_like()
    expected = 50256 if vocab_size == 50257 else None
    checkpoint.config.update({"vocab_size": vocab_size})
    checkpoint.expected.update(vocab_size=vocab_size, padded_vocab_size=-(-vocab_size // 8) * 8)
    checkpoint.expected.update(eos_token_id=expected, bos_token_id=expected)
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_safetensors_wins_over_a_pickle(tmp_path):
    checkpoint = golden_like(container="safetensors")
    checkpoint.write(tmp_path / "published")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"not read")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_strided_tensors(tmp_path):
    """A transposed view, and two tensors in one storage."""
    checkpoint = golden_like(prefix="", extras=False)
    checkpoint.write(tmp_path / "published")
    members, items = {}, b""
    for number, (name, (_, bits)) in enumerate(checkpoint.published_tensors().items()):
        flipped = np.ascontiguousarray(bits.T)
        strides = contiguous_strides(flipped.shape)[::-1]
        members[f"x/data/{number}"] = b"\0" * 12 + flipped.tobytes()
        storage = Pickle.storage(Pickle.name("torch", "FloatStorage"), str(number), bits.size + 3)
        items += Pickle.text(name) + Pickle.tensor(storage, 3, bits.shape, strides)
    pickled = Pickle.PROTO + Pickle.EMPTY_DICT + Pickle.MARK + items + Pickle.SETITEMS + Pickle.STOP
    write_zip(tmp_path / "published" / "pytorch_model.bin", {"x/data.pkl": pickled, **members})
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_tokenizer_is_copied(tmp_path):
    golden_like().write(tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").write_text('{"a": 1}')
    convert(tmp_path / "published", tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == '{"a": 1}'
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"b": 2}')
    for number, tokenizer in enumerate((other, other / "tokenizer.json")):
        convert(tmp_path / "published", tmp_path / f"model{number}", tokenizer=tokenizer)
        assert (tmp_path / f"model{number}" / "tokenizer.json").read_text() == '{"b": 2}'


def test_memory_holds_no_tensor(tmp_path):
    """A tensor of 64 MB is converted with 16 MB."""
    checkpoint = golden_like()
    checkpoint.config["vocab_size"] = checkpoint.expected["vocab_size"] = 2_000_000
    checkpoint.expected["padded_vocab_size"] = 2_000_000
    checkpoint.write(tmp_path / "published")
    for dtype in (None, "bfloat16", "float16"):
        tracemalloc.start()
        convert(tmp_path / "published", tmp_path / "model", dtype=dtype, overwrite=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16e6
    weights = read_safetensors(tmp_path / "model" / "model.safetensors")["embedding.weight"][1]
    np.testing.assert_array_equal(weights, checkpoint.expected_tensors()["embedding.weight"][1].astype(np.float16))


def test_conversion_keeps_the_function(tmp_path):
    """Stored in half, computed in float64: as near as half's rounding."""
    for dtype in ("float32", "float16"):
        convert(GOLDEN / "based-tiny", tmp_path / dtype, dtype=dtype)
    with np.load(GOLDEN / "based-tiny" / "golden.npz") as values:
        ids, logits = values["input_ids"][0], values["logits"][0]
    error = rel_l2(Model.load(tmp_path / "float16").forward(ids).logits, logits)
    assert 1e-5 < error < 5e-3


# ---- truncated and missing files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_weights_truncated_anywhere(tmp_path, container):
    checkpoint = golden_like(container=container)
    checkpoint.write(tmp_path / "published")
    path = tmp_path / "published" / ("pytorch_model.bin" if container == "bin" else "model.safetensors")
    content = path.read_bytes()
    cuts = {0, 1, 2, 4, 7, 8, 9, 30, 100, *range(1, 60), *(len(content) - cut for cut in range(1, 120))}
    cuts |= set(np.random.default_rng(0).integers(0, len(content), 60).tolist())
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        assert_refused(tmp_path / "published", str(path))
    path.write_bytes(content)
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("container", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_cut_short_while_they_are_read(tmp_path, container, dtype, monkeypatch):
    """Between the check of the file and the reading of its tensors: an error that names it, and nothing is left."""
    checkpoint = golden_like(container=container)
    checkpoint.write(tmp_path / "published")
    path = tmp_path / "published" / ("pytorch_model.bin" if container == "bin" else "model.safetensors")
    opened = based.convert.open_weights

    def cut(directory):
        result = opened(directory)
        os.truncate(path, 4096)  # in place: a mapping of the rest would end the process
        return result

    monkeypatch.setattr(based.convert, "open_weights", cut)
    with pytest.raises(FormatError, match=re.escape(str(path)) + ".*another program shortened it"):
        convert(tmp_path / "published", tmp_path / "model", dtype)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["published"]


def test_config_truncated_anywhere(tmp_path):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    content = path.read_bytes()
    for cut in range(0, len(content), 13):
        path.write_bytes(content[:cut])
        assert_refused(tmp_path / "published", "config.json: not valid JSON")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"\xff\xfe", "not valid JSON"),
        (b'{"n_embd": 1, "n_embd": 2}', "key 'n_embd' twice"),
        (b'{"x": NaN}', "NaN is not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[1]", "found [1], expected an object"),
        (b"null", "found null, expected an object"),
        (b'{"format": "based"}', "already in the format of based"),
    ],
)
def test_bad_json(tmp_path, content, fragment):
    golden_like().write(tmp_path / "published")
    (tmp_path / "published" / "config.json").write_bytes(content)
    assert_refused(tmp_path / "published", fragment)


def test_an_infinite_number(tmp_path):
    checkpoint = golden_like()
    checkpoint.config["layer_norm_epsilon"] = 123
    checkpoint.write(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    path.write_text(path.read_text().replace("123", "1e999"))
    assert_refused(tmp_path / "published", "layer_norm_epsilon: found Infinity, expected a number")


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 724957218\n"


@pytest.mark.parametrize(
    "name", ["config.json", "pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"]
)
def test_lfs_pointers_are_named(name, tmp_path):
    published = tmp_path / "published"
    golden_like().write(published)
    (published / name).write_text(LFS_POINTER)
    assert_refused(
        published, f"{name}: found a Git LFS pointer, expected the file that it stands for: run `git lfs pull`"
    )


def test_missing_files(tmp_path):
    published = tmp_path / "published"
    assert_refused(published, "config.json", FileNotFoundError)
    golden_like().write(published)
    assert_refused(published, "no such tokenizer", FileNotFoundError, tokenizer=tmp_path / "none.json")
    (published / "pytorch_model.bin").unlink()
    message = assert_refused(published, "no weights", FileNotFoundError)
    assert "pytorch_model.bin" in message
    assert "model.safetensors.index.json" in message
    (published / "pytorch_model.bin").mkdir()
    assert_refused(published, "pytorch_model.bin", IsADirectoryError)


def test_shards(tmp_path):
    published = tmp_path / "published"
    golden_like(container="bin-shards").write(published)
    index_path = published / "pytorch_model.bin.index.json"
    index = json.loads(index_path.read_text())

    def refused(weight_map, fragment, error=FormatError):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(published, fragment, error)

    shards = sorted(set(index["weight_map"].values()))
    refused(None, "expected an object with weight_map")
    refused({EMBEDDING: 1}, "expected an object with weight_map")
    refused({EMBEDDING: "../x.bin"}, "found file '../x.bin'")
    refused({EMBEDDING: "x.safetensors"}, "found file 'x.safetensors'")
    refused({EMBEDDING: "a\0.bin"}, "found file 'a\\x00.bin'")
    refused({EMBEDDING: "absent.bin"}, "absent.bin", FileNotFoundError)
    refused(
        index["weight_map"] | {"extra": shards[0]}, "tensor extra is in pytorch_model-00001-of-00002.bin, but it is"
    )
    refused(index["weight_map"] | {EMBEDDING: shards[1]}, f"tensor {EMBEDDING} is in {shards[0]}, but weight_map says")
    refused({key: value for key, value in index["weight_map"].items() if key != EMBEDDING}, "weight_map says None")


# ---- contradictions and what we do not run ---------------------------------------------------------------------------


def mixer(key, **changes):
    return lambda config: config[key].update(changes)


def top(**changes):
    return lambda config: config.update(changes)


def without(*keys):
    return lambda config: [config.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        # Unknown, missing, of a wrong type.
        (top(n_emb=8), "config.json: n_emb: found 8: unknown field"),
        (top(vocab="x"), 'vocab: found "x": unknown field'),
        (mixer("mixer", kernel=3), "mixer.kernel: found 3: unknown field"),
        (mixer("alt_mixer", window_size=3), "alt_mixer.window_size: found 3: unknown field"),
        (lambda c: c["alt_mixer"]["feature_map"].update(temp=2), "alt_mixer.feature_map.temp: found 2: unknown field"),
        (without("vocab_size"), "found shape (24, 8), expected (50264, 8) (vocab_size 50257, as where it is absent,"),
        (without("n_embd"), "n_embd: missing"),
        (without("n_layer"), "n_layer: missing"),
        (without("n_head"), "n_head: missing"),
        (lambda c: c["alt_mixer"].pop("feature_map"), "alt_mixer.feature_map: missing"),
        (lambda c: c["mixer"].pop("_target_"), "mixer._target_: missing"),
        (top(vocab_size="21"), 'vocab_size: found "21", expected an integer'),
        (top(vocab_size=21.0), "vocab_size: found 21.0, expected an integer"),
        (top(vocab_size=True), "vocab_size: found true, expected an integer"),
        (top(vocab_size=None), "vocab_size: found null, expected an integer"),
        (top(rms_norm=1), "rms_norm: found 1, expected true or false"),
        (top(layer_norm_epsilon="1e-5"), "layer_norm_epsilon: found"),
        (top(rotary_emb_fraction=None), "rotary_emb_fraction: found null, expected a number from 0 to 2"),
        (top(mixer=[1]), "mixer: found [1], expected an object"),
        (top(alt_mixer_layers=3), "alt_mixer_layers: found 3, expected a list of layer numbers"),
        (top(alt_mixer_layers=[1, "2"]), "alt_mixer_layers: found"),
        (top(alt_mixer_layers=[-1]), "alt_mixer_layers: found [-1]"),
        (top(eos_token_id="x"), "eos_token_id: found"),
        (top(n_inner=0), "n_inner: found 0"),
        # Zero, negative, huge.
        (top(vocab_size=0), "vocab_size: found 0"),
        (top(n_embd=-8), "n_embd: found -8"),
        (top(n_layer=0), "n_layer: found 0"),
        (top(n_layer=10**9), "n_layer: found 1000000000, but"),
        (top(n_layer=10**30), "n_layer: found 1000000000000000000000000000000, expected an integer from 1 to"),
        (top(n_head=0), "n_head: found 0"),
        (top(pad_vocab_size_multiple=0), "pad_vocab_size_multiple: found 0"),
        (mixer("alt_mixer_2", window_size=-1), "alt_mixer_2.window_size: found -1"),
        (mixer("alt_mixer_2", window_size=None), "alt_mixer_2.window_size: found null"),
        (mixer("mixer", expand_proj=0), "mixer.expand_proj: found 0"),
        (top(rotary_emb_fraction=2), "rotary_emb_fraction: found 2"),
        (top(rotary_emb_fraction=-0.5), "rotary_emb_fraction: found -0.5"),
        (top(rotary_emb_base=0), "rotary_base"),
        (top(layer_norm_epsilon=-1), "eps"),
        # Contradicting the tensors: both values are named.
        (top(vocab_size=30), "found shape (24, 8), expected (32, 8) (vocab_size 30"),
        (top(pad_vocab_size_multiple=1), "found shape (24, 8), expected (21, 8)"),
        (top(n_embd=16), "found shape (24, 8), expected (24, 16)"),
        (top(n_embd=8, hidden_size=9), "hidden_size: found 9, expected the value of n_embd, 8"),
        (top(n_layer=4), "n_layer: found 4, but"),
        (top(n_inner=512), "mlp.fc1.weight: found shape (512, 8), expected (1024, 8) (n_inner 512"),
        (top(n_inner=None, n_embd=8, mlp_type="alt"), "mlp.fc1.weight: found shape (512, 8), expected (256, 8)"),
        (top(activation_function="gelu"), "mlp.fc1.weight: found shape (512, 8), expected (256, 8)"),
        (top(mlp_fc1_bias=True), "layers.0.mlp.fc1.bias: is missing, but"),
        (without("mlp_fc2_bias"), "mlp_fc2_bias true"),
        (top(qkv_proj_bias=True), "layers.2.mixer.Wqkv.bias: is missing, but"),
        (top(out_proj_bias=True), "layers.2.mixer.out_proj.bias: is missing, but"),
        (top(rms_norm=False), "transformer.ln_f.bias: is missing, but"),
        (mixer("mixer", use_bias=False), "layers.0.mixer.in_proj.bias: is there, but"),
        (mixer("mixer", expand_proj=2), "in_proj.weight: found shape (32, 8), expected (16, 8) (mixer.expand_proj 2"),
        (mixer("mixer", kernel_size=4), "found shape (16, 1, 3), expected (16, 1, 4)"),
        (mixer("alt_mixer", num_heads=4), "found shape (8, 8), expected (16, 8)"),
        (lambda c: c["alt_mixer"].pop("num_heads"), "found shape (8, 8), expected (64, 8)"),
        (mixer("alt_mixer", head_dim=5), "found shape (8, 8), expected (10, 8)"),
        (mixer("alt_mixer", feature_dim=8), "feature_map.input_dim: found 4, expected 8"),
        (top(n_head_kv=1), "Wqkv.weight: found shape (24, 8), expected (16, 8)"),
        (top(n_head=3), "n_head: found 3, expected a divisor of n_embd 8"),
        (top(n_head=4, n_head_kv=3), "n_head_kv: found 3, expected a divisor of n_head 4"),
        (top(head_dim=6), "Wqkv.weight: found shape (24, 8), expected (36, 8)"),
        (top(alt_mixer_layers=[2], alt_mixer_2_layers=[1]), "tensors missing for"),
        # A missing mixer is full causal attention, which these tensors are not.
        (without("mixer"), "layers.0.mixer.out_proj.weight: found shape (8, 16), expected (8, 8)"),
        (top(mixer=None), "layers.0.mixer.out_proj.weight: found shape (8, 16), expected (8, 8)"),
        (without("alt_mixer"), "layers.1.mixer.Wqkv.weight"),
        # What we do not run, by name and value.
        (top(d_model=8, n_layer=3), "expected names like backbone.embedding.weight"),
        (top(ssm_cfg={}), "d_model: missing, expected a value"),
        (top(prenorm=False), "prenorm: found false, expected true"),
        (top(parallel_block=True), "parallel_block: found true, expected false"),
        (top(word_embed_proj_dim=4), "word_embed_proj_dim: found 4, expected null"),
        (top(add_cross_attention=True), "add_cross_attention: found true, expected false"),
        (top(lm_head_bias=True), "lm_head_bias: found true"),
        (top(causal=False), "causal: found false, expected true"),
        (mixer("alt_mixer_2", causal=False), "alt_mixer_2.causal: found false, expected true"),
        (top(rotary_emb_scale_base=512), "rotary_emb_scale_base: found 512, expected null"),
        (top(n_positions=1024), "n_positions: found 1024, expected 0: a table of learned positions"),
        (top(n_positions=0, max_position_embeddings=7), "max_position_embeddings: found 7, expected 0"),
        (
            top(activation_function="tanh"),
            'activation_function: found "tanh", expected one of swiglu, geglu, glu, gelu',
        ),
        (top(activation_function=["relu"]), "activation_function: found"),
        (top(mlp_type="other"), 'mlp_type: found "other", expected one of base, alt'),
        (mixer("mixer", _target_="a.b.Hyena"), 'mixer._target_: found "a.b.Hyena", expected a class named BaseConv'),
        (mixer("mixer", _target_="a.NotBaseConv"), "mixer._target_: found"),
        (mixer("mixer", _target_=None), "mixer._target_: found null"),
        (mixer("alt_mixer", parallel_implementation="norm"), 'parallel_implementation: found "norm"'),
        (
            lambda c: c["alt_mixer"]["feature_map"].update(_target_="x.Performer"),
            'alt_mixer.feature_map._target_: found "x.Performer", expected a class named TaylorExp',
        ),
    ],
)
def test_config_refusals(tmp_path, change, fragment):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    change(checkpoint.config)
    (tmp_path / "published" / "config.json").write_text(json.dumps(checkpoint.config))
    message = assert_refused(tmp_path / "published", fragment)
    assert "published/config.json" in message


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_first_upload(tmp_path, container):
    """based-1.3b: the authors' older class names, and no vocab_size."""
    checkpoint = first_upload(container=container)
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (mixer("mixer", kernel_sizes=[3, 7]), "mixer.kernel_sizes: found [3, 7], expected a list of one integer"),
        (mixer("mixer", kernel_sizes=[]), "mixer.kernel_sizes: found [], expected a list of one integer"),
        (mixer("mixer", kernel_sizes=3), "mixer.kernel_sizes: found 3, expected a list of one integer"),
        (mixer("mixer", kernel_sizes=[0]), "mixer.kernel_sizes: found [0], expected a list of one integer"),
        (mixer("mixer", kernel_sizes=[4]), "conv1.conv.weight: found shape (16, 1, 3), expected (16, 1, 4)"),
        (mixer("mixer", kernel_size=3), "mixer.kernel_size: found 3: unknown field"),
        (mixer("mixer", _target_="x.BaseConv"), "tensors missing for"),
        (mixer("alt_mixer", feature_name="taylor_exp_3"), 'feature_name: found "taylor_exp_3", expected one of taylor'),
        (mixer("alt_mixer", feature_name=None), "alt_mixer.feature_name: found null, expected one of taylor_exp"),
        (mixer("alt_mixer", num_key_value_heads=1), "num_key_value_heads: found 1, expected 2, as alt_mixer.num_heads"),
        (lambda c: c["alt_mixer"].pop("num_key_value_heads"), "num_key_value_heads: missing, expected 2"),
        (mixer("alt_mixer", scale_dim=16), "alt_mixer.scale_dim: found 16, expected null or 4"),
        (mixer("alt_mixer", use_rotary_apply=True), "alt_mixer.use_rotary_apply: found true, expected false"),
        (mixer("alt_mixer", use_output_gating=True), "alt_mixer.use_output_gating: found true, expected false"),
        (mixer("alt_mixer", unknown=1), "alt_mixer.unknown: found 1: unknown field"),
        (mixer("alt_mixer_2", cross_attn=True), "alt_mixer_2.cross_attn: found true, expected false"),
        (mixer("alt_mixer_2", causal=False), "alt_mixer_2.causal: found false, expected true"),
    ],
)
def test_first_upload_refusals(tmp_path, change, fragment):
    checkpoint = first_upload()
    checkpoint.write(tmp_path / "published")
    change(checkpoint.config)
    (tmp_path / "published" / "config.json").write_text(json.dumps(checkpoint.config))
    assert_refused(tmp_path / "published", fragment)


def jrt() -> Checkpoint:
    """golden_like() with a prefix in its linear layer, with the fields of the authors' configurations."""
    checkpoint = golden_like()
    config, expected = json.loads(json.dumps(checkpoint.config)), json.loads(json.dumps(checkpoint.expected))
    config["alt_mixer"] = {
        "_target_": "based.models.mixers.prefix_linear_attention.PrefixLinearAttention",
        "l_max": 2048,
        "feature_dim": 4,
        "feature_name": "taylor_exp",
        "num_heads": 2,
        "num_key_value_heads": 2,
        "enc_length": 1024,
        "dec_length": 1024,
        "implementation": "fla_parallel",
        "use_mask": True,
    }
    config["alt_mixer_2"] |= {"use_mask": True, "causal": True}
    config |= {"data_type": "mixed", "enc_length": 1024, "dec_length": 1024}
    expected["layers"][1] |= {"mixer": "prefix_linear_attention", "enc_length": 1024}
    return replace(checkpoint, config=config, expected=expected)


def test_jrt(tmp_path):
    """JRT-360M-30B, JRT-1B-50B. 50257 of 50264 rows are tokens: the mask token of their training, 50263, is none."""
    checkpoint = jrt()
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")
    config = based.load(tmp_path / "model", device="cpu").config
    assert config.prefix_tokens == 1024
    for size in ("jrt-360m", "jrt-1.3b"):
        config = sizes.named_config(size)
        assert (config.vocab_size, config.padded_vocab_size, config.prefix_tokens) == (50257, 50264, 1024)
    model = based.Model.random(sizes.ModelConfig.from_json(small_vocabulary(config)), device="cpu")
    with pytest.raises(ValueError, match=r"token id 50263 at index 1 is outside \[0, vocab_size = 50257\)"):
        model.forward([1, 50263])
    assert np.asarray(model.forward([1])).shape == (1, 50257)


def small_vocabulary(config: based.ModelConfig) -> str:
    """The config with GPT-2's vocabulary and nothing else that is large."""
    small = json.loads(config.to_json()) | {"hidden_size": 2}
    small["mlp"] |= {"inner_size": 2}
    small["layers"] = [
        {"mixer": "prefix_linear_attention", "num_heads": 1, "feature_dim": 1, "head_dim": 2, "enc_length": 9, "eps": 0}
    ]
    return json.dumps(small)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda c: c["alt_mixer"].pop("enc_length"), "alt_mixer.enc_length: missing, expected a value"),
        (mixer("alt_mixer", enc_length=0), "alt_mixer.enc_length: found 0, expected an integer from 1"),
        (mixer("alt_mixer", enc_length=1 << 17), "enc_length: found 131072, expected 1024, as enc_length of the model"),
        (top(enc_length=512), "alt_mixer.enc_length: found 1024, expected 512, as enc_length of the model"),
        (lambda c: c["alt_mixer"].pop("num_heads"), "alt_mixer.num_heads: missing"),
        (mixer("alt_mixer", num_heads=3), "alt_mixer.num_heads: found 3, expected a divisor of n_embd 8"),
        (mixer("alt_mixer", feature_name="exp"), 'alt_mixer.feature_name: found "exp", expected one of taylor_exp'),
        (mixer("alt_mixer", implementation="tk"), 'implementation: found "tk", expected one of default, fla_parallel'),
        (mixer("alt_mixer", num_key_value_heads=1), "num_key_value_heads: found 1, expected 2, as alt_mixer.num_heads"),
        (mixer("alt_mixer", feature_dim=5), "proj_q.weight: found shape (8, 8), expected (10, 8)"),
        (mixer("alt_mixer", head_dim=4), "alt_mixer.head_dim: found 4: unknown field"),
        (mixer("alt_mixer", _target_="x.PrefixAttention"), 'found "x.PrefixAttention", expected a class named'),
    ],
)
def test_jrt_refusals(tmp_path, change, fragment):
    checkpoint = jrt()
    checkpoint.write(tmp_path / "published")
    change(checkpoint.config)
    (tmp_path / "published" / "config.json").write_text(json.dumps(checkpoint.config))
    assert_refused(tmp_path / "published", fragment)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**320), 10**320)
    | st.integers(-2, 20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=2),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_taken_or_refused(tmp_path_factory, data, value):
    checkpoint = golden_like()
    checkpoint.config.update({key: default for key, default in DEFAULTS.items() if key not in checkpoint.config})
    place = checkpoint.config
    while isinstance(place, dict):
        target, key = place, data.draw(st.sampled_from(sorted(place)))
        place = place[key] if data.draw(st.booleans()) else None
    directory = tmp_path_factory.mktemp("value")
    target[key] = value
    checkpoint.write(directory / "published")
    with contextlib.suppress(FormatError):
        convert(directory / "published", directory / "model")
    assert {path.name for path in directory.iterdir()} <= {"published", "model"}
    shutil.rmtree(directory)


@pytest.mark.parametrize("value", [[], {}, "x", -1, None])
@pytest.mark.parametrize(
    "field", ["top_k", "temperature", "id2label", "dtype", "fused_anything", "decay_x", "new_dropout"]
)
def test_fields_without_effect(tmp_path, field, value):
    checkpoint = golden_like()
    checkpoint.config[field] = value
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_fields_of_transformers_have_no_effect(tmp_path):
    """Every field of the golden config that the model's own list does not name."""
    checkpoint = golden_like()
    golden = json.loads((GOLDEN / "based-tiny" / "config.json").read_text())
    checkpoint.config.update({key: value for key, value in golden.items() if key not in checkpoint.config})
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


# ---- wrong tensors ---------------------------------------------------------------------------------------------------


def change_tensors(tmp_path, change):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    tensors = checkpoint.published_tensors()
    change(tensors)
    write_torch(tmp_path / "published" / "pytorch_model.bin", tensors)


NORM = "model.transformer.layers.1.norm1.weight"
ZEROS = ("float32", np.zeros(8, np.float32))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: t.pop(NORM), "tensors missing for"),
        (lambda t: t.pop(NORM), "transformer.layers.1.norm1.weight"),
        (lambda t: t.clear(), "transformer.layers.0.mixer.in_proj.bias: is missing"),
        (lambda t: t.update({"model.extra": ZEROS}), "tensors not expected for"),
        (lambda t: t.update({"model.extra": ZEROS}), "config.json: extra"),
        (lambda t: t.update({"model.lm_head.bias": ZEROS}), "lm_head.bias"),
        (
            lambda t: t.update({NORM: ("float32", np.zeros(9, np.float32))}),
            "norm1.weight: found shape (9,), expected (8,)",
        ),
        (
            lambda t: t.update({NORM: ("int64", np.zeros(8, np.int64))}),
            "norm1.weight: found dtype int64, expected one of",
        ),
        (lambda t: t.update({NORM.removeprefix("model."): ZEROS}), f"holds both {NORM} and transformer"),
        (lambda t: t.update({"model.transformer.layers.1.norm1.bias": ZEROS}), "norm1.bias: is there, but"),
        (lambda t: t.update({"model.transformer.layers.0.mixer.conv.conv.bias": ZEROS}), "conv.conv.bias"),
        (lambda t: t.update({"model.transformer.embeddings.position_embeddings.weight": ZEROS}), "learned positions"),
        (
            lambda t: t.update({"backbone.layers.0.mixer.A_log": ZEROS}),
            "backbone.layers.0.mixer.A_log: the tensors of a Mamba",
        ),
        (lambda t: t.update({"model.transformer.layers.7.norm1.weight": ZEROS}), "n_layer: found 3, but"),
        (lambda t: t.update({"model.lm_head.weight": ZEROS}), "lm_head.weight: found shape (8,), expected (24, 8)"),
    ],
)
def test_tensor_refusals(tmp_path, change, fragment):
    change_tensors(tmp_path, change)
    assert_refused(tmp_path / "published", fragment)


def test_values_beyond_the_dtype(tmp_path):
    change_tensors(tmp_path, lambda t: t.update({NORM: ("float32", np.full(8, 1e5, np.float32))}))
    assert_refused(tmp_path / "published", "norm1.weight: holds values beyond the range of float16", dtype="float16")
    convert(tmp_path / "published", tmp_path / "model", dtype="bfloat16")


def test_infinities_pass(tmp_path):
    change_tensors(tmp_path, lambda t: t.update({NORM: ("float32", np.full(8, np.inf, np.float32))}))
    convert(tmp_path / "published", tmp_path / "model", dtype="float16")


def test_unknown_dtype(tmp_path):
    golden_like().write(tmp_path / "published")
    assert_refused(tmp_path / "published", "dtype: found 'int8', expected one of float32", ValueError, dtype="int8")


def test_safetensors_of_another_dtype(tmp_path):
    checkpoint = golden_like(container="safetensors")
    checkpoint.write(tmp_path / "published")
    tensors = checkpoint.published_tensors() | {NORM: ("int64", np.zeros(8, np.int64))}
    write_safetensors(tmp_path / "published" / "model.safetensors", tensors)
    assert_refused(tmp_path / "published", "norm1.weight: found dtype int64")


# ---- where the result goes -------------------------------------------------------------------------------------------


def test_destination(tmp_path):
    published, model = tmp_path / "published", tmp_path / "deep" / "er" / "model"
    checkpoint = golden_like()
    checkpoint.write(published)
    convert(published, model)
    with pytest.raises(FileExistsError, match=r"found a full one \(--overwrite, overwrite=True, replaces"):
        convert(published, model)
    before = (model / "model.safetensors").read_bytes()
    convert(published, model, dtype="float16", overwrite=True)
    assert len((model / "model.safetensors").read_bytes()) < len(before)
    assert [path.name for path in model.parent.iterdir()] == ["model"]

    (model / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"precious\.txt"):
        convert(published, model, overwrite=True)
    assert (model / "precious.txt").read_text() == "mine"

    with pytest.raises(FileExistsError, match=r"pytorch_model\.bin"):
        convert(published, published, overwrite=True)
    assert (published / "pytorch_model.bin").exists()
    with pytest.raises(FileExistsError, match="found a file"):
        convert(published, published / "config.json", overwrite=True)
    with pytest.raises(FileExistsError):
        convert(published, published / "config.json" / "model")

    empty = tmp_path / "empty"
    empty.mkdir()
    convert(published, empty)
    assert_converted(checkpoint, empty)


def test_source_is_never_replaced(tmp_path):
    checkpoint = golden_like(container="safetensors")
    checkpoint.write(tmp_path / "published")
    with pytest.raises(FileExistsError, match="the same"):
        convert(tmp_path / "published", tmp_path / "published", overwrite=True)
    convert(tmp_path / "published", tmp_path / "model")
    assert_converted(checkpoint, tmp_path / "model")


def test_destination_behind_a_link(tmp_path):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").chmod(0o2750)
    for overwrite in (False, True):  # an empty directory, then a full one
        convert(tmp_path / "published", tmp_path / "link", overwrite=overwrite)
        assert (tmp_path / "link").is_symlink()
        assert_converted(checkpoint, tmp_path / "real")
        assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o2750


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_full_disk(tmp_path, dtype):
    """A file-size limit stands for the full disk: the result, or an older one in its place, stays as it was."""
    golden_like().write(tmp_path / "published")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        assert_refused(tmp_path / "published", "", OSError, dtype=dtype)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    convert(tmp_path / "published", tmp_path / "model", dtype=dtype)


def test_interrupted_while_writing(tmp_path, monkeypatch):
    checkpoint = golden_like()
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("based.convert._core.write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "published", tmp_path / "model", dtype="float16", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "published"]
    assert_converted(checkpoint, tmp_path / "model")


def test_nothing_is_imported(monkeypatch, tmp_path):
    """Conversion imports no torch, and a pickle's globals are names only."""
    golden_like().write(tmp_path / "published")
    original = builtins.__import__

    def guarded(name, *arguments, **keywords):
        assert name.split(".")[0] != "torch"
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)
    convert(tmp_path / "published", tmp_path / "model")
