"""Beginnings that requests share: what is copied is what would have been computed, and what is kept is free."""

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.infer.pages import PageAllocator
from daedal.infer.prefixes import Copy, Prefixes
from daedal.infer.scheduler import Chunk, Scheduler, Step
from tests.infer.test_scheduler import Told, World

WINDOW = 3  # rows of a ring that are read


@dataclass(kw_only=True)
class Memory:
    """Pages and rings as one model has them: in each row stands all that it was computed from. ring: its rows, or 0."""

    page_size: int
    ring: int
    rows: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    rings: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def copy(self, copy: Copy) -> None:
        before, pages = dict(self.rows), zip(copy.sources, copy.targets, strict=True)
        for source, target in pages:
            for place in range(self.page_size):
                self.rows[target, place] = before[source, place]
        if copy.ring is not None:
            source, target = copy.ring
            for place in range(self.ring):
                self.rings.pop((target, place), None)
                if (source, place) in self.rings:
                    self.rings[target, place] = self.rings[source, place]

    def write(self, chunk: Chunk, tokens: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            row = tuple(tokens[: position + 1])
            self.rows[chunk.table[position // self.page_size], position % self.page_size] = row
            if self.ring:
                self.rings[chunk.state, position % self.ring] = row

    def check(self, chunk: Chunk, tokens: list[int], end: int) -> None:
        for position in range(end):
            row = tuple(tokens[: position + 1])
            assert self.rows[chunk.table[position // self.page_size], position % self.page_size] == row
            if self.ring and position > end - WINDOW:
                assert self.rings[chunk.state, position % self.ring] == row


@dataclass(kw_only=True)
class Remembering(World):
    """A world whose memory is looked at; what drafts has one of its own, and reads along as `ModelDrafter` does."""

    prefixes: Prefixes
    memory: Memory
    drafter: Memory
    read: dict[str, int] = field(default_factory=dict)

    def check(self, step: Step) -> None:
        super().check(step)
        for copy in step.copies:
            self.memory.copy(copy)
            self.drafter.copy(copy)
        for chunk in step.chunks:
            told = self.told[chunk.request_id]
            past = len(chunk.before) or min(self.read.get(chunk.request_id, 0), chunk.past)
            tokens = told.tokens[: chunk.end] + list(chunk.drafts)
            self.memory.check(chunk, tokens, chunk.past)
            self.drafter.check(chunk, tokens, past)
        for chunk in step.chunks:
            tokens = self.told[chunk.request_id].tokens[: chunk.end] + list(chunk.drafts)
            past = len(chunk.before) or min(self.read.get(chunk.request_id, 0), chunk.past)
            self.memory.write(chunk, tokens, chunk.past, len(tokens))
            self.read[chunk.request_id] = chunk.end + max(len(chunk.drafts) - 1, 0)
            self.drafter.write(chunk, tokens, past, self.read[chunk.request_id])

    def remove(self, request_id: str) -> None:
        super().remove(request_id)
        self.read.pop(request_id, None)


def remembering(
    *,
    num_pages: int = 32,
    page_size: int = 2,
    max_batch: int = 3,
    max_step_tokens: int = 8,
    max_drafts: int = 0,
    num_rings: int | None = None,
    chunk: int | None = None,
) -> Remembering:
    """num_rings: for copies; None for a model without rings."""
    pages = PageAllocator(num_pages)
    prefixes = Prefixes(
        pages,
        page_size=page_size,
        unit=math.lcm(page_size, chunk or 1),
        rings=None if num_rings is None else range(max_batch, max_batch + num_rings),
        max_drafts=max_drafts,
    )
    scheduler = Scheduler(
        pages,
        page_size=page_size,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_drafts=max_drafts,
        chunk=chunk,
        prefixes=prefixes,
    )
    ring = 0 if num_rings is None else WINDOW + max_drafts
    memories = (Memory(page_size=page_size, ring=ring) for _ in range(2))
    return Remembering(
        scheduler=scheduler,
        pages=pages,
        page_size=page_size,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_drafts=max_drafts,
        prefixes=prefixes,
        memory=next(memories),
        drafter=next(memories),
    )


def add(here: World, name: str, prompt: list[int], num_left: int = 1, **more: object) -> None:
    here.told[name] = Told(tokens=list(prompt), num_left=num_left)
    here.scheduler.add(name, tuple(prompt), max_answer=num_left, **more)  # type: ignore[arg-type]


def run(here: World) -> list[Chunk]:
    chunks: list[Chunk] = []
    while here.told:
        chunks += here.step().chunks
    return chunks


def fed(here: World, name: str, prompt: list[int], num_left: int = 1, **more: object) -> int:
    """Runs a request alone; how many tokens it fed before its first one was chosen."""
    add(here, name, prompt, num_left, **more)
    return sum(len(chunk.ids) for chunk in run(here) if chunk.past < len(prompt))


sizes = st.fixed_dictionaries(
    {
        "num_pages": st.integers(2, 14),
        "page_size": st.integers(1, 4),
        "max_batch": st.integers(1, 4),
        "max_step_tokens": st.integers(1, 12),
        "max_drafts": st.sampled_from([0, 0, 1, 3]),
        "num_rings": st.sampled_from([None, 1, 4]),
    }
)
events = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "step", "step", "cancel", "forget"]),
        st.integers(1, 60),
        st.integers(0, 12),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(sizes=sizes, events=events)
def test_what_is_copied_is_what_would_have_been_computed(
    sizes: dict[str, int | None], events: list[tuple[str, int, int, int]]
) -> None:
    here = remembering(**sizes)  # type: ignore[arg-type]
    capacity = here.pages.num_pages * here.page_size
    for number, (event, first, second, third) in enumerate(events):
        if event == "add":
            length = 1 + first % capacity
            # Everybody begins alike; some go on differently.
            prompt = [place if place < 4 + 5 * third else 1000 * third + place for place in range(length)]
            add(here, str(number), prompt, second % (capacity + 2 - length), salt="ab"[third == 3])
        elif event == "cancel" and here.told:
            here.remove(sorted(here.told)[first % len(here.told)])
        elif event == "forget":
            here.prefixes.forget()
        else:
            here.step()
    bound = sum(len(told.tokens) + told.num_left for told in here.told.values())
    for _ in range(bound):
        here.step()
    assert not here.told
    assert here.pages.num_used == 0
    here.prefixes.forget()
    assert here.pages.num_kept == 0
    assert here.pages.num_free == here.pages.num_pages


@settings(max_examples=60, deadline=None)
@given(moves=st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 9)), max_size=25))
def test_where_pieces_decide_they_stay_the_same(moves: list[tuple[bool, int, int]]) -> None:
    """A deterministic engine: whatever was found, a request is fed in the pieces that it would be fed in alone."""
    here = remembering(num_pages=40, page_size=2, max_batch=2, max_step_tokens=7, chunk=5, num_rings=2)
    lengths: dict[str, int] = {}
    for number, (adds, length, answer) in enumerate(moves):
        if adds:
            lengths[str(number)] = length
            add(here, str(number), list(range(length)), answer)
        else:
            for chunk in here.step().chunks:
                prompt = lengths[chunk.request_id]
                assert chunk.past >= prompt or (chunk.past % 5 == 0 and len(chunk.ids) == min(5, prompt - chunk.past))
    run(here)


