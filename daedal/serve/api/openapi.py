"""The OpenAPI document of the server: every path of its APIs, what it takes, what it answers and with which status.

Bodies are described by the very classes that read them, so the two cannot drift apart; rules that join several fields,
or rest on the model, are beyond a schema and answered with 400. Streams are described event by event, which OpenAPI has
since 3.2. The page's own files are no API. Knows nothing of how requests are answered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from daedal.serve.api.chat_protocol import ChatBody
from daedal.serve.api.messages_protocol import CountBody, MessagesBody
from daedal.serve.api.openapi_answers import ANSWERS, Schema, fields, named
from daedal.serve.api.protocol import CompletionBody
from daedal.serve.api.responses_protocol import ResponsesBody
from daedal.serve.api.token_routes import IdsBody, TextBody

OPENAPI = "3.2.0"
VERSION = "1"
"""Of the API: the number in its paths."""

_READING = (400, 404, 408, 413, 500)
_GENERATING = (*_READING, 429, 503, 504)
_SENTENCES = {
    200: "As asked.",
    400: "A field is missing, wrong, unsupported, or contradicts another; `param` names it.",
    401: "No key, or an unknown one.",
    403: "More than this key may ask for.",
    404: "No such model, or no such response.",
    408: "The body took too long to come.",
    413: "The body is too large.",
    429: "Full, or a limit of the key is reached: `Retry-After` says when to come back.",
    500: "The server failed on this request.",
    503: "Not ready, or stopping: `Retry-After` says when to come back.",
    504: "The request's time was over before its answer.",
}
_COMES_BACK = (429, 503)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path. body: what reads the request, several where one of them does. answer: by its name among
    `ANSWERS`. streams: whether the answer may come as events. also: statuses with that same answer."""

    method: str
    path: str
    says: str
    answer: str
    body: tuple[type[BaseModel], ...] = ()
    refusals: tuple[int, ...] = ()
    streams: bool = False
    named_events: bool = False
    also: tuple[int, ...] = ()
    kind: str = "application/json"
    open: bool = False


def _generates(path: str, says: str, answer: str, body: type[BaseModel], *, named_events: bool = False) -> Operation:
    """What a model answers, whole or as it comes."""
    return Operation(
        method="post",
        path=path,
        says=says,
        answer=answer,
        body=(body,),
        refusals=_GENERATING,
        streams=True,
        named_events=named_events,
    )


def _reads(path: str, says: str, answer: str, *body: type[BaseModel]) -> Operation:
    """What is known of a body without a model."""
    return Operation(method="post", path=path, says=says, answer=answer, body=body, refusals=_READING)


def _stored(method: str, path: str, says: str, answer: str) -> Operation:
    """What goes by a name that there may not be."""
    return Operation(method=method, path=path, says=says, answer=answer, refusals=(404,))


OPERATIONS = (
    Operation(method="get", path="/v1/models", says="The model that is served.", answer="Models"),
    _stored("get", "/v1/models/{name}", "The model of this name.", "Model"),
    _generates("/v1/chat/completions", "The assistant's next turn.", "ChatCompletion", ChatBody),
    _generates("/v1/completions", "Continuations of texts or token ids.", "Completion", CompletionBody),
    _generates(
        "/v1/responses", "A response, stored unless `store` is false.", "Response", ResponsesBody, named_events=True
    ),
    _reads("/v1/responses/input_tokens", "How many tokens a request has.", "InputTokens", ResponsesBody),
    _stored("get", "/v1/responses/{name}", "A stored response.", "Response"),
    _stored("delete", "/v1/responses/{name}", "Forgets a stored response.", "DeletedResponse"),
    _generates(
        "/v1/messages",
        "The assistant's next turn, as Anthropic's Messages.",
        "MessagesAnswer",
        MessagesBody,
        named_events=True,
    ),
    _reads("/v1/messages/count_tokens", "How many tokens a conversation has.", "MessagesCount", CountBody),
    _reads("/tokenize", "The tokens of a text or of a conversation.", "Tokens", TextBody, ChatBody),
    _reads("/detokenize", "The text of tokens.", "Text", IdsBody),
    Operation(method="get", path="/health", says="Whether the server lives.", answer="Health", also=(503,), open=True),
    Operation(method="get", path="/ready", says="Whether it takes requests.", answer="Ready", also=(503,), open=True),
    Operation(method="get", path="/metrics", says="Counters for Prometheus.", answer="", kind="text/plain"),
    Operation(method="get", path="/stats", says="The numbers that the page shows.", answer="Numbers"),
    Operation(method="get", path="/experts", says="Which experts a few steps chose lately.", answer="Numbers"),
)


def document(*, keys: bool) -> dict[str, Any]:
    """The whole. keys: whether the server asks for one."""
    bodies = {body for operation in OPERATIONS for body in operation.body}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    _, defined = models_json_schema(
        [(body, "validation") for body in ordered], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, object]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, keys=keys)
    components: dict[str, object] = {"schemas": {**defined["$defs"], **ANSWERS}}
    whole: dict[str, Any] = {
        "openapi": OPENAPI,
        "info": {"title": "Daedal", "version": VERSION},
        "paths": paths,
        "components": components,
    }
    if keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        whole["security"] = [{"bearer": []}, {"key": []}]
    return whole


def _described(operation: Operation, *, keys: bool) -> dict[str, object]:
    refusals = set(operation.refusals)
    if keys and not operation.open:
        refusals |= {401, 403, 429} if operation.body else {401}
    anthropic = operation.path.startswith("/v1/messages")
    error = {"application/json": {"schema": named("MessagesError" if anthropic else "Error")}}
    content = _content(operation)
    responses: dict[str, object] = {
        str(status): {"description": _SENTENCES[status], "content": content} for status in (200, *operation.also)
    }
    for status in sorted(refusals):
        headers = {"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if status in _COMES_BACK else {}
        responses[str(status)] = {"description": _SENTENCES[status], "content": error, **headers}
    described: dict[str, object] = {"summary": operation.says, "responses": responses}
    if operation.body:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _taken(operation)}}}
    if "{name}" in operation.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        described["parameters"] = [name]
    if operation.open:
        described["security"] = []
    return described


def _taken(operation: Operation) -> Schema:
    schemas = [named(body.__name__) for body in operation.body]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _content(operation: Operation) -> Mapping[str, object]:
    if not operation.answer:
        return {operation.kind: {"schema": {"type": "string"}}}
    told: dict[str, object] = {operation.kind: {"schema": named(operation.answer)}}
    if operation.streams:
        always: dict[str, Schema] = {"data": {"type": "string"}}
        if operation.named_events:
            always["event"] = {"type": "string"}
        told["text/event-stream"] = {"itemSchema": {**fields(always), "additionalProperties": True}}
    return told
