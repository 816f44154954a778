"""What Newton-Schulz must reach: singular values near 1 for every shape and condition number up to 1e3."""

import pytest
import torch
from torch import Tensor

from daedal.errors import ConfigError
from daedal.train.newton_schulz import V4_SCHEDULE, checked, orthogonalise

SHAPES = [(64, 64), (48, 130), (130, 48), (1, 40), (40, 1), (3, 24, 56), (2, 3, 33, 20)]


def _conditioned(shape: tuple[int, ...], condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Matrices in float64 whose singular values run evenly in their logarithm from 1 to 1 / condition, and U V^T."""
    *stack, rows, columns = shape
    left, _ = torch.linalg.qr(torch.randn(*stack, rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(*stack, columns, columns, generator=generator, dtype=torch.float64))
    rank = min(rows, columns)
    values = condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    left, right = left[..., :rank], right[..., :rank]
    return left * values @ right.mT, left @ right.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
def test_singular_values_end_near_one(shape: tuple[int, ...], condition: float) -> None:
    matrices, nearest = _conditioned(shape, condition, torch.Generator().manual_seed(1))
    found = orthogonalise(matrices.float())
    assert found.dtype == torch.float32
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found.double())
    assert 0.9 <= values.min() <= values.max() <= 1.1
    # The directions are kept, not only the values: off by no more than the values are.
    assert torch.linalg.matrix_norm(found.double() - nearest, 2).max() < 0.1


def test_the_worst_spectrum_of_a_condition_number() -> None:
    """All values 1 but one at 1e-3: it is the smallest share of the Frobenius norm that the condition number allows."""
    rank = 256
    left, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))
    values = torch.ones(rank, dtype=torch.float64)
    values[-1] = 1e-3
    found = torch.linalg.svdvals(orthogonalise(left * values @ right).double())
    assert 0.9 <= found.min() <= found.max() <= 1.1


def test_the_range_that_the_docstring_promises() -> None:
    """The polynomials alone, on a fine grid of singular values as shares of the Frobenius norm."""
    shares = torch.logspace(-9, 0, 200_001, dtype=torch.float64)
    values = shares.clone()
    for a, b, c in V4_SCHEDULE:
        values = a * values + b * values**3 + c * values**5
    assert 0 <= values.min() <= values.max() <= 1.01
    assert values[shares >= 1.6e-5].min() >= 0.9


def test_five_steps_are_not_enough_and_neither_are_ten_of_a_kind() -> None:
    """The bars above can fail: the usual five steps miss them, and so do ten of either polynomial alone."""
    matrices, _ = _conditioned((96, 128), 1e3, torch.Generator().manual_seed(2))
    for schedule in (V4_SCHEDULE[:5], V4_SCHEDULE[:1] * 10, V4_SCHEDULE[-1:] * 10):
        values = torch.linalg.svdvals(orthogonalise(matrices, schedule))
        assert values.min() < 0.9 or values.max() > 1.1


def test_matrices_of_lower_rank_do_not_blow_up() -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(4, 64, 5, generator=generator) @ torch.randn(4, 5, 96, generator=generator)
    values = torch.linalg.svdvals(orthogonalise(matrices).double())
    assert values.max() <= 1.01
    assert values[:, :5].min() >= 0.9


def test_zero_stays_zero_and_size_does_not_matter() -> None:
    matrix = torch.randn(12, 20)
    stack = torch.stack((matrix, torch.zeros_like(matrix), matrix * 2.0**-120, matrix * 2.0**100))
    found = orthogonalise(stack)
    assert torch.equal(found[1], torch.zeros_like(matrix))
    assert torch.equal(found[2], found[0])  # its squares are far below what float32 holds
    assert torch.equal(found[3], found[0])
    assert orthogonalise(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def test_each_matrix_of_a_stack_is_as_if_alone_and_stays_so_beside_a_broken_one() -> None:
    """Up to the order of sums, which products of one matrix and of many may have for themselves."""
    stack = torch.randn(5, 17, 9, dtype=torch.float64)
    found = orthogonalise(stack)
    for alone, one in zip(found, stack, strict=True):
        torch.testing.assert_close(alone, orthogonalise(one), rtol=0, atol=1e-10)
    stack[2, 3, 4] = torch.nan
    stack[4, 0, 0] = torch.inf
    broken = orthogonalise(stack)
    assert broken[[2, 4]].isnan().all()
    torch.testing.assert_close(broken[[0, 1, 3]], found[[0, 1, 3]], rtol=0, atol=1e-10)


def test_arithmetic() -> None:
    matrices, _ = _conditioned((48, 80), 10.0, torch.Generator().manual_seed(4))
    wide = orthogonalise(matrices)
    assert wide.dtype == torch.float64
    assert (orthogonalise(matrices.float()) - wide).abs().max() < 1e-5
    narrow = orthogonalise(matrices.bfloat16(), dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    values = torch.linalg.svdvals(narrow.double())
    assert 0.9 <= values.min() <= values.max() <= 1.1


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\).*give floats \[..., R, C\]"):
        orthogonalise(torch.ones(3))
    with pytest.raises(ConfigError, match="one triple of coefficients"):
        checked(())
    with pytest.raises(ConfigError, match=r"the text '2\.0'"):
        checked((("2.0", -1.5, 0.5),))  # type: ignore[arg-type]
