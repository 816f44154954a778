"""Tool calls of V3, R1 and V3.1, which are made of special tokens: writing, strict reading, and a `Grammar`.

V3 and R1 write the word `function`, the name, and the arguments in a fence of code; V3.1 writes name and arguments
alone. From the chat templates and model cards of these checkpoints, which have no parser of their own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from daedal.errors import TemplateError
from daedal.text.encodings.answers import Answer, Sink, ToolCall
from daedal.text.encodings.lexer import Lexicon, Tag
from daedal.text.encodings.messages import Call
from daedal.text.encodings.plain import read_object
from daedal.text.encodings.stream import Prose
from daedal.text.encodings.tokens import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END, EOS, THINK_END

_LEXICON = Lexicon(
    fixed={
        CALLS_BEGIN: "calls",
        CALLS_END: "calls_end",
        CALL_BEGIN: "call",
        CALL_END: "call_end",
        CALL_SEPARATOR: "separator",
    }
)
_FENCE = re.compile(r"\A\s*(?:```(?:json)?\s*)?")
_LONGEST_NAME = 512
_LONGEST_FENCE = 16  # held back at the end of the arguments, lest it be what closes them
_State = Literal["pending", "block", "head", "name", "fence", "arguments"]


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a family writes one call. fenced: with the word `function` and a fence of code, a line between calls."""

    fenced: bool

    def grammar(self) -> "TokenGrammar":
        return TokenGrammar(self)

    def write(self, calls: Sequence[Call]) -> str:
        """The block that ends an assistant's turn; empty where there are no calls."""
        if not calls:
            return ""
        return CALLS_BEGIN + ("\n" if self.fenced else "").join(map(self._write_call, calls)) + CALLS_END

    def _write_call(self, call: Call) -> str:
        if self.fenced:
            return f"{CALL_BEGIN}function{CALL_SEPARATOR}{call.name}\n```json\n{call.text}\n```{CALL_END}"
        return f"{CALL_BEGIN}{call.name}{CALL_SEPARATOR}{call.text}{CALL_END}"

    def read_answer(self, text: str, thinking: bool) -> Answer:
        """A whole, well-formed answer, its end token included; `thinking`: it begins inside a thought.

        TemplateError names what is malformed.
        """
        body, end, rest = text.partition(EOS)
        if not end or rest:
            raise TemplateError("the answer does not end with its end token, once: give a whole answer")
        reasoning, closed, content = body.partition(THINK_END) if thinking else ("", THINK_END, body)
        if not closed:
            raise TemplateError(f"the thought has no {THINK_END}: an answer that begins in a thought must end it")
        content, begun, block = content.partition(CALLS_BEGIN)
        calls: tuple[ToolCall, ...] = ()
        if begun:
            block, ended, rest = block.partition(CALLS_END)
            if not ended or rest:
                raise TemplateError("the tool calls have no end, or text after it: nothing but the end token may come")
            calls = self._read_calls(block)
        return Answer(reasoning=reasoning, content=content, tool_calls=calls)

    def _read_calls(self, block: str) -> tuple[ToolCall, ...]:
        body = r"function{sep}([^\n]+)\n```json\n(.*?)\n```" if self.fenced else r"(.+?){sep}(.*?)"
        gap = r"\n?" if self.fenced else ""
        call = re.compile(gap + CALL_BEGIN + body.format(sep=CALL_SEPARATOR) + CALL_END, re.DOTALL)
        calls = []
        at = 0
        while at < len(block):
            match = call.match(block, at)
            if match is None:
                raise TemplateError(f"the tool calls hold {block[at:][:60]!r}: a call has a name and its arguments")
            name, arguments = match[1].strip(), match[2].strip() if self.fenced else match[2]
            read_object(arguments, f"the arguments of {name!r}")
            calls.append(ToolCall(name=name, arguments=arguments))
            at = match.end()
        return tuple(calls)


