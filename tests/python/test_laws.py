"""The laws of docs/architecture.md, for any architecture, against the float64 reference and bit for bit against itself.

How a sequence is cut into calls, what else is in the batch, on how many threads, and what was forked, saved or rolled
back in between: none of it may show.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.reference.checkpoints import RandomModel
from tests.reference.checkpoints import models as random_models
from tests.reference.compare import rel_l2
from tests.reference.files import read_layers, round_to, to_float64, write_state
from tests.reference.model import Model, taylor_features

FLOAT32 = 2e-5  # rel-L2 of logits and states in float32; the worst of 2,500 random architectures was 9e-6
GOLDEN = Path(__file__).parent.parent / "golden" / "based-tiny"
CHUNK = 256  # tokens that a prompt is fed by, inside
CUT = 64  # where an engine may cut a prompt, counted from its start


@contextlib.contextmanager
def directory_of(model: RandomModel) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder) / "model")
        yield Path(folder) / "model"


def load(model: RandomModel, **options: Any) -> based.Model:
    with directory_of(model) as directory:
        return based.load(directory, **options)


def draw_tokens(model: RandomModel, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config["vocab_size"], length)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """rel-L2 ≤ tolerance, where nothing and zero are legal."""
    assert found.shape == expected.shape
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


# ---- cuts and neighbours ---------------------------------------------------------------------------------------------

NUM_SEQUENCES = 3
SHORT = st.integers(1, 40)
LONG = st.integers(CHUNK - 6, 2 * CHUNK + 60)


@dataclass
class Schedule:
    """Tokens of some sequences, and how they are fed: rounds of (by step() or prefill(), {sequence: how many})."""

    tokens: dict[int, np.ndarray]
    rounds: list[tuple[bool, dict[int, int]]]

    def calls(self) -> Iterator[tuple[bool, dict[int, np.ndarray], dict[int, int]]]:
        """(whether by step(), tokens by sequence, how many each has seen after them)."""
        seen = dict.fromkeys(self.tokens, 0)
        for by_step, counts in self.rounds:
            pieces = {b: self.tokens[b][seen[b] : seen[b] + count] for b, count in counts.items()}
            seen |= {b: seen[b] + count for b, count in counts.items()}
            yield by_step, pieces, seen

    def run(
        self, model: based.Model, only: int | None = None
    ) -> tuple[based.Session, dict[tuple[int, int], np.ndarray]]:
        """The session, and logits by (sequence, number of tokens); with `only`, that sequence alone in a session."""
        session = model.session(NUM_SEQUENCES if only is None else 1)
        found = {}
        for by_step, pieces, seen in self.calls():
            sequences = [b for b in pieces if only in (None, b)]
            if not sequences:
                continue
            slots = sequences if only is None else [0]
            if by_step:
                logits = session.step([int(pieces[b][0]) for b in sequences], slots, include_padding=True)
            else:
                logits = session.prefill([pieces[b] for b in sequences], slots, include_padding=True)
            found.update({(b, seen[b]): row for b, row in zip(sequences, logits, strict=True)})
        return session, found


@st.composite
def schedules(draw: Any, model: RandomModel) -> Schedule:
    """In the first round some prompts may be longer than the chunks that they are fed by."""
    sequence = st.integers(0, NUM_SEQUENCES - 1)
    first = draw(st.dictionaries(sequence, SHORT | LONG, min_size=1))
    rounds = [(False, first)]
    for by_step, counts in draw(
        st.lists(st.tuples(st.booleans(), st.dictionaries(sequence, SHORT, min_size=1)), max_size=4)
    ):
        rounds.append((by_step, dict.fromkeys(counts, 1) if by_step else counts))
    totals: dict[int, int] = {}
    for _, counts in rounds:
        totals = {b: totals.get(b, 0) + counts.get(b, 0) for b in totals | counts}
    seed = draw(st.integers(0, 1 << 16))
    return Schedule({b: draw_tokens(model, total, seed + b) for b, total in totals.items()}, rounds)


@settings(max_examples=80)
@given(data=st.data(), random=random_models(), threads=st.integers(1, 2))
def test_any_cut_in_any_batch_gives_the_references_logits(data, random, threads):
    schedule = data.draw(schedules(random))
    model = load(random, dtype="float32", num_threads=threads)
    reference = Model(random.config, random.tensors())
    whole = {b: reference.forward(tokens).logits for b, tokens in schedule.tokens.items()}
    _, found = schedule.run(model)
    ends = list(found)
    assert rel_l2([found[end] for end in ends], [whole[b][seen - 1] for b, seen in ends]) <= FLOAT32
    b, tokens = next(iter(schedule.tokens.items()))
    assert rel_l2(model.forward(tokens, include_padding=True), whole[b]) <= FLOAT32
    logits = whole[b][:, : random.config["vocab_size"]]
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    expected = np.take_along_axis(log_probs[:-1], tokens[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(model.score(tokens), expected, atol=2 * FLOAT32 * np.abs(logits).max() + 1e-6)


@settings(max_examples=150)
@given(data=st.data(), random=random_models(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_neighbours_and_threads_change_no_bit(data, random, dtype):
    schedule = data.draw(schedules(random))
    with directory_of(random) as directory:
        together, alone = (
            based.load(directory, dtype=dtype, num_threads=n) for n in data.draw(st.permutations([1, 2]))
        )
    session, found = schedule.run(together)
    for b, tokens in schedule.tokens.items():
        single, expected = schedule.run(alone, only=b)
        for end, logits in expected.items():
            np.testing.assert_array_equal(found[end], logits)
        assert session.num_tokens[b] == single.num_tokens[0] == len(tokens)
        np.testing.assert_array_equal(session.step([0], [b]), single.step([0]))


@settings(max_examples=25)
@given(
    random=random_models(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    length=st.integers(CHUNK + 1, 3 * CHUNK),
    seed=st.integers(0, 1 << 16),
    data=st.data(),
)
def test_cuts_at_chunks_change_no_bit(random, dtype, length, seed, data):
    model, tokens = load(random, dtype=dtype), draw_tokens(random, length, seed)
    expected = model.session().prefill(tokens)
    np.testing.assert_array_equal(model.forward(tokens)[-1:], expected)
    cut = CUT * data.draw(st.integers(1, (length - 1) // CUT))
    session = model.session()
    session.prefill(tokens[:cut])
    np.testing.assert_array_equal(session.prefill(tokens[cut:]), expected)


# ---- states ----------------------------------------------------------------------------------------------------------


def saved_state(session: based.Session) -> list[tuple[int, dict[str, np.ndarray]]]:
    """(number of tokens, tensors of the layers in float64) of each sequence, from the file that the session saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        session.save_state(path)
        content = path.read_bytes()
        layers = read_layers(path)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    result: list[tuple[int, dict[str, np.ndarray]]] = [
        (int(count), {}) for count in header["__metadata__"]["num_tokens"].split(",")
    ]
    for sequence, tensors in layers.items():
        result[sequence][1].update({name: to_float64(bits, dtype) for name, (dtype, bits) in tensors.items()})
    return result


