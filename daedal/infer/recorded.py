"""Decode steps recorded once and replayed: the model's forward pass as one native call.

A step in which each of B sequences brings one token does the same things every time, on other numbers. Its first
occurrence for a B runs the model as it is written, on memory that stays, and records the native calls; later ones fill
in tokens, positions and pages and run them all at once, with no Python between. What a model does that cannot be
recorded is named in `refusal`, and its steps run op by op.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from daedal import ops
from daedal.infer.cache import PagedCache, PagedView, Places
from daedal.infer.scheduler import Chunk
from daedal.model.batch import RaggedBatch
from daedal.ops.rings import Lasting
from daedal.ops.rows import MovingPages, Unrecordable

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer

Array = np.ndarray[Any, np.dtype[Any]]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _MovingBatch(RaggedBatch):
    """The batch of a recorded step. firsts: `group_starts` by rate."""

    firsts: Mapping[int, Tensor]

    def group_starts(self, rate: int) -> Tensor:
        return self.firsts[rate]


def _rows_of(rate: int, chunk: Chunk) -> int:
    """Rows of `rate` tokens that there are once the chunk's token is read."""
    return (chunk.past + 1) // rate


def _group_start(rate: int, chunk: Chunk) -> int:
    return chunk.past - chunk.past % rate


class _Recorded:
    """One program and the memory of its inputs and of its result."""

    def __init__(self, model: "Transformer", cache: PagedCache, chunks: Sequence[Chunk], max_pages: int):
        count = len(chunks)
        self._page_size = cache.page_size
        self._ids_T, self._positions_T, self._written_T = torch.zeros((3, count), dtype=torch.int64)
        self._pasts = Lasting.of([chunk.past for chunk in chunks])
        self._states = Lasting.of([chunk.state for chunk in chunks])
        self._table_BP = torch.zeros((count, max_pages), dtype=torch.int32)
        self._lengths = {rate: torch.zeros(count, dtype=torch.int32) for rate in cache.rates}
        self._firsts = {rate: torch.zeros(count, dtype=torch.int64) for rate in cache.rates if rate > 1}
        self._tables: list[tuple[int, ...]] = [()] * count
        self._filled, self._pages = self._numbers(), self._table_BP.numpy()
        self._fill(chunks)
        batch = _MovingBatch(
            ids_T=self._ids_T,
            positions_T=self._positions_T,
            starts=tuple(range(count + 1)),
            pasts=self._pasts,
            firsts=self._firsts,
        )
        places = Places(
            starts=batch.starts,
            pasts=self._pasts,
            states=self._states,
            written_T=self._written_T,
            pages={
                rate: MovingPages(self._table_BP, lengths_B, cache.page_size // rate)
                for rate, lengths_B in self._lengths.items()
            },
        )
        self._program = ops.Program()
        with ops.trace(self._program, self._inputs()):
            self.logits_BV: Tensor = model(batch, PagedView(cache=cache, places=places))

    def replay(self, chunks: Sequence[Chunk]) -> Tensor:
        self._fill(chunks)
        self._program.replay()
        return self.logits_BV

    def _inputs(self) -> list[Tensor]:
        """What differs from step to step."""
        tokens = [self._ids_T, self._positions_T, self._written_T, *self._firsts.values()]
        return [*tokens, self._pasts.tensor, self._states.tensor, self._table_BP, *self._lengths.values()]

    def _numbers(self) -> list[tuple[Array, Callable[[Chunk], int]]]:
        """The inputs that hold one number for each sequence, as NumPy sees their memory, and what that number is: a
        write through torch costs more than all the rest.
        """
        size = self._page_size
        filled: list[tuple[Tensor, Callable[[Chunk], int]]] = [
            (self._ids_T, lambda chunk: chunk.fed[0]),
            (self._positions_T, lambda chunk: chunk.past),
            (self._written_T, lambda chunk: chunk.table[chunk.past // size] * size + chunk.past % size),
            (self._pasts.tensor, lambda chunk: chunk.past),
            (self._states.tensor, lambda chunk: chunk.state),
        ]
        for rate, lengths_B in self._lengths.items():
            filled.append((lengths_B, partial(_rows_of, rate)))
        for rate, firsts_T in self._firsts.items():
            filled.append((firsts_T, partial(_group_start, rate)))
        return [(tensor.numpy(), number) for tensor, number in filled]

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        for array, number in self._filled:
            array[:] = [number(chunk) for chunk in chunks]
        for row, chunk in enumerate(chunks):
            if chunk.table != self._tables[row]:
                self._tables[row] = chunk.table
                self._pages[row, : len(chunk.table)] = chunk.table
