"""The OpenAPI document says what the server is: every route, every accepted body, every answer and its status.

Requests are altered at random; whatever comes of them must stand in the document. `benchmarks/openapi.py` has
schemathesis ask a real server some thousand times more.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from starlette.routing import Route
from starlette.testclient import TestClient

from daedal.serve.api.openapi import OPERATIONS, document
from daedal.serve.app import build_app
from daedal.text.tokenizer import Tokenizer
from tests.hostile import JSON, altered
from tests.serve.deepseek import deepseek_checkpoint
from tests.serve.live import MODEL, ScriptedEngine, scripted_service

FORMAT = "deepseek-v4"
HELLO = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "paint", "description": "Paints.", "parameters": {"type": "object"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, *HELLO],
        "max_tokens": 9,
        "n": 2,
        "stop": ["zz"],
        "logprobs": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "logit_bias": {"7": 1},
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "thinking": {"type": "enabled"},
        "reasoning_effort": "high",
        "response_format": {"type": "text"},
    },
    "/v1/completions": {"prompt": ["hi", [7, 8]], "max_tokens": 9, "echo": True, "stop": "zz", "n": 1, "top_k": 5},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "instructions": "Be brief.",
        "max_output_tokens": 20,
        "store": False,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "high"},
        "tools": [{"type": "function", **FUNCTION}],
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "system": "Be brief.",
        "max_tokens": 20,
        "stop_sequences": ["zz"],
        "thinking": {"type": "disabled"},
        "tools": [{"name": "paint", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
    },
    "/v1/messages/count_tokens": {"messages": HELLO, "system": "Be brief."},
    "/v1/responses/input_tokens": {"input": "hi", "instructions": "Be brief."},
    "/tokenize": {"prompt": "hi", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [7, 8, 9]},
}


class Held:
    """A server in this process, held to its own document."""

    def __init__(self, client: TestClient):
        self.client = client
        self.told = client.get("/openapi.json").json()

    def valid(self, schema: dict[str, Any], value: object) -> bool:
        return Draft202012Validator({**schema, "components": self.told["components"]}).is_valid(value)

    def ask(self, method: str, path: str, body: object = None, *, template: str | None = None) -> httpx.Response:
        described = self.told["paths"][template or path][method]
        answer = self.client.request(method, path, content=None if body is None else json.dumps(body))
        responses = described["responses"]
        assert str(answer.status_code) in responses, (answer.status_code, answer.text)
        contents = responses[str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in contents
        if kind == "application/json":
            assert self.valid(contents[kind]["schema"], answer.json()), answer.text
        if body is not None and answer.status_code == 200:
            taken = described["requestBody"]["content"]["application/json"]["schema"]
            assert self.valid(taken, body), body
        return answer


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    directory = deepseek_checkpoint(tmp_path_factory.mktemp("openapi"), FORMAT)
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("It is a truth</think>universally", add_special_tokens=False)
    service = scripted_service(directory, ScriptedEngine(tokenizer, lambda _: ids), chat_format=FORMAT)
    with TestClient(build_app(service)) as client:
        while client.get("/ready").status_code != 200:
            pass
        yield Held(client)


def test_every_route_is_described(held: Held) -> None:
    routes = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in held.client.app.routes  # type: ignore[attr-defined]
        if isinstance(route, Route) and route.endpoint.__name__ not in ("page_file", "openapi")
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = [(operation.method, operation.path) for operation in OPERATIONS]
    assert routes == set(described)
    assert len(described) == len(routes), "what is described twice is described by the last, whatever the first says"


@pytest.mark.parametrize("keys", [True, False])
def test_references_lead_somewhere_and_open_paths_are_named(keys: bool) -> None:
    told = document(keys=keys)
    names = told["components"]["schemas"].keys()
    assert {reference.removeprefix("#/components/schemas/") for reference in _references(told)} <= names
    assert ("security" in told) == keys
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (keys and path not in ("/health", "/ready")), path


def test_what_is_asked_well_is_answered_as_described(held: Held) -> None:
    for path, body in BODIES.items():
        assert held.ask("post", path, body).status_code == 200, path
    streamed = held.ask("post", "/v1/chat/completions", {**BODIES["/v1/chat/completions"], "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    for path in ("/v1/models", "/health", "/ready", "/metrics", "/stats", "/experts"):
        assert held.ask("get", path).status_code == 200
    model, response = "/v1/models/{name}", "/v1/responses/{name}"
    assert held.ask("get", f"/v1/models/{MODEL}", template=model).status_code == 200
    assert held.ask("get", "/v1/models/another", template=model).status_code == 404
    stored = held.ask("post", "/v1/responses", {"input": "hi"}).json()["id"]
    for method, status in (("get", 200), ("delete", 200), ("get", 404), ("delete", 404)):
        assert held.ask(method, f"/v1/responses/{stored}", template=response).status_code == status


@pytest.mark.parametrize("path", BODIES)
def test_whatever_is_asked_stands_in_the_document(held: Held, path: str) -> None:
    inner = [name for name, value in BODIES[path].items() if isinstance(value, list) and isinstance(value[0], dict)]

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(altered(BODIES[path]) | st.sampled_from(inner or [""]).flatmap(lambda name: _within(BODIES[path], name)))
    def every(body: dict[str, Any]) -> None:
        held.ask("post", path, body)

    every()


def _within(body: dict[str, Any], name: str) -> st.SearchStrategy[dict[str, Any]]:
    """One entry of a list of objects altered."""
    if not name:
        return st.builds(lambda value: {**body, "another": value}, JSON)
    first, *others = body[name]
    return altered(first).map(lambda changed: {**body, name: [changed, *others]})


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return [*own, *itertools.chain.from_iterable(map(_references, value.values()))]
    return list(itertools.chain.from_iterable(map(_references, value))) if isinstance(value, list) else []
