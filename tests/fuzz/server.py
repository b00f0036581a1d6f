"""Fuzzes `based serve`: requests that /openapi.json describes, right and wrong ones, and bytes that are nearly HTTP.

    python tests/fuzz/server.py --requests 10000                       # damaged HTTP and JSON
    python tests/fuzz/server.py --requests 0 --examples 200            # each operation, by schemathesis

The server is one of its own, of the golden model, at a free port of this machine. Schemathesis (`pip install
schemathesis`, best in an environment of its own: --schemathesis ENVIRONMENT/bin/st) tries every operation with all of
its checks: no status, header, media type or body that is not described, no wrong data taken, no right data refused but
for contradictions between fields. A damaged request must get a status of 2xx or 4xx with a body as described, or its
connection is closed. The exit status is 1 if anything of it fails, or the server has logged a fault of its own.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from tests.fuzz.run import mutate
from tests.python.description import Description

KEY = "k"
SILENCE = 0.2  # seconds, after which an answer is taken for whole
PATIENCE = 60  # seconds for the server to close a connection that was closed on this side
HEAD = b"Host: localhost\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\n"


def request(body: bytes, path: str = "/v1/completions", more: bytes = b"") -> bytes:
    """A POST that is right, but for its body."""
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST %s HTTP/1.1\r\n%s%s%s\r\n%s" % (path.encode(), HEAD, more, length, body)


def chunked(*lines: bytes) -> bytes:
    """A POST whose body is in pieces."""
    head = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"\r\n".join(lines)


BODIES = [
    b'{"prompt":"a","max_tokens":2}',
    b'{"prompt":"a","max_tokens":2,"stream":true,"stream_options":{"include_usage":true},"logprobs":2}',
    b'{"prompt":["a",[1,2]],"n":2,"best_of":3,"echo":true,"logprobs":1,"logit_bias":{"7":-1.5},"stop":["x"]}',
    b'{"prompt":"a","save_state":"s","temperature":0.5,"top_p":1e-3,"seed":18446744073709551615}',
    b'{"state_id":"s","prompt":" b","max_tokens":1}',
    b'{"prompt":"a","temperature":NaN}',
    b'{"prompt":"a","temperature":1e999,"top_k":-0}',
    b'{"prompt":"a","prompt":"b"}',
    b'{"prompt":"a\\u0000\x00b"}',
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"\xff\xfe"}',
    b'{"prompt":' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"a":' * 3000,
    b'{"prompt":[' + b"1," * 3000 + b"1]}",
    b'{"prompt":"a","seed":' + b"9" * 5000 + b"}",
    b'{"prompt":"a","max_tokens":1e2}',
    '{"prompt":"a"}'.encode("utf-16"),
    b"\xef\xbb\xbf{}",
    b"[]",
    b"",
]
PATHS = ["/v1/completions"] * 5 + ["/tokenize", "/detokenize", "/v1/states/s/fork"]
REQUESTS = [
    *(request(body) for body in BODIES),
    *(request(body, "/tokenize") for body in (b'{"prompt":"a\xc3\xa9","return_token_strs":true}', b"{}", b"null")),
    *(request(body, "/detokenize") for body in (b'{"tokens":[1,2]}', b'{"tokens":[1e3]}')),
    *(request(body, "/v1/states/s/fork") for body in (b'{"to":"../x"}', b'{"to":null}', b'{"to":"a\\n"}')),
    request(b"{}", "/v1/states/%2e%2e%2fs/save"),
    request(b'{"prompt":"a"}', more=b"Content-Encoding: gzip\r\n"),
    request(b'{"prompt":"a"}', more=b"Content-Length: 3\r\n"),
    request(b'{"prompt":"a"}', more=b"Transfer-Encoding: chunked\r\n"),
    request(b'{"prompt":"a"}', more=b"Expect: 100-continue\r\n"),
    request(b'{"prompt":"a"}', more=b"Upgrade: websocket\r\nConnection: Upgrade\r\n"),
    request(b'{"prompt":"a"}') + request(b'{"prompt":"b"}'),
    chunked(b"d", b'{"prompt":"a"', b"1", b"}", b"0", b"", b""),
    chunked(b"d;ext=1", b'{"prompt":"a"', b"1", b"}", b"0", b"Trailer: x", b"", b""),
    chunked(b"zz", b'{"prompt":"a"}', b"0", b"", b""),
    chunked(b"ffffffffffffffffff", b"{", b"0", b"", b""),
    chunked(b"-1", b"{}", b"0", b"", b""),
    chunked(b"5", b'{"prompt":"a"}', b"0", b"", b""),
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/states/s HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"GET /metrics HTTP/1.0\r\n\r\n",
    b"GET http://localhost/server_info HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"GET /v1/models/%ff%00%0d%0a HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"GET /tokenizer_info?" + b"a=b&" * 50 + b" HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"DELETE /v1/states/s HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET  /health  HTTP/1.1\r\nHost : localhost\r\n folded\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nX: \x00\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: localhost\n\n",
    b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(9000)) + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]
# JSON that is odd, and some that is none.
VALUES = rb"null true -0 0 1 2 1.0 -1 1e2 0.5 1e308 1e309 1e-400 NaN 01 +1 0x1 [] [[]] {}".split()
VALUES += rb'"" "a" "s" "\u0000" "\ud800" "\x" ["a",1] [1,2] {"include_usage":true} {"97":1}'.split()
VALUES += [b"9" * 400, b"9" * 401, b"-1e" + b"9" * 30]
VALUES += [b"[" * 600 + b"]" * 600, b'{"a":' * 600 + b"1" + b"}" * 600, b'"\xff"', b'"\0"', b'"\xed\xa0\x80"', b"'a'"]


def body_of(names: list[str], rng: random.Random) -> bytes:
    """An object of some fields, a few of them odd; the same one may come twice."""
    fields = [b'"prompt":"a"', b'"max_tokens":1']
    for _ in range(rng.randint(0, 2)):
        fields.insert(rng.randint(0, 2), b'"%s":%s' % (rng.choice(names).encode(), rng.choice(VALUES)))
    return b"{" + b" , ".join(fields) + b"}"


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="damaged ones (default 10000)")
    parser.add_argument("--examples", type=int, default=0, help="of schemathesis, for each operation (default 0: none)")
    parser.add_argument("--schemathesis", default="st", metavar="PROGRAM", help="default: st")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    program = shutil.which(args.schemathesis)
    if args.examples and program is None:
        parser.error(f"there is no program {args.schemathesis!r}: pip install schemathesis")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as port:
        faults = [] if args.requests == 0 else damaged(port, args.requests, args.seed)
        is_right = args.examples == 0 or described(port, args.examples, args.seed, str(program))
    for fault in faults[:20]:
        print(fault)
    return 0 if is_right and not faults else 1


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """`based serve`; its port. Raises RuntimeError if it does not begin, or ends with an error."""
    words = [sys.executable, "-m", "based", "serve", "--port", "0", "-m", str(ROOT / "tests" / "golden" / "based-tiny")]
    words += ["--api-key", KEY, "--max-tokens", "4", "--max-n", "3", "--max-prompts", "4", "--no-log-requests"]
    words += ["--state-dir", str(folder), "--max-states", "20", "--max-state-files", "1000000"]
    log = folder / "log"
    with log.open("w") as file, subprocess.Popen(words, stderr=file) as process:
        try:
            while "is ready" not in (text := log.read_text()):
                if process.poll() is not None:
                    raise RuntimeError(text)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            yield int(re.findall(r"listening on http://127\.0\.0\.1:(\d+)", text)[0])
        finally:
            process.terminate()
            status = process.wait(PATIENCE)
    text = log.read_text()
    if status != 0 or "Traceback" in text:
        raise RuntimeError(f"the server's status is {status}:\n{text[-5000:]}")


def described(port: int, examples: int, seed: int, program: str) -> bool:
    """Whether schemathesis finds nothing."""
    words = [
        os.path.abspath(program),
        "run",
        f"http://127.0.0.1:{port}/openapi.json",
        "-H",
        f"Authorization: Bearer {KEY}",
    ]
    words += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "-n", str(examples)]
    words += ["--continue-on-failure", "--request-timeout", str(PATIENCE), "--seed", str(seed), "--no-color"]
    paths = [str(FOLDER), str(ROOT)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(words, env=environment, cwd=ROOT / "build").returncode == 0


def damaged(port: int, number: int, seed: int) -> list[str]:
    """Sends requests and mutations of them; what went wrong."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        description = Description(json.loads(connection.getresponse().read()))
    names = sorted(description.body("/v1/completions").schema["properties"])
    error = description.validator({"$ref": "#/components/schemas/Error"})
    counts: Counter[str] = Counter()

    def one(index: int) -> str | None:
        rng = random.Random(f"{seed} {index}")
        if index < len(REQUESTS):
            data = REQUESTS[index]
        elif index % 3 == 0:
            data = mutate(rng.choice(REQUESTS), REQUESTS, rng)
        elif index % 3 == 1:
            data = request(mutate(rng.choice(BODIES[:8]), BODIES, rng), rng.choice(PATHS))
        else:
            data = request(body_of(names, rng))
        try:
            for status, kind, body in answers(port, data):
                counts[str(status)] += 1
                if status >= 400:
                    error.validate(json.loads(body))
                if not 200 <= status < 500 or kind not in MEDIA_TYPES:
                    raise AssertionError(f"{status}, {kind}, {body[:300]!r}")
        except Exception as fault:
            return f"request {index}: {fault!r}: {data[:1000]!r}"
        return None

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        faults = [fault for fault in pool.map(one, range(number)) if fault is not None]
    statuses = [status for status, _, _ in answers(port, request(b'{"prompt":"a","max_tokens":1}'))]
    if statuses != [200]:
        faults.append(f"then, a right request is answered by {statuses}")
    found = ", ".join(f"{count} × {status}" for status, count in sorted(counts.items()))
    print(f"{number} damaged requests, {len(faults)} faults; answers: {found}", flush=True)
    return faults


