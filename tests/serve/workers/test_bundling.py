"""When outputs are reported: at once where somebody waits for them, else together."""

import pytest

from daedal.infer.request import Output
from daedal.serve.workers.bundling import Bundle


class _Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def _output(name: str, *ids: int, ended: bool = False) -> Output:
    return Output(request_id=name, ids=list(ids), text="x" * len(ids), finish_reason="stop" if ended else None)


def test_the_first_of_an_answer_and_its_end_are_reported_at_once(clock: _Clock) -> None:
    bundle = Bundle(clock, seconds=10.0)
    assert bundle.add([_output("a", 1)])
    bundle.take()
    assert not bundle.add([_output("a", 2)])
    assert bundle.add([_output("a", 3), _output("b", 7)])
    bundle.take()
    assert not bundle.add([_output("b", 8), _output("a", 4)])
    assert bundle.add([_output("a", 5, ended=True)])


def test_what_waited_comes_together_and_in_order(clock: _Clock) -> None:
    bundle = Bundle(clock, seconds=10.0)
    for ids in ((1,), (2, 3), (4,)):
        bundle.add([_output("a", *ids), _output("b", ids[0] + 10)])
    first, second = bundle.take()
    assert (first.request_id, first.ids, first.text) == ("a", [1, 2, 3, 4], "xxxx")
    assert (second.request_id, second.ids) == ("b", [11, 12, 14])
    assert bundle.take() == []


def test_others_are_reported_when_the_last_report_is_old_enough(clock: _Clock) -> None:
    bundle = Bundle(clock, seconds=0.5)
    bundle.add([_output("a", 1)])
    bundle.take()
    clock.now += 0.25
    assert not bundle.add([_output("a", 2)])
    clock.now += 0.25
    assert bundle.add([_output("a", 3)])
    bundle.take()
    assert not bundle.add([])


def test_an_id_that_ended_may_come_again(clock: _Clock) -> None:
    bundle = Bundle(clock, seconds=10.0)
    for end in (lambda: bundle.add([_output("a", 9, ended=True)]), lambda: bundle.drop(["a"])):
        assert bundle.add([_output("a", 1)])
        bundle.take()
        assert not bundle.add([_output("a", 2)])
        end()
        bundle.take()
