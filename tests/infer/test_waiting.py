"""Who starts next: the urgent first, owners in turns, everybody in the end; and what a scheduler makes of it."""

import random
from collections import Counter

from daedal.infer.forecast import Answers
from daedal.infer.pages import PageAllocator
from daedal.infer.scheduler import Scheduler
from daedal.infer.waiting import TURNS, Waiting
from tests.infer.test_scheduler import World, add, world


def started(waiting: Waiting) -> str:
    place = waiting.first()
    assert place is not None
    waiting.start(place)
    return place.request_id


def test_lower_numbers_go_first_and_equals_in_order() -> None:
    waiting = Waiting()
    for name, priority in (("a", 0), ("b", 5), ("c", -3), ("d", 0), ("e", -3)):
        waiting.come(name, priority=priority)
    assert len(waiting) == 5
    assert [started(waiting) for _ in range(5)] == ["c", "e", "a", "d", "b"]
    assert waiting.first() is None


def test_owners_take_turns_whatever_one_of_them_asks() -> None:
    waiting = Waiting()
    for number in range(6):
        waiting.come(f"many {number}", owner="many")
    assert [started(waiting) for _ in range(2)] == ["many 0", "many 1"]
    waiting.come("few 0", owner="few")
    waiting.come("few 1", owner="few")
    assert [started(waiting) for _ in range(6)] == ["few 0", "many 2", "few 1", "many 3", "many 4", "many 5"]


def test_the_less_urgent_start_too_and_one_at_a_time() -> None:
    """However many urgent ones come: of TURNS + 1 that start, one is of the line that waits, as long as it does."""
    waiting = Waiting()
    for number in range(30):
        waiting.come(f"patient {number}", priority=7)
    order = []
    for number in range(20 * (TURNS + 1)):
        waiting.come(f"urgent {number}", priority=-7)
        order.append(started(waiting))
    patient = [name for name in order if name.startswith("patient")]
    assert patient == [f"patient {number}" for number in range(20)]
    assert [place for place, name in enumerate(order) if name in patient] == [
        TURNS + turn * (TURNS + 1) for turn in range(20)
    ]


def test_who_comes_back_has_the_place_it_had() -> None:
    waiting = Waiting()
    first = waiting.come("first")
    waiting.come("second")
    waiting.start(first)
    waiting.come("third")
    waiting.come_back(first)
    assert [started(waiting) for _ in range(3)] == ["first", "second", "third"]


def test_lines_forget_who_left() -> None:
    waiting = Waiting()
    gone = waiting.come("gone", priority=1, owner="x")
    waiting.come("stays", priority=1, owner="x")
    waiting.leave(gone)
    assert waiting.before(0) == []
    assert waiting.before(1) == ["stays"]
    assert started(waiting) == "stays"
    assert not any(line.next_tags for line in waiting._lines.values())


def run(here: World) -> list[str]:
    """What is left, in the order in which it ends."""
    ended: list[str] = []
    while here.told:
        before = set(here.told)
        here.step()
        ended += sorted(before - set(here.told))
    return ended


def urgent(here: World, name: str, prompt: int, num_left: int, priority: int) -> None:
    add(here, name, prompt, num_left)
    here.scheduler.remove(name)
    here.scheduler.add(name, tuple(range(prompt)), max_answer=num_left, priority=priority)


def test_an_urgent_request_takes_the_place_of_the_least_urgent_once() -> None:
    here = world(num_pages=16, page_size=4, max_batch=2, max_step_tokens=16)
    urgent(here, "calm", 4, 12, 1)
    urgent(here, "calmer", 4, 12, 2)
    here.step()
    urgent(here, "now", 4, 3, 0)
    step = here.step()
    assert step.preempted == ("calmer",)
    assert {chunk.request_id for chunk in step.chunks} == {"calm", "now"}
    urgent(here, "too", 4, 3, 0)
    assert here.step().preempted == ("calm",)
    urgent(here, "late", 4, 3, -5)
    assert here.step().preempted == ("too",)
    assert run(here) == ["late", "too", "calm", "calmer"]
    assert here.pages.num_used == 0