MEDIA_TYPES = {"application/json", "text/event-stream", "text/html", "text/plain"}


def answers(port: int, data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Status, media type and body of each answer to the bytes; none where the server closes the connection."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=SILENCE) as connection:
        with contextlib.suppress(ConnectionError, TimeoutError):  # refused before all of it is sent; silent
            connection.sendall(data)
            while piece := connection.recv(1 << 16):
                received += piece
        with contextlib.suppress(ConnectionError, OSError):
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    while received:
        if not received.startswith(b"HTTP/1.1 "):
            raise AssertionError(f"no answer of HTTP/1.1: {bytes(received[:300])!r}")
        if received.startswith(b"HTTP/1.1 100 "):
            del received[: received.find(b"\r\n\r\n") + 4]
            continue
        file = _Received(bytes(received))
        response = http.client.HTTPResponse(file, method="GET")
        try:
            response.begin()
            body = response.read()
        except http.client.IncompleteRead:
            return  # of a HEAD, or cut off, since this side was closed
        yield response.status, response.headers.get_content_type(), body
        del received[: file.data.tell()]


class _Received:
    """What HTTPResponse takes for a socket."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)
        self.data.close = lambda: None  # type: ignore[method-assign]

    def makefile(self, *_: object) -> io.BytesIO:
        return self.data


if __name__ == "__main__":
    sys.exit(main())
