"""Problems and their answers: what counts of a reply, problems made by rule against a solver, and intervals."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daedal.errors import DataError
from daedal.eval.estimates import ratio, share
from daedal.eval.problem_sets import is_problem_set, read_problems
from daedal.eval.problems import Problem
from daedal.eval.puzzles import PUZZLES, puzzles


def problem(answer: str, rule: str) -> Problem:
    return Problem(task="made", doc_id=0, prompt="?", answer=answer, rule=rule, stop=(), max_tokens=9)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (" 18", "18"),
        ("She has 16 - 3 - 4 = 9 eggs, so 9 * 2 = $18.", "18"),
        ("It costs $1,234,567.50 in all.", "1234567.50"),
        ("16-3=-13", "-13"),
        ("(4)-2", "2"),
        ("-7", "-7"),
        ("about 50%", "50"),
        ("18.00", "18.00"),
        ("nobody knows", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_reply_counts(reply: str, found: str | None) -> None:
    assert problem("18", "number").found(reply) == found


def test_what_is_right() -> None:
    assert problem("18", "number").is_right("18.00")
    assert problem("-5", "number").is_right("-5")
    assert not problem("18", "number").is_right("81")
    assert not problem("18", "number").is_right("9" * 1000)
    assert not problem("18", "number").is_right(None)
    text = problem("pear lamp river", "text")
    assert text.is_right(text.found("  pear  lamp river \n"))
    assert not text.is_right(text.found("pear lamp river sea"))
    begins = problem("pear lamp", "beginning")
    assert begins.is_right(begins.found("pear lamp river sea"))
    assert not begins.is_right(begins.found("a pear lamp"))


def solved(task: str, prompt: str) -> str:
    """The answer, worked out from the prompt's text alone."""
    kind = task.partition(":")[0]
    asked = prompt.split("\n\n")[-1].removesuffix("\nAnswer:")
    if kind == "arithmetic":
        one, sign, other = asked.removeprefix("What is ").removesuffix("?").split()
        return str({"+": int(one) + int(other), "-": int(one) - int(other), "*": int(one) * int(other)}[sign])
    if kind == "sorting":
        return " ".join(sorted(asked.partition(": ")[2].split(), key=int))
    if kind == "reversing":
        return " ".join(reversed(asked.partition(": ")[2].split()))
    if kind == "copying":
        text, _, cue = prompt.partition("\n\n")
        return " ".join(text.partition(f"{cue} ")[2].split()[:8])
    *lines, last = prompt.split("\n")
    (found,) = [line.removeprefix(f"{last} ").rstrip(".") for line in lines if line.startswith(f"{last} ")]
    return found


@given(kind=st.sampled_from(sorted(PUZZLES)), step=st.integers(0, 12), seed=st.integers(0, 2**32))
def test_made_problems_have_the_answer_that_their_text_says(kind: str, step: int, seed: int) -> None:
    puzzle = PUZZLES[kind]
    size = min(puzzle.least + step * (1 if puzzle.shown else 97), puzzle.most)
    name = f"{kind}:{size}"
    three = puzzles(name, 3, seed=seed)
    assert [one.doc_id for one in three] == [0, 1, 2]
    for one in three:
        assert one.answer == solved(one.task, one.prompt)
        assert one.is_right(one.found(f" {one.answer}"))
        assert not one.is_right(one.found(f" {one.answer[:-1]}"))
        assert not any(stop in one.answer for stop in one.stop)
        if puzzle.shown:
            examples = one.prompt.split("\n\n")[:-1]
            assert len(examples) == 4
            for example in examples:
                question, _, answer = example.partition("\nAnswer: ")
                assert answer == solved(one.task, question)
        else:
            assert 0.8 * size <= len(one.prompt.split()) <= 1.05 * size
    assert len({one.key for one in three}) == 3
    assert puzzles(name, 5, seed=seed)[:3] == three
    assert puzzles(name, 3, seed=seed + 1) != three


def test_places_are_drawn_evenly() -> None:
    """What is asked for lies at the beginning, in the middle and at the end as often."""
    places = []
    for one in puzzles("retrieval:440", 300, seed=1):
        *lines, last = one.prompt.split("\n")
        places.append(next(index for index, line in enumerate(lines) if line.startswith(f"{last} ")) / len(lines))
    thirds = [sum(low <= place < low + 1 / 3 for place in places) for low in (0, 1 / 3, 2 / 3)]
    assert min(thirds) > 70


def test_names_and_sizes() -> None:
    assert [is_problem_set(name) for name in ("gsm8k", "sorting", "copying:4096", "piqa", "sorting.jsonl")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert {task: len(found) for task, found in read_problems(["sorting:7", "arithmetic"], 6, seed=0).items()} == {
        "sorting:7": 6,
        "arithmetic:2": 6,
    }
    for name in ("sorting:51", "sorting:x", "sorting:", "copying:-8", "arithmetic:9999999999"):
        with pytest.raises(DataError, match=f"the task {re.escape(repr(name))} has no size that it can have: give"):
            read_problems([name], 6, seed=0)
    with pytest.raises(DataError, match="the task sorting:5 is named twice"):
        read_problems(["sorting", "sorting:5"], 6, seed=0)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (1, 1, 0.20654, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_shares_have_wilsons_interval(hits: int, of: int, low: float, high: float) -> None:
    found = share(hits, of)
    assert found.value == hits / of
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_ratios_are_drawn_item_by_item() -> None:
    assert ratio([1.0], [2.0]) is None
    assert ratio([1.0, 2.0], [0.0, 0.0]) is None
    always = ratio([1.0, 2.0, 5.0], [2.0, 4.0, 10.0])
    assert always is not None
    assert (always.low, always.value, always.high) == pytest.approx((0.5, 0.5, 0.5))
    one = ratio([1.0, 3.0] * 50, [1.0, 1.0] * 50)
    assert one is not None
    # The mean of 100 values with a spread of 1.
    assert (one.low, one.value, one.high) == pytest.approx((2 - 0.196, 2.0, 2 + 0.196), abs=0.02)