@settings(max_examples=25)
@given(data=st.data(), random=random_models())
def test_the_state_is_the_references(data, random):
    """However it was reached; also of sequences that have seen nothing."""
    schedule = data.draw(schedules(random))
    session, _ = schedule.run(load(random, dtype="float32"))
    reference = Model(random.config, random.tensors())
    for b, (num_tokens, tensors) in enumerate(saved_state(session)):
        _, state = reference.decode(schedule.tokens.get(b, []))
        assert num_tokens == state.num_tokens
        assert tensors.keys() == state.tensors.keys()
        for name, values in tensors.items():
            assert close(values, state.tensors[name], FLOAT32), name


@settings(max_examples=25)
@given(data=st.data(), random=random_models())
def test_states_move_between_dtypes(data, random):
    """Only the keys and values of a window are rounded, and only on the way to bfloat16."""
    schedule = data.draw(schedules(random))
    with directory_of(random) as directory:
        single, half = (based.load(directory, dtype=dtype) for dtype in ("float32", "bfloat16"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        for source, target in ((single, half), (half, single)):
            session, _ = schedule.run(source)
            session.save_state(path)
            moved = target.session(NUM_SEQUENCES)
            moved.load_state(path)
            assert moved.num_tokens == session.num_tokens
            for (_, before), (_, after) in zip(saved_state(session), saved_state(moved), strict=True):
                assert before.keys() == after.keys()
                for name, values in before.items():
                    if target is half and name.endswith(("keys", "values")):
                        values = to_float64(round_to(values, "bfloat16"), "bfloat16")
                    np.testing.assert_array_equal(after[name], values, err_msg=name)


@settings(max_examples=40)
@given(
    data=st.data(),
    random=random_models(),
    count=st.integers(1, 12),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_pending_tokens_of_another_device_are_added(data, random, count, dtype):
    """As a GPU saves them: k and v of the last tokens beside the sums. Here they are in the sums once loaded."""
    schedule = data.draw(schedules(random))
    session, _ = schedule.run(load(random, dtype="float32"))
    kinds = ("linear_attention", "prefix_linear_attention")
    linear = {i: layer for i, layer in enumerate(random.config["layers"]) if layer["mixer"] in kinds}
    normal = np.random.default_rng(data.draw(st.integers(0, 1 << 16))).normal
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        session.save_state(path)
        before = saved_state(session)
        content = path.read_bytes()
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        layers = read_layers(path)
        states = [(seen, layers[b]) for b, (seen, _) in enumerate(before)]
        added: dict[tuple[int, int], np.ndarray] = {}
        for b, (seen, tensors) in enumerate(states):
            n = min(count, seen)
            for i, layer in linear.items():
                k, v = (
                    (dtype, round_to(normal(size=(n, layer["num_heads"], layer[width])), dtype))
                    for width in ("feature_dim", "head_dim")
                )
                tensors |= {f"layers.{i}.pending_keys": k, f"layers.{i}.pending_values": v}
                values = to_float64(v[1], dtype)
                ones = np.concatenate([values, np.ones_like(values[..., :1])], axis=-1)
                added[b, i] = np.einsum("nhp,nhd->hpd", taylor_features(to_float64(k[1], dtype)), ones)
        write_state(path, states, fingerprint=metadata["fingerprint"], format_version="2")
        session.load_state(path)
    for b, ((seen, old), (now_seen, new)) in enumerate(zip(before, saved_state(session), strict=True)):
        assert (now_seen, new.keys()) == (seen, old.keys())
        for name, values in new.items():
            layer = int(name.split(".")[1])
            if name.endswith("taylor"):
                assert close(values, old[name] + added[b, layer], FLOAT32), name
            else:
                np.testing.assert_array_equal(values, old[name], err_msg=name)


# ---- any sequence of operations --------------------------------------------------------------------------------------

Call = tuple[int, ...]  # tokens of one prefill(); or -1 and the token of one step()
History = tuple[Call, ...]


@dataclass
class Tracked:
    """A session, a checkpoint, a state or a file, and the calls that led each of its sequences to where it is."""

    value: Any
    histories: list[History]


class Operations(RuleBasedStateMachine):
    """Sessions do anything; each sequence must be, bit for bit, what its own calls make of a session of its own."""

    sessions = Bundle("sessions")
    checkpoints = Bundle("checkpoints")
    files = Bundle("files")
    states = Bundle("states")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.all: list[Tracked] = []
        self.replayed: dict[History, np.ndarray] = {}

    def teardown(self) -> None:
        try:
            for tracked in self.all:
                self.check(
                    tracked, tracked.value.step([0] * tracked.value.batch_size), lambda history: (*history, (-1, 0))
                )
        finally:
            shutil.rmtree(self.folder)

    # ---- what must hold --------------------------------------------------------------------------------------------

    def expected(self, history: History) -> np.ndarray:
        """Logits of the last call of a fresh session of one sequence, on one thread."""
        if history not in self.replayed:
            session = self.alone.session()
            for call in history:
                logits = session.step(call[1:]) if call[0] < 0 else session.prefill(call)
            self.replayed[history] = logits[0]
        return self.replayed[history]

    def check(self, tracked: Tracked, logits: np.ndarray, after: Any, sequences: list[int] | None = None) -> None:
        """Appends a call, whose logits must be those of the replay."""
        for row, b in enumerate(range(tracked.value.batch_size) if sequences is None else sequences):
            tracked.histories[b] = after(tracked.histories[b])
            np.testing.assert_array_equal(logits[row], self.expected(tracked.histories[b]))

    @invariant()
    def sessions_count_their_tokens(self) -> None:
        for tracked in self.all:
            counts = [sum(len(call) - (call[0] < 0) for call in history) for history in tracked.histories]
            assert tracked.value.num_tokens == counts

    def track(self, session: based.Session, histories: list[History]) -> Tracked:
        self.all.append(Tracked(session, list(histories)))
        return self.all[-1]

    def tokens(self, length: int, seed: int) -> Call:
        return tuple(draw_tokens(self.random, length, seed).tolist())

    # ---- operations ------------------------------------------------------------------------------------------------

    @initialize(
        target=sessions,
        random=random_models(max_layers=3),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    )
    def start(self, random: RandomModel, dtype: str, sizes: list[int]) -> Any:
        self.random = random
        with directory_of(random) as directory:
            self.model, self.alone = (based.load(directory, dtype=dtype, num_threads=threads) for threads in (2, 1))
        return multiple(*(self.track(self.model.session(size), [()] * size) for size in sizes))

    @rule(tracked=sessions, data=st.data(), long=st.integers(0, 7), seed=st.integers(0, 1 << 16))
    def prefill(self, tracked: Tracked, data: Any, long: int, seed: int) -> None:
        sequences = data.draw(st.lists(st.integers(0, tracked.value.batch_size - 1), min_size=1, unique=True))
        prompts = {b: self.tokens(data.draw(LONG if long == 0 else st.integers(1, 20)), seed + b) for b in sequences}
        logits = tracked.value.prefill(list(prompts.values()), sequences)
        for row, b in enumerate(sequences):
            self.check(tracked, logits[row : row + 1], lambda history, b=b: (*history, prompts[b]), [b])

    @rule(tracked=sessions, data=st.data())
    def step(self, tracked: Tracked, data: Any) -> None:
        sequences = data.draw(st.lists(st.integers(0, tracked.value.batch_size - 1), min_size=1, unique=True))
        token = data.draw(st.integers(0, self.random.config["vocab_size"] - 1))
        logits = tracked.value.step([token] * len(sequences), sequences)
        self.check(tracked, logits, lambda history: (*history, (-1, token)), sequences)

    @rule(target=sessions, tracked=sessions)
    def fork(self, tracked: Tracked) -> Any:
        return self.track(tracked.value.fork(), tracked.histories) if len(self.all) < 5 else multiple()

    @rule(target=checkpoints, tracked=sessions)
    def checkpoint(self, tracked: Tracked) -> Tracked:
        return Tracked(tracked.value.checkpoint(), list(tracked.histories))

    @rule(tracked=sessions, checkpoint=checkpoints)
    def rollback(self, tracked: Tracked, checkpoint: Tracked) -> None:
        if len(checkpoint.histories) == tracked.value.batch_size:
            tracked.value.rollback(checkpoint.value)
            tracked.histories = list(checkpoint.histories)
        else:
            with pytest.raises(based.StateError, match="sequences, the session"):
                tracked.value.rollback(checkpoint.value)

    @rule(target=files, tracked=sessions)
    def save(self, tracked: Tracked) -> Tracked:
        path = self.folder / str(len(list(self.folder.iterdir())))
        tracked.value.save_state(path)
        return Tracked(path, list(tracked.histories))

    @rule(tracked=sessions, file=files)
    def load(self, tracked: Tracked, file: Tracked) -> None:
        if len(file.histories) == tracked.value.batch_size:
            tracked.value.load_state(file.value)
            tracked.histories = list(file.histories)
        else:
            with pytest.raises(based.StateError, match="sequences, the session has"):
                tracked.value.load_state(file.value)

    @rule(target=states, tracked=sessions, data=st.data())
    def state(self, tracked: Tracked, data: Any) -> Tracked:
        sequence = data.draw(st.integers(0, tracked.value.batch_size - 1))
        return Tracked(tracked.value.state(sequence), [tracked.histories[sequence]])

    @rule(target=states, checkpoint=checkpoints, data=st.data())
    def state_of_a_checkpoint(self, checkpoint: Tracked, data: Any) -> Tracked:
        sequence = data.draw(st.integers(0, len(checkpoint.histories) - 1))
        return Tracked(checkpoint.value.states[sequence], [checkpoint.histories[sequence]])

    @rule(target=states, state=states)
    def state_through_a_file(self, state: Tracked) -> Tracked:
        path = self.folder / str(len(list(self.folder.iterdir())))
        state.value.save(path)
        return Tracked(based.State.load(path, self.model), state.histories)

    @rule(tracked=sessions, state=states, data=st.data())
    def restore(self, tracked: Tracked, state: Tracked, data: Any) -> None:
        sequence = data.draw(st.integers(0, tracked.value.batch_size - 1))
        tracked.value.restore(sequence, state.value)
        tracked.histories[sequence] = state.histories[0]

    @rule(target=sessions, state=states, size=st.integers(1, 3))
    def start_from(self, state: Tracked, size: int) -> Any:
        if len(self.all) >= 5:
            return multiple()
        return self.track(self.model.session(states=[state.value] * size), state.histories * size)

    @rule(file=consumes(files))
    def forget(self, file: Tracked) -> None:
        file.value.write_bytes(b"")  # what was loaded from it does not depend on it any more

    @rule(tracked=sessions, data=st.data())
    def reset(self, tracked: Tracked, data: Any) -> None:
        sequence = data.draw(st.none() | st.integers(0, tracked.value.batch_size - 1))
        tracked.value.reset(sequence)
        for b in range(tracked.value.batch_size) if sequence is None else [sequence]:
            tracked.histories[b] = ()

    @rule(tracked=sessions, data=st.data())
    def copy(self, tracked: Tracked, data: Any) -> None:
        source, target = (data.draw(st.integers(0, tracked.value.batch_size - 1)) for _ in range(2))
        tracked.value.copy(source, target)
        tracked.histories[target] = tracked.histories[source]

    @rule(tracked=sessions, max_tokens=st.integers(1, 5), stop=st.booleans(), seed=st.integers(0, 1 << 16))
    def generate(self, tracked: Tracked, max_tokens: int, stop: bool, seed: int) -> None:
        """Greedy; some sequences may end before the others."""
        stop_ids = [0] if stop else []
        params = based.SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=stop_ids)
        prompts = [self.tokens(1 + (seed + b) % 9, seed + b) for b in range(tracked.value.batch_size)]
        for b, output in enumerate(tracked.value.generate(prompts, params)):
            self.append_greedy(tracked, b, prompts[b], output.outputs[0].token_ids)
            ends = {*stop_ids, self.random.config["eos_token_id"]}
            ended = [token in ends for token in output.outputs[0].token_ids]
            assert not any(ended[:-1])
            assert ended[-1] or len(ended) == max_tokens
            assert output.outputs[0].finish_reason == ("stop" if ended[-1] else "length")

    @rule(tracked=sessions, count=st.integers(1, 4), seed=st.integers(0, 1 << 16))
    def stream(self, tracked: Tracked, count: int, seed: int) -> None:
        """Closed before its end."""
        if tracked.value.batch_size > 1:
            return
        prompt = self.tokens(3, seed)
        params = based.SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        stream = tracked.value.stream(prompt, params)
        tokens = [next(stream).token_ids[0] for _ in range(count)]
        for busy in (tracked.value.checkpoint, tracked.value.reset, lambda: tracked.value.step([0])):
            with pytest.raises(based.SessionBusyError):
                busy()
        stream.close()
        self.append_greedy(tracked, 0, prompt, tokens)

    def append_greedy(self, tracked: Tracked, b: int, prompt: Call, tokens: list[int]) -> None:
        history = (*tracked.histories[b], prompt)
        for token in tokens:
            assert token == self.expected(history).argmax()
            history = (*history, (-1, token))
        tracked.histories[b] = history

    @rule(tracked=sessions, data=st.data())
    def fail(self, tracked: Tracked, data: Any) -> None:
        size, vocab_size = tracked.value.batch_size, self.random.config["vocab_size"]
        bad_calls = [
            lambda session: session.step([0] * (size + 1)),
            lambda session: session.step([0] * (size - 1) + [vocab_size]),
            lambda session: session.step([-1] * size),
            lambda session: session.prefill([[0] * 300] * (size - 1) + [[0, vocab_size]]),
            lambda session: session.prefill([[0], [0]], [0, 0]),
            lambda session: session.reset(size),
            lambda session: session.copy(0, size),
            lambda session: session.copy(-1, 0),
            lambda session: session.generate([[0]] * size, based.SamplingParams(n=2)),
            lambda session: session.generate([[0]] * (size + 1)),
        ]
        bos = self.random.config["bos_token_id"]
        if bos is None or bos >= vocab_size or tracked.histories[-1]:  # otherwise an empty prompt is the bos token
            bad_calls.append(lambda session: session.prefill([[0] * 300] * (size - 1) + [[]]))
        bad_call = data.draw(st.sampled_from(bad_calls))
        with pytest.raises(ValueError):  # noqa: PT011 (the texts have tests of their own)
            bad_call(tracked.value)


Operations.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
test_any_operations = Operations.TestCase


# ---- sampling --------------------------------------------------------------------------------------------------------


@st.composite
def sampling(draw: Any, vocab_size: int, max_n: int = 3) -> based.SamplingParams:
    """Any params with a seed."""
    token = st.integers(0, vocab_size - 1)
    max_tokens = draw(st.integers(1, 12))
    return based.SamplingParams(
        n=draw(st.integers(1, max_n)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.sampled_from([1.0, 0.0, 0.3, 3.0])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, -1, 1, 2, 5])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 1.0, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -0.7])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=draw(st.lists(token, max_size=2)) if vocab_size > 8 else [],
        ignore_eos=draw(st.booleans()) or vocab_size <= 8,
        logprobs=draw(st.none() | st.integers(0, min(3, vocab_size))),
        logit_bias=draw(st.dictionaries(token, st.floats(-3, 3), max_size=2)),
    )


