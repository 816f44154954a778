"""FP8 and FP4 weights: every code under every scale against transformers and plain arithmetic, rounding, conversion."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from daedal.errors import CheckpointError
from daedal.ops import formats

_SCALE_BYTES = torch.arange(255, dtype=torch.uint8)  # 255 is NaN
_FP4_NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _theirs(codes: Tensor, scale: Tensor) -> Tensor:
    return Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8])
def test_every_fp4_code_under_every_scale(stored: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(16, 16).repeat(255, 1)
    scale = _SCALE_BYTES.repeat_interleave(16).view(-1, 1).view(stored)
    got = formats.dequantise_fp4(packed, scale)
    assert torch.equal(got, _theirs(packed, scale))
    signed = torch.tensor(_FP4_NUMBERS + [-number for number in _FP4_NUMBERS], dtype=torch.float64)
    codes = torch.arange(256).repeat(255)
    powers = torch.exp2(torch.arange(255, dtype=torch.float64) - 127).repeat_interleave(256)
    pairs = torch.stack((signed[codes & 15], signed[codes >> 4]), -1) * powers.unsqueeze(-1)
    assert torch.equal(got.flatten(), pairs.flatten().float()), "the low half of a byte is the even column"


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
def test_every_fp8_code_under_every_scale(stored: torch.dtype) -> None:
    numbers = [code for code in range(256) if code & 127 != 127]  # the others are NaN
    codes = torch.tensor(numbers, dtype=torch.uint8).repeat(255, 1).view(formats.FP8)
    e8m0 = _SCALE_BYTES.view(-1, 1).view(torch.float8_e8m0fnu)
    scale = e8m0.float() if stored == torch.float32 else e8m0.view(stored)
    got = formats.dequantise_blocks(codes, scale, (1, 254))
    assert torch.equal(got, _theirs(codes, scale))
    exact = codes.double() * torch.exp2(_SCALE_BYTES.double() - 127).view(-1, 1)
    assert torch.equal(got, exact.float())


def test_partial_blocks_and_leading_axes() -> None:
    weight = torch.randn(3, 37, 70)
    codes, scale = formats.quantise_blocks(weight, (16, 32))
    assert scale.shape == (3, 3, 3)
    for matrix in range(3):
        alone, alone_scale = formats.quantise_blocks(weight[matrix], (16, 32))
        assert torch.equal(alone.view(torch.uint8), codes[matrix].view(torch.uint8))
        assert torch.equal(alone_scale, scale[matrix])
    values = formats.dequantise_blocks(codes, scale, (16, 32))
    assert torch.equal(values[2, 32:, 64:], codes[2, 32:, 64:].float() * scale[2, 2, 2])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_rounds_to_the_nearest_and_never_overflows(power_of_two: bool) -> None:
    weight = torch.randn(40, 70) * torch.logspace(-30, 30, 70)
    codes, scale = formats.quantise_blocks(weight, (16, 1), power_of_two=power_of_two)
    step = torch.maximum(weight.abs() * 2**-4, scale.repeat_interleave(16, 0)[:40] * 2**-10)
    assert ((formats.dequantise_blocks(codes, scale, (16, 1)) - weight).abs() <= step * 1.001).all()
    largest = codes.float().abs().amax(0)
    assert (largest <= formats.FP8_MAX).all()
    assert (largest > (formats.FP8_MAX / 2 if power_of_two else formats.FP8_MAX * 0.999)).all()
    assert formats.are_powers_of_two(scale) == power_of_two


@pytest.mark.parametrize("edge", [448.0, 448.00003, 447.99997, 0.0, 1e-44, 3e38])
def test_a_power_of_two_for_fp8_is_the_smallest_that_fits(edge: float) -> None:
    weight = torch.tensor([[edge, -edge / 2]])
    codes, scale = formats.quantise_blocks(weight, (128, 128), power_of_two=True)
    expected = 1.0 if edge == 0 else 2.0 ** max(-127, torch.tensor(edge).double().div(448).log2().ceil().item())
    assert scale.item() == expected
    assert torch.isfinite(codes.float()).all()
    assert torch.equal(formats.to_e8m0(scale).float(), scale)


def test_fp4_takes_the_nearest_code_and_the_even_one_halfway() -> None:
    """Against a search over all codes, on a grid that has every midpoint, with a 6 that fixes the scale at 1."""
    grid = torch.arange(-24, 25) / 4
    wanted = []
    for value in grid.tolist():
        distances = [abs(abs(value) - number) for number in _FP4_NUMBERS]
        near = [code for code, distance in enumerate(distances) if distance == min(distances)]
        wanted.append(
            (1 if value >= 0 else -1) * _FP4_NUMBERS[next(code for code in near if code % 2 == 0 or len(near) == 1)]
        )
    row = torch.cat((grid, torch.full((15,), 6.0)))
    packed, scale = formats.quantise_fp4(row.view(2, 32))
    assert torch.equal(scale, torch.ones(2, 1))
    assert formats.dequantise_fp4(packed, scale).flatten()[:49].tolist() == wanted


@pytest.mark.parametrize(
    ("largest", "power"), [(6.0, 0), (6.0000005, 1), (5.9999995, 0), (3.0, -1), (3.1, 0), (2e-38, -127)]
)
def test_fp4_scales_are_the_smallest_powers_that_fit(largest: float, power: int) -> None:
    weight = torch.zeros(1, 64)
    weight[0, 5] = -largest
    packed, scale = formats.quantise_fp4(weight)
    assert scale.flatten().tolist() == [2.0**power, 1.0], "an empty group has scale 1"
    values = formats.dequantise_fp4(packed, scale)
    assert values[0, 5] < 0
    assert (values[0] != 0).sum() == 1


def test_fp4_packs_back_to_the_same_bytes() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(16, 16)
    scale = torch.exp2(torch.arange(-8, 8).float()).view(16, 1)
    again, scale_again = formats.quantise_fp4(formats.dequantise_fp4(packed, scale))
    # Every row but those with no 4 or 6 keeps its scale; signs of zeros stay too.
    kept = scale_again == scale
    assert kept.sum() >= 15
    assert torch.equal(again[kept.flatten()], packed[kept.flatten()])
    assert torch.equal(formats.dequantise_fp4(again, scale_again), formats.dequantise_fp4(packed, scale))


@pytest.mark.parametrize("spread", [0, 8, 14])
def test_fp4_becomes_fp8_exactly_while_scales_lie_close(spread: int) -> None:
    packed = torch.randint(-128, 128, (130, 80), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-spread, 1, (130, 5)).float() - 3)
    scale[0, 0] = scale[129, 4] = 2.0**-3
    codes, scale_bk, exact = formats.fp4_to_fp8(packed, formats.to_e8m0(scale), (128, 128))
    assert exact
    assert torch.equal(formats.dequantise_blocks(codes, scale_bk, (128, 128)), formats.dequantise_fp4(packed, scale))
    assert scale_bk[0, 0] == 2.0**-3 / 64


def test_fp4_that_does_not_fit_into_fp8_says_so_and_stays_near() -> None:
    packed = torch.full((128, 64), 0x77, dtype=torch.int8)
    scale = torch.ones(128, 4)
    scale[3, 2] = 2.0**-20
    codes, scale_bk, exact = formats.fp4_to_fp8(packed, scale, (128, 128))
    assert not exact
    values = formats.dequantise_fp4(packed, scale)
    assert (formats.dequantise_blocks(codes, scale_bk, (128, 128)) - values).abs().max() <= 6 * 2.0**-20


def test_fp4_with_an_empty_group_of_huge_scale_is_still_exact() -> None:
    packed = torch.full((4, 64), 0x11, dtype=torch.int8)
    packed[0, :16] = 0
    scale = torch.full((4, 4), 2.0**-20)
    scale[0, 0] = 2.0**20
    codes, scale_bk, exact = formats.fp4_to_fp8(packed, scale, (128, 128))
    assert exact
    assert torch.equal(formats.dequantise_blocks(codes, scale_bk, (128, 128)), formats.dequantise_fp4(packed, scale))


def _refusals() -> dict[str, tuple[object, str]]:
    fp8, packed = torch.zeros(4, 64).to(formats.FP8), torch.zeros(4, 32, dtype=torch.int8)
    ones = torch.ones(4, 2)
    return {
        "NaN byte": (lambda: formats.scale_values(torch.tensor([3, 255], dtype=torch.uint8)), "byte 255"),
        "NaN byte, typed": (
            lambda: formats.scale_values(torch.tensor([float("nan")]).to(torch.float8_e8m0fnu)),
            "byte 255",
        ),
        "infinite scale": (lambda: formats.dequantise_fp4(packed, ones / 0), "infinities"),
        "negative scale": (lambda: formats.dequantise_fp4(packed, -ones), "negative"),
        "scale shape": (lambda: formats.dequantise_blocks(fp8, ones, (128, 128)), r"\[4, 2\].*\[1, 1\]"),
        "FP4 scale shape": (lambda: formats.dequantise_fp4(packed, ones[:2]), r"\[2, 2\].*\[4, 2\]"),
        "odd columns": (lambda: formats.dequantise_fp4(packed[:, :17], ones), "34 columns"),
        "odd columns, written": (lambda: formats.quantise_fp4(torch.zeros(4, 33)), "33 columns"),
        "infinite weight": (lambda: formats.quantise_fp4(torch.zeros(4, 32) + torch.inf), "infinities or NaN"),
        "NaN weight": (lambda: formats.quantise_blocks(torch.zeros(4, 32) * torch.nan, (2, 2)), "infinities or NaN"),
        "no power of two": (lambda: formats.to_e8m0(torch.tensor([3.0])), "no powers of two"),
        "zero as e8m0": (lambda: formats.to_e8m0(torch.tensor([0.0])), "no powers of two"),
    }


@pytest.mark.parametrize("case", _refusals())
def test_what_is_no_weight_is_refused(case: str) -> None:
    call, message = _refusals()[case]
    with pytest.raises(CheckpointError, match=message):
        call()
