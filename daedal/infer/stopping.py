"""When an answer ends, and which of its text may be shown already.

Text that might be the beginning of a stop string is held back until it is known not to be, so that what was shown never
has to be taken back and the text is the same however the tokens split it. Knows one request at a time; no model, no
cache.
"""

from collections.abc import Set

from daedal.infer.request import FinishReason, SamplingParams
from daedal.text.decoding import Detokenizer


class StopStrings:
    """Finds the first stop string in a text that comes in pieces; `found`: that one.

    Of several, the one that ends first counts, and of those the longest: so the pieces' borders do not matter.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.found: str | None = None
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string was found: then that text is the last."""
        if not self._matchers:
            return piece, False
        text = self._held + piece
        for end, character in enumerate(piece, start=len(self._held) + 1):
            found = [matcher.stop for matcher in self._matchers if matcher.feed(character)]
            if found:
                self._held, self.found = "", max(found, key=len)
                return text[: end - len(self.found)], True
        num_held = max(matcher.matched for matcher in self._matchers)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """What is held back still, when the answer ends for another reason."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth, Morris and Pratt: `matched` is the longest end of the text so far with which `stop` begins."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        self._fallback = [0] * len(stop)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[index] == stop[length]
            self._fallback[index] = length

    def feed(self, character: str) -> bool:
        """Whether the stop string is complete with this character; nothing may be fed after it is."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)


class Ending:
    """Follows one answer: takes its tokens, gives its text, and says when and why it is over.

    end_ids: the ids that end an answer unless `ignore_eos`. room: tokens that the context has left after the prompt.
    detokenizer: None where no text is wanted; the request then has no stop strings.
    """

    def __init__(self, params: SamplingParams, *, end_ids: Set[int], room: int, detokenizer: Detokenizer | None):
        assert detokenizer is not None or not params.stop
        self._stop_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(end_ids))
        self._num_left = min(params.max_tokens, room)
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(params.stop)

    @property
    def stop_string(self) -> str | None:
        """The one that ended the answer."""
        return self._stop_strings.found

    def ends_with(self, token: int) -> bool:
        """Whether the answer is over with this token, whatever its text."""
        return token in self._stop_ids

    def push(self, token: int) -> tuple[str | None, FinishReason | None]:
        """The text that `token` brings out, and the reason if the answer ends with it.

        The text of a stop id is not part of the answer, as that of a stop string is not.
        """
        self._num_left -= 1
        if token in self._stop_ids:
            return self.finish(), "stop"
        text: str | None = None
        if self._detokenizer is not None:
            text, found = self._stop_strings.push(self._detokenizer.push(token))
            if found:
                return text, "stop"
        if self._num_left > 0:
            return text, None
        if text is None:
            return None, "length"
        rest, found = self._rest()
        return text + rest, "stop" if found else "length"

    def finish(self) -> str | None:
        """The text held back still, for an answer that ends without a further token."""
        return None if self._detokenizer is None else self._rest()[0]

    def _rest(self) -> tuple[str, bool]:
        """What an incomplete character and an incomplete stop string kept back; whether that completes the latter."""
        assert self._detokenizer is not None
        text, found = self._stop_strings.push(self._detokenizer.finish())
        return (text, True) if found else (text + self._stop_strings.finish(), False)
