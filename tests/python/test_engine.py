"""The engine: requests of threads and event loops in one batch, limits, states, cancellation, shutting down."""

import asyncio
import gc
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import based
import numpy as np
import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


def greedy(**fields):
    return based.SamplingParams(temperature=0, **({"max_tokens": 24} | fields))


ENDLESS = greedy(max_tokens=None, ignore_eos=True)


@pytest.fixture
def engine(model):
    with model.engine(max_batch_size=4) as engine:
        yield engine
        engine.close(drain=False)


def joined(chunks, index=0):
    mine = [chunk for chunk in chunks if chunk.index == index]
    ids = [token for chunk in mine for token in chunk.token_ids]
    return "".join(chunk.text for chunk in mine), ids, mine[-1].finish_reason, mine[-1].stop_reason


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_token", [True, False])
def test_a_request_gets_what_generate_gives(model, engine, every_token):
    params = [
        based.SamplingParams(
            max_tokens=9 + i, seed=i, n=1 + i % 3, logprobs=i % 3 or None, stop=["e", "\ufffd"][: i % 3]
        )
        for i in range(10)
    ]
    prompts = ["Hello"[: 1 + i % 5] * (1 + 40 * (i % 3)) for i in range(10)]
    requests = [engine.submit(p, q, every_token=every_token) for p, q in zip(prompts, params, strict=True)]
    for prompt, each, request in zip(prompts, params, requests, strict=True):
        assert request.result() == model.generate(prompt, each, max_batch_size=2)[0]
        assert request.ended and request.num_prompt_tokens == len(prompt)
        times = request.times
        assert times.arrival <= times.scheduled <= times.first_token <= times.end <= time.monotonic()


def test_ways_to_read(model, engine):
    params = based.SamplingParams(max_tokens=20, seed=1, n=2, stop="q")
    (expected,) = model.generate("Hello", params, max_batch_size=2)

    async def run():
        request = engine.submit("Hello", params)
        chunks = [chunk async for chunk in request]
        waited = [engine.submit("Hello", params, every_token=each) for each in (True, False)]
        return chunks, await request.wait(), *[await each.wait() for each in waited]

    chunks, *outputs = asyncio.run(run())
    for kind in (chunks, list(engine.submit("Hello", params)), list(engine.submit("Hello", params, every_token=False))):
        for completion in expected.outputs:
            c = completion
            assert joined(kind, c.index) == (c.text, c.token_ids, c.finish_reason, c.stop_reason)
    assert outputs == [expected] * 3
    assert engine.submit([*b"Hello"], params).result(timeout=60).outputs == expected.outputs


def test_several_may_wait_for_one_request(model, engine):
    (expected,) = model.generate("Hello", based.SamplingParams(max_tokens=200, seed=1, ignore_eos=True))

    async def run():
        request = engine.submit("Hello", based.SamplingParams(max_tokens=200, seed=1, ignore_eos=True))
        waiting = asyncio.gather(*(request.wait() for _ in range(3)))
        in_thread = [asyncio.to_thread(asyncio.run, request.wait()) for _ in range(2)]
        return [*await asyncio.wait_for(waiting, 60), *await asyncio.wait_for(asyncio.gather(*in_thread), 60)]

    assert asyncio.run(run()) == [expected] * 5


def test_many_threads_and_loops_share_one_engine(model):
    params = [based.SamplingParams(max_tokens=30, seed=i, ignore_eos=True) for i in range(8)]
    expected = [model.generate(f"prompt {i}", params[i], max_batch_size=1)[0].outputs[0].token_ids for i in range(8)]

    def stream(i):
        return [chunk.token_ids[0] for chunk in model.stream(f"prompt {i}", params[i])]

    def astream(i):
        async def collect():
            return [chunk.token_ids[0] async for chunk in model.astream(f"prompt {i}", params[i])]

        async def several():
            return await asyncio.gather(collect(), collect())

        first, second = asyncio.run(several())
        assert first == second
        return first

    def generate(i):
        return model.generate(f"prompt {i}", params[i])[0].outputs[0].token_ids

    with ThreadPoolExecutor(24) as pool:
        for kind in (stream, astream, generate):
            kind.found = pool.map(kind, range(8))
        for kind in (stream, astream, generate):
            assert list(kind.found) == expected


