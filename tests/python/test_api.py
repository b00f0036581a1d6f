"""Model, Session, SamplingParams and the core's smaller types, as a Python user meets them."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import based
import numpy as np
import pytest
from based import _core
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.reference.compare import max_abs, rel_l2

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("based-tiny", "based-tiny-bf16")
REL_L2, MAX_ABS = 2e-5, 5e-4  # golden/README.md: what float32 can do

BAD_IDS = [
    pytest.param([1, 258], ValueError, r"token id 258 at index 1 is outside \[0, vocab_size = 258\)", id="too large"),
    pytest.param([-1], ValueError, "token id -1 at index 0 is outside", id="negative"),
    pytest.param([1 << 70], ValueError, "1180591620717411303424 is outside", id="huge"),
    pytest.param(np.array([3, 300]), ValueError, "token id 300 at index 1", id="array, too large"),
    pytest.param(np.array([2**64 - 1], np.uint64), ValueError, "18446744073709551615", id="array, huge"),
    pytest.param([], ValueError, "is empty", id="empty"),
    pytest.param(np.array([], np.int64), ValueError, "is empty", id="array, empty"),
    pytest.param([1, True], TypeError, "index 1 must be an integer, not bool True", id="bool"),
    pytest.param([1.0], TypeError, r"index 0 must be an integer, not float 1\.0", id="float"),
    pytest.param([None], TypeError, "index 0 must be an integer, not NoneType None", id="None"),
    pytest.param(np.array([1.0]), TypeError, "must be integers, not an array of float64", id="array of floats"),
    pytest.param(np.array([True]), TypeError, "must be integers, not an array of bool", id="array of bools"),
    pytest.param(b"ab", TypeError, "sequence of integers, not bytes", id="bytes"),
    pytest.param(5, TypeError, "sequence of integers, not int 5", id="int"),
]


# ---- Model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_forward_matches_golden(case, models, golden):
    expected = golden(case)
    for ids, logits in zip(expected["input_ids"], expected["logits"], strict=True):
        found = models(case).forward(ids, include_padding=True)
        assert found.dtype == np.float32
        assert rel_l2(found, logits) <= REL_L2
        assert max_abs(found, logits) <= MAX_ABS
        np.testing.assert_array_equal(models(case).forward(ids), found[:, :258])


def test_trace_matches_golden(model, golden):
    layers = golden("based-tiny", "layers")
    trace = model.trace(layers["input_ids"], include_padding=True)
    assert set(trace) == {"embed", "mixer_out", "block_out", "final_norm", "logits"}
    for name, found in trace.items():
        assert found.shape == layers[name].shape
        assert rel_l2(found, layers[name]) <= REL_L2, name
    assert model.trace(layers["input_ids"])["logits"].shape == (70, 258)


def test_score_is_the_log_softmax_of_forward(model, golden):
    ids = golden("based-tiny")["input_ids"][0]
    logits = model.forward(ids).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = log_probs[np.arange(len(ids) - 1), ids[1:]]
    scores = model.score(ids)
    assert scores.shape == (69,)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert model.score(ids[:1]).shape == (0,)


def test_every_form_of_token_ids_is_the_same(model):
    ids = [72, 105, 33]
    expected = model.forward(ids)
    dtypes = (np.uint8, np.int16, np.int32, np.int64, np.uint64, ">i4")
    strided = np.array([[72, 0], [105, 0], [33, 0]])[:, 0]
    for form in [tuple(ids), "Hi!", [np.int32(i) for i in ids], strided, *(np.array(ids, dtype) for dtype in dtypes)]:
        np.testing.assert_array_equal(model.forward(form), expected)
    np.testing.assert_array_equal(model.forward(range(72, 73)), expected[:1])


class Exporter:
    """A tensor of another library: nothing but the protocol."""

    def __init__(self, tensor, **options):
        self._tensor = tensor
        self._options = options

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options | self._options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


def test_token_ids_come_in_by_dlpack(model):
    ids = np.array([72, 105, 33])
    expected = model.forward(ids)
    np.testing.assert_array_equal(model.forward(Exporter(ids)), expected)
    np.testing.assert_array_equal(model.session().prefill([Exporter(ids)])[0], model.session().prefill([ids])[0])
    params = based.SamplingParams(temperature=0)
    assert model.generate(Exporter(ids), params) == model.generate([ids], params)


@pytest.mark.parametrize(("ids", "error", "text"), BAD_IDS)
@pytest.mark.parametrize("call", ["forward", "score", "trace"])
def test_bad_token_ids(model, call, ids, error, text):
    with pytest.raises(error, match=text):
        getattr(model, call)(ids)
    assert model.forward([1]).shape == (1, 258)


def test_a_matrix_is_no_sequence(model):
    with pytest.raises(ValueError, match=r"must be a 1-D array, not one of shape \(2, 3\)"):
        model.forward(np.zeros((2, 3), np.int64))


def test_properties(model):
    assert model.config.vocab_size == 258
    assert model.config.eos_token_id is None  # 50256 in the file, beyond this vocabulary
    assert [layer.mixer for layer in model.config.layers[:3]] == ["gated_conv", "linear_attention", "sliding_window"]
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert model.num_threads >= 1
    assert model.num_parameters == model.config.num_parameters > 1e6
    assert model.weight_nbytes >= 4 * model.num_parameters
    assert 0 < model.state_nbytes < 1e6
    assert model.kernel_isa in based.build_info()["instruction_sets"]
    assert len(model.fingerprint) == 16
    assert model.tokenizer.get_vocab_size() == 258
    assert "1.3 M parameters, float32 on cpu" in repr(model)


def test_bfloat16_is_kept_unless_asked_otherwise(golden):
    model = based.load(GOLDEN / "based-tiny-bf16")
    assert model.dtype == "bfloat16"
    expected = golden("based-tiny-bf16")
    assert rel_l2(model.forward(expected["input_ids"][0], include_padding=True), expected["logits"][0]) <= 4e-2
    assert based.load(GOLDEN / "based-tiny").dtype == "float32"
    assert based.load(GOLDEN / "based-tiny", dtype="bfloat16").dtype == "bfloat16"


def test_number_of_threads_changes_nothing(model, golden):
    ids = golden("based-tiny")["input_ids"][0]
    alone = based.load(GOLDEN / "based-tiny", num_threads=1)
    assert alone.num_threads == 1
    same = based.load(GOLDEN / "based-tiny", device="cpu", deterministic=True)  # as it is on a CPU anyway
    np.testing.assert_array_equal(same.forward([1, 2, 3]), alone.forward([1, 2, 3]))
    np.testing.assert_array_equal(alone.forward(ids), model.forward(ids))


def test_random_model_is_seeded(model):
    one, same, other = (based.Model.random(model.config, seed) for seed in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert np.isfinite(one.forward([1, 2, 3])).all()
    assert one.tokenizer is None
    with pytest.raises(ValueError, match="seed"):
        based.Model.random(model.config, -1)


def test_import_is_cheap():
    """Beside NumPy and the modules of based: few of Python's own, and nothing that is slow."""
    code = """
import sys
import numpy
before = set(sys.modules)
import based
new = set(sys.modules) - before
print(len(new), *{"tokenizers", "huggingface_hub", "asyncio", "torch", "tqdm", "inspect", "logging", "ssl"} & new)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *slow = run.stdout.split()
    assert not slow and int(count) <= 80


# ---- Session ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_decoding_matches_golden(case, models, golden):
    expected = golden(case)
    session = models(case).session(2)
    length = expected["input_ids"].shape[1]
    found = [session.prefill(expected["input_ids"], include_padding=True)]
    for column in expected["greedy_ids"].T[length:-1]:
        found.append(session.step(column, include_padding=True))
    decoded = np.stack(found, axis=1)
    assert rel_l2(decoded, expected["decode_logits"]) <= REL_L2
    assert max_abs(decoded, expected["decode_logits"]) <= MAX_ABS
    assert session.num_tokens == [length + 23] * 2


def test_logits_are_numpy_and_dlpack(model):
    logits = model.session(2).prefill([[1], [2, 3]])
    assert isinstance(logits, np.ndarray)
    assert (logits.shape, logits.dtype) == ((2, 258), np.float32)
    assert logits.argmax(-1).shape == (2,)
    np.testing.assert_array_equal(np.from_dlpack(logits), logits)


def test_listed_sequences_alone_advance(model):
    session = model.session(3)
    session.prefill([[1], [2], [3]])
    logits = session.prefill([[7, 8], "Hi"], sequences=[2, 0])
    assert session.num_tokens == [3, 1, 3]
    session.step([9], sequences=[1])
    assert session.num_tokens == [3, 2, 3]
    other = model.session()
    np.testing.assert_allclose(other.prefill([3, 7, 8])[0], logits[0], atol=1e-4)


def test_fork_checkpoint_reset_copy(model):
    session = model.session(2)
    session.prefill([[1, 2, 3], [4, 5]])
    fork, mark = session.fork(), session.checkpoint()
    assert mark.num_tokens == fork.num_tokens == [3, 2]
    assert mark.state_nbytes == session.state_nbytes == 2 * model.state_nbytes
    expected = session.step([6, 7])
    np.testing.assert_array_equal(fork.step([6, 7]), expected)
    session.step([8, 9])
    session.rollback(mark)
    np.testing.assert_array_equal(session.step([6, 7]), expected)
    session.copy(0, 1)
    assert session.num_tokens == [4, 4]
    np.testing.assert_array_equal(*session.step([1, 1]))
    session.reset(0)
    assert session.num_tokens == [0, 5]
    session.reset()
    assert session.num_tokens == [0, 0]


def test_state_goes_through_a_file(model, tmp_path):
    session = model.session(2)
    session.prefill([[1, 2, 3], [4, 5]])
    session.save_state(tmp_path / "state.safetensors")
    other = model.session(2)
    other.load_state(str(tmp_path / "state.safetensors"))
    assert other.num_tokens == [3, 2]
    np.testing.assert_array_equal(other.step([6, 7]), session.step([6, 7]))


def test_one_state_starts_a_batch(model, tmp_path):
    session = model.session(2)
    session.prefill([[1, 2, 3], [4, 5]])
    state = session.state(1)
    assert state.num_tokens == 2
    assert state.nbytes >= model.state_nbytes
    expected = session.step([7], [1])[0]
    assert state.num_tokens == 2  # it did not change with its session
    state.save(tmp_path / "state")
    for one in (state, based.State.load(tmp_path / "state", model)):
        batch = model.session(states=[one] * 4)
        assert batch.num_tokens == [2] * 4
        for row in batch.step([7] * 4):
            np.testing.assert_array_equal(row, expected)
    other = model.session(3)
    other.prefill([[9], [8, 7], [6]])
    other.load_state(tmp_path / "state", sequence=1)
    assert other.num_tokens == [1, 2, 1]
    np.testing.assert_array_equal(other.step([7], [1])[0], expected)
    other.restore(2, state)
    np.testing.assert_array_equal(other.step([7], [2])[0], expected)
    assert model.session(states=[model.session().state()]).num_tokens == [0]


def test_a_sequence_of_a_file_of_several(model, tmp_path):
    session = model.session(2)
    session.prefill([[1, 2, 3], [4, 5]])
    session.save_state(tmp_path / "state")
    states = [based.State.load(tmp_path / "state", model, sequence=b) for b in range(2)]
    assert [state.num_tokens for state in states] == [3, 2]
    np.testing.assert_array_equal(model.session(states=states).step([6, 7]), session.step([6, 7]))
    with pytest.raises(based.StateError, match=r"holds 2 sequences: say which one, 0 to 1"):
        based.State.load(tmp_path / "state", model)
    with pytest.raises(based.StateError, match=r"holds 2 sequences, found a request for sequence 2"):
        based.State.load(tmp_path / "state", model, 2)


def test_states_that_did_not_change_are_not_copied_again(model):
    """generate() can be undone, and so can the prefill in it: one copy of the states serves both."""
    session = model.session(8)
    session.prefill([[1, 2]] * 8)
    held = model.memory.states
    checkpoint = session.checkpoint()
    copied = model.memory.states - held
    assert copied >= 8 * model.state_nbytes
    again = session.checkpoint()
    assert model.memory.states - held == copied
    assert [a is not None for a in again.states] == [True] * 8
    del checkpoint, again
    assert model.memory.states == held


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, s: m.session(states=[]), ValueError, "batch_size is 0"),
        (lambda m, s: m.session(states=[None]), TypeError, "states must hold based.State, not NoneType"),
        (lambda m, s: m.session(3, states=[s.state()]), ValueError, "batch_size is 3, expected 1"),
        (lambda m, s: s.state(1), ValueError, r"sequence 1 is outside \[0, 1\)"),
        (lambda m, s: s.state(1.0), TypeError, "sequence must be an integer"),
        (lambda m, s: s.restore(0, None), TypeError, "state must be a State, not None"),
        (lambda m, s: s.restore(0, m), TypeError, "incompatible function arguments"),
        (lambda m, s: s.restore(5, s.state()), ValueError, "sequence 5 is outside"),
        (lambda m, s: based.State.load("missing", m), FileNotFoundError, "missing"),
        (lambda m, s: based.State.load("missing", 5), TypeError, "model must be a Model, not int 5"),
        (lambda m, s: s.load_state("missing", sequence=0), FileNotFoundError, "missing"),
    ],
)
def test_bad_uses_of_states(model, call, error, text):
    session = model.session()
    session.prefill([1, 2])
    with pytest.raises(error, match=text):
        call(model, session)
    assert session.num_tokens == [2]


def test_an_empty_text_goes_on_without_a_tokenizer(mute_model):
    params = based.SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    session, other = mute_model.session(), mute_model.session()
    for each in (session, other):
        each.generate([[1, 2, 3]], params)
    assert session.generate("", params)[0].outputs == other.generate([[]], params)[0].outputs


def test_states_of_another_model(model, mute_model):
    state = model.session().state()
    for call in (lambda: mute_model.session(states=[state]), lambda: mute_model.session().restore(0, state)):
        with pytest.raises(based.StateError, match="another model"):
            call()


def test_reading_the_number_of_tokens_disturbs_nobody(model):
    """A monitor may poll while another thread computes."""
    session = model.session()
    stop = threading.Event()
    seen = []

    def poll():
        while not stop.is_set():
            seen.append(session.num_tokens[0])

    monitor = threading.Thread(target=poll)
    monitor.start()
    try:
        for _ in range(300):
            session.step([1])
    finally:
        stop.set()
        monitor.join()
    assert session.num_tokens == [300]
    assert seen == sorted(seen)


def test_session_outlives_its_model():
    session = based.load(GOLDEN / "based-tiny").session()
    assert session.prefill([1, 2]).shape == (1, 258)
    checkpoint = session.checkpoint()
    del session
    assert checkpoint.num_tokens == [2]


@pytest.mark.parametrize(("ids", "error", "text"), BAD_IDS)
def test_bad_tokens_leave_the_session_as_it_was(model, ids, error, text):
    session = model.session()
    session.prefill([1, 2, 3])
    expected = session.fork().step([4])
    with pytest.raises(error, match=text):
        session.prefill(ids if isinstance(ids, int) else [ids])
    with pytest.raises(error, match=text):
        session.step(ids)
    assert session.num_tokens == [3]
    np.testing.assert_array_equal(session.step([4]), expected)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: s.prefill([[1]]), ValueError, "for 1 sequences, expected 2"),
        (lambda s: s.prefill([[1], [2], [3]]), ValueError, "for 3 sequences, expected 2"),
        (lambda s: s.prefill([[1], []]), ValueError, "prompt 1 is empty"),
        (lambda s: s.prefill([[1], 5]), TypeError, "prompt 1: token ids must be a sequence"),
        (lambda s: s.prefill([[1]], [2]), ValueError, r"sequence 2 is outside \[0, 2\)"),
        (lambda s: s.prefill([[1]], [-1]), ValueError, "sequence -1 is outside"),
        (lambda s: s.prefill([[1], [1]], [0, 0]), ValueError, "sequence 0 is listed twice"),
        (lambda s: s.prefill([[1]], [0.0]), TypeError, r"sequences\[0\] must be an integer, not float"),
        (lambda s: s.step([1]), ValueError, "for 1 sequences, expected 2"),
        (lambda s: s.step(1), TypeError, "tokens: token ids must be a sequence of integers, not int 1"),
        (lambda s: s.reset(2), ValueError, "sequence 2 is outside"),
        (lambda s: s.reset(True), TypeError, "sequence must be an integer, not bool True"),
        (lambda s: s.copy(0, 2), ValueError, "sequence 2 is outside"),
        (lambda s: s.rollback(None), TypeError, "incompatible function arguments"),
        (lambda s: s.load_state("missing"), FileNotFoundError, "missing"),
        (lambda s: s.save_state("/nowhere/state"), FileNotFoundError, "/nowhere"),
    ],
)
def test_bad_calls_leave_the_session_as_it_was(model, call, error, text):
    session = model.session(2)
    session.prefill([[1, 2], [3]])
    expected = session.fork().step([4, 5])
    with pytest.raises(error, match=text):
        call(session)
    assert session.num_tokens == [2, 1]
    np.testing.assert_array_equal(session.step([4, 5]), expected)


def test_foreign_states_are_refused(model, mute_model, tmp_path):
    session = model.session()
    session.prefill([1])
    path = tmp_path / "state.safetensors"
    session.save_state(path)
    with pytest.raises(based.StateError, match="1 sequences, the session 2"):
        model.session(2).rollback(session.checkpoint())
    with pytest.raises(based.StateError, match="another model"):
        mute_model.session().rollback(session.checkpoint())
    with pytest.raises(based.StateError, match=r"(?s)state\.safetensors.*1.*2"):
        model.session(2).load_state(path)
    with pytest.raises(based.StateError, match=f"{model.fingerprint}.*{mute_model.fingerprint}"):
        mute_model.session().load_state(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    other = model.session()
    other.prefill([5, 6])
    with pytest.raises(based.FormatError, match="checksum"):
        other.load_state(path)
    assert other.num_tokens == [2]


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (1 << 40, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_batch_size(model, size, error):
    with pytest.raises(error, match="batch_size"):
        model.session(size)


# ---- SamplingParams --------------------------------------------------------------------------------------------------


def test_sampling_defaults_are_vllms():
    params = based.SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens, params.temperature) == (1, 16, 0, 1.0)
    assert (params.top_p, params.top_k, params.min_p, params.seed, params.logprobs) == (1.0, 0, 0.0, None, None)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.ignore_eos) == ([], [], {}, False)


def test_sampling_params_compare_copy_pickle_and_print():
    params = based.SamplingParams(
        temperature=np.float32(0.5), max_tokens=np.int64(7), stop="x", seed=2**64 - 1, logit_bias={3: -1}, logprobs=2
    )
    assert params.temperature == 0.5
    assert params.stop == ["x"]
    for again in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert again == params
        assert again is not params
    assert eval(repr(params), {"SamplingParams": based.SamplingParams}) == params
    again.top_k = 5
    assert again != params
    assert params != "params"
    params.stop = ("a", "b")
    params.logit_bias = None
    params.seed = None
    assert (params.stop, params.logit_bias, params.seed) == (["a", "b"], {}, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.5),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -3.0),
        ("frequency_penalty", float("nan")),
        ("seed", -1),
        ("seed", 1 << 64),
        ("stop", ""),
        ("stop_token_ids", [-1]),
        ("logprobs", -1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
    ],
)
def test_sampling_values_outside_their_domain(field, value):
    with pytest.raises(ValueError, match=field):
        based.SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1.0),
        ("n", True),
        ("max_tokens", "16"),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", False),
        ("top_k", 3.0),
        ("seed", 1.5),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", ["a", 5]),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("logprobs", True),
        ("logit_bias", [1]),
        ("logit_bias", {1.0: 1.0}),
        ("logit_bias", {1: "a"}),
    ],
)
def test_sampling_values_of_wrong_types(field, value):
    with pytest.raises(TypeError, match=field):
        based.SamplingParams(**{field: value})
    params = based.SamplingParams()
    with pytest.raises(TypeError, match=field):
        setattr(params, field, value)
    assert params == based.SamplingParams()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 2}, "SamplingParams has no field best_of. The fields are n, max_tokens, min_tokens, "),
        ({"max_new_tokens": 5}, "SamplingParams has no field max_new_tokens: here it is max_tokens. The fields are "),
        (
            {"n": 1, "temprature": 1},
            "SamplingParams has no field temprature: did you mean temperature? The fields are ",
        ),
        ({"do_sample": False}, "do_sample: temperature=0 chooses the likeliest token, any other temperature samples."),
    ],
)
def test_unknown_sampling_field(fields, message):
    with pytest.raises(TypeError) as caught:
        based.SamplingParams(**fields)
    assert message in str(caught.value)


def test_sampling_fields_have_names():
    with pytest.raises(TypeError, match="takes its fields by name"):
        based.SamplingParams(5)


# ---- the core's smaller types ----------------------------------------------------------------------------------------


def test_config_round_trip(model):
    text = model.config.to_json()
    config = based.ModelConfig.from_json(text)
    assert config == model.config
    assert _core.check_config(text, "here") == text
    assert json.loads(text)["hidden_size"] == config.hidden_size == 128
    assert config.mlp.gated
    assert config.mlp.activation.name == "silu"
    assert config.norm.name == "rms_norm"
    assert config.layers[1].num_features == 1 + 16 + 136
    assert config.layers[2].window == 9
    assert config.layers[0] == model.config.layers[0] != model.config.layers[1]
    with pytest.raises(based.FormatError, match=r"there: .*hidden_size"):
        _core.check_config(text.replace("hidden_size", "hidden"), "there")


def test_tensor_exports_its_memory(model):
    core = _core.Model.random(model.config)
    tensor = core.forward([1, 2, 3])
    assert (tensor.shape, tensor.dtype, tensor.device) == ((3, 264), "float32", "cpu")
    assert tensor.nbytes == 3 * 264 * 4
    assert tensor.__dlpack_device__() == (1, 0)
    array, exported = np.asarray(tensor), np.from_dlpack(tensor)
    assert np.shares_memory(array, exported)
    assert not np.shares_memory(array, np.from_dlpack(Exporter(tensor, copy=True)))
    assert np.asarray(tensor, np.float64).dtype == np.float64
    for version in (None, (0, 8), (1, 0)):
        tensor.__dlpack__(max_version=version)  # a capsule that nobody takes frees itself
    with pytest.raises(BufferError, match="stream"):
        tensor.__dlpack__(stream=1)
    with pytest.raises(BufferError, match="another device"):
        tensor.__dlpack__(dl_device=(2, 0))
    expected = array.copy()
    del tensor, array
    np.testing.assert_array_equal(exported, expected)


def test_torch_shares_memory(model):
    torch = pytest.importorskip("torch")
    for tensor in (_core.Model.random(model.config).forward([1, 2, 3]), model.session().prefill([1, 2, 3])):
        shared = torch.from_dlpack(tensor)
        shared[0, 0] = 7
        assert np.asarray(tensor)[0, 0] == 7
    ids = torch.tensor([72, 105, 33])
    np.testing.assert_array_equal(model.forward(ids), model.forward([72, 105, 33]))


def test_safetensors_agrees_with_the_original(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([True, False, True]),
        "c": np.array(5, np.int64),
        "d": np.zeros((0, 4), np.float16),
    }
    save_file(arrays, tmp_path / "theirs", metadata={"key": "value"})
    file = _core.SafetensorsFile(tmp_path / "theirs")
    assert file.metadata() == {"key": "value"}
    assert file.dtypes() == {"a": "float32", "b": "bool", "c": "int64", "d": "float16"}
    found = file.tensors()
    del file
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert not found[name].flags.writeable

    bits = np.array([0x3F80, 0xBF80], np.uint16)
    _core.write_safetensors(tmp_path / "ours", [("x", bits, "bfloat16")], {})
    ours = _core.SafetensorsFile(str(tmp_path / "ours"))
    assert ours.dtypes()["x"] == "bfloat16"
    np.testing.assert_array_equal(ours.tensors()["x"], bits)
    _core.write_safetensors(tmp_path / "ours", [(n, a, str(a.dtype)) for n, a in arrays.items()], {"key": "value"})
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)


def test_unaligned_tensors_are_read_safely(tmp_path):
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    data = b"\x01" + np.array([1.5, -2.0], np.float32).tobytes()
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    found = _core.SafetensorsFile(path).tensors()["b"]
    assert not found.flags.aligned
    assert found.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ([("a", np.zeros((2, 4), np.float32)[:, ::2], "float32")], TypeError, "tensor 'a' must be a C-contiguous"),
        ([("a", np.zeros(2, np.float32), "bfloat16")], TypeError, "float32 cannot hold the bits of bfloat16"),
        ([("a", np.zeros(2, np.float32), "float99")], ValueError, "float99"),
        ([("a", np.zeros(2, np.int8), "int8")] * 2, ValueError, "a"),
    ],
)
def test_bad_tensors_are_not_written(tmp_path, tensors, error, text):
    with pytest.raises(error, match=text):
        _core.write_safetensors(tmp_path / "file", tensors, {})
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.floats(width=32), max_size=20))
def test_convert_dtype(values):
    array = np.array(values, np.float32).reshape(-1, 1)
    half = _core.convert_dtype(array, "float32", "float16")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half, array.astype(np.float16))
    np.testing.assert_array_equal(_core.convert_dtype(half, "float16", "float32"), half.astype(np.float32))
    bits = _core.convert_dtype(array, "float32", "bfloat16")
    assert bits.dtype == np.uint16
    assert bits.shape == array.shape
    widened = _core.convert_dtype(bits, "bfloat16", "float32")
    np.testing.assert_array_equal(_core.convert_dtype(widened, "float32", "bfloat16") & 0x7FC0, bits & 0x7FC0)
    finite = np.isfinite(array) & np.isfinite(widened)
    np.testing.assert_allclose(widened[finite], array[finite], rtol=2**-8, atol=2**-133)
    with pytest.raises(ValueError, match="int8"):
        _core.convert_dtype(array, "float32", "int8")


def test_exceptions_are_what_python_users_expect():
    assert issubclass(based.FormatError, (based.Error, ValueError))
    for error, parent in [
        (based.FormatError, ValueError),
        (based.StateError, ValueError),
        (based.SessionBusyError, RuntimeError),
        (based.UnsupportedError, RuntimeError),
    ]:
        assert issubclass(error, based.Error)
        assert issubclass(error, parent)
        assert error.__module__ == "based"


def test_system_errors_have_their_own_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing") as info:
        _core.SafetensorsFile(tmp_path / "missing")
    assert info.value.errno == 2
    with pytest.raises(OSError, match=str(tmp_path)):
        _core.SafetensorsFile(tmp_path)
    with pytest.raises(OSError, match="full"):
        _core.write_safetensors("/dev/full/x", [], {})
