"""Models on a GPU: the golden cases, the laws of docs/architecture.md, memory. BASED_LONG=1 runs the long forms.

The CPU is bit for bit independent of neighbours and cuts; a GPU chooses the kernels of matrix products by the shape of
a batch, so there the same law holds within the golden files' tolerance, and to the bit with `deterministic`.
"""

import asyncio
import gc
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import based
import numpy as np
import pytest
from based import SamplingParams, sizes

from tests.reference.checkpoints import ON_A_GPU, RandomModel, Seeded, random_model
from tests.reference.compare import max_abs, rel_l2
from tests.reference.files import bfloat16, read_layers, read_safetensors, round_to, write_state
from tests.reference.model import Model as Reference

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["based-tiny", "based-tiny-bf16", "attn-tiny", "mamba-tiny"]
CUDA = "cuda:0"
FLOAT32 = 2e-5  # rel-L2, golden/README.md
LONG = os.environ.get("BASED_LONG") == "1"


@pytest.fixture(scope="module")
def load():
    """load(case, dtype, device): a golden case, kept."""
    loaded: dict[tuple[str, str, str], based.Model] = {}

    def get(case: str = "based-tiny", dtype: str = "float32", device: str = CUDA) -> based.Model:
        key = (case, dtype, device)
        if key not in loaded:
            loaded[key] = based.load(GOLDEN / case, dtype=dtype, device=device)
        assert (loaded[key].device, loaded[key].dtype) == (device, dtype)
        return loaded[key]

    return get


def assert_float32(found: Any, expected: Any) -> None:
    assert rel_l2(found, expected) <= FLOAT32
    assert max_abs(found, expected) <= 5e-4


