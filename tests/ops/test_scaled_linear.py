"""Linear layers and experts in every arithmetic against their formulas in float64, gradients included, on every backend
that can; and what a backend for FP8 units hands to them."""

import math

import pytest
import torch
from torch import Tensor, nn

from daedal import ops
from daedal.errors import BackendError
from daedal.model.linear import GroupedLinear, Linear
from daedal.ops.arithmetic import ARITHMETICS, BF16, FP4, FP8, INT8, MXFP8, Arithmetic, Rounding, quantise_dequantise
from daedal.ops.backends import cublas
from daedal.ops.registry import REGISTRY
from daedal.ops.turning import turn

NAMES = tuple(ARITHMETICS)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _formula(x_TD: Tensor, weight_FD: Tensor, grad_TF: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor, Tensor]:
    """y and both gradients in float64, each factor rounded along the axis that its product sums over."""

    def along_columns(matrix: Tensor, rounding: Rounding) -> Tensor:
        turned = turn(matrix, arithmetic.turned)
        wide = turned.to(torch.promote_types(matrix.dtype, torch.float32)).contiguous()
        return quantise_dequantise(wide, rounding).double()

    weight = weight_FD if arithmetic.stored is None else quantise_dequantise(weight_FD, arithmetic.stored)
    y = along_columns(x_TD, arithmetic.activations) @ along_columns(weight, arithmetic.weights).T
    of_x = along_columns(grad_TF, arithmetic.gradients) @ along_columns(weight.T, arithmetic.weights).T
    of_weight = along_columns(grad_TF.T, arithmetic.gradients) @ along_columns(x_TD.T, arithmetic.activations).T
    return y, of_x, of_weight


def _able(backend: str, *args: object) -> bool:
    found = [candidate for candidate in REGISTRY.candidates("scaled_linear") if candidate.backend == backend]
    return bool(found) and found[0].supports(*args) is None