def test_where_pieces_decide_answers_are_no_beginnings() -> None:
    here = remembering(page_size=5, max_batch=2, max_step_tokens=7, chunk=5)
    add(here, "first", list(range(8)), 9)
    told = here.told["first"].tokens
    run(here)
    assert fed(here, "next turn", [*told, 50]) == 18 - 5  # told one by one, and not in a piece of five
    assert fed(here, "the same", [*told, 50]) == 3


def test_whole_pages_are_found_and_the_last_token_is_always_read() -> None:
    here = remembering(page_size=4)
    prompt = list(range(20))
    assert fed(here, "first", prompt) == 20
    assert fed(here, "same", prompt) == 4  # 16 of 20: the fifth page would leave nothing to read
    assert fed(here, "longer", [*prompt, 7]) == 1
    assert fed(here, "other end", [*prompt[:14], 99, 98]) == 4
    assert fed(here, "other beginning", [99, *prompt[1:]]) == 20
    assert fed(here, "must read", prompt, reuses=False) == 20
    assert (here.prefixes.num_queried, here.prefixes.num_hit) == (20 + 20 + 21 + 16 + 20, 16 + 20 + 12)


def test_answers_are_beginnings_too_and_running_requests_share_theirs() -> None:
    here = remembering(page_size=2, max_step_tokens=16)
    add(here, "first", list(range(10)), 7)
    here.step()
    add(here, "beside", list(range(10)), 1)
    assert [len(chunk.ids) for chunk in here.step().chunks] == [1, 2]
    answered = here.told["first"].tokens
    run(here)
    assert fed(here, "next turn", [*answered, 50, 51, 52]) == len(answered) + 3 - (len(answered) - 1) // 2 * 2


def test_a_salt_keeps_strangers_apart() -> None:
    here = remembering()
    assert fed(here, "a", list(range(9)), salt="one") == 9
    assert fed(here, "b", list(range(9)), salt="another") == 9
    assert fed(here, "c", list(range(9)), salt="one") == 1
    other = remembering()
    chains = [world.prefixes.chain(salt="one") for world in (here, other)]
    assert chains[0].root != chains[1].root


