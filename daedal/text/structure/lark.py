"""Shapes as grammars in llguidance's dialect of Lark.

Tags that are tokens are named by their ids, others are spelled. Of a thought, and of text in which calls may stand,
nothing is asked but that it ends where its end tag, or a block of calls, begins. Knows nothing of who reads grammars.
"""

import json
import re
from collections.abc import Iterable, Mapping

from daedal.text.encodings.tokens import THINK, THINK_END
from daedal.text.structure.parameters import DsmlParameters
from daedal.text.structure.shape import Callee, Calls, Schema, Shape
from daedal.text.structure.values import json_value

_ANY_OBJECT: Schema = {"type": "object"}


def grammar_of(shape: Shape, tags: Mapping[str, int]) -> str:
    """The grammar; tags: the ids of tags that are one token."""
    return _Writer(tags).grammar(shape)


def literal(text: str) -> str:
    """A text as a grammar quotes it."""
    return json.dumps(text)


class _Writer:
    def __init__(self, tags: Mapping[str, int]):
        self._tags = tags
        self._rules = ['%llguidance {"no_forcing": true}', r"TEXT: /(.|\n)*/"]

    def grammar(self, shape: Shape) -> str:
        body = self._body(shape)
        if shape.thought != "none":
            gap = f" {literal(chr(10) * 2)}?" if shape.gap else ""
            thought = f"{self._until(THINK_END)}{gap}"
            if shape.thought == "may":
                thought = f"({self._spell(THINK)} {thought})?"
            body = f"{thought} ({body})"
        return "\n".join([*self._rules, f"start: {body}", ""])

    def _body(self, shape: Shape) -> str:
        if shape.calls is None:
            assert shape.json is not None
            return self._rule("json", json_value(dict(shape.json)))
        if shape.calls.must:
            return self._block(shape.calls)
        if shape.json is not None:
            return f"{self._rule('json', json_value(dict(shape.json)))} | {self._block(shape.calls)}"
        return self._text_and_block(shape.calls)

    def _block(self, calls: Calls) -> str:
        spelling = calls.spelling
        lead = f"{literal(spelling.lead)}? " if spelling.lead else ""
        call = self._call(calls)
        return f"{lead}{self._spell(spelling.begin)} {call} {self._more(calls, call)} {self._spell(spelling.end)}"

    def _text_and_block(self, calls: Calls) -> str:
        """Any text, then a block or none; what begins a block begins nothing else."""
        spelling = calls.spelling
        opening = spelling.begin + spelling.before_name
        tag = next((tag for tag in self._tags if opening.startswith(tag)), None)
        trigger = tag or spelling.begin or spelling.before_name.partition("\n")[0]
        before = f"TEXT {self._spell(trigger)}" if tag else self._until(trigger)
        first = self._call(calls, trigger.removeprefix(spelling.begin)) if not spelling.begin else self._call(calls)
        call = self._call(calls)
        return f"TEXT | {before} {first} {self._more(calls, call)} {self._spell(spelling.end)}"

    def _more(self, calls: Calls, call: str) -> str:
        return f"({self._spell(calls.spelling.between)} {call})*" if calls.many else ""

    def _call(self, calls: Calls, begun: str = "") -> str:
        """The rule of one call; begun: what of it has been spelled already."""
        name = f"call{len(self._rules)}"
        ways = (self._way(function, calls, begun) for function in calls.functions)
        return self._rule(name, " | ".join(ways))

    def _way(self, function: Callee, calls: Calls, begun: str) -> str:
        spelling = calls.spelling
        head = (spelling.before_name + function.name + spelling.after_name).removeprefix(begun)
        if spelling.arguments == "dsml":
            written = DsmlParameters(f"f{len(self._rules)}", function.parameters)
            self._rules += written.rules
            return f"{self._spell(head)} {written.start} {self._spell(spelling.call_end)}"
        arguments = self._rule(f"arguments{len(self._rules)}", json_value(dict(function.parameters or _ANY_OBJECT)))
        return f"{self._spell(head)} {arguments} {self._spell(spelling.call_end)}"

    def _until(self, end: str) -> str:
        """Any text, and the tag that ends it."""
        if end in self._tags:
            return f"TEXT {self._spell(end)}"
        return self._rule(f"until{len(self._rules)}[lazy]", f"TEXT {literal(end)}")

    def _rule(self, head: str, body: str) -> str:
        self._rules.append(f"{head}: {body}")
        return head.partition("[")[0]

    def _spell(self, text: str) -> str:
        """Text in which tags that are tokens stand by their ids."""
        return " ".join(self._parts(text))

    def _parts(self, text: str) -> Iterable[str]:
        pattern = "(" + "|".join(map(re.escape, self._tags)) + ")" if self._tags else "(?!)"
        for part in re.split(pattern, text):
            if part in self._tags:
                yield f"<[{self._tags[part]}]>"
            elif part:
                yield literal(part)
