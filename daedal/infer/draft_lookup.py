"""Drafting by prompt look-up: what followed the last few tokens earlier in the same text may follow them again.

Costs no model, and serves texts that repeat themselves or their prompt: code, quotations, summaries (A. Saxena,
prompt lookup decoding, 2023). Longer matches come first, of equal ones the latest. Knows ids only, no torch.
"""

from collections.abc import Mapping, Sequence

from daedal.infer.step import Step

_LONGEST, _SHORTEST = 4, 2  # tokens that must match


class LookupDrafter:
    """The texts of all running requests, and what they suggest."""

    def __init__(self) -> None:
        # A token is kept as the character of that number: str finds sequences of them at the speed of C.
        self._texts: dict[str, str] = {}

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        drafts: dict[str, Sequence[int]] = {}
        for chunk in step.chunks:
            past = _text(chunk.before) or self._texts.get(chunk.request_id, "")[: chunk.past]
            text = past + _text(chunk.ids)
            extended = continued(text, chunk.max_drafts)
            drafts[chunk.request_id] = [ord(token) for token in extended[len(text) :]]
            # Drafts stay: the next `past` cuts away those that were not accepted.
            self._texts[chunk.request_id] = extended
        return drafts

    def forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)


def _text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def continued(text: str, count: int) -> str:
    """`text` and `count` characters as it went on where its end occurred before; `text` itself where it never did."""
    for length in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
        start = text.rfind(text[-length:], 0, len(text) - 1)
        if start >= 0:
            for source in range(start + length, start + length + count):
                text += text[source]
            return text
    return text
