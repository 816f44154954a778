"""Cuts an answer, as it streams, into text and tags; however the stream is split, the cuts are the same.

A tag begins with `<`. Some tags are fixed; others (headers) carry a name, in a pattern without `<` or line breaks. Only
what may still become a tag is held back. Knows nothing of what tags mean.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LONGEST_HEADER = 512


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One tag as it stood in the text. name and attribute: what a header's pattern caught."""

    kind: str
    text: str
    name: str = ""
    attribute: str = ""


@dataclass(frozen=True, kw_only=True)
class Header:
    """A tag that begins with `lead`, goes on with `pattern` (groups: name, attribute), and ends on one line."""

    kind: str
    lead: str
    pattern: re.Pattern[str]


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """The tags to look for. fixed: text to kind. newlines: how many line breaks before tool calls belong to them."""

    fixed: Mapping[str, str]
    headers: Sequence[Header] = ()
    newlines: int = 0


class Lexer:
    """One answer's text, piece by piece."""

    def __init__(self, lexicon: Lexicon):
        self._lexicon = lexicon
        self._held = ""

    def push(self, text: str) -> list[str | Tag]:
        """Text that is certain to be text, and whole tags, in order."""
        buffer = self._held + text
        pieces: list[str | Tag] = []
        begin = 0
        at = buffer.find("<")
        while at >= 0:
            tag, possible = self._match(buffer, at)
            if tag is None and possible:
                break
            if tag is None:
                at = buffer.find("<", at + 1)
                continue
            if at > begin:
                pieces.append(buffer[begin:at])
            pieces.append(tag)
            begin = at + len(tag.text)
            at = buffer.find("<", begin)
        end = len(buffer) if at < 0 else at
        if end > begin:
            pieces.append(buffer[begin:end])
        self._held = buffer[end:]
        return pieces

    def finish(self) -> str:
        """The beginning of a tag that never came to its end."""
        held, self._held = self._held, ""
        return held

    def _match(self, buffer: str, at: int) -> tuple[Tag | None, bool]:
        """The tag at `at`; if there is none, whether there may be one once more text has come."""
        rest = len(buffer) - at
        possible = False
        for text, kind in self._lexicon.fixed.items():
            if buffer.startswith(text, at):
                return Tag(kind=kind, text=text), True
            possible = possible or (rest < len(text) and text.startswith(buffer[at:]))
        for header in self._lexicon.headers:
            if buffer.startswith(header.lead, at):
                tag = _header(header, buffer, at)
                if tag is not None:
                    return tag, True
                tail = buffer[at + len(header.lead) : at + _LONGEST_HEADER]
                possible = possible or (rest < _LONGEST_HEADER and not ("<" in tail or "\n" in tail))
            else:
                possible = possible or (rest < len(header.lead) and header.lead.startswith(buffer[at:]))
        return None, possible


def _header(header: Header, buffer: str, at: int) -> Tag | None:
    match = header.pattern.match(buffer, at + len(header.lead), at + _LONGEST_HEADER)
    if match is None:
        return None
    return Tag(kind=header.kind, text=buffer[at : match.end()], name=match["name"], attribute=match["attribute"])
