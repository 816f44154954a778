"""Roundings of training against number lists written out code by code, and what the recipes rest on: exactness in
bfloat16, FP4 inside FP8, no bias, and nothing that is not finite hidden."""

import math
from bisect import bisect_left
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from daedal.errors import ConfigError
from daedal.ops import formats
from daedal.ops.arithmetic import ARITHMETICS, FP4, FP8, HIF8, INT8, Rounding, quantise, quantise_dequantise

SCALED = ("e4m3", "e5m2", "e2m1", "int8", "hif8")
EVERY = {
    str(rounding): rounding
    for arithmetic in ARITHMETICS.values()
    for rounding in (arithmetic.activations, arithmetic.weights, arithmetic.gradients, arithmetic.stored)
    if rounding is not None
}


def _normal(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Gaussian; with `spread`, rows and columns of magnitudes up to 2^spread apart."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.exp2(spread * (torch.rand(shape, generator=generator) - 0.5)) if spread else values


def _magnitudes(element: str) -> list[float]:
    """The numbers from 0 up, in the order of their codes."""
    if element == "int8":
        return [float(code) for code in range(128)]
    if element == "hif8":
        return sorted(number for number in map(_hif8, range(128)) if math.isfinite(number))
    bits, bias, count = {"e4m3": (3, 7, 127), "e5m2": (2, 15, 124), "e2m1": (1, 1, 8)}[element]
    return [_minifloat(code >> bits, code & (1 << bits) - 1, bits, bias) for code in range(count)]


def _minifloat(exponent: int, fraction: int, bits: int, bias: int) -> float:
    significand = fraction / 2**bits + (exponent > 0)
    return float(significand * 2.0 ** (max(exponent, 1) - bias))


def _hif8(code: int) -> float:
    """Seven bits behind the sign: a prefix names the width of the exponent, which has a sign and no leading 1."""
    text = f"{code:07b}"
    if text.startswith("0000"):
        return 2.0 ** (int(text[4:], 2) - 23) if code else 0.0
    widths = {"11": 4, "10": 3, "01": 2, "001": 1, "0001": 0}
    prefix, width = next((start, width) for start, width in widths.items() if text.startswith(start))
    exponent, fraction = text[len(prefix) : len(prefix) + width], text[len(prefix) + width :]
    size = int("1" + exponent[1:], 2) if width else 0
    if code == 0b1101111:
        return math.inf
    return float((1 + int(fraction, 2) / 2 ** len(fraction)) * 2.0 ** (-size if exponent.startswith("1") else size))


def _nearest(value: float, numbers: list[float], element: str) -> float:
    size = abs(value)
    above = min(bisect_left(numbers, size), len(numbers) - 1)
    below = max(above - 1, 0)
    low, high = numbers[below], numbers[above]
    if size - low == high - size:
        best = high if element == "hif8" or above % 2 == 0 else low
    else:
        best = low if size - low < high - size else high
    return math.copysign(best, value)


def _slowly(x_MK: Tensor, rounding: Rounding) -> Tensor:
    """Group by group and number by number in Python's float64."""
    numbers = _magnitudes(rounding.element)
    target = rounding.largest or numbers[-1]
    rows, columns = x_MK.shape
    across, along = rounding.across or rows, rounding.along or columns
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for top in range(0, rows, across):
        for left in range(0, columns, along):
            group = x_MK[top : top + across, left : left + along]
            largest = float(group.abs().max())
            scale = 1.0
            if largest and rounding.scale == "power_of_two":
                scale = 2.0 ** (math.frexp(largest)[1] - math.frexp(target)[1] - 1)
                while scale * target < largest:
                    scale *= 2
            elif largest:
                scale = float(torch.tensor(largest, dtype=x_MK.dtype) / target)
            for row in range(group.shape[0]):
                for column in range(group.shape[1]):
                    ratio = float(group[row, column] / torch.tensor(scale, dtype=x_MK.dtype))
                    code = _nearest(ratio, numbers, rounding.element)
                    result[top + row, left + column] = float(torch.tensor(code, dtype=x_MK.dtype) * scale)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["power_of_two", "float32"])
