"""Which tokens run in the next step: continuous batching over one flat batch, with chunked prefill and preemption.

First come, first served. Every running request is older than every waiting one, and the oldest always advances: it may
take the pages of the youngest, whose tokens are then fed again later. So nobody starves and nothing is lost. Knows
token ids and page numbers only: no torch, no model, no sampling, no text.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from daedal.infer.pages import PageAllocator


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Part of one step: `ids` run at positions `past` onwards, their cache rows lie on the pages of `table`.

    samples: whether the logits of the last position choose the request's next token.
    """

    request_id: str
    ids: tuple[int, ...]
    past: int
    table: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """What runs together. `preempted`: requests that lost their pages while it was made, youngest first."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.ids) for chunk in self.chunks)


@dataclass(kw_only=True, eq=False)
class _Sequence:
    """`tokens`: prompt and answer; the first `num_cached` of them have their rows on the pages of `table`."""

    id: str
    tokens: list[int]
    generates: bool
    num_cached: int = 0
    table: list[int] = field(default_factory=list)

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_cached


class Scheduler:
    """Requests in, steps out. A step is scheduled, run by the caller, and committed before the next.

    max_batch: requests that hold pages at once. max_step_tokens: tokens of one step.
    Every request must fit the pages alone (`PageAllocator.num_pages`, for all tokens it will ever feed): the caller
    refuses others.
    """

    def __init__(self, pages: PageAllocator, *, page_size: int, max_batch: int, max_step_tokens: int):
        self._pages = pages
        self._page_size = page_size
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._sequences: dict[str, _Sequence] = {}
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request_id: str, prompt: tuple[int, ...], *, generates: bool = True) -> None:
        """Queues a request; `generates` False feeds the prompt and samples nothing."""
        assert prompt
        assert request_id not in self._sequences
        sequence = _Sequence(id=request_id, tokens=list(prompt), generates=generates)
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> None:
        """Forgets a request, finished or cancelled, and frees its pages at once."""
        sequence = self._sequences.pop(request_id)
        self._pages.free(sequence.table)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Step:
        """The next step; without chunks only when there are no requests, or none but finished ones.

        A prompt takes all the budget that is left, so whoever started before it is past its own prompt: one pass in
        order of arrival lets every answer under way go on and gives the rest to prompts.
        """
        chunks: list[Chunk] = []
        preempted: list[str] = []
        budget = self._max_step_tokens
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            count = min(sequence.num_remaining, budget)
            if count > 0 and self._grow(sequence, count, preempted):
                chunks.append(self._chunk(sequence, count))
                budget -= count
            index += 1
        while budget > 0 and self._admit():
            sequence = self._running[-1]
            count = min(sequence.num_remaining, budget)
            chunks.append(self._chunk(sequence, count))
            budget -= count
        return Step(chunks=tuple(chunks), preempted=tuple(preempted))

    def commit(self, step: Step, sampled: Mapping[str, int]) -> None:
        """Records that `step` ran and which token each request with `samples` chose.

        A request removed since the step was scheduled is passed over.
        """
        for chunk in step.chunks:
            sequence = self._sequences.get(chunk.request_id)
            if sequence is None:
                continue
            sequence.num_cached += len(chunk.ids)
            if chunk.samples:
                sequence.tokens.append(sampled[chunk.request_id])

    def _grow(self, sequence: _Sequence, count: int, preempted: list[str]) -> bool:
        """Gives `sequence` the pages for `count` more tokens, taken from the youngest where none are free.

        False if `sequence` is the youngest itself: it keeps what it has and sits this step out.
        """
        missing = self._pages_for(sequence.num_cached + count) - len(sequence.table)
        while missing > self._pages.num_free and self._running[-1] is not sequence:
            preempted.append(self._preempt_youngest())
        return self._allocate(sequence, missing)

    def _preempt_youngest(self) -> str:
        sequence = self._running.pop()
        self._pages.free(sequence.table)
        sequence.table = []
        sequence.num_cached = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence.id

    def _admit(self) -> bool:
        """Starts the oldest waiting request, if pages for all its tokens are free.

        All at once, although the first chunk may need few: prompts that are admitted by halves evict one another.
        """
        if not self._waiting or len(self._running) >= self._max_batch:
            return False
        sequence = self._waiting[0]
        if not self._allocate(sequence, self._pages_for(len(sequence.tokens))):
            assert self._running, "a request that can never fit was added"
            return False
        self._running.append(self._waiting.popleft())
        return True

    def _allocate(self, sequence: _Sequence, count: int) -> bool:
        if count <= 0:
            return True
        pages = self._pages.allocate(count, after=sequence.table[-1] if sequence.table else None)
        if pages is None:
            return False
        sequence.table.extend(pages)
        return True

    def _chunk(self, sequence: _Sequence, count: int) -> Chunk:
        past = sequence.num_cached
        return Chunk(
            request_id=sequence.id,
            ids=tuple(sequence.tokens[past : past + count]),
            past=past,
            table=tuple(sequence.table),
            samples=sequence.generates and count == sequence.num_remaining,
        )

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
