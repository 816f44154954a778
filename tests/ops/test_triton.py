"""The Triton kernels, on a GPU or through Triton's interpreter on a CPU: every op beside the reference in float64.

The interpreter is slow, and is chosen when Triton is first imported: there the tests run in a process of their own,
which tests/ops/test_silicon.py starts. Freshly allocated memory is NaN throughout, and so
are pages where no row was written. Where a form depends on the chip, another chip's profile is assumed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import silicon
from daedal.ops.arithmetic import FP8, INT8, MXFP8, Arithmetic, Rounding, quantise
from daedal.ops.backends.triton.supports import BACKEND, INTERPRETED
from daedal.ops.registry import REFERENCE
from daedal.ops.rows import FlatRows, Rows
from tests.ops.triton_run import (
    DEVICE,
    beside_the_reference,
    boundaries,
    flat_rows,
    gradients_apart,
    gradients_beside_the_reference,
    normal,
    only_with_triton,
    paged_rows,
    warned,
)

only_with_triton()
pytestmark = warned


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches so small that every context needs many."""
    monkeypatch.setattr(pytest.importorskip("daedal.ops.backends.triton.attention"), "LEAST_CHUNK", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_reads_rows_that_are_parts_of_wider_ones(dtype: torch.dtype) -> None:
    wide, weight = normal(5, 3, 40).to(dtype), normal(16, seed=1).to(dtype)
    both, angle = normal(6, 34).to(dtype), torch.linspace(0, 9, 20, device=DEVICE).view(5, 4)
    turned = wide[..., 8:16].transpose(0, 1).transpose(0, 1)
    for run in (
        lambda cast: ops.rms_norm(cast(wide[..., :16]), cast(weight), 1e-6),
        lambda cast: ops.swiglu(*cast(both).chunk(2, -1), limit=0.5),
        lambda cast: ops.rotary(cast(turned), angle.cos(), angle.sin(), interleaved=True),
        lambda cast: ops.rotary(cast(turned), angle.cos(), angle.sin(), interleaved=False),
    ):
        beside_the_reference(lambda run=run: run(lambda x: x), lambda run=run: run(Tensor.double), 2e-3)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """Sizes of one call of `attention`. value: a width where keys are their own values."""

    counts: list[int]
    lengths: list[int]
    heads: int
    groups: int = 1
    dim: int = 24
    value: int | None = 16
    own: int = 12

    def arguments(self, dtype: torch.dtype, place: Callable[[list[Tensor]], Rows]) -> list[object]:
        shape = (self.dim,) if self.value else (self.groups, self.dim)
        keys = [normal(length, *shape, seed=index).to(dtype) for index, length in enumerate(self.lengths)]
        q_THK, located = normal(sum(self.counts), self.heads, self.dim, seed=9).to(dtype), place(keys)
        if self.value:
            return [q_THK, boundaries(self.counts), located, self.value]
        values = [
            normal(length, self.groups, self.own, seed=index).to(dtype) for index, length in enumerate(self.lengths)
        ]
        held = place(values)
        return [
            q_THK,
            boundaries(self.counts),
            located,
            replace(held, pages=located.pages) if place is paged_rows else held,
        ]


ATTENDED = [
    Attended(counts=[1, 1, 1], lengths=[40, 3, 17], heads=20),
    Attended(counts=[7, 0, 2], lengths=[30, 4, 2], heads=3),
    Attended(counts=[1, 5], lengths=[33, 5], heads=6, groups=2, value=None),
    Attended(counts=[3], lengths=[3], heads=2, groups=2, dim=20, value=None, own=20),
]


@pytest.mark.parametrize(
    ("place", "dtype", "chip"),
    [(flat_rows, torch.float32, "this"), (paged_rows, torch.float32, "mi300x"), (paged_rows, torch.bfloat16, "mi300x")],
)
@pytest.mark.parametrize("case", ATTENDED, ids=str)
def test_triton_attends_whole_and_split(
    case: Attended, place: Callable[..., Rows], dtype: torch.dtype, chip: str, request: pytest.FixtureRequest
) -> None:
    """Assumed to have many cores, a chip splits every context."""
    if chip != "this":
        request.getfixturevalue("small")
    with silicon.assumed(silicon.read(chip)):
        beside_the_reference(
            lambda: ops.attention(*case.arguments(dtype, place), scale=0.3),
            lambda: ops.attention(*case.arguments(torch.float64, flat_rows), scale=0.3),
            2e-5 if dtype == torch.float32 else 2e-2,
        )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    ("method", "num_experts", "n_group", "topk_group"),
    [("greedy", 20, 1, 1), ("group_limited_greedy", 24, 4, 2), ("noaux_tc", 24, 4, 2), ("noaux_tc", 13, 1, 1)],
)
def test_triton_routes_as_the_reference(
    scoring: str, method: str, num_experts: int, n_group: int, topk_group: int
) -> None:
    """Whole logits, so that experts and groups tie."""
    settings = {"scoring": scoring, "method": method, "n_group": n_group, "topk_group": topk_group}
    settings |= {"num_active": 5, "normalise": True, "scale": 2.5}
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-3, 4, (6, num_experts), generator=generator).float().to(DEVICE)
    logits[0, :3] = torch.tensor([-90.0, 90.0, -30.0])
    raised = torch.randint(0, 2, (num_experts,), generator=generator).to(DEVICE) * 0.25
    bias = raised if method == "noaux_tc" else None
    given, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with ops.using(BACKEND):
        ids, weights = ops.route(given, bias, **settings)
        none, _ = ops.route(logits[:0], bias, **settings)
    with ops.using(REFERENCE):
        wanted_ids, wanted = ops.route(exact, bias, **settings)
    assert none.shape == (0, 5)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-6)
    cotangent = normal(6, 5)
    weights.backward(cotangent)
    wanted.backward(cotangent.double())
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), ops.using(BACKEND):
        torch.testing.assert_close(
            ops.route(logits, bias, **settings)[1].double(), wanted.detach(), rtol=1e-5, atol=1e-6
        )


