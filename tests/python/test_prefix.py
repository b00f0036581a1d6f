"""Models that read the first tokens of a sequence as a whole (`prefix_linear_attention`).

No file of the authors holds numbers of one: the reference is the equation of docs/model-format.md in float64. What
holds for prompts that may be cut anywhere, test_laws tests with prefixes of one token.
"""

import json
from typing import Any

import based
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.python.test_laws import CHUNK, FLOAT32, directory_of, draw_tokens, load
from tests.reference.checkpoints import RandomModel
from tests.reference.checkpoints import models as random_models
from tests.reference.compare import rel_l2
from tests.reference.model import Model

PREFIXES = (2, 5, 16, 70, CHUNK, CHUNK + 1, 2 * CHUNK + 30)
LENGTHS = st.integers(1, 100) | st.integers(CHUNK - 3, 3 * CHUNK)


@st.composite
def prefix_models(draw: Any) -> RandomModel:
    """One prefix layer at least; each has a prefix of its own length."""
    model: RandomModel = draw(random_models(max_layers=3))
    # A norm of one or two numbers that cancel is nothing but their rounding, hundreds of tokens long.
    assume(model.config["hidden_size"] > 4)
    layer = {"mixer": "prefix_linear_attention", "num_heads": 2, "feature_dim": 5, "head_dim": 7, "eps": 1e-12}
    model.config["layers"].insert(draw(st.integers(0, len(model.config["layers"]))), layer)
    for layer in model.config["layers"]:
        if layer["mixer"] == "prefix_linear_attention":
            layer["enc_length"] = draw(st.sampled_from(PREFIXES))
    return model


def prefix_of(model: RandomModel) -> int:
    return max(layer.get("enc_length", 0) for layer in model.config["layers"])


@settings(max_examples=60)
@given(random=prefix_models(), length=LENGTHS, more=st.integers(0, 20), threads=st.integers(1, 2))
def test_a_prompt_and_what_follows_it(random, length, more, threads):
    """However many pieces the runtime feeds the prompt in; then token by token."""
    model, reference = load(random, dtype="float32", num_threads=threads), Model(random.config, random.tensors())
    assert model.config.prefix_tokens == prefix_of(random)
    tokens = draw_tokens(random, length + more, length)
    expected = reference.forward(tokens, prompt=length).logits
    session = model.session()
    found = [session.prefill(tokens[:length], include_padding=True)]
    found += [session.step([token], include_padding=True) for token in tokens[length:]]
    assert rel_l2(np.concatenate(found), expected[length - 1 :]) <= FLOAT32
    whole = reference.forward(tokens[:length]).logits
    assert rel_l2(model.forward(tokens[:length], include_padding=True), whole) <= FLOAT32
    trace = model.trace(tokens[:length], include_padding=True)
    assert rel_l2(trace["logits"], whole) <= FLOAT32

    if length >= prefix_of(random) and more > 0:  # a further prompt is what steps are
        session = model.session()
        session.prefill(tokens[:length])
        assert rel_l2(session.prefill(tokens[length:], include_padding=True), expected[-1:]) <= FLOAT32


@settings(max_examples=20)
@given(random=prefix_models(), length=st.integers(2, 40) | st.integers(CHUNK, CHUNK + 20))
def test_scores_are_those_of_what_follows_one_token(random, length):
    model, tokens = load(random, dtype="float32"), draw_tokens(random, length, 1)
    logits = Model(random.config, random.tensors()).forward(tokens, prompt=1).logits[:, : random.config["vocab_size"]]
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    expected = np.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0]
    tolerance = 2 * FLOAT32 * np.abs(logits).max() + 1e-6
    np.testing.assert_allclose(model.score(tokens), expected, atol=tolerance)
    found = model.score(tokens[:1], tokens[1:])
    np.testing.assert_allclose(found.logprobs, expected, atol=tolerance)


