"""Answers are the same whether a prompt's beginning was found or read: for every cache, cut, batch and drafter."""

from functools import cache
from pathlib import Path

import pytest
import torch

import daedal
from daedal.checkpoint.save import save
from daedal.cost.flops import Feeding
from daedal.infer import memory
from daedal.infer.cache import PagedCache, page_nbytes, state_nbytes
from daedal.infer.engine import Engine, StepError
from daedal.infer.prefixes import Copy
from daedal.infer.request import Output, Request, SamplingParams
from daedal.model.transformer import Transformer
from tests.infer.engines import assert_idle, check_acceptance, fitting, poisoned, same, speculation
from tests.infer.models import KINDS, WIDE_EXPERTS, prompts, tame, tiny
from tests.infer.test_metering import metered
from tests.native import needs_kernels
from tests.private_cache import private_cache
from tests.tiny import tiny_model

SHARED, OTHER, ALONE = prompts(30, 20, 7, seed=3)
ASKED = [[*SHARED[:29], *tail] for tail in prompts(1, 8, 15, 3, seed=4)]
ASKED += [[*SHARED[:13], *OTHER], ALONE, SHARED[:24]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(seed=7, max_tokens=15),
    SamplingParams(seed=7, max_tokens=9, top_p=0.8, temperature=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=11, repetition_penalty=1.4, logprobs=2),
    SamplingParams(seed=8, max_tokens=13, top_k=5, logit_bias={3: 2.0}, stop_ids=(40, 41, 42)),
    SamplingParams(seed=9, max_tokens=4, prompt_logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=1, logprobs=0),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@cache
def model_of(kind: str) -> Transformer:
    return tame(tiny(kind, drafting=kind != "dense"), 0.3)


@cache
def without(kind: str, kv_cache_dtype: str = "auto") -> list[Output]:
    """What is answered where nothing is kept."""
    engine = Engine(model_of(kind), prefix_caching=False, kv_cache_dtype=kv_cache_dtype)
    return poisoned(engine).generate(ASKED, PARAMS)


def check_rounds(engine: Engine, kind: str, kv_cache_dtype: str = "auto", *, rounds: int = 2) -> None:
    """The same requests again and again: each time they find more, and answer the same."""
    hits = 0
    for _ in range(rounds):
        outputs = engine.generate(ASKED, PARAMS)
        same(outputs, without(kind, kv_cache_dtype))
        assert outputs[5].num_cached == 0  # every position of this prompt is wanted
        hits += sum(output.num_cached for output in outputs)
        assert engine.stats().prefix_hits_total == hits
        assert_idle(engine)
    assert all(output.num_cached >= 8 for place, output in enumerate(outputs) if place != 5)
    assert engine.stats().prefix_queries_total == rounds * sum(len(ids) for ids in ASKED if ids is not ALONE)


def room(kind: str) -> dict[str, int]:
    """Sizes of an engine that loses nothing of what it kept."""
    return {"page_size": fitting(model_of(kind), 4), "max_batch": 8, "cache_bytes": 2**22}


@pytest.mark.parametrize(("kind", "chunk"), [*((kind, 7) for kind in KINDS), ("latent", 512), ("compressed", 512)])
def test_found_or_read(kind: str, chunk: int) -> None:
    model = model_of(kind)
    engine = poisoned(Engine(model, max_step_tokens=chunk, **room(kind)))
    check_rounds(engine, kind)
    # A conversation's next turn begins with the answer to the last.
    turn = [*ASKED[1], *without(kind)[1].ids, 5, 6]
    (found,) = engine.generate([turn], GREEDY)
    assert found.num_cached >= len(ASKED[1]) + 8
    same([found], Engine(model, prefix_caching=False).generate([turn], GREEDY))


def small(kind: str, num_pages: int, monkeypatch: pytest.MonkeyPatch, **sizes: object) -> Engine:
    """An engine with so many pages, and 3 rings for copies where there are rings."""
    monkeypatch.setattr(memory, "_KEPT_RINGS_SHARE", 1.0)
    model, max_batch = model_of(kind), 3
    size = fitting(model, 4)
    rings = (max_batch + 3) * state_nbytes(model.config, model.dtype)
    nbytes = num_pages * page_nbytes(model.config, size, model.dtype) + rings
    engine = poisoned(Engine(model, cache_bytes=nbytes, page_size=size, max_batch=max_batch, **sizes))
    assert engine.stats().pages_total == num_pages
    return engine


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_a_small_cache_preempts_and_finds_what_it_can(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [[*SHARED[:9], *tail] for tail in prompts(1, 4, 8, 3, 2, seed=6)]
    expected = poisoned(Engine(model_of(kind), prefix_caching=False)).generate(asked, PARAMS[:5])
    engine = small(kind, 40 // fitting(model_of(kind), 4), monkeypatch, max_step_tokens=16)
    for _ in range(3):
        same(engine.generate(asked, PARAMS[:5]), expected)
        assert_idle(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert 0 < stats.prefix_hits_total < stats.prefix_queries_total


@pytest.mark.parametrize(
    ("kind", "method"),
    [("dense", "lookup"), ("latent", "mtp"), ("compressed", "model"), ("compressed", "mtp")],
)
def test_drafts_go_on_where_the_beginning_was_found(kind: str, method: str) -> None:
    model = model_of(kind)

    def make(*, keeps: bool) -> Engine:
        speculate = speculation(method, model)
        return poisoned(Engine(model, prefix_caching=keeps, speculate=speculate, **room(kind)))

    keeping, plain = make(keeps=True), make(keeps=False)
    check_rounds(keeping, kind)
    for _ in range(2):
        plain.generate(ASKED, PARAMS)
    check_acceptance(keeping.stats())
    # As often right as where everything was read, but for the one row of a drafting module that knows the next token.
    accepted, expected = (engine.stats().num_accepted_total for engine in (keeping, plain))
    assert accepted == pytest.approx(expected, rel=0.15, abs=2)


@pytest.mark.parametrize("kind", ["indexed", "compressed"])
def test_packed_rows_are_copied_as_they_are(kind: str) -> None:
    engine = poisoned(Engine(model_of(kind), kv_cache_dtype="fp8", **room(kind)))
    check_rounds(engine, kind, "fp8")


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2", "deepseek_v32", "deepseek_v4"])
def test_logits_after_a_hit_are_the_models_own(family: str) -> None:
    """At the families' own rates: V4's pages have 128 tokens, its longest groups and window lie across the border."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 300, (300,), generator=generator).tolist()
    engine = poisoned(Engine(model, max_batch=2, max_context=400))
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)
    engine.generate([ids[:290]], params)
    for tail in (ids[260:], [5, *ids[262:]]):
        prompt = [*ids[:260], *tail]
        (output,) = engine.generate([prompt], params)
        assert output.num_cached == (256 if family == "deepseek_v4" else 288 if tail[0] == ids[260] else 256)
        with torch.inference_mode():
            exact_TV = model.logits(torch.tensor([[*prompt, *output.ids]]))[0].log_softmax(-1)
        for row, entry in enumerate(output.logprobs or [], start=len(prompt) - 1):
            values, _ = exact_TV[row].topk(3)
            assert [logprob for _, logprob in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
def test_a_deterministic_engine_gives_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAEDAL_CACHE", str(private_cache(tmp_path / "cache")))
    save(tiny_model(family, **WIDE_EXPERTS), tmp_path / "tiny")
    model = daedal.load(tmp_path / "tiny", weights="int8")
    ids = torch.randint(3, 290, (330,), generator=torch.Generator().manual_seed(5)).tolist()
    asked = [ids[:290], ids, [*ids[:270], 7, 8], ids[:256], ids[40:]]
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=0, ignore_eos=True)
    sizes = {"max_step_tokens": 132, "max_batch": 4, "max_context": 400, "page_size": 128, "deterministic": True}

    def numbers(engine: Engine, some: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        outputs = engine.generate(some, params)
        return [(output.ids, [entry.logprob for entry in output.logprobs or ()]) for output in outputs]

    expected = numbers(Engine(model, prefix_caching=False, **sizes), asked)
    engine = Engine(model, **sizes)
    for _ in range(2):
        assert numbers(engine, asked) == expected
    hits = engine.stats().prefix_hits_total
    assert [numbers(engine, [prompt])[0] for prompt in reversed(asked)] == expected[::-1]
    assert engine.stats().prefix_hits_total - hits == 256 + 256 + 256 + 128 + 256


@pytest.mark.parametrize("targets", [(2, 3, 5), (6, 7, 0)], ids=["onto sources", "elsewhere"])
def test_all_rows_are_read_before_any_is_written(targets: tuple[int, ...]) -> None:
    config, sources = model_of("compressed").config, (1, 2, 3)
    held = PagedCache(config, num_pages=8, page_size=8, dtype=torch.float32, num_states=4)
    before: dict[tuple[int, str], torch.Tensor] = {}
    for layer, pools in held.pools.items():
        for name, pool in pools.items():
            before[layer, name] = pool.normal_().clone()
    held.copy(Copy(sources=sources, targets=targets, ring=(1, 3)))
    for (layer, name), pool in before.items():
        found = held.pools[layer][name]
        onto, since = ((3,), (1,)) if held.slots[layer, name].ring else (targets, sources)
        assert torch.equal(found[list(onto)], pool[list(since)])
        others = [place for place in range(len(pool)) if place not in onto]
        assert torch.equal(found[others], pool[others])


def request(name: str, prompt: list[int], **more: object) -> Request:
    return Request(id=name, prompt=tuple(prompt), params=GREEDY, **more)


def test_cancelled_requests_leave_what_they_read_and_failed_ones_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    engine = poisoned(Engine(model, page_size=4))
    engine.add(request("cancelled", SHARED))
    engine.step()
    engine.cancel("cancelled")
    engine.step()
    (output,) = engine.generate([SHARED], GREEDY)
    assert output.num_cached == 28
    engine.add(request("fails", [*SHARED, 1, 2, 3]))
    with monkeypatch.context() as patch:
        patch.setattr(model, "head", lambda hidden_TD: hidden_TD[:, :1] + torch.nan)
        with pytest.raises(StepError, match="NaN"):
            engine.step()
    assert [engine.generate([SHARED], GREEDY)[0].num_cached for _ in range(2)] == [0, 28]
    engine.forget_prefixes()
    assert engine._pages.num_kept == 0
    assert engine.generate([SHARED], GREEDY)[0].num_cached == 0
    assert_idle(engine)


def test_an_interrupted_step_leaves_no_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("compressed")
    engine = poisoned(Engine(model))
    engine.generate([SHARED], GREEDY)
    with monkeypatch.context() as patch:

        def interrupt(hidden_TD: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

        patch.setattr(model, "head", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([SHARED], GREEDY)
    (output,) = engine.generate([SHARED], GREEDY)
    assert output.num_cached == 0
    same([output], Engine(model).generate([SHARED], GREEDY))


def test_strangers_share_nothing() -> None:
    engine = Engine(model_of("dense"), page_size=4)
    found = []
    for place, salt in enumerate(("ann", "bob", "ann", "")):
        engine.add(request(str(place), SHARED, cache_salt=salt))
        outputs: list[Output] = []
        while engine.has_work:
            outputs += engine.step()
        found.append([output.num_cached for output in outputs])
    # Told once, with the first token.
    assert [each[0] for each in found] == [0, 0, 28, 0]
    assert not any(later for each in found for later in each[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_found_is_not_charged(kind: str) -> None:
    model = model_of(kind)
    engine = metered(model, 4096)
    prompt = SHARED[:26]
    _, again = (engine.generate([prompt], GREEDY)[0] for _ in range(2))
    assert again.num_cached == 24
    feeding = Feeding.of(model.config)
    expected = feeding.flops(24, 2, 1) + sum(feeding.flops(past, 1, 1) for past in range(26, 31))
    assert again.spent.flops == pytest.approx(expected, rel=1e-12)


def test_without_a_prefix_cache_nothing_is_found() -> None:
    engine = Engine(model_of("compressed"), prefix_caching=False)
    assert [output.num_cached for output in engine.generate([SHARED] * 3, GREEDY)] == [0, 0, 0]
    stats = engine.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (0, 0)
    assert engine._plan.num_kept_states == 0
