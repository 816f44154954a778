"""A backend's result beside the reference's, on the same arguments: what `daedal doctor` runs once for every op.

It catches what no import does: a kernel that was compiled for another chip, a library that changed its arithmetic. A
few tensors of one decode step are no proof; tests/ops holds every backend to the reference on many. Knows no op.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from daedal.errors import BackendError
from daedal.ops.registry import REFERENCE, REGISTRY
from daedal.ops.rows import FlatRows, PagedRows

# Of the largest number of a result: rounding to bfloat16, and of activations to eight bits where weights are packed.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 0.02, torch.bfloat16: 0.04, torch.float16: 0.02}

Call = tuple[Sequence[Any], Mapping[str, Any]]


def check(op: str, make: Callable[[], Call]) -> tuple[str, float]:
    """(the backend that was chosen, its largest error as a share of the largest number). make: fresh arguments, the
    same at each call. BackendError where it fails, the error is beyond `TOLERANCE`, or whole numbers differ.
    """
    args, kwargs = make()
    backend = next(choice.backend for choice in REGISTRY.explain(op, *args, **kwargs) if choice.chosen)
    try:
        given = list(_numbers((REGISTRY.call(op, *args, **kwargs), args)))
    except (RuntimeError, TypeError, AttributeError) as failure:
        told = str(failure).partition("\n")[0]
        raise BackendError(
            f"backend {backend!r} fails at {op} ({type(failure).__name__}: {told}): reinstall what it is made of, or "
            f"set DAEDAL_OPS={REFERENCE} to do without it"
        ) from failure
    args, kwargs = make()
    with REGISTRY.using(REFERENCE):
        wanted = list(_numbers((REGISTRY.call(op, *args, **kwargs), args)))
    worst = 0.0
    for mine, theirs in zip(given, wanted, strict=True):
        error, allowed = _error(mine, theirs), TOLERANCE.get(theirs.dtype, 0.0)
        if not error <= allowed:
            raise BackendError(
                f"backend {backend!r} gives a wrong result for {op} ({error:.2g} of its largest number, {allowed} is "
                f"allowed): reinstall what it is made of, or set DAEDAL_OPS={REFERENCE} to do without it"
            )
        worst = max(worst, error)
    return backend, worst


def _error(given: Tensor, wanted: Tensor) -> float:
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(given, wanted) else float("inf")
    if not wanted.numel():
        return 0.0
    exact = wanted.cpu().double()  # on the host: not every chip has float64
    return float((given.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _numbers(found: Any) -> Iterator[Tensor]:
    """Every tensor of a result and of arguments, which some ops write to."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, PagedRows):
        yield found.pool
    elif isinstance(found, FlatRows):
        yield found.rows
    elif isinstance(found, tuple | list):
        for part in found:
            yield from _numbers(part)