@settings(max_examples=100)
@given(data=st.data(), random=random_models(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_what_a_request_gets_depends_on_itself_alone(data, random, dtype):
    """Not on neighbours, batch size, threads, nor on how many further samples were asked for."""
    with directory_of(random) as directory:
        together, alone = (
            based.load(directory, dtype=dtype, num_threads=n) for n in data.draw(st.permutations([1, 2]))
        )
    lengths = data.draw(st.lists(st.integers(1, 20) | st.just(CHUNK + 9), min_size=1, max_size=4))
    prompts = [draw_tokens(random, length, seed) for seed, length in enumerate(lengths)]
    params = [data.draw(sampling(random.config["vocab_size"])) for _ in prompts]
    outputs = together.generate(prompts, params, max_batch_size=data.draw(st.integers(1, 9)))
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == prompt.tolist()
        assert alone.generate(prompt, one, max_batch_size=1) == [output]
        one.n = data.draw(st.integers(1, 4))
        again = alone.generate(prompt, one)[0].outputs
        for a, b in zip(again, output.outputs, strict=False):
            assert a == b
        chunks = [chunk for chunk in together.stream(prompt, one) if chunk.index == 0]
        assert [chunk.token_ids[0] for chunk in chunks] == output.outputs[0].token_ids
        assert chunks[-1].finish_reason == output.outputs[0].finish_reason
    for one in params:
        one.n = 1
    assert together.session(len(prompts)).generate(prompts, params) == alone.generate(prompts, params)


@settings(max_examples=60)
@given(
    data=st.data(),
    prompt=st.text("abc é世", min_size=1, max_size=20),
    stop=st.lists(st.text("ae ", min_size=1, max_size=2), max_size=2),
)
def test_a_stream_is_what_generate_returns(data, model, prompt, stop):
    params = data.draw(sampling(model.config.vocab_size))
    params.stop = stop
    params.include_stop_str_in_output = data.draw(st.booleans())
    chunks = list(model.stream(prompt, params))
    for output in model.generate(prompt, params)[0].outputs:
        mine = [chunk for chunk in chunks if chunk.index == output.index]
        assert "".join(chunk.text for chunk in mine) == output.text
        assert [token for chunk in mine for token in chunk.token_ids] == output.token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
        assert mine[-1].stop_reason == output.stop_reason
        assert sum(chunk.logprob for chunk in mine) == output.cumulative_logprob
        logprobs = [entry for chunk in mine for entry in chunk.logprobs or []]
        assert logprobs == (output.logprobs or [])


def ids(completion: Any) -> list[int]:
    return completion.token_ids


def most_often(completion: Any) -> int:
    return max(map(ids(completion).count, ids(completion)))


# field: (other fields, value, what must hold of the completions without it, and with it)
EFFECTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "n": ({}, 3, lambda a, b: (len(a), len(b)) == (1, 3) and a[0] == b[0]),
    "max_tokens": ({}, 5, lambda a, b: (len(ids(a[0])), len(ids(b[0]))) == (16, 5) and ids(a[0])[:5] == ids(b[0])),
    "min_tokens": (
        {"stop_token_ids": [101], "logit_bias": {101: 100.0, 102: 80.0}},
        4,
        lambda a, b: ids(a[0]) == [101] and ids(b[0]) == [102] * 4 + [101],
    ),
    "temperature": ({}, 0, lambda a, b: b[0].cumulative_logprob > a[0].cumulative_logprob),
    "top_p": ({}, 1e-9, lambda a, b: ids(a[0]) != ids(b[0]) == GREEDY),
    "top_k": ({}, 1, lambda a, b: ids(a[0]) != ids(b[0]) == GREEDY),
    "min_p": ({}, 1.0, lambda a, b: ids(a[0]) != ids(b[0]) == GREEDY),
    "repetition_penalty": (
        {"temperature": 0, "logit_bias": {101: 100.0, 102: 90.0}},
        50.0,  # "e" is in the prompt
        lambda a, b: ids(a[0]) == [101] * 16 and ids(b[0])[0] == 102 and len(set(ids(b[0]))) > 2,
    ),
    "presence_penalty": ({"temperature": 0}, 2.0, lambda a, b: len(set(ids(a[0]))) < len(set(ids(b[0])))),
    "frequency_penalty": ({"temperature": 0}, 2.0, lambda a, b: most_often(a[0]) > most_often(b[0])),
    "seed": ({}, 8, lambda a, b: ids(a[0]) != ids(b[0])),
    "stop": (
        {"logit_bias": {101: 100.0}},
        "ee",
        lambda a, b: (
            a[0].text == "e" * 16 and b[0].text == "" and (b[0].finish_reason, b[0].stop_reason) == ("stop", "ee")
        ),
    ),
    "stop_token_ids": (
        {"logit_bias": {101: 100.0}},
        [101],
        lambda a, b: ids(b[0]) == [101] and (b[0].finish_reason, b[0].stop_reason) == ("stop", 101),
    ),
    "include_stop_str_in_output": (
        {"logit_bias": {101: 100.0}, "stop": "ee"},
        True,
        lambda a, b: (a[0].text, b[0].text) == ("", "ee"),
    ),
    "skip_special_tokens": (
        {"logit_bias": {257: 100.0}, "ignore_eos": True},
        False,
        lambda a, b: (a[0].text, b[0].text) == ("", "<eos>" * 16),
    ),
    "ignore_eos": (
        {"logit_bias": {257: 100.0}},
        True,
        lambda a, b: (
            (ids(a[0]), a[0].finish_reason, a[0].stop_reason) == ([257], "stop", None) and ids(b[0]) == [257] * 16
        ),
    ),
    "logprobs": ({}, 2, lambda a, b: a[0].logprobs is None and all(len(entry) in (2, 3) for entry in b[0].logprobs)),
    "logit_bias": ({}, {101: 100.0}, lambda a, b: ids(a[0]) != ids(b[0]) == [101] * 16),
}
GREEDY: list[int] = []  # of the prompt below


@pytest.fixture(scope="module")
def with_end_token(tmp_path_factory):
    """based-tiny with its tokenizer, whose token 257 ends a text."""
    directory = tmp_path_factory.mktemp("end") / "model"
    shutil.copytree(GOLDEN, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 257}))
    model = based.load(directory)
    GREEDY[:] = model.generate("The bee", based.SamplingParams(temperature=0))[0].outputs[0].token_ids
    return model


@pytest.mark.parametrize("field", EFFECTS)
def test_every_sampling_field_has_its_effect(with_end_token, field):
    others, value, holds = EFFECTS[field]
    without = based.SamplingParams(**({"seed": 7} | others))
    with_it = based.SamplingParams(**({"seed": 7} | others | {field: value}))
    a, b = (with_end_token.generate("The bee", params)[0].outputs for params in (without, with_it))
    assert holds(a, b), (a, b)


def test_no_sampling_field_is_forgotten():
    fields = {name for name, value in vars(based.SamplingParams).items() if isinstance(value, property)}
    assert fields == EFFECTS.keys()
