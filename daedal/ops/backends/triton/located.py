"""Rows as kernels find them: one tensor, and where each sequence's rows lie in it.

Side by side, on the pages of a cache, or in rings; the kernels' `row_offsets` reads the same three kinds. Knows no op.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from daedal.ops.backends.triton.launch import on_device, sent
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows

FLAT, PAGED, RING = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Located:
    """memory: the rows, whose last axis is dense. places: int32, each sequence's first row, pages or ring. Strides in
    numbers; table: from one sequence's pages to the next one's; head: 0 where all heads share a row.
    """

    memory: Tensor
    kind: int
    places: Tensor
    page_size: int
    page: int
    row: int
    head: int
    table: int

    @classmethod
    def of(cls, rows: Rows | RingRows, device: torch.device) -> "Located":
        if isinstance(rows, FlatRows):
            memory = dense_last(rows.rows)
            head = memory.stride(1) if memory.dim() == 3 else 0
            return cls(memory, FLAT, on_device(rows.starts, device), 1, 0, memory.stride(0), head, 0)
        memory = dense_last(rows.pool)
        head = memory.stride(2) if memory.dim() == 4 else 0
        kind, table = RING, 0
        if isinstance(rows, PagedRows):
            kind, places = PAGED, page_table(rows.pages, device)
            table = places.stride(0)
        else:
            places = on_device(tuple(rows.states), device)
        return cls(memory, kind, places, memory.shape[1], memory.stride(0), memory.stride(1), head, table)

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.memory.shape[-2] if self.head else 1


@lru_cache(maxsize=8)
def page_table(pages: Pages, device: torch.device) -> Tensor:
    """int32 [B, P], copied once for all layers of a step."""
    return sent(pages.table_BP, device)


def dense_last(memory: Tensor) -> Tensor:
    return memory if memory.stride(-1) == 1 else memory.contiguous()