def test_concurrent_callers_batch_by_themselves(model):
    """Eight streams take about as many steps as one."""
    shared = model._shared_engine()
    before = shared.stats()
    params = greedy(max_tokens=60, ignore_eos=True)
    barrier = threading.Barrier(8)

    def stream(_):
        barrier.wait()
        return len(list(model.stream("Hello", params)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, range(8))) == [60] * 8
    after = shared.stats()
    assert after.generated_tokens - before.generated_tokens == 480
    assert after.steps - before.steps < 240


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_limits_refuse_with_a_reason(model):
    with model.engine(1, max_waiting_requests=2, max_waiting_tokens=100) as engine:
        running = engine.submit("a", ENDLESS)
        next(running)
        long = engine.submit("a" * 200, ENDLESS)
        with pytest.raises(based.EngineBusyError, match="max_waiting_tokens, 100"):
            engine.submit("a")
        long.cancel()
        assert long.result().outputs[0].finish_reason == "abort"
        waiting = [engine.submit("a", ENDLESS) for _ in range(2)]
        with pytest.raises(based.EngineBusyError, match="2 requests are waiting"):
            engine.submit("a")
        assert engine.stats().waiting_requests == 2
        waiting[0].cancel()
        assert waiting[0].result().outputs[0].error == "cancelled"
        timed = engine.submit("a", ENDLESS, timeout=0.05)
        (output,) = timed.result().outputs
        assert (output.finish_reason, output.error) == ("abort", "its deadline has passed")
        assert timed.times.scheduled is None
        engine.close(drain=False)
        assert running.result().outputs[0].finish_reason == "abort"
        with pytest.raises(based.EngineClosedError, match="shut down"):
            engine.submit("a")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": ""}, ValueError, "prompt 0 is empty"),
        ({"prompt": [258]}, ValueError, "token id 258"),
        ({"prompt": [1.5]}, TypeError, "not float"),
        ({"prompt": None}, TypeError, "NoneType"),
        ({"params": {"temperature": 0}}, TypeError, "must be SamplingParams, not dict"),
        ({"params": based.SamplingParams(logit_bias={258: 1.0})}, ValueError, "logit_bias"),
        ({"priority": 1.5}, TypeError, "priority"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": "soon"}, ValueError, "timeout"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"state": 5}, TypeError, "state must be"),
    ],
)
def test_wrong_requests_raise_at_once(engine, arguments, error, text):
    with pytest.raises(error, match=text):
        engine.submit(**({"prompt": "a"} | arguments))
    assert engine.submit("a", greedy()).result().outputs[0].error is None


@pytest.mark.parametrize("name", ["max_batch_size", "max_waiting_requests", "max_waiting_tokens", "max_step_tokens"])
def test_wrong_limits(model, name):
    for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("8", TypeError)):
        with pytest.raises(error, match=name):
            model.engine(**{name: value})


def test_priority(model):
    with model.engine(1) as engine:
        running = engine.submit("a", greedy(max_tokens=500, ignore_eos=True))
        next(running)
        last = engine.submit("a", greedy(), priority=1)
        first = engine.submit("a", greedy(), priority=-1)
        running.cancel()
        assert last.result().outputs == first.result().outputs
        assert first.times.scheduled < last.times.scheduled


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_state_goes_on(model, engine):
    whole = model.generate("Hello", greedy(max_tokens=20, ignore_eos=True))[0].outputs[0].token_ids
    first = engine.submit("Hello", greedy(max_tokens=6, ignore_eos=True), keep_state=True)
    tokens = first.result().outputs[0].token_ids
    assert first.state.num_tokens == 11
    second = engine.submit("", greedy(max_tokens=14, ignore_eos=True), state=first.state, keep_state=True)
    assert tokens + second.result().outputs[0].token_ids == whole
    assert second.state.num_tokens == 25
    session = model.session(states=[first.state])
    expected = session.generate(" and", greedy(max_tokens=5))[0].outputs
    assert engine.submit(" and", greedy(max_tokens=5), state=first.state).result().outputs == expected
    assert first.states == [first.state]
    assert engine.submit("a", greedy()).state is None


def test_a_state_ends_with_the_stop_string(model, engine):
    """It has seen the tokens that were returned, whatever the engine made meanwhile."""
    params = greedy(max_tokens=100, logit_bias={97: 100.0}, stop="aaa", n=2)
    request = engine.submit("Hello", params, keep_state=True)
    chunks = list(request)
    assert [chunk.token_ids for chunk in chunks] == [[97]] * 6
    for state in request.states:
        assert state.num_tokens == 8
        session, replay = model.session(states=[state]), model.session()
        replay.prefill("Helloaaa")
        np.testing.assert_allclose(session.step([1]), replay.step([1]), atol=1e-4)


