"""Sorts an answer, as it streams, into reasoning, content and tool calls; how the stream is split makes no difference.

Lenient where models misbehave: a tool call ends a thought that nobody closed; what looks like a tool call but is none
is given as text; an answer that is cut short yields what there is of a call, and no piece of a tag. What a call looks
like is a `Grammar`'s business (`dsml_stream`, `token_calls`). Knows nothing of rendering or ids.
"""

from typing import Protocol

from daedal.text.encodings.answers import Delta, Ids, Sink, new_call_id
from daedal.text.encodings.lexer import Lexer, Lexicon, Tag
from daedal.text.encodings.tokens import ASSISTANT, BAR, EOS, THINK, THINK_END

_THOUGHT_TAGS = {THINK: "think", THINK_END: "think_end"}


class Grammar(Protocol):
    """Reads tool calls, from the tag that may begin one. Every method but `begin` returns text that it gives back.

    None means that the grammar goes on. A string ends its charge: it was no tool call, and the string is what it was
    handed so far (but not the tag at hand, which is then read as any other).
    """

    @property
    def lexicon(self) -> Lexicon: ...

    def opens(self, tag: Tag) -> bool: ...

    def begin(self, tag: Tag, before: str, sink: Sink) -> None:
        """`before`: line breaks that belong to the call, if it becomes one."""

    def tag(self, tag: Tag, sink: Sink) -> str | None: ...

    def text(self, text: str, sink: Sink) -> str | None: ...


class StreamParser:
    """One answer.

    grammar: None where there are no tool calls to find. in_thought: the prompt ended inside a thought. thoughts:
    whether think tags mean anything. trims: line breaks around the thought are layout, not text. eos: never shown.
    """

    def __init__(
        self,
        grammar: Grammar | None,
        *,
        in_thought: bool = False,
        thoughts: bool = True,
        trims: bool = False,
        eos: str = EOS,
        ids: Ids = new_call_id,
    ):
        fixed = {**({eos: "eos"} if eos else {}), **(_THOUGHT_TAGS if thoughts else {})}
        lexicon = grammar.lexicon if grammar is not None else Lexicon(fixed={})
        self._lexer = Lexer(Lexicon(fixed={**fixed, **lexicon.fixed}, headers=lexicon.headers))
        self._grammar = grammar
        self._held_newlines = lexicon.newlines
        self._sink = Sink(ids)
        self._trims = trims
        self._in_thought = in_thought
        self._in_calls = False
        self._fresh = True  # nothing of this thought, or of this content, has been seen
        self._newlines = ""  # held back at the end of what has been seen

    def push(self, text: str) -> list[Delta]:
        """What is certain now."""
        for piece in self._lexer.push(text):
            if isinstance(piece, Tag):
                self._tag(piece)
            else:
                self._text(piece)
        return self._sink.take()

    def finish(self) -> list[Delta]:
        """What was held back. Nothing may be pushed afterwards."""
        rest = self._lexer.finish()
        if BAR in rest:  # a tag that was cut off, and the line breaks before it
            self._newlines = ""
        elif rest and not self._in_calls:
            self._plain(rest)
        if not self._in_calls and not (self._trims and self._in_thought):
            self._emit(self._newlines)
        return self._sink.take()

    def _text(self, text: str) -> None:
        back = self._grammar.text(text, self._sink) if self._in_calls and self._grammar else text
        if back is not None:
            self._in_calls = False
            self._plain(back)

    def _tag(self, tag: Tag) -> None:
        if tag.kind == "eos":
            return
        if self._in_calls and self._grammar:
            back = self._grammar.tag(tag, self._sink)
            if back is None:
                return
            self._in_calls = False
            self._plain(back)
        if self._grammar is not None and self._grammar.opens(tag):
            self._in_calls = True
            before, self._newlines = self._newlines, ""
            self._grammar.begin(tag, before, self._sink)
        elif not self._turns(tag.kind):
            self._plain(tag.text)

    def _turns(self, kind: str) -> bool:
        """Whether this tag begins or ends a thought, or repeats what the prompt already said."""
        if kind == "think_end" and self._in_thought:
            if not self._trims:
                self._emit(self._newlines)
            self._in_thought, self._fresh, self._newlines = False, True, ""
            return True
        if kind == "think" and self._fresh:
            self._in_thought = True
            self._newlines = ""
            return True
        return kind == "think_end" and self._fresh

    def _plain(self, text: str) -> None:
        text = self._newlines + text
        if self._trims and self._fresh:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        ending = text[len(body) :]
        kept = len(ending) if self._trims and self._in_thought else min(len(ending), self._held_newlines)
        self._newlines = ending[len(ending) - kept :]
        self._emit(body + ending[: len(ending) - kept])

    def _emit(self, text: str) -> None:
        if text:
            self._fresh = False
            (self._sink.reasoning if self._in_thought else self._sink.content)(text)


class Prose:
    """Text between the tags of a tool block: white space alone is layout, anything else is content."""

    def __init__(self) -> None:
        self._gap = ""

    def tag(self) -> None:
        """A tag has been read."""
        self._gap = ""

    def text(self, text: str, sink: Sink) -> None:
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        sink.content(body)


def starts_in_thought(prompt: str) -> bool:
    """Whether the answer to this prompt begins inside a thought, by the prompt's last tags."""
    end = prompt.rstrip("\n")
    if end.endswith((THINK, THINK_END)):
        return end.endswith(THINK)
    tail = prompt.rpartition(ASSISTANT)[2] if ASSISTANT in prompt else ""
    is_thought = tail.startswith(THINK) and THINK_END not in tail and EOS not in tail
    return is_thought and not end.endswith(f"{BAR}>")  # a quick instruction after the tag leaves no room for a thought
