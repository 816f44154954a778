"""DSML tool calls as they stream: a `Grammar` for `StreamParser`.

The JSON of a call's arguments is written while its parameters arrive: strings are escaped piece by piece, other values
pass as they are. A call is one once its first parameter or its end is there; before that it may be mere talk of calls.
Where the markup breaks inside a call, its JSON stays open, so that nobody executes half a call, and the rest is
content. Both names of the block are understood, calls without a block, and arguments given as one JSON object.
"""

import json
import re
from typing import Literal

from daedal.text.encodings.answers import Sink
from daedal.text.encodings.dsml import INVOKE, PARAMETER, V4_BLOCK, V32_BLOCK
from daedal.text.encodings.lexer import Header, Lexicon, Tag
from daedal.text.encodings.stream import Prose
from daedal.text.encodings.tokens import DSML

_LEXICON = Lexicon(
    fixed={
        **{f"<{DSML}{block}>": "block" for block in (V32_BLOCK, V4_BLOCK)},
        **{f"</{DSML}{block}>": "block_end" for block in (V32_BLOCK, V4_BLOCK)},
        f"</{INVOKE}>": "invoke_end",
        f"</{PARAMETER}>": "parameter_end",
    },
    headers=(
        Header(
            kind="invoke", lead=f"<{INVOKE}", pattern=re.compile(r' +name="(?P<name>[^<\n]+?)" *(?P<attribute>/?)>')
        ),
        Header(
            kind="parameter",
            lead=f"<{PARAMETER}",
            pattern=re.compile(r' +name="(?P<name>[^<\n]*?)" +string="(?P<attribute>true|false)" *>'),
        ),
    ),
    newlines=2,
)
_State = Literal["pending", "block", "opening", "invoke", "string", "json", "body"]


class DsmlGrammar:
    """One answer's calls.

    States: pending (a block, no call yet), block (between calls), opening (a call's first tag, which may yet be mere
    text), invoke (between parameters), string and json (inside a parameter), body (inside a JSON object that stands for
    all parameters).
    """

    def __init__(self) -> None:
        self._state: _State = "pending"
        self._committed = False  # a call has begun: nothing can be given back any more
        self._raw = ""
        self._name = ""
        self._gap = ""
        self._num_parameters = 0
        self._prose = Prose()

    @property
    def lexicon(self) -> Lexicon:
        return _LEXICON

    def opens(self, tag: Tag) -> bool:
        return tag.kind in ("block", "invoke")

    def begin(self, tag: Tag, before: str, sink: Sink) -> None:
        self._state, self._raw = "pending", before
        if tag.kind == "invoke":
            self._open_call(tag, sink)
        else:
            self._raw += tag.text

    def text(self, text: str, sink: Sink) -> str | None:
        if self._state in ("pending", "opening"):
            return self._text_before(text, sink)
        if self._state == "block":
            self._prose.text(text, sink)
        elif self._state == "invoke":
            self._gap += text
            if not text.isspace():
                self._end_call()
                self._prose.text(self._gap, sink)
        elif self._state == "string":
            sink.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        elif self._state == "json":
            sink.arguments(text)
        else:
            self._body(text, sink)
        return None

    def tag(self, tag: Tag, sink: Sink) -> str | None:
        if self._state in ("pending", "opening"):
            return self._tag_before(tag, sink)
        if self._state in ("string", "json") and tag.kind in ("parameter_end", "parameter", "invoke_end", "block_end"):
            self._end_parameter(sink)
            if tag.kind == "parameter_end":
                return None
        if self._state == "invoke":
            self._tag_in_call(tag, sink)
        elif self._state == "body" and tag.kind in ("invoke_end", "block_end"):
            self._end_call()
        elif self._state == "block":
            self._tag_in_block(tag, sink)
        else:
            self.text(tag.text, sink)
        return None

    def _text_before(self, text: str, sink: Sink) -> str | None:
        self._raw += text
        if text.isspace():
            return None
        if self._state == "opening" and text.lstrip().startswith("{"):
            self._begin_call(sink)
            self._state = "body"
            self._body(text.lstrip(), sink)
            return None
        return self._give_up(sink)

    def _tag_before(self, tag: Tag, sink: Sink) -> str | None:
        if self._state == "opening" and tag.kind in ("parameter", "invoke_end", "block_end", "invoke"):
            self._begin_call(sink)
            self._tag_in_call(tag, sink)
        elif self._state == "pending" and tag.kind == "invoke":
            self._open_call(tag, sink)
        elif self._state == "pending" and tag.kind == "block_end":
            self._end_call()  # an empty block
        elif self._committed:
            self._give_up(sink)
            self._tag_in_block(tag, sink)
        else:
            return self._raw
        return None

    def _tag_in_block(self, tag: Tag, sink: Sink) -> None:
        if tag.kind == "invoke":
            self._raw = ""
            self._open_call(tag, sink)
        elif tag.kind in ("parameter", "parameter_end", "invoke_end"):
            self._prose.text(tag.text, sink)  # what is left of a broken call
        else:
            self._prose.tag()

    def _tag_in_call(self, tag: Tag, sink: Sink) -> None:
        if tag.kind == "parameter":
            name = json.dumps(tag.name, ensure_ascii=False)
            quote = '"' if tag.attribute == "true" else ""
            sink.arguments(("{" if self._num_parameters == 0 else ", ") + f"{name}: {quote}")
            self._num_parameters += 1
            self._state = "string" if quote else "json"
        elif tag.kind in ("invoke_end", "block_end", "invoke"):
            sink.arguments("}" if self._num_parameters else "{}")
            self._end_call()
            if tag.kind == "invoke":
                self._tag_in_block(tag, sink)
        else:
            self._end_call()
            self._prose.text(tag.text, sink)

    def _open_call(self, tag: Tag, sink: Sink) -> None:
        self._state, self._name = "opening", tag.name
        self._raw += tag.text
        if tag.attribute:  # the tag closes itself
            self._begin_call(sink)
            sink.arguments("{}")
            self._end_call()

    def _begin_call(self, sink: Sink) -> None:
        sink.begin_call(self._name)
        self._state, self._committed, self._num_parameters, self._gap = "invoke", True, 0, ""

    def _end_call(self) -> None:
        self._state = "block"
        self._prose.tag()

    def _end_parameter(self, sink: Sink) -> None:
        if self._state == "string":
            sink.arguments('"')
        self._state, self._gap = "invoke", ""

    def _body(self, text: str, sink: Sink) -> None:
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        sink.arguments(body)

    def _give_up(self, sink: Sink) -> str | None:
        """What was taken for a call is text: the answer's own, or, after a call, what stands between calls."""
        if not self._committed:
            return self._raw
        self._end_call()
        self._prose.text(self._raw, sink)
        return None
