"""Decode steps recorded once and replayed: the model's forward pass as one native call.

A step in which each of B sequences brings one token does the same things every time, on other numbers. Its first
occurrence for a B runs the model as it is written, on memory that stays, and records the native calls; later ones fill
in tokens, positions and pages and run them all at once, with no Python between. What a model does that cannot be
recorded is named in `refusal`, and its steps run op by op.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daedal import ops
from daedal.infer.cache import PagedCache
from daedal.infer.scheduler import Chunk
from daedal.model.batch import RaggedBatch
from daedal.ops.rows import MovingPages, PagedRows, Rows, Unrecordable

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer


class RecordedSteps:
    """Decode steps of `model` on `cache`, in which a sequence has at most `max_pages` pages."""

    def __init__(self, model: "Transformer", cache: PagedCache, *, max_pages: int):
        self._model = model
        self._cache = cache
        self._max_pages = max_pages
        self._steps: dict[int, _Recorded] = {}
        self.refusal = None if model.device.type == "cpu" else f"native kernels run on the CPU, not on {model.device}"

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """logits_BV in float32, overwritten by the next step; None where the step is none of this kind."""
        # The first token of a sequence may take another form of attention than all later ones.
        if self.refusal is not None or any(len(chunk.fed) != 1 or not chunk.past for chunk in chunks):
            return None
        if ops.unrecordable() is not None:
            return None
        recorded = self._steps.get(len(chunks))
        if recorded is not None:
            return recorded.replay(chunks)
        try:
            recorded = _Recorded(self._model, self._cache, chunks, self._max_pages)
        except Unrecordable as reason:
            self.refusal = str(reason)
            return None
        self._steps[len(chunks)] = recorded
        return recorded.logits_BV


class _Recorded:
    """One program and the memory of its inputs and of its result."""

    def __init__(self, model: "Transformer", cache: PagedCache, chunks: Sequence[Chunk], max_pages: int):
        count = len(chunks)
        self._page_size = cache.page_size
        self._ids_T, self._positions_T, self._written_T = torch.zeros((3, count), dtype=torch.int64)
        self._table_BP = torch.zeros((count, max_pages), dtype=torch.int32)
        self._lengths_B = torch.zeros(count, dtype=torch.int32)
        self._tables: list[tuple[int, ...]] = [()] * count
        self._fill(chunks)
        batch = RaggedBatch(
            ids_T=self._ids_T,
            positions_T=self._positions_T,
            starts=tuple(range(count + 1)),
            pasts=tuple(chunk.past for chunk in chunks),
        )
        pages = MovingPages(self._table_BP, self._lengths_B, cache.page_size)
        inputs = [self._ids_T, self._positions_T, self._written_T, self._table_BP, self._lengths_B]
        self._program = ops.Program()
        with ops.trace(self._program, inputs):
            self.logits_BV: Tensor = model(batch, _MovingView(cache, self._written_T, pages))

    def replay(self, chunks: Sequence[Chunk]) -> Tensor:
        self._fill(chunks)
        self._program.replay()
        return self.logits_BV

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        size = self._page_size
        pasts = [chunk.past for chunk in chunks]
        # NumPy's views of the same memory: a write through torch costs more than the rest of this.
        self._ids_T.numpy()[:] = [chunk.fed[0] for chunk in chunks]
        self._positions_T.numpy()[:] = pasts
        self._written_T.numpy()[:] = [chunk.table[chunk.past // size] * size + chunk.past % size for chunk in chunks]
        self._lengths_B.numpy()[:] = [past + 1 for past in pasts]
        for row, chunk in enumerate(chunks):
            if chunk.table != self._tables[row]:
                self._tables[row] = chunk.table
                self._table_BP.numpy()[row, : len(chunk.table)] = chunk.table


class _MovingView:
    """The `CacheView` of a recorded step."""

    def __init__(self, cache: PagedCache, written_T: Tensor, pages: MovingPages):
        self._cache, self._written_T, self._pages = cache, written_T, pages

    def extend(self, layer: int, *, rate: int = 1, **slots: Tensor) -> Mapping[str, Rows]:
        return {name: self._extend(layer, name, rows) for name, rows in slots.items()}

    def _extend(self, layer: int, name: str, rows: Tensor) -> Rows:
        slot, pool = self._cache.slots[layer, name], self._cache.pools[layer][name]
        if slot.ring or slot.rate != 1:
            raise Unrecordable(f"rows of {name!r} lie in a ring or stand for several tokens")
        pool.flatten(0, 1).index_copy_(0, self._written_T, rows.to(pool.dtype))
        return PagedRows(pool, self._pages)
