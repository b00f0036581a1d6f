"""Prompts on a cluster of Ray: two workers of this machine."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import based
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GREEDY = {"max_tokens": 5, "temperature": 0}


def test_the_extra_is_named() -> None:
    code = "import sys; sys.modules['ray'] = None; import based.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "based[ray]"' in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def completer() -> Any:
    """In this process, without a cluster."""
    pytest.importorskip("ray.data", reason="the extra `ray` is missing")
    from based.ray import Completer

    return Completer(params=GREEDY, row_params="params", num_threads=1, device="cpu")


def expected(prompt: Any, **params: Any) -> str:
    return based.load(device="cpu", num_threads=1).generate([prompt], based.SamplingParams(**params))[0].outputs[0].text


def column(*values: Any) -> Any:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def test_rows_and_their_failures(completer: Any) -> None:
    prompts = column("def f(", [1, 2, 3], [1, -1], "import ", "x = ", "for ", 5)
    params = column(None, None, None, {"max_tokens": 2, "stop": None}, {"temperature": -1}, {"frequency": 1}, None)
    found = completer({"prompt": prompts, "params": params, "id": np.arange(7)})
    assert list(found["id"]) == list(range(7))
    assert found["completion"][0] == expected("def f(", **GREEDY)
    assert found["completion"][1] == expected([1, 2, 3], **GREEDY)
    assert [len(ids) for ids in found["token_ids"]] == [5, 5, 0, 2, 0, 0, 0]
    assert list(found["finish_reason"]) == ["length", "length", "error", "length", "error", "error", "error"]
    errors = found["error"]
    assert [error is None for error in errors] == [True, True, False, True, False, False, False]
    assert "-1" in errors[2] and "temperature" in errors[4] and "frequency" in errors[5] and "int" in errors[6]


def test_several_samples_of_a_row(completer: Any) -> None:
    two = type(completer)(params={"n": 2, "max_tokens": 5, "seed": 1}, row_params="params", num_threads=1, device="cpu")
    found = two({"prompt": column("def f(", "x", "y"), "params": column(None, {"temperature": -1}, {"n": 3})})
    assert [len(texts) for texts in found["completion"]] == [2, 2, 2] and len(found["token_ids"][0][1]) == 5
    assert [reasons[0] for reasons in found["finish_reason"]] == ["length", "error", "error"]
    assert "temperature" in found["error"][1] and "n is of all rows" in found["error"][2]


def test_a_batch_of_wrong_rows_and_an_empty_one(completer: Any) -> None:
    found = completer({"prompt": column([1 << 40]), "params": column(None)})
    assert list(found["finish_reason"]) == ["error"] and found["error"][0]
    assert len(completer({"prompt": column(), "params": column()})["completion"]) == 0
    with pytest.raises(ValueError, match="no column 'prompt'"):
        completer({"text": column("a")})
    with pytest.raises(ValueError, match=r"no column 'params' .* row_params="):
        completer({"prompt": column("a")})


MARKED = """
import os, sys, time, pathlib, complete

class Marked(complete.Completer):
    def __call__(self, batch):
        workers = pathlib.Path(os.environ["WORKERS"])
        (workers / str(os.getpid())).touch()
        end = time.monotonic() + 300
        while len(list(workers.iterdir())) < 2:  # the first worker waits for the second one's first batch
            assert time.monotonic() < end, "the second worker did not come"
            time.sleep(0.05)
        found = super().__call__(batch)
        return found | {"process": [os.getpid()] * len(found["error"])}

complete.Completer = Marked
complete.main(*sys.argv[1:], batch_size=5)
"""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A temporary folder with a name so short that sockets in it have names of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield folder


def environment(short_folder: str) -> dict[str, str]:
    """Of a cluster that is a test's own."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((str(Path(based.__file__).parents[1]), str(ROOT / "examples" / "ray"))),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": short_folder,
        "RAY_worker_niceness": "0",  # else they wait for all that runs beside
        "BASED_DEVICE": "cpu",
    }


