"""Small engines for tests, and what holds of them: poisoned memory, little room, equal outputs, nothing left behind."""

import torch
from torch import Tensor

from daedal.infer.cache import page_multiple, page_nbytes, state_nbytes
from daedal.infer.draft_lookup import LookupDrafter
from daedal.infer.draft_model import ModelDrafter
from daedal.infer.draft_mtp import MtpDrafter
from daedal.infer.engine import Engine, EngineStats
from daedal.infer.request import Output
from daedal.infer.runner import kept
from daedal.infer.speculative import Speculation
from daedal.model.transformer import Transformer
from tests.infer.models import near


class Digits:
    """Stands in for a tokenizer: the text of id n is `<n>`, id 0 (or another) ends a text."""

    def __init__(self, end: int = 0):
        self.eos_ids = frozenset({end})

    def detokenizer(self, *, skip_special_tokens: bool = True) -> "Digits":
        return self

    def push(self, token_id: int) -> str:
        return "" if token_id in self.eos_ids else f"<{token_id}>"

    def finish(self) -> str:
        return ""


def poisoned(engine: Engine) -> Engine:
    """The same engine, its cache filled with NaN: whatever reads a row that was not written, shows it."""
    for cache in engine._runner._caches:
        for pools in cache.pools.values():
            for pool in pools.values():
                poison(pool)
    return engine


def poison(pool: Tensor) -> None:
    """NaN throughout; packed rows of nothing but 255 are NaN too."""
    pool.fill_(255 if pool.dtype == torch.uint8 else torch.nan)


def fitting(model: Transformer, page_size: int) -> int:
    """A page size near the wanted one that the model can have."""
    multiple = page_multiple(model.config)
    return -(-page_size // multiple) * multiple


def paged(
    model: Transformer,
    num_tokens: int,
    *,
    max_batch: int = 16,
    speculate: Speculation | None = None,
    **sizes: int | None,
) -> Engine:
    """An engine whose cache has room for so many tokens, on small pages."""
    page_size = fitting(model, 4)
    models = kept(model, speculate)
    cache_bytes = sum(
        num_tokens // page_size * page_nbytes(one.config, page_size, one.dtype, drafting=one.drafting)
        + max_batch * state_nbytes(one.config, one.dtype, drafting=one.drafting)
        for one in models
    )
    engine = Engine(
        model, cache_bytes=cache_bytes, page_size=page_size, max_batch=max_batch, speculate=speculate, **sizes
    )
    return poisoned(engine)


def same(found: list[Output], expected: list[Output]) -> None:
    """Equal in everything but the last digits of numbers."""
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.text, one.finish_reason) == (other.ids, other.text, other.finish_reason)
        for name in ("logprobs", "prompt_logprobs"):
            entries = [
                (a and (a.id, [token for token, _ in a.top]), b and (b.id, [token for token, _ in b.top]))
                for a, b in zip(getattr(one, name) or [], getattr(other, name) or [], strict=True)
            ]
            assert all(a == b for a, b in entries)


def assert_idle(engine: Engine) -> None:
    """No request has left anything behind."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.pages_used, stats.kv_bytes_used) == (0, 0, 0, 0)
    assert not engine.has_work
    assert not engine._scheduler._sequences
    drafter = engine._runner._drafter
    if isinstance(drafter, LookupDrafter | ModelDrafter | MtpDrafter):
        assert not any(held for held in vars(drafter).values() if isinstance(held, dict))


def speculation(method: str, model: Transformer, draft_tokens: int = 4) -> Speculation:
    """Somebody to draft for `model`; a draft model is one that often agrees."""
    draft_model = near(model) if method == "model" else None
    return Speculation(method=method, draft_tokens=draft_tokens, draft_model=draft_model)


def check_acceptance(stats: EngineStats) -> None:
    """Some drafts were accepted and some not, and the counts fit together."""
    assert stats.num_accepted_total == sum(stats.num_accepted_at) < stats.num_drafted_total
    assert sorted(stats.num_accepted_at, reverse=True) == list(stats.num_accepted_at)
    assert stats.num_accepted_at[0] <= stats.num_drafts_total <= stats.num_drafted_total
