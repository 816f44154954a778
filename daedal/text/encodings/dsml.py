"""DSML, the markup of tool calls since V3.2: writing tools and calls, and reading whole answers strictly.

The markup quotes nothing: a string parameter stands as it is, any other as JSON, and `string=` says which. The strict
reader accepts what the encoders published with V3.2 and V4 accept; answers as they stream are for `dsml_stream`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from daedal.errors import TemplateError
from daedal.text.encodings.answers import Answer, ToolCall
from daedal.text.encodings.messages import Call, Message
from daedal.text.encodings.plain import to_json
from daedal.text.encodings.tokens import BOS, DSML, EOS, THINK, THINK_END

INVOKE = f"{DSML}invoke"
PARAMETER = f"{DSML}parameter"
V32_BLOCK = "function_calls"
V4_BLOCK = "tool_calls"
_NAME = re.compile(r'\s*name="(.*?)">\n\n?', re.DOTALL)
_VALUE = re.compile(r' name="(.*?)" string="(true|false)">(.*)<', re.DOTALL)
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_FORBIDDEN = (BOS, EOS, THINK, THINK_END, DSML)


def write_definitions(message: Message, tools_begin: str, tools_end: str) -> str:
    """The tools and the response format that a message sets, each after a blank line; empty where it sets neither."""
    text = ""
    if message.tools:
        schemas = (to_json(tool, f"{message.where}.tools") for tool in message.tools)
        text += "\n\n" + tools_begin + "\n".join(schemas) + tools_end
    if message.response_format:
        text += "\n\n" + _RESPONSE_FORMAT + to_json(message.response_format, f"{message.where}.response_format")
    return text


def write_calls(calls: Sequence[Call], block: str, where: str) -> str:
    """The block that ends an assistant's turn, with the blank line before it; empty where there are no calls."""
    if not calls:
        return ""
    written = "\n".join(_write_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    return f"\n\n<{DSML}{block}>\n{written}\n</{DSML}{block}>"


def _write_call(call: Call, where: str) -> str:
    parameters = []
    for name, value in call.arguments.items():
        text, kind = (value, "true") if isinstance(value, str) else (to_json(value, where), "false")
        parameters.append(f'<{PARAMETER} name="{name}" string="{kind}">{text}</{PARAMETER}>')
    return f'<{INVOKE} name="{call.name}">\n' + "\n".join(parameters) + f"\n</{INVOKE}>"


@dataclass(kw_only=True)
class _Cursor:
    text: str
    at: int = 0

    def until(self, *stops: str) -> tuple[str, str | None]:
        """The text up to the nearest of `stops`, which is passed, and that stop; None where there is none of them."""
        found = [(place, stop) for stop in stops if (place := self.text.find(stop, self.at)) >= 0]
        place, stop = min(found, default=(len(self.text), None))
        between = self.text[self.at : place]
        self.at = place + len(stop or "")
        return between, stop


@dataclass(frozen=True, kw_only=True)
class DsmlReader:
    """Reads answers whose tool calls stand in a block of this name."""

    block: str

    def read_answer(self, text: str, thinking: bool) -> Answer:
        """A whole, well-formed answer, its end token included; `thinking`: it begins inside a thought.

        TemplateError names what is malformed.
        """
        return _read_answer(_Cursor(text=text), self.block, thinking=thinking)


def _read_answer(cursor: _Cursor, block: str, *, thinking: bool) -> Answer:
    opening = f"\n\n<{DSML}{block}"
    reasoning = ""
    if thinking:
        reasoning, stop = cursor.until(THINK_END, opening)
        if stop != THINK_END:
            raise TemplateError(f"the thought has no {THINK_END}: an answer that begins in a thought must end it")
    content, stop = cursor.until(EOS, opening)
    if stop is None:
        raise TemplateError("the answer does not end with its end token: give a whole answer")
    calls = []
    if stop == opening:
        calls = _read_calls(cursor, block)
        rest, _ = cursor.until(EOS)
        if rest:
            raise TemplateError(f"the tool calls are followed by {rest[:40]!r}: nothing may come after them")
    if rest := cursor.text[cursor.at :]:
        raise TemplateError(f"the end token is followed by {rest[:40]!r}: nothing may come after it")
    for token in _FORBIDDEN:
        if token in content or token in reasoning:
            raise TemplateError(f"the answer's text holds the token {token}: it may stand only where the format has it")
    return Answer(reasoning=reasoning, content=content, tool_calls=tuple(calls))


def _read_calls(cursor: _Cursor, block: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    while True:
        between, stop = cursor.until(f"<{INVOKE}", f"</{DSML}{block}>")
        if between != ">\n":
            raise TemplateError(f"a tag of the tool calls is followed by {between[:40]!r}: '>' and a line break belong")
        if stop is None:
            raise TemplateError(f"the tool calls have no end: the tag {block} must be closed")
        if stop != f"<{INVOKE}":
            return calls
        calls.append(_read_call(cursor))


def _read_call(cursor: _Cursor) -> ToolCall:
    header, stop = cursor.until(f"<{PARAMETER}", f"</{INVOKE}")
    name = _NAME.fullmatch(header)
    if name is None:
        raise TemplateError(f"a tool call begins with {header[:60]!r}: it must be name=\"…\", '>' and a line break")
    arguments: dict[str, str] = {}
    while stop == f"<{PARAMETER}":
        written, _ = cursor.until(f"/{PARAMETER}")
        value = _VALUE.fullmatch(written)
        if value is None:
            raise TemplateError(f'a parameter reads {written[:60]!r}: it must be name="…" string="true|false", a value')
        if value[1] in arguments:
            raise TemplateError(f"the parameter {value[1]!r} is given twice: once is enough")
        arguments[value[1]] = value[3] if value[2] == "false" else json.dumps(value[3], ensure_ascii=False)
        between, stop = cursor.until(f"<{PARAMETER}", f"</{INVOKE}")
        if between != ">\n":
            raise TemplateError(f"a parameter is followed by {between[:40]!r}: '>' and a line break belong there")
    if stop is None:
        raise TemplateError(f"the call of {name[1]!r} has no end: the tag invoke must be closed")
    pairs = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in arguments.items())
    return ToolCall(name=name[1], arguments="{" + pairs + "}")
