"""How many pages the cache gets. Sizes only: it allocates nothing and knows no requests."""

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn, get_args

import torch

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.infer.cache import KvDtype, can_pack, page_multiple, page_nbytes, state_nbytes

_PAGE_SIZE = 16
FREE_MEMORY_SHARE = 0.5
_KEPT_RINGS_SHARE = 0.1  # of what is left for pages
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # names and numbers of malloc.h


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A model whose rows the cache keeps in `dtype`; drafting: those of its drafting modules too."""

    config: ModelConfig
    dtype: torch.dtype
    drafting: bool = False


@dataclass(frozen=True, kw_only=True)
class PagePlan:
    """num_pages pages of page_size tokens; context: tokens of prompt and answer that a request may have.

    page_bytes: of one page, over all that is kept. state_bytes: of the rings of one running sequence; there are rings
    for `num_states`, of which the last `num_kept_states` are for copies that requests may start from. kv_dtype: as
    `PagedCache` has it.
    """

    num_pages: int
    page_size: int
    context: int
    page_bytes: int
    num_states: int
    state_bytes: int
    num_kept_states: int = 0
    kv_dtype: KvDtype = "auto"

    @property
    def nbytes(self) -> int:
        """What the caches allocate, exactly."""
        return self.held_bytes(self.num_pages, sequences=self.num_states)

    def request_bytes(self, num_tokens: int) -> int:
        """Bytes of one running request that keeps so many tokens: what `cost.cached` counts, on whole pages."""
        return self.held_bytes(-(-num_tokens // self.page_size))

    def held_bytes(self, num_pages: int, *, sequences: int = 1) -> int:
        """Bytes of running sequences that have so many pages together."""
        return num_pages * self.page_bytes + sequences * self.state_bytes


def plan_pages(
    kept: Sequence[Kept],
    *,
    device: torch.device,
    cache_bytes: int | None,
    max_batch: int,
    max_step_tokens: int,
    page_size: int | None,
    max_waiting: int | None,
    max_context: int | None,
    kv_dtype: KvDtype = "auto",
    keeps_prefixes: bool = False,
) -> PagePlan:
    """Checks an engine's sizes and settles those left open. kept: the model that serves, then any that drafts for it.

    Rings of `max_batch` sequences come first, the rest of `cache_bytes` becomes pages. With `keeps_prefixes` up to a
    tenth of that rest becomes more rings, where the models have any. Without `cache_bytes` the cache
    holds `max_batch` requests of the whole context, but takes at most half of the free memory. Without `page_size` a
    page has 16 tokens, fewer in a cache of under 1024, and where entries cover several tokens the least that holds
    whole ones: 128 in V4. kv_dtype "fp8" packs what it can of every cache, and the serving model's must have some.
    Raises ConfigError.
    """
    longest = kept[0].config.max_position_embeddings
    context = longest if max_context is None else max_context
    _check_at_least(
        ("max_batch", max_batch, 1),
        ("max_step_tokens", max_step_tokens, 1),
        ("page_size", 1 if page_size is None else page_size, 1),
        ("max_waiting", 0 if max_waiting is None else max_waiting, 0),
        ("max_context", context, 2),
    )
    if context > longest:
        raise ConfigError(f"max_context is {context}, the model's is {longest}: give at most that")
    _check_kv_dtype(kv_dtype, kept[0].config)
    unit = math.lcm(*(page_multiple(one.config) for one in kept))
    given_bytes = int(free_bytes(device) * FREE_MEMORY_SHARE) if cache_bytes is None else cache_bytes
    state_bytes = sum(state_nbytes(one.config, one.dtype, drafting=one.drafting) for one in kept)
    bytes_for_pages = given_bytes - max_batch * state_bytes
    num_kept = 0
    if keeps_prefixes and state_bytes:
        num_kept = _num_kept(bytes_for_pages - _page_bytes(kept, unit, kv_dtype), max_batch, state_bytes)
        bytes_for_pages -= num_kept * state_bytes
    if page_size is None:
        # Small caches get small pages: rounding to whole pages then costs one token in 64 at most.
        num_tokens = bytes_for_pages // _page_bytes(kept, unit, kv_dtype) * unit
        page_size = unit * max(min(_PAGE_SIZE, num_tokens // 64) // unit, 1)
    if page_size % unit:
        raise ConfigError(
            f"page_size is {page_size}: a page of this model must hold whole compressed entries, give a multiple of "
            f"{unit}"
        )
    page_bytes = _page_bytes(kept, page_size, kv_dtype)
    num_pages = bytes_for_pages // page_bytes
    if num_pages < 1:
        size = "half of the free memory" if cache_bytes is None else "cache_bytes"
        _refuse(f"{size} is {given_bytes}", page_bytes, max_batch, state_bytes)
    if cache_bytes is None:
        num_pages = min(num_pages, max_batch * -(-context // page_size))
    return PagePlan(
        num_pages=num_pages,
        page_size=page_size,
        context=context,
        page_bytes=page_bytes,
        num_states=max_batch + num_kept,
        state_bytes=state_bytes,
        num_kept_states=num_kept,
        kv_dtype=kv_dtype,
    )


def _num_kept(spare_bytes: int, max_batch: int, state_bytes: int) -> int:
    """Two for each request, where its prompt ended and where its answer has come to, if there is room."""
    return min(2 * max_batch, max(int(spare_bytes * _KEPT_RINGS_SHARE), 0) // state_bytes)


def _check_at_least(*given: tuple[str, int, int]) -> None:
    for name, value, least in given:
        if value < least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}")


def _check_kv_dtype(kv_dtype: KvDtype, config: ModelConfig) -> None:
    if kv_dtype not in get_args(KvDtype):
        raise ConfigError(f"kv_cache_dtype is {kv_dtype!r}: it may be {' or '.join(get_args(KvDtype))}")
    if kv_dtype == "fp8" and not can_pack(config):
        raise ConfigError(
            f"kv_cache_dtype fp8 packs the rows of latent attention, and {config.model_type} keeps keys and values of "
            "each head: use auto"
        )


def _page_bytes(kept: Sequence[Kept], page_size: int, kv_dtype: KvDtype) -> int:
    return sum(page_nbytes(one.config, page_size, one.dtype, drafting=one.drafting, kv_dtype=kv_dtype) for one in kept)


def _refuse(given: str, page_bytes: int, max_batch: int, state_bytes: int) -> NoReturn:
    page = f"one page of the cache takes {page_bytes} bytes"
    if not state_bytes:
        raise ConfigError(f"{given}, {page}: give at least that")
    rings = max_batch * state_bytes
    raise ConfigError(
        f"{given}, the rings of {max_batch} sequences take {rings} bytes and {page}: give at least "
        f"{rings + page_bytes}, or lower max_batch"
    )


@cache
def keep_freed_memory() -> bool:
    """Asks the C library, once per process, to keep memory that tensors give back; whether it can.

    glibc returns every large block to the system and asks for it again, page fault by page fault; at prefill sizes that
    costs more than some of the arithmetic. Up to 1 GiB then stays with the process. False on systems without `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = [mallopt(_M_MMAP_THRESHOLD, 2**25), mallopt(_M_TRIM_THRESHOLD, 2**30), mallopt(_M_TOP_PAD, 2**26)]
    return all(kept)


def free_bytes(device: torch.device) -> int:
    """Memory that could be had now: the accelerator's free memory, or the machine's.

    Where the system does not tell what is available (macOS), all its memory counts.
    """
    if device.type != "cpu":
        free: int = torch.accelerator.get_memory_info(device)[0]
        return free
    available = Path("/proc/meminfo")
    if available.exists():
        fields = dict(line.split(":", 1) for line in available.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
