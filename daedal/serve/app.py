"""The web application: which path leads where, and the headers that every answer carries.

`/v1/...` is the OpenAI API, with Anthropic's Messages beside it; `/tokenize` and `/detokenize` show tokens; `/health`,
`/ready` and `/metrics` are for machines that look after this one; `/openapi.json` describes all that; `/` is the chat
page and `/stats` its live numbers.
Knows nothing of sockets and processes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daedal.errors import DaedalError
from daedal.serve.api.chat import ChatEndpoint
from daedal.serve.api.completions import CompletionEndpoint
from daedal.serve.api.limits import unknown_model
from daedal.serve.api.messages import MessagesEndpoint
from daedal.serve.api.openapi import document
from daedal.serve.api.responses import ResponsesEndpoint
from daedal.serve.api.token_routes import TokenRoutes
from daedal.serve.door import Door
from daedal.serve.request_log import RequestLog
from daedal.serve.state.errors import ApiError, answer_error
from daedal.serve.state.keys import OPEN, KeyGate
from daedal.serve.state.service import Service
from daedal.serve.workers.worker import GenerationFailed, WorkerStopped

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {f"/{file.name}".replace("/index.html", "/"): file.name for file in sorted(_PAGE.iterdir())}
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_app(service: Service) -> Starlette:
    """The application for one service, whose worker lives as long as the application does."""
    # The page's files say nothing of models and users, and without them nobody could be asked for a key.
    gate = [] if service.keys is None else [Middleware(KeyGate, service.keys, frozenset({*OPEN, *_PAGE_FILES}))]
    handled = (ApiError, DaedalError, GenerationFailed, HTTPException, WorkerStopped, Exception)
    app = Starlette(
        routes=[*_model_routes(service), *_api_routes(service), *_watch_routes(service), *_page_routes()],
        middleware=[
            *map(Middleware, service.layers),
            Middleware(RequestLog, service.model_name),
            Middleware(_SecurityHeaders),
            *gate,
            Middleware(Door, service),
        ],
        exception_handlers={kind: answer_error for kind in handled},
        lifespan=_lifespan(service),
    )
    app.router.redirect_slashes = False
    return app


def _lifespan(service: Service) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        warming = asyncio.create_task(service.warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            await asyncio.to_thread(service.stop)

    return lifespan


def _model_routes(service: Service) -> list[Route]:
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "daedal",
        "max_model_len": service.max_context,
    }

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.model_name:
            raise unknown_model(service, name)
        return JSONResponse(model)

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
    ]


def _api_routes(service: Service) -> list[Route]:
    responses, messages, tokens = ResponsesEndpoint(service), MessagesEndpoint(service), TokenRoutes(service)
    return [
        Route("/v1/chat/completions", ChatEndpoint(service).answer, methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(service).answer, methods=["POST"]),
        Route("/v1/responses", responses.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", responses.count, methods=["POST"]),
        Route("/v1/responses/{name}", responses.stored, methods=["GET", "DELETE"]),
        Route("/v1/messages", messages.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
    ]


def _watch_routes(service: Service) -> list[Route]:
    async def health(_: Request) -> Response:
        state = service.worker.state
        return JSONResponse({"status": "ok" if state == "ready" else state}, 503 if state == "stopped" else 200)

    async def ready(_: Request) -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def stats(_: Request) -> Response:
        return JSONResponse(service.snapshot(), headers={"Cache-Control": "no-store"})

    async def experts(_: Request) -> Response:
        looks, seen = service.worker.look()
        return JSONResponse({"looks": looks, **asdict(seen)}, headers={"Cache-Control": "no-store"})

    described = document(keys=service.keys is not None)

    async def openapi(_: Request) -> Response:
        return JSONResponse(described)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/stats", stats, methods=["GET"]),
        Route("/experts", experts, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def _page_routes() -> list[Route]:
    async def page_file(request: Request) -> Response:
        return FileResponse(_PAGE / _PAGE_FILES[request.url.path], headers={"Cache-Control": "no-cache"})

    return [Route(path, page_file, methods=["GET"]) for path in _PAGE_FILES]


class _SecurityHeaders:
    """Adds the headers at the ASGI level, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
