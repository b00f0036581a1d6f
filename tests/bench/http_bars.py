"""A server against its bars over HTTP: many requests at once, and gaps between tokens while requests arrive.

    python tests/bench/http_bars.py --device cuda                                    # 1.3b, 256 requests, two minutes
    python tests/bench/http_bars.py --size tiny --requests 8 --length 64 --new 32    # tries the program on a CPU

Random weights, token ids, streams. The server and each program of clients are processes of their own, on one machine:
alone on it, with a core for each.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

import based
from bars import Bars
from based.cli._bench_serve import Client
from based.sizes import named_config
from engine_bars import generator_seconds, random_model

SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients of one program ask."""

    count: int
    length: int
    """Tokens of a prompt."""
    new: int
    rate: float | None = None
    """Requests a second, at random times; None: all at once."""


@dataclass(frozen=True, slots=True)
class Found:
    """What they met, in seconds of one clock for all processes."""

    begin: float
    end: float
    gaps: list[float]


def serve(size: str, device: str, batch: int, told: Any) -> None:
    """A server in a process of its own; tells its address when it takes requests, or why it does not."""
    from based.server import _run
    from based.server._options import Options

    address: list[str] = []

    def load() -> tuple[based.Model, based.Engine]:
        model = random_model(size, device)
        return model, model.engine(max_batch_size=batch, cache_bytes=0)

    try:
        _run.serve(
            load,
            Options(model_name="random", port=0, log_requests=False),
            when_listening=address.append,
            when_loaded=lambda: told.put(address[0]),
        )
    except Exception as error:
        told.put(error)


def ask(url: str, load: Load, seed: int, vocab_size: int, barrier: Any, found: Any) -> None:
    """A program of clients: it begins with the others."""
    drawn = random.Random(seed)
    fixed = {"model": "random", "max_tokens": load.new, "stream": True, "ignore_eos": True, "temperature": 0}
    bodies = [
        json.dumps(fixed | {"prompt": [drawn.randrange(vocab_size) for _ in range(load.length)]}).encode()
        for _ in range(load.count)
    ]
    client = Client(url, {})

    async def run() -> Any:
        tasks, begin, at = [], time.perf_counter(), 0.0
        for body in bodies:
            if load.rate is not None:
                await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
                at += drawn.expovariate(load.rate)
            tasks.append(asyncio.create_task(client.complete("/v1/completions", body, is_stream=True)))
        return await asyncio.gather(*tasks)

    barrier.wait()
    measured = asyncio.run(run())
    errors = [each.error for each in measured if each.error is not None]
    gaps = [gap for each in measured for gap in each.between]
    found.put(errors or Found(min(each.begin for each in measured), max(each.end for each in measured), gaps))


def together(url: str, num_programs: int, load: Load, seed: int, vocab_size: int) -> Found:
    """What several programs find that share a load."""
    part = Load(load.count // num_programs, load.length, load.new, load.rate and load.rate / num_programs)
    barrier, results = SPAWN.Barrier(num_programs), SPAWN.Queue()
    programs = [
        SPAWN.Process(target=ask, args=(url, part, seed * 100 + i, vocab_size, barrier, results))
        for i in range(num_programs)
    ]
    for program in programs:
        program.start()
    found = [results.get(timeout=600) for _ in programs]
    for program in programs:
        program.join()
    if failed := [each for each in found if not isinstance(each, Found)]:
        raise SystemExit(f"requests failed: {failed[0][:3]}")
    gaps = [gap for each in found for gap in each.gaps]
    return Found(min(each.begin for each in found), max(each.end for each in found), gaps)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=256, help="at once, and sequences of the server")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens behind it")
    parser.add_argument("--rate", type=float, default=40, help="requests a second that arrive")
    parser.add_argument("--programs", type=int, default=4, help="of clients")
    arguments = parser.parse_args()
    at_once = Load(arguments.requests, arguments.length, arguments.new)
    arriving = Load(arguments.requests, arguments.length, arguments.new, arguments.rate)
    model = random_model(arguments.size, arguments.device)
    expected = generator_seconds(model, arguments.size, at_once.count, at_once.length, at_once.new)
    del model  # the server takes its memory
    vocab_size = named_config(arguments.size).vocab_size
    told = SPAWN.Queue()
    server = SPAWN.Process(target=serve, args=(arguments.size, arguments.device, arguments.requests, told))
    server.start()
    try:
        url = told.get(timeout=600)
        if isinstance(url, Exception):
            raise SystemExit(f"the server did not begin: {url}")
        bars = Bars()
        ratios: dict[int, list[float]] = {}
        for programs in (1, arguments.programs):  # the first run is the process's first one, too
            for seed in range(5 if programs == 1 else 4):
                found = together(url, programs, at_once, seed, vocab_size)
                seconds = found.end - found.begin
                ratios.setdefault(programs, []).append(expected / seconds)
                print(f"  {at_once.count} at once, {programs} programs of clients: {seconds:.2f} s", flush=True)
        for programs, each in ratios.items():
            name = f"{at_once.count} at once, {programs} programs, of the generator (median)"
            bars.at_least(name, statistics.median(each[1:] if programs == 1 else each), 0.85)
        parts = []
        for seed in range(10, 14):
            gaps = sorted(together(url, 1, arriving, seed, vocab_size).gaps)
            median, p99 = statistics.median(gaps), gaps[len(gaps) * 99 // 100]
            parts.append(p99 / max(median, 1e-9))
            print(
                f"  {arriving.rate:g} requests a second: median {1e3 * median:.2f}, p99 {1e3 * p99:.2f} ms", flush=True
            )
        bars.at_most("p99 of gaps while requests arrive, of median (median)", statistics.median(parts[1:]), 3)
    finally:
        if server.pid is not None and server.is_alive():
            os.kill(server.pid, signal.SIGTERM)
        server.join(60)
    bars.end()


if __name__ == "__main__":
    main()
