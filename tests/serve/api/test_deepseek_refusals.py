"""What a chat format has no place for is refused with 400, and the field that brought it is named."""

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from daedal.infer.request import Request
from daedal.serve.api.chat_protocol import MAX_TOOLS, MAX_TOOLS_CHARS
from daedal.text.tokenizer import Tokenizer
from tests.serve.deepseek import deepseek_checkpoint, talking
from tests.serve.live import ScriptedEngine, scripted_service, serving
from tests.tiny import tiny_checkpoint

HELLO = {"role": "user", "content": "hi"}
ENABLED, DISABLED = {"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}


def tool(**function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **function}}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"properties": schema}
    return schema


def call(**function: object) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


# Malformed for any format.
MALFORMED: list[tuple[str, dict[str, object], str]] = [
    ("tools as an object", {"tools": tool()}, "tools"),
    ("a tool as text", {"tools": ["f"]}, "tools.0"),
    ("a tool without a function", {"tools": [{"type": "function"}]}, "tools.0.function"),
    ("a tool of another type", {"tools": [{"type": "web_search", "function": {"name": "f"}}]}, "tools.0.type"),
    ("a function without a name", {"tools": [tool(), {"type": "function", "function": {}}]}, "tools.1.function.name"),
    ("a name with a quote", {"tools": [tool(name='f"><')]}, "tools.0.function.name"),
    ("a name that is too long", {"tools": [tool(name="f" * 129)]}, "tools.0.function.name"),
    ("a description of another type", {"tools": [tool(description=5)]}, "tools.0.function.description"),
    ("parameters as a list", {"tools": [tool(parameters=[])]}, "tools.0.function.parameters"),
    ("too many tools", {"tools": [tool()] * (MAX_TOOLS + 1)}, "tools"),
    ("tools that are too long", {"tools": [tool(description="x" * MAX_TOOLS_CHARS)]}, "tools"),
    ("a schema that is too deep", {"tools": [tool(parameters=nested(70))]}, "tools"),
    ("a schema deeper than Python's stack", {"tools": [tool(parameters=nested(900))]}, None),
    ("strict as text", {"tools": [tool(strict="yes")]}, "tools.0.function.strict"),
    ("a call that must be made of nothing", {"tool_choice": "required"}, "tool_choice"),
    ("a prefix as text", {"messages": [HELLO, {**HELLO, "prefix": "yes"}]}, "messages.1.prefix"),
    ("a choice of another type", {"tool_choice": 5}, "tool_choice"),
    ("thinking as a truth value", {"thinking": True}, "thinking"),
    ("thinking of another kind", {"thinking": {"type": "auto"}}, "thinking.type"),
    ("thinking without a kind", {"thinking": {}}, "thinking.type"),
    ("thinking by a budget", {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ("an unknown effort", {"reasoning_effort": "extreme"}, "reasoning_effort"),
    ("effort as a number", {"reasoning_effort": 3}, "reasoning_effort"),
    ("variables as a list", {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ("a switch as text", {"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
    ("a variable of the server", {"chat_template_kwargs": {"effort": "max"}}, "chat_template_kwargs"),
    ("yes and no", {**ENABLED, "chat_template_kwargs": {"thinking": False}}, "chat_template_kwargs"),
    ("no and yes", {"chat_template_kwargs": {"thinking": False, "enable_thinking": True}}, "chat_template_kwargs"),
    ("thinking without effort", {**ENABLED, "reasoning_effort": "none"}, "reasoning_effort"),
    (
        "effort twice",
        {"reasoning_effort": "max", "chat_template_kwargs": {"reasoning_effort": "high"}},
        "reasoning_effort",
    ),
    ("reasoning as a list", {"messages": [{**HELLO, "reasoning_content": []}]}, "messages.0.reasoning_content"),
    ("calls as an object", {"messages": [HELLO, {**HELLO, "tool_calls": {}}]}, "messages.1.tool_calls"),
    ("a call id as a number", {"messages": [{**HELLO, "tool_call_id": 1}]}, "messages.0.tool_call_id"),
    ("a task", {"messages": [{**HELLO, "task": "title"}]}, "messages.0.task"),
    ("special tokens as text", {"skip_special_tokens": "no"}, "skip_special_tokens"),
]
# Well formed, and yet nothing that the format has.
UNFIT: list[tuple[str, dict[str, object], str]] = [
    ("deepseek-v4", {"messages": [call(name="f", arguments="[1]"), HELLO]}, "messages"),
    ("deepseek-v4", {"messages": [call(name="f", arguments="{")]}, "messages"),
    ("deepseek-v4", {"messages": [call(arguments="{}")]}, "messages"),
    ("deepseek-v4", {"messages": [call(name="f", arguments=r'{"a": "\ud800"}'), HELLO]}, "messages"),
    ("deepseek-v4", {"messages": [call(name="f", arguments=r'{"\ud800": 1}'), HELLO]}, "messages"),
    ("deepseek-v4", {"messages": [HELLO, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ("deepseek-v4", {"messages": [{**HELLO, "tool_calls": [{"function": {"name": "f"}}]}]}, "messages"),
    ("deepseek-v4", {"chat_template_kwargs": {"mood": "good"}}, "chat_template_kwargs"),
    ("deepseek-v4", {"chat_template_kwargs": {"drop_thinking": 3}}, "chat_template_kwargs"),
    ("deepseek-v4", {"chat_template_kwargs": {"response_format": 3}}, "chat_template_kwargs"),
    ("deepseek-v4", {"chat_template_kwargs": {"reasoning_effort": "xhigh"}}, "chat_template_kwargs"),
    ("deepseek-v3.2", {"messages": [{"role": "latest_reminder", "content": "x"}, HELLO]}, "messages"),
    ("deepseek-v3.2", {"reasoning_effort": "high"}, "reasoning_effort"),
    ("deepseek-v3.1", {"messages": [{"role": "developer", "content": "x"}, HELLO]}, "messages"),
    ("deepseek-v3.1", {"tools": [tool()], **ENABLED}, "tools"),
    ("deepseek-r1", {"tools": [tool()]}, "tools"),
    ("deepseek-r1", DISABLED, "thinking"),
    ("deepseek-r1", {"reasoning_effort": "none"}, "reasoning_effort"),
    ("deepseek-v3", {"tools": [tool()]}, "tools"),
    ("deepseek-v3", {"reasoning_effort": "low"}, "reasoning_effort"),
    ("deepseek-v3", ENABLED, "thinking"),
    ("deepseek-v3", {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
]
FITTING: list[tuple[str, dict[str, object]]] = [
    ("deepseek-v4", {"messages": [{"role": "developer", "content": "x"}, {"role": "latest_reminder", "content": "y"}]}),
    ("deepseek-v4", {"tools": [tool(strict=None, description=None)], "tool_choice": None, "parallel_tool_calls": True}),
    ("deepseek-v4", {"chat_template_kwargs": {"drop_thinking": False}, "thinking": None, "reasoning_effort": None}),
    ("deepseek-v4", {"parallel_tool_calls": False, "tools": None, "messages": [{**HELLO, "prefix": False}]}),
    ("deepseek-v4", {"messages": [HELLO, {"role": "assistant", "reasoning_content": "hm"}, HELLO]}),
    ("deepseek-v3.2", {"messages": [{"role": "developer", "content": "x"}, HELLO], "reasoning_effort": "none"}),
    ("deepseek-r1", {**ENABLED, "tools": []}),
    ("deepseek-v3", {**DISABLED, "reasoning_effort": "none", "tool_choice": "auto"}),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, httpx.Client]]:
    """A client for each format."""
    with contextlib.ExitStack() as stack:
        directory = tmp_path_factory.mktemp("formats")
        yield {
            name: stack.enter_context(talking(deepseek_checkpoint(directory / name, name), name)).http
            for name in ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.2", "deepseek-v4")
        }


def refusal(client: httpx.Client, fields: dict[str, object]) -> dict[str, object]:
    answer = client.post("chat/completions", json={"messages": [HELLO], **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert ":" in error["message"], "no remedy"
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_a_malformed_field_is_named(
    servers: dict[str, httpx.Client], fields: dict[str, object], param: str | None
) -> None:
    error = refusal(servers["deepseek-v4"], fields)
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(("name", "fields", "param"), UNFIT, ids=str)
def test_what_the_format_has_no_place_for_is_named(
    servers: dict[str, httpx.Client], name: str, fields: dict[str, object], param: str
) -> None:
    error = refusal(servers[name], fields)
    assert error["param"] == param, error


@pytest.mark.parametrize(("name", "fields"), FITTING, ids=str)
def test_what_means_nothing_or_has_a_place_is_taken(
    servers: dict[str, httpx.Client], name: str, fields: dict[str, object]
) -> None:
    answer = servers[name].post("chat/completions", json={"messages": [HELLO], **fields})
    assert answer.status_code == 200, answer.text


def test_a_template_is_told_what_it_reads_and_nothing_else(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("template"))
    template = (
        "{% for m in messages %}{{ m.role }}={{ m.content }};{{ m.reasoning_content }}{% endfor %}"
        "|{{ tools[0].function.name if tools }}|{{ thinking }}|{{ reasoning_effort }}|{{ mood }}|"
    )
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    prompts: list[str] = []
    tokenizer = Tokenizer.load(directory)

    def script(request: Request) -> list[int]:
        prompts.append(tokenizer.decode(request.prompt))
        return tokenizer.encode("yes")

    engine = ScriptedEngine(tokenizer, script)
    developer = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    thought = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    asked = {"messages": [developer, thought], "tools": [tool()], "reasoning_effort": "xhigh", **ENABLED}
    with serving(scripted_service(directory, engine)) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        answer = http.post("chat/completions", json={**asked, "chat_template_kwargs": {"mood": "good"}})
        assert answer.status_code == 200, answer.text
        assert prompts[-1] == "system=ab;assistant=;hm|f|True|xhigh|good|"
        assert answer.json()["choices"][0]["message"]["content"] == "yes"
        (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with serving(scripted_service(directory, engine)) as address, httpx.Client(base_url=f"{address}/v1/") as http:
        for fields, param in (
            (ENABLED, "thinking"),
            ({"tools": [tool()]}, "tools"),
            ({"reasoning_effort": "low"}, None),
        ):
            assert refusal(http, fields)["param"] == (param or "reasoning_effort")
