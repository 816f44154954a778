"""Chats in DeepSeek's formats, through the official client: thoughts, answers, tool calls, and the way back."""

import json
from collections.abc import Iterator

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import (
    BAR,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    EOS,
    THINK,
    THINK_END,
)
from tests.serve.deepseek import Talk, deepseek_checkpoint, talking
from tests.serve.live import MODEL, events, real_service, serving

ASK = [{"role": "user", "content": "Wie ist das Wetter?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather in a city – now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ENABLED, DISABLED = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}
THOUGHT, ANSWER = "I need 天気 🦊.\nSo I ask.", "Let me see – é"
ARGUMENTS = {"city": 'Zürich "HB" 🦊', "days": [1, None]}


def dsml(block: str) -> str:
    return (
        f'\n\n<{DSML}{block}>\n<{DSML}invoke name="get_weather">\n'
        f'<{DSML}parameter name="city" string="true">{ARGUMENTS["city"]}</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">{json.dumps(ARGUMENTS["days"])}</{DSML}parameter>\n'
        f'</{DSML}invoke>\n<{DSML}invoke name="now">\n</{DSML}invoke>\n</{DSML}{block}>'
    )


V31_CALLS = (
    f"{CALLS_BEGIN}{CALL_BEGIN}get_weather{CALL_SEPARATOR}{json.dumps(ARGUMENTS)}{CALL_END}"
    f"{CALL_BEGIN}now{CALL_SEPARATOR}{{}}{CALL_END}{CALLS_END}"
)
# What a model of each format says, the fields of the request that make it so, and whether it calls tools.
SPOKEN = {
    "deepseek-v4": (f"{THOUGHT}{THINK_END}{ANSWER}{dsml('tool_calls')}", {"tools": TOOLS}),
    "deepseek-v3.2": (f"{THOUGHT}{THINK_END}{ANSWER}{dsml('function_calls')}", {"tools": TOOLS, **ENABLED}),
    "deepseek-v3.1": (f"{ANSWER}{V31_CALLS}", {"tools": TOOLS}),
    "deepseek-r1": (f"{THOUGHT}\n{THINK_END}\n\n{ANSWER}", {}),
}


@pytest.fixture(scope="module", params=SPOKEN)
def spoken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Talk, str]]:
    directory = deepseek_checkpoint(tmp_path_factory.mktemp("spoken"), request.param)
    with talking(directory, request.param) as talk:
        yield talk, request.param


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """As published: only the tokens at the ends of a text are special."""
    with talking(deepseek_checkpoint(tmp_path_factory.mktemp("v4"), "deepseek-v4"), "deepseek-v4") as talk:
        yield talk


def whole(talk: Talk, **fields: object) -> dict:
    answer = talk.http.post("chat/completions", json={"messages": ASK, **fields})
    assert answer.status_code == 200, answer.text
    return ChatCompletion.model_validate(answer.json(), strict=True).to_dict()


