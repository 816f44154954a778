"""One line of the log for each request: who it was, what came of it, how long it took. Never what was said.

The line's fields go along as `extra`, for a formatter that writes JSON. A request's id is made here, and sent back as
`x-request-id`. Tokens are counted as they are charged: the first charge is the prompt's. Knows nothing of bodies.
"""

import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daedal.serve.state.keys import add_charge

logger = logging.getLogger(__name__)

QUIET = ("/health", "/ready", "/metrics", "/stats", "/experts")
"""Paths that are asked every few seconds by machines; only their failures are logged."""
LEFT = 499


@dataclass(kw_only=True)
class Record:
    """What is known of one request so far; times are in seconds from its arrival."""

    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    arrived: float = field(default_factory=time.monotonic)
    status: int = LEFT
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    first_token: float | None = None

    def count(self, num_tokens: int) -> None:
        """Tokens were read or written."""
        if self.prompt_tokens is None:
            self.prompt_tokens = num_tokens
            return
        if num_tokens and self.first_token is None:
            self.first_token = time.monotonic() - self.arrived
        self.completion_tokens += num_tokens

    def fields(self, scope: Scope, model: str) -> dict[str, object]:
        """As the log has them."""
        told: dict[str, object] = {
            "id": self.id,
            "method": scope["method"],
            "route": "unknown" if self.status == 404 else scope["path"][:100],
            "model": model,
            "status": self.status,
            "seconds": round(time.monotonic() - self.arrived, 6),
        }
        if self.prompt_tokens is not None:
            first = None if self.first_token is None else round(self.first_token, 6)
            told["prompt_tokens"], told["completion_tokens"] = self.prompt_tokens, self.completion_tokens
            told["seconds_to_first_token"] = first
        return told


class RequestLog:
    """Around everything else, as ASGI: a stream's line is written at its end."""

    def __init__(self, app: ASGIApp, model: str):
        self._app, self._model = app, model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record()
        add_charge(scope, record.count)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in QUIET or record.status >= 500:
                fields = record.fields(scope, self._model)
                line = " ".join(f"{name}={value}" for name, value in fields.items())
                logger.info("%s", line, extra={"fields": fields})
