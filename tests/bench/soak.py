"""A server under a mixed load for a long time: leaks, stuck slots, answers that do not come, what kill -9 leaves.

    python tests/bench/soak.py                    # 30 minutes, the model of the package, a CPU
    python tests/bench/soak.py --seconds 120      # a look: memory still grows then, while caches fill

Clients in this process ask a `based serve` on this machine: whole answers, streams, states, clients that go away,
deadlines, requests that are wrong in every layer. A `based batch` beside it is killed again and again. In the last
tenth of the time the server itself is killed (SIGKILL) and started again in the same folders. All files are in a
temporary folder.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from bars import Bars
from based.cli._bench_serve import Client

PATIENCE = 120.0  # seconds that an answer may take
KNOWN = 6  # states whose continuations are known
GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    b"\r\n\r\n\r\n\r\n",
]
BODIES: list[bytes] = [
    b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 10_000, b'{"a":' * 10_000,
    b'{"prompt": "x", "max_tokens": 1e999}', b'{"prompt": "x", "max_tokens": -1}', b'{"prompt": {}}',
    b'{"prompt": [-1]}', b'{"prompt": [1e18]}', b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "n": 1e6}',
    b'{"n": 1, "n": 2}', b'{"prompt": "x", "stop": ""}', b'{"prompt": "x", "no_such_field": 1}',
    b'{"prompt": "x", "state_id": "../../etc"}', b'{"prompt": "' + b"x" * 2_000_000 + b'"}',
]  # fmt: skip


class Server:
    """`based serve` in a folder, as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.log = folder / "log"
        self.process = self._start()
        while (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text())) is None:
            if self.process.poll() is not None:
                raise SystemExit("the server did not begin: " + self.log.read_text()[-2000:])
            time.sleep(0.1)
        self.port = int(found[1])  # the same after each kill

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "based", "serve", "--port", self.port, "--no-log-requests",
                 "--state-dir", self.folder / "states", "--max-states", 16, "--max-state-files", 60,
                 "--cache-bytes", "32M", "--cache-dir", self.folder / "cache", "--cache-dir-bytes", "64M",
                 "--max-batch-size", 16, "--max-waiting-requests", 48, "--max-body-bytes", "1M",
                 "--read-timeout", 5]  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)

    def again(self) -> None:
        """After SIGKILL."""
        self.process = self._start()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def resident(self) -> int:
        """Bytes of its own memory: pages of files do not count."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise SystemExit("the server has ended: " + self.log.read_text()[-2000:])

    def num_files(self) -> int:
        """Open descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class Soak:
    """The clients, and what they saw."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.client = Client(f"http://127.0.0.1:{server.port}", {})
        self.random = random.Random(seed)
        self.seen: collections.Counter[tuple[str, int]] = collections.Counter()  # (kind, status)
        self.faults: list[str] = []
        self.expected: dict[str, str] = {}

    async def ask(self, kind: str, method: str, path: str, body: Any = None, *, pieces: int | None = None) -> bytes:
        """One request, counted. pieces: the client goes away after so many. Nothing: it went away."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        found, status = b"", 0
        stream = self.client.pieces(method, path, data)
        try:
            async with asyncio.timeout(PATIENCE):
                number = 0
                async for status, piece in stream:  # noqa: B007
                    found += piece
                    number += 1
                    if pieces is not None and number >= pieces:
                        break
        except TimeoutError:
            self.fault(f"{kind}: no answer in {PATIENCE:g} s")
        except (ConnectionError, EOFError) as error:
            status = 0  # not a whole answer
            if self.server.process.poll() is None:
                self.fault(f"{kind}: {type(error).__name__} {error}")
        finally:
            await stream.aclose()
        self.count(kind, status, found)
        return found if status == 200 else b""

    def count(self, kind: str, status: int, found: bytes) -> None:
        """A status, and whether it may be."""
        self.seen[kind, status] += 1
        if status >= 500 and status != 503:
            self.fault(f"{kind}: status {status}: {found[:300]!r}")

    def fault(self, what: str) -> None:
        """Keeps it."""
        self.faults.append(what)
        print(f"  fault: {what}", flush=True)

    def body(self) -> dict[str, Any]:
        """A completion of any kind."""
        draw = self.random
        shared = "The wise king asked his daughters a question. " * draw.choice([1, 8])
        prompt: Any = draw.choice([shared, ""]) + "".join(draw.choices("abcdefghij \n", k=draw.choice([1, 20, 300])))
        if draw.random() < 0.2:
            prompt = [draw.randrange(257) for _ in range(draw.choice([1, 64, 200]))]
        elif draw.random() < 0.1:
            prompt = [prompt, shared]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.choice([1, 8, 40])}
        for name, values in (("temperature", [0, 0.8]), ("top_k", [5]), ("seed", [1]), ("logprobs", [2]), ("n", [2, 3]),
                             ("stop", ["e", ["\n\n"]]), ("echo", [True]), ("logit_bias", [{"10": 3}]),
                             ("presence_penalty", [0.5])):  # fmt: skip
            if draw.random() < 0.25:
                body[name] = draw.choice(values)
        return body

    async def whole(self) -> None:
        """An answer at once."""
        body = self.body()
        if found := await self.ask("whole", "POST", "/v1/completions", body):
            choices = json.loads(found)["choices"]
            prompts = body["prompt"] if isinstance(body["prompt"], list) and isinstance(body["prompt"][0], str) else [0]
            if len(choices) != len(prompts) * body.get("n", 1) or any(c["finish_reason"] is None for c in choices):
                self.fault(f"whole: {found[:300]!r}")

    async def stream(self) -> None:
        """All events of a stream."""
        body = self.body() | {"stream": True, "stream_options": {"include_usage": True}}
        found = await self.ask("stream", "POST", "/v1/completions", body)
        if found and not found.endswith(b"data: [DONE]\n\n"):
            self.fault(f"stream: it ends with {found[-200:]!r}")

    async def leave(self) -> None:
        """A client that goes away in the middle."""
        body = self.body() | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        body.pop("stop", None)
        await self.ask("leave", "POST", "/v1/completions", body, pieces=self.random.choice([1, 3, 10]))

    async def leave_at_once(self) -> None:
        """A client that does not wait for the head."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        data = json.dumps(self.body()).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
        sent = (head + "content-type: application/json\r\n\r\n").encode() + data
        writer.write(sent[: self.random.choice([10, len(head) + 10, len(sent)])])
        await asyncio.sleep(self.random.choice([0, 0.01, 0.1]))
        writer.close()
        self.seen["leave_at_once", 0] += 1

    async def late(self) -> None:
        """A deadline."""
        body = {
            "prompt": "x" * 3_000,
            "max_tokens": 2_000,
            "ignore_eos": True,
            "timeout": self.random.choice([0.001, 0.2]),
        }
        found = await self.ask("late", "POST", "/v1/completions", body)
        if found and json.loads(found)["choices"][0]["finish_reason"] not in ("abort", "length"):
            self.fault(f"late: {found[:300]!r}")

    async def state(self) -> None:
        """States: made, gone on from, forked, saved, deleted, in any order, by many at once."""
        name, other = f"s{self.random.randrange(40)}", f"s{self.random.randrange(40)}"
        body = {"prompt": "Ada said", "max_tokens": 4}
        kind = self.random.randrange(6)
        if kind <= 1:
            await self.ask("state", "POST", "/v1/completions", body | {"save_state": name})
        elif kind == 2:
            await self.ask("state", "POST", "/v1/completions", body | {"state_id": name, "save_state": other})
        elif kind == 3:
            await self.ask("state", "POST", f"/v1/states/{name}/fork", {"to": other})
        elif kind == 4:
            await self.ask("state", "POST", f"/v1/states/{name}/{self.random.choice(['save', 'load'])}")
        else:
            await self.ask("state", "DELETE", f"/v1/states/{name}")

    async def known(self) -> None:
        """A state that was made at the start gives what it gave then."""
        name = self.random.choice(sorted(self.expected))
        await self.check_known(name)

    async def check_known(self, name: str) -> None:
        """One of them."""
        found = await self.ask(
            "known", "POST", "/v1/completions", {"state_id": name, "max_tokens": 12, "temperature": 0}
        )
        if found and json.loads(found)["choices"][0]["text"] != self.expected[name]:
            self.fault(f"known: {name} gives {found[:300]!r}, expected {self.expected[name]!r}")

    async def others(self) -> None:
        """Routes beside completions."""
        path, body = self.random.choice([
            ("/health", None), ("/metrics", None), ("/server_info", None), ("/v1/models", None),
            ("/openapi.json", None), ("/v1/states", None), ("/", None), ("/tokenize", {"prompt": "Ada said " * 50}),
            ("/detokenize", {"tokens": [65] * 99}),
        ])  # fmt: skip
        await self.ask("others", "POST" if body else "GET", path, body)

    async def wrong(self) -> None:
        """A body that is wrong."""
        path = self.random.choice(
            ["/v1/completions", "/v1/completions", "/tokenize", "/v1/states/a/fork", "/v1/chat/completions"]
        )
        body = self.random.choice(BODIES)
        if await self.ask("wrong", "POST", path, body) and path != "/tokenize":
            self.fault(f"wrong: {path} takes {body[:80]!r}")

    async def garbage(self) -> None:
        """Bytes that are no request, and requests that stop in the middle."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        sent = self.random.choice([*GARBAGE, self.random.randbytes(200), b"POST /v1/completions HTTP/1.1\r\nhost:"])
        try:
            writer.write(sent)
            async with asyncio.timeout(PATIENCE):
                found = await reader.read()
            words = found.split(b" ", 2)
            self.count("garbage", int(words[1]) if len(words) > 1 else 0, found)
        except TimeoutError:
            self.fault(f"garbage: no answer to {sent[:80]!r} in {PATIENCE:g} s")
        except ConnectionError:
            self.seen["garbage", 0] += 1
        finally:
            writer.close()

    async def client_loop(self, until: float) -> None:
        """One client after another, until the time is over."""
        kinds: list[tuple[Callable[[], Coroutine[Any, Any, None]], int]] = [
            (self.whole, 6), (self.stream, 6), (self.leave, 3), (self.leave_at_once, 2), (self.late, 2),
            (self.state, 6), (self.known, 3), (self.others, 3), (self.wrong, 4), (self.garbage, 2),
        ]  # fmt: skip
        names, weights = zip(*kinds, strict=True)
        while time.monotonic() < until and self.server.process.poll() is None:
            with contextlib.suppress(ConnectionError):  # of a server that was killed just now
                await self.random.choices(names, weights)[0]()

    async def load(self, seconds: float, clients: int) -> None:
        """So many clients."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client_loop(until) for _ in range(clients)))

    async def load_until_killed(self, clients: int) -> None:
        """So many clients, while the server is there."""
        await asyncio.gather(*(self.client_loop(math.inf) for _ in range(clients)))

    async def until_ready(self) -> None:
        """Waits for the model."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError, EOFError, ValueError):
                if self.server.process.poll() is None and await self.status("/health") == 200:
                    return
            if self.server.process.poll() is not None:
                break
            await asyncio.sleep(0.2)
        raise SystemExit("the server did not come up: " + self.server.log.read_text()[-2000:])

    async def status(self, path: str) -> int:
        """Of a GET."""
        status = 0
        async for status, _ in self.client.pieces("GET", path, None):  # noqa: B007
            pass
        return status

    async def until_idle(self) -> dict[str, Any]:
        """What the engine has when all clients are gone."""
        end = time.monotonic() + PATIENCE
        engine: dict[str, Any] = {}
        while time.monotonic() < end:
            engine = (await self.client.get("/server_info"))["engine"]
            if engine["running"] == 0 and engine["waiting_requests"] == 0:
                break
            await asyncio.sleep(0.1)
        return engine


