"""The Responses API, through the official client and its own types."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from daedal.serve.state.stored import StoredResponse, StoredResponses
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import THINK_END
from tests.serve.api.test_deepseek_chat import ANSWER, ARGUMENTS, THOUGHT, dsml
from tests.serve.deepseek import Talk, deepseek_checkpoint, talking
from tests.serve.live import MODEL

EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "function", "name": "now"},
]
SPOKEN = f"{THOUGHT}{THINK_END}{ANSWER}{dsml('tool_calls')}"


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    with talking(deepseek_checkpoint(tmp_path_factory.mktemp("v4"), "deepseek-v4"), "deepseek-v4") as talk:
        yield talk


def created(talk: Talk, **fields: object) -> dict:
    answer = talk.http.post("responses", json={"input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json(), strict=True)
    return answer.json()


def events(talk: Talk, **fields: object) -> list[dict]:
    """All events of a stream, each of them of the client's type and named as it is."""
    text = talk.http.post("responses", json={"input": "hi", **fields, "stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(items: list[dict]) -> list[dict]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_a_response_has_thought_text_and_calls(talk: Talk) -> None:
    talk.said.texts = [SPOKEN]
    answer = talk.client.responses.create(
        model=MODEL, input="Wie ist das Wetter?", tools=TOOLS, instructions="Be brief."
    )
    assert answer.output_text == ANSWER
    thought, message, first, second = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", THOUGHT)
    assert (message.type, message.status) == ("message", "completed")
    assert (first.name, json.loads(first.arguments)) == ("get_weather", ARGUMENTS)
    assert (second.name, json.loads(second.arguments)) == ("now", {})
    assert answer.status == "completed"
    assert answer.usage.output_tokens == len(talk.said.ids(SPOKEN)) + 1
    assert answer.usage.output_tokens_details.reasoning_tokens == len(talk.said.ids(THOUGHT))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie ist das Wetter?"}]
    functions = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
    assert talk.said.prompts[-1] == FORMATS["deepseek-v4"].render(messages, tools=functions)


@pytest.mark.parametrize("ids_per_step", [1, 7, 10_000])
def test_a_stream_adds_up_to_the_whole(talk: Talk, ids_per_step: int) -> None:
    talk.said.texts = [SPOKEN]
    whole = created(talk, tools=TOOLS)
    talk.engine.ids_per_step = ids_per_step
    try:
        got = events(talk, tools=TOOLS)
    finally:
        talk.engine.ids_per_step = 1
    assert [event["type"] for event in got[:2]] == ["response.created", "response.in_progress"]
    assert got[-1]["type"] == "response.completed"
    response = got[-1]["response"]
    assert without_ids(response["output"]) == without_ids(whole["output"])
    assert response["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    if ids_per_step == 1:
        assert response["usage"] == whole["usage"]
    done = [event["item"] for event in got if event["type"] == "response.output_item.done"]
    assert done == response["output"]
    for index, item in enumerate(done):
        grown = "".join(event["delta"] for event in got if "delta" in event and event["output_index"] == index)
        assert grown == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_the_client_follows_a_stream(talk: Talk) -> None:
    talk.said.texts = [f"hm{THINK_END}one two"]
    with talk.client.responses.stream(model=MODEL, input="hi") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == "one two"


def test_a_conversation_goes_on_from_a_stored_response(talk: Talk) -> None:
    talk.said.texts = [SPOKEN]
    first = talk.client.responses.create(model=MODEL, input="Wie ist das Wetter?", tools=TOOLS)
    calls = [item for item in first.output if item.type == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": one.call_id, "output": text}
        for one, text in zip(calls, ("sunny", "noon"), strict=True)
    ]
    talk.said.texts = [f"so{THINK_END}Fine."]
    second = talk.client.responses.create(model=MODEL, input=results, previous_response_id=first.id, tools=TOOLS)
    assert second.output_text == "Fine."
    by_id = talk.said.prompts[-1]
    assert f"{THOUGHT}{THINK_END}{ANSWER}" in by_id
    assert "<tool_result>sunny</tool_result>" in by_id
    sent = [{"role": "user", "content": "Wie ist das Wetter?"}, *(item.to_dict() for item in first.output), *results]
    talk.client.responses.create(model=MODEL, input=sent, tools=TOOLS)
    assert talk.said.prompts[-1] == by_id, "sent wholly it is the same conversation"
    assert talk.client.responses.retrieve(first.id).output_text == ANSWER
    talk.client.responses.delete(first.id)
    for name, status in ((first.id, 404), (second.id, 200)):
        assert talk.http.post("responses", json={"input": "x", "previous_response_id": name}).status_code == status
    hidden = created(talk, store=False)
    assert talk.http.get(f"responses/{hidden['id']}").status_code == 404


def test_an_answer_that_is_cut_is_incomplete(talk: Talk) -> None:
    talk.said.texts = [f"hm{THINK_END}one two three"]
    answer = created(talk, max_output_tokens=len(talk.said.ids(f"hm{THINK_END}one")))
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][-1]["status"] == "incomplete"
    last = events(talk, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"


def test_tokens_are_counted_without_an_answer(talk: Talk) -> None:
    whole = created(talk, instructions="Be brief.")
    count = talk.client.responses.input_tokens.count(model=MODEL, input="hi", instructions="Be brief.")
    assert count.input_tokens == whole["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 2**31}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(talk: Talk, fields: dict, param: str) -> None:
    answer = talk.http.post("responses", json={"input": "hi", **fields})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert ":" in error["message"]


def test_an_engine_that_fails_under_way_fails_the_response(tmp_path_factory: pytest.TempPathFactory) -> None:
    left = [10**9]

    def before_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError

    directory = deepseek_checkpoint(tmp_path_factory.mktemp("fails"), "deepseek-v4")
    with talking(directory, "deepseek-v4", before_step) as talk:
        talk.said.texts = ["a long thought"]
        left[0] = 4
        last = events(talk)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] == "server_error"
        left[0] = 4
        with pytest.raises(openai.InternalServerError):
            talk.client.responses.create(model=MODEL, input="hi")


def test_what_is_stored_stays_within_its_bound() -> None:
    stored = StoredResponses(max_bytes=1000)
    for number in range(20):
        stored.put(str(number), StoredResponse(response={"id": "x" * 100}, messages=[]))
    assert 0 < stored.num_bytes <= 1000
    assert stored.get("19") is not None
    assert stored.get("0") is None
    stored.put("large", StoredResponse(response={"id": "x" * 2000}, messages=[]))
    assert stored.get("large") is None
    stored.put("own", StoredResponse(response={}, messages=[], owner="a"))
    assert stored.get("own") is None
    assert not stored.drop("own", "b")
    assert stored.drop("own", "a")


def test_paths_know_their_methods(talk: Talk) -> None:
    for method, path, status in (("GET", "responses", 405), ("PUT", "responses/x", 405), ("GET", "responses/x", 404)):
        answer: httpx.Response = talk.http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
