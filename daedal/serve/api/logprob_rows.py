"""Log-probabilities as the OpenAI API writes them: for chat one row per token, for completions four parallel lists.

A token's `bytes` are exact, so that they add up to the answer; its text is a special token's name although that adds no
bytes. The token that ended the answer has its row too: there are as many rows as tokens in `usage`. Minus infinity,
which JSON cannot hold, is written as -9999.
"""

from collections.abc import Sequence

from daedal.infer.request import TokenLogprobs
from daedal.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0


def chat_rows(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> list[dict[str, object]]:
    """The `content` list of a choice's logprobs."""
    return [
        {
            **_row(tokenizer, entry.id, entry.logprob),
            "top_logprobs": [_row(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]


def _row(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token)),
    }


class CompletionRows:
    """Follows one choice of a completion; `text_offset` counts characters from the start of the choice's text.

    skip_special_tokens: as for the text; where they are part of it, the bytes of their names are theirs.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
        self._shows_special_tokens = not skip_special_tokens
        self._offset = start

    def rows(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, list[object]]:
        """Rows for the next `ids`; an entry is None where the model predicts nothing: the prompt's first token."""
        table: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        table["bytes"] = []
        for token, entry in zip(ids, entries, strict=True):
            table["tokens"].append(self._label(token))
            table["bytes"].append(list(self._bytes(token)))
            table["text_offset"].append(self._place(token))
            table["token_logprobs"].append(None if entry is None else max(entry.logprob, LOWEST_LOGPROB))
            table["top_logprobs"].append(None if entry is None else self._top(entry))
        return table

    def _bytes(self, token: int) -> bytes:
        if self._shows_special_tokens and self._tokenizer.is_special(token):
            return self._tokenizer.token_text(token).encode()
        return self._tokenizer.token_bytes(token)

    def _place(self, token: int) -> int:
        """Where the token's text begins; for a piece of a character, where the text that is whole so far ends."""
        whole = self._offset
        piece = self._detokenizer.push(token)
        self._offset += len(piece)
        text = self._tokenizer.token_text(token)
        return self._offset - len(text) if text and piece.endswith(text) else whole

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest and the chosen token, by label."""
        pairs = (*entry.top, (entry.id, entry.logprob))
        return {self._label(token): max(logprob, LOWEST_LOGPROB) for token, logprob in pairs}

    def _label(self, token: int) -> str:
        """A token's text; where that does not tell it from others, its bytes or its id: these lists are keyed by it."""
        text = self._tokenizer.token_text(token)
        if not text:
            return f"token_id:{token}"
        raw = self._tokenizer.token_bytes(token)
        if raw and raw != text.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text


def joined(first: dict[str, list[object]], second: dict[str, list[object]]) -> dict[str, list[object]]:
    return {name: first[name] + second[name] for name in first}
