"""What the aten backend does only while gradients are on, against the reference in float64: values and gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops.backends.token_order import Order, combine, dispatch
from daedal.ops.rows import FlatRows


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def attended(q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], backend: str) -> Tensor:
    with ops.using(backend):
        return ops.attention(q, starts, FlatRows(k, starts), FlatRows(v, starts), scale=0.25)


@pytest.mark.parametrize("starts", [(0, 40, 80, 120), (0, 7, 7, 8, 60, 112, 120), (0, 0, 120), (0, 120)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_whole_sequences(starts: tuple[int, ...], dtype: torch.dtype) -> None:
    given = [random(120, 3, width, seed=seed, dtype=dtype) for seed, width in enumerate((16, 16, 24))]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, wanted = attended(*given, starts, "aten"), attended(*exact, starts, "reference")
    push = random(120, 3, 24, seed=9, dtype=dtype).detach()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.double(), wanted, **close)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, push), torch.autograd.grad(wanted, exact, push.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, **close)


@pytest.mark.parametrize("fills", [False, True])
def test_rows_go_to_their_experts_and_back(fills: bool) -> None:
    x_TD, weights_TA = random(200, 8, seed=1, dtype=torch.float64), random(200, 3, seed=2, dtype=torch.float64)
    ids_TA = torch.rand(200, 5, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :3]
    ids_TA[:150] = ids_TA[:150].clamp(max=3)  # the last expert gets few
    order = Order.of(ids_TA, 5, fills=fills)
    counts = order.ends_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert (counts.sum() > 600) == fills
    assert not fills or not (counts % 16).any()
    scale_E = torch.arange(1.0, 6.0, dtype=torch.float64)
    y_TD = combine(dispatch(x_TD, order) * scale_E.repeat_interleave(counts)[:, None], weights_TA, order)
    wanted_TD = (x_TD[:, None] * (weights_TA * scale_E[ids_TA])[..., None]).sum(1)
    torch.testing.assert_close(y_TD, wanted_TD)
    push = random(200, 8, seed=4, dtype=torch.float64).detach()
    found = torch.autograd.grad(y_TD, (x_TD, weights_TA), push)
    for mine, theirs in zip(found, torch.autograd.grad(wanted_TD, (x_TD, weights_TA), push), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 48])
def test_kernels_bring_rows_back_as_torch_does(dim: int, dtype: torch.dtype) -> None:
    ids_TA = torch.rand(70, 5, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :3]
    order = Order.of(ids_TA, 5, fills=True)
    push = random(70, dim, seed=4, dtype=dtype).detach()
    results = []
    for backend in (None, "reference"):
        x_TD, weights_TA = random(70, dim, seed=1, dtype=dtype), random(70, 3, seed=2, dtype=torch.float32)
        with nullcontext() if backend is None else ops.using(backend):
            y_TD = combine(dispatch(x_TD, order).square(), weights_TA, order)
            results.append((y_TD, *torch.autograd.grad(y_TD, (x_TD, weights_TA), push)))
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def test_rows_that_fill_up_leave_no_gradient() -> None:
    x_TD = random(64, 16, seed=1, dtype=torch.float32)
    ids_TA = torch.zeros(64, 1, dtype=torch.int64)
    ids_TA[:13] = 1
    weights = random(2, 32, 16, seed=2, dtype=torch.float32), random(2, 16, 16, seed=3, dtype=torch.float32)
    gradients = []
    for backend in ("aten", "reference"):
        with ops.using(backend):
            y_TD = ops.experts(x_TD, ids_TA, torch.ones(64, 1), *weights, limit=None)
        gradients.append(torch.autograd.grad(y_TD.square().sum(), (x_TD, *weights)))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norms(dtype: torch.dtype) -> None:
    x, weight = random(5, 3, 32, seed=1, dtype=dtype), random(32, seed=2, dtype=torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    push = random(5, 3, 32, seed=3, dtype=dtype).detach()
    with ops.using("aten"):
        found = ops.rms_norm(x, weight, 1e-5)
    with ops.using("reference"):
        wanted = ops.rms_norm(*exact, 1e-5)
    assert found.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    gradients = torch.autograd.grad(found, (x, weight), push), torch.autograd.grad(wanted, exact, push.double())
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, **tolerance)
