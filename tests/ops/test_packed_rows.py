"""Packed rows: what packing keeps and loses, kernels that store and read them at every instruction set, against the
reference on the same bytes."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.errors import BackendError
from daedal.ops.packed_rows import GROUP, PackedRows
from daedal.ops.rings import RingRows
from daedal.ops.rows import FlatRows, PagedRows, Pages
from tests.native import needs_kernels

# Model (a), V3, V4; short groups, no exact part, widths that no vector divides.
FORMS = [(256, 32), (512, 64), (448, 64), (24, 8), (13, 7), (65, 3), (128, 0)]


def _rows(count: int, dim: int) -> Tensor:
    """float32 of every magnitude: some rows empty, tiny, huge, or with numbers far apart."""
    rows = torch.randn(count, dim) * torch.exp2(torch.randint(-40, 40, (count, 1)).float())
    rows[0], rows[1], rows[2] = 0.0, rows[1].sign() * 1e-40, rows[2].sign() * 3e38
    rows[3] *= torch.linspace(0, 1, dim) ** 8
    return rows


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_comes_back_is_near_and_the_exact_part_is_bfloat16(form: tuple[int, int]) -> None:
    packed = PackedRows(*form, dtype=torch.float32)
    rows = _rows(40, packed.dim)
    held = packed.pack(rows)
    assert held.dtype == torch.uint8
    assert held.shape == (40, packed.nbytes)
    assert packed.nbytes % 2 == 0
    back = packed.unpack(held)
    assert torch.equal(back[:, packed.width :], rows[:, packed.width :].bfloat16().float())
    assert torch.equal(PackedRows(*form).unpack(held).float(), back)  # exact in bfloat16
    for start in range(0, packed.width, GROUP):
        group, got = (part[:, start : min(start + GROUP, packed.width)].double() for part in (rows, back))
        # Half of the last bit of four; below a group's scale times 2^-6 half of a fixed step.
        scale = torch.exp2(torch.ceil(torch.log2(group.abs().amax(1, keepdim=True).clamp_min(1e-300) / 448)))
        least = scale.clamp_min(2.0**-117) * 2.0**-10
        assert bool(((got - group).abs() <= torch.maximum(group.abs() * 2.0**-4, least)).all())
        assert torch.equal(packed.unpack(packed.pack(back)), back)


def test_model_a_takes_56_percent() -> None:
    packed = PackedRows(256, 32)
    assert packed.nbytes == 324
    assert packed.nbytes / (packed.dim * 2) == 0.5625


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_group_nan(bad: float) -> None:
    packed = PackedRows(128, 8)
    row = torch.randn(136)
    row[70], row[135] = bad, bad
    back = packed.unpack(packed.pack(row)).float()
    assert not bool(back[:64].isnan().any())
    assert bool(back[64:128].isnan().all())
    torch.testing.assert_close(back[128:], row[128:].bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    poison = torch.full((packed.nbytes,), 255, dtype=torch.uint8)
    assert bool(packed.unpack(poison).isnan().all())


def _pages(lengths: list[int], size: int) -> Pages:
    counts = [-(-length // size) for length in lengths]
    order = iter(torch.randperm(sum(counts) + 2).tolist())
    return Pages(tuple(tuple(next(order) for _ in range(count)) for count in counts), tuple(lengths), size)


def _kept(pages: Pages, packed: PackedRows) -> PagedRows:
    """Random rows of every sequence, NaN everywhere else."""
    count = sum(map(len, pages.tables)) + 2
    kept = PagedRows(torch.full((count, pages.page_size, packed.nbytes), 255, dtype=torch.uint8), pages, packed)
    for rows_S in pages.positions:
        with ops.using("reference"):
            rows = torch.randn(len(rows_S), packed.dim)
            rows[:, ::9] *= 0.01  # codes below the normal ones
            ops.keep_on_pages(rows, rows_S, kept)
    return kept


def _starts(counts: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_kernels_store_the_same_bytes(form: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    packed = PackedRows(*form)
    rows = _rows(23, packed.dim).to(dtype)
    if dtype == torch.bfloat16:
        rows[5, 0] = float("nan")
    places, found = torch.randperm(40)[:23], []
    for backend in ("cpu", "reference"):
        pool = torch.full((8, 5, packed.nbytes), 255, dtype=torch.uint8)
        with ops.using(backend):
            ops.keep_on_pages(rows, places, PagedRows(pool, Pages(((0,),), (0,), 5), packed))
        found.append(pool.flatten(0, 1))
    finite = [row for row in range(23) if row != 5]
    assert torch.equal(*(pool[places[finite]] for pool in found))
    spare = torch.ones(40, dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(*(pool[spare] for pool in found))
    numbers = [packed.unpack(pool) for pool in found]
    torch.testing.assert_close(*numbers, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_reads_what_the_bytes_stand_for(form: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    """One token each, and chunks of prompts, on scattered pages; one and two threads give the same bits."""
    packed = PackedRows(*form, dtype=dtype)
    for counts, lengths, page in (([1, 1, 1], [1, 37, 300], 16), ([5, 0, 33], [17, 4, 150], 5)):
        kept = _kept(_pages(lengths, page), packed)
        q = torch.randn(sum(counts), 7, packed.dim).to(dtype)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ops.using("cpu"):
                results.append(ops.attention(q, _starts(counts), kept, packed.width, scale=packed.dim**-0.5))
        assert torch.equal(*results)
        wide = FlatRows(kept.flatten().rows.double(), kept.flatten().starts)
        with ops.using("reference"):
            exact = ops.attention(q.double(), _starts(counts), wide, packed.width, scale=packed.dim**-0.5)
        _near(results[0], exact)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sparse_attention_reads_packed_entries_beside_a_plain_window(
    form: tuple[int, int], dtype: torch.dtype, level: str
) -> None:
    packed, span, rate = PackedRows(*form, dtype=dtype), 6, 4
    counts, pasts = [3, 1, 1], [2, 90, 700]
    totals = [past + count for past, count in zip(pasts, counts, strict=True)]
    kept = _kept(_pages([total // rate for total in totals], 4), packed)
    ring = torch.randn(3, span + 8, packed.dim).to(dtype)
    window = RingRows(ring, (2, 0, 1), tuple(totals), tuple(min(total, span + 2) for total in totals))
    q = torch.randn(sum(counts), 9, packed.dim).to(dtype)
    chosen_TA = torch.full((sum(counts), 12), -1)
    for row, seen in enumerate((0, 1, 1, 22, 175)):
        some = torch.randperm(seen)[:10]
        chosen_TA[row, : len(some)] = some
    wide = FlatRows(kept.flatten().rows.double(), kept.flatten().starts)
    seen_before = RingRows(ring.double(), window.states, window.totals, window.lengths)
    settings = {"value_dim": packed.dim, "scale": packed.dim**-0.5, "rate": rate, "span": span}
    for chosen in (None, chosen_TA):
        for sides in ((None, None), (window, seen_before)):
            place = _starts(counts), tuple(pasts)
            with ops.using("cpu"):
                got = ops.sparse_attention(q, *place, kept, chosen, sides[0], None, **settings)
            with ops.using("reference"):
                exact = ops.sparse_attention(q.double(), *place, wide, chosen, sides[1], None, **settings)
            _near(got, exact)


def _near(got: Tensor, exact: Tensor) -> None:
    tolerance = 1e-2 if got.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@needs_kernels
def test_what_kernels_decline() -> None:
    kept = _kept(_pages([9], 4), PackedRows(24, 8, torch.float32))
    q = torch.randn(1, 2, 32)
    with ops.using("cpu"), pytest.raises(BackendError, match="first numbers are the values"):
        ops.attention(q, (0, 1), kept, kept, scale=0.1)
    with ops.using("cpu"), pytest.raises(BackendError, match=r"not torch\.float64"):
        ops.keep_on_pages(q[0].double(), torch.arange(2), kept)
