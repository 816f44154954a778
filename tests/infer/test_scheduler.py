"""Whatever arrives and leaves: pages are not shared, the budget holds, tokens are fed in order, everything ends."""

import random
import subprocess
import sys
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from daedal.infer.pages import PageAllocator
from daedal.infer.scheduler import Chunk, Scheduler, Step

WRONG = 10**6


@dataclass(kw_only=True)
class Told:
    """A request as the test sees it. `tokens`: what must be fed; `fed`: how many were since the last preemption."""

    tokens: list[int]
    num_left: int
    fed: int = 0


@dataclass(kw_only=True)
class World:
    """A scheduler, and what plays the model: it drafts and accepts as `luck` has it."""

    scheduler: Scheduler
    pages: PageAllocator
    page_size: int
    max_batch: int
    max_step_tokens: int
    max_drafts: int
    luck: random.Random = field(default_factory=lambda: random.Random(0))
    told: dict[str, Told] = field(default_factory=dict)

    def step(self) -> Step:
        step = self.scheduler.schedule()
        for request_id in step.preempted:
            self.told[request_id].fed = 0
        drafted = {chunk.request_id: self.draft(chunk) for chunk in step.chunks if self.luck.random() < 0.8}
        step = step.with_drafts(drafted)
        self.check(step)
        sampled = {}
        for chunk in step.chunks:
            told = self.told[chunk.request_id]
            if chunk.before:
                assert list(chunk.before) == told.tokens[: chunk.past]
                told.fed = chunk.past
            assert chunk.past == told.fed
            assert list(chunk.ids) == told.tokens[told.fed : told.fed + len(chunk.ids)]
            told.fed += len(chunk.ids)
            unread = told.tokens[told.fed :]
            assert chunk.following == (unread[0] if unread else None)
            assert chunk.samples == (not unread and told.num_left > 0)
            if chunk.samples:
                accepted = sum(token != WRONG for token in chunk.drafts)
                sampled[chunk.request_id] = [*range(chunk.end, chunk.end + accepted + 1)]
                told.tokens += sampled[chunk.request_id]
                told.fed += accepted
                told.num_left -= accepted + 1
        self.scheduler.commit(step, sampled)
        for chunk in step.chunks:
            told = self.told[chunk.request_id]
            if told.num_left == 0 and (chunk.samples or told.fed == len(told.tokens)):
                self.remove(chunk.request_id)
        return step

    def draft(self, chunk: Chunk) -> list[int]:
        """Some right tokens and then wrong ones: right is each token that is the number of its place."""
        count = self.luck.randint(0, chunk.max_drafts)
        right = self.luck.randint(0, count)
        return [*range(chunk.end, chunk.end + right), *[WRONG] * (count - right)]

    def check(self, step: Step) -> None:
        assert all(chunk.ids for chunk in step.chunks)
        assert (
            step.num_tokens <= sum(len(chunk.ids) + chunk.max_drafts for chunk in step.chunks) <= self.max_step_tokens
        )
        assert len({chunk.request_id for chunk in step.chunks}) == len(step.chunks) <= self.max_batch
        assert not {chunk.request_id for chunk in step.chunks} & set(step.preempted)
        tables = [page for chunk in step.chunks for page in chunk.table]
        assert len(tables) == len(set(tables)) <= self.pages.num_used
        states = {chunk.state for chunk in step.chunks}
        assert len(states) == len(step.chunks)
        assert states <= set(range(self.max_batch))
        for chunk in step.chunks:
            num_left = self.told[chunk.request_id].num_left
            assert chunk.end + chunk.max_drafts <= len(chunk.table) * self.page_size
            assert 0 <= chunk.max_drafts <= (min(self.max_drafts, num_left - 1) if chunk.samples else 0)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.told)
        assert self.scheduler.num_running <= self.max_batch

    def remove(self, request_id: str) -> None:
        self.scheduler.remove(request_id)
        del self.told[request_id]


def world(*, num_pages: int, page_size: int, max_batch: int, max_step_tokens: int, max_drafts: int = 0) -> World:
    pages = PageAllocator(num_pages)
    scheduler = Scheduler(
        pages, page_size=page_size, max_batch=max_batch, max_step_tokens=max_step_tokens, max_drafts=max_drafts
    )
    return World(
        scheduler=scheduler,
        pages=pages,
        page_size=page_size,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_drafts=max_drafts,
    )


