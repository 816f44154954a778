"""The body of `POST /v1/messages` (Anthropic's Messages API), and the chat request that it means.

Blocks become messages: results of tools are messages of their own, before the text beside them. Marks for caching are
passed over, and so is a thought's budget, which nothing here could keep. Knows nothing of HTTP and answers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from daedal.serve.api.chat_protocol import MAX_TOOLS, ChatBody
from daedal.serve.api.protocol import refuse_unsupported, shown, validated, warn_unknown
from daedal.serve.state.errors import ApiError

MAX_MESSAGES = 4096

# Fields that would change the answer; with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "container": (None,),
    "context_management": (None, {}),
    "mcp_servers": (None, []),
}
_IGNORED = frozenset(
    {"betas", "cache_control", "inference_geo", "metadata", "service_tier", "speed", "user_profile_id"}
)
# Fields of the chat request by what they are called here, for refusals.
_NAMES = {"stop": "stop_sequences", "reasoning_effort": "output_config", "response_format": "output_config"}


class Block(BaseModel):
    """One block of a message; which fields it must have depends on its type."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, object] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, object]] | None = None

    def check(self, role: str, where: str) -> None:
        needed = {
            "text": ("text",),
            "thinking": ("thinking",),
            "redacted_thinking": (),
            "tool_use": ("id", "name", "input"),
            "tool_result": ("tool_use_id",),
        }
        own = {
            "thinking": "assistant",
            "redacted_thinking": "assistant",
            "tool_use": "assistant",
            "tool_result": "user",
        }
        if self.type not in needed:
            sentence = f"{where}.type is {shown(self.type)}: only {', '.join(needed)} are supported"
            raise ApiError(400, sentence, param=f"{where}.type")
        if own.get(self.type, role) != role:
            sentence = f"{where} is of type {self.type} in a message of the role {role}: it belongs to the other role"
            raise ApiError(400, sentence, param=where)
        for name in needed[self.type]:
            if getattr(self, name) is None:
                raise ApiError(400, f"{where}.{name} is missing: give it", param=f"{where}.{name}")


class AnthropicMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(BaseModel):
    """A tool of the client. Tools that Anthropic's services run themselves have another type."""

    model_config = ConfigDict(strict=True)

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, object]
    strict: bool | None = None


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(BaseModel):
    """budget_tokens and display change nothing here."""

    model_config = ConfigDict(strict=True)

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["json_schema"]
    definition: Annotated[dict[str, object], Field(alias="schema")]


class OutputConfig(BaseModel):
    model_config = ConfigDict(strict=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(BaseModel):
    """What `count_tokens` reads: all that stands in the prompt."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    @classmethod
    def read(cls, body: Mapping[str, object]) -> Self:
        """Checks a body's fields; ApiError 400 names the first one at fault."""
        refuse_unsupported(body, _UNSUPPORTED)
        parsed = validated(cls, body)
        warn_unknown(parsed.model_extra, _IGNORED | _UNSUPPORTED.keys())
        return parsed

    def chat(self) -> ChatBody:
        """The chat request."""
        fields = {name: value for name, value in self._fields().items() if value is not None}
        try:
            return ChatBody.read(fields)
        except ApiError as error:
            raise as_asked(error) from error

    def _fields(self) -> dict[str, object]:
        choice = self.tool_choice
        config = self.output_config or OutputConfig()
        format = None
        if config.format is not None:
            schema = {"name": "output", "schema": config.format.definition}
            format = {"type": "json_schema", "json_schema": schema}
        return {
            "model": self.model,
            "messages": self._messages(),
            "tools": None if self.tools is None else [_tool(tool) for tool in self.tools],
            "tool_choice": None if choice is None else _choice(choice),
            "parallel_tool_calls": None if choice is None or not choice.disable_parallel_tool_use else False,
            "thinking": None if self.thinking is None else {"type": _SWITCH[self.thinking.type]},
            "reasoning_effort": config.effort,
            "response_format": format,
        }

    def _messages(self) -> list[dict[str, object]]:
        messages: list[dict[str, object]] = []
        if self.system:
            messages.append({"role": "system", "content": _plain(self.system, "system")})
        for index, message in enumerate(self.messages):
            where = f"messages.{index}.content"
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
                continue
            for number, block in enumerate(message.content):
                block.check(message.role, f"{where}.{number}")
            to_messages = _user if message.role == "user" else _assistant
            messages += to_messages(message.content, where)
        if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            messages[-1]["prefix"] = True  # the API goes on from it
        return messages


_SWITCH = {"enabled": "enabled", "adaptive": "enabled", "disabled": "disabled"}


class MessagesBody(CountBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    include_cost: bool | None = None
    timeout: float | None = None
    priority: int | None = None

    def _fields(self) -> dict[str, object]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "include_cost", "timeout", "priority")
        own = {name: getattr(self, name) for name in names}
        return {**super()._fields(), **own, "stop": self.stop_sequences or None}


def _user(blocks: Sequence[Block], where: str) -> list[dict[str, object]]:
    """Results first: they answer the calls of the turn before."""
    messages: list[dict[str, object]] = []
    for number, block in enumerate(blocks):
        if block.type == "tool_result":
            text = "" if block.content is None else _plain(block.content, f"{where}.{number}.content")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    texts = [block.text for block in blocks if block.type == "text"]
    if texts or not messages:
        messages.append({"role": "user", "content": "\n\n".join(text or "" for text in texts)})
    return messages


def _assistant(blocks: Sequence[Block], where: str) -> list[dict[str, object]]:
    message: dict[str, object] = {"role": "assistant"}
    thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    texts = [block.text or "" for block in blocks if block.type == "text"]
    calls = [_call(block) for block in blocks if block.type == "tool_use"]
    if thought:
        message["reasoning_content"] = thought
    if texts or not (thought or calls):
        message["content"] = "".join(texts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _call(block: Block) -> dict[str, object]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _plain(content: str | Sequence[Block | Mapping[str, object]], where: str) -> str:
    """The text of text blocks, a blank line between two."""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        told: Mapping[str, object] = {"type": part.type, "text": part.text} if isinstance(part, Block) else part
        kind, text = told.get("type"), told.get("text")
        if kind != "text" or not isinstance(text, str):
            param = f"{where}.{number}"
            raise ApiError(400, f"{param} is of type {shown(kind)}: only text is supported here", param=param)
        texts.append(text)
    return "\n\n".join(texts)


def _tool(tool: AnthropicTool) -> dict[str, object]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _choice(choice: ToolChoice) -> object:
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError(400, "tool_choice.name is missing: name one of the tools", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def as_asked(error: ApiError) -> ApiError:
    """A refusal of the chat request in the words of this API."""
    first, dot, rest = (error.param or "").partition(".")
    if first not in _NAMES:
        return error
    param = _NAMES[first] + dot + rest
    return ApiError(error.status, error.message, param=param, code=error.code, kind=error.kind, headers=error.headers)
