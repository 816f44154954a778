"""Accuracy gates: a task scores the same with every option of the engine on and off, alone and all together.

The task is made by a model itself: what it answers when it is asked one thing at a time, with whole prompts, without
prefix cache and drafts. That is the right answer, and every other way of running must give it, to the token. What packs
the cache is held to a share of it. `benchmarks/gates.py` does the same with a real model and real tasks.
"""

from functools import cache

import pytest

from daedal.infer.engine import Engine
from daedal.infer.request import Output, SamplingParams
from daedal.model.transformer import Transformer
from tests.infer.engines import assert_idle, fitting, poisoned, same, speculation
from tests.infer.models import KINDS, prompts, tame, tiny

# Examples that all questions begin with, and the questions.
(EXAMPLES,) = prompts(26, seed=11)
ASKED = [[*EXAMPLES, *question] for question in prompts(3, 9, 1, 14, 6, 2, 11, 5, seed=12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True)
PARAMS = [GREEDY, DRAWN] * 4

BATCHED: dict[str, object] = {"max_batch": 6}
CHUNKED: dict[str, object] = {"max_step_tokens": 7}
SHARING: dict[str, object] = {"prefix_caching": True, "cache_bytes": 2**22}
OPTIONS: dict[str, dict[str, object]] = {
    "batching": BATCHED,
    "chunks": CHUNKED,
    "prefix cache": SHARING,
    "speculation": {"speculate": True},
    "all": {**BATCHED, **CHUNKED, **SHARING, "speculate": True},
}


@cache
def model_of(kind: str) -> Transformer:
    return tame(tiny(kind, drafting=kind != "dense"), 0.3)


def engine_of(kind: str, options: dict[str, object]) -> Engine:
    model, wanted = model_of(kind), {"max_batch": 1, "prefix_caching": False, **options}
    drafts = wanted.pop("speculate", False)
    drafter = speculation("lookup" if kind == "dense" else "mtp", model) if drafts else None
    return poisoned(Engine(model, page_size=fitting(model, 4), speculate=drafter, **wanted))  # type: ignore[arg-type]


@cache
def right(kind: str) -> list[Output]:
    return engine_of(kind, {}).generate(ASKED, PARAMS)


def score(found: list[Output], expected: list[Output]) -> float:
    """The share of answers that are right to the last token."""
    return sum(one.ids == other.ids for one, other in zip(found, expected, strict=True)) / len(expected)


@pytest.mark.parametrize(
    ("kind", "option"),
    [*((kind, "all") for kind in KINDS), *(("compressed", option) for option in OPTIONS if option != "all")],
)
def test_a_task_scores_the_same(kind: str, option: str) -> None:
    engine = engine_of(kind, OPTIONS[option])
    for _ in range(2):  # the second time all beginnings are known
        found = engine.generate(ASKED, PARAMS)
        assert score(found, right(kind)) == 1.0
        same(found, right(kind))
    assert_idle(engine)
    stats = engine.stats()
    assert (stats.prefix_hits_total > 0) == bool(OPTIONS[option].get("prefix_caching"))
    assert (stats.num_drafted_total > 0) == ("speculate" in OPTIONS[option])


@pytest.mark.parametrize("kind", ["latent", "indexed", "compressed"])
def test_a_task_scores_almost_the_same_with_a_packed_cache(kind: str) -> None:
    """And exactly the same with it, whatever else is on."""
    packed = {"kv_cache_dtype": "fp8"}
    alone = engine_of(kind, packed).generate(ASKED, PARAMS)
    every = engine_of(kind, {**OPTIONS["all"], **packed}).generate(ASKED, PARAMS)
    assert score(every, alone) == 1.0
    firsts = [one.ids[0] == other.ids[0] for one, other in zip(alone, right(kind), strict=True)]
    assert sum(firsts) >= 6
