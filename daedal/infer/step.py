"""What runs together: a step, and the chunks of requests that it is made of. Plain data; knows no torch, and not who
decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from daedal.infer.prefixes import Copy


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Part of one step: `ids`, then `drafts`, run at positions `past` onwards; their cache rows lie on the pages of
    `table` and in the rings `state`.

    samples: whether the logits of the last of `ids` choose the request's next token. following: the token after `ids`
    where it is known already, in a prompt that is not read to its end. max_drafts: tokens that may be tried after
    `ids`; the pages have room for them, and the answer a use. before: the tokens before `past`, where the request has
    just started behind a beginning that the cache held.
    """

    request_id: str
    ids: tuple[int, ...]
    past: int
    table: tuple[int, ...]
    state: int
    samples: bool
    following: int | None = None
    before: tuple[int, ...] = ()
    max_drafts: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def fed(self) -> tuple[int, ...]:
        """All tokens that run."""
        return self.ids + self.drafts

    @property
    def end(self) -> int:
        """The position after `ids`: that of the first draft."""
        return self.past + len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What runs together. `preempted`: requests that lost their pages while it was made, the least urgent first.
    `copies`: what must be copied before anything runs, one after the other. `started`: requests that waited until now.
    `more`: tokens that every one of its answers may gain beyond its next, by further passes of the same step.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    started: tuple[str, ...] = ()
    more: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.fed) for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        """Those that are read beside single tokens of answers; the last one of a prompt passes for such."""
        return sum(len(chunk.ids) for chunk in self.chunks if len(chunk.ids) > 1)

    def with_drafts(self, drafts: Mapping[str, Sequence[int]]) -> "Step":
        """The same step with tokens drafted for some requests, at most `max_drafts` each."""
        assert all(len(drafts.get(chunk.request_id, ())) <= chunk.max_drafts for chunk in self.chunks)
        chunks = (replace(chunk, drafts=tuple(drafts.get(chunk.request_id, ()))) for chunk in self.chunks)
        return replace(self, chunks=tuple(chunks))
