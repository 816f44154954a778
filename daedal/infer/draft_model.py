"""Drafting with a smaller model of the same vocabulary: it reads along, and goes on greedily by itself.

Its cache has its own pools but the target's page tables and states, so the scheduler need not know it. It runs over
every chunk before the target does, and so has read all that the target has; rows of drafts that were not accepted are
written again, and beginnings that the target need not read are copied for it too. Knows nothing of the target's logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from daedal.infer.cache import PagedCache
from daedal.infer.feeding import feed
from daedal.infer.sampling import Logits, greedy
from daedal.infer.step import Chunk, Step
from daedal.model.transformer import Transformer


@dataclass(kw_only=True, eq=False)
class _Read:
    """A sequence as the draft model has it: its tokens and, after them, its own drafts; how many of all were fed."""

    tokens: list[int] = field(default_factory=list)
    num_cached: int = 0


class ModelDrafter:
    """`model` on its own `cache`."""

    def __init__(self, model: Transformer, cache: PagedCache):
        self._model = model
        self._cache = cache
        self._reads: dict[str, _Read] = {}

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        for chunk in step.chunks:
            read = self._reads.setdefault(chunk.request_id, _Read())
            if chunk.before:
                read.tokens, read.num_cached = list(chunk.before), chunk.past
            read.tokens[chunk.past :] = chunk.ids
            read.num_cached = min(read.num_cached, chunk.past)
        going = list(step.chunks)
        place = 0
        while going:
            hidden_BD = self._feed(going)
            rows = [row for row, chunk in enumerate(going) if chunk.max_drafts > place]
            going = [going[row] for row in rows]
            for chunk, token in zip(going, greedy(Logits(self._model.head(hidden_BD[rows]))), strict=True):
                self._reads[chunk.request_id].tokens.append(token)
            place += 1
            going = [chunk for chunk in going if chunk.max_drafts > place]
        return {chunk.request_id: self._reads[chunk.request_id].tokens[chunk.end :] for chunk in step.chunks}

    def forget(self, request_id: str) -> None:
        self._reads.pop(request_id, None)

    def _feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Reads on to the end of what is known or drafted; the last hidden state of each sequence."""
        reads = [self._reads[chunk.request_id] for chunk in chunks]
        unread = [read.tokens[read.num_cached :] for read in reads]
        pasts = [read.num_cached for read in reads]
        batch, view = feed(self._cache, chunks, unread, pasts, self._model.device)
        for read in reads:
            read.num_cached = len(read.tokens)
        hidden_TD: Tensor = self._model(batch, view, hidden=True)
        return hidden_TD[[end - 1 for end in batch.starts[1:]]]
