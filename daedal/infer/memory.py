"""How many pages the cache gets. Sizes only: it allocates nothing and knows no requests."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.infer.cache import page_nbytes

_PAGE_SIZE = 16
_FREE_MEMORY_SHARE = 0.5
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # names and numbers of malloc.h


@dataclass(frozen=True, kw_only=True)
class PagePlan:
    """num_pages pages of page_size tokens; context: tokens of prompt and answer that a request may have."""

    num_pages: int
    page_size: int
    context: int


def plan_pages(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache_bytes: int | None,
    max_batch: int,
    max_step_tokens: int,
    page_size: int | None,
    max_waiting: int | None,
    max_context: int | None,
) -> PagePlan:
    """Checks an engine's sizes and settles those left open.

    Without `cache_bytes` the cache holds `max_batch` requests of the whole context, but takes at most half of the free
    memory. Without `page_size` a page has 16 tokens, fewer in a cache of under 1024. Raises ConfigError.
    """
    longest = config.max_position_embeddings
    context = longest if max_context is None else max_context
    for name, value, least in (
        ("max_batch", max_batch, 1),
        ("max_step_tokens", max_step_tokens, 1),
        ("page_size", 1 if page_size is None else page_size, 1),
        ("max_waiting", 0 if max_waiting is None else max_waiting, 0),
        ("max_context", context, 2),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}")
    if context > longest:
        raise ConfigError(f"max_context is {context}, the model's is {longest}: give at most that")
    given_bytes = int(free_bytes(device) * _FREE_MEMORY_SHARE) if cache_bytes is None else cache_bytes
    num_tokens = given_bytes // page_nbytes(config, 1, dtype)
    if cache_bytes is None:
        num_tokens = min(num_tokens, max_batch * context)
    if page_size is None:
        # Small caches get small pages: rounding to whole pages then costs one token in 64 at most.
        page_size = min(_PAGE_SIZE, max(num_tokens // 64, 1))
    num_pages = num_tokens // page_size
    if num_pages < 1:
        size = "half of the free memory" if cache_bytes is None else "cache_bytes"
        needed = page_nbytes(config, page_size, dtype)
        raise ConfigError(f"{size} is {given_bytes}, one page of the cache takes {needed} bytes: give at least that")
    return PagePlan(num_pages=num_pages, page_size=page_size, context=context)


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
