"""What the server counts, in Prometheus' text format, with vLLM's metric names where the meaning is the same.

The engine's own numbers are read when somebody asks; only latencies and endings are kept here. Each server has its own
registry. Knows nothing of HTTP.
"""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daedal.cost.spending import Spent
from daedal.infer.stats import EngineStats
from daedal.serve.state.course import Course

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WHOLE_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """One server's metrics; times are in seconds. model_name: whose costs are told. restarts: how often the engine was
    started again; pid: of its process, where it is another one; engines: of each, whether it is there and its requests.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        model_name: str,
        *,
        restarts: Callable[[], int] = int,
        pid: Callable[[], int] | None = None,
        engines: Callable[[], Sequence[tuple[bool, int]]] = tuple,
    ):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, model_name, restarts))
        self._registry.register(_EachEngine(engines))
        ProcessCollector(registry=self._registry)
        if pid is not None:
            ProcessCollector(namespace="daedal_engine", pid=pid, registry=self._registry)
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

        self._phases = {
            phase: Histogram(
                f"daedal:request_{phase}_time_seconds", text, buckets=_WHOLE_REQUEST_BUCKETS, registry=self._registry
            )
            for phase, text in (
                ("queue", "From a request's arrival to its start."),
                ("prefill", "From a request's start to its first token."),
                ("decode", "From a request's first token to its last."),
            )
        }

    def went(self, course: Course) -> None:
        """A request is over; what it did not come to is not counted."""
        if course.waited is None:
            return
        self._phases["queue"].observe(course.waited)
        if course.first is not None and course.ended is not None:
            self._phases["prefill"].observe(max(course.first - course.arrived - course.waited, 0.0))
            self._phases["decode"].observe(course.ended - course.first)

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
    def __init__(self, stats: Callable[[], EngineStats], model_name: str, restarts: Callable[[], int]):
        self._stats, self._model_name, self._restarts = stats, model_name, restarts

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
            ("prompt_tokens", "Prompt tokens read, computed or not.", stats.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            ("prefix_cache_queries", "Prompt tokens that might have been cached.", stats.prefix_queries_total),
            ("prefix_cache_hits", "Prompt tokens that were cached, and not computed.", stats.prefix_hits_total),
            ("engine_restarts", "Engines that ended and were started again.", self._restarts()),
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
        if stats.spent_total is not None:
            yield from _costs(stats.spent_total, self._model_name)


class _EachEngine(Collector):
    """What tells engines of one server apart; everything else is summed."""

    def __init__(self, engines: Callable[[], Sequence[tuple[bool, int]]]):
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("daedal:engine_up", "1 while the engine is there.", labels=["engine"])
        requests = GaugeMetricFamily("daedal:engine_requests", "Requests that the engine has.", labels=["engine"])
        for number, (is_up, num_requests) in enumerate(self._engines()):
            up.add_metric([str(number)], float(is_up))
            requests.add_metric([str(number)], num_requests)
        yield from (up, requests)


def _costs(spent: Spent, model_name: str) -> Iterator[Metric]:
    """Of all requests, cancelled ones and the warm-up included; without what nobody measured or told."""
    totals: list[tuple[str, str, float | None]] = [
        ("cost_flops", "Arithmetic of all requests; a multiply-add counts 2.", spent.flops),
        ("cost_kv_byte_seconds", "Bytes of the cache that requests held, times how long.", spent.kv_byte_seconds),
        ("cost_device_seconds", "Time that steps took.", spent.device_seconds),
        ("cost_joules", "Energy of the steps, measured or modelled.", spent.joules),
        ("cost_dollars", "Money that the steps came to by the price chosen at start.", spent.dollars),
    ]
    for name, text, value in totals:
        if value is not None:
            family = CounterMetricFamily(f"daedal:{name}", text, labels=["model_name"])
            family.add_metric([model_name], value)
            yield family


def _accepted_per_position(stats: EngineStats) -> Metric:
    name = "daedal:spec_decode_num_accepted_tokens_per_pos"
    family = CounterMetricFamily(name, "Accepted tokens by their place in the draft.", labels=["position"])
    for position, count in enumerate(stats.num_accepted_at):
        family.add_metric([str(position)], count)
    return family
