"""One client's connection, with an end to its patience: uvicorn's protocol for HTTP/1.1 beside two clocks of ours.

A client that sends its headers a byte a minute, or takes no byte of its answer, holds a connection and memory for
nothing; it is cut. (Bodies have their time in `body`, idle connections theirs in uvicorn.) What is not HTTP is refused
with the API's error object, and headers beyond the parser's 16 KiB with 431. Knows nothing of paths.
"""

import asyncio
import json
import logging
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from daedal.serve.state.errors import ApiError

logger = logging.getLogger(__name__)

HEADER_SECONDS = 20.0
TAKE_SECONDS = 60.0


class TimedConnection(H11Protocol):
    """header_seconds: from a request's first byte, or from connecting, to the end of its headers. take_seconds: that a
    client may leave what it was sent in full buffers."""

    header_seconds = HEADER_SECONDS
    take_seconds = TAKE_SECONDS

    _headers: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if not self._answers():
            self._await_headers()
        super().data_received(data)
        if self._answers():
            self._headers = _ended(self._headers)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self._taking or self.loop.call_later(self.take_seconds, self._cut, "took nothing of its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taking = _ended(self._taking)

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers, self._taking = _ended(self._headers), _ended(self._taking)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        limit = self.config.h11_max_incomplete_event_size or 16 * 1024
        too_large = len(self.conn.trailing_data[0]) > limit
        status = 431 if too_large else 400
        sentence = f"the headers are larger than {limit} bytes: send less" if too_large else "this is not HTTP/1.1"
        body = json.dumps(ApiError(status, sentence, code="invalid_http").body()).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        what = "did not come to the end of its headers"
        self._headers = self._headers or self.loop.call_later(self.header_seconds, self._cut, what)

    def _cut(self, what: str) -> None:
        logger.warning("a client %s in time: its connection is cut", what)
        self.transport.abort()


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer any more."""
    if timer is not None:
        timer.cancel()
    return None
