"""Counts and times of the server, in the names that dashboards of vLLM read."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _SECONDS),
    "inter_token_latency_seconds": (
        "From a token to the next one of its sample. Where tokens are not streamed: the mean, once for each token.",
        _SECONDS,
    ),
    "request_time_per_output_token_seconds": ("Mean time of a token behind the first, of each request.", _SECONDS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _SECONDS),
    "request_queue_time_seconds": ("From a request's arrival to its first step.", _SECONDS),
    "request_prefill_time_seconds": ("From a request's first step to its first token.", _SECONDS),
    "request_decode_time_seconds": ("From a request's first token to its end.", _SECONDS),
    "request_inference_time_seconds": ("From a request's first step to its end.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a prompt, all samples.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Tokens of a prompt that were computed: not taken from a state.", _TOKENS),
}
"""Name, help and buckets."""

FINISHED = ("stop", "length", "error", "abort")


class Histogram:
    """Counts of values by bucket. One thread adds; another may read at the same time, and then miss the last value."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts a value, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Buckets as Prometheus wants them (bound, values up to it), and the sum of all values."""
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound is None else repr(bound), float(total)))
        return buckets, self._sum


class Metrics:
    """All of them. Requests are counted on the event loop; engine and states are asked when /metrics is."""

    def __init__(
        self,
        prefix: str,
        model_name: str,
        gauges: Callable[[], dict[str, tuple[str, str, Any]]],
        *,
        of_requests: bool = True,
    ) -> None:
        """What there is to tell.

        Args:
            prefix: Of the names.
            model_name: A label.
            gauges: Name → ("gauge" or "counter", help, value or {labels: value}), asked whenever metrics are read.
            of_requests: Whether this process runs completions, and has times of them.
        """
        from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

        self._prefix = prefix
        self._model_name = model_name
        self._gauges = gauges
        self._of_requests = of_requests
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.finished = dict.fromkeys(FINISHED, 0)
        self.responses: dict[tuple[str, str], int] = {}
        """Answers by route and status."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def text(self) -> bytes:
        """The page for Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def describe(self) -> list[Any]:
        """Nothing: names are known when they are collected."""
        return []

    def collect(self) -> Iterator[Any]:
        """The families, for prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        model = [self._model_name]
        if self._of_requests:
            yield from self._collect_requests()
        counter = CounterMetricFamily(
            f"{self._prefix}:http_responses", "Answers, by route and status.", labels=["route", "status"]
        )
        for labels, count in sorted(self.responses.items()):
            counter.add_metric(list(labels), count)
        yield counter
        for name, (kind, text, value) in self._gauges().items():
            by_label: dict[tuple[tuple[str, str], ...], float] = value if isinstance(value, dict) else {(): value}
            keys = ["model_name", *(key for key, _ in next(iter(by_label)))]
            make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            gauge = make(f"{self._prefix}:{name.removesuffix('_total')}", text, labels=keys)
            for by, number in by_label.items():
                gauge.add_metric([*model, *(label for _, label in by)], number)
            yield gauge

    def _collect_requests(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        model = [self._model_name]
        for name, (text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"])
            buckets, total = self.histograms[name].cumulative()
            family.add_metric(model, buckets, total)
            yield family
        counter = CounterMetricFamily(
            f"{self._prefix}:request_success",
            "Samples that ended, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in self.finished.items():
            counter.add_metric([*model, reason], count)
        yield counter

    def count_response(self, route: str, status: int) -> None:
        """Counts an answer."""
        key = route, str(status)
        self.responses[key] = self.responses.get(key, 0) + 1

    def count_request(self, times: Any, num_prompt_tokens: int, num_cached_tokens: int, num_tokens: list[int]) -> None:
        """Counts an ended request.

        times: The engine's, `Request.times`. num_tokens: Generated ones, of each sample.
        """
        add = {name: histogram.add for name, histogram in self.histograms.items()}
        generated = sum(num_tokens)
        add["request_prompt_tokens"](num_prompt_tokens)
        add["request_generation_tokens"](generated)
        add["request_prefill_kv_computed_tokens"](num_prompt_tokens - num_cached_tokens)
        arrival, scheduled, first, end = times.arrival, times.scheduled, times.first_token, times.end
        if end is None:
            return
        add["e2e_request_latency_seconds"](end - arrival)
        if scheduled is None:
            return
        add["request_queue_time_seconds"](scheduled - arrival)
        add["request_inference_time_seconds"](end - scheduled)
        if first is None:
            return
        add["time_to_first_token_seconds"](first - arrival)
        add["request_prefill_time_seconds"](first - scheduled)
        add["request_decode_time_seconds"](end - first)
        if (longest := max(num_tokens, default=0)) > 1:
            add["request_time_per_output_token_seconds"]((end - first) / (longest - 1))

    def count_tokens_not_streamed(self, seconds: float, num_tokens: int) -> None:
        """Counts the latencies of tokens that came together, `seconds` behind the first one of them."""
        if num_tokens > 1:
            self.histograms["inter_token_latency_seconds"].add(seconds / (num_tokens - 1), num_tokens - 1)
