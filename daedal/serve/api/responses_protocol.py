"""The body of `POST /v1/responses`, and the chat request that it means.

Items become messages: a thought, a text and calls that follow one another are one turn of the assistant. What OpenAI's
own services do beyond a conversation (hosted tools, background work, files) is refused by name. Knows nothing of HTTP
and answers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from daedal.serve.api.chat_protocol import MAX_TOOLS, ChatBody
from daedal.serve.api.protocol import refuse_unsupported, shown, validated, warn_unknown
from daedal.serve.state.errors import ApiError

MAX_ITEMS = 4096

# Fields that would change the answer; with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "context_management": (None, []),
    "max_tool_calls": (None,),
    "moderation": (None,),
    "prompt": (None,),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
_IGNORED = frozenset(
    {
        "client_metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "stream_options",
        "user",
    }
)
_INCLUDABLE = ("reasoning.encrypted_content",)  # asked for by clients that send thoughts back; they have them in clear
_PART_TYPES = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
# Fields of the chat request by what they are called here, for refusals.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in _PART_TYPES or not isinstance(text, str):
            raise ValueError(f"has a part of type {shown(kind)}: only text is supported")
        texts.append(text)
    return "".join(texts)


Text = Annotated[str | None, BeforeValidator(_text)]


class Item(BaseModel):
    """One entry of `input`; which fields it must have depends on its type. A message need not say its type."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text = None
    summary: Text = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text = None

    def check(self, where: str) -> None:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }
        for name in needed[self.type]:
            if getattr(self, name) is None:
                raise ApiError(400, f"{where}.{name} is missing: give it", param=f"{where}.{name}")


class _Items(BaseModel):
    input: Annotated[list[Item], Field(max_length=MAX_ITEMS)]


class TextFormat(BaseModel):
    """What the text must be. `schema`, `name`: of `json_schema` alone."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    name: str


class ResponsesBody(BaseModel):
    """The whole body. store: whether the answer may be gone on from by `previous_response_id`; true if not given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    input: str | list[dict[str, object]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    top_p: float | None = None
    include: list[str] | None = None
    include_cost: bool | None = None
    timeout: float | None = None
    priority: int | None = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @classmethod
    def read(cls, body: Mapping[str, object]) -> "ResponsesBody":
        """Checks a body's fields; ApiError 400 names the first one at fault."""
        refuse_unsupported(body, _UNSUPPORTED)
        parsed = validated(cls, body)
        warn_unknown(parsed.model_extra, _IGNORED | _UNSUPPORTED.keys())
        for name in parsed.include or ():
            if name not in _INCLUDABLE:
                sentence = f"include holds {shown(name)}, which this server does not have: leave it out"
                raise ApiError(400, sentence, param="include", code="unsupported_parameter")
        wanted = None if parsed.text is None else parsed.text.format
        if wanted is not None and wanted.type == "json_schema" and None in (wanted.name, wanted.definition):
            sentence = "text.format needs a name and a schema: give both"
            raise ApiError(400, sentence, param="text.format")
        return parsed

    def messages(self) -> list[dict[str, object]]:
        """What `input` adds to the conversation, as chat messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        items = validated(_Items, {"input": self.input}).input
        for index, item in enumerate(items):
            item.check(f"input.{index}")
        return to_messages(items)

    def chat(self, past: Sequence[Mapping[str, object]]) -> ChatBody:
        """The chat request: instructions, what was said before, and the input."""
        lead = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields: dict[str, object] = {
            "model": self.model,
            "messages": [*lead, *past, *self.messages()],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tool_choice": self._tool_choice(),
            "tools": self._tools(),
            "response_format": self._response_format(),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "include_cost": self.include_cost,
            "timeout": self.timeout,
            "priority": self.priority,
        }
        with_names = {name: value for name, value in fields.items() if value is not None}
        try:
            return ChatBody.read(with_names)
        except ApiError as error:
            raise as_asked(error) from error

    def tool_choice_json(self) -> object:
        """As the response repeats it."""
        choice = self.tool_choice or "auto"
        return choice.model_dump() if isinstance(choice, NamedFunction) else choice

    def tools_json(self) -> list[dict[str, object]]:
        return [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in self.tools or ()]

    def _tool_choice(self) -> object:
        if isinstance(self.tool_choice, NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _tools(self) -> list[dict[str, object]] | None:
        if self.tools is None:
            return None
        return [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools
        ]

    def _response_format(self) -> dict[str, object] | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type != "json_schema":
            return None if wanted is None else {"type": wanted.type}
        schema = {"name": wanted.name, "schema": wanted.definition, "strict": wanted.strict}
        return {"type": "json_schema", "json_schema": schema}


def to_messages(items: Iterable[Item]) -> list[dict[str, object]]:
    """Chat messages: what the assistant thinks, says and calls in a row is one."""
    messages: list[dict[str, object]] = []
    for item in items:
        if item.type == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif item.type == "message" and item.role != "assistant":
            messages.append({"role": item.role, "content": item.content})
        else:
            _assistant(messages, item)
    return [message for message in messages if message != {"role": "assistant"}]


def _assistant(messages: list[dict[str, object]], item: Item) -> None:
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    taken = {"reasoning": ("reasoning_content", "content", "tool_calls"), "message": ("content", "tool_calls")}
    if last is None or any(name in last for name in taken.get(item.type, ())):
        last = {"role": "assistant"}
        messages.append(last)
    if item.type == "reasoning":
        thought = item.content or item.summary
        if thought:
            last["reasoning_content"] = thought
    elif item.type == "message":
        last["content"] = item.content
    else:
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": item.name, "arguments": item.arguments},
        }
        calls = last.setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append(call)


def as_asked(error: ApiError) -> ApiError:
    """A refusal of the chat request in the words of this API."""
    first, dot, rest = (error.param or "").partition(".")
    if first not in _NAMES:
        return error
    param = _NAMES[first] + dot + rest
    message = error.message
    if error.param is not None and message.startswith(error.param):
        message = param + message.removeprefix(error.param)
    return ApiError(error.status, message, param=param, code=error.code, kind=error.kind, headers=error.headers)
