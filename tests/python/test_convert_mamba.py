"""Published Mambas, of the authors and of state-spaces, become model directories of ours, or a clear error."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import FormatError, cli
from based.convert import convert
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.checkpoints import GPT2_FIELDS, MambaCheckpoint, mamba_checkpoint
from tests.reference.compare import rel_l2
from tests.reference.files import read_model, read_safetensors
from tests.reference.model import Model

GOLDEN = Path(__file__).parent.parent / "golden"


def converted(checkpoint: MambaCheckpoint, directory: Path, **options: Any) -> list[str]:
    """Converts it to directory/model, which holds what the checkpoint means; the notes."""
    checkpoint.write(directory / "published")
    notes = convert(directory / "published", directory / "model", **options)
    assert read_config(directory) == checkpoint.expected
    return notes


def read_config(directory: Path) -> Any:
    return json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))


def write_tokenizer(path: Path, size: int, end: int | None) -> Path:
    """A tokenizer.json of `size` tokens, the last two of them added ones."""
    words = {chr(0x4E00 + i): i for i in range(size - 2)}
    added = [{"id": i, "content": "<|endoftext|>" if i == end else f"<{i}>", "special": True} for i in range(size)]
    added = added[-2:] if end is None or end >= size - 2 else [added[end], *added[-2:]]
    for token in added:
        words.pop(next((word for word, i in words.items() if i == token["id"]), ""), None)
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<none>"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}), encoding="utf-8")
    return path


@pytest.mark.parametrize("head", ["shared", "copy", "absent"])
@pytest.mark.parametrize("fields", [{}, GPT2_FIELDS], ids=["state-spaces", "authors"])
def test_both_published_forms(tmp_path, fields, head):
    checkpoint = mamba_checkpoint(**fields)
    checkpoint = MambaCheckpoint(
        checkpoint.config, checkpoint.expected, 1, head=head, prefix="" if fields else "model."
    )
    assert converted(checkpoint, tmp_path) == []
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    expected = checkpoint.expected_tensors()
    assert stored.keys() == expected.keys()
    for name, (dtype, bits) in expected.items():
        assert stored[name][0] == dtype
        np.testing.assert_array_equal(stored[name][1], bits, err_msg=name)


@settings(max_examples=30)
@given(
    ssm=st.fixed_dictionaries(
        {},
        optional={
            "d_state": st.integers(1, 20),
            "d_conv": st.integers(1, 5),
            "expand": st.sampled_from([1, 2, 3, 1.5]),
            "dt_rank": st.just("auto") | st.integers(1, 9),
            "conv_bias": st.booleans(),
            "bias": st.booleans(),
            "dt_min": st.just(0.001),
            "dt_init_floor": st.just(1e-4),
            "layer": st.just("Mamba1"),
        },
    ),
    changes=st.fixed_dictionaries(
        {"d_model": st.integers(1, 40), "n_layer": st.integers(1, 3)},
        optional={
            "rms_norm": st.booleans(),
            "tie_embeddings": st.booleans(),
            "attn_layer_idx": st.just([]),
            "attn_cfg": st.just({}),
            "d_intermediate": st.just(0),
            "pad_vocab_size_multiple": st.sampled_from([1, 8, 16]),
        },
    ),
)
def test_any_architecture_gives_the_logits_of_its_equations(tmp_path_factory, ssm, changes):
    directory = tmp_path_factory.mktemp("any")
    converted(mamba_checkpoint(3, ssm, **changes), directory)
    tokens = list(range(30))
    found = based.load(directory / "model").forward(tokens, include_padding=True)
    assert rel_l2(found, Model(*read_model(directory / "model")).forward(tokens).logits) <= 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_copy_keeps_the_scan_in_float32(tmp_path, dtype):
    converted(mamba_checkpoint(), tmp_path, dtype=dtype)
    stored = read_safetensors(tmp_path / "model" / "model.safetensors")
    wide = {re.sub(r"layers\.\d+\.mixer\.", "", name) for name, (kind, _) in stored.items() if kind == "float32"}
    assert wide == {"A_log", "D", "conv.weight", "conv.bias", "dt_proj.bias"}
    assert {kind for kind, _ in stored.values()} == {dtype, "float32"}
    if dtype == "bfloat16":
        assert based.load(tmp_path / "model").dtype == "bfloat16"


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def test_tokens_that_the_tokenizer_lacks_are_no_tokens(tmp_path, capsys):
    """<|endoftext|> of the tokenizer ends a text: the config does not say it."""
    checkpoint = mamba_checkpoint()
    checkpoint.write(tmp_path / "published")
    write_tokenizer(tmp_path / "published" / "tokenizer.json", 40, 39)
    assert cli.main(["convert", str(tmp_path / "published"), str(tmp_path / "model")]) == 0
    assert "vocab_size is 40, not 51: its tokenizer has no more tokens" in capsys.readouterr().err
    assert read_config(tmp_path) == checkpoint.expected | {"vocab_size": 40, "eos_token_id": 39, "bos_token_id": 39}

    model = based.load(tmp_path / "model")
    params = based.SamplingParams(max_tokens=300, temperature=50, ignore_eos=True, seed=1)
    (output,) = model.generate([[1, 2]], params)
    assert set(output.outputs[0].token_ids) == set(range(40))
    assert model.forward([1]).shape == (1, 40)
    with pytest.raises(ValueError, match="40"):
        model.forward([40])


def test_a_larger_tokenizer_changes_nothing_but_the_end(tmp_path):
    checkpoint = mamba_checkpoint()
    checkpoint.expected.update(eos_token_id=0, bos_token_id=0)
    assert converted(checkpoint, tmp_path, tokenizer=write_tokenizer(tmp_path / "larger.json", 60, 0)) == []
    checkpoint.config["eos_token_id"] = checkpoint.expected["eos_token_id"] = 3
    converted(checkpoint, tmp_path, tokenizer=tmp_path / "larger.json", overwrite=True)


@pytest.mark.parametrize("text", ["{", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": -1}}}', '{"model": {}}'])
def test_a_tokenizer_without_a_vocabulary_says_nothing(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert converted(mamba_checkpoint(), tmp_path, tokenizer=tmp_path / "tokenizer.json") == []


def test_unigram_vocabularies_are_lists(tmp_path):
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], *[[chr(97 + i), -1.0] for i in range(20)]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    mamba_checkpoint().write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model", tokenizer=tmp_path / "tokenizer.json")
    assert read_config(tmp_path)["vocab_size"] == 21


@pytest.mark.parametrize(("fields", "size"), [({}, 50277), (GPT2_FIELDS, 50257)], ids=["state-spaces", "authors"])
def test_the_published_vocabularies(tmp_path, fields, size):
    """They come without tokenizer. The authors' say GPT-NeoX's size and read GPT-2's tokens, as all their models."""
    checkpoint = mamba_checkpoint(d_model=1, n_layer=1, vocab_size=50277, pad_vocab_size_multiple=16, **fields)
    assert checkpoint.expected["padded_vocab_size"] == 50288
    end = 50256 if fields else None
    checkpoint.expected.update(vocab_size=size, eos_token_id=end, bos_token_id=end)
    notes = converted(checkpoint, tmp_path)
    assert notes == ([f"vocab_size is {size}, not 50277: the authors' models use GPT-2's tokens"] if fields else [])