@pytest.mark.parametrize("element", SCALED)
def test_equals_a_search_among_the_numbers_of_the_format(element: str, scale: str, dtype: torch.dtype) -> None:
    x_MK = _normal(7, 45, spread=12).to(dtype)
    x_MK[2, 16:32] = 0
    for along, across in ((16, 1), (16, 4), (None, None)):
        rounding = Rounding(element=element, along=along, across=across, scale=scale)
        rounded = quantise_dequantise(x_MK, rounding)
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded.double(), _slowly(x_MK, rounding), rtol=0, atol=0)
        codes, scales = quantise(x_MK, rounding)
        assert codes.abs().max() <= _magnitudes(element)[-1] * (1 + 1e-6)
        assert scales.shape == (-(-7 // (across or 7)), -(-45 // (along or 45)))


@pytest.mark.parametrize("element", SCALED)
def test_numbers_of_the_format_stay_and_halves_go_where_they_should(element: str) -> None:
    numbers = torch.tensor(_magnitudes(element))
    middles = (numbers[1:] + numbers[:-1]) / 2
    x_1K = torch.cat((numbers, -numbers, middles, -middles)).unsqueeze(0)
    wanted = [_nearest(float(value), numbers.tolist(), element) for value in x_1K[0]]
    rounded = quantise_dequantise(x_1K, Rounding(element=element))
    assert torch.equal(rounded[0], torch.tensor(wanted))
    if element == "hif8":
        assert torch.equal(rounded[0, 2 * len(numbers) :][: len(middles)], numbers[1:])


def test_hif8_has_the_numbers_of_its_publication() -> None:
    """7 exponents with 3 bits of mantissa, 8 with 2, 16 with 1, and 7 more powers of two: 38 binades."""
    mantissas: dict[int, int] = {}
    for number in _magnitudes("hif8")[1:]:
        exponent = math.frexp(number)[1] - 1
        mantissas[exponent] = mantissas.get(exponent, 0) + 1
    assert sorted(mantissas) == list(range(-22, 16))
    del mantissas[15]  # shared with infinity
    assert [list(mantissas.values()).count(count) for count in (8, 4, 2, 1)] == [7, 8, 15, 7]


@pytest.mark.parametrize(("element", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_equals_torchs_own_conversion(element: str, dtype: torch.dtype) -> None:
    x_MK = _normal(64, 256, spread=24)
    codes, scales = quantise(x_MK, Rounding(element=element))
    assert torch.equal(codes, (x_MK / scales).to(dtype).float())


def test_equals_the_formats_of_checkpoints() -> None:
    weight_FD = _normal(200, 320, spread=9)
    codes, scales = formats.quantise_blocks(weight_FD, (128, 128), power_of_two=True)
    exported = formats.dequantise_blocks(codes, scales, (128, 128))
    assert torch.equal(quantise_dequantise(weight_FD, FP8.weights), exported)
    assert FP4.stored is not None
    exported = formats.dequantise_fp4(*formats.quantise_fp4(weight_FD))
    assert torch.equal(quantise_dequantise(weight_FD, FP4.stored), exported)


@pytest.mark.parametrize("name", EVERY)
def test_axis_and_memory_order_do_not_matter(name: str) -> None:
    x_MK = _normal(150, 140, spread=6)
    wanted = quantise_dequantise(x_MK, EVERY[name])
    assert torch.equal(quantise_dequantise(x_MK.T.contiguous(), EVERY[name], axis=-2), wanted.T)
    assert torch.equal(quantise_dequantise(x_MK.T.contiguous().T, EVERY[name]), wanted)
    stacked = quantise_dequantise(torch.stack((x_MK, 3 * x_MK)), EVERY[name])
    assert torch.equal(stacked[0], wanted)
    assert torch.equal(stacked[1], quantise_dequantise(3 * x_MK, EVERY[name]))


@pytest.mark.parametrize("name", EVERY)
def test_powers_of_two_leave_numbers_and_products_exact(name: str) -> None:
    rounding = EVERY[name]
    left = quantise_dequantise(_normal(96, 256, seed=1, spread=60), rounding)
    right = quantise_dequantise(_normal(96, 256, seed=2, spread=60), rounding)
    exact = torch.equal(left.bfloat16().float(), left)
    assert exact == rounding.fits_bfloat16
    if exact:
        assert torch.equal((left * right).double(), left.double() * right.double())


def test_fp4_is_exact_in_fp8_as_far_as_its_scales_lie_together() -> None:
    assert FP4.stored is not None
    weight_FD = _normal(256, 256, seed=3) * torch.exp2(torch.arange(256) % 8)[:, None]  # 2^7 apart
    stored = FP4.as_stored(weight_FD)
    assert not torch.equal(stored, weight_FD)
    assert torch.equal(quantise_dequantise(stored, FP4.weights), stored)
    plain = quantise_dequantise(stored, replace(FP4.weights, scale="float32"))
    error = (plain - stored).norm() / stored.norm()
    assert 0.01 < error < 0.05, "float32 scales round a second time"
    wide = FP4.as_stored(weight_FD * torch.exp2(2.0 * (torch.arange(256) % 16))[:, None])
    assert not torch.equal(quantise_dequantise(wide, FP4.weights), wide), "beyond 2^14 the claim must end"


@pytest.mark.parametrize("name", EVERY)
def test_rounding_has_no_bias(name: str) -> None:
    x_MK = _normal(512, 512, seed=4)
    error = (quantise_dequantise(x_MK, EVERY[name]) - x_MK).double()
    assert error.std() > 0
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5
    # Away from zero there is a little, because a Gaussian thins out within each step; cutting off would give 0.8.
    assert abs((error * x_MK.sign()).mean()) < 0.2 * error.std()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_finite_stays_in_sight(name: str, bad: float) -> None:
    x_MK = _normal(140, 300, seed=5)
    clean = quantise_dequantise(x_MK, EVERY[name])
    x_MK[130, 131] = bad
    rounded = quantise_dequantise(x_MK, EVERY[name])
    assert not torch.isfinite(rounded[130, 131])
    across, along = EVERY[name].across or 140, EVERY[name].along or 300
    if EVERY[name].scale == "none":
        across, along = 1, 1
    elsewhere = torch.ones(140, 300, dtype=torch.bool)
    top, left = 130 // across * across, 131 // along * along
    elsewhere[top : top + across, left : left + along] = False
    assert torch.equal(rounded[elsewhere], clean[elsewhere])


@pytest.mark.parametrize("name", EVERY)
def test_nought_and_the_ends_of_float32(name: str) -> None:
    rounding = EVERY[name]
    assert torch.equal(quantise_dequantise(torch.zeros(3, 5), rounding), torch.zeros(3, 5))
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        assert quantise_dequantise(torch.zeros(rows, columns), rounding).shape == (rows, columns)
    largest = torch.finfo(torch.float32).max
    x_14 = torch.tensor([[largest * 0.4, -largest / 5, 1.0, 0.0]])
    torch.testing.assert_close(quantise_dequantise(x_14, rounding)[0, :2], x_14[0, :2], rtol=0.3, atol=0)
    tiny = quantise_dequantise(torch.tensor([[1e-45, -1e-38, 1e-30]]), rounding)
    assert torch.isfinite(tiny).all()
    assert (tiny.abs() < 2e-30).all()


def test_named_arithmetics_are_what_their_publications_say() -> None:
    assert str(FP8.activations) == str(FP8.gradients) == "e4m3 1x128 power_of_two"
    assert str(FP8.weights) == "e4m3 128x128 power_of_two"
    assert str(FP4.stored) == "e2m1 1x32 power_of_two"
    assert str(INT8.weights) == str(INT8.activations) == "int8 32x32 float32"
    assert str(HIF8.weights) == "hif8 allxall power_of_two"
    too_wide = [name for name, found in ARITHMETICS.items() if not found.fits_bfloat16]
    assert too_wide == ["int8", "w8a8", "w8a8-turned"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"element": "e3m4"}, "must be one of bfloat16, int8, hif8, e4m3"),
        ({"element": "bfloat16"}, "only bfloat16 has none"),
        ({"element": "e4m3", "scale": "none"}, "only bfloat16 has none"),
        ({"element": "e4m3", "scale": "e8m0"}, "must be none, power_of_two or float32"),
        ({"element": "e4m3", "along": 0}, "along is 0"),
        ({"element": "e4m3", "largest": 449.0}, "reaches 448"),
    ],
)
def test_a_rounding_that_cannot_be_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rounding(**wrong)
