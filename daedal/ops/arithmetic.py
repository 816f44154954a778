"""Arithmetics of training: to which numbers the factors of a matrix product are rounded before they meet.

A `Rounding` names an element format and the groups that share a scale; an `Arithmetic` gives one to activations,
weights and gradients. Rounded tensors keep their dtype, so that every format runs on every device. Under power-of-two
scales they are exact in bfloat16, and so are products on units that take bfloat16 and sum in float32. Sums, master
weights and all that is no product of a linear layer are no business of this file. Formats: e4m3 and e5m2 (Micikevicius
et al., 2022), e2m1 in groups of 32 (OCP microscaling 1.0), int8 in blocks of 32 x 32 (Jetfire), HiF8 (Luo et al., 2024,
arXiv 2409.16626). Recipes: V3, section 3.3; V4, section 3.4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.errors import ConfigError

Element = Literal["bfloat16", "e4m3", "e5m2", "e2m1", "int8", "hif8"]
Scale = Literal["none", "power_of_two", "float32"]


@dataclass(frozen=True)
class _Float:
    """mantissa: stored bits. least: exponent of the smallest normal number. largest: finite number."""

    mantissa: int
    least: int
    largest: float


_FLOATS: Mapping[str, _Float] = MappingProxyType(
    {"e4m3": _Float(3, -6, 448.0), "e5m2": _Float(2, -14, 57344.0), "e2m1": _Float(1, 0, 6.0)}
)
_LARGEST: Mapping[str, float] = MappingProxyType(
    {"int8": 127.0, "hif8": 2.0**15} | {name: form.largest for name, form in _FLOATS.items()}
)
# Powers of four: their roots are exact in every dtype, and a constant is spread evenly.
TURNS = (4, 16, 64, 256, 1024)
# From here down, code times scale could leave the normal numbers of float32 and bfloat16, which units may flush.
_LEAST_EXPONENT = -100


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a factor [M, K], summed over K, is rounded to nearest: ties to even, in hif8 away from zero as it defines.

    along, across: columns and rows of the groups that share a scale, None for all; the last may be partial. scale:
    powers of two are rounded up, so that nothing overflows; "none" for bfloat16 alone. largest: what the largest
    magnitude of a group is brought to, or below it; None for the largest number of the format. ConfigError for what
    does not fit together.
    """

    element: Element
    along: int | None = None
    across: int | None = None
    scale: Scale = "power_of_two"
    largest: float | None = None

    def __post_init__(self) -> None:
        if self.element != "bfloat16" and self.element not in _LARGEST:
            raise ConfigError(f"element is {self.element!r}: it must be one of bfloat16, {', '.join(_LARGEST)}")
        if (self.element == "bfloat16") != (self.scale == "none"):
            raise ConfigError(f"element {self.element} has scale {self.scale!r}: only bfloat16 has none")
        if self.scale not in ("none", "power_of_two", "float32"):
            raise ConfigError(f"scale is {self.scale!r}: it must be none, power_of_two or float32")
        for name, size in (("along", self.along), ("across", self.across)):
            if size is not None and size < 1:
                raise ConfigError(f"{name} is {size}: a group has 1 number at least, or give None for a whole axis")
        if self.largest is not None and not 0 < self.largest <= _LARGEST.get(self.element, 0.0):
            raise ConfigError(f"largest is {self.largest}: {self.element} reaches {_LARGEST.get(self.element)}")

    @property
    def fits_bfloat16(self) -> bool:
        """Whether bfloat16 holds every rounded number exactly: no code has more than 8 bits."""
        return self.scale != "float32"

    @property
    def transposed(self) -> "Rounding":
        """The same groups in the transposed matrix."""
        return replace(self, along=self.across, across=self.along)

    def __str__(self) -> str:
        if self.scale == "none":
            return self.element
        across, along = (size or "all" for size in (self.across, self.along))
        return f"{self.element} {across}x{along} {self.scale}"


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Roundings of the three products of a linear layer y = x w^T, each along the axis that it sums over.

    Forward: x and w; gradient of x: gradients and w; of w: gradients and x, along the tokens. stored: what weights are
    rounded to first, along their own columns, as they will be shipped (quantisation-aware); gradients pass straight
    through to the weights that were rounded. turned: so many numbers next to each other along the summed axis are
    spread over one another in both factors before they are rounded (`ops.turning`), which parts outliers and changes
    no product; None for not.
    """

    name: str
    activations: Rounding
    weights: Rounding
    gradients: Rounding
    stored: Rounding | None = None
    turned: int | None = None

    def __post_init__(self) -> None:
        if self.turned is not None and self.turned not in TURNS:
            raise ConfigError(f"turned is {self.turned}: it must be one of {', '.join(map(str, TURNS))}, or None")

    @property
    def fits_bfloat16(self) -> bool:
        """Whether all factors are exact in bfloat16."""
        return all(rounding.fits_bfloat16 for rounding in (self.activations, self.weights, self.gradients))

    def as_stored(self, weight_FD: Tensor) -> Tensor:
        """The weights that take part in products, before they are rounded for them."""
        return weight_FD if self.stored is None else quantise_dequantise(weight_FD, self.stored)


def quantise_dequantise(x: Tensor, rounding: Rounding, axis: int = -1) -> Tensor:
    """x [..., M, K] rounded, in its own dtype (computed in float32 at least). axis: the summed one, -1 or -2.

    A group that holds an infinity or NaN becomes NaN throughout. Has no gradient.
    """
    if rounding.scale == "none":
        return x.detach().bfloat16().to(x.dtype)
    assert axis in (-1, -2)
    if axis == -2:
        rounding = rounding.transposed
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        # Three times as fast where memory is read in its order.
        return quantise_dequantise(x.mT, rounding.transposed).mT
    blocks, scale = _rounded(x, rounding)
    return _joined(blocks.mul_(scale), x).to(x.dtype)


def quantise(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(codes [..., M, K], scales [..., M / across, K / along]), both as float32 numbers (float64 stays), K summed over.

    Code times scale is what `quantise_dequantise` gives. For formats with a scale.
    """
    blocks, scale = _rounded(x, rounding)
    return _joined(blocks, x), scale.squeeze(-1).squeeze(-2)


