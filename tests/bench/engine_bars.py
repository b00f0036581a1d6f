"""The engine against its bars: callers at once, a short prompt beside a long one, shared prefixes, an event loop.

    python tests/bench/engine_bars.py                              # 360M, CPU, about 4 minutes on 2 cores
    python tests/bench/engine_bars.py --size 1.3b --device cuda    # adds 256 requests at once, 1,024 tokens in, 256 out

Random weights. Alone on the machine: two callers are compared by the clock.
"""

import argparse
import asyncio
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import based
import numpy as np
from bars import Bars
from based._engine import EngineRequest
from based.cli import _claim
from based.sizes import named_config

RANDOM = np.random.default_rng(0)


def prompt(length: int) -> np.ndarray:
    """Token ids of any vocabulary here."""
    return RANDOM.integers(50257, size=length)


def greedy(max_tokens: int) -> based.SamplingParams:
    """All tokens, whatever they are."""
    return based.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def together(calls: list[Callable[[], object]]) -> float:
    """Seconds until all have ended, each in a thread of its own."""
    threads = [threading.Thread(target=call) for call in calls]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return seconds(run)


def streams(model: based.Model, bars: Bars) -> None:
    """Eight threads that stream, against one call with eight prompts."""
    prompts, params = [prompt(16) for _ in range(8)], greedy(64)
    model.generate(prompts, greedy(2))
    ratios = []
    for _ in range(5):
        one = seconds(lambda: model.generate(prompts, params))
        ratios.append(one / together([lambda p=p: list(model.stream(p, params)) for p in prompts]))
    bars.at_least("8 streams, of one call of 8 (median of 5)", statistics.median(ratios), 0.95)


def first_token(engine: based.Engine, tokens: np.ndarray) -> float:
    """Seconds until the first of two tokens."""
    request = engine.submit(tokens, greedy(2))
    took = seconds(lambda: next(iter(request)))
    request.result()
    return took


def beside_a_long_one(model: based.Model, bars: Bars) -> None:
    """First token of 5 tokens, alone and while 60,000 are read."""
    with model.engine(max_batch_size=4, cache_bytes=0) as engine:
        first_token(engine, prompt(5))
        alone = statistics.median(first_token(engine, prompt(5)) for _ in range(9))
        beside = []
        for _ in range(9):
            long = engine.submit(prompt(60_000), greedy(1))
            time.sleep(alone)
            beside.append(first_token(engine, prompt(5)))
            if long.ended:
                raise SystemExit("the long prompt was read before the short one: nothing was measured")
            long.cancel()
            long.result()
    print(f"  5 tokens alone: {1e3 * alone:.0f} ms; beside 60,000: {', '.join(f'{1e3 * b:.0f}' for b in beside)} ms")
    bars.at_most("first token of 5 beside 60,000, of alone (median)", statistics.median(beside) / alone, 3)


def event_loop(model: based.Model, bars: Bars) -> None:
    """How long astream keeps an event loop from its other tasks: four streams, one with a text of 104,000 tokens."""
    text = based.load(device=model.device)

    async def worst() -> float:
        longest, done = 0.0, False

        async def others() -> None:
            nonlocal longest
            while not done:
                start = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - start - 0.001)

        async def read(m: based.Model, p: "np.ndarray | str") -> None:
            async for _ in m.astream(p, greedy(24)):
                pass

        ticker = asyncio.create_task(others())
        await asyncio.sleep(0.01)
        long = asyncio.create_task(read(text, "All's well. " * 8_000))
        await asyncio.gather(*(read(model, prompt(16)) for _ in range(3)))
        await asyncio.sleep(5)  # for the text to become tokens
        long.cancel()
        await asyncio.wait([long])
        done = True
        await ticker
        return longest

    bars.at_most("astream keeps the event loop", 1e3 * asyncio.run(worst()), 20, "ms")


def shared_prefix(model: based.Model, bars: Bars, count: int) -> None:
    """Requests that begin alike: tokens not computed, of all that could be; first token of a hit, of its suffix."""
    for shared, own in ((1600, 600), (1500, 700)):
        with model.engine(max_batch_size=8) as engine:
            prefix = prompt(shared)
            requests = [engine.submit(np.concatenate([prefix, prompt(own)]), greedy(2)) for _ in range(count)]
            for request in requests:
                request.result()
            rate = engine.stats().cached_tokens / ((count - 1) * shared)
            bars.at_least(f"cached of possible, {count} × ({shared:,} shared + {own})", rate, 0.97)
            hits = [first_token(engine, np.concatenate([prefix, prompt(own)])) for _ in range(5)]
            alone = [first_token(engine, prompt(own)) for _ in range(5)]
            ratio = statistics.median(hits) / statistics.median(alone)
            bars.at_most(f"first token of a hit, of {own} tokens alone", ratio, 1.2)


