"""What an engine accepts at the very edge of its context and its cache."""

import pytest

from daedal.errors import CapacityError, OverloadError, RequestError
from daedal.infer.admission import Limits
from daedal.infer.engine import Engine
from daedal.infer.request import Request, SamplingParams
from tests.tiny import tiny_model

LIMITS = Limits(vocab_size=10, context=8, capacity=8, has_text=False)


def _request(length: int, max_tokens: int) -> Request:
    return Request(id="r", prompt=(1,) * length, params=SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(("length", "max_tokens"), [(7, 1), (7, 100), (8, 0), (1, 8)])
def test_what_fits_exactly_is_accepted(length: int, max_tokens: int) -> None:
    LIMITS.check(_request(length, max_tokens))


@pytest.mark.parametrize(("length", "max_tokens"), [(8, 1), (9, 0), (9, 1)])
def test_a_prompt_that_leaves_no_room_for_what_it_asks_is_refused(length: int, max_tokens: int) -> None:
    with pytest.raises(RequestError, match="the context is 8") as caught:
        LIMITS.check(_request(length, max_tokens))
    assert caught.value.param == "prompt"


def test_the_last_token_of_an_answer_needs_no_place_in_the_cache() -> None:
    small = Limits(vocab_size=10, context=8, capacity=5, has_text=False)
    small.check(_request(3, 3))
    small.check(_request(5, 0))
    with pytest.raises(CapacityError):
        small.check(_request(3, 4))
    with pytest.raises(CapacityError):
        small.check(_request(6, 0))


def test_more_at_once_than_ever_fit_is_another_refusal_than_a_full_engine() -> None:
    engine = Engine(tiny_model("llama"), max_batch=2, max_waiting=1)
    engine.check_room(3)
    with pytest.raises(RequestError, match="at most 3") as caught:
        engine.check_room(4)
    assert caught.value.param == "n"
    engine.add(_request(3, 1))
    with pytest.raises(OverloadError, match="1 requests are under way"):
        engine.check_room(3)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-6, 1e-5])
def test_a_temperature_of_next_to_nothing_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    engine = Engine(tiny_model("llama"))
    greedy = engine.generate([[5, 6]], SamplingParams(max_tokens=4, temperature=0.0))
    cold = engine.generate([[5, 6]], SamplingParams(max_tokens=4, temperature=temperature, **filters))
    assert cold == greedy
