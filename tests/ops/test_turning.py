"""Turns against the matrix written out number by number, and what they are for: products stay, outliers part."""

import pytest
import torch
from torch import Tensor

from daedal.errors import ConfigError
from daedal.ops.arithmetic import TURNS, W8A8, W8A8_TURNED, Arithmetic, quantise_dequantise
from daedal.ops.turning import matrix, turn


def _parity(number: int) -> int:
    return number.bit_count() % 2


def _formula(block: int) -> Tensor:
    """Walsh's functions, behind the signs of Rudin and Shapiro: of pairs of ones next to each other in n."""
    rows = [
        [(-1.0) ** (_parity(n & (n >> 1)) + _parity(n & m)) / block**0.5 for m in range(block)] for n in range(block)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("block", TURNS)
def test_the_matrix_is_the_formula_in_every_dtype_and_orthogonal(block: int) -> None:
    wanted = _formula(block)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix(block, dtype, torch.device("cpu")).double(), wanted)
    assert torch.equal(wanted @ wanted.T, torch.eye(block, dtype=torch.float64))


@pytest.mark.parametrize("columns", [0, 1, 64, 100, 576])
def test_products_stay(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x, weight = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for rows in (7, 5))
    turned = turn(x, 64)
    assert turned.shape == (7, -(-columns // 64) * 64)
    torch.testing.assert_close(turned @ turn(weight, 64).T, x @ weight.T)
    assert turn(x, None) is x
    assert turn(x[:0], 64).shape == (0, turned.shape[1])


def test_outliers_and_constants_are_spread_evenly() -> None:
    one, same = torch.zeros(1, 64), torch.full((1, 64), 3.0)
    one[0, 5] = 80.0
    for x in (one, same):
        assert torch.equal(turn(x, 64).abs(), (x.norm() / 8).expand(1, 64))


def _error(x: Tensor, weight: Tensor, arithmetic: Arithmetic) -> float:
    left, right = turn(x, arithmetic.turned), turn(weight, arithmetic.turned)
    found = quantise_dequantise(left, arithmetic.activations) @ quantise_dequantise(right, arithmetic.weights).T
    exact = x @ weight.T
    return float((found - exact).norm() / exact.norm())


def test_a_column_of_outliers_costs_rows_of_int8_less_when_turned() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 256, generator=generator), torch.randn(64, 256, generator=generator)
    weight[:, 9] *= 0.02
    plain = _error(x, weight, W8A8)
    x[:, 9] *= 100
    assert _error(x, weight, W8A8) > 5 * plain
    assert _error(x, weight, W8A8_TURNED) < 0.7 * _error(x, weight, W8A8)


def test_turns_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="turned is 32: it must be one of 4, 16, 64"):
        Arithmetic(name="mine", activations=W8A8.activations, weights=W8A8.weights, gradients=W8A8.gradients, turned=32)
