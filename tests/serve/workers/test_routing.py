"""Which engine a request goes to: where its beginning was read, and never far beyond an even share."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from daedal.serve.workers.routing import BOUND, Router

SYSTEM = list(range(100))
OTHER = list(range(1000, 1100))


def router(count: int, **sizes: int) -> Router:
    return Router(count, **{"block": 8, **sizes})


def test_a_beginning_is_read_where_it_was_read_before() -> None:
    routing, loads, every = router(3), [0, 0, 0], range(3)
    first = routing.choose([*SYSTEM, 1], loads, among=every)
    other = routing.choose([*OTHER, 1], loads, among=every)
    assert other != first, "an engine that was never chosen comes first among equals"
    for tail in range(20):
        assert routing.choose([*SYSTEM, 500 + tail], loads, among=every) == first
        assert routing.choose([*OTHER, 500 + tail], loads, among=every) == other


def test_the_longest_beginning_counts_and_only_in_whole_blocks() -> None:
    routing, every = router(2), range(2)
    short = routing.choose(SYSTEM[:16], [0, 0], among=every)
    long = routing.choose([*SYSTEM[:8], *OTHER[:24]], [5, 0] if short == 0 else [0, 5], among=every)
    assert long != short, "the engine that had read eight of its tokens was busy"
    assert routing.choose([*SYSTEM[:8], *OTHER], [0, 0], among=every) == long
    assert routing.choose(SYSTEM, [0, 0], among=every) == short
    alike = [routing.choose([*SYSTEM[:7], place], [0, 0], among=every) for place in range(4)]
    assert set(alike) == {0, 1}, "seven tokens are no block: nothing is remembered, engines take turns"


def test_a_crowd_with_one_beginning_spreads() -> None:
    routing, loads = router(4), [0] * 4
    for _ in range(200):
        loads[routing.choose(SYSTEM, loads, among=range(4))] += 1
    assert max(loads) <= math.ceil(BOUND * 200 / 4)
    assert sum(load > 0 for load in loads) >= 4 / BOUND


def test_beginnings_of_strangers_are_not_alike() -> None:
    routing, every = router(2), range(2)
    first = routing.choose(SYSTEM, [0, 0], salt="one", among=every)
    assert routing.choose(SYSTEM, [0, 0], salt="two", among=every) != first
    assert routing.choose(SYSTEM, [0, 0], salt="one", among=every) == first


def test_an_engine_that_began_anew_has_read_nothing() -> None:
    routing, every = router(2), range(2)
    first = routing.choose(SYSTEM, [0, 0], among=every)
    routing.forget(first)
    assert routing.choose(SYSTEM, [0, 0], among=every) != first


def test_what_is_remembered_is_bounded_and_the_oldest_goes() -> None:
    routing, every = router(2, kept=12), range(2)
    first = routing.choose(SYSTEM[:64], [0, 0], among=every)
    for place in range(50):
        routing.choose([place] * 64, [0, 0], among=every)
    assert len(routing._readers) <= 12
    assert {routing.choose(SYSTEM[:64], [9 * (first == 0), 9 * (first == 1)], among=every)} == {1 - first}


def test_of_a_prompt_beyond_the_bound_the_start_is_remembered() -> None:
    routing, every = router(2, kept=4), range(2)
    first = routing.choose(SYSTEM, [0, 0], among=every)
    assert len(routing._readers) == 4
    assert routing.choose(SYSTEM, [0, 0], among=every) == first


@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from([None, 3, 10]))
def test_no_engine_has_more_than_its_share_and_all_that_are_there_are_used(
    count: int, seed: int, most: int | None
) -> None:
    draw = random.Random(seed)
    routing, loads = router(count, most=most), [0] * count
    for _ in range(40):
        among = sorted(draw.sample(range(count), draw.randint(1, count)))
        asked = draw.choice([1, 1, 1, 2])
        prompt = [draw.randint(0, 2)] * draw.choice([4, 30, 60])
        chosen = routing.choose(prompt, loads, among=among, count=asked)
        assert chosen in among
        even = math.ceil(BOUND * (sum(loads[engine] for engine in among) + asked) / len(among))
        least = min(loads[engine] for engine in among)
        assert loads[chosen] + asked <= (even if most is None else min(even, most)) or loads[chosen] == least
        loads[chosen] += asked
        for engine in range(count):
            loads[engine] -= draw.randint(0, loads[engine])
