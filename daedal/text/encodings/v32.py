"""Prompts of V3.2, by the rules of the encoder that ships with its checkpoint (`encoding/encoding_dsv32.py`).

Past thoughts are kept while tools are at work and dropped at the next user message. Results of tools stand between
turns, in the order of the calls that they answer. The text for tools is that of the encoder's published test outputs;
copies of the encoder in other projects have lost its blank lines. Knows nothing of answers.
"""

from collections.abc import Sequence

from daedal.errors import TemplateError
from daedal.text.encodings.dsml import INVOKE, PARAMETER, V32_BLOCK, write_calls, write_definitions
from daedal.text.encodings.messages import Message, Wishes
from daedal.text.encodings.tokens import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER

_BLOCK = f"{DSML}{V32_BLOCK}"
_TOOLS = (
    "## Tools\n"
    "\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    f'You can invoke functions by writing a "<{_BLOCK}>" block like the following as part of your reply to the user:\n'
    f"<{_BLOCK}>\n"
    f'<{INVOKE} name="$FUNCTION_NAME">\n'
    f'<{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{PARAMETER}>\n'
    "...\n"
    f"</{INVOKE}>\n"
    f'<{INVOKE} name="$FUNCTION_NAME2">\n'
    "...\n"
    f"</{INVOKE}>\n"
    f"</{_BLOCK}>\n"
    "\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects "
    'should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for '
    "other types (numbers, booleans, arrays, objects).\n"
    "\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking "
    "block. Here is an example:\n"
    "\n"
    f"<{_BLOCK}>\n"
    "...\n"
    f"</{_BLOCK}>\n"
    "\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n"
    "\n"
    f"{THINK}...thinking about results{THINK_END}\n"
    "\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
)
_TOOLS_END = "\n</functions>\n"


def write_v32(messages: Sequence[Message], wishes: Wishes) -> str:
    """V3.2's prompt. In a thinking conversation, developer messages before the last question are dropped."""
    thinking = wishes.thinking
    asked = _last_question(messages)
    kept = [message for index, message in enumerate(messages) if _is_kept(message, index, asked, thinking)]
    asked = _last_question(kept)
    results = _count_results(kept)
    text = BOS
    for index, message in enumerate(kept):
        think = THINK if thinking and index >= asked else THINK_END
        opens = wishes.add_generation_prompt or index + 1 < len(kept)
        if message.role == "system":
            text += message.content + write_definitions(message, _TOOLS, _TOOLS_END)
        elif message.role in ("user", "developer"):
            text += USER + (message.content if message.role == "user" else _task(message))
            text += ASSISTANT + think if opens else ""
        elif message.role == "tool":
            place, total = results[index]
            text += ("\n\n<function_results>" if place == 1 else "") + f"\n<result>{message.content}</result>"
            if place == total:
                text += "\n</function_results>" + (f"\n\n{think}" if opens else "")
        else:
            text += _answer(message, shows_thought=thinking and index > asked)
    return text


def _last_question(messages: Sequence[Message]) -> int:
    return max((index for index, message in enumerate(messages) if message.role in ("user", "developer")), default=-1)


def _is_kept(message: Message, index: int, asked: int, thinking: bool) -> bool:
    return not thinking or message.role != "developer" or index >= asked


def _task(message: Message) -> str:
    if not message.content:
        raise TemplateError(f"{message.where} is of the role developer and empty: give it content")
    return f"{write_definitions(message, _TOOLS, _TOOLS_END)}\n\n# The user's message is: {message.content}"


def _answer(message: Message, *, shows_thought: bool) -> str:
    if shows_thought and not (message.reasoning or message.calls):
        raise TemplateError(
            f"{message.where} answers in a thinking conversation without a thought: give reasoning_content"
        )
    thought = message.reasoning + THINK_END if shows_thought else ""
    return thought + message.content + write_calls(message.calls, V32_BLOCK, message.where) + EOS


def _count_results(messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
    """For each tool message, by its index: which result of how many it is. TemplateError where the counts differ."""
    counted: dict[int, tuple[int, int]] = {}
    total = place = 0
    for index, message in enumerate(messages):
        if message.role == "tool":
            place += 1
            if place > total:
                raise TemplateError(
                    f"{message.where} answers no tool call: put it after the message that made the call"
                )
            counted[index] = place, total
        elif place < total and place > 0:
            raise TemplateError(f"{message.where} comes after {place} of {total} tool results: give one for each call")
        if message.role == "assistant":
            total, place = len(message.calls), 0
        elif message.role != "tool":
            total = place = 0
    if 0 < place < total:
        raise TemplateError(f"the messages end after {place} of {total} tool results: give one for each call")
    return counted
