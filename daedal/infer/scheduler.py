"""Which tokens run in the next step: continuous batching over one flat batch, with chunked prefill and preemption.

First come, first served. Every running request is older than every waiting one, and the oldest always advances: it may
take the pages of the youngest, whose tokens are then fed again later. So nobody starves and nothing is lost. Where
tokens may be drafted, places for them come last: they take what requests leave. A request starts behind the longest
beginning that the cache still holds (`prefixes`). Knows token ids, page and state numbers only: no torch, no model, no
sampling, no text, and not who drafts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from daedal.infer.pages import PageAllocator
from daedal.infer.prefixes import Chain, Copy, Prefixes


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
    """What runs together. `preempted`: requests that lost their pages while it was made, youngest first. `copies`: what
    must be copied before anything runs, one after the other.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()

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


@dataclass(kw_only=True, eq=False)
class _Sequence:
    """`tokens`: prompt and answer; the first `num_cached` of them have their rows on the pages of `table`, the last few
    of these in the rings `state`. most: tokens that prompt and answer can have together. begun: it has just started
    behind a beginning, and its first chunk is to come.
    """

    id: str
    tokens: list[int]
    generates: bool
    most: int
    chain: Chain
    num_cached: int = 0
    table: tuple[int, ...] = ()
    state: int | None = None
    begun: bool = False

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def answers(self) -> bool:
        """Whether all but the newest of its tokens are read."""
        return self.num_remaining == 1 and self.num_cached > 0


