"""A tokenizer's vocabulary as llguidance wants it: the bytes of each token, and which are special.

Special here is what text cannot spell: the tokenizer's own special tokens, those without bytes, and the tags of chat
formats that are one token, which grammars name by their ids. So a JSON string cannot hold what would end a tool call.
Knows nothing of grammars.
"""

from functools import cached_property

from daedal.text.encodings import tokens
from daedal.text.encodings.hermes import HERMES_BEGIN, HERMES_END
from daedal.text.tokenizer import Tokenizer

_TAGS = (
    tokens.THINK,
    tokens.THINK_END,
    tokens.CALLS_BEGIN,
    tokens.CALLS_END,
    tokens.CALL_BEGIN,
    tokens.CALL_END,
    tokens.CALL_SEPARATOR,
    HERMES_BEGIN,
    HERMES_END,
)


class Vocabulary:
    """Worked out when it is first asked for; its names are those that llguidance asks a tokenizer for."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @property
    def num_tokens(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def end_ids(self) -> list[int]:
        return sorted(self._tokenizer.eos_ids)

    @property
    def eos_token_id(self) -> int:
        return self.end_ids[0]

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_id

    @cached_property
    def tags(self) -> dict[str, int]:
        """The id of each tag that is one token."""
        found = {tag: self._tokenizer.encode(tag, add_special_tokens=False) for tag in _TAGS}
        return {tag: ids[0] for tag, ids in found.items() if len(ids) == 1}

    @cached_property
    def special_token_ids(self) -> list[int]:
        tags = set(self.tags.values())
        return [token for token in range(self.num_tokens) if token in tags or not self._text(token)]

    @cached_property
    def tokens(self) -> list[bytes]:
        """Of every token its bytes, of a special one a name."""
        special = set(self.special_token_ids)
        return [f"<{token}>".encode() if token in special else self._text(token) for token in range(self.num_tokens)]

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text; it may end within a character."""
        whole = text if isinstance(text, str) else text.decode(errors="ignore")
        return self._tokenizer.encode(whole, add_special_tokens=False)

    def _text(self, token: int) -> bytes:
        name = self._tokenizer.token_text(token)
        if not self._tokenizer.is_special(token):
            return self._tokenizer.token_bytes(token)
        # The mark of DSML is part of longer tags, so grammars spell it, also where it is a special token.
        return name.encode() if name == tokens.DSML else b""
