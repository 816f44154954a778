"""Refusals as the OpenAI API words them: a status, and one object with message, type, param and code.

Everything that can go wrong below this floor is given its status here, in one table. What is not in the table is a
defect: the client gets a general sentence, the log gets the traceback. Anthropic's paths get the same object in the
envelope that its clients read, with the types that they know.
"""

import logging
import math
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daedal.errors import CapacityError, DaedalError, DeadlineError, OverloadError, RequestError, TemplateError
from daedal.serve.workers.worker import GenerationFailed, WorkerStopped

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
MOST_WAIT = 30  # seconds that a client is told to wait, at most
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """One refusal: what the client is told, and with which status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The object that goes over the wire."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, object]:
        """The same for Anthropic's clients."""
        fallback = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_KINDS.get(self.status, fallback)
        error = {"type": kind, "message": self.message, "param": self.param, "code": self.code}
        return {"type": "error", "error": error}

    def response(self, path: str = "") -> JSONResponse:
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATH) else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """The refusal for any exception; one that nobody foresaw is logged here with its traceback."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _from_routing(error)
        case DeadlineError():
            retry = {"Retry-After": str(math.ceil(min(max(error.wait, RETRY_AFTER_SECONDS), MOST_WAIT)))}
            code, kind = "deadline_unreachable", "rate_limit_error"
            return ApiError(429, str(error), param="timeout", code=code, kind=kind, headers=retry)
        case OverloadError():
            retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(429, str(error), code="queue_full", kind="rate_limit_error", headers=retry)
        case CapacityError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case TemplateError():
            return ApiError(400, str(error), param="messages")
        case DaedalError():
            return ApiError(400, str(error))
        case WorkerStopped():
            retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(503, str(error), code="unavailable", kind="server_error", headers=retry)
        case GenerationFailed():
            return ApiError(500, str(error), code="generation_failed", kind="server_error")
    logger.error("an unforeseen error", exc_info=error)
    sentence = "the server failed on this request: the cause is in its log, other requests go on"
    return ApiError(500, sentence, code="internal_error", kind="server_error")


def _from_routing(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        sentence = "no such path: see /v1/models, /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages"
        return ApiError(404, sentence, code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        sentence = f"this path does not know the method: use {allowed}"
        return ApiError(405, sentence, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, error.detail, headers=error.headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for every exception."""
    return as_api_error(error).response(request.url.path)
