"""Steps of several passes: the same answers in fewer steps, and single passes wherever more would be wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from daedal.cost.flops import Feeding
from daedal.cost.spending import Tariff
from daedal.errors import ConfigError
from daedal.infer.engine import Engine
from daedal.infer.request import Output, Request, SamplingParams
from daedal.infer.sampling import Logits
from daedal.infer.speculative import Speculation
from daedal.infer.stats import StepError
from daedal.infer.stride import Stride
from daedal.model.transformer import Transformer
from tests.infer.engines import Digits, assert_idle, fitting, poisoned, same
from tests.infer.test_metering import PRICE, Clock, Energy
from tests.native import needs_kernels
from tests.tiny import FAMILIES, tiny_model

LONG = 1e6  # milliseconds: as many passes as a page has room for
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
Packed = Callable[[str], Transformer]


class Counted:
    """An engine, its steps, and the passes that it made beyond the first of a step."""

    def __init__(self, model: Transformer, **settings: Any):
        self.engine = poisoned(Engine(model, tokenizer=Digits(end=1), **settings))
        self.steps = self.further = 0
        self._again = self.engine._runner.again
        self.engine._runner.again = self._counted

    def _counted(self, tokens: Sequence[int]) -> Logits | None:
        logits = self._again(tokens)
        self.further += logits is not None
        return logits

    def answers(self, requests: Sequence[tuple[int, Request]]) -> list[Output]:
        """Requests that come before the step with their number, or when there is nothing else to do."""
        found = {request.id: Output(request_id=request.id) for _, request in requests}
        waiting = list(requests)
        while waiting or self.engine.has_work:
            while waiting and (waiting[0][0] <= self.steps or not self.engine.has_work):
                self.engine.add(waiting.pop(0)[1])
            for output in self.engine.step():
                found[output.request_id].extend(output)
            self.steps += 1
        assert_idle(self.engine)
        return list(found.values())


def asked(*params: SamplingParams, every: int = 3) -> list[tuple[int, Request]]:
    """A request for each, one behind the other."""
    found = []
    for place, one in enumerate(params):
        ids = torch.randint(3, 300, (5 + 11 * place,), generator=torch.Generator().manual_seed(place)).tolist()
        found.append((place * every, Request(id=str(place), prompt=tuple(ids), params=one)))
    return found


KINDS = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=37, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.7, top_p=0.9, max_tokens=51, repetition_penalty=1.2),
    SamplingParams(seed=3, top_k=20, max_tokens=30, stop_ids=tuple(range(40))),
    SamplingParams(seed=4, min_p=0.01, max_tokens=45, stop=("2><1", "77>")),
]


@needs_kernels
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_single_passes(family: str, deterministic: bool, packed: Packed) -> None:
    """Whatever is asked for, while others come and go, across pages, windows, groups and entries."""
    model = packed(family)
    sizes = {"page_size": fitting(model, 8), "max_batch": 3, "deterministic": deterministic}
    single, several = Counted(model, stride_ms=None, **sizes), Counted(model, stride_ms=LONG, **sizes)
    same(several.answers(asked(*KINDS)), single.answers(asked(*KINDS)))
    assert single.further == 0
    assert several.further > 20
    assert several.steps < single.steps


@needs_kernels
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_what_was_answered_so_can_be_gone_on_from(family: str, packed: Packed) -> None:
    """Pages and rings are kept at their ends, as single passes keep them."""
    model = packed(family)
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    found = []
    for stride_ms in (None, LONG):
        counted = Counted(model, stride_ms=stride_ms, max_batch=2)
        ((_, first),) = asked(params)
        (answer,) = counted.answers([(0, first)])
        again = Request(id="again", prompt=(*first.prompt, *answer.ids, 7, 8), params=GREEDY)
        found.append(counted.answers([(0, again)])[0])
        assert found[-1].num_cached >= 128
    assert found[0].num_cached == found[1].num_cached
    same(found[1:], found[:1])


@needs_kernels
def test_single_passes_where_each_token_is_looked_at_or_drafted(packed: Packed) -> None:
    model = packed("deepseek_v3")
    for params in (
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0),
    ):
        counted = Counted(model, stride_ms=LONG)
        assert len(counted.answers(asked(params))[0].ids) == 12
        assert counted.further == 0
    drafting = Counted(model, stride_ms=LONG, speculate=Speculation(method="lookup"))
    drafting.answers(asked(GREEDY))
    assert drafting.further == 0


@needs_kernels
def test_nobody_waits_behind_further_passes(packed: Packed) -> None:
    counted = Counted(packed("deepseek_v3"), stride_ms=LONG, max_batch=1)
    first, second = (request for _, request in asked(GREEDY, GREEDY))
    counted.engine.add(first)
    while counted.further < 10:
        counted.engine.step()
    counted.engine.add(second)
    before = counted.further
    assert [len(output.ids) for output in counted.engine.step()] == [1]
    assert counted.further == before


@needs_kernels
def test_a_step_ends_early_for_what_is_new(packed: Packed) -> None:
    """Asked between passes; the answer stays the same."""
    model = packed("deepseek_v3")
    expected = Counted(model, stride_ms=None).answers(asked(GREEDY))
    counted, looks = Counted(model, stride_ms=LONG), list[int]()

    def third() -> bool:
        looks.append(counted.further)
        return len(looks) % 3 == 0

    counted.engine.heed(third)
    same(counted.answers(asked(GREEDY)), expected)
    assert len(looks) > 20
    assert counted.further < len(looks)


@needs_kernels
def test_an_answer_ends_where_it_would(packed: Packed) -> None:
    """An end-of-sequence token ends the step; tokens behind a stop string are dropped."""
    model = packed("deepseek_v3")
    (free,) = Counted(model, stride_ms=None).answers(asked(GREEDY))
    place = next(place for place in range(17, 30) if free.ids[place] not in free.ids[:place])
    by_id = Counted(model, stride_ms=LONG)
    (ended,) = by_id.answers(asked(SamplingParams(temperature=0.0, max_tokens=40, stop_ids=(free.ids[place],))))
    assert (ended.ids, ended.finish_reason) == (free.ids[: place + 1], "stop")
    assert by_id.further < place + 1
    by_text = Counted(model, stride_ms=LONG)
    (ended,) = by_text.answers(asked(SamplingParams(temperature=0.0, max_tokens=40, stop=(f"<{free.ids[place]}>",))))
    assert (ended.ids, ended.finish_reason) == (free.ids[: place + 1], "stop")
    assert by_text.engine.stats().generation_tokens_total == place + 1


@needs_kernels
def test_work_and_time_of_all_passes_are_charged(packed: Packed) -> None:
    model, tariff = packed("deepseek_v3"), Tariff(energy=Energy(), price=PRICE)  # type: ignore[arg-type]
    counted = Counted(model, stride_ms=LONG, clock=Clock(), tariff=tariff, prefix_caching=False)
    (answer,) = counted.answers(asked(GREEDY))
    assert counted.further > 20
    assert answer.spent is not None
    feeding, prompt = Feeding.of(model.config), len(asked(GREEDY)[0][1].prompt)
    expected = feeding.flops(0, prompt, 1) + sum(feeding.flops(prompt + place, 1, 1) for place in range(39))
    assert answer.spent.flops == pytest.approx(expected, rel=1e-12)
    total = counted.engine.stats().spent_total
    assert total is not None
    assert answer.spent.kv_byte_seconds == pytest.approx(total.kv_byte_seconds, rel=1e-12)
    assert answer.spent.device_seconds == pytest.approx(total.device_seconds, rel=1e-12)


@needs_kernels
def test_a_further_pass_that_fails_drops_its_requests_alone(packed: Packed) -> None:
    counted = Counted(packed("deepseek_v3"), stride_ms=LONG)
    ((_, request),) = asked(GREEDY)
    counted.engine.add(request)
    while counted.further < 10:
        counted.engine.step()

    def broken(tokens: Sequence[int]) -> Logits:
        return Logits(torch.full((len(tokens), 320), torch.nan))

    counted.engine._runner.again = broken
    with pytest.raises(StepError, match="NaN or infinity") as error:
        counted.engine.step()
    assert error.value.request_ids == ("0",)
    assert_idle(counted.engine)
    counted.engine._runner.again = counted._again
    assert len(counted.answers(asked(GREEDY))[0].ids) == 40


def test_passes_that_fit_a_time() -> None:
    stride = Stride.within(25.0)
    assert stride.more == 0, "nothing is known"
    stride.took(1, 0.0)
    stride.took(2, -1.0)
    assert stride.more == 0, "no clock does that"
    stride.took(1, 0.004)
    assert stride.more == 5
    for _ in range(30):
        stride.took(4, 0.040)
    assert stride.more == 1
    for _ in range(30):
        stride.took(1, 0.080)
    assert stride.more == 0
    endless = Stride.within(1e308)
    endless.took(1, 1e-9)
    assert endless.more > 1000
    single = Stride.within(None)
    single.took(1, 1e-6)
    assert single.more == 0


@pytest.mark.parametrize("stride_ms", [0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be(stride_ms: float) -> None:
    with pytest.raises(ConfigError, match="stride_ms is"):
        Engine(tiny_model("deepseek_v3"), stride_ms=stride_ms)
