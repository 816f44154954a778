"""Prompts of DeepSeek's formats: byte for byte what the published encoders and templates make; all else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.errors import TemplateError
from daedal.text.encodings.formats import FORMATS
from daedal.text.encodings.tokens import ASSISTANT, BOS, THINK, THINK_END, USER

VECTORS = Path(__file__).parent / "vectors"
GENERATED = [
    pytest.param(name, case, id=f"{name}: {case['name']}")
    for name in FORMATS
    for case in json.loads((VECTORS / "generated" / f"{name}.json").read_text(encoding="utf-8"))
]
HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def call(id: str = "a", name: object = "f", arguments: object = "{}") -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: object) -> dict[str, object]:
    return {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": list(calls)}


def result(id: str, content: str = "1") -> dict[str, object]:
    return {"role": "tool", "tool_call_id": id, "content": content}


@pytest.mark.parametrize(("name", "case"), GENERATED)
def test_prompts_are_those_of_the_reference(name: str, case: dict[str, Any]) -> None:
    settings = {key: value for key, value in case.items() if key not in ("name", "messages", "prompt")}
    assert FORMATS[name].render(case["messages"], **settings) == case["prompt"]


@pytest.mark.parametrize(
    ("folder", "case", "thinking"),
    [
        ("deepseek-v4", "_1", True),
        ("deepseek-v4", "_2", True),
        ("deepseek-v4", "_3", True),
        ("deepseek-v4", "_4", False),
        ("deepseek-v3.2", "", True),
    ],
)
def test_the_published_cases(folder: str, case: str, thinking: bool) -> None:
    given = json.loads((VECTORS / folder / f"input{case}.json").read_text(encoding="utf-8"))
    messages, tools = (given["messages"], given["tools"]) if isinstance(given, dict) else (given, None)
    expected = (VECTORS / folder / f"output{case}.txt").read_text(encoding="utf-8").rstrip("\n")
    assert FORMATS[folder].render(messages, tools=tools, thinking=thinking) == expected


def test_how_thinking_is_chosen() -> None:
    def end(name: str, **settings: Any) -> str:
        return FORMATS[name].render([HELLO], **settings).partition("Hello")[2]

    opened, closed = ASSISTANT + THINK, ASSISTANT + THINK_END
    assert end("deepseek-v3") == end("deepseek-v3", thinking=False) == ASSISTANT
    assert end("deepseek-r1") == end("deepseek-r1", thinking=True) == opened + "\n"
    assert end("deepseek-v3.1") == end("deepseek-v3.2") == end("deepseek-v4", thinking=False) == closed
    assert end("deepseek-v4") == end("deepseek-v3.1", thinking=True) == end("deepseek-v3.2", enable_thinking=True)
    assert end("deepseek-v4") == opened
    assert end("deepseek-v4", enable_thinking=False) == closed


def test_without_a_generation_prompt_the_last_question_stays_open() -> None:
    for name in ("deepseek-v3.1", "deepseek-v3.2", "deepseek-v4"):
        text = FORMATS[name].render([HELLO], add_generation_prompt=False)
        assert text == f"{BOS}{USER}Hello"
    looked = [HELLO, calling(call()), result("a")]
    text = FORMATS["deepseek-v3.2"].render(looked, thinking=True, add_generation_prompt=False)
    assert text.endswith("</function_results>")


def test_what_is_equal_in_openais_shape_is_equal_in_the_prompt() -> None:
    v4 = FORMATS["deepseek-v4"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert v4.render(parts) == v4.render([{"role": "user", "content": "a\n\nb"}])
    as_text, as_object = calling(call(arguments='{"x":  1}')), calling(call(arguments={"x": 1}))
    assert v4.render([HELLO, as_text, result("a")]) == v4.render([HELLO, as_object, result("a")])
    nothing = [v4.render([HELLO, calling(call(arguments=empty)), result("a")]) for empty in ("{}", "", None)]
    assert len(set(nothing)) == 1
    other = {key if key != "reasoning_content" else "reasoning": value for key, value in as_text.items()}
    assert v4.render([HELLO, other, result("a")]) == v4.render([HELLO, as_text, result("a")])


def test_definitions_of_the_request() -> None:
    for name in ("deepseek-v3.2", "deepseek-v4"):
        render = FORMATS[name].render
        own = {"role": "system", "content": "S", "tools": [TOOL], "response_format": {"a": 1}}
        bare = {"role": "system", "content": "S"}
        with_own = render([own, HELLO])
        assert render([bare, HELLO], tools=[TOOL], response_format={"a": 1}) == with_own
        other = {"type": "function", "function": {**TOOL["function"], "name": "g"}}
        assert '"name": "f"' not in render([own, HELLO], tools=[other])
        assert render([HELLO], tools=[TOOL]) == render([{"role": "system", "content": ""}, HELLO], tools=[TOOL])


REFUSALS: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("deepseek-v3", [HELLO], {"thinking": True}, "deepseek-v3 does not think: leave thinking out"),
    ("deepseek-r1", [HELLO], {"thinking": False}, "deepseek-r1 always thinks: leave thinking out"),
    ("deepseek-v3", [HELLO], {"effort": "max"}, "deepseek-v3 has no levels of effort"),
    ("deepseek-v3.2", [HELLO], {"reasoning_effort": "high"}, "deepseek-v3.2 has no levels of effort"),
    ("deepseek-v4", [HELLO], {"effort": "low"}, "effort is 'low', deepseek-v4 knows high, max"),
    ("deepseek-v4-0731", [HELLO], {"effort": 3}, "effort is 3, deepseek-v4-0731 knows low, high, max"),
    ("deepseek-v3", [HELLO], {"tools": [TOOL]}, "deepseek-v3 has no text for tools"),
    ("deepseek-v3.1", [HELLO], {"tools": [TOOL], "thinking": True}, "uses tools only without thinking"),
    ("deepseek-v4", [HELLO], {"thinking": "yes"}, "thinking is 'yes': give true or false"),
    ("deepseek-v4", [HELLO], {"thinking": True, "enable_thinking": False}, "contradict each other"),
    ("deepseek-v4", [HELLO], {"colour": "red", "shade": 1}, "knows no variable colour, shade"),
    ("deepseek-v3.2", [HELLO], {"drop_thinking": False}, "knows no variable drop_thinking"),
    ("deepseek-v4", [HELLO], {"tools": "f"}, "tools is 'f': give a list of tool definitions"),
    (
        "deepseek-v4",
        [HELLO],
        {"tools": [{"type": "web_search"}]},
        r"tools\[0\] is 'web_search': give objects of the type",
    ),
    ("deepseek-v4", [HELLO], {"tools": [{"function": {"name": ""}}]}, r"tools\[0\]\.function\.name is ''"),
    ("deepseek-v4", [HELLO], {"response_format": {"x": float("nan")}}, "cannot be written as JSON"),
    ("deepseek-v4", [], {}, "messages are empty"),
    (
        "deepseek-v4",
        [{"role": "judge", "content": "x"}],
        {},
        r"messages\[0\]\.role is 'judge', deepseek-v4 knows assistant",
    ),
    ("deepseek-v3", [{"role": "developer", "content": "x"}], {}, "knows assistant, system, tool, user"),
    ("deepseek-v4", [{"role": "user", "content": None, "name": "n"}], {}, r"messages\[0\] has no content"),
    (
        "deepseek-v4",
        [{"role": "user", "content": [{"type": "image_url"}]}],
        {},
        r"content\[0\] is of the type 'image_url'",
    ),
    (
        "deepseek-v4",
        [{**HELLO, "tools": [TOOL]}],
        {},
        "is of the role user: tools belongs to the role system or developer",
    ),
    ("deepseek-v4", [{**HELLO, "task": "sing"}], {}, r"messages\[0\]\.task is 'sing', deepseek-v4 knows action, query"),
    ("deepseek-v3.2", [{**HELLO, "task": "query"}], {}, "task has no place in deepseek-v3.2"),
    ("deepseek-v3", [HELLO, {"role": "assistant", "content": "a", "prefix": True}], {}, "prefix has no place"),
    ("deepseek-v4", [{"role": "developer", "content": ""}], {}, "of the role developer and empty"),
    ("deepseek-v4", [HELLO, calling("f")], {}, r"tool_calls\[0\] is 'f'"),
    ("deepseek-v4", [HELLO, calling(call(name=1))], {}, r"tool_calls\[0\]\.function\.name is 1"),
    ("deepseek-v4", [HELLO, calling(call(arguments="[1]"))], {}, "arguments holds a JSON list: give a JSON object"),
    ("deepseek-v4", [HELLO, calling(call(arguments="{"))], {}, "arguments is not JSON"),
    ("deepseek-v4", [HELLO, calling(call(arguments=3))], {}, "arguments is 3: give a JSON object"),
    ("deepseek-v4", [HELLO, calling(call(arguments="[" * 9999))], {}, "arguments is not JSON"),
    ("deepseek-v4", [HELLO, calling(call(arguments='{"a":' * 99 + "1" + "}" * 99))], {}, "nested deeper than 64"),
    ("deepseek-v4", [HELLO, {**calling(), "tool_calls": 3}], {}, "tool_calls is 3: give a list"),
    ("deepseek-v4", [HELLO, result("a")], {}, r"messages\[1\] answers no tool call"),
    ("deepseek-v4", [HELLO, calling(call(), call("b")), result("a"), result("z")], {}, "tool_call_id is 'z', no call"),
    ("deepseek-v4", [HELLO, {**HELLO, "task": "query"}], {}, "task is set after another user message"),
    ("deepseek-v3.2", [HELLO, result("a")], {}, r"messages\[1\] answers no tool call"),
    ("deepseek-v3.2", [HELLO, calling(call()), result("a"), result("a")], {}, r"messages\[3\] answers no tool call"),
    ("deepseek-v3.2", [HELLO, calling(call(), call("b")), result("a")], {}, "end after 1 of 2 tool results"),
    ("deepseek-v3.2", [HELLO, calling(call(), call("b")), result("a"), HELLO], {}, "comes after 1 of 2 tool results"),
    ("deepseek-v3.2", [HELLO, {"role": "assistant", "content": "a"}], {"thinking": True}, "without a thought"),
]


@pytest.mark.parametrize(("name", "messages", "settings", "message"), REFUSALS)
def test_what_a_format_has_no_place_for_is_refused(
    name: str, messages: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        FORMATS[name].render(messages, **settings)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
KEYS = ("content", "reasoning_content", "tool_calls", "tool_call_id", "tools", "response_format", "task", "prefix", "x")
MESSAGE = st.tuples(st.sampled_from(ROLES), st.dictionaries(st.sampled_from(KEYS), JSON | st.text(), max_size=4)).map(
    lambda pair: {"role": pair[0], **pair[1]}
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(FORMATS)),
    messages=st.lists(MESSAGE, max_size=5),
    variables=st.dictionaries(
        st.sampled_from(("tools", "thinking", "effort", "response_format", "x")), JSON, max_size=2
    ),
)
def test_hostile_conversations_end_in_text_or_in_one_sentence(
    name: str, messages: list[Any], variables: dict[str, Any]
) -> None:
    try:
        text = FORMATS[name].render(messages, **variables)
    except TemplateError as error:
        text = f"{BOS}{error}"
    assert text.startswith(BOS)
