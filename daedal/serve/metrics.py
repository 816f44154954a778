"""What the server counts, in Prometheus' text format, with vLLM's metric names where the meaning is the same.

The engine's own numbers are read when somebody asks; only latencies and endings are kept here. Each server has its own
registry. Knows nothing of HTTP.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daedal.infer.engine import EngineStats

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WHOLE_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """One server's metrics; times are in seconds."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        ProcessCollector(registry=self._registry)
        self._finished = Counter(
            "daedal:request_success", "Requests that ended, by reason.", ["finished_reason"], registry=self._registry
        )
        self._first_token = Histogram(
            "daedal:time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._between_tokens = Histogram(
            "daedal:inter_token_latency_seconds",
            "From one token of a request to its next.",
            buckets=_BETWEEN_TOKENS_BUCKETS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "daedal:e2e_request_latency_seconds",
            "From a request's arrival to its end.",
            buckets=_WHOLE_REQUEST_BUCKETS,
            registry=self._registry,
        )

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens that came together, `seconds` after the one before."""
        for _ in range(count):
            self._between_tokens.observe(seconds / count)

    def finished(self, reason: str, seconds: float) -> None:
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def render(self) -> bytes:
        """Everything in the text format 0.0.4."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        gauges: list[tuple[str, str, float]] = [
            ("num_requests_running", "Requests that the engine is computing.", stats.num_running),
            ("num_requests_waiting", "Requests that wait for their turn.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the cache's pages in use, 1 is all.", usage),
            ("kv_cache_used_bytes", "Bytes of the cache's pages in use.", stats.kv_bytes_used),
            ("kv_cache_bytes", "Bytes that the cache holds in all.", stats.kv_bytes_total),
        ]
        counters: list[tuple[str, str, float]] = [
            ("num_preemptions", "Requests put back to wait because pages ran out.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens_total),
        ]
        if stats.num_accepted_at:
            counters += [
                ("spec_decode_num_drafts", "How often next tokens were drafted.", stats.num_drafts_total),
                ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.num_drafted_total),
                ("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", stats.num_accepted_total),
            ]
            yield _accepted_per_position(stats)
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"daedal:{name}", text, value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"daedal:{name}", text, value)


def _accepted_per_position(stats: EngineStats) -> Metric:
    name = "daedal:spec_decode_num_accepted_tokens_per_pos"
    family = CounterMetricFamily(name, "Accepted tokens by their place in the draft.", labels=["position"])
    for position, count in enumerate(stats.num_accepted_at):
        family.add_metric([str(position)], count)
    return family
