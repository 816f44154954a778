"""What tests of the Triton kernels share: where they run, where rows lie, and the comparison in float64.

They run on a GPU where there is one, else where Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), in a
process that tests/ops/test_silicon.py starts.
"""

from collections.abc import Callable, Sequence
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


def gradients_beside_the_reference(
    run: Callable[..., Tensor], given: Sequence[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """run: of tensors. Its result and the gradient of each, in `dtype` beside float64; an error is a share of the
    largest number.
    """
    outcomes = []
    for backend, kind in ((BACKEND, dtype), (REFERENCE, torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in given]
        with ops.using(backend):
            result = run(*leaves)
        outcomes.append([result.detach(), *torch.autograd.grad(result, leaves, _push(result))])
    for mine, wanted in zip(*outcomes, strict=True):
        assert mine.dtype == dtype
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=tolerance * largest)


def gradients_apart(run: Callable[..., Tensor], given: Sequence[Tensor]) -> None:
    """Each gradient is the same whether or not the others are wanted."""
    with ops.using(BACKEND):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        result = run(*leaves)
        together = torch.autograd.grad(result, leaves, _push(result))
        for place, (leaf, wanted) in enumerate(zip(leaves, together, strict=True)):
            alone = [leaf if place == other else frozen for other, frozen in enumerate(given)]
            (found,) = torch.autograd.grad(run(*alone), leaf, _push(result))
            assert torch.equal(found, wanted)


def _push(result: Tensor) -> Tensor:
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(99)).to(result)


def beside_the_reference(run: Callable[[], Tensor], exact: Callable[[], Tensor], tolerance: float) -> None:
    with torch.no_grad():
        with ops.using(BACKEND):
            given = run()
        with ops.using(REFERENCE):
            wanted = exact()
    torch.testing.assert_close(given.double(), wanted, rtol=tolerance, atol=tolerance)