class Batch:
    """`based batch`, killed at random and begun again."""

    def __init__(self, folder: Path, lines: int) -> None:
        self.input, self.output, self.lines = folder / "in.jsonl", folder / "out.jsonl", lines
        self.input.write_text("".join(
            json.dumps({"custom_id": str(i), "prompt": f"line {i}", "max_tokens": 20, "ignore_eos": True}) + "\n"
            for i in range(lines)
        ))  # fmt: skip
        self.num_killed = 0

    def start(self) -> subprocess.Popen[bytes]:
        """One run."""
        words = [
            sys.executable,
            "-m",
            "based",
            "batch",
            self.input,
            self.output,
            "--max-batch-size",
            4,
            "--no-stats",
            "-t",
            1,
        ]
        return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE)

    async def run(self, until: float, draw: random.Random) -> None:
        """Kills it until the time is over, then lets it end."""
        while True:
            process = self.start()
            try:
                stop = time.monotonic() + draw.uniform(3, 20)
                while process.poll() is None and time.monotonic() < min(stop, until):
                    await asyncio.sleep(0.1)
                if time.monotonic() >= until:
                    await asyncio.to_thread(process.wait)
                if process.poll() is not None:
                    if process.returncode != 0:
                        raise SystemExit(f"based batch: {process.communicate()[1].decode()}")
                    return
            finally:
                process.kill()
                process.communicate()
            self.num_killed += 1

    def missing_and_repeated(self) -> tuple[int, int]:
        """Lines without an answer, and answers too many."""
        answers = collections.Counter(json.loads(line)["custom_id"] for line in self.output.read_text().splitlines())
        return sum(str(i) not in answers for i in range(self.lines)), sum(n - 1 for n in answers.values())


