"""From a chat request to the text that the model continues, as the checkpoint's chat format writes it.

Several fields of a request may say whether the answer is to think: they must agree. What the format refuses is laid to
the field that brought it. A last message with `prefix` is the answer's beginning: the model goes on from it. Knows
nothing of engines and answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from daedal.errors import TemplateError
from daedal.serve.api.chat_protocol import ChatBody, Message
from daedal.serve.api.protocol import shown
from daedal.serve.state.errors import ApiError
from daedal.text.chat import ChatFormat
from daedal.text.encodings.formats import DeepSeekFormat
from daedal.text.encodings.stream import starts_in_thought
from daedal.text.encodings.tokens import THINK_END

# The API's levels by those that formats have: the first of these, where the level itself is not one.
_NEAREST = {"minimal": ("low", "high"), "low": ("high",), "medium": ("high",), "xhigh": ("high",), "ultra": ("max",)}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model continues. opening: the same without what a prefix brought, as far as it says whether the answer
    begins inside a thought."""

    text: str
    opening: str


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    """What the format is told beside the messages. thinking_param: the field that decided on thinking."""

    thinking: bool | None = None
    effort: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    tools: list[dict[str, object]] | None = None
    thinking_param: str = "thinking"


def write_prompt(body: ChatBody, format: ChatFormat) -> Prompt:
    """The prompt; ApiError 400 names the field that contradicts another or has no place in the format."""
    begun = body.messages[-1] if body.messages[-1].prefix else None
    told = body.messages if begun is None else body.messages[:-1]
    messages = [_as_format_reads(message, format) for message in told]
    wishes = _wishes(body, format)
    try:
        text = _render(format, messages, wishes)
    except TemplateError as error:
        raise ApiError(400, str(error), param=_at_fault(format, messages, wishes)) from error
    return Prompt(text=text, opening=text) if begun is None else _continued(text, begun, len(told))


def _continued(text: str, begun: Message, index: int) -> Prompt:
    """The prompt and the beginning of the answer to it: a thought, closed where content follows it."""
    thought, content = begun.reasoning_content or "", "".join(begun.content or "")
    if not starts_in_thought(text):
        if thought:
            param = f"messages.{index}.reasoning_content"
            raise ApiError(400, f"{param} begins a thought, and the answer is not to think: leave it out", param=param)
        return Prompt(text=text + content, opening=text)
    if not content:
        return Prompt(text=text + thought, opening=text)
    return Prompt(text=text + thought + THINK_END + content, opening=text + THINK_END)


def _as_format_reads(message: Message, format: ChatFormat) -> dict[str, object]:
    """A DeepSeek format takes messages as they are. Templates know `developer` as `system`, and text as one string."""
    fields = message.fields_beside_content()
    content = message.content or ""
    if not isinstance(format, DeepSeekFormat):
        role = "system" if message.role == "developer" else message.role
        return {**fields, "role": role, "content": "".join(content)}
    parts = content if isinstance(content, str) else [{"type": "text", "text": text} for text in content]
    return {**fields, "content": parts}


def _wishes(body: ChatBody, format: ChatFormat) -> _Wishes:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None and variables.get("reasoning_effort") is not None:
        sentence = "reasoning_effort stands in chat_template_kwargs too: give one of them"
        raise ApiError(400, sentence, param="reasoning_effort")
    said = [
        ("thinking", None if body.thinking is None else body.thinking.type == "enabled"),
        ("chat_template_kwargs", _flag(variables, "thinking")),
        ("chat_template_kwargs", _flag(variables, "enable_thinking")),
        ("reasoning_effort", False if body.reasoning_effort == "none" else None),
    ]
    chosen = [(param, value) for param, value in said if value is not None]
    if len({value for _, value in chosen}) > 1:
        params = " and ".join(dict.fromkeys(param for param, _ in chosen))
        raise ApiError(400, f"{params} contradict each other on thinking: give one of them", param=chosen[-1][0])
    param, thinking = chosen[0] if chosen else ("thinking", None)
    schema = None if body.response_format is None else body.response_format.schema_of_answer
    if schema is not None and isinstance(format, DeepSeekFormat) and "response_format" in format.variables:
        variables.setdefault("response_format", schema)
    return _Wishes(
        thinking=thinking,
        effort=_effort(body.reasoning_effort, format),
        variables=variables,
        tools=body.shown_tools(),
        thinking_param=param,
    )


def _flag(variables: dict[str, object], name: str) -> bool | None:
    value = variables.pop(name, None)
    if not isinstance(value, bool | None):
        sentence = f"chat_template_kwargs sets {name} to {shown(value)}: it must be true or false"
        raise ApiError(400, sentence, param="chat_template_kwargs")
    return value


def _effort(level: str | None, format: ChatFormat) -> str | None:
    """The level that the format has for what was asked; a template is told what was asked."""
    if level is None or level == "none":
        return None
    known = format.efforts if isinstance(format, DeepSeekFormat) else None
    fitting = [name for name in (level, *_NEAREST.get(level, ())) if name in (known or ())]
    return fitting[0] if fitting else level


def _render(format: ChatFormat, messages: list[dict[str, object]], wishes: _Wishes) -> str:
    return format.render(
        messages,
        add_generation_prompt=True,
        tools=wishes.tools,
        thinking=wishes.thinking,
        effort=wishes.effort,
        **wishes.variables,
    )


def _at_fault(format: ChatFormat, messages: list[dict[str, object]], wishes: _Wishes) -> str:
    """The field with which a refusal begins, when they are taken one by one."""
    told = _Wishes()
    params = {
        "thinking": wishes.thinking_param,
        "effort": "reasoning_effort",
        "variables": "chat_template_kwargs",
        "tools": "tools",
    }
    for name, param in (("", "messages"), *params.items()):
        told = replace(told, **{name: getattr(wishes, name)}) if name else told
        try:
            _render(format, messages, told)
        except TemplateError:
            return param
    return "messages"
