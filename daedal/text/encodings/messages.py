"""Reads a conversation in OpenAI's shape into typed messages, so that the encoders deal with nothing else.

What a format has no place for is refused here, not dropped: unknown roles, pictures, tool calls whose arguments are no
JSON object. Knows nothing of how any format writes what it is given.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from daedal.errors import TemplateError
from daedal.text.encodings.plain import check_messages, check_plain, read_object, short, to_json

EXTRAS = ("tools", "response_format", "task", "prefix", "wo_eos")
"""Keys of a message that only some formats know. The last two mean the same: the answer goes on from this message."""
_BELONGS_TO = {
    "tools": ("system", "developer"),
    "response_format": ("system", "developer"),
    "tool_calls": ("assistant",),
    "prefix": ("assistant",),
    "wo_eos": ("assistant",),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One tool call of an assistant's turn. text: its arguments as JSON; `arguments` are the same, read."""

    id: str
    name: str
    text: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message. where: its name in errors. content: its text parts, a blank line between two.

    call_id: of a tool message. tools: function objects. continues: the answer is to go on from here, without an end.
    """

    where: str
    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    tools: tuple[Mapping[str, object], ...] = ()
    response_format: object = None
    task: str | None = None
    continues: bool = False


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a format has a place for. extras: those of EXTRAS; tasks: names that a message's `task` may have."""

    format: str
    roles: Collection[str]
    extras: Collection[str] = field(default=())
    tasks: Collection[str] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How a conversation is to be written. effort: the paragraph of the level asked for, "" for none."""

    thinking: bool
    effort: str = ""
    keeps_thoughts: bool = False
    add_generation_prompt: bool = True


def read_messages(messages: Sequence[Mapping[str, object]], rules: Rules) -> list[Message]:
    """The conversation, checked. TemplateError names the message at fault, the rule and the remedy."""
    check_messages(messages)
    return [_read(message, f"messages[{index}]", rules) for index, message in enumerate(messages)]


def read_tools(tools: object, where: str) -> tuple[Mapping[str, object], ...]:
    """The function objects of tool definitions in OpenAI's shape; none where `tools` is None."""
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise TemplateError(f"{where} is {short(tools)}: give a list of tool definitions")
    check_plain(tools, where)
    return tuple(_function(tool, f"{where}[{index}]") for index, tool in enumerate(tools))


def _read(message: Mapping[str, object], where: str, rules: Rules) -> Message:
    role = str(message["role"])
    if role not in rules.roles:
        known = ", ".join(sorted(rules.roles))
        raise TemplateError(f"{where}.role is {short(role)}, {rules.format} knows {known}: use one of these")
    for key in EXTRAS:
        if message.get(key) and key not in rules.extras:
            raise TemplateError(f"{where}.{key} has no place in {rules.format}: leave it out")
    for key, owners in _BELONGS_TO.items():
        if message.get(key) and role not in owners:
            raise TemplateError(f"{where} is of the role {role}: {key} belongs to the role {' or '.join(owners)}")
    content = message.get("content")
    if content is None and role == "user":
        raise TemplateError(f"{where} has no content: give a string")
    return Message(
        where=where,
        role=role,
        content=_text(content, f"{where}.content"),
        reasoning=_reasoning(message, where) if role == "assistant" else "",
        calls=_calls(message.get("tool_calls"), f"{where}.tool_calls"),
        call_id=_string(message, "tool_call_id", where),
        tools=read_tools(message.get("tools"), f"{where}.tools"),
        response_format=message.get("response_format"),
        task=_task(message.get("task"), where, rules),
        continues=bool(message.get("prefix") or message.get("wo_eos")),
    )


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "\n\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise TemplateError(f"{where} is of the type {short(kind)}: give text parts, this format reads nothing else")
    return text


def _reasoning(message: Mapping[str, object], where: str) -> str:
    """`reasoning_content` as DeepSeek's API names it, or `reasoning` as others do."""
    key = "reasoning_content" if message.get("reasoning_content") is not None else "reasoning"
    return _string(message, key, where)


def _string(message: Mapping[str, object], key: str, where: str) -> str:
    value = message.get(key)
    if not isinstance(value, str | None):
        raise TemplateError(f"{where}.{key} is {short(value)}: give a string")
    return value or ""


def _task(task: object, where: str, rules: Rules) -> str | None:
    if task is None:
        return None
    if not isinstance(task, str) or task not in rules.tasks:
        known = ", ".join(rules.tasks)
        raise TemplateError(f"{where}.task is {short(task)}, {rules.format} knows {known}: use one of these")
    return task


def _calls(calls: object, where: str) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list | tuple):
        raise TemplateError(f"{where} is {short(calls)}: give a list of tool calls")
    return tuple(_call(call, f"{where}[{index}]") for index, call in enumerate(calls))


def _call(call: object, where: str) -> Call:
    function = _function(call, where)
    given = function.get("arguments")
    arguments_at = f"{where}.function.arguments"
    if isinstance(given, Mapping):
        arguments, text = given, to_json(given, arguments_at)
    elif isinstance(given, str | None):
        text = given or "{}"  # clients leave out the arguments of tools that take none
        arguments = read_object(text, arguments_at)
    else:
        raise TemplateError(f"{arguments_at} is {short(given)}: give a JSON object, or one as a string")
    assert isinstance(call, Mapping)
    return Call(id=_string(call, "id", where), name=str(function["name"]), text=text, arguments=arguments)


def _function(tool: object, where: str) -> Mapping[str, object]:
    """The `function` of a tool or of a call; its name is checked, the rest is not."""
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or kind != "function":
        raise TemplateError(f"{where} is {short(tool if kind is None else kind)}: give objects of the type 'function'")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise TemplateError(f"{where}.function.name is {short(name)}: give the function's name as a string")
    return function
