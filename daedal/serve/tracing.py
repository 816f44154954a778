"""One OpenTelemetry span for each request that reached the engine, and below it its waiting, its prompt, its answer.

Attributes are those of OpenTelemetry's semantic conventions for generative models; no text is among them. A request's
own `traceparent` is its span's parent. Spans are made when a request is over, from the times that were noted anyway,
so a server without tracing does nothing for it. Needs `daedal[otel]`.
"""

import time
from collections.abc import Mapping

from opentelemetry import context, propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from daedal.serve.state.course import Course

EXPORT_SECONDS = 2.0  # that a collector may take, also when the server ends

Value = str | int | float | bool | list[str]


class Tracing:
    """Follows a server's requests. provider: where spans go."""

    def __init__(self, provider: TracerProvider):
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("daedal")

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """To a collector that takes OTLP over HTTP at `endpoint`, such as http://127.0.0.1:4318."""
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "daedal"}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close(self) -> None:
        """What is still to be sent is sent, as far as time allows."""
        self._provider.force_flush(int(EXPORT_SECONDS * 1000))
        self._provider.shutdown()

    def layer(self, app: ASGIApp) -> ASGIApp:
        """The application, each request of it within the trace that it says it is part of."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            token = context.attach(propagate.extract(Headers(scope=scope)))
            try:
                await app(scope, receive, send)
            finally:
                context.detach(token)

        return traced

    def follow(self, course: Course) -> None:
        """A request is over."""
        assert course.ended is not None
        now, ended = time.time_ns(), course.ended

        def at(seconds: float) -> int:
            return now - int((ended - seconds) * 1e9)

        operation = "text_completion" if course.id.startswith("cmpl") else "chat"
        span = self._tracer.start_span(
            f"{operation} {course.model}",
            kind=SpanKind.SERVER,
            attributes=_attributes(course, operation),
            start_time=at(course.arrived),
        )
        if course.failed is not None:
            span.set_attribute("error.type", course.failed)
            span.set_status(Status(StatusCode.ERROR, course.failed))
        begun = None if course.waited is None else course.arrived + course.waited
        parts = (("queue", course.arrived, begun), ("prefill", begun, course.first), ("decode", course.first, ended))
        for name, start, end in parts:
            if start is not None:
                # Where a part's end is not known, the request ended in it.
                part = self._tracer.start_span(name, set_span_in_context(span), start_time=at(start))
                part.end(at(ended if end is None else end))
        span.end(at(ended))


def _attributes(course: Course, operation: str) -> Mapping[str, Value]:
    params = course.params[0]
    told: dict[str, Value] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "daedal",
        "gen_ai.request.model": course.model,
        "gen_ai.response.model": course.model,
        "gen_ai.response.id": course.id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": course.num_prompt,
        "gen_ai.usage.cache_read.input_tokens": course.num_cached,
        "gen_ai.usage.output_tokens": course.num_generated,
        "gen_ai.response.finish_reasons": course.reasons,
        "daedal.request.priority": course.priority,
    }
    if params.seed is not None:
        told["gen_ai.request.seed"] = params.seed
    if len(course.params) > 1:
        told["gen_ai.request.choice.count"] = len(course.params)
    return told
