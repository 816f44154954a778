"""What may come next in an answer that must match a grammar. See `structures` for how one is made.

A mask follows one answer and never goes back: drafts that do not obey are never chosen, so there is nothing to undo.
Knows nothing of schemas and formats.
"""

import logging
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class CompiledStructure:
    """One grammar over a vocabulary, for any number of answers. grammar: its text; matcher: llguidance's, at its
    beginning; end_ids: the tokenizer's."""

    def __init__(self, grammar: str, matcher: Any, *, num_tokens: int, end_ids: list[int]):
        self.grammar = grammar
        self._matcher, self._num_tokens, self._end_ids = matcher, num_tokens, end_ids

    def begin(self, *, vocab_size: int, end_ids: frozenset[int]) -> "StructureMask":
        """For one answer. vocab_size: the model's; ids that the tokenizer does not have are never allowed."""
        ends = sorted({*end_ids, *self._end_ids})
        return StructureMask(
            self._matcher.deep_copy(),
            num_tokens=min(self._num_tokens, vocab_size),
            vocab_size=vocab_size,
            ends=[token for token in ends if token < vocab_size],
        )


class StructureMask:
    """Follows one answer. failed: the grammar asked for more than its limits, and the answer was ended."""

    def __init__(self, matcher: Any, *, num_tokens: int, vocab_size: int, ends: list[int]):
        self._matcher, self._num_tokens, self._ends = matcher, num_tokens, ends
        self._allowed_V = np.zeros(vocab_size, dtype=np.bool_)
        self.failed = False

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """bool [V]; where nothing but the end may come, the ids that end an answer."""
        words = b"" if self.failed or self._matcher.is_stopped() else self._matcher.compute_bitmask()
        if words:
            bits = np.unpackbits(np.frombuffer(words, dtype=np.uint8), bitorder="little")
            self._allowed_V[: self._num_tokens] = bits[: self._num_tokens]
        self._check()
        if not words or self.failed or not self._allowed_V.any():
            self._allowed_V[:] = False
            self._allowed_V[self._ends] = True
        else:
            self._allowed_V[self._ends] = self._allowed_V[self._ends].any()
        return self._allowed_V

    def accept(self, token: int) -> None:
        """The answer goes on with `token`."""
        if token not in self._ends and not self.failed:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if not self.failed and self._matcher.is_error():
            self.failed = True
            logger.warning("a grammar is beyond its limits, its answer ends here: %s", self._matcher.get_error()[:300])
