"""Measure a server of completions under load.

Arguments and report are those of `vllm bench serve`, so that figures can be compared. It measures any server that has
/v1/completions, over HTTP or HTTPS. Prompts are random token ids; with --dataset-name prefix_repetition many of them
begin with the same ones; with custom they are texts of a file. See docs/server.md.
"""

import argparse
import asyncio
import json
import math
import random
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from based.cli import UsageError, _common

_METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
_GOODPUT = ("ttft", "tpot", "e2el")
_LONGEST_LINE = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--base-url", metavar="URL", help="of the server (default: http://HOST:PORT)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=_common.positive, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--endpoint", default="/v1/completions", metavar="PATH", help="default: /v1/completions")
    parser.add_argument("-m", "--model", metavar="NAME", help="the model's name (default: the first of /v1/models)")
    parser.add_argument("--api-key", metavar="KEY", help="for the server")
    parser.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset-name", choices=("random", "prefix_repetition", "custom"), default="random", help="default: random"
    )
    group.add_argument(
        "--dataset-path", type=_common.path, metavar="FILE", help="of custom: lines of JSON objects with a prompt"
    )
    _common.add_counts(
        group,
        ("--num-prompts", 1000, "requests"),
        ("--random-input-len", 1024, "tokens of a prompt of random"),
        ("--random-output-len", 128, "tokens generated behind it"),
        ("--prefix-repetition-prefix-len", 256, "tokens that prompts share"),
        ("--prefix-repetition-suffix-len", 256, "tokens of its own that each prompt has behind them"),
        ("--prefix-repetition-num-prefixes", 10, "different beginnings"),
        ("--prefix-repetition-output-len", 128, "tokens generated behind a prompt"),
        ("--custom-output-len", 256, "tokens generated behind a prompt of custom"),
    )
    group.add_argument(
        "--random-prefix-len", type=_common.not_negative, default=0, metavar="N", help="tokens before it that all share"
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths are uniform in [L(1-R), L(1+R)], 0 ≤ R < 1 (default: 0)",
    )
    group.add_argument(
        "--vocab-size", type=_common.positive, metavar="N", help="of random ids (default: as the server says)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)")

    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="R",
        help="requests a second (default: inf: all at once)",
    )
    group.add_argument(
        "--burstiness",
        type=_common.seconds,
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of the times between arrivals; 1: a Poisson process (default: 1)",
    )
    group.add_argument("--max-concurrency", type=_common.positive, metavar="N", help="requests at once (default: any)")
    group.add_argument(
        "--num-warmups", type=_common.not_negative, default=0, metavar="N", help="requests before, that do not count"
    )
    group.add_argument("--no-stream", action="store_true", help="whole answers: end-to-end latency alone is measured")

    group = parser.add_argument_group("sampling")
    group.add_argument("--ignore-eos", action="store_true", help="generate all the tokens that are asked for")
    group.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    group.add_argument("--top-p", type=float, metavar="P", help="default: the server's")
    group.add_argument("--logprobs", type=_common.not_negative, metavar="N", help="ask for log-probabilities")
    group.add_argument(
        "--extra-body", type=_object, default={}, metavar="JSON", help="more fields of each request, a JSON object"
    )

    group = parser.add_argument_group("report")
    group.add_argument(
        "--percentile-metrics",
        type=_metrics,
        default=["ttft", "tpot", "itl"],
        metavar="NAME,…",
        help="of ttft, tpot, itl, e2el (default: ttft,tpot,itl)",
    )
    group.add_argument("--metric-percentiles", type=_percentiles, default=[99.0], metavar="P,…", help="default: 99")
    group.add_argument(
        "--goodput",
        nargs="+",
        action="extend",
        type=_goal,
        default=[],
        metavar="NAME:MS",
        help="also count the requests that keep within these milliseconds, of ttft, tpot, e2el",
    )
    group.add_argument("--save-result", action="store_true", help="write the figures to a JSON file, too")
    group.add_argument("--save-detailed", action="store_true", help="and those of each request")
    group.add_argument(
        "--result-dir", type=_common.path, default=Path(), metavar="DIR", help="of that file (default: .)"
    )
    group.add_argument("--result-filename", metavar="NAME", help="default: made of rate, model and time")
    group.add_argument("--json", action="store_true", help="the figures as JSON on stdout, instead of the table")
    _common.add_statistics_argument(parser)


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number > 0")
    return value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


