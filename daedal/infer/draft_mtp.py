"""Drafting with the model's own multi-token prediction module (V3, section 2.2; V4, section 2.1).

The module follows the target: after each step it runs over the same positions, fed with the target's states there and
with the tokens that came next, and so its cache is complete from the first token of the prompt. At the last position
its states give the first draft; fed its own states and that draft it goes on, one position further each time. The rows
that this leaves are written again when the target's own states are known. Only the first module is used. Where a
request starts behind a beginning that the cache held, the module's last row there was made for the token that came next
then; only a guess may suffer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from daedal.infer.cache import PagedCache
from daedal.infer.feeding import feed
from daedal.infer.sampling import Logits, greedy
from daedal.infer.step import Chunk, Step
from daedal.model.transformer import Transformer

_MODULE = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Last:
    """The module's state at the position before `end`, from which the token after that at `end` is guessed."""

    end: int
    state: Tensor


class MtpDrafter:
    """The drafting module of `model`, on the layers of `cache` that follow the model's own."""

    def __init__(self, model: Transformer, cache: PagedCache):
        self._model = model
        self._cache = cache
        self._last: dict[str, _Last] = {}

    def propose(self, step: Step) -> Mapping[str, Sequence[int]]:
        going = [chunk for chunk in step.chunks if chunk.max_drafts and self._has_followed(chunk)]
        drafts: dict[str, list[int]] = {chunk.request_id: [] for chunk in going}
        if not going:
            return drafts
        states = torch.stack([self._last[chunk.request_id].state for chunk in going])
        place = 0
        while True:
            tokens = greedy(Logits(self._model.head(self._model.finish_draft(_MODULE, states))))
            for chunk, token in zip(going, tokens, strict=True):
                drafts[chunk.request_id].append(token)
            rows = [row for row, chunk in enumerate(going) if chunk.max_drafts > place + 1]
            if not rows:
                return drafts
            going = [going[row] for row in rows]
            pasts = [chunk.past + place for chunk in going]
            batch, view = feed(self._cache, going, [[tokens[row]] for row in rows], pasts, self._model.device)
            states = self._model.draft(_MODULE, batch, states[rows], view)
            place += 1

    def follow(self, step: Step, states: Tensor, chosen: Mapping[str, Sequence[int]]) -> None:
        """After a step ran: the target's states of all its tokens, and what each request that goes on has chosen."""
        going: list[Chunk] = []
        next_tokens: list[tuple[int, ...]] = []
        rows: list[int] = []
        start = 0
        for chunk in step.chunks:
            after = tuple(chosen.get(chunk.request_id, ())) if chunk.samples else _known(chunk)
            if after:
                going.append(chunk)
                next_tokens.append(chunk.ids[1:] + after)
                # Of the drafts those count that were chosen, of the choices all but the last were drafts.
                rows.extend(range(start, start + len(next_tokens[-1])))
            start += len(chunk.fed)
        if not going:
            return
        pasts = [chunk.past for chunk in going]
        batch, view = feed(self._cache, going, next_tokens, pasts, self._model.device)
        drafted = self._model.draft(_MODULE, batch, states[rows], view)
        last = drafted[[end - 1 for end in batch.starts[1:]]]
        for chunk, tokens, state in zip(going, next_tokens, last, strict=True):
            self._last[chunk.request_id] = _Last(end=chunk.past + len(tokens), state=state)

    def forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)

    def _has_followed(self, chunk: Chunk) -> bool:
        """Whether all before the chunk's one token was followed; nothing was before the first token of a prompt."""
        last = self._last.get(chunk.request_id)
        return last is not None and last.end == chunk.past


def _known(chunk: Chunk) -> tuple[int, ...]:
    return () if chunk.following is None else (chunk.following,)
