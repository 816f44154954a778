"""Mixing residual streams: every backend against the reference in float64, and a mixing matrix that is what it says."""

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops.registry import REFERENCE, REGISTRY

# Native kernels have no gradients; tests/ops/test_native_v4.py holds them to the reference.
TRAINS = [backend for backend in REGISTRY.backends if backend != "cpu"]
FAST = [backend for backend in TRAINS if backend != REFERENCE]
SHAPES = [(5, 4, 24), (1, 2, 7), (3, 1, 8), (0, 4, 8), (300, 3, 5)]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, *, spread: float = 1.0) -> list[Tensor]:
    """Streams, fn, base and scale: the same numbers of few bits whatever the type, weights in float32 at least."""
    tokens, streams, dim = shape
    generator, wide = torch.Generator().manual_seed(5), torch.float64 if dtype == torch.float64 else torch.float32
    mixes = streams * (2 + streams)

    def new(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    streams_TMD, fn = new(tokens, streams, dim).to(dtype), (new(mixes, streams * dim) * 0.2).to(wide)
    base, scale = (spread * new(mixes)).to(wide), new(3).to(wide)
    return [tensor.requires_grad_() for tensor in (streams_TMD, fn, base, scale)]


def _collapse(inputs: list[Tensor], iterations: int = 20, eps: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    return ops.hyper_collapse(*inputs, norm_eps=1e-6, eps=eps, iterations=iterations)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_collapse_equals_the_reference_in_float64(shape: tuple[int, int, int], iterations: int) -> None:
    """Whatever is chosen, with gradients and without."""
    with ops.using(REFERENCE):
        exact = _collapse(exact_inputs := _inputs(shape, torch.float64), iterations)
    generator = torch.Generator().manual_seed(6)
    cotangents = [torch.randn(tensor.shape, generator=generator) for tensor in exact]
    torch.autograd.backward(exact, [cotangent.double() for cotangent in cotangents])
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        got = _collapse(inputs := _inputs(shape, dtype), iterations)
        with torch.no_grad():
            again = _collapse(inputs, iterations)
        torch.autograd.backward(got, [c.to(mine.dtype) for c, mine in zip(cotangents, got, strict=True)])
        assert [tensor.dtype for tensor in got] == [dtype, torch.float32, torch.float32]
        assert [tensor.dtype for tensor in again] == [dtype, torch.float32, torch.float32]
        for mine, repeated, theirs in zip(got, again, exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(repeated.double(), theirs, rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(inputs, exact_inputs, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            span = max(1.0, float(theirs.grad.abs().max())) if theirs.numel() else 1.0
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance * span)


@pytest.mark.parametrize("backend", REGISTRY.backends)
@pytest.mark.parametrize(("spread", "iterations"), [(1.0, 400), (60.0, 20)])
def test_the_mixing_matrix_is_doubly_stochastic(backend: str, spread: float, iterations: int) -> None:
    """Columns come last and so sum to 1 at once; rows need turns, the more the further apart the logits are."""
    inputs = [tensor.detach() for tensor in _inputs((200, 4, 8), torch.float32, spread=spread)]
    with torch.no_grad(), ops.using(backend):
        x_TD, post_TM, comb_TMM = _collapse(inputs, iterations, eps=1e-6)
    assert all(bool(tensor.isfinite().all()) for tensor in (x_TD, post_TM, comb_TMM))
    torch.testing.assert_close(comb_TMM.sum(1), torch.ones(200, 4), rtol=0, atol=1e-5)
    if spread == 1.0:
        torch.testing.assert_close(comb_TMM.sum(2), torch.ones(200, 4), rtol=0, atol=1e-3)
    assert comb_TMM.min() >= 0
    assert 0 <= post_TM.min() <= post_TM.max() <= 2


@pytest.mark.parametrize("backend", TRAINS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand_is_its_definition(backend: str, shape: tuple[int, int, int]) -> None:
    """Stream k takes stream j by the entry in row j, column k: the matrix is used transposed."""
    tokens, streams, dim = shape
    generator = torch.Generator().manual_seed(7)
    sizes = ((tokens, dim), shape, (tokens, streams), (tokens, streams, streams))
    numbers = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    wide = [number.double().requires_grad_() for number in numbers]
    y, before, post, comb = wide
    wanted = [
        post[:, k, None] * y + sum(comb[:, j, k, None] * before[:, j] for j in range(streams)) for k in range(streams)
    ]
    exact = torch.stack(wanted, 1)
    cotangent = torch.randn(shape, generator=generator).bfloat16()
    exact.backward(cotangent.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        kinds = (dtype, dtype, torch.float32, torch.float32)
        leaves = [number.to(kind).requires_grad_() for number, kind in zip(numbers, kinds, strict=True)]
        with ops.using(backend):
            got = ops.hyper_expand(*leaves)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
        got.backward(cotangent.to(dtype))
        for mine, theirs in zip(leaves, wide, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("backend", TRAINS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_head_collapses_and_mixes_nothing(backend: str, shape: tuple[int, int, int]) -> None:
    """Its weights are a collapse's without the rows for output and mixing; outputs and gradients are the same."""
    streams, settings = shape[1], {"norm_eps": 1e-6, "eps": 1e-3}
    with ops.using(REFERENCE):
        exact, *_ = _collapse(theirs := _inputs(shape, torch.float64))
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(6)).bfloat16()
    exact.backward(cotangent.double())
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        mine = _inputs(shape, dtype)
        with ops.using(backend):
            got = ops.hyper_head(mine[0], mine[1][:streams], mine[2][:streams], mine[3][:1], **settings)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
        got.backward(cotangent.to(dtype))
        for ours, exactly in zip(mine, theirs, strict=True):
            assert ours.grad is not None
            assert exactly.grad is not None
            span = max(1.0, float(exactly.grad.abs().max())) if exactly.numel() else 1.0
            torch.testing.assert_close(ours.grad.double(), exactly.grad, rtol=tolerance, atol=tolerance * span)