def test_who_has_yielded_need_not_again() -> None:
    here = world(num_pages=16, page_size=4, max_batch=1, max_step_tokens=16)
    urgent(here, "calm", 4, 12, 1)
    here.step()
    urgent(here, "now", 4, 2, 0)
    assert here.step().preempted == ("calm",)
    while "now" in here.told:
        here.step()
    assert here.step().chunks[0].request_id == "calm"
    urgent(here, "again", 4, 2, 0)
    assert here.step().preempted == ()
    assert run(here) == ["calm", "again"]


def test_equals_and_chunks_of_a_size_do_not_give_way() -> None:
    here = world(num_pages=16, page_size=4, max_batch=1, max_step_tokens=16)
    urgent(here, "first", 4, 5, 3)
    here.step()
    urgent(here, "second", 4, 5, 3)
    assert here.step().preempted == ()
    pages = PageAllocator(16)
    fixed = Scheduler(pages, page_size=4, max_batch=1, max_step_tokens=16, chunk=8)
    fixed.add("first", (1, 2, 3), max_answer=5, priority=3)
    fixed.commit(fixed.schedule(), {"first": (4,)})
    fixed.add("second", (1, 2, 3), max_answer=5, priority=-3)
    assert fixed.schedule().preempted == ()


def test_an_urgent_prompt_lets_answers_go_on() -> None:
    here = world(num_pages=64, page_size=4, max_batch=3, max_step_tokens=8)
    urgent(here, "answer", 2, 20, 5)
    here.step()
    urgent(here, "prompt", 40, 1, 0)
    for _ in range(4):
        assert {chunk.request_id: len(chunk.ids) for chunk in here.step().chunks} == {"answer": 1, "prompt": 7}


def test_everything_ends_whatever_is_urgent() -> None:
    luck = random.Random(5)
    here = world(num_pages=9, page_size=3, max_batch=3, max_step_tokens=7)
    names = [f"r{number}" for number in range(60)]
    for number, name in enumerate(names):
        urgent(here, name, luck.randint(1, 12), luck.randint(0, 12), luck.randint(-2, 2))
        for _ in range(luck.randint(0, 6) if number % 7 else 0):
            here.step()
    for _ in range(4000):
        if not here.told:
            break
        here.step()
    assert not here.told
    assert here.pages.num_used == here.scheduler.num_running == here.scheduler.num_waiting == 0


def test_what_answers_come_to_keeps_requests_from_evicting_one_another() -> None:
    """Sixteen requests of 4 + 16 tokens where five have room: without experience they preempt, with it they wait."""

    def preemptions(answers: Answers) -> int:
        pages = PageAllocator(25)
        here = world(num_pages=25, page_size=4, max_batch=16, max_step_tokens=64)
        here.pages = pages
        here.scheduler = Scheduler(pages, page_size=4, max_batch=16, max_step_tokens=64, answers=answers)
        for number in range(16):
            add(here, str(number), 4, 16)
        run(here)
        return here.scheduler.num_preemptions

    knowing = Answers()
    for _ in range(8):
        knowing.ended(16)
    assert preemptions(Answers()) > 0
    assert preemptions(knowing) == 0


def test_what_is_known_of_answers() -> None:
    answers = Answers()
    for length in range(1, 8):
        answers.ended(10 * length)
    assert answers.left(0, 1000) == 0, "seven are too few"
    answers.ended(80)
    assert answers.usual == 70
    assert (answers.left(20, 1000), answers.left(20, 50), answers.left(90, 1000)) == (50, 30, 0)
    assert Counter(answers.left(0, most) for most in (5, 5, 500)) == {5: 2, 70: 1}