@pytest.mark.parametrize("shape", [(70, 130, 200), (1, 128, 40), (257, 33, 129), (0, 48, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_formula(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    arithmetic, (tokens, columns, rows) = ARITHMETICS[name], shape
    x = _normal(tokens, columns, seed=1, dtype=dtype).requires_grad_()
    # Master weights keep float32 beside activations of fewer bits.
    weight = _normal(rows, columns, seed=2, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    grad = _normal(tokens, rows, seed=3, dtype=dtype)
    wanted = _formula(x.detach(), weight.detach(), grad, arithmetic)
    for backend in ("reference", "aten"):
        if not _able(backend, x, weight, arithmetic):
            continue
        with ops.using(backend):
            y = ops.scaled_linear(x, weight, arithmetic)
            got = (y, *torch.autograd.grad(y, (x, weight), grad))
        assert [tensor.dtype for tensor in got] == [x.dtype, x.dtype, weight.dtype]
        for mine, exact in zip(got, wanted, strict=True):
            step = torch.finfo(mine.dtype).eps if mine.dtype != torch.float64 else 1e-7
            atol = (1e-12 if mine.dtype == torch.float64 else 1e-5) * float(exact.abs().max()) if exact.numel() else 0.0
            torch.testing.assert_close(mine.double(), exact, rtol=step, atol=atol)


def test_bfloat16_units_serve_what_they_hold_exactly_and_no_more() -> None:
    x, weight = _normal(4, 128, dtype=torch.bfloat16), _normal(8, 128)
    chosen = {name: _able("aten", x, weight, found) for name, found in ARITHMETICS.items()}
    assert chosen == {name: name not in ("int8", "w8a8", "w8a8-turned") for name in NAMES}
    assert not _able("aten", x.float(), weight, FP8)
    with ops.using("aten"), pytest.raises(BackendError, match="float32 scales"):
        ops.scaled_linear(x, weight, INT8)


def test_leading_axes_are_tokens() -> None:
    x, weight = _normal(3, 50, 64).requires_grad_(), _normal(20, 64).requires_grad_()
    y = ops.scaled_linear(x, weight, FP8)
    assert torch.equal(y, ops.scaled_linear(x.flatten(0, 1), weight, FP8).view(3, 50, 20))
    together = torch.autograd.grad(y.square().sum(), (x, weight))
    flat = torch.autograd.grad(ops.scaled_linear(x.flatten(0, 1), weight, FP8).square().sum(), (x, weight))
    assert all(torch.equal(mine, other) for mine, other in zip(together, flat, strict=True))
    assert ops.scaled_linear(x[0, 0], weight, FP8).shape == (20,)


def test_gradients_pass_straight_through_to_the_masters() -> None:
    """Weights that round alike have the same result and the same gradients, however far they are from the numbers."""
    assert FP4.stored is not None
    x, weight = _normal(40, 64).requires_grad_(), _normal(32, 64, seed=1)
    rounded = FP4.as_stored(weight)
    assert not torch.equal(rounded, weight)
    outcomes = []
    for start in (weight, rounded):
        master = start.clone().requires_grad_()
        y = ops.scaled_linear(x, master, FP4)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (x, master))))
    assert all(torch.equal(mine, other) for mine, other in zip(*outcomes, strict=True))
    assert (outcomes[0][2] != 0).all(), "no gradient is cut off by the rounding"


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_only_what_wants_a_gradient_gets_one(wants: tuple[bool, bool]) -> None:
    x, weight = _normal(5, 16).requires_grad_(wants[0]), _normal(3, 16).requires_grad_(wants[1])
    ops.scaled_linear(x, weight, FP8).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wants


def test_what_is_not_finite_reaches_the_result() -> None:
    x, weight = _normal(6, 256).requires_grad_(), _normal(200, 256).requires_grad_()
    with torch.no_grad():
        x[2, 7] = math.inf
    y = ops.scaled_linear(x, weight, FP8)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()
    grad = torch.zeros_like(y)
    grad[4, 3] = math.nan
    of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
    assert of_x[4].isnan().all()
    assert of_weight[3].isnan().all()
    with torch.no_grad():
        weight[199, 0] = math.nan
    assert ops.scaled_linear(x[:2], weight, FP8)[:, 128:].isnan().all()


def _error(arithmetic: Arithmetic, x: Tensor, weight: Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((ops.scaled_linear(x, weight, arithmetic) - exact).norm() / exact.norm())


def test_errors_are_as_large_as_was_measured_elsewhere() -> None:
    """Relative, of 256 x 2048 x 512: Gaussian numbers, then 0.5 % of columns fifty times as large."""
    x, weight = _normal(256, 2048, seed=1), _normal(512, 2048, seed=2)
    tile, block = (Rounding(element="e4m3", along=128, across=size, scale="float32") for size in (1, 128))
    plain = Arithmetic(name="v3", activations=tile, weights=block, gradients=tile)
    whole = Rounding(element="e4m3")
    tensorwise = Arithmetic(name="tensor", activations=whole, weights=whole, gradients=whole)
    assert _error(BF16, x, weight) == pytest.approx(0.00235, rel=0.25)
    assert _error(plain, x, weight) == pytest.approx(0.0367, rel=0.02)
    for arithmetic in (FP8, MXFP8, tensorwise):
        assert _error(arithmetic, x, weight) == pytest.approx(0.0372, rel=0.02)
    assert _error(INT8, x, weight) == pytest.approx(0.011, rel=0.1)
    assert _error(FP4, x, weight) == pytest.approx(0.118, rel=0.05)
    x[:, :: 2048 // 10] *= 50
    assert _error(plain, x, weight) < 0.9 * _error(FP8, x, weight) < 0.04


def _experts_slowly(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    total = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = ops.scaled_linear(x[tokens], gate_up[expert], FP4).chunk(2, -1)
            hidden = ops.swiglu(gate, up, limit=limit)
            result = ops.scaled_linear(hidden, down[expert], FP4)
            total = total.index_add(0, tokens, result * weights[tokens, place].unsqueeze(-1))
    return total


def test_experts_are_their_linear_layers() -> None:
    """Expert 2 has no token; token 0 names expert 1 twice."""
    x, weights = _normal(9, 64).requires_grad_(), _normal(9, 2, seed=1).requires_grad_()
    ids = torch.tensor([[1, 1], [0, 3], [3, 1], [0, 1], [3, 0], [1, 3], [0, 3], [1, 0], [3, 1]])
    gate_up, down = _normal(4, 64, 64, seed=2).requires_grad_(), _normal(4, 64, 32, seed=3).requires_grad_()
    leaves = (x, weights, gate_up, down)
    got = ops.scaled_experts(x, ids, weights, gate_up, down, FP4, limit=2.0)
    wanted = _experts_slowly(x, ids, weights, gate_up, down, limit=2.0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    cotangent = _normal(9, 64, seed=4)
    grads, exact = (torch.autograd.grad(result, leaves, cotangent) for result in (got, wanted))
    for mine, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert not grads[2][2].any()
    assert not torch.allclose(got, ops.experts(x, ids, weights, gate_up, down, limit=2.0), rtol=1e-2)
    with ops.using("aten"):
        halved = ops.scaled_experts(x.bfloat16(), ids, weights, gate_up, down, FP4, limit=2.0)
    torch.testing.assert_close(halved.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


def test_experts_without_tokens_have_gradients_of_nought() -> None:
    gate_up, down = _normal(4, 64, 64).requires_grad_(), _normal(4, 64, 32).requires_grad_()
    none = torch.zeros(0, 2)
    y = ops.scaled_experts(torch.zeros(0, 64), none.long(), none, gate_up, down, FP8)
    assert y.shape == (0, 64)
    grads = torch.autograd.grad(y.sum(), (gate_up, down))
    assert [grad.shape for grad in grads] == [gate_up.shape, down.shape]
    assert not any(grad.any() for grad in grads)


def test_layers_without_an_arithmetic_are_what_they_were_and_with_one_are_rounded() -> None:
    x, linear = _normal(7, 64), Linear(64, 20)
    nn.init.normal_(linear.bias)
    assert torch.equal(linear(x), ops.linear(x, linear.weight, linear.bias))
    linear.arithmetic = FP8
    assert torch.equal(linear(x), ops.scaled_linear(x, linear.weight, FP8) + linear.bias)
    assert not torch.equal(linear(x), ops.linear(x, linear.weight, linear.bias))
    grouped = GroupedLinear(3, 16, 5)
    nn.init.normal_(grouped.weight)
    y_TGC = _normal(7, 3, 16)
    assert torch.equal(grouped(y_TGC), ops.grouped_linear(y_TGC, grouped.weight.unflatten(0, (3, 5))).flatten(1))
    grouped.arithmetic = FP8
    parts = [ops.scaled_linear(y_TGC[:, group], grouped.weight[5 * group : 5 * group + 5], FP8) for group in range(3)]
    assert torch.equal(grouped(y_TGC), torch.cat(parts, 1))


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (70, 130), (1, 640)])
@pytest.mark.parametrize("rounding", [FP8.activations, FP8.weights])
def test_fp8_units_are_handed_the_same_numbers(rounding: Rounding, rows: int, columns: int) -> None:
    """Codes and scales, in the layout that is asked for, stand for what the reference multiplies."""
    x = _normal(rows, columns)
    codes, scale, recipe = cublas.operand(x, rounding)
    assert codes.dtype == torch.float8_e4m3fn
    assert all(size % 128 == 0 for size in codes.shape)
    assert scale.stride(0) == 1
    if rounding == FP8.weights:
        assert scale.shape[0] % 4 == 0
        spread = scale.T[:, : codes.shape[1] // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        spread = scale.repeat_interleave(128, 1)
    values = codes.float() * spread
    assert torch.equal(values[:rows, :columns], quantise_dequantise(x, rounding))
    assert not values[rows:].any()
    assert not values[:, columns:].any()
    assert recipe.name == ("BlockWise128x128" if rounding == FP8.weights else "BlockWise1x128")


@pytest.mark.parametrize("right", [FP8.activations, FP8.weights])
def test_torch_accepts_the_layout_of_fp8_products(right: Rounding) -> None:
    """Torch checks shapes and strides of scales on tensors that hold no data, too."""
    left_MK, right_NK = torch.empty(70, 256, device="meta"), torch.empty(384, 256, device="meta")
    product = cublas.multiply(left_MK, FP8.activations, right_NK, right, torch.float32)
    assert product.shape == (70, 384)
    assert product.dtype == torch.float32


def test_fp8_units_say_why_they_decline() -> None:
    x, weight = _normal(4, 128), _normal(128, 128)
    reasons = {choice.backend: choice.reason for choice in ops.explain("scaled_linear", x, weight, FP8)}
    assert reasons["cublas"] == "has these products on NVIDIA's sm_90 alone, and this is CPU"
    reasons = {choice.backend: choice.reason for choice in ops.explain("scaled_linear", x, weight, MXFP8)}
    assert "which mxfp8 is not" in reasons["cublas"]
    with ops.using("cublas"), pytest.raises(BackendError, match="declines scaled_linear"):
        ops.scaled_linear(x, weight, FP8)


@pytest.mark.skipif(not HOPPER, reason="needs a device of compute capability 9")
@pytest.mark.parametrize("arithmetic", [FP8, FP4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_units_equal_the_reference(dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    x = _normal(300, 512, seed=1, dtype=dtype).cuda().requires_grad_()
    weight = _normal(384, 512, seed=2).cuda().requires_grad_()
    grad = _normal(300, 384, seed=3, dtype=dtype).cuda()
    outcomes = []
    for backend in ("reference", "aten", "cublas"):
        with ops.using(backend):
            y = ops.scaled_linear(x, weight, arithmetic)
            outcomes.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    for wanted, *others in zip(*outcomes, strict=True):
        for mine in others:
            assert (mine - wanted).norm() < (1e-3 if mine.dtype == torch.float32 else 4e-3) * wanted.norm()