@torch.no_grad()
def _rounded(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes [..., m, across, k, along] of the padded matrix, and scales [..., m, 1, k, 1]."""
    wide = x if x.dtype == torch.float64 else x.float()
    blocks = _blocks(wide, rounding)
    scale = _scales(blocks.abs().amax((-3, -1), keepdim=True), rounding)
    return _to_element(blocks / scale, rounding.element), scale


def _blocks(x_MK: Tensor, rounding: Rounding) -> Tensor:
    rows, columns = x_MK.shape[-2:]
    across, along = rounding.across or max(rows, 1), rounding.along or max(columns, 1)
    pad_rows, pad_columns = -rows % across, -columns % along
    if pad_rows or pad_columns:
        x_MK = F.pad(x_MK, (0, pad_columns, 0, pad_rows))
    by_columns: Tensor = x_MK.unflatten(-1, ((columns + pad_columns) // along, along))
    blocks: Tensor = by_columns.unflatten(-3, ((rows + pad_rows) // across, across))
    return blocks


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[-2:]
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def _scales(largest: Tensor, rounding: Rounding) -> Tensor:
    """Scales from the largest magnitudes of groups: 1 for nought, NaN where a number is not finite."""
    target = rounding.largest or _LARGEST[rounding.element]
    if rounding.scale == "power_of_two":
        mantissa, exponent = math.frexp(target)
        found, power = torch.frexp(largest)
        power = (power - exponent + (found > mantissa)).clamp_min(_LEAST_EXPONENT)
        scale = torch.ldexp(torch.ones_like(largest), power)
    else:
        scale = (largest / target).clamp_min(2.0**_LEAST_EXPONENT)
    scale = torch.where(largest > 0, scale, 1.0)
    return torch.where(torch.isfinite(largest), scale, torch.nan)


def _to_element(values: Tensor, element: Element) -> Tensor:
    """The nearest numbers of the format; none lies beyond its largest."""
    if element == "int8":
        return values.round_()
    if element == "hif8":
        return _to_hif8(values)
    form = _FLOATS[element]
    step = _binade(values).clamp_(min=2.0**form.least).mul_(2.0**-form.mantissa)
    return values.div_(step).round_().mul_(step)


def _to_hif8(values: Tensor) -> Tensor:
    """Halfway between two numbers the one farther from zero wins."""
    exponents = _binade(values).float().view(torch.int32) >> 23
    steps = torch.tensor(_HIF8_STEPS, dtype=values.dtype, device=values.device)
    step = steps.index_select(0, exponents.flatten()).view_as(values)
    values = values.div_(step)
    whole = values.trunc()
    beyond_half = values.sub_(whole).mul_(2).trunc_()
    return whole.add_(beyond_half).mul_(step)


def _hif8_step(exponent: int) -> float:
    """From one number to the next where numbers start with 2^exponent: 3 bits of mantissa for exponents up to 3 away
    from 0, then 2 up to 7, then 1 from -15 to 15, then none down to 2^-22.
    """
    if exponent < -15:
        return 2.0 ** max(exponent, -22)
    mantissa = 3 if abs(exponent) <= 3 else 2 if abs(exponent) <= 7 else 1
    return 2.0 ** (exponent - mantissa)


# By float32's own exponent, which is 255 for what is not finite.
_HIF8_STEPS = (*(_hif8_step(exponent - 127) for exponent in range(255)), math.nan)


def _binade(values: Tensor) -> Tensor:
    """The power of two at or below each magnitude: its exponent bits alone. 0 below the normal numbers, infinity for
    infinity and NaN.
    """
    if values.dtype == torch.float64:
        return (values.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32)


_BFLOAT16 = Rounding(element="bfloat16", scale="none")
_TILE = Rounding(element="e4m3", along=128, across=1)
_BLOCK = Rounding(element="e4m3", along=128, across=128)
_MX = Rounding(element="e4m3", along=32, across=1)
_MX_FP4 = Rounding(element="e2m1", along=32, across=1)
_SQUARE_INT8 = Rounding(element="int8", along=32, across=32, scale="float32")
_ROW_INT8 = Rounding(element="int8", across=1, scale="float32")
_HIF8 = Rounding(element="hif8", largest=15.0)
_HIF8_GRADIENT = Rounding(element="hif8", largest=224.0)

BF16 = Arithmetic(name="bf16", activations=_BFLOAT16, weights=_BFLOAT16, gradients=_BFLOAT16)
# V3's tiles and blocks with V4's scales. Square blocks are the same for a matrix and its transpose.
FP8 = Arithmetic(name="fp8", activations=_TILE, weights=_BLOCK, gradients=_TILE)
# Groups of 32 along whatever is summed, so weights are rounded anew for the gradient of x.
MXFP8 = Arithmetic(name="mxfp8", activations=_MX, weights=_MX, gradients=_MX)
# e2m1 numbers are e4m3 numbers under another power of two, so the second rounding of weights is exact, unless scales of
# groups within a block of 128 x 128 lie more than 2^14 apart.
FP4 = Arithmetic(name="fp4", activations=_TILE, weights=_BLOCK, gradients=_TILE, stored=_MX_FP4)
# As Jetfire: 32 x 32 for all factors.
INT8 = Arithmetic(name="int8", activations=_SQUARE_INT8, weights=_SQUARE_INT8, gradients=_SQUARE_INT8)
# A scale for each token and each row of a matrix, which is what int8 units without finer scales multiply.
W8A8 = Arithmetic(name="w8a8", activations=_ROW_INT8, weights=_ROW_INT8, gradients=_ROW_INT8)
# The same units, and outliers parted before they are rounded: the only help that needs no finer scales.
W8A8_TURNED = replace(W8A8, name="w8a8-turned", turned=64)
# One scale for a tensor. Forward, its largest number is brought to the end of the range with 3 bits of mantissa;
# gradients, which spread wider, to that with 2.
HIF8 = Arithmetic(name="hif8", activations=_HIF8, weights=_HIF8, gradients=_HIF8_GRADIENT)

ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {arithmetic.name: arithmetic for arithmetic in (BF16, FP8, MXFP8, FP4, INT8, W8A8, W8A8_TURNED, HIF8)}
)