def streamed(talk: Talk, **fields: object) -> dict:
    """The answer that the chunks add up to, in the shape of a whole one."""
    asked = {"messages": ASK, **fields, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(talk.http.post("chat/completions", json=asked).text)
    *parts, last = [ChatCompletionChunk.model_validate(chunk, strict=True).to_dict() for chunk in chunks]
    choices: dict[int, dict] = {}
    for part in parts:
        (choice,) = part["choices"]
        index, delta = choice["index"], choice["delta"]
        if index not in choices:
            assert delta["role"] == "assistant"
            choices[index] = {"reasoning_content": "", "content": "", "tool_calls": [], "finish_reason": None}
        so_far = choices[index]
        assert so_far["finish_reason"] is None
        assert "reasoning_content" in delta
        so_far["finish_reason"] = choice["finish_reason"]
        for name in ("reasoning_content", "content"):
            so_far[name] += delta.get(name) or ""
        for piece in delta.get("tool_calls", ()):
            add_call(so_far["tool_calls"], piece)
    return {"choices": [choices[index] for index in sorted(choices)], "usage": last["usage"]}


def add_call(calls: list[dict], piece: dict) -> None:
    """The first piece of a call has id, type and name; those after it have arguments only."""
    if piece["index"] == len(calls):
        assert (piece["type"], bool(piece["id"])) == ("function", True)
        calls.append({"name": piece["function"]["name"], "arguments": ""})
    else:
        assert set(piece) == {"index", "function"}
        assert set(piece["function"]) == {"arguments"}
        assert piece["index"] == len(calls) - 1
    calls[-1]["arguments"] += piece["function"]["arguments"]


def flat(choice: dict) -> dict:
    """A whole choice as `streamed` gives it."""
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    return {
        "reasoning_content": message["reasoning_content"] or "",
        "content": message["content"] or "",
        "tool_calls": [call["function"] for call in calls],
        "finish_reason": choice["finish_reason"],
    }


def test_a_client_gets_thought_answer_and_calls(spoken: tuple[Talk, str]) -> None:
    talk, name = spoken
    text, fields = SPOKEN[name]
    talk.said.texts = [text]
    answer = talk.client.chat.completions.create(model=MODEL, messages=ASK, extra_body=fields)
    message = answer.choices[0].message
    assert message.content == ANSWER
    assert message.reasoning_content == (THOUGHT if THINK_END in text else None)
    calls = [(call.type, call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    assert calls == ([("function", "get_weather", ARGUMENTS), ("function", "now", {})] if "tools" in fields else [])
    assert answer.choices[0].finish_reason == ("tool_calls" if calls else "stop")
    usage = answer.usage
    assert usage.completion_tokens == len(talk.said.ids(text)) + 1
    thought = talk.said.ids(THOUGHT) if THINK_END in text else []
    assert usage.completion_tokens_details.reasoning_tokens == len(thought)


def test_a_stream_adds_up_to_the_whole_however_it_is_split(spoken: tuple[Talk, str]) -> None:
    talk, name = spoken
    text, fields = SPOKEN[name]
    talk.said.texts = [text]
    expected = whole(talk, **fields)
    for ids_per_step in (1, 2, 3, 5, 17, 10_000):
        talk.engine.ids_per_step = ids_per_step
        got = streamed(talk, **fields)
        assert got["choices"] == [flat(choice) for choice in expected["choices"]], ids_per_step
        if ids_per_step == 1:
            assert got["usage"] == expected["usage"]
    talk.engine.ids_per_step = 1


def test_an_answer_cut_anywhere_gives_what_there_is_and_no_tag(spoken: tuple[Talk, str]) -> None:
    talk, name = spoken
    text, fields = SPOKEN[name]
    talk.said.texts = [text]
    full = flat(whole(talk, **fields)["choices"][0])
    for length in range(1, len(talk.said.ids(text)) + 1):
        cut = flat(whole(talk, **fields, max_tokens=length)["choices"][0])
        assert cut["finish_reason"] == "length"
        for name in ("reasoning_content", "content"):
            assert BAR not in cut[name]
            assert full[name].startswith(cut[name].rstrip("\N{REPLACEMENT CHARACTER}\n<")), length
        for before, after in zip(cut["tool_calls"], full["tool_calls"], strict=False):
            assert after["arguments"].startswith(before["arguments"].rstrip("\N{REPLACEMENT CHARACTER}"))


def test_each_choice_has_a_parser_of_its_own(v4: Talk) -> None:
    v4.said.texts = [f"one{THINK_END}1", f"two{THINK_END}{dsml('tool_calls')}", "three, without an end"]
    fields = {"n": 3, "tools": TOOLS}
    answer = whole(v4, **fields)
    got = [flat(choice) for choice in answer["choices"]]
    assert [choice["reasoning_content"] for choice in got] == ["one", "two", "three, without an end"]
    assert [choice["content"] for choice in got] == ["1", "", ""]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["1", None, ""]
    assert [choice["finish_reason"] for choice in got] == ["stop", "tool_calls", "stop"]
    assert streamed(v4, **fields)["choices"] == got


def test_a_tool_loop_is_rendered_as_the_format_says(v4: Talk) -> None:
    """What the server answered is sent back as the client keeps it, with the results in another order."""
    v4.said.texts = [f"hm{THINK_END}{dsml('tool_calls')}"]
    system = {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}
    messages: list[dict] = [system, {"role": "latest_reminder", "content": "It is noon."}, *ASK]
    padded = [{**tool, "function": {**tool["function"], "parameters": None, "strict": False}} for tool in TOOLS]
    padded[0]["function"]["parameters"] = TOOLS[0]["function"]["parameters"]
    asked = {"model": MODEL, "tools": padded, "tool_choice": "auto", "parallel_tool_calls": True}
    message = v4.client.chat.completions.create(messages=messages, **asked).choices[0].message
    messages.append(message.model_dump())
    for call, result in reversed(list(zip(message.tool_calls, ("sunny", "noon"), strict=True))):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    v4.said.texts = [f"so{THINK_END}Fine."]
    second = v4.client.chat.completions.create(messages=messages, **asked).choices[0].message
    assert (second.content, second.reasoning_content, second.tool_calls) == ("Fine.", "so", None)
    prompt = v4.said.prompts[-1]
    assert prompt == FORMATS["deepseek-v4"].render(messages, tools=TOOLS)
    assert f"{THINK}hm{THINK_END}{dsml('tool_calls').partition('invoke')[0]}" in prompt
    assert prompt.index("<tool_result>sunny</tool_result>") < prompt.index("<tool_result>noon</tool_result>")
    assert prompt.startswith(f"{BOS}Be\n\nbrief.\n\n## Tools")


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        (ENABLED, True),
        (DISABLED, False),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False, "thinking": None}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, **ENABLED, "reasoning_effort": "max"}, True),
        ({"reasoning_effort": "none", **DISABLED, "chat_template_kwargs": {"thinking": False}}, False),
    ],
    ids=json.dumps,
)
def test_thinking_can_be_switched_in_several_ways(v4: Talk, fields: dict, thinks: bool) -> None:
    v4.said.texts = ["plain"]
    message = whole(v4, **fields)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (("", "plain") if thinks else ("plain", None))
    assert v4.said.prompts[-1].endswith(THINK if thinks else THINK_END)


