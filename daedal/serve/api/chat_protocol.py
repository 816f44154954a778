"""The body of `POST /v1/chat/completions`: a conversation, tools, and how the answer is to think.

Checked here is what holds for every chat format; what a format has no place for it refuses itself when the prompt is
written (see `prompt`). DeepSeek's own fields (`thinking`, `reasoning_content`, `prefix`) stand beside OpenAI's. What
the answer must look like is read here and made a rule of in `rules`. Knows nothing of HTTP, models or text.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from daedal.errors import TemplateError
from daedal.infer.request import MAX_LOGPROBS
from daedal.serve.api.protocol import GenerationBody, shown, validated
from daedal.serve.state.errors import ApiError
from daedal.text.encodings.messages import EXTRAS
from daedal.text.encodings.plain import check_plain

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 2**20

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}
_TAKEN = frozenset({"messages", "add_generation_prompt", "tools", "effort"})


def _content(value: object) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'has a part of type {shown(kind)}: only {{"type": "text", "text": "..."}} is supported')
        texts.append(part["text"])
    return tuple(texts)


class Message(BaseModel):
    """One turn of a conversation. content: a text, or the texts of its parts."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
    content: Annotated[str | tuple[str, ...] | None, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, object]] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    def fields_beside_content(self) -> dict[str, object]:
        """What was given of the fields above."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name not in ("content", "prefix")}
        return {name: value for name, value in fields.items() if value is not None}

    def check(self, where: str) -> None:
        """Rules that join several fields, and keys that only single formats know."""
        speaks = self.role == "assistant" and (self.tool_calls or self.reasoning_content)
        if self.content is None and not speaks:
            param = f"{where}.content"
            raise ApiError(400, f"{param} is missing: give a text", param=param)
        for name in EXTRAS:
            if (self.model_extra or {}).get(name):
                sentence = f"{where}.{name} is not supported by this server: leave it out"
                raise ApiError(400, sentence, param=f"{where}.{name}", code="unsupported_parameter")


class Function(BaseModel):
    """What a model may call. parameters: a JSON schema. strict: it is enforced; else it is only shown to the model."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class _Tools(BaseModel):
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class _Name(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class NamedTool(BaseModel):
    """The one function that the model is to call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: _Name


class SchemaFormat(BaseModel):
    """`schema`: what the answer must match, whether or not `strict` says so."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    definition: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer's text must be: anything, a JSON object, or JSON that matches a schema."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @property
    def schema_of_answer(self) -> dict[str, object] | None:
        """None for any text."""
        if self.type == "text":
            return None
        given = self.json_schema.definition if self.json_schema is not None else None
        return {"type": "object"} if given is None else given


class Thinking(BaseModel):
    """DeepSeek's switch."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["enabled", "disabled"]


class ChatBody(GenerationBody):
    """The whole body. tools: as they were given, for the key order of a definition is part of the prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    chat_template_kwargs: dict[str, object] | None = None

    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def looks_for_calls(self) -> bool:
        """Whether tool calls are told from content. `auto` alone will do, for tools that the messages describe."""
        return self.must_call or self.tool_choice == "auto" or (self.tool_choice is None and bool(self.tools))

    @property
    def callable_tools(self) -> tuple[Function, ...]:
        """The functions that the answer may call: of a named tool that one alone."""
        functions = tuple(tool.function for tool in validated(_Tools, {"tools": self.tools or []}).tools)
        if isinstance(self.tool_choice, NamedTool):
            named = self.tool_choice.function.name
            return tuple(function for function in functions if function.name == named)[:1]
        return functions if self.looks_for_calls else ()

    def shown_tools(self) -> list[dict[str, object]] | None:
        """The definitions that the model is to see, without fields that say nothing to it."""
        if self.tool_choice == "none" or not self.tools:
            return None
        return [{**tool, "function": _said(tool["function"])} for tool in self.tools]

    def check(self) -> None:
        self._check_numbers()
        for index, message in enumerate(self.messages):
            message.check(f"messages.{index}")
        self._check_prefix()
        self._check_tools()
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
            sentence = "response_format.json_schema is missing: give it with a name and a schema"
            raise ApiError(400, sentence, param="response_format.json_schema")
        taken = _TAKEN & (self.chat_template_kwargs or {}).keys()
        if taken:
            sentence = f"chat_template_kwargs sets {min(taken)}, which the server sets itself: leave it out"
            raise ApiError(400, sentence, param="chat_template_kwargs")

    def _check_numbers(self) -> None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            sentence = "max_tokens and max_completion_tokens are both given and differ: give one of them"
            raise ApiError(400, sentence, param="max_completion_tokens")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked = self.asked_tokens()
        if asked is not None and asked < 1:
            raise ApiError(400, f"{name} is {shown(asked)}: it must be at least 1", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs: set logprobs to true", param="top_logprobs")

    def _check_prefix(self) -> None:
        for index, message in enumerate(self.messages):
            if not message.prefix:
                continue
            param = f"messages.{index}.prefix"
            if message.role != "assistant" or index + 1 < len(self.messages) or index == 0:
                sentence = f"{param} is true: only the last message may begin the answer, as the assistant's"
                raise ApiError(400, sentence, param=param)
            if message.tool_calls:
                raise ApiError(400, f"{param} is true and the message calls tools: leave out one of them", param=param)

    def _check_tools(self) -> None:
        checked = validated(_Tools, {"tools": self.tools or []})
        if self.must_call and not self.callable_tools:
            named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            sentence = "tool_choice is required and there are no tools: give some"
            if named is not None:
                sentence = f"tool_choice names {shown(named)}, which is none of the tools: name one of them"
            raise ApiError(400, sentence, param="tool_choice")
        names = [tool.function.name for tool in checked.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                param = f"tools.{index}.function.name"
                raise ApiError(400, f"{param} is {shown(name)}, as of a tool before it: give each its own", param=param)
        try:
            check_plain(self.tools, "tools")
        except TemplateError as error:
            raise ApiError(400, str(error), param="tools") from error
        size = len(json.dumps(self.tools, ensure_ascii=False))
        if size > MAX_TOOLS_CHARS:
            sentence = f"tools have {size} characters, {MAX_TOOLS_CHARS} are allowed: describe them in fewer"
            raise ApiError(400, sentence, param="tools")


def _said(function: object) -> dict[str, object]:
    assert isinstance(function, dict)
    return {name: value for name, value in function.items() if value is not None and name != "strict"}
