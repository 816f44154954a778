"""The ops of the sparse side keep their contracts: choosing entries, and attention over a window and entries.

Every backend is held to the reference in float64, and the reference to the definition in plain Python. Numbers of a
choice are small integers, exact in every type and order, so that ties are many and all answers must be equal. Pages
hold NaN wherever no row was written.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops.backends import aten_sparse
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Pages

# Native kernels have no gradients and no float64; tests/ops/test_native_v4.py holds them to the reference.
TRAINS = [backend for backend in REGISTRY.backends if backend != "cpu"]
HAVING = {candidate.backend for candidate in REGISTRY.candidates("sparse_attention")}
FAST = [backend for backend in TRAINS if backend in HAVING - {REFERENCE}]
SMALL = {"BLOCK": 3, "TILE_NUMBERS": 64, "SCORE_NUMBERS": 64, "PRODUCT_NUMBERS": 64, "SET": 4}


@pytest.fixture(params=["usual", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as they are, and so small that every input needs many."""
    for name, value in SMALL.items() if request.param == "small" else ():
        monkeypatch.setattr(aten_sparse, name, value)


def _starts(counts: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))


def _flat(parts: list[Tensor]) -> FlatRows:
    return FlatRows(torch.cat(parts), _starts([part.shape[0] for part in parts]))


