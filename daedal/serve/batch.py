"""Files of requests answered by the server's own application, without a socket: OpenAI's batch lines in and out.

Each answer is appended as soon as it is there, so that a run that ended early goes on where it was; the order is that
in which answers came. Knows nothing of how a service is made.
"""

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2

from daedal.errors import DataError
from daedal.serve.app import build_app
from daedal.serve.state.service import Service

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINE_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request. custom_id: the client's own name for it; path: one of PATHS."""

    custom_id: str
    path: str
    body: Mapping[str, object]


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The requests of a file. DataError names the line that is none, or repeats the name of another."""
    seen: set[str] = set()
    for number, text in enumerate(_lines(path), start=1):
        line = _read(text, f"line {number} of {path}")
        if line.custom_id in seen:
            raise DataError(
                f"line {number} of {path} has the custom_id {line.custom_id!r} of another: give each its own"
            )
        seen.add(line.custom_id)
        yield line


def answered(path: Path) -> set[str]:
    """The names of requests that have their answer in this file; a last line that was cut is taken off it."""
    if not path.exists():
        return set()
    names: set[str] = set()
    end = 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                name = json.loads(raw)["custom_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} holds a line that is no answer of a batch: give another file for the answers"
                ) from error
            names.add(str(name))
            end += len(raw)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return names


@dataclass(frozen=True, kw_only=True)
class Answered:
    """status: of HTTP. line: as it stands in the file of answers."""

    status: int
    line: str


@asynccontextmanager
async def answering(service: Service) -> AsyncIterator[Callable[[BatchLine], Awaitable[Answered]]]:
    """A function that answers one request, as long as the context lasts. Raises what the warm-up raised."""
    app = build_app(service)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client,
    ):
        await service.warmed.wait()
        if service.failure is not None:
            raise service.failure

        async def answer(line: BatchLine) -> Answered:
            return _answer(line, await client.post(line.path, json=line.body))

        yield answer


async def run_batch(
    service: Service,
    lines: Iterator[BatchLine],
    out: IO[str],
    *,
    at_once: int,
    told: Callable[[int], object],
    stopped: Callable[[], bool],
) -> int:
    """Answers all lines, `at_once` together; the number of refusals and failures. told: the status of each answer as it
    is written. stopped: asked before each line; those under way are answered still. Raises what the warm-up raised."""
    failed = 0
    async with answering(service) as answer:

        async def work() -> None:
            nonlocal failed
            for line in lines:
                if stopped():
                    return
                answered = await answer(line)
                failed += answered.status >= 400
                out.write(answered.line + "\n")
                out.flush()
                told(answered.status)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    return failed


def _answer(line: BatchLine, answer: httpx2.Response) -> Answered:
    body = answer.json()
    response = {"status_code": answer.status_code, "request_id": str(body.get("id") or ""), "body": body}
    row = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": None}
    return Answered(status=answer.status_code, line=json.dumps(row, ensure_ascii=False))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes: send less in one request")
                if raw.strip():
                    yield raw
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of batch lines") from error


def _read(text: bytes, where: str) -> BatchLine:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): give one request a line") from error
    if not isinstance(line, dict):
        raise DataError(f"{where} is no JSON object: give one request a line")
    custom_id, method, url, body = (line.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError(f"{where} has no custom_id: give each request a name of its own")
    if method != "POST" or url not in PATHS:
        raise DataError(f"{where} asks for {method} {url}: POST to {', '.join(PATHS)} is what there is")
    if not isinstance(body, dict):
        raise DataError(f"{where} has no body: give the request's JSON object")
    if body.get("stream"):
        raise DataError(f"{where} asks for a stream, which a file cannot hold: leave stream out")
    return BatchLine(custom_id=custom_id, path=url, body=body)
