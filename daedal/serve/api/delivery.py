"""How an answer reaches its client, and what happens when the client leaves: its requests are cancelled.

A whole answer is awaited while the connection is watched; a streamed one goes out as server-sent events, as Starlette
sends any stream, in the dialect of its API. Knows nothing of what an answer holds.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from daedal.serve.api.generation import Generation
from daedal.serve.state.errors import ApiError, as_api_error

T = TypeVar("T")

# Ends of lines to readers that go by Unicode, and to no others: what JSON does not escape of them by itself.
_BREAKS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})
CLIENT_CLOSED_REQUEST = 499  # never seen by anyone: the client has left


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T | None:
    """The result of `work`; None, with `work` cancelled, when the client leaves before. The body must be read."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def nobody() -> Response:
    """The answer to a client that has left."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """named: an event's `type` stands on a line of its own too. done: `[DONE]` comes last. failure: the event for an
    exception under way."""

    named: bool = False
    done: bool = True
    failure: Callable[[ApiError], Mapping[str, object]] = ApiError.body


_CHUNKS = Dialect()


class EventStream(StreamingResponse):
    """Server-sent events that cancel their generation however they end: finished, failed, or nobody listens.

    An exception while the answer is under way becomes one event with an error object.
    """

    def __init__(
        self, generation: Generation, chunks: AsyncIterator[Mapping[str, object]], *, dialect: Dialect = _CHUNKS
    ):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(chunks, dialect), media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(chunks: AsyncIterator[Mapping[str, object]], dialect: Dialect) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk, dialect)
    except Exception as error:
        yield _event(dialect.failure(as_api_error(error)), dialect)
    if dialect.done:
        yield b"data: [DONE]\n\n"


def _event(value: Mapping[str, object], dialect: Dialect) -> bytes:
    name = f"event: {value['type']}\n".encode() if dialect.named else b""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return name + b"data: " + data.translate(_BREAKS).encode() + b"\n\n"