def assert_half(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert rel_l2(found, expected) <= 4e-2
    assert np.quantile(np.abs(found - expected), 0.999) <= 0.4
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.9


CHECKS = {"float32": assert_float32, "bfloat16": assert_half, "float16": assert_half}
HALF_OR_SINGLE = pytest.mark.parametrize("dtype", CHECKS)


def decode(model: based.Model, prompts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Logits after the prompts (B, n), then after each of ids (B, n + 24) but the last."""
    session = model.session(len(prompts))
    logits = [np.asarray(session.prefill(list(prompts), include_padding=True))]
    logits += [np.asarray(session.step(column, include_padding=True)) for column in ids.T[prompts.shape[1] : -1]]
    return np.stack(logits, axis=1)


def tokens_of(model: based.Model, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, length)


# ---- golden cases ----------------------------------------------------------------------------------------------------


@HALF_OR_SINGLE
@pytest.mark.parametrize("case", CASES)
def test_golden_logits(load, golden, case, dtype):
    model, expected = load(case, dtype), golden(case)
    found = np.stack([np.asarray(model.forward(ids, include_padding=True)) for ids in expected["input_ids"]])
    CHECKS[dtype](found, expected["logits"])
    CHECKS[dtype](decode(model, expected["input_ids"], expected["greedy_ids"]), expected["decode_logits"])


@pytest.mark.parametrize(
    ("case", "file", "suffix"),
    [(case, "golden", "") for case in CASES] + [("based-tiny", "short", f"_{n}") for n in (1, 2, 3)],
)
def test_golden_greedy_ids(load, golden, case, file, suffix):
    expected = golden(case, file)
    prompts, ids = expected[f"input_ids{suffix}"], expected[f"greedy_ids{suffix}"]
    outputs = load(case).generate(prompts, SamplingParams(max_tokens=24, temperature=0))
    assert [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs] == ids.tolist()
    for dtype, check in CHECKS.items():
        check(decode(load(case, dtype), prompts, ids), expected[f"decode_logits{suffix}"])


def test_golden_layers(load, golden):
    expected = golden("based-tiny", "layers")
    for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", 4e-2), ("float16", 4e-2)):
        trace = load(dtype=dtype).trace(expected["input_ids"], include_padding=True)
        for name, values in trace.items():
            assert rel_l2(values, expected[name]) <= tolerance, (dtype, name)


@pytest.mark.parametrize("seed", range(200 if LONG else 40))
def test_random_architectures(tmp_path, seed):
    """Any layer kinds and sizes, against float64: whole, cut into calls, and step by step."""
    # A norm of one or two numbers that cancel is nothing but their rounding.
    choose = Seeded(seed)
    while (drawn := random_model(choose, kinds=ON_A_GPU)).config["hidden_size"] < 3:
        pass
    drawn.write(tmp_path / "model")
    model = based.load(tmp_path / "model", device=CUDA, dtype="float32")
    tokens = tokens_of(model, 150, seed)
    expected = Reference(drawn.config, drawn.tensors()).forward(tokens).logits
    assert rel_l2(model.forward(tokens, include_padding=True), expected) <= FLOAT32
    session, found, ends = model.session(), [], []
    for piece in (tokens[:1], tokens[1:64], tokens[64:66], tokens[66:140]):
        found.append(session.prefill(piece, include_padding=True))
        ends.append(session.num_tokens[0] - 1)
    for token in tokens[140:]:
        found.append(session.step([token], include_padding=True))
        ends.append(session.num_tokens[0] - 1)
    assert rel_l2(np.concatenate([np.asarray(logits) for logits in found]), expected[ends]) <= FLOAT32
    scores = np.asarray(expected)[:, : model.config.vocab_size]
    scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        model.score(tokens), scores[np.arange(149), tokens[1:]], atol=2 * FLOAT32 * scale + 1e-6, rtol=0
    )


# ---- the laws --------------------------------------------------------------------------------------------------------


@HALF_OR_SINGLE
@pytest.mark.parametrize(
    "cuts",
    [[1], [63, 64], [64, 129], [1, 2, 3, 299], list(range(1, 40)), [90, *range(91, 96), 110, *range(111, 130), 131]],
)
def test_decode_equals_prefill(load, dtype, cuts):
    model = load(dtype=dtype)
    tokens = tokens_of(model, 300)
    whole = np.asarray(model.forward(tokens))
    session, found = model.session(), []
    for begin, end in zip([0, *cuts], [*cuts, 300], strict=True):
        found.append(np.asarray(session.prefill(tokens[begin:end]))[0])
    CHECKS[dtype](found, whole[[*(cut - 1 for cut in cuts), 299]])


@HALF_OR_SINGLE
def test_neighbours_do_not_matter(load, dtype):
    model = load(dtype=dtype)
    prompts = [tokens_of(model, length, seed) for seed, length in enumerate((1, 5, 64, 65, 200, 1, 700))]
    session = model.session(len(prompts))
    together = [np.asarray(session.prefill(prompts)), *(np.asarray(session.step([token] * 7)) for token in (3, 4, 5))]
    some = np.asarray(session.step([6, 6], [4, 1]))
    for i, prompt in enumerate(prompts):
        alone = model.session()
        found = [np.asarray(alone.prefill(prompt)), *(np.asarray(alone.step([token])) for token in (3, 4, 5))]
        CHECKS[dtype]([logits[i : i + 1] for logits in together], found)
        if i in (4, 1):
            CHECKS[dtype](some[[4, 1].index(i)], np.asarray(alone.step([6]))[0])


@HALF_OR_SINGLE
def test_save_load_fork_and_rollback_change_no_bit(load, tmp_path, dtype):
    model = load(dtype=dtype)
    session = model.session(3)
    session.prefill([tokens_of(model, n, n) for n in (10, 200, 65)])
    session.save_state(tmp_path / "state")
    loaded = model.session(3)
    loaded.load_state(tmp_path / "state")
    fork, checkpoint = session.fork(), session.checkpoint()

    def go_on(which: based.Session) -> list[np.ndarray]:
        prompts = [tokens_of(model, n, n) for n in (70, 1, 3)]
        return [np.asarray(which.prefill(prompts)), *(np.asarray(which.step([i, i, i])) for i in range(5))]

    expected = go_on(session)
    session.rollback(checkpoint)
    for which in (session, loaded, fork):
        assert which.num_tokens == [10, 200, 65]
        for a, b in zip(go_on(which), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    session.copy(1, 0)
    logits = np.asarray(session.step([9, 9, 9]))
    np.testing.assert_array_equal(logits[0], logits[1])
    session.reset()
    assert session.num_tokens == [0, 0, 0]


@HALF_OR_SINGLE
@pytest.mark.parametrize("pending", range(sizes.PENDING_TOKENS))
def test_pending_tokens_change_no_bit(load, tmp_path, dtype, pending):
    """A linear layer adds tokens to its sums a few at a time: cut at every number of those that wait."""
    model = load(dtype=dtype)
    session = model.session(2)
    session.prefill([tokens_of(model, n, n) for n in (30, 5)])
    for i in range(pending):
        session.step([i, i + 1])
    session.save_state(tmp_path / "state")
    for name, (kept, values) in read_safetensors(tmp_path / "state").items():
        if "pending" in name:
            assert (kept, len(values)) == (dtype, pending)
    linear = sum(isinstance(mixer, based.LinearAttentionConfig) for mixer in model.config.layers)
    found = sum("pending_keys" in name for name in read_safetensors(tmp_path / "state"))
    assert found == (2 * linear if pending else 0)
    loaded = model.session(2)
    loaded.load_state(tmp_path / "state")
    same = [session, loaded, session.fork()]
    marks = [which.checkpoint() for which in same]

    def go_on(which: based.Session, steps: int) -> list[np.ndarray]:
        prompts = [tokens_of(model, n, n) for n in (7, 70)]
        first = [np.asarray(which.step([i, i])) for i in range(steps)]
        return [*first, np.asarray(which.prefill(prompts)), *(np.asarray(which.step([i, 9])) for i in range(11))]

    for steps in (0, 3, 10):
        expected = go_on(session, steps)
        session.rollback(marks[0])
        for which, mark in zip(same, marks, strict=True):
            for a, b in zip(go_on(which, steps), expected, strict=True):
                np.testing.assert_array_equal(a, b)
            which.rollback(mark)


@pytest.mark.parametrize("count", [1, 7, 8, 20])
@pytest.mark.parametrize(("saved", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_pending_tokens_of_another_device(load, tmp_path, count, saved, dtype):
    """More of them than this one leaves, or of another dtype: added to the sums as the CPU does."""
    cpu, gpu = load(device="cpu"), load(dtype=dtype)
    source, expected, found = cpu.session(), cpu.session(), gpu.session()
    source.prefill(tokens_of(cpu, 60))
    source.save_state(tmp_path / "state")
    tensors = read_layers(tmp_path / "state")[0]
    normal = np.random.default_rng(count).normal
    for i, mixer in enumerate(cpu.config.layers):
        if isinstance(mixer, based.LinearAttentionConfig):
            for name, width in (("keys", mixer.feature_dim), ("values", mixer.head_dim)):
                values = round_to(normal(size=(count, mixer.num_heads, width)), saved)
                tensors[f"layers.{i}.pending_{name}"] = saved, values
    write_state(tmp_path / "state", [(60, tensors)], fingerprint=cpu.fingerprint, format_version="2")
    for session in (expected, found):
        session.load_state(tmp_path / "state")
    logits = [[np.asarray(session.step([i]))[0] for i in range(12)] for session in (found, expected)]
    CHECKS[dtype](*logits)
    assert (dtype == saved and count < sizes.PENDING_TOKENS) == saved_again(gpu, tmp_path / "state")


def saved_again(model: based.Model, path: Path) -> bool:
    """Whether a state that is loaded and saved keeps its pending tokens; what need not be rounded is as it was."""
    session = model.session()
    session.load_state(path)
    before = read_layers(path)[0]
    session.save_state(path)
    after = read_layers(path)[0]
    for name, (dtype, values) in after.items():
        exact = "pending" in name or (model.dtype == "float32" and "taylor" not in name)
        if exact and dtype == before[name][0]:
            np.testing.assert_array_equal(values, before[name][1])
    return any("pending" in name for name in after)


@HALF_OR_SINGLE
@pytest.mark.parametrize("pending", range(sizes.PENDING_TOKENS))
def test_pending_tokens_move_to_the_cpu_and_back(load, tmp_path, dtype, pending):
    cpu, gpu = load(device="cpu"), load(dtype=dtype)
    tokens = tokens_of(cpu, 220, pending)
    session, on_cpu, back = gpu.session(), cpu.session(), gpu.session()
    session.prefill(tokens[:100])
    for token in tokens[100 : 100 + pending]:
        session.step([token])
    session.save_state(tmp_path / "state")
    on_cpu.load_state(tmp_path / "state")
    on_cpu.save_state(tmp_path / "state")
    assert not any("pending" in name for name in read_safetensors(tmp_path / "state"))
    back.load_state(tmp_path / "state")
    expected = cpu.forward(tokens)[100 + pending :]
    for which in (session, on_cpu, back):
        CHECKS[dtype]([np.asarray(which.step([token]))[0] for token in tokens[100 + pending :]], expected)


@HALF_OR_SINGLE
@pytest.mark.parametrize("to_gpu", [False, True])
def test_states_move_between_cpu_and_gpu(load, tmp_path, dtype, to_gpu):
    cpu, gpu = load(device="cpu"), load(dtype=dtype)
    source, target = (cpu, gpu) if to_gpu else (gpu, cpu)
    tokens = tokens_of(cpu, 220)
    session, moved = source.session(), target.session()
    session.prefill(tokens[:200])
    session.save_state(tmp_path / "state")
    moved.load_state(tmp_path / "state")
    assert moved.num_tokens == [200]
    found = [np.asarray(moved.step([token]))[0] for token in tokens[200:]]
    CHECKS[dtype](found, cpu.forward(tokens)[200:])


def test_failures_change_nothing(load, tmp_path):
    model = load()
    session = model.session(2)
    session.prefill([tokens_of(model, 30), tokens_of(model, 40)])
    fork = session.fork()
    (tmp_path / "damaged").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    for call, error in (
        (lambda: session.prefill([[1], [258]]), ValueError),
        (lambda: session.step([1, -1]), ValueError),
        (lambda: session.step([1]), ValueError),
        (lambda: session.prefill([[1]], [2]), ValueError),
        (lambda: session.load_state(tmp_path / "damaged"), based.FormatError),
        (lambda: session.load_state(tmp_path / "missing"), FileNotFoundError),
        (lambda: session.rollback(model.session().checkpoint()), based.StateError),
        (lambda: session.generate([[1], [2]], SamplingParams(max_tokens=4, logit_bias={300: 1.0})), ValueError),
    ):
        with pytest.raises(error):
            call()
        assert session.num_tokens == [30, 40]
    np.testing.assert_array_equal(np.asarray(session.step([1, 2])), np.asarray(fork.step([1, 2])))


# ---- generation ------------------------------------------------------------------------------------------------------

SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.0, "n": 3, "logprobs": 3},
    {"temperature": 0.0, "logit_bias": {5: 3.0}, "min_tokens": 4},
]


@pytest.mark.parametrize("fields", SAMPLING)
def test_seeded_sampling_is_the_cpus(load, fields):
    params = SamplingParams(max_tokens=24, seed=11, **fields)
    prompts = [tokens_of(load(), n, n) for n in (3, 20, 90)]
    found, expected = (load(device=device).generate(prompts, params) for device in (CUDA, "cpu"))
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.token_ids, x.text, x.finish_reason) == (y.token_ids, y.text, y.finish_reason)
            assert x.cumulative_logprob == pytest.approx(y.cumulative_logprob, abs=1e-2)


def test_streams(load):
    model, params = load(), SamplingParams(max_tokens=20, seed=1)
    expected = model.generate("The bee", params)[0].outputs[0]
    chunks = list(model.stream("The bee", params))
    assert ([t for c in chunks for t in c.token_ids], "".join(c.text for c in chunks)) == (
        expected.token_ids,
        expected.text,
    )

    async def collect() -> list[int]:
        return [token async for chunk in model.astream("The bee", params) for token in chunk.token_ids]

    assert asyncio.run(collect()) == expected.token_ids
    stream = model.stream("The bee", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(stream)
    stream.close()
    session = model.session()
    assert session.generate("The bee", params)[0].outputs[0].token_ids == expected.token_ids
    assert session.num_tokens == [len(model.tokenizer.encode("The bee").ids) + len(expected.token_ids)]


def test_more_requests_than_the_batch_holds(load):
    model = load()
    prompts = [tokens_of(model, 1 + n % 17, n) for n in range(40)]
    params = [SamplingParams(max_tokens=1 + n % 9, temperature=0) for n in range(40)]
    found, expected = (model.generate(prompts, params, max_batch_size=size) for size in (7, 40))
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


def test_models_and_threads_share_a_gpu(load):
    """Results are those of one thread, bit for bit."""
    models = [load(), load(dtype="bfloat16"), load("based-tiny-bf16", "bfloat16")]

    def work(i: int) -> list[np.ndarray]:
        model = models[i % 3]
        session = model.session(2)
        logits = [np.asarray(session.prefill([tokens_of(model, 50 + i, i), tokens_of(model, 200, i)]))]
        logits += [np.asarray(session.step([k, k])) for k in range(30)]
        # Alone, too: Model.generate would have both threads' prompts in one batch, whose sums have another order.
        params = SamplingParams(max_tokens=20, seed=i)
        ids = model.session().generate([tokens_of(model, 9, i)], params)[0].outputs[0].token_ids
        return [*logits, np.array(ids)]

    expected = [work(i) for i in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            for found, alone in zip(threads.map(work, range(6)), expected, strict=True):
                for a, b in zip(found, alone, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_float32_files_run_in_bfloat16_by_default():
    assert based.load(GOLDEN / "based-tiny", device=CUDA).dtype == "bfloat16"
    assert based.load(GOLDEN / "based-tiny-bf16", device="cuda").dtype == "bfloat16"


# ---- failures of one row, going on -----------------------------------------------------------------------------------


@HALF_OR_SINGLE
def test_a_row_that_cannot_go_on_has_seen_what_it_yielded(load, dtype):
    """The next step is enqueued before the failure is known: on the device it leaves the row alone."""
    model = load(dtype=dtype)
    vocabulary = model.config.vocab_size
    prompt = [token for token in range(vocabulary) if token != 7]
    params = SamplingParams(
        temperature=0, max_tokens=9, repetition_penalty=1e300, logit_bias=dict.fromkeys(range(vocabulary), -100.0)
    )
    good = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    session, replay, alone = model.session(3), model.session(), model.session()
    outputs = session.generate([prompt, [1, 2, 3], prompt[:5]], [params, good, good])
    failed = outputs[0].outputs[0]
    assert (failed.token_ids, failed.finish_reason) == ([7], "error")
    assert "leave no token" in failed.error
    assert session.num_tokens == [vocabulary, 12, 14]
    (expected,) = alone.generate([1, 2, 3], good)
    assert outputs[1].outputs[0].token_ids == expected.outputs[0].token_ids
    replay.prefill([[*prompt, 7]])
    CHECKS[dtype](np.asarray(session.step([5], [0])), np.asarray(replay.step([5])))


@HALF_OR_SINGLE
def test_a_session_goes_on_without_a_prompt(load, tmp_path, dtype):
    model = load(dtype=dtype)
    greedy = {"temperature": 0, "ignore_eos": True}
    session = model.session(2)
    first = session.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=5, **greedy))
    state = session.state(1)
    session.save_state(tmp_path / "state")
    second = session.generate([[], []], SamplingParams(max_tokens=6, **greedy))
    loaded = model.session(2)
    loaded.load_state(tmp_path / "state")
    again = loaded.generate([[], []], SamplingParams(max_tokens=6, **greedy))
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in second]
    (one,) = model.session(states=[state]).generate([[]], SamplingParams(max_tokens=6, **greedy))
    assert one.outputs[0].token_ids == second[1].outputs[0].token_ids
    whole = model.session(2).generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=11, **greedy))
    if dtype == "float32":
        for a, b, c in zip(first, second, whole, strict=True):
            assert a.outputs[0].token_ids + b.outputs[0].token_ids == c.outputs[0].token_ids


def test_sessions_of_many_threads_share_executors(load):
    """Each is what it is alone; states go from one executor to another."""
    model = load(dtype="float32")
    prompts = [tokens_of(model, 20 + 7 * i, i) for i in range(6)]
    expected = []
    for prompt in prompts:
        session = model.session()
        session.prefill([prompt])
        expected.append([np.asarray(session.step([token]))[0] for token in range(8)])
    sessions = [model.session() for _ in prompts]
    found: list[Any] = [[] for _ in prompts]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            sessions[i].prefill([prompts[i]])
            for token in range(8):
                found[i].append(np.asarray(sessions[i].step([token]))[0])
                model.score([1, 2, 3])
        except BaseException as error:
            errors.append(error)

    for _ in range(3):
        for session, rows in zip(sessions, found, strict=True):
            session.reset()
            rows.clear()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for rows, rows_alone in zip(found, expected, strict=True):
            np.testing.assert_array_equal(rows, rows_alone)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory():
    config = json.loads(sizes.named_config("360m").to_json())
    config |= {"layers": config["layers"][:7], "vocab_size": 1000, "padded_vocab_size": 1000}
    config |= {"bos_token_id": None, "eos_token_id": None}
    model = based.Model.random(based.ModelConfig.from_json(json.dumps(config), "config"), device=CUDA)
    before = model.memory
    with pytest.raises(MemoryError, match=r"out of memory on cuda:0: \d+ bytes are needed, \d+ of \d+ are free"):
        model.session(1 << 20)
    assert model.memory == before
    session = model.session(2)
    assert session.prefill([[1, 2, 3], [4]]).shape == (2, 1000)
    del session
    gc.collect()
    assert model.memory.states == before.states


def test_random_operations_return_their_memory(load):
    model = load(dtype="bfloat16")
    gc.collect()
    before, choose = model.memory, random.Random(0)
    sessions: list[based.Session] = []
    checkpoints: list[tuple[int, Any]] = []
    free = 0
    for i in range(10_000 if LONG else 2_000):
        session = choose.choice(sessions) if sessions else None
        what = choose.choice(
            ["create", "prefill", "step", "fork", "checkpoint", "rollback", "generate", "free", "free"]
        )
        if what == "create" or session is None:
            sessions.append(model.session(choose.randint(1, 8)))
        elif what == "prefill":
            session.prefill([tokens_of(model, choose.randint(1, 300), i) for _ in range(session.batch_size)])
        elif what == "step":
            session.step([1] * session.batch_size)
        elif what == "fork":
            sessions.append(session.fork())
        elif what == "checkpoint":
            checkpoints.append((session.batch_size, session.checkpoint()))
        elif what == "rollback" and checkpoints:
            size, checkpoint = checkpoints.pop(choose.randrange(len(checkpoints)))
            if size == session.batch_size:
                session.rollback(checkpoint)
        elif what == "generate":
            session.generate([[1, 2]] * session.batch_size, SamplingParams(max_tokens=4))
        elif what == "free":
            sessions.remove(session)
            del session
        if len(sessions) > 12:
            del sessions[:6], checkpoints[:]
        if i == 500:
            free = free_nbytes()
    sessions.clear()
    checkpoints.clear()
    session = checkpoint = None
    gc.collect()
    assert model.memory == before
    assert free_nbytes() >= free - (64 << 20)


def free_nbytes() -> int:
    return next(d.free_nbytes for d in based.devices() if d.device == CUDA)


def test_memory_is_named(load):
    model = load()
    before = model.memory
    assert before.weights >= model.weight_nbytes > 0
    session = model.session(4)
    assert model.memory.states - before.states >= 4 * model.state_nbytes
    logits = session.prefill([[1]] * 4)
    assert model.memory.workspace > before.workspace
    del session, logits
    gc.collect()
    assert model.memory == before


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_logits_are_tensors_of_the_gpu(load):
    model = load()
    whole, logits = model.forward([1, 2, 3], include_padding=True), model.forward([1, 2, 3])
    assert isinstance(logits, based.Tensor)
    assert (logits.device, logits.dtype, logits.shape) == (CUDA, "float32", (3, model.config.vocab_size))
    assert whole.shape == (3, model.config.padded_vocab_size)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(whole)[:, : model.config.vocab_size])
    assert np.asarray(logits, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="only as a copy"):
        np.array(logits, copy=False)
    assert logits.__dlpack_device__() == (2, 0)
    on_host = np.from_dlpack(_OnHost(logits))
    np.testing.assert_array_equal(on_host, np.asarray(logits))
    for arguments in ({"dl_device": (1, 1)}, {"dl_device": (2, 7)}, {"dl_device": (1, 0), "copy": False}):
        with pytest.raises(BufferError):
            logits.__dlpack__(**arguments)


class _OnHost:
    """Asks a tensor for its copy on the host."""

    def __init__(self, tensor: based.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__(dl_device=(1, 0))

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_torch_reads_without_a_copy(load):
    torch = pytest.importorskip("torch")
    model = load()
    session = model.session(2)
    logits = session.prefill([[1, 2], [3]])
    a, b = torch.from_dlpack(logits), torch.from_dlpack(logits)
    assert a.data_ptr() == b.data_ptr()
    assert (a.shape, a.stride(), str(a.device)) == (
        (2, model.config.vocab_size),
        (model.config.padded_vocab_size, 1),
        CUDA,
    )
    values = np.asarray(logits)
    a += 1  # on its memory
    torch.cuda.synchronize()
    np.testing.assert_array_equal(np.asarray(logits), values + 1)
    del logits
    np.testing.assert_array_equal(b.cpu().numpy(), values + 1)
    best = a.argmax(-1)
    del a, b
    np.testing.assert_array_equal(np.asarray(session.step(best)).shape, (2, model.config.vocab_size))
    np.testing.assert_array_equal(best.cpu().numpy(), values.argmax(-1))
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.from_dlpack(session.step([1, 1])).isfinite().all()
    np.testing.assert_array_equal(
        np.asarray(model.forward(torch.tensor([1, 2], device="cuda"))), np.asarray(model.forward([1, 2]))
    )


@pytest.mark.parametrize("side_stream", [False, True])
def test_torch_gives_memory_back_after_its_work(load, side_stream):
    """Without waiting on PyTorch's default stream, and safely on any other."""
    torch = pytest.importorskip("torch")
    model = load()
    session = model.session(2)
    values = np.asarray(session.fork().prefill([[1, 2], [3]]))
    stream = torch.cuda.Stream() if side_stream else torch.cuda.default_stream()
    done = torch.cuda.Event()
    shared = torch.from_dlpack(session.prefill([[1, 2], [3]]))
    torch.cuda.synchronize()
    del shared  # loads what PyTorch needs
    session.reset()
    with torch.cuda.stream(stream):
        shared = torch.from_dlpack(session.prefill([[1, 2], [3]]))
        torch.cuda._sleep(400_000_000)  # clock cycles
        copy = shared.clone()
        done.record()
        del shared
    assert done.query() == side_stream
    for token in range(20):  # would take the memory
        session.step([token, token])
    torch.cuda.synchronize()
    np.testing.assert_array_equal(copy.cpu().numpy(), values)


def test_tensors_may_be_dropped_by_other_threads(load):
    """While the session's thread records steps of ever other sizes."""
    model = load()
    gc.collect()
    workspace = model.memory.workspace
    session = model.session(24)
    queue: SimpleQueue[Any] = SimpleQueue()

    def drop() -> None:
        while queue.get() is not None:
            pass

    thread = Thread(target=drop)
    thread.start()
    try:
        for size in [n for n in range(1, 25) for _ in range(4)]:
            queue.put(session.step([size] * size, list(range(size))))
    finally:
        queue.put(None)
        thread.join()
    assert np.isfinite(np.asarray(session.step([1] * 24))).all()
    del session
    gc.collect()
    assert model.memory.workspace == workspace


# ---- deterministic ---------------------------------------------------------------------------------------------------


@HALF_OR_SINGLE
def test_deterministic_results_do_not_depend_on_the_batch(dtype, tmp_path):
    model = based.load(GOLDEN / "based-tiny", device=CUDA, dtype=dtype, deterministic=True)
    tokens = tokens_of(model, 240)

    def run(neighbours: int) -> list[Any]:
        session = model.session(neighbours + 1)
        rows = [session.prefill([tokens[:200], *(tokens[n % 90 : n % 90 + 7] for n in range(neighbours))])]
        for i, token in enumerate(tokens[200:220]):
            rows.append(session.step([token, *([i] * neighbours)]))
            if i == 9:
                session.save_state(tmp_path / "state")
                session = session.fork()
                session.load_state(tmp_path / "state")
        return [np.asarray(row)[0].copy() for row in rows]

    alone = run(0)
    for neighbours in (1, 7, 40, 300):
        np.testing.assert_array_equal(run(neighbours), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_prompts_do_not_depend_on_their_cuts(dtype, tmp_path):
    """Nor on the load of an engine, nor on what its cache holds."""
    RandomModel(shallow("60m", 4, 500), 0, "float32").write(tmp_path / "model")
    model = based.load(tmp_path / "model", device=CUDA, dtype=dtype, deterministic=True)
    tokens = tokens_of(model, 5200)
    greedy = SamplingParams(max_tokens=4, temperature=0, logprobs=5, ignore_eos=True)

    def read(engine: based.Engine, length: int) -> list[Any]:
        output = engine.submit(tokens[:length], greedy).result().outputs[0]
        return [output.token_ids, output.logprobs]

    lengths = [1025, 1024, 900, 2049, 3000, 4097, 5121, 5200]
    with model.engine(max_batch_size=4, cache_bytes=0) as engine:
        alone = {length: read(engine, length) for length in lengths}
    for length in (1025, 2049, 5121):
        session, expected = model.session(), model.session().prefill(tokens[:length])
        session.prefill(tokens[: length // 1024 * 1024])
        np.testing.assert_array_equal(session.prefill(tokens[length // 1024 * 1024 : length]), expected)
    with model.engine(max_batch_size=4, max_step_tokens=100, cache_bytes=1 << 30) as engine:
        for length in [*lengths, *reversed(lengths)]:
            assert read(engine, length) == alone[length]
        assert engine.stats().cached_tokens > 10_000
    with model.engine(max_batch_size=8, cache_bytes=1 << 30) as engine:
        busy = [engine.submit(tokens[n : n + 1500], greedy) for n in range(5)]
        assert {length: read(engine, length) for length in lengths} == alone
        assert all(request.result() for request in busy)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


def shallow(name: str, num_layers: int, vocab_size: int = 1000) -> dict[str, Any]:
    """The first layers of a named shape, all kinds among them, with a small vocabulary."""
    config: dict[str, Any] = json.loads(sizes.named_config(name).to_json())
    config |= {"layers": config["layers"][:num_layers], "vocab_size": vocab_size, "padded_vocab_size": vocab_size}
    return config | {"bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize("name", ["360m", "1.3b"])
def test_bfloat16_is_as_good_as_plain_bfloat16(tmp_path, name):
    """At most twice the error of a plain bfloat16 evaluation, against float64."""
    drawn = RandomModel(shallow(name, 4), 0, "float32")
    drawn.write(tmp_path / "model")
    tensors = drawn.tensors()
    model = based.load(tmp_path / "model", device=CUDA, dtype="bfloat16")
    single = based.load(tmp_path / "model", device=CUDA, dtype="float32")
    tokens = tokens_of(model, 200)
    exact = Reference(drawn.config, tensors).forward(tokens).logits
    bound = 2 * rel_l2(Reference(drawn.config, tensors, bfloat16).prefill(tokens)[0], exact)
    assert rel_l2(model.forward(tokens), exact) <= bound
    session = model.session()
    assert rel_l2(np.concatenate([np.asarray(session.step([token])) for token in tokens]), exact) <= bound
    assert rel_l2(single.forward(tokens), exact) <= FLOAT32


def test_32768_tokens(tmp_path):
    """The last logits and the scores of a long text: float32 as the CPU's, bfloat16 within its bound."""
    drawn = RandomModel(shallow("60m", 4, 500), 0, "float32")
    drawn.write(tmp_path / "model")
    cpu, single, half = (
        based.load(tmp_path / "model", device=device, dtype=dtype)
        for device, dtype in (("cpu", "float32"), (CUDA, "float32"), (CUDA, "bfloat16"))
    )
    tokens = tokens_of(cpu, 32_768)
    exact, scores = cpu.session().prefill(tokens), cpu.score(tokens)
    assert rel_l2(single.session().prefill(tokens), exact) <= 10 * FLOAT32  # sums of 32,768 terms, on both sides
    assert rel_l2(half.session().prefill(tokens), exact) <= 4e-2
    np.testing.assert_allclose(single.score(tokens), scores, atol=1e-3, rtol=0)
    assert np.quantile(np.abs(half.score(tokens) - scores), 0.999) <= 0.4