@pytest.mark.parametrize("name", ["deepseek-v4", "deepseek-v4-0731"])
def test_effort_becomes_the_nearest_level_of_the_format(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    low = "low" if name.endswith("0731") else "high"
    levels = {"minimal": low, "low": low, "medium": "high", "high": "high", "xhigh": "high", "max": "max"}
    with talking(deepseek_checkpoint(tmp_path_factory.mktemp("effort"), name), name) as talk:
        for asked, written in levels.items():
            whole(talk, reasoning_effort=asked)
            assert talk.said.prompts[-1] == FORMATS[name].render(ASK, effort=written), asked


def test_without_tools_a_call_is_text(v4: Talk) -> None:
    call = dsml("tool_calls")
    v4.said.texts = [f"hm{THINK_END}{call}"]
    for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = whole(v4, **fields)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (call, "stop")
        assert v4.said.prompts[-1] == FORMATS["deepseek-v4"].render(ASK)
    described = whole(v4, tool_choice="auto")["choices"][0]  # the messages may describe tools themselves
    assert [call["function"]["name"] for call in described["message"]["tool_calls"]] == ["get_weather", "now"]


@pytest.mark.parametrize("ending", ["1 <", "1\n\n", f"1\n\n<{DSML}tool_calls"], ids=["bracket", "lines", "cut tag"])
def test_what_was_held_back_comes_with_the_end(v4: Talk, ending: str) -> None:
    for prefix, name in ((f"hm{THINK_END}", "content"), ("hm", "reasoning_content")):
        v4.said.texts = [prefix + ending]
        got = flat(whole(v4, tools=TOOLS)["choices"][0])
        kept = "1" if DSML in ending else ending
        assert got[name] == (kept if name == "content" else f"hm{kept}")
        assert streamed(v4, tools=TOOLS)["choices"] == [got]


def test_a_stop_string_ends_a_thought_too(v4: Talk) -> None:
    v4.said.texts = [f"one two three{THINK_END}four"]
    choice = whole(v4, stop=[" three"])["choices"][0]
    assert flat(choice) == {"reasoning_content": "one two", "content": "", "tool_calls": [], "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("fields", "arguments", "reason"),
    [
        ({"stop": ["Par"]}, '{"city": "', "stop"),
        ({"stop": [f"</{DSML}"]}, '{"city": "Paris', "stop"),
        ({}, '{"city": "Paris"', "stop"),
        ({"stop": [" the end"]}, '{"city": "Paris"}', "tool_calls"),
    ],
    ids=["stop string", "stop string at the tag", "end token", "after the call"],
)
def test_a_call_that_is_cut_open_is_not_to_be_made(v4: Talk, fields: dict, arguments: str, reason: str) -> None:
    parameter = f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>'
    begun = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{parameter}'
    v4.said.texts = [f"{THINK_END}{begun}"]
    if reason == "tool_calls":
        v4.said.texts[0] += f"\n</{DSML}invoke>\n</{DSML}tool_calls> the end"
    got = flat(whole(v4, tools=TOOLS, **fields)["choices"][0])
    assert got["tool_calls"] == [{"name": "f", "arguments": arguments}]
    assert got["finish_reason"] == reason
    assert streamed(v4, tools=TOOLS, **fields)["choices"] == [got]


def test_tags_that_decoding_would_hide_are_seen_all_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    special = (BOS, EOS, THINK, THINK_END, DSML)
    directory = deepseek_checkpoint(tmp_path_factory.mktemp("hidden"), "deepseek-v4", special=special)
    text, fields = SPOKEN["deepseek-v4"]
    with talking(directory, "deepseek-v4") as talk:
        talk.said.texts = [text]
        got = flat(whole(talk, **fields)["choices"][0])
        assert (got["reasoning_content"], got["content"], len(got["tool_calls"])) == (THOUGHT, ANSWER, 2)
        assert streamed(talk, **fields)["choices"] == [got]
        completed = talk.http.post("completions", json={"prompt": "x", "max_tokens": 999}).json()
        assert DSML not in completed["choices"][0]["text"]
        visible = {"prompt": "x", "max_tokens": 999, "skip_special_tokens": False}
        raw = talk.http.post("completions", json=visible).json()
        assert raw["choices"][0]["text"] == text  # the token that ends it is no part of it


def test_a_real_model_streams_what_it_answers_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random weights say anything at all, tags included; with logprobs there is a row for every token."""
    directory = deepseek_checkpoint(tmp_path_factory.mktemp("real"), "deepseek-v4", special=(BOS, EOS, THINK_END))
    with (
        serving(real_service(directory, max_batch=4)) as address,
        httpx.Client(base_url=f"{address}/v1/", timeout=60) as http,
    ):
        for seed in range(3):
            asked = {"messages": ASK, "seed": seed, "max_tokens": 30, "n": 2, "temperature": 2, "logprobs": True}
            answer = http.post("chat/completions", json=asked).json()
            chunks = events(http.post("chat/completions", json={**asked, "stream": True}).text)
            for index, choice in enumerate(answer["choices"]):
                parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
                for name in ("reasoning_content", "content"):
                    text = "".join(part["delta"].get(name) or "" for part in parts)
                    assert text == (choice["message"][name] or "")
                rows = [row for part in parts if part["logprobs"] for row in part["logprobs"]["content"]]
                assert rows == choice["logprobs"]["content"]
            generated = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
            assert generated == answer["usage"]["completion_tokens"]
            assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= generated