class Scheduler:
    """Requests in, steps out. A step is scheduled, run by the caller, and committed before the next.

    max_batch: requests that hold pages at once, each with a state number below it. max_step_tokens: tokens of one step.
    max_drafts: tokens that may be drafted for a request in a step. chunk: where given, prompts are fed in chunks of so
    many tokens, whatever else runs, and a request starts only when there are pages for all it may ever feed: then in
    which pieces a request is computed depends on itself alone. At most `max_step_tokens - max_batch`. prefixes: where
    given, the beginnings on these pages; with `chunk` its unit is a multiple of that.
    Every request must fit the pages alone (`PageAllocator.num_pages`, for all tokens it will ever feed): the caller
    refuses others.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        page_size: int,
        max_batch: int,
        max_step_tokens: int,
        max_drafts: int = 0,
        chunk: int | None = None,
        prefixes: Prefixes | None = None,
    ):
        assert chunk is None or 0 < chunk <= max_step_tokens - max_batch
        assert chunk is None or prefixes is None or prefixes.unit % chunk == 0
        self._pages = pages
        self._page_size = page_size
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self._max_drafts = max_drafts
        self._chunk_size = chunk
        self._prefixes = prefixes or Prefixes(pages, page_size=page_size, unit=page_size, keeps=False)
        self._copies: list[Copy] = []  # of the step that is being scheduled
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._sequences: dict[str, _Sequence] = {}
        self._free_states = list(reversed(range(max_batch)))
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def held(self) -> dict[str, int]:
        """Pages of each request that runs; with them it has the rings of one state."""
        return {sequence.id: len(sequence.table) for sequence in self._running}

    def num_reused(self, request_id: str) -> int:
        """Tokens of its prompt that a request did not feed when it first started."""
        return self._sequences[request_id].chain.num_reused or 0

    def add(
        self, request_id: str, prompt: tuple[int, ...], *, max_answer: int, salt: str = "", reuses: bool = True
    ) -> None:
        """Queues a request for at most `max_answer` tokens; 0 feeds the prompt and samples nothing.

        salt: whose beginnings it shares. reuses: False for one that must feed all of its prompt.
        """
        assert prompt
        assert request_id not in self._sequences
        # Where pieces decide, only those that every prompt is cut into may stand for one another.
        whole = None if self._chunk_size is None else len(prompt) // self._chunk_size * self._chunk_size
        sequence = _Sequence(
            id=request_id,
            tokens=list(prompt),
            generates=max_answer > 0,
            most=len(prompt) + max_answer,
            chain=self._prefixes.chain(salt=salt, reuses=reuses, most=whole),
        )
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)

    def remove(self, request_id: str) -> None:
        """Forgets a request, finished or cancelled, and frees its pages at once."""
        sequence = self._sequences.pop(request_id)
        if sequence.state is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._release(sequence)

    def schedule(self, most_prompt_tokens: int | None = None) -> Step:
        """The next step; without chunks only when there are no requests, or none but finished ones.

        most_prompt_tokens: how many may be read beside answers that go on, at least 1; nothing else bounds prompts that
        nobody waits for. Where prompts are fed in chunks of a size, that size it is.

        Drafts take what is left of the budget and of the pages; of the budget that answers under way leave, half is
        theirs before prompts, so that a long prompt does not silence them, nor they it.
        """
        preempted: list[str] = []
        self._copies = []
        prompts = self._max_step_tokens
        if most_prompt_tokens is not None and self._chunk_size is None:
            assert most_prompt_tokens > 0
            if any(sequence.answers for sequence in self._running):
                prompts = most_prompt_tokens
        shares = self._shares(self._max_step_tokens - self._kept_for_drafts(), prompts, preempted)
        budget = self._max_step_tokens - sum(count for _, count in shares)
        chunks: list[Chunk] = []
        for sequence, count in shares:
            self._keep_ring(sequence)
            num_drafts = 0
            if self._max_drafts:
                num_drafts = self._place_drafts(sequence, min(self._useful_drafts(sequence), budget))
                budget -= num_drafts
            chunks.append(self._chunk(sequence, count, num_drafts))
        return Step(chunks=tuple(chunks), preempted=tuple(preempted), copies=tuple(self._copies))

    def commit(self, step: Step, sampled: Mapping[str, Sequence[int]]) -> None:
        """Records that `step` ran and which tokens each request with `samples` chose: one, and one more for each draft
        that was chosen too. The others are withdrawn, by being fed no more.

        A request removed since the step was scheduled is passed over.
        """
        for chunk in step.chunks:
            sequence = self._sequences.get(chunk.request_id)
            if sequence is None:
                continue
            before = sequence.num_cached
            sequence.num_cached += len(chunk.ids)
            if chunk.samples:
                chosen = sampled[chunk.request_id]
                assert tuple(chosen[:-1]) == chunk.drafts[: len(chosen) - 1]
                sequence.num_cached += len(chosen) - 1
                sequence.tokens.extend(chosen)
            # What drafts has read all that was fed before, and may be behind with the rest.
            settled = before if self._max_drafts else sequence.num_cached
            self._prefixes.note(sequence.chain, sequence.tokens, sequence.table, settled)

    def _shares(self, budget: int, prompts: int, preempted: list[str]) -> list[tuple[_Sequence, int]]:
        """How many of its tokens each request feeds, `budget` in all and `prompts` of those that are not answering;
        pages for them are allocated.

        A prompt takes all the budget that is left, so whoever started before it is past its own prompt: one pass in
        order of arrival lets every answer under way go on and gives the rest to prompts.
        """
        shares: list[tuple[_Sequence, int]] = []
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            answers = sequence.answers
            count = self._share(sequence, budget if answers else min(budget, prompts))
            if count > 0 and self._grow(sequence, count, preempted):
                shares.append((sequence, count))
                budget -= count
                prompts -= 0 if answers else count
            index += 1
        # Who has just given pages back, waits for the next step.
        while not preempted and min(budget, prompts) > 0 and self._admit():
            sequence = self._running[-1]
            count = self._share(sequence, min(budget, prompts))
            if count > 0:
                shares.append((sequence, count))
            budget -= count
            prompts -= count
        return shares

    def _share(self, sequence: _Sequence, budget: int) -> int:
        """How many of its remaining tokens a request feeds next."""
        if self._chunk_size is None:
            ends = (cut - sequence.num_cached for cut in sequence.chain.cuts if cut > sequence.num_cached)
            return min(sequence.num_remaining, budget, *ends)
        count = min(sequence.num_remaining, self._chunk_size)
        return count if count <= budget else 0

    def _kept_for_drafts(self) -> int:
        """Tokens of the budget that prompts leave alone."""
        if not self._max_drafts:
            return 0
        wanted = sum(self._useful_drafts(sequence) for sequence in self._running)
        answering = sum(sequence.num_remaining == 1 for sequence in self._running)
        return min(wanted, max(self._max_step_tokens - answering, 0) // 2)

    def _keep_ring(self, sequence: _Sequence) -> None:
        """For those who may start from where the sequence has come to."""
        assert sequence.state is not None
        self._copy(
            self._prefixes.keep_ring(
                sequence.chain, sequence.tokens, sequence.num_cached, sequence.state, answers=sequence.answers
            )
        )

    def _useful_drafts(self, sequence: _Sequence) -> int:
        """Drafts that could become part of the answer: none before all tokens are read, and after all of them one more
        token is chosen.
        """
        if not sequence.generates or sequence.num_remaining != 1:
            return 0
        return min(self._max_drafts, sequence.most - len(sequence.tokens) - 1)

    def _place_drafts(self, sequence: _Sequence, count: int) -> int:
        """How many of `count` drafts have room after the sequence's tokens, on free pages if need be."""
        if count <= 0:
            return 0
        length = len(sequence.tokens)
        missing = self._pages_for(length + count) - len(sequence.table)
        self._allocate(sequence, min(missing, self._pages.num_free))
        return min(count, len(sequence.table) * self._page_size - length)

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
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence.id

    def _release(self, sequence: _Sequence) -> None:
        """Takes back what a running request holds."""
        assert sequence.state is not None
        self._prefixes.leave(sequence.chain, sequence.tokens, sequence.table)
        self._pages.free(reversed(sequence.table))  # longer beginnings go before shorter ones
        self._free_states.append(sequence.state)
        sequence.table, sequence.state, sequence.num_cached = (), None, 0

    def _admit(self) -> bool:
        """Starts the oldest waiting request, if pages for all its tokens are free.

        All at once, although the first chunk may need few: prompts that are admitted by halves evict one another.
        """
        if not self._waiting or len(self._running) >= self._max_batch:
            return False
        sequence = self._waiting[0]
        found = self._prefixes.find(sequence.chain, sequence.tokens)
        # The last token of an answer is never fed.
        num_tokens = len(sequence.tokens) if self._chunk_size is None else max(sequence.most - 1, len(sequence.tokens))
        if not self._allocate(sequence, self._pages_for(num_tokens)):
            assert self._running, "a request that can never fit was added"
            return False
        sequence.state = self._free_states.pop()
        self._running.append(self._waiting.popleft())
        self._copy(self._prefixes.begin(sequence.chain, sequence.tokens, found, sequence.table, sequence.state))
        sequence.num_cached, sequence.begun = found.num_tokens, bool(found.pages)
        return True

    def _copy(self, copy: Copy | None) -> None:
        if copy is not None:
            self._copies.append(copy)

    def _allocate(self, sequence: _Sequence, count: int) -> bool:
        if count <= 0:
            return True
        pages = self._pages.allocate(count, after=sequence.table[-1] if sequence.table else None)
        if pages is None:
            return False
        self._prefixes.overwritten(pages)
        sequence.table += tuple(pages)
        return True

    def _chunk(self, sequence: _Sequence, count: int, max_drafts: int) -> Chunk:
        past, end = sequence.num_cached, sequence.num_cached + count
        assert sequence.state is not None
        begun, sequence.begun = sequence.begun, False
        return Chunk(
            request_id=sequence.id,
            ids=tuple(sequence.tokens[past:end]),
            past=past,
            table=sequence.table,
            state=sequence.state,
            samples=sequence.generates and count == sequence.num_remaining,
            following=sequence.tokens[end] if end < len(sequence.tokens) else None,
            before=tuple(sequence.tokens[:past]) if begun else (),
            max_drafts=max_drafts,
        )

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