class TokenGrammar:
    """One answer's calls as they stream. States: pending (no call yet), block (between calls), head (before the
    separator), name (the line after it), fence (before the arguments), arguments."""

    def __init__(self, spelling: Spelling):
        self._fenced = spelling.fenced
        self._state: _State = "pending"
        self._committed = False  # a call has begun: nothing can be given back any more
        self._empty = True  # the call has no arguments so far
        self._raw = ""
        self._part = ""
        self._prose = Prose()

    @property
    def lexicon(self) -> Lexicon:
        return _LEXICON

    def opens(self, tag: Tag) -> bool:
        return tag.kind in ("calls", "call")

    def begin(self, tag: Tag, before: str, sink: Sink) -> None:
        self._raw = before + tag.text
        self._part = ""
        self._state = "pending" if tag.kind == "calls" else "head"

    def text(self, text: str, sink: Sink) -> str | None:
        self._raw += text if self._state in ("pending", "head", "name") else ""
        if self._state == "pending":
            return None if text.isspace() else self._raw
        if self._state == "block":
            self._prose.text(text, sink)
            return None
        self._part += text
        if self._state == "head":
            return self._give_up(sink) if len(self._part) > _LONGEST_NAME else None
        if self._state == "name":
            return self._name(sink)
        if self._state == "fence":
            self._fence(whole=False)
        if self._state == "arguments":
            self._arguments(sink)
        return None

    def tag(self, tag: Tag, sink: Sink) -> str | None:
        if self._state in ("pending", "block"):
            return self._tag_between(tag)
        if self._state == "head" and tag.kind == "separator":
            self._raw += tag.text
            return self._separator(sink)
        if self._state in ("head", "name"):
            if not self._committed:
                return self._raw
            self._give_up(sink)
            return self._tag_between(tag)
        if tag.kind in ("call_end", "calls_end"):
            self._end_call(sink)
        else:
            self.text(tag.text, sink)
        return None

    def _tag_between(self, tag: Tag) -> str | None:
        if tag.kind == "call":
            self._raw = self._raw + tag.text if self._state == "pending" else tag.text
            self._state, self._part = "head", ""
        elif self._state == "pending" and tag.kind != "calls_end":
            return self._raw
        else:
            self._state = "block"
            self._prose.tag()
        return None

    def _separator(self, sink: Sink) -> str | None:
        head, self._part = self._part.strip(), ""
        if self._fenced:
            self._state = "name"
        elif head:
            self._begin_call(head, sink)
        else:
            return self._give_up(sink)
        return None

    def _name(self, sink: Sink) -> str | None:
        line, broken, rest = self._part.partition("\n")
        if not broken and len(line) <= _LONGEST_NAME:
            return None
        if not broken or not line.strip() or len(line) > _LONGEST_NAME:
            return self._give_up(sink)
        self._begin_call(line.strip(), sink)
        self._state, self._part = "fence", ""
        return self.text(rest, sink) if rest else None

    def _begin_call(self, name: str, sink: Sink) -> None:
        sink.begin_call(name)
        self._state, self._committed, self._raw, self._empty = "arguments", True, "", True

    def _fence(self, *, whole: bool) -> None:
        """Passes what opens the fence, before the object's brace; arguments without a fence are taken as they are."""
        if "{" in self._part or whole:
            self._part = _FENCE.sub("", self._part, count=1)
            self._state = "arguments"

    def _arguments(self, sink: Sink) -> None:
        end = len(self._part)
        if self._fenced:
            end = max(len(self._part.rstrip("`").rstrip()), end - _LONGEST_FENCE)
        body, self._part = self._part[:end], self._part[end:]
        self._empty = self._empty and not body
        sink.arguments(body)

    def _end_call(self, sink: Sink) -> None:
        if self._state == "fence":
            self._fence(whole=True)
            self._arguments(sink)
        if self._empty:
            sink.arguments("{}")
        self._state, self._part = "block", ""
        self._prose.tag()

    def _give_up(self, sink: Sink) -> str | None:
        """What was read since the last call is text: the answer's own, or, after a call, what stands between calls."""
        raw, self._raw, self._part = self._raw, "", ""
        if not self._committed:
            return raw
        self._state = "block"
        self._prose.tag()
        self._prose.text(raw, sink)
        return None