def test_samples_share_what_they_begin_with(engine):
    before = engine.stats()
    engine.submit("a" * 100, greedy(n=4, max_tokens=2)).result()
    assert engine.stats().step_tokens - before.step_tokens == 100 + 4


# ---- cached states ---------------------------------------------------------------------------------------------------


def test_a_conversation_reads_only_what_is_new(model, tmp_path):
    """Each turn computes its own tokens, the answer before it, and at most what lies behind a multiple of 64."""
    text = list(np.random.default_rng(0).integers(0, 256, 2000))
    params = greedy(max_tokens=10, ignore_eos=True)
    known = 0
    for turn in range(4):
        if turn % 2 == 0:  # the states survive an engine in the folder
            engine = model.engine(2, cache_dir=tmp_path)
        length = len(text)
        request = engine.submit(text, params)
        (output,) = request.result().outputs
        assert [output] == model.generate([text], params)[0].outputs
        if turn > 0:
            assert request.num_cached_tokens >= known // 64 * 64 - 64
        known = length
        text += [*output.token_ids, *np.random.default_rng(turn).integers(0, 256, 300)]
        if turn % 2 == 1:
            assert engine.close()
    assert engine.stats().cache.hit_tokens > 0
    assert engine.stats().cached_tokens == engine.stats().cache.hit_tokens
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > model.state_nbytes


def test_no_cache(model):
    with model.engine(2, cache_bytes=0) as engine:
        for _ in range(3):
            request = engine.submit([1] * 1000, greedy(max_tokens=1))
            request.result()
            assert request.num_cached_tokens == 0
        assert engine.stats().cache.query_tokens == 0
    for options, error in (({"cache_bytes": -1}, ValueError), ({"cache_bytes": 1.5}, TypeError)):
        with pytest.raises(error, match="cache_bytes"):
            model.engine(2, **options)
    with pytest.raises(ValueError, match="host_nbytes"):
        model.engine(2, host_cache_bytes=1 << 20)


# ---- cancelling, slow readers ----------------------------------------------------------------------------------------


def test_closing_does_not_wait_for_a_reader_who_stands_still(model):
    """Leaving the block lets the request finish, though its only reader is in there."""
    with model.engine(2) as engine:
        request = engine.submit("a", based.SamplingParams(max_tokens=1500, ignore_eos=True))
        first = next(request)
        time.sleep(0.2)  # it may pause meanwhile
    assert len(first.token_ids) + sum(len(chunk.token_ids) for chunk in request) == 1500


def test_cancelling(model, engine):
    request = engine.submit("a", ENDLESS)
    chunks = [next(request) for _ in range(3)]
    threading.Timer(0.1, request.cancel).start()
    chunks += list(request)
    assert chunks[-1].finish_reason == "abort"
    assert chunks[-1].error == "cancelled"
    request.cancel()
    assert request.result().outputs[0].token_ids == [t for chunk in chunks for t in chunk.token_ids]
    dropped = engine.submit("a", ENDLESS)
    next(dropped)
    del dropped
    wait_for(lambda: engine.stats().running == 0)


def test_a_slow_reader_stops_its_own_request_alone(model, engine):
    request = engine.submit("a", ENDLESS)
    next(request)
    wait_for(lambda: request._paused)
    made = engine.stats().generated_tokens
    assert len(engine.submit("b", greedy()).result().outputs[0].token_ids) == 24
    assert len(engine.submit("b", greedy()).result().outputs[0].token_ids) == 24
    assert engine.stats().generated_tokens - made < 48 + 200
    found = [1] + [len(next(request).token_ids) for _ in range(2000)]
    assert sum(found) == 2001
    request.cancel()


def test_a_closed_stream_ends_its_request(model):
    shared = model._shared_engine()
    stream = model.stream("Hello", ENDLESS)
    next(stream)
    stream.close()
    wait_for(lambda: shared.stats().running == 0)
    stream = model.stream("Hello", ENDLESS)
    next(stream)
    del stream
    wait_for(lambda: shared.stats().running == 0)
    wait_for(lambda: shared.stats().slots == 0)


def test_result_times_out(engine):
    request = engine.submit("a", ENDLESS)
    with pytest.raises(TimeoutError, match=r"0\.05 seconds"):
        request.result(timeout=0.05)
    for wrong in (math.nan, -1, "soon"):
        with pytest.raises(ValueError, match=r"timeout is .*, expected seconds"):
            request.result(timeout=wrong)
    request.cancel()
    for long in (math.inf, 10**400):
        assert request.result(timeout=long).outputs[0].finish_reason == "abort"
        one = engine.submit("a", based.SamplingParams(max_tokens=1, ignore_eos=True), timeout=long)
        assert one.result().outputs[0].finish_reason == "length"


