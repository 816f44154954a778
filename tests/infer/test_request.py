"""What can be refused without a model is refused when the noun is made, with the field named."""

import pytest

from daedal.errors import RequestError
from daedal.infer.request import Output, Request, SamplingParams, TokenLogprobs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 2**31),
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 3.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("seed", 2**63),
        ("seed", 0.5),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", "text"),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", None),
        ("stop_ids", [1.0]),
        ("stop_ids", "12"),
        ("stop_ids", 7),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [1]),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


@pytest.mark.parametrize("prompt", [[], "abc", [1, "2"], [1.0], [True], None, 5], ids=str)
def test_a_prompt_is_a_list_of_ids(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        Request(id="r", prompt=prompt, params=SamplingParams())
    assert caught.value.param == "prompt"


def test_lists_become_tuples_and_later_changes_do_not_reach_them() -> None:
    bias, stop, ids = {3: 1.0}, ["a"], [4]
    params = SamplingParams(stop=stop, stop_ids=ids, logit_bias=bias)
    request = Request(id="r", prompt=ids, params=params)
    bias[5], ids[0] = 2.0, 9
    stop.append("b")
    assert (params.stop, params.stop_ids, dict(params.logit_bias)) == (("a",), (4,), {3: 1.0})
    assert request.prompt == (4,)


def test_outputs_add_up() -> None:
    whole = Output(request_id="r")
    first, second = TokenLogprobs(id=1, logprob=-1.0), TokenLogprobs(id=2, logprob=-2.0)
    whole.extend(Output(request_id="r", ids=[1], text="", logprobs=[first], prompt_logprobs=[None]))
    whole.extend(Output(request_id="r", ids=[2], text="ab", logprobs=[second], finish_reason="stop"))
    assert whole == Output(
        request_id="r", ids=[1, 2], text="ab", logprobs=[first, second], prompt_logprobs=[None], finish_reason="stop"
    )
