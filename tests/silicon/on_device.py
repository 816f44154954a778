"""What tests on the `npu` device of a process share."""

import torch

from daedal.infer.cache import PagedCache, page_multiple
from daedal.model.transformer import Transformer


def filled_cache(model: Transformer) -> PagedCache:
    """Of a few pages, filled with numbers as if tokens had been read."""
    size = max(page_multiple(model.config), 16)
    cache = PagedCache(model.config, num_pages=4, page_size=size, dtype=model.dtype, device=model.device, num_states=2)
    for pools in cache.pools.values():
        for pool in pools.values():
            pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(1)))
    return cache
