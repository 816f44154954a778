"""Native attention against the reference in float64: every instruction set present, pages in any order with NaN in rows
that nobody wrote, ragged batches. The same bits for any number of threads, any batch, and a step that is replayed."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.errors import BackendError
from daedal.ops.backends.cpu import attention as backend
from daedal.ops.backends.cpu import program
from daedal.ops.rows import FlatRows, PagedRows, Pages, Rows
from tests.native import needs_kernels

pytestmark = needs_kernels

# What rounding the result and the weights to the type costs, relative to the largest value; float32 sums up to 1000
# products.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


@dataclass(frozen=True)
class Form:
    """Heads, key heads (0: one shared row, whose first `value` numbers are the value), widths, page size."""

    heads: int
    groups: int
    key: int
    value: int
    page: int = 16


LATENT = Form(12, 0, 288, 256)
WIDE_LATENT = Form(40, 0, 576, 512)
GROUPED = Form(9, 3, 64, 64)
NAIVE = Form(4, 4, 96, 64)
ODD = Form(6, 2, 33, 21, page=5)
TINY_PAGES = Form(3, 0, 32, 17, page=1)
HALF_COLUMNS = Form(2, 1, 64, 96, page=24)
FORMS = (LATENT, WIDE_LATENT, GROUPED, NAIVE, ODD, TINY_PAGES, HALF_COLUMNS)


def _starts(counts: list[int]) -> tuple[int, ...]:
    return tuple(torch.tensor([0, *counts]).cumsum(0).tolist())


def _pages(lengths: list[int], size: int, spare: int = 0) -> Pages:
    """Tables that share one pool, in random order; `spare` more pages than a sequence needs."""
    counts = [-(-length // size) + spare for length in lengths]
    order = iter(torch.randperm(sum(counts) + 2).tolist())
    return Pages(tuple(tuple(next(order) for _ in range(count)) for count in counts), tuple(lengths), size)


def _pool(pages: Pages, shape: tuple[int, ...], dtype: torch.dtype) -> PagedRows:
    """Rows of every sequence; NaN everywhere else."""
    num_pages = sum(map(len, pages.tables)) + 2
    pool = torch.full((num_pages, pages.page_size, *shape), float("nan"), dtype=dtype)
    for rows in pages.positions:
        pool.flatten(0, 1)[rows] = torch.randn(len(rows), *shape).to(dtype)
    return PagedRows(pool, pages)


def _rows(form: Form, lengths: list[int], dtype: torch.dtype) -> tuple[PagedRows, PagedRows | int]:
    pages = _pages(lengths, form.page)
    if not form.groups:
        return _pool(pages, (form.key,), dtype), form.value
    return _pool(pages, (form.groups, form.key), dtype), _pool(pages, (form.groups, form.value), dtype)


def _wide(rows: Rows | int) -> Rows | int:
    if isinstance(rows, int):
        return rows
    if isinstance(rows, FlatRows):
        return FlatRows(rows.rows.double(), rows.starts)
    return PagedRows(rows.pool.double(), rows.pages)


def _native(q: Tensor, starts: tuple[int, ...], keys: Rows, values: Rows | int, scale: float) -> Tensor:
    with ops.using("cpu"):
        return ops.attention(q, starts, keys, values, scale=scale)


def _check(q: Tensor, counts: list[int], keys: Rows, values: Rows | int) -> None:
    scale, starts = 1.5 * q.shape[-1] ** -0.5, _starts(counts)
    result = _native(q, starts, keys, values, scale)
    with ops.using("reference"):
        expected = ops.attention(q.double(), starts, _wide(keys), _wide(values), scale=scale)
    assert result.dtype == q.dtype
    assert result.shape == expected.shape
    bound = TOLERANCE[q.dtype] * (float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ragged_batches_on_pages(form: Form, dtype: torch.dtype, level: str) -> None:
    for counts, lengths in (([1, 1, 1], [1, 15, 300]), ([3, 0, 20, 16], [17, 4, 150, 16])):
        keys, values = _rows(form, lengths, dtype)
        _check(torch.randn(sum(counts), form.heads, form.key).to(dtype), counts, keys, values)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300, 1000])
@pytest.mark.parametrize("form", [LATENT, GROUPED], ids=str)
def test_one_query_for_each_length(form: Form, length: int, level: str) -> None:
    keys, values = _rows(form, [length], torch.bfloat16)
    _check(torch.randn(1, form.heads, form.key).bfloat16(), [1], keys, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prompts_side_by_side(dtype: torch.dtype, level: str) -> None:
    counts, ends = [200, 0, 33], _starts([200, 3, 333])
    keys = FlatRows(torch.randn(ends[-1], 4, 96).to(dtype), ends)
    # A part of a wider tensor, as projections that are split give it.
    values = FlatRows(torch.randn(ends[-1], 4, 100).to(dtype)[..., 20:84], ends)
    q = torch.randn(233, 4, 128).to(dtype)[..., :96]
    _check(q, counts, keys, values)
    _check(q.transpose(0, 1).contiguous().transpose(0, 1), counts, keys, values)


def test_no_tokens_and_no_sequences(level: str) -> None:
    keys, values = _rows(GROUPED, [4, 5], torch.bfloat16)
    assert _native(torch.randn(0, 9, 64).bfloat16(), (0, 0, 0), keys, values, 0.1).shape == (0, 9, 64)
    empty = FlatRows(torch.empty(0, 3, 64), (0,))
    assert _native(torch.randn(0, 9, 64), (0,), empty, empty, 0.1).shape == (0, 9, 64)


def test_large_scores_and_hidden_ones(level: str) -> None:
    """Maxima that grow along the keys, far apart: nothing overflows, and what is hidden stays so."""
    keys, values = _rows(GROUPED, [700], torch.float32)
    assert isinstance(values, PagedRows)
    rows = keys.pages.positions[0]
    keys.pool.flatten(0, 1)[rows] *= torch.linspace(0.1, 40, 700)[:, None, None]
    _check(torch.randn(40, 9, 64), [40], keys, values)


@pytest.mark.parametrize("form", [LATENT, WIDE_LATENT, GROUPED], ids=str)
def test_threads_and_batch_change_no_bit(form: Form, level: str) -> None:
    """Sequences that are cut into several chunks, and shared by two and three threads at places that differ."""
    counts, lengths = [1, 70, 1, 2], [900, 640, 1500, 130]
    keys, values = _rows(form, lengths, torch.bfloat16)
    q = torch.randn(sum(counts), form.heads, form.key).bfloat16()
    starts, results = _starts(counts), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(_native(q, starts, keys, values, 0.1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for index, count in enumerate(counts):
        alone = [rows if isinstance(rows, int) else rows.select([index]) for rows in (keys, values)]
        one = _native(q[starts[index] : starts[index + 1]], (0, count), *alone, 0.1)
        assert torch.equal(one, results[0][starts[index] : starts[index + 1]])


@pytest.mark.parametrize("form", [LATENT, GROUPED], ids=str)
def test_a_replayed_step_reads_lengths_tables_and_rows_anew(form: Form, level: str) -> None:
    torch.set_num_threads(2)
    pages = _pages([40, 300], form.page, spare=60)
    shape = (form.groups, form.key) if form.groups else (form.key,)
    keys = _pool(pages, shape, torch.bfloat16)
    values = _pool(pages, (form.groups, form.value), torch.bfloat16) if form.groups else form.value
    q = torch.randn(2, form.heads, form.key).bfloat16()
    recorded = program.Program()
    with program.recording(recorded):
        result = _native(q, (0, 1, 2), keys, values, 0.1)
    before = result.clone()
    recorded.replay()
    assert torch.equal(result, before)
    later = Pages(tuple(tuple(reversed(table)) for table in pages.tables), (1000, 17), form.page)
    fresh_keys = _pool(later, shape, torch.bfloat16)
    keys.pool.copy_(fresh_keys.pool)
    fresh_values = values
    if isinstance(values, PagedRows):
        fresh_values = _pool(later, (form.groups, form.value), torch.bfloat16)
        values.pool.copy_(fresh_values.pool)
    pages.table_BP.copy_(later.table_BP)
    pages.lengths_B.copy_(later.lengths_B)
    q.copy_(torch.randn(2, form.heads, form.key))
    recorded.replay()
    assert torch.equal(result, _native(q, (0, 1, 2), fresh_keys, fresh_values, 0.1))


def test_what_it_declines() -> None:
    keys, values = _rows(GROUPED, [4], torch.float32)
    q = torch.randn(1, 9, 64)
    reasons = {
        "float64": (q.double(), _wide(keys), _wide(values)),
        "gradients": (q.clone().requires_grad_(), keys, values),
        "keys are torch.bfloat16": (q, PagedRows(keys.pool.bfloat16(), keys.pages), values),
        "not dense": (q, PagedRows(keys.pool.transpose(2, 3), keys.pages), values),
    }
    for reason, (query, k, v) in reasons.items():
        with ops.using(backend.BACKEND), pytest.raises(BackendError, match=reason):
            ops.attention(query, (0, 1), k, v, scale=0.1)
    with ops.using(backend.BACKEND), pytest.raises(BackendError, match="scale"):
        ops.attention(q, (0, 1), keys, values, scale=0.0)
