"""`based serve --devices`: several processes behind one address, as a client and an operator meet them."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import based
import pytest
from based.server._routing import Prefixes, fingerprints

from tests.python.serving import PATIENCE, Running

LONG_PATIENCE = 10 * PATIENCE  # for several starts of several processes
GOLDEN = Path(__file__).parent.parent / "golden" / "based-tiny"
PACKAGES = Path(based.__file__).parents[1]
GREEDY = {"temperature": 0, "ignore_eos": True}
ENDLESS = {"max_tokens": 10**9, "stream": True, **GREEDY}
LONG = "Once upon a time there was a state that had seen everything. " * 12


# ---- who gets a request ----------------------------------------------------------------------------------------------


def of(**fields: Any) -> list[bytes]:
    return fingerprints(json.dumps(fields).encode())


def common(left: list[bytes], right: list[bytes]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=False))


def test_beginnings_of_prompts() -> None:
    text = of(prompt="a" * 1000)
    assert len(text) == 3 and common(text, of(prompt="a" * 600 + "b" * 400)) == 2
    assert of(prompt=["a" * 1000, "x"]) == text  # of several prompts the first
    ids = of(prompt=list(range(200)))
    assert len(ids) == 3 and common(ids, of(prompt=[*range(100), *range(100)])) == 1
    assert of(prompt=[list(range(200))]) == ids and not set(ids) & set(text)
    assert of(prompt="short") == [] and len(of(prompt="x" * 2_000_000)) < 600
    assert of(prompt="y" * 300, state_id="s") == of(state_id="s") != of(state_id="t")
    assert of(prompt="z", save_state="s") == of(state_id="s")
    assert of(prompt="ä" * 300 + "\ud800") != []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"[" * 10**5, b'{"prompt": 5}', b'{"prompt": {"a": 1}}', b'{"prompt": [1.5]}',
     b'{"prompt": [1e400]}', b'{"prompt": [99999999999999999999]}', b'{"prompt": [1, "a"]}', b'{"prompt": null}',
     b'{"prompt": [[]]}', b'{"prompt": [[1, []]]}', b'{"state_id": 5, "save_state": []}', b"\xff"],
)  # fmt: skip
def test_wrong_bodies_have_no_beginnings(body: bytes) -> None:
    assert fingerprints(body) == []


def test_the_longest_beginning_chooses_among_those_that_are_not_too_busy() -> None:
    prefixes = Prefixes()
    first, second = [b"1", b"2"], [b"a", b"b"]
    assert [prefixes.choose(first, {"x": 0, "y": 0}), prefixes.choose(second, {"x": 0, "y": 0})] == ["x", "y"]
    assert prefixes.choose([*first, b"3"], {"x": 5, "y": 0}) == "x"
    assert prefixes.choose([b"1", b"9"], {"x": 5, "y": 0}) == "x"
    assert prefixes.choose([b"7"], {"x": 5, "y": 0}) == "y"
    assert prefixes.choose([*first, b"3"], {"x": 9, "y": 0}) == "y"  # too busy: from now on y holds it, too
    assert prefixes.choose([*first, b"3"], {"x": 1, "y": 0}) == "y"
    assert prefixes.choose(second, {"x": 0}) == "x"  # y is not there
    prefixes.forget("x")
    assert prefixes.choose([*first], {"x": 0, "y": 8}) == "y"
    assert {prefixes.choose([], {"x": 0, "y": 0, "z": 0}) for _ in range(3)} == {"x", "y", "z"}


# ---- a server --------------------------------------------------------------------------------------------------------


class Devices(Running):
    """A server in a process of its own, with two workers on the CPU."""

    def __init__(self, folder: Path, *options: str, words: tuple[str, ...] = ("-m", "based.cli", "serve")) -> None:
        super().__init__(0, None)
        self.folder = folder
        self._log = (folder / "log").open("wb")
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join((str(PACKAGES), str(folder)))}
        self.process = subprocess.Popen(
            [sys.executable, *words, *options], stderr=self._log, stdout=self._log, env=environment
        )
        self.until(lambda: "listening on" in self.log or self.process.poll() is not None)
        found = re.search(r"listening on http://127.0.0.1:(\d+)", self.log)
        assert found, self.log
        self.port = int(found[1])

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def workers(self) -> dict[str, str]:
        workers: dict[str, str] = self._ask("/health", None, "GET", {}).json["workers"]
        return workers

    def until_ready(self) -> None:
        self.until(lambda: set(self.workers.values()) == {"ok"})

    @property
    def pids(self) -> dict[str, int]:
        """Of the workers, by name."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        named = {Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode(): pid for pid in pids}
        return {
            name.removeprefix("based serve: "): pid for name, pid in named.items() if name.startswith("based serve")
        }

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """A number, by worker."""
        from prometheus_client.parser import text_string_to_metric_families

        page = self.ask("/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        found = [s for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return {sample.labels["worker"]: sample.value for sample in found}

    @property
    def completions(self) -> dict[str, float]:
        """Those answered so far, by worker."""
        return self.metric("based:http_responses_total", route="/v1/completions", status="200")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self._log.close()
        return self.process.wait(LONG_PATIENCE)


COMMON = ("--port", "0", "--devices", "cpu,cpu", "--threads", "1", "--dtype", "float32", "-m", str(GOLDEN))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    options = ("--served-model-name", "tiny", "--api-key", "k", "--max-batch-size", "8", "--drain-timeout", "600")
    devices = Devices(tmp_path_factory.mktemp("devices"), *COMMON, *options)
    devices.headers = {"authorization": "Bearer k"}
    try:
        devices.until_ready()
        yield devices
    finally:
        devices.end()


@contextlib.contextmanager
def stream(server: Devices, **body: Any) -> Iterator[http.client.HTTPResponse]:
    """A response that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_PATIENCE)
    with contextlib.closing(connection):
        headers = server.headers | {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b'data: {"id"')
        yield response


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_answers_are_those_of_one_server(server: Devices, model: based.Model) -> None:
    expected = model.generate(["def f("], based.SamplingParams(max_tokens=8, **GREEDY))[0].outputs[0].text
    body = {"prompt": "def f(", "max_tokens": 8, **GREEDY}
    assert [server.text(**body) for _ in range(2)] == [expected] * 2
    assert sorted(worker for worker in server.completions if worker != "front") == ["cpu-0", "cpu-1"]
    events = server.ask("/v1/completions", body | {"stream": True}).events
    assert "".join(event["choices"][0]["text"] for event in events) == expected and len(events) == 8
    texts = [choice["text"] for choice in server.complete(**(body | {"prompt": ["def f(", "x"], "n": 1}))["choices"]]
    assert texts[0] == expected and len(texts) == 2
    assert [one["id"] for one in server.ask("/v1/models").json["data"]] == ["tiny"]
    tokens = server.ask("/tokenize", {"prompt": "a b"}).json["tokens"]
    assert server.ask("/detokenize", {"tokens": tokens}).json["prompt"].endswith("a b")
    assert "/v1/completions" in server.ask("/openapi.json").json["paths"]
    answer = server.ask("/v1/models", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine" and "connection" not in answer.headers
    page, head = server.ask("/"), server.ask("/", method="HEAD")
    assert page.status == head.status == 200 and head.body == b"" != page.body
    assert head.headers["content-length"] == page.headers["content-length"] == str(len(page.body))


def test_what_is_wrong_is_refused_as_by_one_server(server: Devices) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer other"}):
        answer = server.ask("/v1/models", headers=headers)
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key"
    assert server.ask("/health", headers={"authorization": ""}).status == 200
    assert server.refused(400, "max_tokens", prompt="a", max_tokens=-1)["message"]
    assert server.refused(404, "model", prompt="a", model="other")["message"]
    assert server.ask("/v1/completions", b"{").error["message"]
    assert server.ask("/v1/completions", b"{}", headers={"content-type": "text/plain"}).status == 415
    assert server.ask("/v1/completions").headers["allow"] == "POST"
    assert server.ask("/v1/chat/completions", {}).status == server.ask("/no%20thing?a=b").status == 404
    for answer in (server.ask("/health", {}), server.ask("/health", method="TRACE")):
        assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD"
    assert server.ask("/v1/states/..%2Fx").status in (400, 404)


def test_what_is_told_of_all(server: Devices) -> None:
    info = server.ask("/server_info").json
    assert [worker["worker"] for worker in info["workers"]] == ["cpu-0", "cpu-1"]
    assert info["engine"]["max_batch_size"] == 16 and info["model"]["id"] == "tiny"
    assert {worker["engine"]["max_batch_size"] for worker in info["workers"]} == {8}
    assert server.metric("based:max_num_seqs") == {"cpu-0": 8, "cpu-1": 8}
    assert server.metric("based:worker_ready") == {"cpu-0": 1, "cpu-1": 1}
    assert set(server.metric("process_resident_memory_bytes")) == {"cpu-0", "cpu-1", "front"}
    assert set(server.metric("based:time_to_first_token_seconds_count")) == {"cpu-0", "cpu-1"}
    page = server.ask("/metrics").body.decode().splitlines()
    declared = [line for line in page if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared)) and "# TYPE based:steps_total counter" in declared
    health = server.ask("/health")
    assert health.status == 200 and health.json == {"status": "ok", "workers": {"cpu-0": "ok", "cpu-1": "ok"}}


def test_a_prompt_goes_where_its_beginning_is(server: Devices) -> None:
    for name in "abcd":
        before = server.completions
        for turn in range(3):
            answer = server.complete(prompt=name + LONG + "and " * 40 * turn, max_tokens=1, **GREEDY)
            if turn:
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        more = {worker: count - before.get(worker, 0) for worker, count in server.completions.items()}
        assert max(more.values()) == sum(more.values()) == 3


def test_states_are_everybodys(server: Devices) -> None:
    first = server.complete(prompt="My name is", max_tokens=4, save_state="ada", **GREEDY)
    assert first["state_id"] == "ada"
    expected = server.text(state_id="ada", prompt=" and", max_tokens=6, **GREEDY)
    assert server.ask("/v1/states/ada/fork", {"to": "eve"}).json["id"] == "eve"
    listed = {state["id"]: state for state in server.ask("/v1/states").json["data"]}
    assert set(listed) == {"ada", "eve"} and listed["ada"]["in_memory"] and listed["ada"]["saved"]
    body = {"prompt": "My name is", "max_tokens": 4, "save_state": True, **GREEDY}
    made = [server.complete(**body)["state_id"] for _ in range(4)]
    for number in range(4):
        assert server.ask("/v1/states/ada/fork", {"to": f"copy-{number}"}).status == 200
    # The worker that has made a fork has it in memory; names that no client gave are read from files by any worker.
    for names, num_workers in (([f"copy-{number}" for number in range(4)], 1), (made, 2)):
        before = server.completions
        for name in names:
            assert server.text(state_id=name, prompt=" and", max_tokens=6, **GREEDY) == expected
            assert server.ask(f"/v1/states/{name}", method="DELETE").json["deleted"]
        after = server.completions
        assert sum(after[worker] > before.get(worker, 0) for worker in ("cpu-0", "cpu-1")) == num_workers
    assert server.ask("/v1/states/ada", method="DELETE").json["deleted"]
    for _ in range(2):
        server.refused(404, "state_id", state_id="ada", prompt="a")
        assert server.ask("/v1/states/ada").status == 404
    assert server.text(state_id="eve", prompt=" and", max_tokens=6, **GREEDY) == expected


def test_a_client_that_goes_away_ends_its_request(server: Devices) -> None:
    def running() -> float:
        return sum(server.metric("based:num_requests_running").values())

    with stream(server, prompt="x", **ENDLESS):
        server.until(lambda: running() == 1)
    server.until(lambda: running() == 0)
    assert "the client went away" in server.log
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG_PATIENCE)
    body = json.dumps({"prompt": "x", **ENDLESS, "stream": False})
    connection.request("POST", "/v1/completions", body, server.headers | {"content-type": "application/json"})
    server.until(lambda: running() == 1)
    connection.close()
    server.until(lambda: running() == 0)


def test_a_worker_that_dies(server: Devices) -> None:
    """Its requests end with an error, the other's go on, and it is started again."""
    server.complete(prompt="a", max_tokens=2, save_state="survivor", **GREEDY)
    expected = server.text(state_id="survivor", prompt="b", max_tokens=5, **GREEDY)
    with stream(server, prompt="x", **ENDLESS) as first:
        [dying] = [name for name, count in server.metric("based:num_requests_running").items() if count]
        [other] = {"cpu-0", "cpu-1"} - {dying}
        with stream(server, prompt="y", **ENDLESS) as second:
            server.until(lambda: server.metric("based:num_requests_running") == {dying: 1, other: 1})
            pids = server.pids
            os.kill(pids[dying], signal.SIGKILL)
            *events, error, done, end = first.read().decode().split("\n\n")
            assert done == "data: [DONE]" and end == ""
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "worker_ended"
            assert all(json.loads(event.strip().removeprefix("data: "))["choices"] for event in events[1:])
            for _ in range(100):
                assert second.readline().startswith((b"data: {", b"\n"))
    server.until(lambda: f"{dying}: the process of {dying} ended by SIGKILL; it is started again" in server.log)
    server.until_ready()
    assert server.pids[dying] != pids[dying] and server.pids[other] == pids[other]
    assert server.metric("based:worker_starts_total") == {dying: 2, other: 1}
    for _ in range(2):
        assert server.text(state_id="survivor", prompt="b", max_tokens=5, **GREEDY) == expected


def test_a_worker_that_ends_gets_no_more_requests(server: Devices) -> None:
    with stream(server, prompt="x", **ENDLESS):
        [ending] = [name for name, count in server.metric("based:num_requests_running").items() if count]
        pid = server.pids[ending]
        os.kill(pid, signal.SIGTERM)
        server.until(lambda: server.metric("based:worker_ready")[ending] == 0)
        assert server.workers[ending] != "ok" and not is_gone(pid)
        for _ in range(4):
            server.complete(prompt="z", max_tokens=1, **GREEDY)
    server.until(lambda: is_gone(pid))
    server.until_ready()


def test_a_worker_that_hangs_gets_no_requests_until_it_answers(server: Devices) -> None:
    pids = server.pids
    os.kill(pids["cpu-0"], signal.SIGSTOP)
    try:
        server.until(lambda: server.workers["cpu-0"] == "not answering")
        assert server._ask("/health", None, "GET", {}).status == 200
        for _ in range(4):
            server.complete(prompt="z", max_tokens=1, **GREEDY)
        os.kill(pids["cpu-1"], signal.SIGSTOP)
        server.until(lambda: server.workers["cpu-1"] == "not answering")
        health = server._ask("/health", None, "GET", {})
        assert (health.status, health.json["status"]) == (503, "not answering")
        refused = server.ask("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.error["code"]) == (503, "not_answering")
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
    server.until_ready()
    assert "cpu-0: answers again" in server.log and server.pids == pids


def test_the_end(server: Devices) -> None:
    """SIGTERM to all processes: what runs comes to its end, then all are gone, and their folder."""
    pids = server.pids
    assert len(pids) == 2
    with stream(server, prompt="x", max_tokens=20_000, stream=True, **GREEDY) as response:  # seconds on any machine
        [running] = [name for name, count in server.metric("based:num_requests_running").items() if count]
        for pid in (server.process.pid, *pids.values()):
            os.kill(pid, signal.SIGTERM)
        # The running one gets a second signal from its front. Two that are pending at once are one: so a third.
        server.until(lambda: f"{running}: SIGTERM: shutting down" in server.log)
        os.kill(pids[running], signal.SIGTERM)
        server.until(lambda: server.log.count(f"{running}: SIGTERM: shutting down") >= 2)
        server.until(lambda: any(line[8:] == " SIGTERM: shutting down" for line in server.log.splitlines()))
        answer = server.ask("/v1/completions", {"prompt": "a"})
        assert answer.status == 503 and answer.error["code"] == "shutting_down"
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    assert server.process.wait(LONG_PATIENCE) == 0, server.log
    assert all(is_gone(pid) for pid in pids.values())
    assert [path.name for path in server.folder.iterdir()] == ["log"]


def test_a_client_that_does_not_read_does_not_keep_the_server(tmp_path: Path) -> None:
    server = Devices(tmp_path, *COMMON, "--drain-timeout", "0.5")

    def stands_still() -> bool:  # in the middle of an answer, or at its end
        counts = []
        for pause in (0.5, 0):
            counts.append(sum(server.metric("based:http_responses_total", route="/openapi.json").values()))
            time.sleep(pause)
        return 0 < counts[0] == counts[1] < 400

    try:
        server.until_ready()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(LONG_PATIENCE)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 400)
            server.until(stands_still)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LONG_PATIENCE) == 0
    finally:
        server.end()


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    server = Devices(tmp_path, *COMMON)
    try:
        server.until(lambda: len(server.pids) == 2)  # they are still loading, perhaps before they run any of our code
        pids = server.pids
        server.process.kill()
        server.process.wait(LONG_PATIENCE)
        until(lambda: all(is_gone(pid) for pid in pids.values()))
    finally:
        server.end()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--devices", "cpu,gpu"), 2, "'gpu' in 'cpu,gpu' is neither cpu nor cuda:N"),
        (("--devices", ""), 2, "neither cpu nor cuda:N"),
        (("--devices", "cpu,cpu", "--device", "cpu"), 2, "--device cpu and --devices cpu,cpu: give one of them"),
        (("--devices", "cpu,cpu", "-m", "nothing"), 1, "nothing: neither an existing directory nor a model's name"),
        (("--devices", "cpu,cuda:99"), 1, "--devices cpu,cuda:99: "),
        (("--devices", "cpu,cpu", "--cache-dir", str(GOLDEN / "config.json")), 1, "config.json"),
    ],
)
def test_what_is_refused_is_said_once(tmp_path: Path, options: tuple[str, ...], status: int, message: str) -> None:
    words = [sys.executable, "-m", "based.cli", "serve", "--port", "0", "--threads", "1", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGES)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=LONG_PATIENCE)
    assert done.returncode == status, done.stderr
    said = [line for line in done.stderr.splitlines() if message in line]
    assert len(said) == 1 and "error: " in said[0] and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


FAILING = """
import os, signal, sys
from functools import partial
from pathlib import Path
from based.server._devices import serve_devices
from based.server._options import Options

def load(model, marker):
    import based
    if Path(marker).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    loaded = based.load(model, device="cpu", num_threads=1)
    return loaded, loaded.engine()

def main():
    loads = [("cpu", partial(load, *sys.argv[1:])) for _ in range(2)]
    serve_devices(loads, lambda: None, Options("tiny", port=0))
"""


def test_a_worker_that_cannot_begin_again_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = ("-c", "import failing; failing.main()")
    server = Devices(tmp_path, str(GOLDEN), str(tmp_path / "marker"), words=words)
    try:
        server.until_ready()
        (tmp_path / "marker").touch()
        os.kill(server.pids["cpu-1"], signal.SIGKILL)
        assert server.process.wait(LONG_PATIENCE) == 1
        assert server.log.count("cpu-1: the process of cpu-1 ended by SIGKILL; it is started again") == 3
        assert "cpu-1: the process cannot begin, so that this server ends" in server.log
        assert server.log.rstrip().endswith("ChildProcessError: the process of cpu-1 ended by SIGKILL")
    finally:
        server.end()
