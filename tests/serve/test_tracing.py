"""Spans of requests: what they say, what they hang from, and that nothing of what was said is in them."""

import itertools
import threading
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from daedal.serve.state.course import Course
from daedal.serve.tracing import Tracing
from daedal.text.tokenizer import Tokenizer
from tests.serve.live import ScriptedEngine, real_service, scripted_service, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a word that nobody else is to read"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def test_a_span_for_each_request_and_its_parts(
    checkpoint: Path, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = real_service(checkpoint, max_batch=2)
    service.followers, service.layers = (tracing.follow,), (tracing.layer,)
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        asked = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "temperature": 0, "priority": 2}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = http.post("/v1/chat/completions", json={**asked, "ignore_eos": True}, headers=headers).json()
        http.post("/v1/completions", json={"prompt": [7, 8, 9], "max_tokens": 2, "n": 2, "seed": 3, "stream": True})
        http.post("/v1/completions", json={"prompt": ""})
    queue, prefill, decode, span = _by_trace(exporter, TRACE)
    assert [part.name for part in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert (span.name, span.kind) == (f"chat {service.model_name}", SpanKind.SERVER)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert {part.parent.span_id for part in (queue, prefill, decode) if part.parent} == {span.context.span_id}
    times = [queue.start_time, queue.end_time, prefill.end_time, decode.end_time]
    assert times == sorted(times)
    assert (span.start_time, span.end_time) == (queue.start_time, decode.end_time)
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    assert span.attributes is not None
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "daedal",
        "gen_ai.request.model": service.model_name,
        "gen_ai.response.model": service.model_name,
        "gen_ai.response.id": answer["id"],
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "daedal.request.priority": 2,
    }
    (other,) = [found for found in exporter.get_finished_spans() if found.name.startswith("text_completion")]
    assert other.parent is None
    assert other.attributes is not None
    assert other.attributes["gen_ai.request.choice.count"] == 2
    assert other.attributes["gen_ai.request.seed"] == 3
    assert other.attributes["gen_ai.usage.input_tokens"] == 3
    assert other.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert all(SECRET not in found.to_json() for found in exporter.get_finished_spans())


def test_an_answer_that_was_cut_says_so(checkpoint: Path, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    fails = threading.Event()

    def before_step() -> None:
        if fails.is_set():
            raise ZeroDivisionError(SECRET)

    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: itertools.repeat(40), before_step=before_step)
    service = scripted_service(checkpoint, engine)
    service.followers = (tracing.follow,)
    endless = {"prompt": [7], "max_tokens": engine.max_context, "stream": True}
    with serving(service) as address, httpx.stream("POST", f"{address}/v1/completions", json=endless) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                fails.set()
    (span,) = [span for span in exporter.get_finished_spans() if span.kind == SpanKind.SERVER]
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "GenerationFailed"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert SECRET not in span.to_json()


def test_a_follower_that_fails_keeps_nobody_from_an_answer(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine(Tokenizer.load(checkpoint), lambda _: itertools.repeat(40))
    service, told = scripted_service(checkpoint, engine), list[Course]()

    def fails(course: Course) -> None:
        raise ZeroDivisionError

    service.followers = (fails, told.append)
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        assert http.post("/v1/completions", json={"prompt": [7], "max_tokens": 3}).status_code == 200
        endless = {"prompt": [7], "max_tokens": engine.max_context, "stream": True}
        with http.stream("POST", "/v1/completions", json=endless) as answer:
            next(answer.iter_lines())
        assert engine.cancelled.wait(30), "its reader has gone"
    assert [course.reasons for course in told] == [["length"], ["abort"]]
    assert caplog.text.count("who follows requests was told of one, and failed") == 2


def _by_trace(exporter: InMemorySpanExporter, trace: str) -> list[ReadableSpan]:
    """A trace's spans, in the order in which they ended."""
    return [span for span in exporter.get_finished_spans() if f"{span.context.trace_id:032x}" == trace]