def _paged(parts: list[Tensor], page_size: int = 4) -> PagedRows:
    """On pages that lie in no order, but those of the first sequence side by side."""
    counts = [-(-part.shape[0] // page_size) for part in parts]
    order = list(range(counts[0])) + (counts[0] + torch.randperm(sum(counts[1:]) + 2)).tolist()
    tables = tuple(tuple(order[start:end]) for start, end in pairwise(_starts(counts)))
    pool = torch.full((len(order), page_size, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype)
    for table, part in zip(tables, parts, strict=True):
        for row, values in enumerate(part):
            pool[table[row // page_size], row % page_size] = values
    return PagedRows(pool, Pages(tables, tuple(part.shape[0] for part in parts), page_size))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Sizes of one call of `choose_entries`."""

    counts: list[int]
    pasts: list[int]
    count: int
    rate: int
    heads: int = 3
    dim: int = 5

    def tensors(self, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=generator).float()

        num_new, ends = sum(self.counts), zip(self.pasts, self.counts, strict=True)
        keys = [whole((past + new) // self.rate, self.dim) for past, new in ends]
        return whole(num_new, self.heads, self.dim), whole(num_new, self.heads), keys

    def by_definition(self, q_TIK: Tensor, weights_TI: Tensor, keys: list[Tensor]) -> list[list[int]]:
        answers, width = [], min(self.count, max((part.shape[0] for part in keys), default=0))
        for past, (start, end), keys_SK in zip(self.pasts, pairwise(_starts(self.counts)), keys, strict=True):
            for token in range(start, end):
                seen = (past + token - start + 1) // self.rate
                products = (q_TIK[token] @ keys_SK[:seen].T).clamp(min=0)
                scores = (weights_TI[token] @ products).tolist()
                best = sorted(sorted(range(seen), key=lambda entry: (-scores[entry], entry))[: self.count])
                answers.append(best + [-1] * (width - len(best)))
        return answers


CHOICES = [
    Choice(counts=[9], pasts=[0], count=3, rate=1),
    Choice(counts=[40, 1, 0, 7], pasts=[0, 33, 21, 6], count=4, rate=1),
    Choice(counts=[6, 1, 25], pasts=[3, 299, 118], count=2, rate=4),
    Choice(counts=[1, 1], pasts=[700, 5], count=5, rate=1, heads=1),
    Choice(counts=[5, 150], pasts=[600, 2], count=7, rate=2, heads=16),
    Choice(counts=[3], pasts=[0], count=2, rate=4),
    Choice(counts=[600], pasts=[0], count=1, rate=256),
    Choice(counts=[30, 8], pasts=[2, 0], count=100, rate=3),
    Choice(counts=[0, 0], pasts=[9, 0], count=3, rate=2),
]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_best_entries_are_chosen_and_the_lowest_of_equals(backend: str, choice: Choice) -> None:
    for seed in range(3):
        q_TIK, weights_TI, keys = choice.tensors(seed)
        wanted = choice.by_definition(q_TIK, weights_TI, keys)
        settings = {"count": choice.count, "rate": choice.rate}
        for dtype in (torch.float32, torch.bfloat16, *([torch.float64] if backend in TRAINS else [])):
            parts = [part.to(dtype) for part in keys]
            for rows in (_flat(parts), _paged(parts)):
                # Weights come in float32 whatever the model's type, in float64 for tests like this.
                weights = weights_TI.double() if dtype == torch.float64 else weights_TI
                starts, pasts = _starts(choice.counts), tuple(choice.pasts)
                with ops.using(backend):
                    got_TA = ops.choose_entries(q_TIK.to(dtype), weights, starts, pasts, rows, **settings)
                assert got_TA.dtype == torch.int64
                assert got_TA.tolist() == wanted


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize("scores", ["all zero", "all equal and negative", "all equal"])
def test_among_equals_the_first_entries_are_chosen(backend: str, scores: str) -> None:
    """What a rectifier makes of most products is exactly zero; weights may be negative. -0.0 equals 0.0."""
    sign = {"all zero": 0.0, "all equal and negative": -1.0, "all equal": 1.0}[scores]
    q_TIK, keys = torch.ones(6, 2, 4), torch.ones(200, 4)
    weights_TI = torch.full((6, 2), sign)
    if scores == "all zero":
        weights_TI = torch.tensor([1.0, -1.0, 2.0, -3.0, 0.5, -0.5]).unsqueeze(1).expand(6, 2)
        q_TIK = -q_TIK
    with ops.using(backend):
        got_TA = ops.choose_entries(q_TIK, weights_TI, (0, 6), (194,), _flat([keys]), count=5, rate=1)
    assert got_TA.tolist() == [[0, 1, 2, 3, 4]] * 6


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_no_sequence_and_no_entry_give_an_empty_choice(backend: str) -> None:
    with ops.using(backend):
        none = ops.choose_entries(
            torch.ones(0, 2, 4), torch.ones(0, 2), (0,), (), _flat([torch.ones(0, 4)]), count=3, rate=1
        )
        early = ops.choose_entries(
            torch.ones(2, 2, 4), torch.ones(2, 2), (0, 2), (0,), _flat([torch.ones(0, 4)]), count=3, rate=4
        )
    assert none.shape == (0, 0)
    assert early.shape == (2, 0)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_a_query_that_is_no_number_spoils_no_other_choice(backend: str) -> None:
    """An overflow shows in the logits, where it is reported; here every row still names entries that it sees."""
    q_TIK, weights_TI, keys = CHOICES[1].tensors(0)
    pages = _flat(keys)
    with ops.using(backend):
        wanted = ops.choose_entries(q_TIK, weights_TI, (0, 40, 41, 41, 48), (0, 33, 21, 6), pages, count=4, rate=1)
        q_TIK[[20, 40]] = torch.nan
        got = ops.choose_entries(q_TIK, weights_TI, (0, 40, 41, 41, 48), (0, 33, 21, 6), pages, count=4, rate=1)
    others = [token for token in range(48) if token not in (20, 40)]
    assert torch.equal(got[others], wanted[others])
    for token, position in ((20, 20), (40, 33)):
        assert len(set(got[token].tolist())) == 4
        assert 0 <= got[token].min() <= got[token].max() <= position


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Sizes of one call of `sparse_attention`. window: rows kept of each sequence, None for no window."""

    counts: list[int]
    pasts: list[int]
    rate: int = 1
    span: int = 0
    kept: int | None = None
    entries: bool = True
    chosen: int | None = None
    sinks: bool = True
    heads: int = 4
    gathers: bool = False
    dim: int = 6
    value_dim: int = 5

    @property
    def totals(self) -> list[int]:
        return [past + count for past, count in zip(self.pasts, self.counts, strict=True)]

    def leaves(self, dtype: torch.dtype) -> "Leaves":
        generator = torch.Generator().manual_seed(7)

        def new(*shape: int) -> Tensor:
            # The same numbers, of few bits, whatever the type.
            return torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_()

        windows = [min(total, (self.kept or 0) + count) for total, count in zip(self.totals, self.counts, strict=True)]
        return Leaves(
            q_THK=new(sum(self.counts), self.heads, self.dim),
            entries=[new(total // self.rate, self.dim) for total in self.totals] if self.entries else None,
            window=None if self.kept is None else [new(rows, self.dim) for rows in windows],
            sinks_H=new(self.heads) if self.sinks else None,
        )

    def choice(self) -> Tensor | None:
        """Some of the entries that each query sees, in no order, -1 anywhere."""
        if self.chosen is None:
            return None
        generator, rows = torch.Generator().manual_seed(9), []
        for past, count in zip(self.pasts, self.counts, strict=True):
            for position in range(past, past + count):
                seen = torch.randperm((position + 1) // self.rate, generator=generator)[: self.chosen]
                rows.append(torch.cat((seen, torch.full((self.chosen - seen.shape[0],), -1))))
                rows[-1] = rows[-1][torch.randperm(self.chosen, generator=generator)]
        return torch.stack(rows)

    def run(self, leaves: "Leaves", *, paged: bool = False, chosen_TA: Tensor | None = None) -> Tensor:
        entries = leaves.entries
        return ops.sparse_attention(
            leaves.q_THK,
            _starts(self.counts),
            tuple(self.pasts),
            None if entries is None else _paged(entries) if paged else _flat(entries),
            self.choice() if chosen_TA is None else chosen_TA,
            None if leaves.window is None else _flat(leaves.window),
            leaves.sinks_H,
            value_dim=self.value_dim,
            scale=0.4,
            rate=self.rate,
            span=self.span,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaves:
    q_THK: Tensor
    entries: list[Tensor] | None
    window: list[Tensor] | None
    sinks_H: Tensor | None

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.q_THK, *(self.entries or ()), *(self.window or ()))
        if self.sinks_H is not None:
            yield self.sinks_H


CALLS = [
    Attention(counts=[7], pasts=[0], span=3, kept=2, entries=False),
    Attention(counts=[5, 0, 1], pasts=[2, 9, 40], span=4, kept=9, rate=4),
    Attention(counts=[5, 1, 9], pasts=[0, 3, 250], span=100, kept=400, rate=8, sinks=False),
    Attention(counts=[9, 1], pasts=[90, 30], span=5, kept=4, rate=2, chosen=5, heads=8, gathers=True),
    Attention(counts=[8, 6], pasts=[0, 100], rate=1, chosen=3, sinks=False, gathers=True, heads=16),
    Attention(counts=[8, 6], pasts=[0, 30], rate=1, chosen=12, sinks=False, heads=1),
    Attention(counts=[6, 2], pasts=[0, 1], rate=4, sinks=False),
    Attention(counts=[3], pasts=[0], span=2, kept=1, rate=4, chosen=0),
]


def _outcome(backend: str, call: Attention, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    leaves = call.leaves(dtype)
    with ops.using(backend):
        result = call.run(leaves)
    assert result.dtype == dtype
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(8)).bfloat16()
    result.backward(cotangent.to(dtype))
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return result.detach().double(), [grad.double() for grad in grads]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_sparse_attention_equals_the_reference_in_float64(
    backend: str, call: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        FlatRows, "take", lambda rows, index, chosen: taken.append(index) or rows.sequence(index)[chosen]
    )
    exact, exact_grads = _outcome(REFERENCE, call, torch.float64)
    assert not taken
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
        got, grads = _outcome(backend, call, dtype)
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=4 * tolerance, atol=4 * tolerance)
    assert bool(taken) == call.gathers, "the path that this case is meant for was not taken"


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_reference_is_the_definition(call: Attention) -> None:
    leaves, chosen_TA = call.leaves(torch.float64), call.choice()
    with torch.no_grad(), ops.using(REFERENCE):
        got_THV = call.run(leaves)
    for index, (past, (start, end)) in enumerate(zip(call.pasts, pairwise(_starts(call.counts)), strict=True)):
        for token in range(start, end):
            position, rows = past + token - start, []
            if leaves.window is not None:
                first = call.totals[index] - leaves.window[index].shape[0]
                rows += [
                    leaves.window[index][at - first] for at in range(max(position - call.span + 1, 0), position + 1)
                ]
            if leaves.entries is not None:
                names = range((position + 1) // call.rate) if chosen_TA is None else chosen_TA[token].tolist()
                rows += [leaves.entries[index][name] for name in names if name >= 0]
            for head in range(call.heads):
                weights = [math.exp(0.4 * (leaves.q_THK[token, head] @ row).item()) for row in rows]
                total = sum(weights) + (0.0 if leaves.sinks_H is None else math.exp(leaves.sinks_H[head].item()))
                wanted = torch.zeros(call.value_dim, dtype=torch.float64)
                for weight, row in zip(weights, rows, strict=True):
                    wanted += weight / total * row.detach()[: call.value_dim]
                torch.testing.assert_close(got_THV[token, head], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize("call", [call for call in CALLS if call.entries], ids=str)
def test_sparse_attention_reads_pages_and_nothing_beside_them(backend: str, call: Attention) -> None:
    leaves = call.leaves(torch.float32)
    with torch.no_grad(), ops.using(backend):
        torch.testing.assert_close(call.run(leaves, paged=True), call.run(leaves), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize("heads", [1, 8], ids=["masks", "gathers"])
def test_a_named_entry_that_is_not_complete_yet_is_not_read(backend: str, heads: int) -> None:
    """Each query names its newest entry and the last of all, which is complete only at the end."""
    call = Attention(counts=[60], pasts=[0], rate=2, chosen=2, heads=heads)
    leaves = call.leaves(torch.float32)
    seen_T = (torch.arange(60) + 1) // 2
    named_TA = torch.stack((seen_T - 1, torch.full((60,), 29)), 1)
    seen_TA = torch.where(named_TA < seen_T[:, None], named_TA, -1)
    seen_TA[-2:, 0] = -1  # there both names are one
    named_TA[-2:, 0] = -1
    with torch.no_grad(), ops.using(backend):
        got, wanted = call.run(leaves, chosen_TA=named_TA), call.run(leaves, chosen_TA=seen_TA)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", TRAINS)
def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient(backend: str) -> None:
    """Without a window and a sink the first tokens see no entry."""
    call = CALLS[6]
    leaves = call.leaves(torch.float32)
    with ops.using(backend):
        result = call.run(leaves)
    result.square().sum().backward()
    blind = [0, 1, 2, 6, 7]
    assert result[blind].abs().max() == 0
    assert result[3:6].abs().min() > 0
    assert leaves.q_THK.grad is not None
    assert leaves.q_THK.grad[[0, 1, 2, 6]].abs().max() == 0
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("backend", TRAINS)
def test_sinks_and_logits_far_out_neither_overflow_nor_vanish(backend: str) -> None:
    """A sink far above takes all, one far below nothing; of logits far apart the highest takes all."""
    call = Attention(counts=[5, 1], pasts=[2, 40], span=4, kept=9, rate=4)
    leaves = call.leaves(torch.float32)
    with ops.using(backend):
        for sink, scale in ((1e4, 1.0), (-1e4, 1.0), (0.0, 1e4), (-3e38, 1.0)):
            extreme = Leaves(
                q_THK=(leaves.q_THK.detach() * scale).requires_grad_(),
                entries=leaves.entries,
                window=leaves.window,
                sinks_H=torch.full((4,), sink, requires_grad=True),
            )
            result = call.run(extreme)
            result.square().sum().backward()
            assert bool(result.isfinite().all())
            assert all(bool(leaf.grad.isfinite().all()) for leaf in extreme if leaf.grad is not None)
            if sink > 0:
                assert result.abs().max() == 0
            if sink < 0:
                without = Leaves(q_THK=extreme.q_THK, entries=leaves.entries, window=leaves.window, sinks_H=None)
                torch.testing.assert_close(result, call.run(without))


@pytest.mark.parametrize("backend", REGISTRY.backends)
def test_no_sequence_gives_no_attention(backend: str) -> None:
    none = torch.ones(0, 3, 6)
    with ops.using(backend):
        got = ops.sparse_attention(
            none,
            (0,),
            (),
            None,
            None,
            FlatRows(none[:, 0], (0,)),
            torch.ones(3),
            value_dim=5,
            scale=1.0,
            rate=4,
            span=2,
        )
    assert got.shape == (0, 3, 5)
