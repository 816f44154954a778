"""Decode steps recorded once and replayed: the model's forward pass as one native call.

A step in which each of B sequences brings one token does the same things every time, on other numbers. Its first
occurrence for a B runs the model as it is written, on memory that stays, and records the native calls; later ones fill
in tokens, positions and pages and run them all at once, with no Python between. What a model does that cannot be
recorded is named in `refusal`, and its steps run op by op.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from daedal import ops
from daedal.infer.cache import PagedCache, PagedView, Places
from daedal.infer.sampling import Logits
from daedal.infer.step import Chunk
from daedal.model.batch import RaggedBatch
from daedal.ops.rings import Lasting
from daedal.ops.rows import MovingPages, Unrecordable

if TYPE_CHECKING:
    from daedal.model.transformer import Transformer


class RecordedSteps:
    """Decode steps of `model` on `cache`, in which a sequence has at most `max_pages` pages."""

    def __init__(self, model: "Transformer", cache: PagedCache, *, max_pages: int):
        self._model = model
        self._cache = cache
        self._max_pages = max_pages
        self._steps: dict[int, RecordedStep] = {}
        self.refusal = model.refuses_recording
        if model.device.type != "cpu":
            self.refusal = f"native kernels run on the CPU, not on {model.device}"

    def find(self, chunks: Sequence[Chunk]) -> "RecordedStep | None":
        """What replays these chunks; None where no such step was recorded."""
        recorded = self._steps.get(len(chunks))
        return recorded if recorded is not None and self._takes(chunks) else None

    def record(self, chunks: Sequence[Chunk]) -> Logits | None:
        """The same for a step that was not; None where it is none of this kind."""
        if not self._takes(chunks):
            return None
        try:
            recorded = RecordedStep(self._model, self._cache, chunks, self._max_pages)
        except Unrecordable as reason:
            self.refusal = str(reason)
            return None
        self._steps[len(chunks)] = recorded
        return recorded.logits

    def _takes(self, chunks: Sequence[Chunk]) -> bool:
        # The first token of a sequence may take another form of attention than all later ones.
        return (
            self.refusal is None
            and all(len(chunk.fed) == 1 and chunk.past for chunk in chunks)
            and ops.unrecordable() is None
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _MovingBatch(RaggedBatch):
    """The batch of a recorded step. firsts: `group_starts` by rate."""

    firsts: Mapping[int, Tensor]

    def group_starts(self, rate: int) -> Tensor:
        return self.firsts[rate]


def _view(numbers: Tensor) -> memoryview:
    return numbers.numpy().data


class RecordedStep:
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
        self._pages = self._table_BP.numpy()
        self._ids, self._positions, self._written = map(_view, (self._ids_T, self._positions_T, self._written_T))
        self._told_pasts, self._told_states = _view(self._pasts.tensor), _view(self._states.tensor)
        # Rows of so many tokens that there are once the step's token is read, and where its own begins.
        self._told_lengths = [(rate, _view(lengths_B)) for rate, lengths_B in self._lengths.items()]
        self._told_firsts = [(rate, _view(firsts_T)) for rate, firsts_T in self._firsts.items()]
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
            logits_BV = model(batch, PagedView(cache=cache, places=places)).float()
            values_B, places_B = logits_BV.max(dim=-1)
        self.logits = Logits(logits_BV, peaks=(values_B, places_B))

    def replay(self, chunks: Sequence[Chunk]) -> Logits:
        """A row for each chunk, overwritten by the next step."""
        self._fill(chunks)
        self._program.replay()
        return self.logits

    def again(self, tokens: Sequence[int]) -> Logits:
        """The next step of the same sequences, whose tables stay."""
        for row, token in enumerate(tokens):
            self._place(row, token, self._positions[row] + 1, self._tables[row])
        self._program.replay()
        return self.logits

    def _inputs(self) -> list[Tensor]:
        """What differs from step to step."""
        tokens = [self._ids_T, self._positions_T, self._written_T, *self._firsts.values()]
        return [*tokens, self._pasts.tensor, self._states.tensor, self._table_BP, *self._lengths.values()]

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        """Through views of memory: a write through torch costs more than all the rest."""
        for row, chunk in enumerate(chunks):
            table = chunk.table
            self._place(row, chunk.fed[0], chunk.past, table)
            self._told_states[row] = chunk.state
            # The scheduler makes a new tuple when the pages change, and only then.
            if table is not self._tables[row]:
                self._tables[row] = table
                self._pages[row, : len(table)] = table

    def _place(self, row: int, token: int, past: int, table: tuple[int, ...]) -> None:
        """A sequence's token, which comes after so many others."""
        size = self._page_size
        self._ids[row] = token
        self._positions[row] = self._told_pasts[row] = past
        self._written[row] = table[past // size] * size + past % size
        for rate, lengths in self._told_lengths:
            lengths[row] = (past + 1) // rate
        for rate, firsts in self._told_firsts:
            firsts[row] = past - past % rate
