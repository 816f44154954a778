"""Prompts of V3, R1 and V3.1, by the rules of the chat templates that their checkpoints ship.

V3 is V3-0324's template, R1 is R1-0528's with the open thought that the first R1 ends its prompts with. The templates
have quirks that models were trained on, and they stay: system texts are gathered at the front, results of tools close
only where an assistant speaks next, and after results the answer follows at once. V3.1's text for tools is that of its
model card. Knows nothing of answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daedal.errors import TemplateError
from daedal.text.encodings.messages import Message, Wishes
from daedal.text.encodings.plain import to_json
from daedal.text.encodings.token_calls import Spelling
from daedal.text.encodings.tokens import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    THINK,
    THINK_END,
    USER,
)

V3_CALLS = Spelling(fenced=True)
V31_CALLS = Spelling(fenced=False)
_V31_TOOLS = (
    "## Tools\n"
    "You have access to the following tools:\n"
    "\n"
    "{tools}\n"
    "\n"
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    f"{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{CALL_SEPARATOR}tool_call_arguments{CALL_END}"
    "{{additional_tool_calls}}"
    f"{CALLS_END}\n"
    "\n"
    "Where:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)


@dataclass(kw_only=True)
class _Prompt:
    """What has been written, and what the next message must know of it."""

    text: str
    after_user: bool = False
    in_results: bool = False
    first_result: bool = True


def write_v3(messages: Sequence[Message], wishes: Wishes) -> str:
    """V3's prompt. The assistant's token follows each user message, with or without a generation prompt."""
    prompt = _v3(messages, drops_thoughts=False)
    return prompt.text + _opening(prompt, wishes)


def write_r1(messages: Sequence[Message], wishes: Wishes) -> str:
    """R1's prompt: past thoughts are dropped, and the answer begins inside a thought."""
    prompt = _v3(messages, drops_thoughts=True)
    opens = wishes.add_generation_prompt and not prompt.in_results
    return prompt.text + _opening(prompt, wishes) + (f"{THINK}\n" if opens else "")


def _opening(prompt: _Prompt, wishes: Wishes) -> str:
    if prompt.in_results:
        return OUTPUTS_END
    return ASSISTANT if wishes.add_generation_prompt and not prompt.after_user else ""


def _v3(messages: Sequence[Message], *, drops_thoughts: bool) -> _Prompt:
    prompt = _Prompt(text=BOS + _system(messages))
    for message in messages:
        if message.role == "user":
            prompt.text += USER + message.content + ASSISTANT
            prompt.after_user, prompt.in_results = True, False
        elif message.role == "assistant":
            prompt.text += OUTPUTS_END if prompt.in_results else ""
            prompt.text += message.content.rpartition(THINK_END)[2] if drops_thoughts else message.content
            prompt.text += V3_CALLS.write(message.calls) + EOS
            prompt.after_user, prompt.in_results = False, False
            prompt.first_result = prompt.first_result or bool(message.calls)
        elif message.role == "tool":
            prompt.text += OUTPUTS_BEGIN if prompt.first_result else "\n"
            prompt.text += OUTPUT_BEGIN + message.content + OUTPUT_END
            prompt.after_user, prompt.in_results, prompt.first_result = False, True, False
    return prompt


def write_v31(messages: Sequence[Message], wishes: Wishes) -> str:
    """V3.1's prompt: each answer follows a think tag, which is open for the next one if it is to think."""
    text = BOS + _system(messages)
    after_user = in_results = False
    for message in messages:
        if message.role == "user":
            text += USER + message.content
            after_user, in_results = True, False
        elif message.role == "assistant":
            if after_user:
                text += ASSISTANT + (THINK if _opens_thought(message, wishes) else THINK_END)
            text += _v31_answer(message, after_results=in_results)
            after_user = in_results = False
        elif message.role == "tool":
            text += OUTPUT_BEGIN + message.content + OUTPUT_END
            after_user, in_results = False, True
    if wishes.add_generation_prompt and after_user:
        text += ASSISTANT + (THINK if wishes.thinking else THINK_END)
    return text


def _opens_thought(message: Message, wishes: Wishes) -> bool:
    return message.continues and wishes.thinking and not message.calls


def _v31_answer(message: Message, *, after_results: bool) -> str:
    content = message.content
    if not message.calls and not after_results:
        content = content.partition(THINK_END)[2] if THINK_END in content else content
    return content + V31_CALLS.write(message.calls) + EOS


def _system(messages: Sequence[Message]) -> str:
    """All system texts, wherever they stand, then V3.1's text for the tools that any of them defines."""
    texts = [message.content for message in messages if message.role == "system"]
    tools = [tool for message in messages for tool in message.tools]
    text = "\n\n".join(texts)
    return text if not tools else f"{text}\n\n{_tools(tools)}"


def _tools(tools: Sequence[Mapping[str, object]]) -> str:
    written = []
    for tool in tools:
        name = tool["name"]
        description = tool.get("description", "")
        if not isinstance(description, str):
            raise TemplateError(f"the description of the tool {name!r} is no string: give a sentence")
        parameters = to_json(tool.get("parameters", {}), f"the parameters of the tool {name!r}")
        written.append(f"### {name}\nDescription: {description}\n\nParameters: {parameters}")
    return _V31_TOOLS.format(tools="\n\n".join(written))