async def soak(args: argparse.Namespace, folder: Path) -> None:
    """The run."""
    bars = Bars()
    server = Server(folder)
    clients = Soak(server, args.seed)
    batch = Batch(folder, int(15 * args.seconds))
    try:
        await clients.until_ready()
        for i in range(KNOWN):
            name = f"known{i}"
            await clients.ask(
                "known", "POST", "/v1/completions", {"prompt": f"{i} is", "max_tokens": 4, "save_state": name}
            )
            found = await clients.ask(
                "known", "POST", "/v1/completions", {"state_id": name, "max_tokens": 12, "temperature": 0}
            )
            clients.expected[name] = json.loads(found)["choices"][0]["text"]
            await clients.ask("known", "POST", f"/v1/states/{name}/save")
        num_files = server.num_files()

        killing = asyncio.create_task(batch.run(time.monotonic() + 0.8 * args.seconds, random.Random(args.seed)))
        memory = []
        num_rounds = max(3, min(30, int(args.seconds / 20)))  # each ends when all is answered
        for _ in range(num_rounds):
            await clients.load(0.9 * args.seconds / num_rounds, args.clients)
            engine = await clients.until_idle()
            memory.append(server.resident())
        bars.at_most("samples that still run, prompts that wait", engine["running"] + engine["waiting_requests"], 0)
        await asyncio.sleep(6)  # requests that never came whole are given up
        bars.at_most("descriptors more than at the start", server.num_files() - num_files, 4)
        print(f"  memory of the server, MiB, when it is idle: {' '.join(f'{m / 2**20:.1f}' for m in memory)}")
        third = num_rounds // 3
        growth = statistics.mean(memory[-third:]) / statistics.mean(memory[-2 * third : -third]) - 1
        bars.at_most("growth of memory, last third to the second", 100 * growth, 1, "%")
        await killing
        missing, repeated = batch.missing_and_repeated()
        print(f"  batch of {batch.lines} lines, killed {batch.num_killed} times")
        bars.at_most("lines that are missing or repeated", missing + repeated, 0)

        num_kills = 0
        end = time.monotonic() + 0.1 * args.seconds
        while time.monotonic() < end:
            under_load = asyncio.create_task(clients.load_until_killed(args.clients))
            await asyncio.sleep(clients.random.uniform(1, 4))
            server.kill()
            num_kills += 1
            await under_load
            server.again()
            await clients.until_ready()
            for name in clients.expected:
                await clients.check_known(name)
            listed = json.loads(await clients.ask("known", "GET", "/v1/states"))["data"]
            for each in listed:  # each is whole, or was never there
                if not await clients.ask(
                    "listed", "POST", "/v1/completions", {"state_id": each["id"], "max_tokens": 1}
                ):
                    clients.fault(f"listed: state {each['id']} cannot be gone on from")
        print(f"  server killed {num_kills} times")
        server.process.send_signal(signal.SIGTERM)
        bars.at_most("exit status behind SIGTERM", await asyncio.to_thread(server.process.wait, PATIENCE), 0)
    finally:
        server.kill()
    log = server.log.read_text()
    bars.at_most("tracebacks in the log", log.count("Traceback"), 0)
    kinds = sorted({kind for kind, _ in clients.seen})
    for kind in kinds:
        found = ", ".join(f"{n:,} × {s or 'no status'}" for (k, s), n in sorted(clients.seen.items()) if k == kind)
        print(f"  {kind}: {found}")
    print(f"  {sum(clients.seen.values()):,} requests in {args.seconds:g} s")
    bars.at_most("faults", len(clients.faults), 0)
    bars.end()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800, help="of load; what ends the rounds comes on top")
    parser.add_argument("--clients", type=int, default=24, help="at once")
    parser.add_argument("--seed", type=int, default=0, help="of what they ask")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(soak(args, Path(folder)))


if __name__ == "__main__":
    main()