ROUNDINGS = [
    FP8.activations,
    FP8.weights,
    MXFP8.weights,
    INT8.weights,
    Rounding(element="e4m3", along=128, across=1, scale="float32"),
]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_triton_rounds_bit_for_bit(rounding: Rounding) -> None:
    """Odd sizes, nought, small numbers, what is not finite; by rows and by columns."""
    scaled = pytest.importorskip("daedal.ops.backends.triton.scaled")
    x = torch.randn(131, 150, generator=torch.Generator().manual_seed(4)) * torch.logspace(-30, 20, 150)
    x[3], x[5, 7], x[6, 140], x[9] = 0.0, torch.inf, torch.nan, 1e-42
    x = x.to(DEVICE)
    for given in (x.T, x[:40].bfloat16()):
        codes, scales = scaled.quantise(given, rounding)
        wanted, wanted_scales = quantise(given, rounding)
        torch.testing.assert_close(scales, wanted_scales.float(), rtol=0, atol=0, equal_nan=True)
        if codes.dtype == torch.int8:  # which has no NaN: the scale carries it
            codes = torch.where(wanted.isnan(), torch.nan, codes.float())
        torch.testing.assert_close(codes.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chip", ["this", "h200"])
@pytest.mark.parametrize("arithmetic", [FP8, MXFP8, INT8], ids=lambda arithmetic: arithmetic.name)
def test_triton_multiplies_rounded_factors_with_gradients(arithmetic: Arithmetic, chip: str) -> None:
    """Codes of eight bits where the chip multiplies them, of bfloat16 elsewhere: the same numbers."""
    profile = silicon.read(chip)
    if profile.multiplies(torch.float8_e4m3fn) and not INTERPRETED and chip != "this":
        pytest.skip("assumes units of another chip, which the one that is here may not have")
    outcomes: list[list[Tensor]] = []
    for backend in (REFERENCE, BACKEND):
        x, weight = normal(20, 140, seed=1).requires_grad_(), normal(40, 140, seed=2).requires_grad_()
        with ops.using(backend), silicon.assumed(profile):
            y = ops.scaled_linear(x, weight, arithmetic)
            assert ops.scaled_linear(x[:0], weight, arithmetic).shape == (0, 40)
        y.backward(normal(20, 40, seed=3))
        outcomes.append([y.detach(), x.grad, weight.grad])
    for wanted, given in zip(*outcomes, strict=True):
        # Units for eight bits sum in fewer bits than float32 has.
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if INTERPRETED else {"rtol": 1e-3, "atol": 2e-2}
        torch.testing.assert_close(given, wanted, **tolerance)


def test_triton_shares_out_experts_that_nobody_chose() -> None:
    """More experts than rows, one that takes all, and blocks that end within an expert's rows."""
    up, down = normal(9, 12, 20, seed=1), normal(9, 20, 6, seed=2)
    for ids in (torch.tensor([[8, 0]]), torch.full((40, 2), 4), torch.arange(80).view(40, 2) % 5):
        ids = ids.to(DEVICE)
        x, weights = normal(ids.shape[0], 20), normal(*ids.shape, seed=3)
        beside_the_reference(
            lambda x=x, ids=ids, weights=weights: ops.experts(x, ids, weights, up, down, limit=2.0),
            lambda x=x, ids=ids, weights=weights: ops.experts(
                x.double(), ids, weights.double(), up.double(), down.double(), limit=2.0
            ),
            2e-5,
        )


@pytest.mark.parametrize(("dtype", "tolerance", "limit"), [(torch.float32, 2e-5, 1.0), (torch.float16, 4e-3, None)])
def test_triton_finds_gradients_of_experts(dtype: torch.dtype, tolerance: float, limit: float | None) -> None:
    """More rows and columns than a block has, an expert that nobody chose, one that is named twice, one that takes all,
    rows that are parts of wider ones, and no token at all. A limit in float32 alone: rounding carries numbers over it.
    """
    spread = torch.rand(30, 5, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :3]
    spread[:7, 1] = spread[:7, 0]
    up, down = normal(6, 2 * 66, 70, seed=1) / 8, normal(6, 70, 66, seed=2) / 8
    for ids in (spread, torch.full((40, 1), 4), spread[:0]):
        ids = ids.to(DEVICE)
        gradients_beside_the_reference(
            lambda x, *others, ids=ids: ops.experts(x[:, 3:73], ids, *others, limit=limit),
            [normal(ids.shape[0], 80), normal(*ids.shape, seed=3), up, down],
            dtype,
            tolerance,
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance", "chip"),
    [(torch.float32, 2e-5, "this"), (torch.float32, 2e-5, "mi300x"), (torch.float16, 4e-3, "this")],
)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 24), (3, 3, 16), (4, 1, 20)])
def test_triton_finds_gradients_of_attention(
    dtype: torch.dtype, tolerance: float, chip: str, heads: int, groups: int, dim: int
) -> None:
    """Sequences of many blocks, of one token, without any; a long past; keys and values that are parts of wider rows,
    some of no sequence. With mi300x's profile blocks are of other sizes.
    """
    starts, places = boundaries([70, 0, 1, 5]), (2, 72, 76, 77, 177)

    def run(q: Tensor, both: Tensor) -> Tensor:
        keys, values = both.split((dim, 12), -1)
        return ops.attention(q, starts, FlatRows(keys, places), FlatRows(values, places), scale=0.3)

    with silicon.assumed(silicon.read(chip)):
        given = [normal(76, heads, dim, seed=1), normal(180, groups, dim + 12, seed=2)]
        gradients_beside_the_reference(run, given, dtype, tolerance)


def test_triton_has_gradients_of_attention_where_one_row_serves_all_heads_or_nobody_asks() -> None:
    """Rows without an axis of heads, as latents lie."""
    for count in (9, 0):
        starts, places = (0, count), (0, 9)
        gradients_beside_the_reference(
            lambda q, k, v, starts=starts, places=places: ops.attention(
                q, starts, FlatRows(k, places), FlatRows(v, places), scale=0.3
            ),
            [normal(count, 5, 8), normal(9, 8, seed=1), normal(9, 20, seed=2)],
            torch.float32,
            2e-5,
        )


def test_triton_finds_the_gradients_that_are_wanted() -> None:
    ids = (torch.arange(10).view(5, 2) % 3).to(DEVICE)
    gradients_apart(
        lambda x, *others: ops.experts(x, ids, *others, limit=None),
        [normal(5, 8).half(), normal(5, 2, seed=3), normal(4, 12, 8, seed=1).half(), normal(4, 8, 6, seed=2).half()],
    )
    starts = (0, 6, 9)
    gradients_apart(
        lambda q, k, v: ops.attention(q, starts, FlatRows(k, starts), FlatRows(v, starts), scale=0.3),
        [normal(9, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 6, seed=2)],
    )
