"""V4's compressors in Triton, beside the reference in float64 (see tests/ops/test_triton.py)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops import silicon
from daedal.ops.backends.triton.supports import BACKEND, INTERPRETED
from daedal.ops.registry import REFERENCE
from daedal.ops.rows import PagedRows, Pages
from tests.ops.triton_run import DEVICE, boundaries, normal, only_with_triton, warned

only_with_triton()
pytestmark = warned

# Tokens of two sequences in each step; the second sequence begins later, and one step completes nothing.
STEPS = [[5, 0], [1, 3], [2, 1], [9, 14], [1, 1], [1, 1], [0, 6]]
DIM, TURNED, PAGE = 16, 3, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rate", "overlaps"), [(4, True), (4, False), (3, True)])
def test_triton_pools_groups_step_by_step(rate: int, overlaps: bool, dtype: torch.dtype) -> None:
    """Entries and what is kept, memory that nobody wrote included."""
    given, wanted = (_run(backend, rate, overlaps, dtype) for backend in (BACKEND, REFERENCE))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not given[0].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="assumes the profile of a chip that is not here")
@pytest.mark.parametrize("chip", ["ascend-910c", "ascend-950"])
def test_triton_pools_groups_on_a_chip_that_starts_few_programs(chip: str) -> None:
    with silicon.assumed(replace(silicon.read(chip), most_programs=12)):
        test_triton_pools_groups_step_by_step(4, True, torch.bfloat16)


def _run(backend: str, rate: int, overlaps: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference in float64 throughout."""
    exact = torch.float64 if backend == REFERENCE else torch.float32
    kept = torch.float64 if backend == REFERENCE else dtype
    width, size = (2 if overlaps else 1) * DIM, 2 * rate + 3
    entries = torch.full((14, PAGE, DIM), torch.nan, dtype=kept, device=DEVICE)
    ring = torch.full((4, size, 2, width), torch.nan, dtype=exact, device=DEVICE)
    tables, states, pasts = ((3, 0, 5, 7, 9, 11), (4, 1, 2, 6, 8, 10)), (2, 0), [0, 0]
    bias, weight = normal(rate, width, seed=90).to(exact), normal(DIM, seed=91).to(exact)
    for number, counts in enumerate(STEPS):
        kv, gate = (normal(sum(counts), width, seed=2 * number + part).to(exact) for part in (0, 1))
        angles = normal(sum(counts), TURNED, seed=50 + number).to(exact)
        totals = [past + count for past, count in zip(pasts, counts, strict=True)]
        rows = PagedRows(entries, Pages(tables, tuple(total // rate for total in totals), PAGE))
        with torch.no_grad(), ops.using(backend):
            ops.pool_groups(
                kv, gate, bias, weight, angles.cos(), angles.sin(), boundaries(counts), tuple(pasts), ring, states,
                rows, eps=1e-6, overlaps=overlaps,
            )  # fmt: skip
        pasts = totals
    return entries, ring
