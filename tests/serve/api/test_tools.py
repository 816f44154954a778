"""Calls that must be made, answers that must match a schema, and answers that are begun: with real, random models."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from daedal.serve.state.service import Service
from daedal.text.chat import load_format
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import EOS, THINK, THINK_END
from tests.serve.deepseek import Talk, deepseek_checkpoint, talking
from tests.serve.live import MODEL, events, real_service, serving

pytest.importorskip("llguidance")

ASK = [{"role": "user", "content": "x"}]
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "hot": {"type": "boolean"}},
    "required": ["unit", "hot"],
    "additionalProperties": False,
}
CALLS = (
    {"unit": "C", "hot": True},
    {"unit": "C", "hot": False},
    {"unit": "F", "hot": True},
    {"unit": "F", "hot": False},
)


def tool(name: str, **more: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, **more}}


TOOLS = [tool("get"), tool("now")]
OFF = {"thinking": {"type": "disabled"}}


def speaking(directory: Path, name: str) -> Service:
    """A real model, of a quick kind, that says anything in the format of this name."""
    deepseek_checkpoint(directory, name, family="llama", max_position_embeddings=4096)
    service = real_service(directory, chat=False, max_batch=4, max_context=4096)
    service.chat_format = load_format(directory, chat_format=name)
    return service


@pytest.fixture(scope="module", params=["deepseek-v3.1", "deepseek-v3.2"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        serving(speaking(tmp_path_factory.mktemp("real"), request.param)) as address,
        httpx.Client(base_url=f"{address}/v1/", timeout=120) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    with talking(deepseek_checkpoint(tmp_path_factory.mktemp("v4"), "deepseek-v4"), "deepseek-v4") as talk:
        yield talk


def choices(http: httpx.Client, **fields: object) -> list[dict]:
    """White space, of which a model without any sense might write a lot, is made unlikely."""
    spaces = httpx.post(f"{http.base_url.copy_with(path='/tokenize')}", json={"prompt": " \n\t\r"}).json()["tokens"]
    bias = {**dict.fromkeys(map(str, spaces), -30), **fields.pop("logit_bias", {})}
    asked = {"messages": ASK, "max_tokens": 1000, "logit_bias": bias, **OFF, **fields}
    answer = http.post("chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "now"}}], ids=["any", "named"]
)
def test_a_call_that_must_be_made_is_made(real: httpx.Client, choice: object) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": 1}
    for got in choices(real, **fields):
        assert got["finish_reason"] == "tool_calls"
        (call,) = got["message"]["tool_calls"]
        assert call["function"]["name"] in (("get", "now") if choice == "required" else ("now",))
        assert json.loads(call["function"]["arguments"]) in CALLS
        assert got["message"]["content"] in (None, "")
    asked = {"messages": ASK, "max_tokens": 1000, **OFF, **fields, "stream": True}
    chunks = events(real.post("chat/completions", json=asked).text)
    pieces = [piece for chunk in chunks for one in chunk["choices"] for piece in one["delta"].get("tool_calls", ())]
    assert pieces[0]["id"]
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) in CALLS


def test_an_answer_matches_its_schema(real: httpx.Client) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS, "strict": True}}
    for got in choices(real, response_format=format, seed=2, logprobs=True):
        assert got["finish_reason"] == "stop"
        assert json.loads(got["message"]["content"]) in CALLS
        assert len(got["logprobs"]["content"]) > 4
    strict = [tool("get", strict=True), tool("now", strict=True)]
    for got in choices(real, response_format=format, tools=strict, parallel_tool_calls=False, n=2, seed=2):
        message = got["message"]
        called = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        assert got["finish_reason"] == ("tool_calls" if called else "stop")
        (text,) = called or [message["content"]]
        assert json.loads(text) in CALLS


def test_a_thought_comes_before_what_must_match(tmp_path_factory: pytest.TempPathFactory) -> None:
    service = speaking(tmp_path_factory.mktemp("thinks"), "deepseek-v3.1")
    end = service.tokenizer.encode(THINK_END, add_special_tokens=False)[0]
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS}}
    with serving(service) as address, httpx.Client(base_url=f"{address}/v1/", timeout=120) as http:
        fields = {"response_format": format, "thinking": {"type": "enabled"}, "seed": 3, "logit_bias": {str(end): 6}}
        (got,) = choices(http, **fields)
        assert json.loads(got["message"]["content"]) in CALLS
        assert got["message"]["reasoning_content"]


def test_the_client_parses_into_its_own_class(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Weather(BaseModel):
        hot: bool
        days: list[bool]

    service = speaking(tmp_path_factory.mktemp("parse"), "deepseek-v3.1")
    bracket = service.tokenizer.encode("]", add_special_tokens=False)[0]
    with (
        serving(service) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.parse(
            model=MODEL, messages=ASK, response_format=Weather, seed=1, max_tokens=1000, logit_bias={str(bracket): 8}
        )
        assert isinstance(answer.choices[0].message.parsed, Weather)


def test_strict_tools_leave_text_alone(v4: Talk) -> None:
    v4.said.texts = ["just text"]
    answer = v4.client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[tool("get", strict=True)], extra_body=OFF, temperature=0
    )
    assert answer.choices[0].message.content == "just text"


def test_a_format_that_can_shows_the_schema_to_the_model(v4: Talk) -> None:
    v4.said.texts = ["{}"]
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": PARAMETERS}}
    v4.http.post("chat/completions", json={"messages": ASK, "response_format": format})
    assert v4.said.prompts[-1] == FORMATS["deepseek-v4"].render(ASK, response_format=PARAMETERS)


def test_effort_beyond_max_is_max(v4: Talk) -> None:
    v4.http.post("chat/completions", json={"messages": ASK, "reasoning_effort": "ultra"})
    assert v4.said.prompts[-1] == FORMATS["deepseek-v4"].render(ASK, effort="max")


@pytest.mark.parametrize(
    ("fields", "message", "ending", "shown"),
    [
        (OFF, {"content": "```py\n"}, f"{THINK_END}```py\n", {"content": "said"}),
        ({}, {"content": "So: "}, f"{THINK}{THINK_END}So: ", {"content": "said"}),
        ({}, {"reasoning_content": "hm"}, f"{THINK}hm", {"reasoning_content": "said"}),
        ({}, {"content": "A", "reasoning_content": "hm"}, f"{THINK}hm{THINK_END}A", {"content": "said"}),
    ],
    ids=["without a thought", "an empty thought", "within a thought", "after a thought"],
)
def test_an_answer_is_gone_on_from(v4: Talk, fields: dict, message: dict, ending: str, shown: dict) -> None:
    v4.said.texts = ["said"]
    messages = [*ASK, {"role": "assistant", "prefix": True, **message}]
    answer = v4.http.post("chat/completions", json={"messages": messages, **fields}).json()
    got = answer["choices"][0]["message"]
    assert {name: got[name] for name in ("content", "reasoning_content") if got[name]} == shown
    assert v4.said.prompts[-1].endswith(ending)
    assert EOS not in v4.said.prompts[-1]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BEGUN = {"role": "assistant", "content": "a", "prefix": True}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "(?=a)b"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, None),
        ({"tools": [tool("get"), tool("get")]}, "tools.1.function.name"),
        ({"tools": [tool("get", strict=True, parameters={"anyOf": []})]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": SCHEMA}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [BEGUN]}, "messages.0.prefix"),
        ({"messages": [*ASK, BEGUN, *ASK]}, "messages.1.prefix"),
        ({"messages": [*ASK, {**BEGUN, "role": "user"}]}, "messages.1.prefix"),
        ({"messages": [*ASK, {**BEGUN, "tool_calls": [CALL]}]}, "messages.1.prefix"),
        ({"messages": [*ASK, {**BEGUN, "reasoning_content": "hm"}], **OFF}, "messages.1.reasoning_content"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(v4: Talk, fields: dict, param: str | None) -> None:
    answer = v4.http.post("chat/completions", json={"messages": ASK, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if param is not None:
        assert error["param"] == param, error
    assert ":" in error["message"]