def test_a_wrong_timeout_does_not_close(model):
    with model.engine(max_batch_size=1) as engine:
        with pytest.raises(ValueError, match="timeout is nan"):
            engine.close(timeout=math.nan)
        assert engine.submit("a", based.SamplingParams(max_tokens=1)).result().outputs
        assert engine.close(timeout=10**400)


def test_what_free_slots_take_does_not_wait(model):
    """A step is under way while requests come: those that have room are not refused."""
    with model.engine(max_batch_size=12, max_waiting_requests=1, max_waiting_tokens=10) as engine:
        for _ in range(20):
            burst = [engine.submit([1] * 8, based.SamplingParams(max_tokens=2, n=2)) for _ in range(6)]
            for request in burst:
                request.result(60)


def test_an_event_loop_is_not_blocked(model):
    async def run():
        params = based.SamplingParams(max_tokens=300, ignore_eos=True, logprobs=5)

        async def consume():
            return sum([1 async for _ in model.astream("Hello", params)])

        tasks = [asyncio.ensure_future(consume()) for _ in range(8)]
        gaps, last = [], time.perf_counter()
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        assert [task.result() for task in tasks] == [300] * 8
        return sorted(gaps)

    gaps = asyncio.run(run())
    assert gaps[len(gaps) * 9 // 10] < 0.05


# ---- the ends --------------------------------------------------------------------------------------------------------


def test_closing(model):
    engine = model.engine(2)
    requests = [engine.submit("a", greedy(max_tokens=50, ignore_eos=True)) for _ in range(4)]
    assert engine.close()
    assert [len(r.result().outputs[0].token_ids) for r in requests] == [50] * 4
    assert engine.close(drain=False)
    engine = model.engine(2)
    request = engine.submit("a", ENDLESS)
    assert not engine.close(timeout=0.05)
    assert engine.close(drain=False)
    assert request.result().outputs[0].finish_reason == "abort"

    async def run():
        async with model.engine(2) as engine:
            return engine.submit("a", greedy())

    assert asyncio.run(run()).result().outputs[0].finish_reason == "length"


def test_an_engine_that_is_dropped_gives_its_memory_back(model):
    before = model.memory
    engine = model.engine(8)
    engine.submit("a", greedy()).result()
    assert model.memory.states > before.states
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    wait_for(lambda: model.memory == before)


def test_a_model_that_is_dropped_ends_its_engine(models):
    model = based.load(GOLDEN / "based-tiny", dtype="float32")
    model.generate("a", greedy())
    gone = weakref.ref(model._core)
    del model
    gc.collect()
    wait_for(lambda: gone() is None)


FORK = """
import os, signal, sys
import based
model = based.load(sys.argv[1], num_threads=2)
params = based.SamplingParams(max_tokens=8, temperature=0)
engine = model.engine(2)
expected = engine.submit("a", params).result()
running = engine.submit("a", based.SamplingParams(max_tokens=None, ignore_eos=True))
stream = model.stream("a", based.SamplingParams(max_tokens=None, ignore_eos=True))
next(running), next(stream)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    for call in (lambda: engine.submit("a"), lambda: list(running), lambda: running.result(), lambda: list(stream)):
        try:
            call()
            sys.exit(1)
        except based.EngineClosedError as error:
            assert "forked" in str(error), error
    assert engine.close(drain=False)
    assert model.generate("a", params) == [expected]
    with model.engine(2) as other:
        assert other.submit("a", params).result() == expected
    del engine, running, stream
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert next(running).token_ids and next(stream).token_ids
running.cancel()
assert engine.submit("a", params).result() == expected
print(code)
"""


def test_a_forked_child_makes_its_own(cache):
    command = [sys.executable, "-c", FORK, str(GOLDEN / "based-tiny")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


ENDS = """
import sys, threading, time
import based
model = based.load(sys.argv[1])
engine = model.engine(4)
endless = based.SamplingParams(max_tokens=None, ignore_eos=True)
for i in range(4):
    threading.Thread(target=lambda: list(engine.submit("a", endless)), daemon=True).start()
kept = engine.submit("b", endless)
time.sleep(0.1)
"""


def test_python_may_end_while_an_engine_runs(cache):
    for _ in range(3):
        command = [sys.executable, "-c", ENDS, str(GOLDEN / "based-tiny")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_reaches_whoever_waits(engine):
    request = engine.submit("a", ENDLESS)
    for read in (request.result, lambda: list(itertools.islice(request, 10**7))):
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            read()
        timer.join()
    request.cancel()
