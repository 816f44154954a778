"""Native linear maps at every level of this CPU: all formats against float64, and bit-equal whatever the threads and
the batch."""

import pytest
import torch
from torch import Tensor

from daedal import ops
from daedal.ops.backends.cpu import linear, program
from daedal.ops.exactness import exactly
from daedal.ops.packed import Packed
from daedal.packed import FORMATS
from tests.native import needs_kernels
from tests.ops.packs import random_packed

pytestmark = needs_kernels

LEVELS = program.LEVELS
SHAPES = ((5, 33), (37, 96), (96, 320))


def _bound(name: str, x_TK: Tensor, weight: Packed) -> Tensor:
    """[T, N]: the most that a result may be off, before it is rounded to its own type.

    Activations move by half a step of 1/127 of their group's largest, or by bfloat16's 2^-9 of themselves; widened
    weights by 2^-9 of themselves; float32 sums by far less, which 1.05 covers.
    """
    magnitude_TK, columns = x_TK.abs(), weight.columns
    moved_TK = magnitude_TK * 2.0**-8
    if name in ("int8", "int4", "fp4"):
        group = FORMATS[name].group
        padded = torch.nn.functional.pad(magnitude_TK, (0, -columns % group)).unflatten(-1, (-1, group))
        steps = (padded.amax(-1, keepdim=True) / 254).expand(padded.shape).flatten(-2)[..., :columns]
        moved_TK = torch.maximum(moved_TK, steps)
    return 1.05 * moved_TK @ weight.dense(torch.float64).abs().mT + 1e-6


def _check(name: str, y: Tensor, x: Tensor, weight: Packed, bias: Tensor | None = None) -> None:
    x = x.double()
    expected = x @ weight.dense(torch.float64).mT
    if bias is not None:
        expected = expected + bias.double()
    rounding = expected.abs() * (2.0**-8 if y.dtype == torch.bfloat16 else 1e-6)
    assert ((y.double() - expected).abs() <= _bound(name, x, weight) + rounding).all()


@pytest.mark.parametrize("name", FORMATS)
def test_packed(level: str, name: str) -> None:
    for rows, columns in SHAPES:
        weight = random_packed(name, rows, columns)
        for tokens in (0, 1, 3, 17, 70):
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(tokens, columns + 7).to(dtype)[:, :columns]
                bias = torch.randn(rows).to(dtype) if tokens % 2 else None
                with ops.using("cpu"):
                    _check(name, ops.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("name", FORMATS)
def test_strided_and_grouped(level: str, name: str) -> None:
    stack = random_packed(name, 3, 37, 96)
    for tokens in (1, 4, 33):
        x = torch.randn(tokens, 5, 128).bfloat16()[:, 1:4, 16:112]
        with ops.using("cpu"):
            y = ops.grouped_linear(x, stack)
            for group in range(3):
                _check(name, y[:, group], x[:, group], stack[group])
            _check(name, ops.linear(x, stack[0], None), x, stack[0])


def test_many_columns(level: str) -> None:
    """Panels too wide to be widened all at once, and rows that no cache holds."""
    weight = random_packed("int4", 100, 4100)
    x = torch.randn(160, 4100)
    with ops.using("cpu"):
        _check("int4", ops.linear(x, weight, None), x, weight)


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_matter(level: str, name: str) -> None:
    weight = random_packed(name, 85, 320)
    for tokens in (1, 40):
        x = torch.randn(tokens, 320).bfloat16()
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear.linear(x, weight, None))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", FORMATS)
def test_exact_results_do_not_know_their_batch(level: str, name: str) -> None:
    weight = random_packed(name, 37, 320)
    x = torch.randn(21, 320)
    with exactly():
        batch = linear.linear(x, weight, None)
        alone = torch.cat([linear.linear(row, weight, None) for row in x.split(1)])
    assert torch.equal(batch, alone)


@pytest.mark.parametrize("name", ["int8", "int4", "fp4"])
def test_levels_agree(name: str) -> None:
    """Group sums are integers, so that only the float32 sum over groups is left to differ."""
    weight, x = random_packed(name, 37, 320), torch.randn(3, 320)
    results = []
    for level in LEVELS:
        if program.native().use(level):
            with exactly():
                results.append(linear.linear(x, weight, None))
    program.native().use(None)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_its_row(level: str) -> None:
    for name in FORMATS:
        for tokens in (2, 40):
            x = torch.randn(tokens, 96).bfloat16()
            x[0, 70] = float("nan")
            y = linear.linear(x, random_packed(name, 37, 96), None)
            assert y[0].isnan().all()
            assert not y[1:].isnan().any()


def test_float32(level: str) -> None:
    for tokens, rows, columns in ((1, 5, 33), (6, 48, 768), (0, 4, 16), (9, 3, 70)):
        x, weight = torch.randn(tokens, columns + 3)[:, :columns], torch.randn(rows, columns)
        bias = torch.randn(rows).bfloat16()
        expected = x.double() @ weight.double().T + bias.double()
        with ops.using("cpu"):
            y = ops.linear(x, weight, bias)
        assert ((y.double() - expected).abs() <= 2e-6 * (x.double().abs() @ weight.double().abs().T + 1)).all()


def test_replay_reads_new_activations(level: str) -> None:
    weight, x = random_packed("int8", 37, 96), torch.randn(2, 96)
    with program.recording(program.Program()) as recorded:
        y = linear.linear(x, weight, None)
    x.copy_(torch.randn(2, 96))
    recorded.replay()
    assert torch.equal(y, linear.linear(x, weight, None))


def test_declines() -> None:
    x = torch.randn(2, 96)
    weight = random_packed("bf16", 16, 96)
    assert "float64" in _reason(x.double(), weight)
    assert "not packed" in _reason(x.bfloat16(), torch.randn(16, 96).bfloat16())
    assert "gradients" in _reason(x.requires_grad_(), weight)


def _reason(x: Tensor, weight: Tensor | Packed) -> str:
    return next(choice.reason for choice in ops.explain("linear", x, weight, None) if choice.backend == "cpu")
