"""Native kernels of V4's layers at every instruction set of this CPU: against the reference in float64 and against what
the model computes, the same bits for any number of threads and any batch, and steps that are replayed on new numbers.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.infer.cache import PagedCache
from daedal.model.attention_compressed import Pooling
from daedal.model.batch import RaggedBatch
from daedal.model.forward_pass import ForwardPass
from daedal.ops.backends.cpu import program
from daedal.ops.rings import Lasting, RingRows
from daedal.ops.rows import FlatRows, MovingPages, PagedRows, Pages, Unrecordable
from tests.native import needs_kernels, use_level
from tests.tiny import tiny_model

pytestmark = needs_kernels

TYPES = ((torch.float32, 2e-5), (torch.bfloat16, 1e-2))


def _starts(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))


def _few_bits(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def _flat(parts: Sequence[Tensor]) -> FlatRows:
    return FlatRows(torch.cat(list(parts)), _starts([part.shape[0] for part in parts]))


def _paged(parts: Sequence[Tensor], size: int) -> PagedRows:
    """On pages in random order, NaN where nothing was written."""
    counts = [-(-part.shape[0] // size) for part in parts]
    order = torch.randperm(sum(counts) + 2).tolist()
    tables = tuple(tuple(order[start:end]) for start, end in pairwise(_starts(counts)))
    pool = torch.full((len(order), size, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype)
    for table, part in zip(tables, parts, strict=True):
        for row, values in enumerate(part):
            pool[table[row // size], row % size] = values
    return PagedRows(pool, Pages(tables, tuple(part.shape[0] for part in parts), size))


def _natively(run: Callable[[], Tensor]) -> Tensor:
    """The result on native kernels, which two threads give as one does."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad(), ops.using("cpu"):
            results.append(run())
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    return results[0]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", [(5, 4, 24), (1, 2, 7), (3, 1, 40), (0, 4, 8), (19, 3, 5), (1, 4, 600)], ids=str)
def test_streams_are_mixed_as_the_reference_mixes_them(shape: tuple[int, int, int]) -> None:
    tokens, streams, dim = shape
    mixes = streams * (2 + streams)
    norm = {"norm_eps": 1e-6, "eps": 1e-3}
    streams_TMD, y_TD = _few_bits(*shape), _few_bits(tokens, dim, seed=1)
    weights = [_few_bits(mixes, streams * dim, seed=2) * 0.2, _few_bits(mixes, seed=3), _few_bits(3, seed=4)]
    settings = {**norm, "iterations": 20}
    with ops.using("reference"):
        exact = ops.hyper_collapse(streams_TMD.double(), *(weight.double() for weight in weights), **settings)
        after = ops.hyper_expand(y_TD.double(), streams_TMD.double(), *exact[1:])
    for dtype, tolerance in TYPES:
        given = streams_TMD.to(dtype)
        for part, wanted in enumerate(exact):
            got = _natively(lambda given=given, part=part: ops.hyper_collapse(given, *weights, **settings)[part])
            assert got.dtype == (dtype if part == 0 else torch.float32)
            torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
        inputs = weights[0][:streams], weights[1][:streams], weights[2][:1]
        got = _natively(lambda given=given, inputs=inputs: ops.hyper_head(given, *inputs, **norm))
        torch.testing.assert_close(got.double(), exact[0], rtol=tolerance, atol=tolerance)
        mixing = exact[1].float(), exact[2].float()
        got = _natively(lambda given=given, mixing=mixing: ops.hyper_expand(y_TD.to(given.dtype), given, *mixing))
        torch.testing.assert_close(got.double(), after, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("level")
def test_a_token_is_mixed_the_same_in_any_batch() -> None:
    streams_TMD = _few_bits(21, 4, 40).bfloat16()
    weights = [_few_bits(24, 160, seed=2), _few_bits(24, seed=3), _few_bits(3, seed=4)]

    def collapse(given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with ops.using("cpu"):
            return ops.hyper_collapse(given, *weights, norm_eps=1e-6, eps=1e-3, iterations=5)

    together = collapse(streams_TMD)
    for token in range(21):
        for alone, beside in zip(collapse(streams_TMD[token : token + 1]), together, strict=True):
            assert torch.equal(alone[0], beside[token])


# counts, pasts, heads, dim, value_dim, span, rate, chosen (None: all entries), sinks
ATTENTIONS = [
    ([3, 1, 0, 1], [0, 400, 9, 30], 33, 96, 64, 128, 4, 90, True),
    ([1, 2], [2100, 1000], 20, 32, 32, 100, 1, None, True),
    ([4], [1], 5, 37, 21, 3, 4, None, False),
    ([1, 1], [700, 5], 64, 128, 128, 16, 2, 12, True),
]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_reads_window_and_entries_wherever_they_lie(case: tuple) -> None:
    counts, pasts, heads, dim, value_dim, span, rate, chosen, sinks = case
    totals = [past + count for past, count in zip(pasts, counts, strict=True)]
    q_THK = _few_bits(sum(counts), heads, dim)
    entries = [_few_bits(total // rate, dim, seed=5 + i) for i, total in enumerate(totals)]
    rows = [_few_bits(total, dim, seed=50 + i) for i, total in enumerate(totals)]
    lasts = [part[-min(past, span - 1) - count :] for part, past, count in zip(rows, pasts, counts, strict=True)]
    chosen_TA = None if chosen is None else _some(counts, pasts, rate, chosen)
    sinks_H = _few_bits(heads, seed=3) if sinks else None
    settings = {"value_dim": value_dim, "scale": dim**-0.5, "rate": rate, "span": span}

    def attend(dtype: torch.dtype, kept: Callable, window: Callable) -> Tensor:
        given, read = [part.to(dtype) for part in entries], [part.to(dtype) for part in lasts]
        sinks = None if sinks_H is None else sinks_H.to(dtype)
        return ops.sparse_attention(
            q_THK.to(dtype), _starts(counts), tuple(pasts), kept(given), chosen_TA, window(read), sinks, **settings
        )

    def ring(parts: list[Tensor]) -> RingRows:
        size = span + 8
        pool = torch.full((len(parts) + 2, size, dim), torch.nan, dtype=parts[0].dtype)
        states = tuple(range(len(parts), 0, -1))
        for state, part, total in zip(states, parts, totals, strict=True):
            pool[state, torch.arange(total - part.shape[0], total) % size] = part
        return RingRows(pool, states, tuple(totals), tuple(part.shape[0] for part in parts))

    with ops.using("reference"):
        exact = attend(torch.float64, _flat, _flat)
    for dtype, tolerance in TYPES:
        got = [
            _natively(lambda dtype=dtype, kept=kept, window=window: attend(dtype, kept, window))
            for kept, window in ((_flat, _flat), (lambda parts: _paged(parts, 4), ring))
        ]
        torch.testing.assert_close(got[0].double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(got[0], got[1])
        with ops.using("reference"):
            again = attend(dtype, _flat, ring)
        torch.testing.assert_close(again.double(), exact, rtol=tolerance, atol=tolerance)


def _some(counts: list[int], pasts: list[int], rate: int, width: int) -> Tensor:
    """Entries that each query sees, in no order, -1 in between."""
    chosen = []
    for past, count in zip(pasts, counts, strict=True):
        for position in range(past, past + count):
            seen = torch.randperm((position + 1) // rate)[: width - 2]
            row = torch.cat((seen, torch.full((width - seen.shape[0],), -1)))
            chosen.append(row[torch.randperm(width)])
    return torch.stack(chosen)


# counts, pasts, heads, dim, count, rate
CHOICES = [
    ([9, 1, 0, 3], [0, 299, 21, 900], 3, 5, 4, 1),
    ([2, 1], [1500, 2600], 64, 128, 64, 1),
    ([6, 1], [3, 2200], 20, 64, 7, 4),
    ([5], [0], 2, 33, 100, 2),
]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_best_entries_are_chosen_among_many_ties(case: tuple) -> None:
    """Small integers: scores are exact in every arithmetic, and many are equal."""
    counts, pasts, heads, dim, count, rate = case
    starts, generator = _starts(counts), torch.Generator().manual_seed(1)
    q_TIK = torch.randint(-2, 3, (starts[-1], heads, dim), generator=generator).float()
    weights_TI = torch.randint(-2, 3, (starts[-1], heads), generator=generator).float()
    totals = [(past + new) // rate for past, new in zip(pasts, counts, strict=True)]
    keys = [torch.randint(-1, 2, (total, dim), generator=generator).float() for total in totals]
    with ops.using("reference"):
        wanted = ops.choose_entries(q_TIK, weights_TI, starts, tuple(pasts), _flat(keys), count=count, rate=rate)
    for dtype, _ in TYPES:
        parts = [part.to(dtype) for part in keys]
        for rows in (_flat(parts), _paged(parts, 3), _paged(parts, 32)):
            got = _natively(
                lambda dtype=dtype, rows=rows: ops.choose_entries(
                    q_TIK.to(dtype), weights_TI, starts, tuple(pasts), rows, count=count, rate=rate
                )
            )
            assert torch.equal(got, wanted)


@pytest.mark.usefixtures("level")
def test_sequences_do_not_see_one_another() -> None:
    """A batch gives each sequence, bit for bit, what it gets alone."""
    pasts, keys = (1500, 40, 700), [_few_bits(total + 1, 64, seed=total) for total in (1500, 40, 700)]
    q_THK, weights_TI, kept = _few_bits(3, 20, 64).bfloat16(), _few_bits(3, 20), [key.bfloat16() for key in keys]
    window = [key[-16:] for key in kept]

    def step(picked: list[int]) -> list[Tensor]:
        starts, past, rows = tuple(range(len(picked) + 1)), tuple(pasts[i] for i in picked), [kept[i] for i in picked]
        q, sides = q_THK[picked], _flat([window[i] for i in picked])
        chosen = ops.choose_entries(q, weights_TI[picked], starts, past, _paged(rows, 16), count=50, rate=1)
        settings = {"value_dim": 64, "scale": 0.1, "rate": 1, "span": 16}
        some = ops.sparse_attention(q, starts, past, _paged(rows, 16), chosen, sides, None, **settings)
        every = ops.sparse_attention(q, starts, past, _paged(rows, 16), None, sides, None, **settings)
        return [some, every]

    with ops.using("cpu"):
        together = step([0, 1, 2])
        for index in range(3):
            for alone, beside in zip(step([index]), together, strict=True):
                assert torch.equal(alone[0], beside[index])


@pytest.mark.parametrize("backend", ["reference", "aten", *program.LEVELS])
def test_groups_are_pooled_as_whole_sequences_are(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and single tokens of a ragged batch leave the entries that training computes, and rings of last rows."""
    if backend in program.LEVELS:
        use_level(backend)
    pool_groups, forced = ops.pool_groups, "cpu" if backend in program.LEVELS else backend

    def pool(*args: object, **kwargs: object) -> None:
        with ops.using(forced):
            pool_groups(*args, **kwargs)

    monkeypatch.setattr(ops, "pool_groups", pool)
    model, tables, states = tiny_model("deepseek_v4"), ((3, 0, 5), (4, 1, 2)), (2, 0)
    cache = PagedCache(model.config, num_pages=6, page_size=128, dtype=torch.float32, num_states=3)
    for pool in (pool for pools in cache.pools.values() for pool in pools.values()):
        pool.fill_(torch.nan)
    compressors = [layer.self_attn.compressor for layer in model.layers if layer.self_attn.compressor is not None]
    modules: list[Pooling] = [*compressors, *(one.indexer for one in compressors if one.indexer is not None)]
    pasts, fed = [0, 0], torch.randn(2, 300, model.config.hidden_size)
    with torch.no_grad():
        for counts in ([5, 126], [1, 1], [3, 0], [130, 1], *[[1, 1]] * 5):
            batch = RaggedBatch.of([[0] * count for count in counts], pasts)
            x_TD = torch.cat([x[past : past + count] for x, past, count in zip(fed, pasts, counts, strict=True)])
            for module in modules:
                module.pool(x_TD, ForwardPass(model.config, batch, cache.view(tables, pasts, counts, states)))
            pasts = [past + count for past, count in zip(pasts, counts, strict=True)]
    program.native().use(None)
    lasts = cache.view(tables, pasts, [0, 0], states)
    for module in modules:
        kept = lasts.groups(module.layer, module.ring, module.entries)
        assert int((~kept.entries.pool.isnan()).sum()) == sum(kept.entries.lengths) * module.dim
        for index, total in enumerate(pasts):
            whole = RaggedBatch.of([[0] * total])
            with torch.no_grad(), ops.using("reference"):
                wanted = module.pool(fed[index, :total], ForwardPass(model.config, whole, None)).sequence(0)
                gate_TW = module.gate_proj(fed[index, :total]) + module.position_bias[whole.positions_T % module.rate]
                rows = torch.stack((module.kv_proj(fed[index, :total]), gate_TW), 1)
            torch.testing.assert_close(kept.entries.sequence(index), wanted, rtol=2e-5, atol=2e-5)
            places = torch.arange(max(total - kept.ring.shape[1], 0), total)
            got = kept.ring[states[index], places % kept.ring.shape[1]]
            torch.testing.assert_close(got, rows[places], rtol=2e-5, atol=2e-5)
        assert kept.ring[1].isnan().all()


@pytest.mark.usefixtures("level")
def test_a_recorded_step_reads_positions_pages_and_rings_where_they_lie() -> None:
    """Choice, attention and rings replayed at a later position, of other sequences, on longer tables."""
    heads, dim, span, rate, size = 17, 32, 8, 4, 16
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(40, size, dim, generator=generator).bfloat16()
    ring = torch.randn(5, span + 8, dim, generator=generator).bfloat16()
    q_THK, new_TK = torch.zeros(2, heads, dim).bfloat16(), torch.zeros(2, dim).bfloat16()
    weights_TI = torch.rand(2, heads, generator=generator)
    pasts, states = Lasting.of((90, 3)), Lasting.of((1, 4))
    moving = MovingPages(torch.zeros(2, 20, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), size)

    def step(pages: Pages, pasts: tuple[int, ...], states: tuple[int, ...], ring: Tensor) -> Tensor:
        entries = PagedRows(pool, pages)
        ops.keep_in_ring(new_TK, (0, 1, 2), pasts, ring, states)
        chosen_TA = ops.choose_entries(q_THK, weights_TI, (0, 1, 2), pasts, entries, count=30, rate=rate)
        window = RingRows(ring, states, tuple(past + 1 for past in pasts), tuple(min(past + 1, span) for past in pasts))
        settings = {"value_dim": dim, "scale": 0.2, "rate": rate, "span": span}
        return ops.sparse_attention(q_THK, (0, 1, 2), pasts, entries, chosen_TA, window, None, **settings)

    def prepare(now: tuple[int, int], rings: tuple[int, int], tables: tuple[tuple[int, ...], ...]) -> Pages:
        lengths = tuple((past + 1) // rate for past in now)
        q_THK.copy_(torch.randn(2, heads, dim, generator=generator))
        new_TK.copy_(torch.randn(2, dim, generator=generator))
        pasts.tensor.copy_(torch.tensor(now))
        states.tensor.copy_(torch.tensor(rings))
        moving.lengths_B.copy_(torch.tensor(lengths))
        for row, table in enumerate(tables):
            moving.table_BP[row, : len(table)] = torch.tensor(table)
        return Pages(tables, lengths, size)

    recorded = program.Program()
    with ops.using("cpu"):
        prepare((90, 3), (1, 4), ((7, 2), (9,)))
        with program.recording(recorded):
            out_THK = step(moving, pasts, states, ring)
            with pytest.raises(Unrecordable):
                step(moving, (90, 3), states, ring)
        for now, rings, tables in (
            ((1100, 91), (4, 0), (tuple(range(20, 38)), (7, 2))),
            ((5, 640), (2, 3), ((1,), tuple(range(11)))),
        ):
            pages, before = prepare(now, rings, tables), ring.clone()
            recorded.replay()
            assert torch.equal(out_THK, step(pages, now, rings, before))
            assert torch.equal(ring, before)


def test_what_kernels_cannot_take_is_declined_in_words() -> None:
    none = FlatRows(torch.zeros(0, 8, dtype=torch.float64), (0,))
    rows = torch.zeros(0, 2, 8)
    for q_TIK, reason in (
        (rows.double(), "takes bfloat16 and float32"),
        (rows.bfloat16(), "takes rows in the queries'"),
        (torch.zeros(0, 200, 8), "at most 128 index heads"),
    ):
        choices = ops.explain("choose_entries", q_TIK, rows[:, :, 0], (0,), (), none, count=1, rate=1)
        assert any(choice.backend == "cpu" and reason in choice.reason for choice in choices)
    wanted, fn = torch.zeros(2, 1, 8, requires_grad=True), torch.zeros(3, 8)
    settings = {"norm_eps": 0.0, "eps": 0.0, "iterations": 1}
    choices = ops.explain("hyper_collapse", wanted, fn, fn[:, 0].contiguous(), torch.zeros(3), **settings)
    assert any(choice.backend == "cpu" and "gradients" in choice.reason for choice in choices)