def test_two_workers(tmp_path: Path, short_folder: str) -> None:
    """The example, on a cluster of its own: a row that is wrong has an error, all others are answered."""
    pytest.importorskip("ray.data", reason="the extra `ray` is missing")
    rows: list[dict[str, Any]] = [{"prompt": f"x{i} = "} for i in range(60)]
    rows[7]["params"] = {"max_tokens": 3}
    rows[9]["params"] = {"max_tokens": -3}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "workers").mkdir()
    given = environment(short_folder) | {"WORKERS": str(tmp_path / "workers")}
    words = [sys.executable, "-c", MARKED, str(tmp_path / "in.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(words, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    by_prompt = {row["prompt"]: row for row in found}
    assert len(found) == 60 and set(by_prompt) == {row["prompt"] for row in rows}
    assert by_prompt["x3 = "]["completion"] == expected("x3 = ", max_tokens=32, temperature=0)
    assert len({row["process"] for row in found}) == 2
    assert by_prompt["x7 = "]["error"] is None, by_prompt["x7 = "]["error"]
    assert len(by_prompt["x7 = "]["token_ids"]) == 3
    assert by_prompt["x9 = "]["finish_reason"] == "error" and "max_tokens" in by_prompt["x9 = "]["error"]
    assert sum(row["error"] is not None for row in found) == 1


SERVED = """
import json, socket, sys, time, urllib.request
import ray
import serve as example
from ray import serve

with socket.create_server(("127.0.0.1", 0)) as sock:
    port = sock.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False)

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)

def until(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)

def started():
    try:  # a proxy that is not there within a minute is waited for all the same
        serve.start(http_options={"port": port})
        serve.run(example.app, name="based")
        return True
    except (TimeoutError, ray.exceptions.RayError) as error:
        print(error, file=sys.stderr)
        return False

def complete(**body):
    status, text = ask("/v1/completions", {"temperature": 0, **body})
    assert status == 200, text
    return json.loads(text)

def by_replica(name, label=""):
    lines = [line for line in ask("/metrics")[1].splitlines() if line.startswith(name) and label in line]
    return {line.split('worker="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}

def completions():
    return by_replica("based:http_responses_total", 'route="/v1/completions",status="200"')

until(started)
until(lambda: ask("/health")[0] == 200 and len(json.loads(ask("/health")[1])["workers"]) == 2)
found = {"text": complete(prompt="def f(", max_tokens=5)["choices"][0]["text"]}
found["wrong"] = ask("/v1/completions", {"prompt": 5})
found["stream"] = ask("/v1/completions", {"prompt": "def f(", "max_tokens": 5, "temperature": 0, "stream": True})
found["info"] = json.loads(ask("/server_info")[1])
found["prefixes"] = []
for name in "abcd":
    before, cached = completions(), []
    for _ in range(3):
        answer = complete(prompt=name + "once upon a time there was a state " * 20, max_tokens=1)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    more = [count - before.get(replica, 0) for replica, count in completions().items()]
    found["prefixes"].append((cached, sorted(more)[-1]))
complete(prompt="My name is Ada. ", max_tokens=2, save_state="ada")
for number in range(6):
    assert ask("/v1/states/ada/fork", {"to": f"copy-{number}"})[0] == 200
before = completions()
found["states"] = []
for number in range(6):
    answer = complete(state_id=f"copy-{number}", prompt="You said", max_tokens=4)
    found["states"].append(answer["choices"][0]["text"])
found["askers"] = sum(count > before.get(replica, 0) for replica, count in completions().items())
found["listed"] = [state["id"] for state in json.loads(ask("/v1/states")[1])["data"]]

with socket.create_connection(("127.0.0.1", port)) as client:  # goes away in the middle of a stream
    body = json.dumps({"prompt": "x", "max_tokens": 10**9, "stream": True, "ignore_eos": True}).encode()
    client.sendall(b"POST /v1/completions HTTP/1.1\\r\\nhost: a\\r\\ncontent-type: application/json\\r\\n"
                   b"content-length: %d\\r\\n\\r\\n" % len(body) + body)
    data = b""
    while b"data: {" not in data:
        data += client.recv(1 << 16)
    found["running"] = sum(by_replica("based:num_requests_running").values())
until(lambda: sum(by_replica("based:num_requests_running").values()) == 0)
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
serve.shutdown()
"""


def test_two_replicas(tmp_path: Path, short_folder: str) -> None:
    """Ray Serve with the example's application, over HTTP."""
    pytest.importorskip("ray.serve", reason="the extra `ray` is missing")
    states = tmp_path / "states"
    words = [sys.executable, "-c", SERVED, str(tmp_path / "found")]
    given = environment(short_folder) | {"STATE_DIR": str(states), "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300"}
    done = subprocess.run(words, env=given, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found").read_text())
    assert found["text"] == expected("def f(", **GREEDY)
    status, body = found["wrong"]
    assert status == 400 and json.loads(body)["error"]["param"] == "prompt"
    status, body = found["stream"]
    *events, last, end = body.split("\n\n")
    assert status == 200 and last == "data: [DONE]" and end == "" and len(events) == 5
    assert len(found["info"]["workers"]) == 2 and found["info"]["engine"]["max_batch_size"] > 0
    for cached, most in found["prefixes"]:
        assert most == 3, "prompts that begin alike went to several replicas"
        assert cached[0] == 0 and cached[1] >= 256 and cached[2] >= 256
    assert len(set(found["states"])) == 1 and found["askers"] == 2
    assert sorted(found["listed"]) == ["ada", *(f"copy-{number}" for number in range(6))]
    assert {path.name for path in states.iterdir()} == {f"{name}.safetensors" for name in found["listed"]}
    assert found["running"] == 1
