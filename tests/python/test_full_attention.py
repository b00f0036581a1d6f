"""Full causal attention: the authors' transformers, and sequences whose state grows up to max_context."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from based import SamplingParams, cli, sizes
from based.convert import convert

from tests.reference.checkpoints import Checkpoint, golden_like
from tests.reference.compare import rel_l2
from tests.reference.files import read_model
from tests.reference.model import Model

ATTN_TINY = Path(__file__).parent.parent / "golden" / "attn-tiny"


def published(inner_size: int = 300, **changes: Any) -> Checkpoint:
    """A small checkpoint with the quirks of attn-1b: heads of 70, 35 rotary dimensions, an MLP of any width."""
    d = 140
    config = {
        "vocab_size": 21,
        "pad_vocab_size_multiple": 16,
        "n_positions": 2048,
        "max_position_embeddings": 0,  # which wins
        "n_embd": d,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": None,
        "ff_mult": 4,
        "activation_function": "swiglu",
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        "rotary_emb_fraction": 0.5,
        "rms_norm": True,
        "residual_in_fp32": True,
    } | changes
    layer = {"mixer": "full_attention", "num_heads": 2, "num_kv_heads": 2, "head_dim": 70, "scale": 70**-0.5}
    layer |= {"qkv_bias": False, "out_bias": False}
    layer |= {"rotary_dim": 35, "rotary_base": 10000.0, "rotary_interleaved": False}
    expected = {
        "format": "based",
        "format_version": 1,
        "vocab_size": 21,
        "padded_vocab_size": 32,
        "hidden_size": d,
        "norm": {"type": "rms_norm", "eps": 1e-5},
        "mlp": {"gated": True, "activation": "silu", "inner_size": inner_size, "fc1_bias": False, "fc2_bias": False},
        "tie_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "layers": [layer, layer],
    }
    return Checkpoint(config, expected, 5, ordered=False)


@pytest.fixture(scope="module")
def model() -> based.Model:
    return based.load(ATTN_TINY, device="cpu", max_context=50)


# ---- published checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner_size", "n_inner"), [(300, None), (384, None), (512, None), (384, 380), (380, 380)])
def test_a_transformer_like_attn_1b(tmp_path: Path, inner_size: int, n_inner: int | None) -> None:
    checkpoint = published(inner_size, n_inner=n_inner)
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    config, tensors = read_model(tmp_path / "model")
    assert config == checkpoint.expected
    tokens = np.random.default_rng(0).integers(0, 21, 300)
    exact = Model(config, tensors).forward(tokens).logits
    loaded = based.load(tmp_path / "published", device="cpu", dtype="float32")
    assert rel_l2(loaded.forward(tokens, include_padding=True), exact) <= 2e-5
    session = loaded.session()
    session.prefill([tokens[:-1]])
    assert rel_l2(session.step(tokens[-1:], include_padding=True)[0], exact[-1]) <= 2e-5


def test_a_width_that_is_said_must_be_the_tensors(tmp_path: Path) -> None:
    published(300, n_inner=380).write(tmp_path / "published")
    with pytest.raises(based.FormatError, match=re.escape("found shape (600, 140), expected (1024, 140) (n_inner 380")):
        convert(tmp_path / "published", tmp_path / "model")


def test_a_null_mixer_of_a_based_config_is_full_attention(tmp_path: Path) -> None:
    checkpoint = golden_like()
    del checkpoint.config["alt_mixer_2"]
    window = checkpoint.expected["layers"][2]
    checkpoint.expected["layers"][2] = {k: v for k, v in window.items() if k != "window"} | {"mixer": "full_attention"}
    checkpoint.write(tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model")
    assert read_model(tmp_path / "model")[0] == checkpoint.expected


@pytest.mark.parametrize(
    ("name", "parameters", "token", "shape"),
    [
        ("attn-360m", 359_810_048, 98_304, (1024, 24, 16, 64, 32, 2816)),
        ("attn-360M-30B", 359_810_048, 98_304, (1024, 24, 16, 64, 32, 2816)),
        ("attn-1b", 1_303_856_400, 241_920, (1680, 36, 24, 70, 35, 4480)),
        ("attn-1b-50bn", 1_303_856_400, 241_920, (1680, 36, 24, 70, 35, 4480)),
    ],
)
def test_sizes(name: str, parameters: int, token: int, shape: tuple[int, ...], capsys: Any) -> None:
    config = sizes.named_config(name)
    layer = config.layers[0]
    assert (config.num_parameters, sizes.token_nbytes(config, "bfloat16")) == (parameters, token)
    assert config.layers == [layer] * shape[1] and config.padded_vocab_size == 50272
    found = (config.hidden_size, len(config.layers), layer.num_heads, layer.head_dim, layer.rotary_dim)
    assert (*found, config.mlp.inner_size) == shape
    assert sizes.state_nbytes(config, "bfloat16", 1000) == 1000 * token
    assert sizes.mixer_step_nbytes(layer, "bfloat16", 1000, on_gpu=False) == 1001 * token / shape[1]
    assert cli.main(["inspect", "--size", name]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"for each token +{token / 1000:.1f} kB", text)
    assert re.search(r"longest sequence that fits in memory now +[\d,]+ tokens", text)


# ---- max_context -----------------------------------------------------------------------------------------------------


def test_max_context_is_the_loaded_models(model: based.Model, tmp_path: Path) -> None:
    assert model.max_context == 50
    assert model.state_nbytes == model.state_nbytes_at(50) > model.state_nbytes_at(1) > 0
    roomy = based.load(ATTN_TINY, device="cpu")
    assert 10_000 < roomy.max_context <= 1 << 24
    assert roomy.fingerprint == model.fingerprint
    session = roomy.session()
    session.prefill([[1] * 50])
    session.save_state(tmp_path / "fits")
    session.step([1])
    session.save_state(tmp_path / "beyond")
    other = model.session()
    other.load_state(tmp_path / "fits")
    message = "beyond: sequence 0: 51 tokens are more than the model's max_context, 50 tokens"
    for load in (other.load_state, lambda path: based.State.load(path, model)):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "beyond")
    assert other.num_tokens == [50]
    for bad in (0, -1, (1 << 24) + 1):
        with pytest.raises(ValueError, match=f"max_context is {bad}, expected 1 to 16777216"):
            based.load(ATTN_TINY, device="cpu", max_context=bad)
    with pytest.raises(ValueError, match="max_context is 50, but this model has no full_attention layer"):
        based.load(device="cpu", max_context=50)
    assert based.load(device="cpu").max_context is None


def test_more_tokens_are_refused_and_change_nothing(model: based.Model) -> None:
    assert model.forward([1] * 50).shape == (50, 258)
    assert model.score([1] * 51).shape == (50,)
    beyond = "more than the model's max_context, 50 tokens: load it with a greater one"
    for call in (lambda: model.forward([1] * 51), lambda: model.score([1] * 52), lambda: model.trace([1] * 51)):
        with pytest.raises(ValueError, match=beyond):
            call()
    assert len(model.score([1] * 40, [[2] * 11, [3] * 5])) == 2
    with pytest.raises(ValueError, match=f"context 1 and its continuation: 51 tokens are {beyond}"):
        model.score([[1], [1] * 40], [[2], [2] * 12])
    session = model.session(2)
    session.prefill([[1] * 49, [1]])
    before = session.state(0), session.num_tokens
    with pytest.raises(ValueError, match=f"prefill: sequence 0: 2 tokens behind 49 are {beyond}"):
        session.prefill([[1, 2], [3]])
    assert session.num_tokens == before[1] and session.state(0) is before[0]
    session.step([1, 1])
    with pytest.raises(ValueError, match=f"step: sequence 0: 1 tokens behind 50 are {beyond}"):
        session.step([1, 1])
    session.step([1], [1])
    assert session.num_tokens == [50, 3]


def test_a_row_that_reaches_it_ends_and_the_others_go_on(model: based.Model) -> None:
    def params(max_tokens: int | None, **more: Any) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)

    prompts = [[1] * 45, [1] * 45, [1] * 45, [2] * 3, [1] * 51]
    given = [params(7), params(6), params(None), params(20), params(1)]
    alone = [model.generate([p], g)[0].outputs[0] for p, g in zip(prompts[:4], given[:4], strict=True)]
    for batch in (1, 2, 5):
        outputs = [output.outputs[0] for output in model.generate(prompts, given, max_batch_size=batch)]
        assert [o.finish_reason for o in outputs] == ["error", "length", "length", "length", "error"]
        assert [len(o.token_ids) for o in outputs] == [6, 6, 6, 20, 0]
        assert [o.token_ids for o in outputs[:4]] == [o.token_ids for o in alone]
        assert "max_context, 50 tokens" in outputs[0].error
        assert "prompt 4: 51 tokens are more than the model's max_context, 50 tokens" in outputs[4].error
    with pytest.raises(ValueError, match="prompt 0: 51 tokens"):
        model.generate([[1] * 51], params(1))
    session = model.session()
    output = session.generate([1] * 45, params(7))
    assert session.num_tokens == [50]
    found = output[0].outputs[0] if isinstance(output, list) else output.outputs[0]
    assert found.finish_reason == "error" and found.token_ids == alone[0].token_ids[:5]


def test_states_that_grow_are_forked_saved_and_rolled_back(tmp_path: Path) -> None:
    """Over the ends of blocks and pieces of memory, bit for bit."""
    config = sizes.recipe("AcA", 24, 3, 40, head_dim=10, vocab_size=50, end_token_id=None)
    model = based.Model.random(based.ModelConfig.from_json(json.dumps(config)), device="cpu", dtype="bfloat16")
    tokens = np.random.default_rng(1).integers(0, 50, 1100)
    whole = model.session()
    expected = {n: None for n in (1, 255, 256, 257, 511, 513, 1024, 1099)}
    seen = 0
    for n in expected:
        whole.prefill([tokens[seen:n]])
        seen = n
        expected[n] = whole.fork().step(tokens[n : n + 1])
        path = tmp_path / str(n)
        whole.save_state(path)
        assert whole.state_nbytes == model.state_nbytes_at(n)
    session = model.session(2)
    for n in reversed(expected):
        session.restore(0, based.State.load(tmp_path / str(n), model))
        mark = session.checkpoint()
        session.copy(0, 1)
        found = session.step([tokens[n], tokens[n]])
        np.testing.assert_array_equal(found[0], expected[n][0])
        np.testing.assert_array_equal(found[1], expected[n][0])
        session.prefill([tokens[:30]] * 2)
        session.rollback(mark)
        np.testing.assert_array_equal(session.step([tokens[n]], [0])[0], expected[n][0])
        assert mark.state_nbytes <= 2 * model.state_nbytes_at(1099)
    session.reset()
    assert session.state_nbytes == 2 * model.state_nbytes_at(0)


def test_1024_sequences_are_made_at_once() -> None:
    config = json.loads(sizes.named_config("attn-360m").to_json())
    config["layers"] = config["layers"][:2]
    config |= {"vocab_size": 100, "padded_vocab_size": 112, "bos_token_id": None, "eos_token_id": None}
    small = based.ModelConfig.from_json(json.dumps(config))
    model = based.Model.random(small, device="cpu", dtype="bfloat16")
    session = model.session(1024)
    session.prefill([[1, 2]] * 2, [0, 1023])
    forks = [session.fork() for _ in range(8)]
    assert all(fork.num_tokens == session.num_tokens for fork in forks)
    assert session.state_nbytes == 2 * model.state_nbytes_at(2)


def test_it_is_trained(tmp_path: Path) -> None:
    """A pattern with its letter, by `based train`; PyTorch and the runtime give the same logits."""
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM

    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    (tmp_path / "config.yaml").write_text(
        "output: run\n"
        "model: {layers: AcA, hidden_size: 32, num_heads: 2, inner_size: 48}\n"
        "data: {tokenizer: bytes, sequence_length: 64, train: [{text: text.txt}], validation_fraction: 0.05}\n"
        "optimizer: {learning_rate: 2e-3, warmup_steps: 2}\n"
        "training: {steps: 4, batch_size: 4, device: cpu}\n"
    )
    done = run("train", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "run" / "model"
    model = based.load(directory, device="cpu", dtype="float32")
    assert [layer.letter for layer in model.config.layers] == ["A", "c", "A"] and model.max_context is not None
    tokens = np.random.default_rng(0).integers(0, 256, 80)
    with torch.no_grad():
        expected = BasedForCausalLM.load(directory)(torch.from_numpy(tokens)[None])[0].numpy()
    assert rel_l2(model.forward(tokens, include_padding=True), expected) <= 2e-5


# ---- the command line ------------------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "based.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_commands_take_max_context(tmp_path: Path) -> None:
    common = ("-m", ATTN_TINY, "--device", "cpu", "--token-ids", "--max-context", 20)
    done = run("generate", *common, "--max-tokens", 5, "1 2 3")
    assert done.returncode == 0 and len(done.stdout.split()) == 5, done.stderr
    done = run("generate", *common, "--max-tokens", 50, "1 2 3")
    assert done.returncode == 1 and len(done.stdout.split()) == 18
    assert "--max-context, 20 tokens" in done.stderr
    done = run("generate", *common, "--max-tokens", "none", "1 2 3")
    assert done.returncode == 0 and len(done.stdout.split()) == 18, done.stderr
    done = run("bench", "--size", "tiny", "--device", "cpu", "--max-context", 20)
    assert done.returncode == 1 and "no full_attention layer" in done.stderr
    bench = ("bench", "-m", ATTN_TINY, "--device", "cpu", "-p", 8, "-n", 4, "-r", 1, "-d", 20, "--no-bandwidth")
    done = run(*bench, "-o", "json", "--max-context", 40)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_nbytes"] == 4 * 2 * 64 * 4
    done = run(*bench, "--max-context", 22)
    assert done.returncode == 1 and "max-context" in done.stderr, done.stdout
