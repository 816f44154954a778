"""What the engine plans is what its caches allocate, to the byte; rings come first; what cannot be is said."""

from itertools import product

import pytest
import torch

from daedal import shapes
from daedal.cost import cached, work
from daedal.errors import ConfigError
from daedal.infer import memory
from daedal.infer.cache import REWIND, KvDtype
from daedal.infer.engine import Engine
from daedal.infer.memory import Kept, PagePlan, plan_pages
from daedal.infer.request import Request, SamplingParams
from daedal.infer.speculative import Speculation
from tests.infer.models import CONTEXT, KINDS, tiny
from tests.infer.test_cache import deepseek_v4_flash
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def plan(*kept: Kept, **sizes: int | None) -> PagePlan:
    given: dict[str, int | None] = dict.fromkeys(("cache_bytes", "page_size", "max_waiting", "max_context"))
    return plan_pages(kept, device=CPU, **{**given, "max_batch": 3, "max_step_tokens": 8, **sizes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [None, "mtp", "model", "lookup"])
@pytest.mark.parametrize("cache_bytes", [None, 300_000])
def test_predicted_bytes_are_allocated_bytes(kind: str, method: str | None, cache_bytes: int | None) -> None:
    if kind == "dense" and method == "mtp":
        kind = "latent"
    model = tiny(kind, drafting=method == "mtp")
    speculate = None
    if method is not None:
        draft_model = tiny("compressed", seed=1) if method == "model" else None
        speculate = Speculation(method=method, draft_model=draft_model)
    engine = Engine(model, cache_bytes=cache_bytes, max_batch=3, speculate=speculate)
    allocated = sum(cache.nbytes for cache in engine._runner._caches)
    stats = engine.stats()
    assert engine._plan.nbytes == stats.kv_bytes_total == allocated
    assert stats.kv_bytes_used == 0
    assert len(engine._runner._caches) == (2 if method == "model" else 1)
    if cache_bytes is not None:
        assert cache_bytes - engine._plan.page_bytes < allocated <= cache_bytes
    else:
        assert stats.pages_total * engine._plan.page_size >= 3 * CONTEXT


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("llama", "auto"), *product(("deepseek_v3", "deepseek_v32", "deepseek_v4"), ("auto", "fp8"))],
)
def test_the_planners_bytes_of_a_sequence_are_what_the_engine_gives_it(family: str, kv_dtype: KvDtype) -> None:
    """At whole pages, but for the rows of each ring that let drafts be withdrawn."""
    model, tokens, together = tiny_model(family, dtype=torch.bfloat16), 256, 3
    planned = work.model(model.config, kv_dtype="fp8" if kv_dtype == "fp8" else "bf16")
    rings = shapes.cache(model.config)
    rewinding = cached.ring_bytes(rings, cached.in_bf16, rewind=REWIND) - cached.ring_bytes(rings, cached.in_bf16)
    each = planned.kv_bytes(tokens) + rewinding

    def engine(cache_bytes: int) -> Engine:
        sizes = {"cache_bytes": cache_bytes, "page_size": 128, "max_batch": together, "max_step_tokens": 1024}
        return Engine(model, kv_cache_dtype=kv_dtype, **sizes)

    full = engine(together * each)
    for name in range(together):
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        full.add(Request(id=str(name), prompt=tuple(range(tokens)), params=params))
    full.step()
    stats = full.stats()
    assert (stats.num_running, stats.num_waiting) == (together, 0)
    assert stats.kv_bytes_used == stats.kv_bytes_total == together * each
    assert stats.pages_used == stats.pages_total
    assert sum(cache.nbytes for cache in full._runner._caches) == together * each
    assert engine(together * each - 1).stats().pages_total == stats.pages_total - 1


def test_v4_pages_hold_128_tokens_and_rings_are_taken_first() -> None:
    flash = Kept(config=deepseek_v4_flash(), dtype=torch.bfloat16)
    page, state = 128 * 6880, plan(flash, cache_bytes=10**9).state_bytes
    chosen = plan(flash, cache_bytes=3 * state + 5 * page)
    assert (chosen.page_size, chosen.num_pages, chosen.num_states, chosen.page_bytes) == (128, 5, 3, page)
    with pytest.raises(
        ConfigError, match=rf"the rings of 3 sequences take {3 * state} bytes .* {3 * state + page}, or"
    ):
        plan(flash, cache_bytes=3 * state + page - 1)
    with pytest.raises(ConfigError, match=r"page_size is 64: .* a multiple of 128"):
        plan(flash, cache_bytes=10**9, page_size=64)
    assert plan(flash, cache_bytes=10**9, page_size=256).page_size == 256


def test_a_short_context_still_gets_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**10)
    flash = Kept(config=deepseek_v4_flash(), dtype=torch.bfloat16)
    assert plan(flash, max_context=100).num_pages == 3
    assert plan(flash, max_context=129).num_pages == 6


def test_rings_in_use_count_as_used() -> None:
    engine = Engine(tiny("compressed"), max_batch=2)
    for name in "ab":
        engine.add(Request(id=name, prompt=(1, 2, 3), params=SamplingParams(max_tokens=9, ignore_eos=True)))
    engine.step()
    each = engine._plan.page_bytes + engine._plan.state_bytes
    assert engine.stats().kv_bytes_used == 2 * each
    engine.cancel("a")
    assert engine.stats().kv_bytes_used == each