_object.__name__ = "JSON object"  # in argparse's message


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    values = [float(word) for word in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: expected numbers in 0 … 100")
    return values


def _goal(text: str) -> tuple[str, float]:
    name, colon, value = text.partition(":")
    if not colon or name not in _GOODPUT:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME:MILLISECONDS, of {', '.join(_GOODPUT)}")
    return name, _common.seconds(value)


# ---- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Prompt:
    """What one request asks for."""

    prompt: str | list[int]
    output_tokens: int


def make_prompts(args: argparse.Namespace, vocab_size: int | None) -> list[Prompt]:
    """The requests of a run. Raises UsageError, OSError, ValueError."""
    draw = random.Random(args.seed)
    if args.dataset_name == "custom":
        return _custom(args)
    if vocab_size is None:
        raise UsageError("the server does not say how many tokens its vocabulary has: give --vocab-size")

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    if args.dataset_name == "prefix_repetition":
        prefixes = [tokens(args.prefix_repetition_prefix_len) for _ in range(args.prefix_repetition_num_prefixes)]
        own, new = args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
        prompts = [Prompt(prefixes[i % len(prefixes)] + tokens(own), new) for i in range(args.num_prompts)]
        draw.shuffle(prompts)
        return prompts
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio {args.random_range_ratio}: expected 0 ≤ R < 1")
    prefix = tokens(args.random_prefix_len)

    def length(mean: int) -> int:
        ratio = args.random_range_ratio
        return draw.randint(max(math.floor(mean * (1 - ratio)), 1), math.ceil(mean * (1 + ratio)))

    return [
        Prompt(prefix + tokens(length(args.random_input_len)), length(args.random_output_len))
        for _ in range(args.num_prompts)
    ]


def _custom(args: argparse.Namespace) -> list[Prompt]:
    if args.dataset_path is None:
        raise UsageError("--dataset-name custom needs --dataset-path")
    texts = []
    for number, line in enumerate(args.dataset_path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            value = json.loads(line)
            if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
                raise ValueError(f"{args.dataset_path}:{number}: expected an object with a text `prompt`")
            texts.append(value["prompt"])
    if not texts:
        raise ValueError(f"{args.dataset_path}: no prompts")
    return [Prompt(texts[i % len(texts)], args.custom_output_len) for i in range(args.num_prompts)]


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """One request, in seconds."""

    begin: float = 0.0
    end: float = 0.0
    first: float | None = None
    between: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    def value(self, name: str) -> float | None:
        """Of ttft, tpot, e2el; None where it has none."""
        if name == "e2el":
            return self.end - self.begin
        if self.first is None:
            return None
        if name == "ttft":
            return self.first - self.begin
        return (self.end - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Client:
    """HTTP/1.1 over asyncio's streams, a connection for each request: little work, so that a server is measured."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """Raises UsageError for what is no URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no URL of a server, such as http://127.0.0.1:8000")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"host": parts.netloc, "connection": "close", **headers}

    async def pieces(self, method: str, path: str, body: bytes | None) -> AsyncIterator[tuple[int, bytes]]:
        """(status, piece of the body) as they come. Raises OSError, EOFError, ValueError."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=_LONGEST_LINE)
        try:
            headers = dict(self._headers)
            if body is not None:
                headers |= {"content-type": "application/json", "content-length": str(len(body))}
            lines = [f"{method} {self._path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + (body or b""))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split(" ")[1])
            fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head)}
            if fields.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
                    yield status, (await reader.readexactly(size + 2))[:-2]
            elif "content-length" in fields:
                yield status, await reader.readexactly(int(fields["content-length"]))
            else:
                yield status, await reader.read()
        finally:
            writer.close()

    async def get(self, path: str) -> Any:
        """A JSON answer, or None when there is none. Raises OSError."""
        data, status = b"", 0
        async for status, piece in self.pieces("GET", path, None):  # noqa: B007
            data += piece
        return json.loads(data) if status == 200 else None

    async def complete(self, path: str, data: bytes, *, is_stream: bool) -> Measured:
        """One completion. What goes wrong is in its result."""
        found = Measured(begin=time.perf_counter())
        try:
            rest, last, status = b"", found.begin, 0
            async for status, piece in self.pieces("POST", path, data):
                now = time.perf_counter()
                rest += piece
                if status != 200 or not is_stream:
                    continue
                *events, rest = rest.split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: ") and event != b"data: [DONE]":
                        last = self._read_event(json.loads(event[6:]), found, now, last)
            found.end = time.perf_counter()
            if status != 200:
                raise ValueError(f"status {status}: {rest[:300].decode(errors='replace')}")
            if not is_stream:
                self._read_usage(json.loads(rest).get("usage"), found)
            elif found.first is None:
                raise ValueError("the stream had no tokens")
            else:
                found.end = last
        except EOFError:
            found.error = "the server closed the connection before its answer was whole"
        except (OSError, ValueError, asyncio.LimitOverrunError) as error:
            found.error = str(error) or type(error).__name__
        if found.error is not None:
            found.end = time.perf_counter()
        return found

    def _read_event(self, event: dict[str, Any], found: Measured, now: float, last: float) -> float:
        if "error" in event:
            raise ValueError(f"in the stream: {event['error']}")
        self._read_usage(event.get("usage"), found)
        if not event.get("choices"):
            return last
        if found.first is None:
            found.first = now
        else:
            found.between.append(now - last)
        found.arrivals.append(now)
        return now

    def _read_usage(self, usage: dict[str, Any] | None, found: Measured) -> None:
        if usage:
            found.prompt_tokens = usage.get("prompt_tokens", 0)
            found.output_tokens = usage.get("completion_tokens", 0)
            found.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


# ---- a run -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    headers = {}
    for header in args.header:
        name, equals, value = header.partition("=")
        if not equals or not name or "\n" in header or "\r" in header:
            raise UsageError(f"--header {header!r}: expected NAME=VALUE")
        headers[name] = value
    if args.api_key is not None:
        headers["authorization"] = f"Bearer {args.api_key}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    client = Client(args.base_url or f"http://{host}:{args.port}", headers)
    result, measured = asyncio.run(_run(args, client))
    failed = [each for each in measured if each.error is not None]
    for error in sorted({each.error for each in failed if each.error is not None})[:5]:
        print(f"based: warning: a request failed: {error}", file=sys.stderr)
    if args.save_result or args.save_detailed:
        _save(args, result, measured)
    if args.json:
        print(_common.to_json(result))
    else:
        print("\n".join(table(args, result)))
    if len(failed) == len(measured):
        raise RuntimeError("every request failed")


async def _run(args: argparse.Namespace, client: Client) -> tuple[dict[str, Any], list[Measured]]:
    model = args.model
    if model is None:
        models = await client.get("/v1/models")
        if not models or not models.get("data"):
            raise ValueError("the server names no model at /v1/models: give --model")
        model = models["data"][0]["id"]
    vocab_size = args.vocab_size
    if vocab_size is None and args.dataset_name != "custom":
        info = await client.get("/server_info")
        vocab_size = info["model"]["vocab_size"] if info and "model" in info else None
    prompts = make_prompts(args, vocab_size)
    bodies = [json.dumps(_body(args, model, prompt)).encode() for prompt in prompts]  # before the clock runs
    complete = partial(client.complete, args.endpoint, is_stream=not args.no_stream)
    for index in range(args.num_warmups):
        done = await complete(bodies[index % len(bodies)])
        if done.error is not None:
            raise RuntimeError(f"the first request failed: {done.error}")
    slots = asyncio.Semaphore(args.max_concurrency or len(bodies))
    bar = None
    if _common.wants_statistics(args):
        from tqdm import tqdm

        bar = tqdm(total=len(bodies), unit=" requests", file=sys.stderr)

    async def one(body: bytes) -> Measured:
        async with slots:
            done = await complete(body)
        if bar is not None:
            bar.update()
        return done

    begin = time.perf_counter()
    tasks = []
    for body, pause in zip(bodies, _pauses(args), strict=False):
        if pause:
            await asyncio.sleep(max(begin + pause - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(body)))
    measured = list(await asyncio.gather(*tasks))
    seconds = time.perf_counter() - begin
    if bar is not None:
        bar.close()
    return summarize(args, model, measured, seconds), measured


def _body(args: argparse.Namespace, model: str, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt.prompt,
        "max_tokens": prompt.output_tokens,
        "stream": not args.no_stream,
    }
    if not args.no_stream:
        body["stream_options"] = {"include_usage": True}
    for name in ("temperature", "top_p", "logprobs"):
        if getattr(args, name) is not None:
            body[name] = getattr(args, name)
    if args.ignore_eos:
        body["ignore_eos"] = True
    body |= args.extra_body
    return body


def _pauses(args: argparse.Namespace) -> Iterator[float]:
    """When each request is sent, in seconds from the beginning."""
    draw = random.Random(args.seed + 1)
    now = 0.0
    while True:
        yield now
        if math.isfinite(args.request_rate):
            now += draw.gammavariate(args.burstiness, 1 / (args.request_rate * args.burstiness))


def summarize(args: argparse.Namespace, model: str, measured: list[Measured], seconds: float) -> dict[str, Any]:
    """The figures, under the names of vLLM's result file; times in milliseconds."""
    good = [each for each in measured if each.error is None]
    prompt_tokens = sum(each.prompt_tokens for each in good)
    output_tokens = sum(each.output_tokens for each in good)
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "model_id": model,
        "dataset_name": args.dataset_name,
        "num_prompts": len(measured),
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "duration": seconds,
        "completed": len(good),
        "failed": len(measured) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_cached_tokens": sum(each.cached_tokens for each in good),
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / seconds,
        "request_goodput": None,
        "output_throughput": output_tokens / seconds,
        "total_token_throughput": (prompt_tokens + output_tokens) / seconds,
        "max_output_tokens_per_s": _peak([at for each in good for at in each.arrivals]),
        "max_concurrent_requests": _most_at_once(good),
    }
    if args.goodput:
        kept = sum(
            all((value := each.value(name)) is not None and value * 1e3 <= most for name, most in args.goodput)
            for each in good
        )
        result["request_goodput"] = kept / seconds
    for name in _METRICS:
        values = [gap for each in good for gap in each.between] if name == "itl" else [
            value for each in good if (value := each.value(name)) is not None
        ]  # fmt: skip
        values = sorted(value * 1e3 for value in values)
        result |= {f"mean_{name}_ms": sum(values) / len(values) if values else None}
        result |= {f"median_{name}_ms": percentile(values, 50), f"std_{name}_ms": _deviation(values)}
        result |= {f"p{p:g}_{name}_ms": percentile(values, p) for p in args.metric_percentiles}
    return result


def percentile(values: list[float], p: float) -> float | None:
    """Of sorted values, between the two next ones (NumPy's default)."""
    if not values:
        return None
    position = (len(values) - 1) * p / 100
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def _deviation(values: list[float]) -> float | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _peak(arrivals: list[float]) -> int:
    """The most events in a second."""
    counts: dict[int, int] = {}
    for at in arrivals:
        counts[math.floor(at)] = counts.get(math.floor(at), 0) + 1
    return max(counts.values(), default=0)


def _most_at_once(measured: list[Measured]) -> int:
    changes = sorted([(each.begin, 1) for each in measured] + [(each.end, -1) for each in measured])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def table(args: argparse.Namespace, result: dict[str, Any]) -> Iterator[str]:
    """The lines of vLLM's report."""

    def line(name: str, value: float | None) -> str:
        shown = "" if value is None else f"{value:<10}" if isinstance(value, int) else f"{value:<10.2f}"
        return f"{name + ':':<40} {shown}".rstrip()

    yield f"{' Serving Benchmark Result ':=^50}"
    yield line("Successful requests", result["completed"])
    yield line("Failed requests", result["failed"])
    if args.max_concurrency is not None:
        yield line("Maximum request concurrency", args.max_concurrency)
    if math.isfinite(args.request_rate):
        yield line("Request rate configured (RPS)", args.request_rate)
    yield line("Benchmark duration (s)", result["duration"])
    yield line("Total input tokens", result["total_input_tokens"])
    yield line("Cached input tokens", result["total_cached_tokens"])
    yield line("Total generated tokens", result["total_output_tokens"])
    yield line("Request throughput (req/s)", result["request_throughput"])
    if result["request_goodput"] is not None:
        yield line("Request goodput (req/s)", result["request_goodput"])
    yield line("Output token throughput (tok/s)", result["output_throughput"])
    yield line("Peak output token throughput (tok/s)", result["max_output_tokens_per_s"])
    yield line("Peak concurrent requests", result["max_concurrent_requests"])
    yield line("Total token throughput (tok/s)", result["total_token_throughput"])
    for name in ["e2el"] if args.no_stream else args.percentile_metrics:
        title, short = _METRICS[name]
        yield f"{title:-^50}"
        yield line(f"Mean {short} (ms)", result[f"mean_{name}_ms"])
        yield line(f"Median {short} (ms)", result[f"median_{name}_ms"])
        for p in args.metric_percentiles:
            yield line(f"P{p:g} {short} (ms)", result[f"p{p:g}_{name}_ms"])
    yield "=" * 50


def _save(args: argparse.Namespace, result: dict[str, Any], measured: list[Measured]) -> None:
    name = args.result_filename
    if name is None:
        model = "".join(c if c.isalnum() or c in "-_." else "-" for c in result["model_id"])
        name = f"based-{result['request_rate']}qps-{model}-{result['date']}.json"
    details: dict[str, Any] = {}
    if args.save_detailed:
        details = {
            "input_lens": [each.prompt_tokens for each in measured],
            "output_lens": [each.output_tokens for each in measured],
            "ttfts": [each.value("ttft") for each in measured],
            "itls": [each.between for each in measured],
            "start_times": [each.begin for each in measured],
            "errors": [each.error for each in measured],
        }
    args.result_dir.mkdir(parents=True, exist_ok=True)
    (args.result_dir / name).write_text(json.dumps(result | details, indent=1) + "\n")