def add(world: World, request_id: str, prompt_length: int, num_left: int) -> None:
    prompt = tuple(range(prompt_length))
    world.told[request_id] = Told(tokens=list(prompt), num_left=num_left)
    world.scheduler.add(request_id, prompt, max_answer=num_left)


sizes = st.fixed_dictionaries(
    {
        "num_pages": st.integers(1, 12),
        "page_size": st.integers(1, 5),
        "max_batch": st.integers(1, 5),
        "max_step_tokens": st.integers(1, 12),
        "max_drafts": st.sampled_from([0, 1, 3, 8]),
    }
)
events = st.lists(
    st.tuples(st.sampled_from(["add", "add", "step", "step", "cancel"]), st.integers(1, 60), st.integers(0, 60)),
    max_size=50,
)


@settings(max_examples=150, deadline=None)
@given(sizes=sizes, events=events)
def test_everything_ends_and_nothing_is_lost(sizes: dict[str, int], events: list[tuple[str, int, int]]) -> None:
    here = world(**sizes)
    capacity = here.pages.num_pages * here.page_size
    for number, (event, first, second) in enumerate(events):
        if event == "add":
            length = 1 + first % capacity
            add(here, str(number), length, second % (capacity + 2 - length))
        elif event == "cancel" and here.told:
            here.remove(sorted(here.told)[first % len(here.told)])
        else:
            here.step()
    # The oldest request gets a token in every step, so the work left bounds the steps, whatever is preempted.
    bound = sum(len(told.tokens) + told.num_left for told in here.told.values())
    for _ in range(bound):
        here.step()
    assert not here.told
    assert here.pages.num_used == 0
    assert here.scheduler.num_running == here.scheduler.num_waiting == 0
    assert here.scheduler.schedule().chunks == ()


def test_answers_go_on_beside_prompt_chunks() -> None:
    here = world(num_pages=64, page_size=4, max_batch=3, max_step_tokens=8)
    for name, length in (("first", 2), ("second", 19), ("third", 1), ("fourth", 1)):
        add(here, name, length, 9)
    shares = [[(chunk.request_id, len(chunk.ids)) for chunk in here.step().chunks] for _ in range(4)]
    assert shares == [
        [("first", 2), ("second", 6)],
        [("first", 1), ("second", 7)],
        [("first", 1), ("second", 6), ("third", 1)],
        [("first", 1), ("second", 1), ("third", 1)],
    ]


def test_the_youngest_is_preempted_and_fed_again_wholly() -> None:
    here = world(num_pages=4, page_size=2, max_batch=2, max_step_tokens=8)
    add(here, "old", 3, 5)
    add(here, "young", 3, 5)
    preempted: list[str] = []
    again: list[tuple[int, int]] = []
    for _ in range(20):
        step = here.step()
        again += [(chunk.past, len(chunk.ids)) for chunk in step.chunks if preempted and chunk.request_id == "young"]
        preempted += step.preempted
    assert preempted == ["young"]
    assert again[0][0] == 0
    assert again[0][1] > 3
    assert not here.told


def test_drafts_take_what_requests_leave() -> None:
    """Of the budget half of what answers leave is theirs before prompts, and pages only those that are free."""
    here = world(num_pages=12, page_size=4, max_batch=3, max_step_tokens=10, max_drafts=5)
    add(here, "first", 2, 20)
    add(here, "second", 3, 20)
    add(here, "long", 30, 1)
    here.step()
    step = here.scheduler.schedule()
    assert [(chunk.request_id, len(chunk.ids), chunk.max_drafts) for chunk in step.chunks] == [
        ("first", 1, 4),
        ("second", 1, 0),
        ("long", 4, 0),
    ]
    tight = world(num_pages=3, page_size=4, max_batch=2, max_step_tokens=32, max_drafts=8)
    add(tight, "first", 3, 9)
    add(tight, "second", 3, 2)
    tight.step()
    step = tight.scheduler.schedule()
    assert [(chunk.max_drafts, len(chunk.table)) for chunk in step.chunks] == [(4, 2), (0, 1)]
    assert not step.preempted


def test_scheduling_needs_no_torch() -> None:
    code = "import sys, daedal.infer.scheduler, daedal.infer.admission; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