@settings(max_examples=25)
@given(
    random=prefix_models(),
    lengths=st.lists(LENGTHS, min_size=2, max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_neighbours_change_no_bit(random, lengths, dtype):
    model = load(random, dtype=dtype, num_threads=2)
    prompts = [draw_tokens(random, length, seed) for seed, length in enumerate(lengths)]
    session = model.session(len(prompts))
    together = session.prefill(prompts)
    steps = session.step([0] * len(prompts))
    params = based.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = model.generate(prompts, params)
    for i, prompt in enumerate(prompts):
        alone = model.session()
        np.testing.assert_array_equal(alone.prefill(prompt)[0], together[i])
        np.testing.assert_array_equal(alone.step([0])[0], steps[i])
        assert model.generate(prompt, params)[0].outputs == outputs[i].outputs


@settings(max_examples=25)
@given(random=prefix_models(), length=st.integers(1, 90))
def test_forks_states_and_files_go_on(random, length, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "state"
    model = load(random, dtype="float32")
    session = model.session()
    tokens = draw_tokens(random, length, 3)
    session.prefill(tokens)
    before, fork, state = session.checkpoint(), session.fork(), session.state(0)
    session.save_state(path)
    expected = session.step([0])
    for other in (fork, model.session(states=[state])):
        np.testing.assert_array_equal(other.step([0]), expected)
    session.rollback(before)
    np.testing.assert_array_equal(session.step([0]), expected)
    session.load_state(path)
    np.testing.assert_array_equal(session.step([0]), expected)
    session.reset()
    session.restore(0, state)
    np.testing.assert_array_equal(session.step([0]), expected)


# ---- training --------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(random=prefix_models(), length=st.integers(1, 40) | st.integers(CHUNK, CHUNK + 20))
def test_the_model_in_pytorch_reads_the_prefix_too(random, length):
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM

    tokens = np.stack([draw_tokens(random, length, seed) for seed in range(2)])
    with directory_of(random) as directory:
        found = BasedForCausalLM.load(directory, device="cpu")(torch.from_numpy(tokens)).detach().numpy()
    reference = Model(random.config, random.tensors())
    assert rel_l2(found, np.stack([reference.forward(row).logits for row in tokens])) <= FLOAT32


def test_only_what_follows_the_prefix_is_learnt():
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM

    model = BasedForCausalLM(tiny().config, dtype=torch.float64)
    tokens = torch.arange(24).reshape(2, 12)
    log_probs = model(tokens)[:, 7:-1, : model.config.vocab_size].log_softmax(-1)  # of tokens 8 to 11
    expected = -log_probs.gather(-1, tokens[:, 8:, None]).mean()
    torch.testing.assert_close(model(tokens, labels=tokens), expected)
    with pytest.raises(
        ValueError, match=r"labels has 8 tokens a sequence, and this model reads the first 8 as a whole"
    ):
        model(tokens[:, :8], labels=tokens[:, :8])


def test_a_run_goes_on_from_a_model_with_a_prefix(tmp_path):
    torch = pytest.importorskip("torch")
    from based.torch import BasedForCausalLM
    from based.torch.train import read_config, train

    config = based.sizes.recipe("cP", 16, 2, 20, enc_length=8, vocab_size=257, end_token_id=256)
    BasedForCausalLM(based.ModelConfig.from_json(json.dumps(config))).save(tmp_path / "start")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"some words and {name} few more " * 40)
    values = {
        "output": "run",
        "model": {"from": "start"},
        "data": {"tokenizer": "bytes", "sequence_length": 12, "train": [{"text": "a.txt"}]},
        "training": {"steps": 2, "batch_size": 2, "precision": "float32", "device": "cpu"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
    }
    values["data"]["validation"] = [{"text": "b.txt"}]
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    result = train(read_config(tmp_path / "config.yaml"))
    assert np.isfinite(result.validation_loss)
    model = based.load(tmp_path / "run" / "model", device="cpu")
    text = (tmp_path / "b.txt").read_bytes()
    tokens = [256, *text, 256]
    found = []
    for begin in range(0, len(tokens) - 1, 11):
        window = tokens[begin : begin + 12]
        logits = torch.from_numpy(model.forward(window)).log_softmax(-1)
        found += [-float(logits[t - 1, window[t]]) for t in range(8, len(window))]
    assert result.validation_loss == pytest.approx(np.mean(found), rel=1e-2)  # windows may begin elsewhere
    with pytest.raises(based.FormatError, match=r"data\.sequence_length: found 8, expected more than the 8 tokens"):
        train(read_config(tmp_path / "config.yaml", ["data.sequence_length=8"], tmp_path / "other"))


# ---- what is refused -------------------------------------------------------------------------------------------------


def tiny(enc_length: int = 8) -> based.Model:
    config = based.sizes.recipe("cPW", 16, 2, 20, window=5, enc_length=enc_length, vocab_size=31, end_token_id=None)
    return based.Model.random(based.ModelConfig.from_json(json.dumps(config)), device="cpu")


MESSAGE = r"sequence 0 has seen 3 tokens, and this model reads the first 8 tokens.*as one prompt, or feed single tokens"


def test_a_second_prompt_inside_the_prefix_changes_nothing():
    model = tiny()
    session, other = model.session(2), model.session(2)
    for each in (session, other):
        each.prefill([[1, 2, 3], list(range(9))])
    for call in (
        lambda: session.prefill([[4], [5]]),
        lambda: session.prefill([4, 5], [0]),
        lambda: session.generate([[4, 5], [5]], based.SamplingParams(max_tokens=2)),
        lambda: session.generate([[4], []], based.SamplingParams(max_tokens=2)),
    ):
        with pytest.raises(ValueError, match=MESSAGE):
            call()
    assert session.num_tokens == [3, 9]
    np.testing.assert_array_equal(session.step([6, 7]), other.step([6, 7]))


def test_what_is_allowed_inside_the_prefix():
    model = tiny()
    params = based.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    session = model.session()
    session.prefill([1, 2, 3])
    (output,) = session.generate([[]], params)  # goes on
    assert output.outputs[0].token_ids == model.generate([1, 2, 3], params)[0].outputs[0].token_ids
    assert session.num_tokens == [8]
    session.prefill([4, 5])  # the prefix is over
    session.reset()
    session.step([1])  # a prompt of one token
    with pytest.raises(ValueError, match="has seen 1 tokens"):
        session.prefill([2])
    for token in range(7):
        session.step([token])
    session.prefill([2, 3])


def test_a_prefix_is_read_as_a_whole():
    """Its last token changes the logits at its first one; what stands behind the prefix does not."""
    model = tiny()
    tokens = np.arange(20)
    logits = model.forward(tokens)
    inside, behind = tokens.copy(), tokens.copy()
    inside[7], behind[8] = 30, 30
    assert not np.array_equal(model.forward(inside)[0], logits[0])
    np.testing.assert_array_equal(model.forward(behind)[:8], logits[:8])
    assert tiny(1).config.prefix_tokens == 1 and based.load(device="cpu").config.prefix_tokens == 0
