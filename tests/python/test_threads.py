"""Threads, signals and the GIL."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import based
import numpy as np
import pytest
from based import _core

GOLDEN = Path(__file__).parent.parent / "golden"
LONG = 1_000_000  # tokens: many seconds of prefill
SOON = 20  # what stops soon takes less than this part of them, measured in the same process


def wait_until_busy(session):
    """Returns once another thread is in a call of the session."""
    deadline = time.monotonic() + 30
    while not session._turns.taken:
        if time.monotonic() > deadline:
            raise TimeoutError("the session was never busy")


class InThread(threading.Thread):
    """Runs a function; what it returned or raised."""

    def __init__(self, function):
        super().__init__()
        self._function = function
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error


def test_two_threads_in_one_session(model):
    session, alone = model.session(), model.session()
    prompt = np.arange(60_000) % 258
    thread = InThread(lambda: session.prefill(prompt))
    wait_until_busy(session)
    for call in (
        lambda: session.prefill([1]),
        lambda: session.step([1]),
        lambda: session.generate([1]),
        lambda: next(session.stream([1])),
        session.fork,
        session.checkpoint,
        session.reset,
        lambda: session.copy(0, 0),
        lambda: session.save_state("x"),
        lambda: session.load_state("x"),
    ):
        with pytest.raises(based.SessionBusyError, match="one thread at a time"):
            call()
        assert thread.is_alive(), "the prompt is too short for this machine"
    thread.join()
    np.testing.assert_array_equal(thread.result, alone.prefill(prompt))
    np.testing.assert_array_equal(session.step([1]), alone.step([1]))


def test_python_runs_while_the_core_computes(model):
    session = model.session()
    thread = InThread(lambda: session.prefill(np.zeros(60_000, np.int64)))
    wait_until_busy(session)
    counted = 0
    # Milliseconds of Python. While a core that kept the GIL had a prompt, this thread would not come to count.
    while thread.is_alive() and counted < 100_000:
        counted += 1
    assert counted == 100_000 and thread.is_alive(), "the prompt was read before Python ran on"
    thread.join()


def test_many_threads_on_one_model(model):
    prompts = [f"prompt {i}" for i in range(8)]
    params = [based.SamplingParams(seed=i, max_tokens=20) for i in range(8)]

    def work(i):
        session = model.session()
        logits = session.prefill(prompts[i])
        return model.generate(prompts[i], params[i]), logits, model.forward(prompts[i]), model.score(prompts[i])

    expected = [work(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for (found, *arrays), (output, *others) in zip(pool.map(work, range(8)), expected, strict=True):
            assert found == output
            for array, other in zip(arrays, others, strict=True):
                np.testing.assert_array_equal(array, other)


def test_sessions_in_threads_are_independent(model):
    def work(seed):
        session = model.session()
        outputs = [session.generate("go on", based.SamplingParams(seed=seed, max_tokens=10)) for _ in range(3)]
        return [output.outputs[0].token_ids for (output,) in outputs]

    expected = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == expected


def test_a_generator_has_one_thread(model):
    core = _core.Model.random(model.config)
    start = time.monotonic()
    _core.Session(core).prefill([[0] * (LONG // SOON)])
    soon = time.monotonic() - start
    generator = _core.Generator(core, [[0] * LONG], [based.SamplingParams()], 1)
    thread = InThread(generator.next)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            generator.done()
        except based.SessionBusyError:
            break
    with pytest.raises(based.SessionBusyError, match="another thread"):
        generator.next()
    start = time.monotonic()
    generator.cancel()
    thread.join()
    assert time.monotonic() - start < soon
    assert isinstance(thread.error, based.Error)
    assert str(thread.error) == "cancelled"
    assert not generator.done()


def test_interrupts_reach_the_main_thread_only(model):
    """A signal that arrives while another thread computes is no business of that thread."""
    session = model.session()
    thread = InThread(lambda: session.prefill(np.zeros(30_000, np.int64)))
    wait_until_busy(session)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    thread.join()
    assert thread.error is None
    assert session.num_tokens == [30_000]


CTRL_C = """
import os, signal, sys, threading, time
import numpy as np
import based

model = based.load(sys.argv[1], dtype="float32")
ids = np.zeros({long}, np.int64)
greedy = based.SamplingParams(max_tokens=10**9, temperature=0)
session = model.session()
session.prefill("Hello")
expected = session.fork().step([1])
start = time.monotonic()
session.fork().prefill(ids[: {long} // {soon}])
soon = time.monotonic() - start

for what in (
    lambda: session.prefill(ids),
    lambda: session.generate(ids, greedy),
    lambda: session.generate("a", greedy),
    lambda: next(session.stream(ids, greedy)),
    lambda: model.generate([ids], greedy),
    lambda: model.generate("a", greedy),
    lambda: list(model.stream("a", greedy)),
    lambda: model.forward(ids[:200_000]),
    lambda: model.score(ids),
):
    sent = []
    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(0.25, interrupt)
    timer.start()
    try:
        what()
        print("not interrupted")
    except KeyboardInterrupt:
        latency = time.monotonic() - sent[0]
        print(latency < soon, session.num_tokens == [5], np.array_equal(session.fork().step([1]), expected))
    timer.join()
"""


def test_ctrl_c_stops_soon_and_leaves_the_session_usable(cache):
    """Before a twentieth of its prompt is read, in whatever the process is doing, with every state as it was."""
    code = CTRL_C.format(long=LONG, soon=SOON)
    command = [sys.executable, "-c", code, str(GOLDEN / "based-tiny")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 9
    for is_soon, is_same_length, is_same_state in lines:
        assert (is_soon, is_same_length, is_same_state) == ("True", "True", "True")


def test_ctrl_c_ends_a_script(cache):
    """The traceback of a plain KeyboardInterrupt, and the exit status that a shell expects of it."""
    code = f"import based; m = based.load({str(GOLDEN / 'based-tiny')!r}); print(flush=True); m.score([1] * {LONG})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "\n"
    time.sleep(0.25)  # into the core; a signal that comes before gives the same
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


FORKS = """
import os, signal, sys, threading
import based

model = based.load(sys.argv[1], num_threads=3)
params = based.SamplingParams(max_tokens=8, temperature=0)
expected = model.generate("a prompt", params)
stop = threading.Event()
def compute():
    while not stop.is_set():
        model.generate("another prompt", params)
thread = threading.Thread(target=compute)
thread.start()
codes = []
for i in range(24):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        if i % 3 == 0:
            sys.exit(7)
        same = model.generate("a prompt", params) == expected
        if i % 3 == 1:
            del model
        sys.exit(7 if same else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
thread.join()
print(codes == [7] * 24, codes, model.generate("a prompt", params) == expected)
"""


def test_a_process_may_fork_while_another_thread_computes(cache):
    """The child generates on threads of its own, and ends: unused, used, or with the model dropped before."""
    command = [sys.executable, "-c", FORKS, str(GOLDEN / "based-tiny")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True") and result.stdout.endswith("True\n"), result.stdout
