"""What answers cost, through the official client and as metrics: where it is asked for, or always; of all choices."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families

from daedal.checkpoint.load import load
from daedal.cost.flops import Feeding
from tests.serve.live import MODEL, serving
from tests.serve.metered import TARIFF, metered_service

ASK = [{"role": "user", "content": "It is a truth"}]
PARTS = ("flops", "kv_byte_seconds", "device_seconds", "joules", "dollars")


@pytest.fixture(scope="module")
def metered(checkpoint: Path) -> Iterator[str]:
    with serving(metered_service(checkpoint)) as address:
        yield address


def post(address: str, path: str, **body: object) -> dict:
    answer = httpx.post(f"{address}/v1/{path}", json={"model": MODEL, **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def says_no_cost(usage: dict) -> bool:
    return not {"cost", "cost_details"} & usage.keys()


def totals(address: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("daedal:cost_")]
    assert {tuple(sample.labels.items()) for sample in samples} == {(("model_name", MODEL),)}
    return {sample.name.removeprefix("daedal:cost_").removesuffix("_total"): sample.value for sample in samples}


def test_an_answer_says_what_it_cost_where_that_is_asked(metered: str, checkpoint: Path) -> None:
    before = totals(metered)
    asked = {"messages": ASK, "max_tokens": 6, "seed": 1, "ignore_eos": True}
    body = post(metered, "chat/completions", **asked, include_cost=True)
    ChatCompletion.model_validate(body, strict=True)
    cost, usage = body["usage"]["cost_details"], body["usage"]
    assert usage["cost"] == cost["dollars"]  # a number, as clients expect it there
    fed, rows = usage["total_tokens"] - 1, usage["completion_tokens"]
    feeding = Feeding.of(load(checkpoint).config)
    one_by_one = sum(feeding.flops(past, 1, 0) for past in range(fed)) + rows * feeding.head
    assert cost["flops"] == pytest.approx(one_by_one)  # ordinary attention has one form, whatever is fed together
    assert cost["joules"] > 0
    assert cost["dollars"] == pytest.approx(0.001 * cost["device_seconds"])
    assert (cost["price"], cost["energy_source"]) == ("rented", TARIFF.energy.source)
    after = totals(metered)
    # Nothing else ran: the totals have grown by this answer.
    assert {name: after[name] - before[name] for name in PARTS} == pytest.approx({name: cost[name] for name in PARTS})
    assert says_no_cost(post(metered, "chat/completions", **asked)["usage"])
    assert says_no_cost(post(metered, "chat/completions", **asked, include_cost=False)["usage"])


def test_choices_cost_together(metered: str) -> None:
    asked = {"prompt": ["It is", "a wife"], "n": 3, "max_tokens": 5, "seed": 4, "ignore_eos": True}
    before = totals(metered)
    answer = post(metered, "completions", **asked, include_cost=True)
    Completion.model_validate(answer, strict=True)
    after = totals(metered)
    cost = answer["usage"]["cost_details"]
    assert {name: after[name] - before[name] for name in PARTS} == pytest.approx({name: cost[name] for name in PARTS})
    alone = [
        post(metered, "completions", **{**asked, "prompt": prompt}, include_cost=True) for prompt in asked["prompt"]
    ]
    assert cost["flops"] == pytest.approx(sum(one["usage"]["cost_details"]["flops"] for one in alone))


def test_a_stream_ends_with_its_cost(metered: str) -> None:
    with openai.OpenAI(base_url=f"{metered}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": MODEL, "max_tokens": 5, "seed": 4, "stream": True, "stream_options": {"include_usage": True}}
        more = {"include_cost": True, "ignore_eos": True}
        chat = list(client.chat.completions.create(messages=ASK, **asked, extra_body=more))
        text = list(client.completions.create(prompt="It is", **asked, extra_body=more))
        whole = client.chat.completions.create(
            model=MODEL, max_tokens=5, seed=4, messages=ASK, extra_body={**more, "stream_options": None}
        )
    assert [chunk.usage for chunk in (*chat[:-1], *text[:-1])] == [None] * (len(chat) + len(text) - 2)
    assert chat[-1].usage.cost_details["flops"] == pytest.approx(whole.usage.cost_details["flops"])
    assert text[-1].usage.cost_details["joules"] > 0


def test_a_server_may_always_say_it(checkpoint: Path) -> None:
    with serving(metered_service(checkpoint, shows_cost=True)) as address:
        assert httpx.get(f"{address}/stats").json()["counts_cost"]
        assert post(address, "completions", prompt="It is")["usage"]["cost_details"]["flops"] > 0
        assert (
            not {"cost", "cost_details"}
            & post(address, "completions", prompt="It is", include_cost=False)["usage"].keys()
        )


def test_what_is_not_counted_is_not_promised(server: str) -> None:
    assert not httpx.get(f"{server}/stats").json()["counts_cost"]
    assert says_no_cost(post(server, "completions", prompt="It is")["usage"])
    body = {"model": MODEL, "prompt": "It is", "include_cost": True}
    refusal = httpx.post(f"{server}/v1/completions", json=body)
    assert refusal.status_code == 400
    error = refusal.json()["error"]
    assert (error["param"], error["message"]) == (
        "include_cost",
        "include_cost is true, and this server counts no costs: leave it out",
    )
    assert "daedal:cost_" not in httpx.get(f"{server}/metrics").text
    assert httpx.post(f"{server}/v1/completions", json={**body, "include_cost": "yes"}).status_code == 400
