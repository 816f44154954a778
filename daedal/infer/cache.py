"""The paged cache: for every cache slot of the model one pool of pages, and a view of it for each step.

What is kept per token and layer is decided by `shapes.cache`; nothing else is allocated. The pools are not cleared:
rows that were never written may hold anything, and are never read. Does not know whose pages these are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from daedal import shapes
from daedal.config import ModelConfig
from daedal.ops.rows import PagedRows, Pages, Rows


def page_nbytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page of `page_size` tokens over all layers and slots, rows kept in `dtype`."""
    return page_size * dtype.itemsize * sum(slot.numel for slot in shapes.cache(config))


class PagedCache:
    """Pools of shape [P, N, *slot shape]: `num_pages` pages of `page_size` tokens, for every slot of every layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.page_size = page_size
        self._pools: dict[int, dict[str, Tensor]] = {}
        for slot in shapes.cache(config):
            assert slot.layer is not None
            pool = torch.empty((num_pages, page_size, *slot.shape), dtype=dtype, device=device)
            self._pools.setdefault(slot.layer, {})[slot.name] = pool

    @property
    def pools(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Layer to slot name to pool."""
        return self._pools

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools.values())

    def view(self, tables: Sequence[Sequence[int]], pasts: Sequence[int], counts: Sequence[int]) -> "PagedView":
        """The cache for one step: sequence i has `pasts[i]` tokens on the pages `tables[i]` and brings `counts[i]`."""
        slots: list[int] = []
        for table, past, count in zip(tables, pasts, counts, strict=True):
            assert past + count <= len(table) * self.page_size
            slots.extend(
                table[position // self.page_size] * self.page_size + position % self.page_size
                for position in range(past, past + count)
            )
        device = next(iter(next(iter(self._pools.values())).values())).device
        return PagedView(
            pools=self._pools,
            slots_T=torch.tensor(slots, dtype=torch.int64, device=device),
            pages=Pages(
                tables=tuple(tuple(table) for table in tables),
                lengths=tuple(past + count for past, count in zip(pasts, counts, strict=True)),
                page_size=self.page_size,
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedView:
    """One step's `CacheView`. slots_T: where each token's row lies, as an index into the P x N rows of a pool."""

    pools: Mapping[int, Mapping[str, Tensor]]
    slots_T: Tensor
    pages: Pages

    def append(self, layer: int, **slots: Tensor) -> None:
        """Stores this batch's rows, [T, *slot shape] each; all slots of the layer, in the cache's dtype."""
        pools = self.pools[layer]
        if slots.keys() != pools.keys():
            raise ValueError(f"layer {layer} stores {sorted(slots)}: the cache keeps {sorted(pools)}")
        for name, rows in slots.items():
            pool = pools[name]
            pool.flatten(0, 1).index_copy_(0, self.slots_T, rows.to(pool.dtype))

    def read(self, layer: int) -> Mapping[str, Rows]:
        """Everything stored so far, this batch's rows included: per slot name a `PagedRows`."""
        return {name: PagedRows(pool, self.pages) for name, pool in self.pools[layer].items()}
