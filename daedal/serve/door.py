"""At the door: what comes while the server is full, not ready or stopping is refused before its body is read.

Under overload most requests are refused, and to read, check and cut a prompt that nobody will answer is what they would
cost most. A request for several answers may still be refused behind the door, once it is known for how many it asks.
Knows nothing of bodies and answers.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from daedal.serve.api.limits import check_open, check_places
from daedal.serve.state.errors import ApiError
from daedal.serve.state.service import Service

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})


class Door:
    """As ASGI, behind the keys: a stranger learns nothing of how full it is."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING:
            try:
                check_open(self._service)
                check_places(self._service)
            except ApiError as error:
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