def conversation(model: based.Model, bars: Bars, length: int) -> None:
    """Turns of a conversation: what is computed of each, of what it adds."""
    with model.engine(max_batch_size=2) as engine:
        tokens = prompt(length // 10)
        worst = 0.0
        for turn in range(10):
            request = engine.submit(tokens, greedy(16))
            answer = request.result().outputs[0].token_ids
            new = length // 10 + (16 if turn else 0)
            worst = max(worst, (len(tokens) - request.num_cached_tokens) / new)
            tokens = np.concatenate([tokens, answer, prompt(length // 10)])
    bars.at_most(f"computed of new tokens, {length:,} in 10 turns (worst)", worst, 1 + 64 / (length // 10))


class EventTimes:
    """When each token of each request was there, by the engine's clock: threads that read would wait for each other."""

    def __enter__(self) -> "EventTimes":
        self.by_request: dict[int, list[float]] = {}
        self._add = EngineRequest._add

        def add(request: EngineRequest, event: tuple[Any, ...]) -> None:
            self.by_request.setdefault(id(request), []).append(event[10])
            self._kept.append(request)  # so that no other gets its id
            self._add(request, event)

        self._kept: list[EngineRequest] = []
        EngineRequest._add = add  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        EngineRequest._add = self._add  # type: ignore[method-assign]


def random_model(size: str, device: str) -> based.Model:
    """In the dtype that is measured there."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    return based.Model.random(named_config(size), 0, device=device, dtype=dtype)


def generator_seconds(model: based.Model, size: str, count: int, length: int, new: int) -> float:
    """Of a Generator with all prompts at the beginning, as `based bench` measures it."""
    figures = _claim.measure(model._core, size, count, length, new)
    reads, writes = figures.prompt_tokens_per_second, figures.tokens_per_second
    print(f"  generator: {reads:,.0f} tok/s of prompts, {writes:,.0f} new")
    return count * length / reads + count * (new - 1) / writes


def many_at_once(model: based.Model, bars: Bars, size: str, count: int) -> None:
    """Requests of 1,024 tokens in and 256 out, against `based bench` at that batch; gaps while prompts arrive."""
    length, new = 1024, 256
    expected = generator_seconds(model, size, count, length, new)
    with model.engine(max_batch_size=count, cache_bytes=0) as engine:
        ratios = []
        for _ in range(3):
            prompts = [prompt(length) for _ in range(count)]
            took = together([lambda p=p: list(engine.submit(p, greedy(new))) for p in prompts])
            ratios.append(expected / took)
            budget = engine.stats().step_budget
            print(f"  {count} at once: {took:.2f} s, {count * new / took:,.0f} tok/s; steps of {budget} tokens")
        bars.at_least(f"{count} requests at once, of the generator", max(ratios), 0.85)

        def client(i: int) -> None:
            time.sleep(0.02 * i)
            for _ in range(3):
                engine.submit(prompts[i], greedy(new)).result()

        with EventTimes() as times:
            together([lambda i=i: client(i) for i in range(min(count, 64))])
        gaps = sorted(b - a for each in times.by_request.values() for a, b in itertools.pairwise(each))
        p99, median = gaps[len(gaps) * 99 // 100], statistics.median(gaps)
        print(
            f"  gaps while prompts arrive: median {1e3 * median:.2f}, p99 {1e3 * p99:.2f}, max {1e3 * gaps[-1]:.1f} ms"
        )
        bars.at_most("p99 of gaps while prompts arrive, of median", p99 / median, 3)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="360m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, help="of a shared prefix (by default 8 on a CPU, 64 on a GPU)")
    parser.add_argument("--parts", default="streams,long,loop,prefix,turns,many", help="by commas")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    parts = arguments.parts.split(",")
    model = random_model(arguments.size, arguments.device)
    bars = Bars()
    if "streams" in parts:
        streams(model, bars)
    if "long" in parts:
        beside_a_long_one(model, bars)
    if "loop" in parts:
        event_loop(model, bars)
    if "prefix" in parts:
        shared_prefix(model, bars, arguments.requests or (64 if on_gpu else 8))
    if "turns" in parts:
        conversation(model, bars, 40_000 if on_gpu else 4_000)
    if "many" in parts and on_gpu:
        many_at_once(model, bars, arguments.size, 256)
    bars.end()


if __name__ == "__main__":
    main()