def test_loading_with_a_tokenizer_cuts_the_vocabulary(tmp_path):
    """Each in a conversion of its own; a tokenizer that changes nothing needs none."""
    mamba_checkpoint().write(tmp_path / "published")
    small = write_tokenizer(tmp_path / "small.json", 40, 39)
    for _ in range(2):
        assert based.load(tmp_path / "published").config.vocab_size == 51
        model = based.load(tmp_path / "published", tokenizer=small)
        assert (model.config.vocab_size, model.config.eos_token_id, model.tokenizer.get_vocab_size()) == (40, 39, 40)
    text = json.loads((GOLDEN / "based-tiny" / "config.json").read_text())
    for size in (text["vocab_size"] - 1, text["vocab_size"], text["vocab_size"] + 1):
        tokenizer = write_tokenizer(tmp_path / f"{size}.json", size, None)
        model = based.load(GOLDEN / "based-tiny", tokenizer=tokenizer)
        assert model.config.vocab_size == min(size, text["vocab_size"])


# ---- what is refused -------------------------------------------------------------------------------------------------


def top(**changes: Any) -> Any:
    return lambda config: config.update(changes)


def ssm(**changes: Any) -> Any:
    return lambda config: config["ssm_cfg"].update(changes)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (top(layers=3), "config.json: layers: found 3: unknown field"),
        (ssm(headdim=64), "ssm_cfg.headdim: found 64: unknown field"),
        (lambda c: c.pop("d_model"), "d_model: missing, expected a value"),
        (lambda c: c.pop("n_layer"), "n_layer: missing, expected a value"),
        (top(d_model="24"), 'd_model: found "24", expected an integer'),
        (top(ssm_cfg=None), "ssm_cfg: found null, expected an object"),
        (top(n_layer=2), "n_layer: found 2, but"),
        (top(n_layer=5000), "n_layer: found 5000, but"),
        (top(rms_norm=False), "norm_f.bias: is missing, but"),
        (top(vocab_size=60), "found shape (56, 24), expected (64, 24) (vocab_size 60 rounded up to a multiple of 8"),
        (top(pad_vocab_size_multiple=0), "pad_vocab_size_multiple: found 0"),
        (top(d_intermediate=64), "d_intermediate: found 64, expected 0: a Mamba with MLPs is not supported"),
        (top(attn_layer_idx=[1]), "attn_layer_idx: found [1], expected an empty list: a Mamba with attention"),
        (top(eos_token_id=51), "eos_token_id: found 51, expected a token below vocab_size 51"),
        (ssm(layer="Mamba2"), 'ssm_cfg.layer: found "Mamba2", expected "Mamba1"'),
        (
            ssm(d_state=8),
            "x_proj.weight: found shape (34, 48), expected (18, 48) (ssm_cfg.expand 2, d_model 24, ssm_",
        ),
        (ssm(d_conv=3), "conv1d.weight: found shape (48, 1, 4), expected (48, 1, 3)"),
        (ssm(expand=3), "in_proj.weight: found shape (96, 24), expected (144, 24)"),
        (ssm(expand=0), "ssm_cfg.expand: found 0, expected a number that makes one channel"),
        (ssm(expand="2"), 'ssm_cfg.expand: found "2", expected a number'),
        (ssm(dt_rank=3), "x_proj.weight: found shape (34, 48), expected (35, 48)"),
        (ssm(dt_rank="all"), 'ssm_cfg.dt_rank: found "all", expected "auto" or an integer'),
        (ssm(bias=True), "in_proj.bias: is missing, but"),
        (ssm(conv_bias=False), "conv1d.bias: is there, but"),
        (ssm(conv_bias=1), "ssm_cfg.conv_bias: found 1, expected true or false"),
    ],
)
def test_config_refusals(tmp_path, change, fragment):
    checkpoint = mamba_checkpoint()
    checkpoint.write(tmp_path / "published")
    change(checkpoint.config)
    (tmp_path / "published" / "config.json").write_text(json.dumps(checkpoint.config))
    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "published", tmp_path / "model")
    assert fragment in str(caught.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("gone", "new", "fragment"),
    [
        ("backbone.layers.1.mixer.D", None, "tensors missing for"),
        ("backbone.norm_f.weight", None, "backbone.norm_f.weight"),
        (None, "backbone.layers.1.mixer.E", "tensors not expected for"),
        (None, "backbone.layers.7.norm.weight", "n_layer: found 3, but"),
        (None, "backbone.layers.1.mixer.x_proj.bias", "x_proj.bias"),
    ],
)
def test_tensor_refusals(tmp_path, monkeypatch, gone, new, fragment):
    checkpoint = mamba_checkpoint()
    checkpoint = replace(checkpoint, prefix="")
    tensors = checkpoint.published_tensors()
    if gone:
        del tensors[gone]
    if new:
        tensors[new] = ("float32", np.zeros(3, np.float32))
    monkeypatch.setattr(MambaCheckpoint, "published_tensors", lambda _: tensors)
    checkpoint.write(tmp_path / "published")
    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "published", tmp_path / "model")
    assert fragment in str(caught.value)


def test_a_head_of_its_own_must_be_there(tmp_path):
    checkpoint = replace(mamba_checkpoint(), head="absent")
    checkpoint.config["tie_embeddings"] = False
    checkpoint.write(tmp_path / "published")
    with pytest.raises(FormatError, match=r"tensors missing for .*: lm_head\.weight"):
        convert(tmp_path / "published", tmp_path / "model")
    converted(replace(checkpoint, head="copy"), tmp_path)  # one that is the embedding is not stored twice


def test_transformers_own_form_is_told_apart(tmp_path):
    """state-spaces/mamba-*-hf: other names in config.json, other names of two tensors."""
    checkpoint = mamba_checkpoint()
    checkpoint.write(tmp_path / "published")
    config = {"hidden_size": 24, "num_hidden_layers": 3, "vocab_size": 51, "model_type": "mamba"}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"the tensors of a Mamba model, but .* is not of mamba_ssm: no d_model"):
        convert(tmp_path / "published", tmp_path / "model")
