"""What tests of the Triton kernels share: where they run, where rows lie, and the comparison in float64.

They run on a GPU where there is one, else where Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), in a
process that tests/ops/test_silicon.py starts.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops.backends.triton.supports import BACKEND, INTERPRETED
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, PagedRows, Pages

DEVICE = torch.device("cpu" if INTERPRETED or BACKEND not in REGISTRY.backends else "cuda:0")
# The interpreter computes with numpy, which warns of infinities and NaN that kernels are meant to meet.
warned = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def only_with_triton() -> None:
    """Leaves a module of tests out where the kernels cannot run."""
    if BACKEND not in REGISTRY.backends:
        pytest.skip("runs on a GPU, or in a process of its own where Triton is installed", allow_module_level=True)


def boundaries(counts: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))


def flat_rows(parts: list[Tensor]) -> FlatRows:
    return FlatRows(torch.cat(parts), boundaries([part.shape[0] for part in parts]))


def paged_rows(parts: list[Tensor], page_size: int = 4) -> PagedRows:
    """On pages that lie in no order, NaN where there is no row."""
    counts = [-(-part.shape[0] // page_size) for part in parts]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(3)).tolist()
    tables = tuple(tuple(order[start:end]) for start, end in pairwise(boundaries(counts)))
    pool = torch.full((len(order), page_size, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype, device=DEVICE)
    for table, part in zip(tables, parts, strict=True):
        for row, values in enumerate(part):
            pool[table[row // page_size], row % page_size] = values
    return PagedRows(pool, Pages(tables, tuple(part.shape[0] for part in parts), page_size))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of few bits, the same whatever the type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float().to(DEVICE)


def beside_the_reference(run: Callable[[], Tensor], exact: Callable[[], Tensor], tolerance: float) -> None:
    with torch.no_grad():
        with ops.using(BACKEND):
            given = run()
        with ops.using(REFERENCE):
            wanted = exact()
    torch.testing.assert_close(given.double(), wanted, rtol=tolerance, atol=tolerance)
