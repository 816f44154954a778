"""The sparse side of the Triton kernels: choosing entries, attention over entries and a window, and residual streams,
beside the reference in float64 (see tests/ops/test_triton.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import silicon
from daedal.ops.backends.triton.supports import BACKEND
from daedal.ops.registry import REFERENCE
from daedal.ops.rings import RingRows
from daedal.ops.rows import Rows
from tests.ops.triton_run import (
    DEVICE,
    beside_the_reference,
    boundaries,
    flat_rows,
    normal,
    only_with_triton,
    paged_rows,
    warned,
)

only_with_triton()
pytestmark = warned


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches and columns so small that every input needs many."""
    attention = pytest.importorskip("daedal.ops.backends.triton.attention")
    sparse = pytest.importorskip("daedal.ops.backends.triton.sparse")
    monkeypatch.setattr(attention, "LEAST_CHUNK", 8)
    monkeypatch.setattr(sparse, "COLUMNS", 16)


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Sizes of one call of `sparse_attention`. kept: rows of a window before the batch; ring: they lie in rings."""

    counts: list[int]
    pasts: list[int]
    rate: int = 1
    span: int = 0
    kept: int | None = None
    ring: bool = False
    entries: bool = True
    chosen: int | None = None
    sinks: bool = True
    heads: int = 5
    dim: int = 24
    value_dim: int = 16

    def run(self, dtype: torch.dtype, place: Callable[[list[Tensor]], Rows], *, exact: bool = False) -> Tensor:
        totals = [past + count for past, count in zip(self.pasts, self.counts, strict=True)]
        rows = [normal(total // self.rate, self.dim, seed=index).to(dtype) for index, total in enumerate(totals)]
        return ops.sparse_attention(
            normal(sum(self.counts), self.heads, self.dim, seed=7).to(dtype),
            boundaries(self.counts),
            tuple(self.pasts),
            place(rows) if self.entries else None,
            self._choice(),
            self._window(totals, dtype, ring=self.ring and not exact),
            normal(self.heads, seed=8) if self.sinks else None,
            value_dim=self.value_dim,
            scale=0.4,
            rate=self.rate,
            span=self.span,
        )

    def _choice(self) -> Tensor | None:
        """Some of the entries that each query sees, in no order, one that it does not see yet, and -1."""
        if self.chosen is None:
            return None
        generator, rows = torch.Generator().manual_seed(9), []
        for past, count in zip(self.pasts, self.counts, strict=True):
            for position in range(past, past + count):
                seen = (position + 1) // self.rate
                some = torch.randperm(seen, generator=generator)[: self.chosen - 1]
                row = torch.full((self.chosen,), -1)
                row[: some.shape[0]], row[some.shape[0]] = some, seen
                rows.append(row[torch.randperm(self.chosen, generator=generator)])
        return torch.stack(rows).to(DEVICE)

    def _window(self, totals: list[int], dtype: torch.dtype, *, ring: bool) -> Rows | RingRows | None:
        if self.kept is None:
            return None
        whole = [normal(total, self.dim, seed=20 + index).to(dtype) for index, total in enumerate(totals)]
        lengths = [min(total, self.kept + count) for total, count in zip(totals, self.counts, strict=True)]
        if not ring:
            return flat_rows([rows[len(rows) - length :] for rows, length in zip(whole, lengths, strict=True)])
        size, states = max(lengths), tuple(reversed(range(1, len(totals) + 1)))
        pool = torch.full((len(totals) + 2, size, self.dim), torch.nan, dtype=dtype, device=DEVICE)
        for rows, state in zip(whole, states, strict=True):
            for position in range(max(len(rows) - size, 0), len(rows)):
                pool[state, position % size] = rows[position]
        return RingRows(pool, states, tuple(totals), tuple(lengths))


SPARSE = [
    Sparse(counts=[4], pasts=[0], span=3, kept=2, entries=False),
    Sparse(counts=[3, 0, 1], pasts=[2, 9, 40], span=4, kept=9, rate=4, ring=True),
    Sparse(counts=[2, 1], pasts=[37, 3], span=100, kept=400, rate=8, sinks=False),
    Sparse(counts=[3, 1], pasts=[50, 30], span=5, kept=4, rate=2, chosen=9, heads=20, ring=True),
    Sparse(counts=[3, 1], pasts=[0, 40], chosen=5, sinks=False),
    Sparse(counts=[5], pasts=[0], rate=4, sinks=False),
]


@pytest.mark.parametrize(
    ("place", "dtype", "chip"), [(flat_rows, torch.float32, "this"), (paged_rows, torch.bfloat16, "h200")]
)
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_triton_attends_to_entries_and_a_window(
    case: Sparse, place: Callable[..., Rows], dtype: torch.dtype, chip: str, request: pytest.FixtureRequest
) -> None:
    if chip != "this":
        request.getfixturevalue("small")
    with silicon.assumed(silicon.read(chip)):
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        beside_the_reference(
            lambda: case.run(dtype, place), lambda: case.run(torch.float64, flat_rows, exact=True), tolerance
        )


def test_triton_gives_zero_to_a_query_that_sees_nothing() -> None:
    with torch.no_grad(), ops.using(BACKEND):
        got = SPARSE[-1].run(torch.float32, flat_rows)
    assert got[:3].abs().max() == 0
    assert got[3:].abs().min() > 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("place", [flat_rows, paged_rows])
@pytest.mark.parametrize(
    ("counts", "pasts", "count", "rate"),
    [([3, 1, 0], [0, 60, 21], 4, 1), ([2, 1], [70, 3], 7, 2), ([4], [0], 2, 4), ([0], [9], 3, 2)],
)
def test_triton_chooses_the_best_entries_and_the_lowest_of_equals(
    counts: list[int], pasts: list[int], count: int, rate: int, place: Callable[..., Rows]
) -> None:
    """Small whole numbers: ties are many, and every order of a sum gives the same."""
    generator = torch.Generator().manual_seed(5)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)

    totals = [past + new for past, new in zip(pasts, counts, strict=True)]
    q_TIK, weights_TI = whole(sum(counts), 3, 5), whole(sum(counts), 3)
    keys = [whole(total // rate, 5) for total in totals]
    starts, settings = boundaries(counts), {"count": count, "rate": rate}
    with ops.using(BACKEND):
        got = ops.choose_entries(q_TIK, weights_TI, starts, tuple(pasts), place(keys), **settings)
    with ops.using(REFERENCE):
        wanted = ops.choose_entries(q_TIK, weights_TI, starts, tuple(pasts), flat_rows(keys), **settings)
    assert got.dtype == torch.int64
    assert torch.equal(got, wanted)
    if totals[0] > 40:
        q_TIK[0] = torch.nan
        with ops.using(BACKEND):
            spoilt = ops.choose_entries(q_TIK, weights_TI, starts, tuple(pasts), place(keys), **settings)
        assert torch.equal(spoilt[1:], got[1:])
        assert len(set(spoilt[0].tolist())) == count
        assert 0 <= spoilt[0].min() <= spoilt[0].max() < (pasts[0] + 1) // rate


@pytest.mark.parametrize(("num_streams", "size"), [(4, 40), (3, 1100)])
def test_triton_mixes_streams(num_streams: int, size: int) -> None:
    streams = normal(3, num_streams, size)
    count, settings = (2 + num_streams) * num_streams, {"norm_eps": 1e-6, "eps": 1e-3}
    weights = normal(count, num_streams * size, seed=1) * 0.05, normal(count, seed=2), normal(3, seed=3)
    given, exact = ([tensor.to(dtype) for tensor in (streams, *weights)] for dtype in (torch.float32, torch.float64))

    def collapsed(tensors: list[Tensor]) -> Tensor:
        x, post, comb = ops.hyper_collapse(*tensors, **settings, iterations=5)
        expanded = ops.hyper_expand(x, tensors[0], post, comb)
        return torch.cat([part.flatten() for part in (x, post, comb, expanded)])

    def head(tensors: list[Tensor]) -> Tensor:
        streams, fn, base, scale = tensors
        return ops.hyper_head(streams, fn[:num_streams], base[:num_streams], scale[:1], **settings)

    for run in (collapsed, head):
        beside_the_reference(lambda run=run: run(given), lambda run=run: run(exact), 1e-4)
    with ops.using(BACKEND):
        none = ops.hyper_collapse(given[0][:0], *given[1:], **settings, iterations=5)
    assert [part.shape for part in none] == [(0, size), (0, num_streams), (0, num_streams, num_streams)]
