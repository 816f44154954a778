"""Anthropic's Messages API, through the official client and its own types."""

import json
from collections.abc import Iterator

import pytest
from pydantic import TypeAdapter

from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import THINK, THINK_END
from tests.serve.api.test_deepseek_chat import ANSWER, ARGUMENTS, THOUGHT, dsml
from tests.serve.deepseek import Talk, deepseek_checkpoint, talking
from tests.serve.live import MODEL

anthropic = pytest.importorskip("anthropic")
EVENT = TypeAdapter(anthropic.types.RawMessageStreamEvent)
TOOLS = [
    {
        "name": "get_weather",
        "description": "Weather.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "now", "input_schema": {"type": "object"}},
]
SPOKEN = f"{THOUGHT}{THINK_END}{ANSWER}{dsml('tool_calls')}"
ASK = {"model": MODEL, "max_tokens": 1000, "messages": [{"role": "user", "content": "Wie ist das Wetter?"}]}


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    with talking(deepseek_checkpoint(tmp_path_factory.mktemp("v4"), "deepseek-v4"), "deepseek-v4") as talk:
        yield talk


@pytest.fixture(scope="module")
def client(talk: Talk) -> Iterator["anthropic.Anthropic"]:
    with anthropic.Anthropic(base_url=talk.address, api_key="none", max_retries=0) as client:
        yield client


def whole(talk: Talk, **fields: object) -> dict:
    answer = talk.http.post("messages", json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    anthropic.types.Message.model_validate(answer.json(), strict=True)
    return answer.json()


def events(talk: Talk, **fields: object) -> list[dict]:
    """All events of a stream, each of them of the client's type and named as it is."""
    text = talk.http.post("messages", json={**ASK, **fields, "stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
    return found


def test_a_message_has_thought_text_and_calls(talk: Talk, client: "anthropic.Anthropic") -> None:
    talk.said.texts = [SPOKEN]
    answer = client.messages.create(**ASK, system="Be brief.", tools=TOOLS)
    thought, text, first, second = answer.content
    assert (thought.type, thought.thinking) == ("thinking", THOUGHT)
    assert (text.type, text.text) == ("text", ANSWER)
    assert (first.type, first.name, first.input) == ("tool_use", "get_weather", ARGUMENTS)
    assert (second.name, second.input) == ("now", {})
    assert answer.stop_reason == "tool_use"
    assert answer.usage.output_tokens == len(talk.said.ids(SPOKEN)) + 1
    messages = [{"role": "system", "content": "Be brief."}, *ASK["messages"]]
    functions = [
        {"name": tool["name"], "description": tool.get("description"), "parameters": tool["input_schema"]}
        for tool in TOOLS
    ]
    shown = [{k: v for k, v in function.items() if v is not None} for function in functions]
    tools = [{"type": "function", "function": function} for function in shown]
    assert talk.said.prompts[-1] == FORMATS["deepseek-v4"].render(messages, tools=tools)


@pytest.mark.parametrize("ids_per_step", [1, 7, 10_000])
def test_a_stream_adds_up_to_the_whole(talk: Talk, client: "anthropic.Anthropic", ids_per_step: int) -> None:
    talk.said.texts = [SPOKEN]
    expected = whole(talk, tools=TOOLS)
    talk.engine.ids_per_step = ids_per_step
    try:
        got = events(talk, tools=TOOLS)
        with client.messages.stream(**ASK, tools=TOOLS) as stream:
            final = stream.get_final_message()
    finally:
        talk.engine.ids_per_step = 1
    assert [got[0]["type"], got[-2]["type"], got[-1]["type"]] == ["message_start", "message_delta", "message_stop"]
    assert got[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert got[-2]["usage"] == expected["usage"]
    blocks = [block.to_dict() for block in final.content]
    for block, other in zip(blocks, expected["content"], strict=True):
        assert {**block, "id": 0} == {**other, "id": 0}
    starts = [event["index"] for event in got if event["type"] == "content_block_start"]
    stops = [event["index"] for event in got if event["type"] == "content_block_stop"]
    assert starts == stops == list(range(len(blocks)))


def test_a_tool_loop_is_one_conversation(talk: Talk, client: "anthropic.Anthropic") -> None:
    talk.said.texts = [SPOKEN]
    first = client.messages.create(**ASK, tools=TOOLS)
    uses = [block for block in first.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": uses[1].id, "content": [{"type": "text", "text": "noon"}]},
        {"type": "tool_result", "tool_use_id": uses[0].id, "content": "sunny", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "And now?"},
    ]
    messages = [*ASK["messages"], {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    talk.said.texts = [f"so{THINK_END}Fine."]
    second = client.messages.create(**{**ASK, "messages": messages}, tools=TOOLS)
    assert [block.type for block in second.content] == ["thinking", "text"]
    assert second.stop_reason == "end_turn"
    prompt = talk.said.prompts[-1]
    assert f"{THINK}{THOUGHT}{THINK_END}{ANSWER}" in prompt
    assert prompt.index("<tool_result>sunny") < prompt.index("<tool_result>noon") < prompt.index("And now?")


def test_why_an_answer_ended_is_said(talk: Talk) -> None:
    talk.said.texts = [f"hm{THINK_END}one two three"]
    cut = whole(talk, max_tokens=3)
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("max_tokens", None)
    stopped = whole(talk, stop_sequences=["never", " two"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " two")
    assert stopped["content"][-1]["text"] == "one"
    assert events(talk, stop_sequences=[" two"])[-2]["delta"]["stop_sequence"] == " two"


def test_thinking_is_switched(talk: Talk) -> None:
    talk.said.texts = ["plain"]
    for thinking, kind in (({"type": "enabled", "budget_tokens": 1024}, "thinking"), ({"type": "disabled"}, "text")):
        assert [block["type"] for block in whole(talk, thinking=thinking)["content"]] == [kind]


def test_an_answer_that_is_begun_is_gone_on_from(talk: Talk) -> None:
    talk.said.texts = [" world"]
    messages = [*ASK["messages"], {"role": "assistant", "content": "Hello"}]
    answer = whole(talk, messages=messages, thinking={"type": "disabled"})
    assert [block["text"] for block in answer["content"]] == [" world"]
    assert talk.said.prompts[-1].endswith(f"{THINK_END}Hello")


def test_tokens_are_counted_without_an_answer(talk: Talk, client: "anthropic.Anthropic") -> None:
    talk.said.texts = ["x"]
    counted = {"model": MODEL, "messages": ASK["messages"], "system": "Be brief.", "tools": TOOLS}
    count = client.messages.count_tokens(**counted)
    assert count.input_tokens == whole(talk, system="Be brief.", tools=TOOLS)["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
    ids=str,
)
def test_a_bad_field_is_named_in_the_envelope_of_this_api(talk: Talk, fields: dict, param: str) -> None:
    answer = talk.http.post("messages", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert ":" in error["message"]


def test_errors_reach_the_client_as_its_own_exceptions(client: "anthropic.Anthropic") -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(**{**ASK, "model": "another"})
    with pytest.raises(anthropic.BadRequestError, match="context"):
        client.messages.create(**{**ASK, "max_tokens": 2**31 - 1}, timeout=30)


def test_an_engine_that_fails_under_way_is_an_error_event(tmp_path_factory: pytest.TempPathFactory) -> None:
    left = [10**9]

    def before_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError

    directory = deepseek_checkpoint(tmp_path_factory.mktemp("fails"), "deepseek-v4")
    with talking(directory, "deepseek-v4", before_step) as talk:
        talk.said.texts = ["a long thought"]
        left[0] = 4
        text = talk.http.post("messages", json={**ASK, "stream": True}).text
        name, data = text.strip().split("\n\n")[-1].split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
