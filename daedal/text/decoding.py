"""From token ids back to bytes, and from bytes to text that never breaks inside a character.

A decoder is read off the `decoder` entry of tokenizer.json. Two families are exact to the byte: byte-level BPE, where
every vocabulary character stands for one byte, and SentencePiece's kind, where a mark stands for a space and `<0x0A>`
for a byte. For any other decoder the `tokenizers` library itself is asked, a few tokens at a time. Knows nothing of
files, encoding or models.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte, as character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


@dataclass(frozen=True, kw_only=True)
class ByteDecoder:
    """Tokens to bytes, for tokenizers whose text is its tokens' bytes put side by side.

    alphabet: character to byte, empty where characters mean themselves. replacements: (from, to) within a token.
    byte_fallback: `<0xE2>` means that byte. strip: at most so many of this character vanish at the start of the text.
    strip_first: this character vanishes from the whole first token (the Metaspace decoder does so).
    """

    alphabet: dict[str, int] = field(default_factory=dict)
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: tuple[str, int] = ("", 0)
    strip_first: str = ""

    def bytes_of(self, token: str, *, first: bool = False) -> bytes:
        """`first`: the token opens the text."""
        if self.alphabet:
            mapped = [self.alphabet.get(character) for character in token]
            # An added token may hold characters outside the alphabet; then it means itself.
            return token.encode() if None in mapped else bytes(byte for byte in mapped if byte is not None)
        if first and self.strip_first:
            token = token.replace(self.strip_first, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


def read_decoder(spec: object) -> ByteDecoder | None:
    """The byte-exact decoder that a `decoder` entry of tokenizer.json describes; None where there is none."""
    if not isinstance(spec, dict):
        return None
    if spec.get("type") == "ByteLevel":
        return ByteDecoder(alphabet=byte_characters())
    if spec.get("type") == "Metaspace":
        return _metaspace(spec)
    if spec.get("type") == "Sequence":
        return _sequence(spec.get("decoders"))
    return None


def _metaspace(spec: dict[str, object]) -> ByteDecoder | None:
    mark = spec.get("replacement")
    if not isinstance(mark, str):
        return None
    keeps = spec.get("prepend_scheme") == "never" or spec.get("add_prefix_space") is False
    return ByteDecoder(replacements=((mark, " "),), strip_first="" if keeps else mark)


def _sequence(specs: object) -> ByteDecoder | None:
    """Replace*, ByteFallback?, Fuse, Strip(start only)?, or one decoder alone; anything else is not byte-exact."""
    if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
        return None
    if len(specs) == 1 and specs[0].get("type") != "Sequence":
        single = read_decoder(specs[0])
        if single is not None:
            return single
    kinds = "".join(_LETTERS.get(str(spec.get("type")), "?") for spec in specs)
    if not re.fullmatch("R*B?(FS?)?", kinds):
        return None
    replacements: list[tuple[str, str]] = []
    strip = ("", 0)
    for spec in specs:
        if spec["type"] == "Replace":
            pattern, content = spec.get("pattern"), spec.get("content")
            old = pattern.get("String") if isinstance(pattern, dict) else None
            if not isinstance(old, str) or not isinstance(content, str):
                return None
            replacements.append((old, content))
        elif spec["type"] == "Strip":
            content, start = spec.get("content"), spec.get("start")
            if not isinstance(content, str) or not isinstance(start, int) or spec.get("stop"):
                return None
            strip = (content, start)
    return ByteDecoder(replacements=tuple(replacements), byte_fallback="B" in kinds, strip=strip)


_LETTERS = {"Replace": "R", "ByteFallback": "B", "Fuse": "F", "Strip": "S"}


class Detokenizer(Protocol):
    """One text, fed token by token. The pieces and the rest, put together, are the whole text."""

    def push(self, token_id: int) -> str:
        """What is certain now: whole characters only; "" for ids that have no text."""

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""


class ByteDetokenizer:
    """The exact kind. `token_of`: an id's vocabulary entry, None for ids that have no text."""

    def __init__(self, decoder: ByteDecoder, token_of: Callable[[int], str | None]):
        self._decoder = decoder
        self._token_of = token_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip_left = decoder.strip[1]

    def push(self, token_id: int) -> str:
        token = self._token_of(token_id)
        if token is None:
            return ""
        raw = self._decoder.bytes_of(token, first=self._first)
        self._first = False
        return self._stripped(self._utf8.decode(raw))

    def finish(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._decoder.strip[0]):
                self._strip_left = 0
                break
            self._strip_left -= 1
            text = text[len(self._decoder.strip[0]) :]
        return text


class WindowDetokenizer:
    """For any other decoder: `decode` turns ids into the library's text, and only a short window is decoded again.

    The window opens with the tokens of the last piece, because such decoders look one token back (for a space between
    words, say). Text that ends in U+FFFD is held: the next token may complete the character.
    """

    def __init__(self, decode: Callable[[list[int]], str], token_of: Callable[[int], str | None]):
        self._decode = decode
        self._token_of = token_of
        self._window: list[int] = []
        self._emitted = 0  # tokens of the window whose text is out already

    def push(self, token_id: int) -> str:
        if self._token_of(token_id) is None:
            return ""
        self._window.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._window[: self._emitted])
        text = self._decode(self._window)
        if len(text) <= len(before) or (text.endswith("�") and not final):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text[len(before) :]
