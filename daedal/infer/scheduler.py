"""Which tokens run in the next step: continuous batching over one flat batch, with chunked prefill and preemption.

Who is served first is settled by `waiting`: among equals whoever came first. Of the running requests the first always
advances: it may take the pages of the last, whose tokens are then fed again later. So nobody starves and nothing is
lost. Where tokens may be drafted, places for them come last: they take what requests leave. A request starts behind the
longest beginning that the cache still holds (`prefixes`), once there is room for what it and all that run will probably
grow to. Knows token ids, page and state numbers only: no torch, no model, no sampling, no text, and not who drafts.
"""

from bisect import insort
from collections.abc import Mapping, Sequence

from daedal.infer.forecast import Ahead, Answers
from daedal.infer.pages import PageAllocator
from daedal.infer.prefixes import Chain, Copy, Prefixes
from daedal.infer.step import Chunk, Step
from daedal.infer.track import Track
from daedal.infer.waiting import Waiting


class Scheduler:
    """Requests in, steps out. A step is scheduled, run by the caller, and committed before the next.

    max_batch: requests that hold pages at once, each with a state number below it. max_step_tokens: tokens of one step.
    max_drafts: tokens that may be drafted for a request in a step. chunk: where given, prompts are fed in chunks of so
    many tokens, whatever else runs, and a request starts only when there are pages for all it may ever feed: then in
    which pieces a request is computed depends on itself alone. At most `max_step_tokens - max_batch`. prefixes: where
    given, the beginnings on these pages; with `chunk` its unit is a multiple of that. answers: how long they become.
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
        answers: Answers | None = None,
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
        self._copies: list[Copy] = []  # of the step that is being scheduled, as are those started in it
        self._started: list[str] = []
        self._answers = answers or Answers()
        self._waiting = Waiting()
        self._running: list[Track] = []  # the most urgent first
        self._sequences: dict[str, Track] = {}
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

    def beginning(self, request_id: str) -> tuple[Chain, Sequence[int], Sequence[int]]:
        """A running request's tokens and pages, as `Prefixes` takes them."""
        track = self._sequences[request_id]
        return track.chain, track.tokens, track.table

    def num_answered(self, request_id: str) -> int:
        """Tokens of its answer so far."""
        track = self._sequences[request_id]
        return len(track.tokens) - track.num_prompt

    def ahead(self, priority: int) -> Ahead:
        """What a request of this priority would wait for, if it came now."""
        reading = sum(one.num_remaining for one in self._running if not one.answers)
        before = [self._sequences[name] for name in self._waiting.before(priority)]
        starts = max(len(self._running) + len(before) + 1 - self._max_batch, 0)
        return Ahead(prompt_tokens=reading + sum(len(one.tokens) for one in before), starts=starts)

    def add(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        *,
        max_answer: int,
        salt: str = "",
        reuses: bool = True,
        priority: int = 0,
    ) -> None:
        """Queues a request for at most `max_answer` tokens; 0 feeds the prompt and samples nothing.

        salt: whose it is, and so whose beginnings it shares and with whom it takes turns. reuses: False for one that
        must feed all of its prompt. priority: lower ones go first.
        """
        assert prompt
        assert request_id not in self._sequences
        # Where pieces decide, only those that every prompt is cut into may stand for one another.
        whole = None if self._chunk_size is None else len(prompt) // self._chunk_size * self._chunk_size
        sequence = Track(
            id=request_id,
            tokens=list(prompt),
            num_prompt=len(prompt),
            most=len(prompt) + max_answer,
            chain=self._prefixes.chain(salt=salt, reuses=reuses, most=whole),
            place=self._waiting.come(request_id, priority=priority, owner=salt),
        )
        self._sequences[request_id] = sequence

    def remove(self, request_id: str) -> None:
        """Forgets a request, finished or cancelled, and frees its pages at once."""
        sequence = self._sequences.pop(request_id)
        if sequence.state is None:
            self._waiting.leave(sequence.place)
        else:
            self._running.remove(sequence)
            self._release(sequence)

    def schedule(self, most_prompt_tokens: int | None = None, more: int = 0) -> Step:
        """The next step; without chunks only when there are no requests, or none but finished ones.

        most_prompt_tokens: how many may be read beside answers that go on, at least 1; nothing else bounds prompts that
        nobody waits for. Where prompts are fed in chunks of a size, that size it is. more: tokens that answers may gain
        beyond their next where nobody else wants the step.

        Drafts take what is left of the budget and of the pages; of the budget that answers under way leave, half is
        theirs before prompts, so that a long prompt does not silence them, nor they it.
        """
        self._copies, self._started = [], []
        preempted = self._make_way()
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
        return Step(
            chunks=tuple(chunks),
            preempted=tuple(preempted),
            copies=tuple(self._copies),
            started=tuple(self._started),
            more=self._more(shares, more) if more else 0,
        )

    def commit(self, step: Step, sampled: Mapping[str, Sequence[int]]) -> None:
        """Records that `step` ran and which tokens each request with `samples` chose: one, and one more for each draft
        that was chosen too, or for each further pass. The others are withdrawn, by being fed no more.

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
                assert len(chosen) <= 1 + step.more or tuple(chosen[:-1]) == chunk.drafts[: len(chosen) - 1]
                sequence.num_cached += len(chosen) - 1
                sequence.tokens.extend(chosen)
            # What drafts has read all that was fed before, and may be behind with the rest.
            settled = before if self._max_drafts else sequence.num_cached
            self._prefixes.note(sequence.chain, sequence.tokens, sequence.table, settled)

    def _shares(self, budget: int, prompts: int, preempted: list[str]) -> list[tuple[Track, int]]:
        """How many of its tokens each request feeds, `budget` in all and `prompts` of those that are not answering;
        pages for them are allocated.

        Answers under way come first, each with one token, and the rest is for prompts: those that run, in order, then
        those that can start. Of a budget smaller than the batch the first request has a token in any case.
        """
        shares: list[tuple[Track, int]] = []
        answering = [sequence for sequence in self._running if sequence.answers]
        reading = [sequence for sequence in self._running if not sequence.answers]
        kept = int(bool(reading) and reading[0] is self._running[0])
        for sequence in answering:
            if sequence.state is None or budget <= kept:  # it has just given up its pages
                continue
            if (count := self._share(sequence, budget)) and self._grow(sequence, count, preempted):
                shares.append((sequence, count))
                budget -= count
        prompts = min(prompts, budget)
        for sequence in reading:
            if sequence.state is not None and (count := self._share(sequence, prompts)):
                shares.append((sequence, count))
                prompts -= count
        # Who has just given pages back, waits for the next step.
        while prompts > 0 and (started := self._admit(preempted)) is not None:
            if count := self._share(started, prompts):
                shares.append((started, count))
                prompts -= count
        return shares

    def _share(self, sequence: Track, budget: int) -> int:
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

    def _more(self, shares: Sequence[tuple[Track, int]], most: int) -> int:
        """Tokens that each can gain beyond its next, none of them on another page than that: where a page ends, rings
        are kept, and more pages asked for.
        """
        alone = shares and not self._max_drafts and not len(self._waiting) and len(shares) == len(self._running)
        if not alone or not all(sequence.answers for sequence, _ in shares):
            return 0
        on_page = (-len(sequence.tokens) % self._page_size for sequence, _ in shares)
        of_answer = (sequence.most - len(sequence.tokens) - 1 for sequence, _ in shares)
        return max(min(most, *on_page, *of_answer), 0)

    def _keep_ring(self, sequence: Track) -> None:
        """For those who may start from where the sequence has come to."""
        assert sequence.state is not None
        self._copy(
            self._prefixes.keep_ring(
                sequence.chain, sequence.tokens, sequence.num_cached, sequence.state, answers=sequence.answers
            )
        )

    def _useful_drafts(self, sequence: Track) -> int:
        """Drafts that could become part of the answer: none before all tokens are read, and after all of them one more
        token is chosen.
        """
        if not sequence.generates or sequence.num_remaining != 1:
            return 0
        return min(self._max_drafts, sequence.most - len(sequence.tokens) - 1)

    def _place_drafts(self, sequence: Track, count: int) -> int:
        """How many of `count` drafts have room after the sequence's tokens, on free pages if need be."""
        if count <= 0:
            return 0
        length = len(sequence.tokens)
        missing = self._pages_for(length + count) - len(sequence.table)
        self._allocate(sequence, min(missing, self._pages.num_free))
        return min(count, len(sequence.table) * self._page_size - length)

    def _grow(self, sequence: Track, count: int, preempted: list[str]) -> bool:
        """Gives `sequence` the pages for `count` more tokens, taken from the last of all where none are free.

        False if `sequence` is the last itself: it keeps what it has and sits this step out.
        """
        missing = self._pages_for(sequence.num_cached + count) - len(sequence.table)
        while missing > self._pages.num_free and self._running[-1] is not sequence:
            preempted.append(self._preempt(self._running[-1]))
        return self._allocate(sequence, missing)

    def _make_way(self) -> list[str]:
        """The least urgent of all give up their places where a more urgent request can then start at once.

        Not where prompts are fed in chunks of a size: what was answered would be read again in other pieces.
        """
        first = self._waiting.first()
        if first is None or self._chunk_size is not None or not self._running:
            return []
        sequence = self._sequences[first.request_id]
        leaving: list[Track] = []
        for victim in reversed(self._running):
            if not victim.place.yields_to(first) or self._fits(sequence, leaving):
                break
            leaving.append(victim)
        if not leaving or not self._fits(sequence, leaving):
            return []
        for victim in leaving:
            victim.place.yielded = True
        return [self._preempt(victim) for victim in leaving]

    def _preempt(self, sequence: Track) -> str:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.come_back(sequence.place)
        self.num_preemptions += 1
        return sequence.id

    def _release(self, sequence: Track) -> None:
        """Takes back what a running request holds."""
        assert sequence.state is not None
        self._prefixes.leave(sequence.chain, sequence.tokens, sequence.table)
        self._pages.free(reversed(sequence.table))  # longer beginnings go before shorter ones
        self._free_states.append(sequence.state)
        sequence.table, sequence.state, sequence.num_cached = (), None, 0

    def _admit(self, preempted: Sequence[str]) -> Track | None:
        """Starts the first of those that wait, if there is room for it, and it is none of `preempted`."""
        first = self._waiting.first()
        if first is None or first.request_id in preempted:
            return None
        sequence = self._sequences[first.request_id]
        if not self._fits(sequence):
            assert self._running, "a request that can never fit was added"
            return None
        found = self._prefixes.find(sequence.chain, sequence.tokens)
        allocated = self._allocate(sequence, self._pages_for(self._to_start(sequence)))
        assert allocated
        sequence.state = self._free_states.pop()
        self._waiting.start(first)
        self._started.append(first.request_id)
        insort(self._running, sequence, key=_rank)
        self._copy(self._prefixes.begin(sequence.chain, sequence.tokens, found, sequence.table, sequence.state))
        sequence.num_cached, sequence.begun = found.num_tokens, bool(found.pages)
        return sequence

    def _fits(self, sequence: Track, leaving: Sequence[Track] = ()) -> bool:
        """Whether a request can start once those that are `leaving` have left: all its tokens have pages, and so has
        what it and the others will probably come to. Alone it always fits.

        All its tokens at once, although the first chunk may need few: prompts that are admitted by halves evict one
        another.
        """
        staying = [one for one in self._running if one not in leaving]
        if len(staying) >= self._max_batch:
            return False
        free = self._pages.num_free + sum(len(one.table) for one in leaving)
        needed = self._pages_for(self._to_start(sequence))
        if not staying:
            return needed <= free
        grown = max(needed, self._pages_for(self._expected(sequence)))
        growth = sum(max(self._pages_for(self._expected(one)) - len(one.table), 0) for one in staying)
        return grown + growth <= free

    def _to_start(self, sequence: Track) -> int:
        """Tokens that have pages when a request starts."""
        # The last token of an answer is never fed.
        return len(sequence.tokens) if self._chunk_size is None else max(sequence.most - 1, len(sequence.tokens))

    def _expected(self, sequence: Track) -> int:
        """Tokens that prompt and answer will probably come to."""
        num_tokens, num_prompt = len(sequence.tokens), sequence.num_prompt
        return num_tokens + self._answers.left(num_tokens - num_prompt, sequence.most - num_prompt)

    def _copy(self, copy: Copy | None) -> None:
        if copy is not None:
            self._copies.append(copy)

    def _allocate(self, sequence: Track, count: int) -> bool:
        if count <= 0:
            return True
        pages = self._pages.allocate(count, after=sequence.table[-1] if sequence.table else None)
        if pages is None:
            return False
        self._prefixes.overwritten(pages)
        sequence.table += tuple(pages)
        return True

    def _chunk(self, sequence: Track, count: int, max_drafts: int) -> Chunk:
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


def _rank(sequence: Track) -> tuple[bool, int, int, int]:
    return sequence.place.rank
