"""Tool calls as Hermes and Qwen write them: one JSON object with a name and arguments between two tags.

A `Grammar` for `StreamParser`, for templates that write `<tool_call>`. The arguments pass as they come where the object
begins with its name; otherwise, and where they are no object, the call is read when its tag is closed. From the chat
templates of Qwen 2.5 and Qwen 3, which have no parser of their own. Knows nothing of templates.
"""

import json
import re
from typing import Literal

from daedal.text.encodings.answers import Sink
from daedal.text.encodings.lexer import Lexicon, Tag
from daedal.text.encodings.stream import Prose

HERMES_BEGIN = "<tool_call>"
HERMES_END = "</tool_call>"
_LEXICON = Lexicon(fixed={HERMES_BEGIN: "call", HERMES_END: "call_end"}, newlines=1)
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_State = Literal["call", "arguments", "tail", "between"]


class HermesGrammar:
    """One answer's calls. States: call (before the arguments), arguments, tail (after them), between (two calls)."""

    def __init__(self) -> None:
        self._state: _State = "call"
        self._committed = False  # a call has begun: nothing can be given back any more
        self._raw = ""  # the opening tag, and the line breaks before it
        self._body = ""
        self._scan = _Braces()
        self._prose = Prose()

    @property
    def lexicon(self) -> Lexicon:
        return _LEXICON

    def opens(self, tag: Tag) -> bool:
        return tag.kind == "call"

    def begin(self, tag: Tag, before: str, sink: Sink) -> None:
        self._state, self._raw, self._body = "call", before + tag.text, ""

    def text(self, text: str, sink: Sink) -> str | None:
        if self._state == "between":
            self._prose.text(text, sink)
        elif self._state == "arguments":
            self._arguments(text, sink)
        elif self._state == "call":
            self._body += text
            if head := _HEAD.match(self._body):
                rest = self._body[head.end() :]
                sink.begin_call(head["name"])
                self._state, self._committed, self._scan = "arguments", True, _Braces()
                self._arguments(rest, sink)
        return None

    def tag(self, tag: Tag, sink: Sink) -> str | None:
        if self._state == "between":
            self._prose.tag()
            if tag.kind == "call":
                self.begin(tag, "", sink)
            return None
        if tag.kind == "call_end":
            return self._end(tag, sink)
        # The lexicon's tags within a JSON string are part of it.
        self.text(tag.text, sink)
        return None

    def _arguments(self, text: str, sink: Sink) -> None:
        end = self._scan.end(text)
        sink.arguments(text[:end])
        if end is not None:
            self._state = "tail"

    def _end(self, tag: Tag, sink: Sink) -> str | None:
        if self._state == "arguments" and self._scan.in_string:
            sink.arguments(tag.text)
            self._scan.end(tag.text)
            return None
        if self._state == "call" and not self._whole(sink):
            raw = self._raw + self._body
            if not self._committed:
                return raw
            self._prose.text(raw, sink)
        self._state = "between"
        self._prose.tag()
        return None

    def _whole(self, sink: Sink) -> bool:
        """Reads a call whose object did not begin as most do; whether it is one."""
        try:
            call = json.loads(self._body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not name:
            return False
        given = call.get("arguments", call.get("parameters", {}))
        sink.begin_call(name)
        sink.arguments(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
        self._committed = True
        return True


class _Braces:
    """Follows one JSON object to its closing brace."""

    def __init__(self) -> None:
        self.in_string = False
        self._escaped = False
        self._depth = 0

    def end(self, text: str) -> int | None:
        """Where in `text` the object's end lies; None where it goes on."""
        for index, character in enumerate(text):
            if self.in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self.in_string = False
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None