def test_kept_pages_hold_nobody_up_and_the_oldest_go_first() -> None:
    here = remembering(num_pages=12, page_size=2, max_step_tokens=32)
    old, new = list(range(7)), list(range(100, 107))
    fed(here, "old", old)
    fed(here, "new", new)
    assert (here.pages.num_free, here.pages.num_kept) == (12, 6)
    fed(here, "five pages side by side", list(range(200, 209)))
    assert fed(here, "new again", new) == 1
    assert fed(here, "old again", old) == 3  # of its three whole pages the last was given up
    # All of the cache for one request, of whose own beginning nothing is lost.
    assert fed(here, "all", list(range(300, 324))) == 24
    assert fed(here, "all again", list(range(300, 324))) == 2
    assert here.pages.num_free == 12


def test_a_preempted_request_goes_on_from_its_own_pages() -> None:
    here = remembering(num_pages=6, page_size=2, max_batch=2, max_step_tokens=16)
    add(here, "old", list(range(3)), 7)
    add(here, "young", list(range(50, 55)), 3)
    chunks = run(here)
    again = [chunk for chunk in chunks if chunk.request_id == "young" and chunk.before]
    assert here.scheduler.num_preemptions == 1
    assert [chunk.past for chunk in again] == [2]  # of its two whole pages the last was taken
    assert here.prefixes.num_hit == 0


def test_rings_are_kept_where_texts_part_and_where_answers_end() -> None:
    here = remembering(page_size=4, max_step_tokens=32, num_rings=4)
    shared = list(range(18))
    prompts = [[*shared, *range(100 * number, 100 * number + 9)] for number in (1, 2, 3)]
    assert fed(here, "first", prompts[0]) == 27
    assert fed(here, "again", prompts[0]) == 3
    assert fed(here, "parts", prompts[1]) == 27  # its pages were there, a ring where they end was not
    assert fed(here, "knows", prompts[2]) == 11
    add(here, "answers", list(range(500, 505)), 14)
    told = here.told["answers"].tokens
    run(here)
    assert fed(here, "next turn", [*told, 9, 9]) == len(told) + 2 - 16
    # Of one answer one ring is kept: two ends of prompts, and where texts part, are still there.
    assert fed(here, "once more", prompts[2]) == 3


@pytest.mark.parametrize("num_rings", [None, 4])
def test_what_drafts_may_be_one_token_behind(num_rings: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is right, so its last one was never read by what drafts: nobody may start behind that."""
    monkeypatch.setattr(Remembering, "draft", lambda _, chunk: [*range(chunk.end, chunk.end + chunk.max_drafts)])
    found = 0
    for answer, max_drafts in itertools.product(range(2, 14), (1, 2, 3)):
        here = remembering(max_drafts=max_drafts, num_rings=num_rings, max_step_tokens=16)
        add(here, "first", list(range(3)), answer)
        while "first" in here.told:
            here.step()
            add(here, f"after {here.luck.random()}", list(range(3 + answer)), 1)
        run(here)
        found += here.prefixes.num_hit
    assert found > 100


def test_few_rings_are_taken_from_those_wanted_longest_ago() -> None:
    here = remembering(page_size=2, num_rings=2)
    texts = [[100 * number + place for place in range(6)] for number in range(3)]
    for number, text in enumerate(texts):
        assert fed(here, str(number), text) == 6
    assert [fed(here, f"again {number}", texts[number]) for number in (1, 2, 1, 0)] == [2, 2, 2, 6]


def test_copies_are_made_in_runs() -> None:
    copy = Copy(sources=(4, 5, 6, 9, 2), targets=(0, 1, 2, 3, 7))
    assert copy.runs == ((4, 0, 3), (9, 3, 1), (2, 7, 1))
    assert copy.overlaps
    assert not Copy(sources=(4, 5), targets=(6, 7)).overlaps


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_kept_pages_are_free_ones(seed: int) -> None:
    luck = random.Random(seed)
    pages = PageAllocator(luck.randint(1, 20))
    tables: list[list[int]] = []
    for _ in range(40):
        count, grows = luck.randint(1, 6), bool(tables) and luck.random() < 0.3
        free = pages.num_free
        if luck.random() < 0.6:
            table = tables.pop() if grows else []
            found = pages.allocate(count, after=table[-1] if table else None)
            assert (found is None) == (count > free)
            tables.append(table + list(found or ()))
            for page in found or ():
                if luck.random() < 0.7:
                    pages.mark(page)
        elif tables:
            pages.free(tables.pop(luck.randrange(len(tables))))
        pages.wanted([luck.randrange(pages.num_pages)])
        held = [page for table in tables for page in table]
        assert len(held) == len(set(held)) == pages.num_used
        assert 0 <= pages.num_kept <= pages.num_free
        if luck.random() < 0.05:
            pages.forget()
            assert pages.num_kept == 0
