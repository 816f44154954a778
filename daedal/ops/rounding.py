"""Rounding weights so that their products stay right: the error of each column is taken up by the columns after it.

What a layer computes is x W^T. Over inputs with second moments H, a change E of W costs trace(E H E^T), which rounding
each number to the nearest does not minimise where inputs are correlated. Columns are rounded one after the other, the
largest inputs first; what each leaves behind is made good by those not yet rounded, as far as H says they can (optimal
brain surgery, Hassibi and Stork 1993; GPTQ, Frantar et al. 2022). Scales and zero points are those of plain rounding,
FP4's alone may be halved; so every reader of a format reads the result. Knows no model and no text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from daedal.layouts import FP4_GROUP
from daedal.ops import formats, integers
from daedal.ops.packed import FORMATS, ZERO_STEPS

# Added to H's diagonal, as a share of its mean. Large, because H comes from some thousand tokens and must serve texts
# of other kinds: with 0.01 the calibration text gains more and all others less (docs/log.md, 2026-11-22).
DAMPING = 0.5

_FP4_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_BLOCK = 128  # columns whose errors are gathered before those behind them are corrected by one product


@dataclass(frozen=True, eq=False)
class Feedback:
    """How columns take up each other's errors. order_K: in which they are rounded; upper_KK: the upper Cholesky factor
    of H's inverse in that order; size_K: H's diagonal.
    """

    size_K: Tensor
    order_K: Tensor
    upper_KK: Tensor


@dataclass(frozen=True, eq=False)
class Coded:
    """A matrix in a format. codes, scale, zero: as `formats` and `integers` give them, zero for int4 alone. values_NK:
    float32, what they stand for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    values_NK: Tensor


@dataclass(frozen=True, eq=False)
class _Grid:
    """Where a matrix may round to: (snap(w / scale + zero) - zero) * scale, scale and zero of each row's groups of
    `group` columns. stored: scales, and zeros as bytes, in the shapes that the format has.
    """

    snap: Callable[[Tensor], Tensor]
    group: int
    scale_Ng: Tensor
    zero_Ng: Tensor
    stored: tuple[Tensor, Tensor | None]


def feedback(hessian_KK: Tensor, *, damping: float = DAMPING) -> Feedback:
    """From second moments of inputs, float [K, K]: the sum of x x^T over tokens, of any scale."""
    size_K = hessian_KK.diagonal().float()
    order_K = torch.argsort(size_K, descending=True, stable=True)
    ordered_KK = hessian_KK[order_K][:, order_K].double()
    mean = float(ordered_KK.diagonal().mean())
    ordered_KK.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(ordered_KK))
    return Feedback(size_K, order_K, torch.linalg.cholesky(inverse_KK, upper=True).float())


def compensated(
    weight_NK: Tensor,
    given: Sequence[Feedback],
    form: str,
    *,
    block: tuple[int, int] = (128, 128),
    power_of_two: bool = False,
) -> Coded:
    """`weight_NK` in a format: "fp8" in blocks of `block`, with scales that are powers of two if wanted; "fp4", "int8",
    "int4". given: one for all rows, or one for each of as many equal runs of rows. CheckpointError for weights that are
    not finite, or that the format cannot hold.
    """
    weight_NK = weight_NK.float()
    size_K = torch.stack([one.size_K for one in given]).sum(0)
    grid = _grid(weight_NK, size_K, form, block, power_of_two)
    rows = weight_NK.shape[0] // len(given)
    runs = zip(given, weight_NK.split(rows), grid.scale_Ng.split(rows), grid.zero_Ng.split(rows), strict=True)
    snapped_NK = torch.cat([_round(*run, grid.group, grid.snap) for run in runs])
    scale_NK, zero_NK = (
        side.repeat_interleave(grid.group, 1)[:, : snapped_NK.shape[1]] for side in (grid.scale_Ng, grid.zero_Ng)
    )
    values_NK = (snapped_NK - zero_NK) * scale_NK
    return Coded(_codes(snapped_NK, form), *grid.stored, values_NK)


def _round(
    given: Feedback,
    weight_NK: Tensor,
    scale_Ng: Tensor,
    zero_Ng: Tensor,
    group: int,
    snap: Callable[[Tensor], Tensor],
) -> Tensor:
    """Snapped numbers [N, K]. Inside, columns lie along the first axis, so that each is contiguous."""
    upper_KK = given.upper_KK
    left_KN = weight_NK.T[given.order_K]
    snapped_KN = torch.empty_like(left_KN)
    scale_gN, zero_gN = scale_Ng.T.contiguous(), zero_Ng.T.contiguous()
    groups = (given.order_K // group).tolist()
    for start in range(0, len(groups), _BLOCK):
        end = min(start + _BLOCK, len(groups))
        errors_BN = torch.empty_like(left_KN[start:end])
        for column in range(start, end):
            scale_N, zero_N = scale_gN[groups[column]], zero_gN[groups[column]]
            code_N = snap(left_KN[column] / scale_N + zero_N)
            error_N = torch.addcmul(left_KN[column], code_N - zero_N, scale_N, value=-1)
            error_N /= upper_KK[column, column]
            left_KN[column + 1 : end].addr_(upper_KK[column, column + 1 : end], error_N, alpha=-1)
            snapped_KN[column], errors_BN[column - start] = code_N, error_N
        left_KN[end:].addmm_(upper_KK[start:end, end:].T, errors_BN, alpha=-1)
    found_KN = torch.empty_like(snapped_KN)
    found_KN[given.order_K] = snapped_KN
    return found_KN.T


def _grid(weight_NK: Tensor, size_K: Tensor, form: str, block: tuple[int, int], power_of_two: bool) -> _Grid:
    """Scales and zero points as plain rounding finds them. A scale of 0 divides as 1."""
    zero_Ng: Tensor | None = None
    if form == "fp8":
        _, stored = formats.quantise_blocks(weight_NK, block, power_of_two=power_of_two)
        scale_Ng = stored.repeat_interleave(block[0], 0)[: weight_NK.shape[0]]
    elif form == "fp4":
        scale_Ng = stored = _scale_fp4(weight_NK, size_K)
    elif form == "int8":
        _, stored = integers.quantise_int8(weight_NK)
        scale_Ng = stored
    else:
        assert form == "int4", form
        _, stored, zero_Ng = integers.quantise_int4(weight_NK)
        scale_Ng = stored
    group = block[1] if form == "fp8" else FORMATS[form].group
    offset_Ng = torch.zeros_like(scale_Ng) if zero_Ng is None else zero_Ng.float() / ZERO_STEPS
    return _Grid(_SNAPS[form], group, torch.where(scale_Ng > 0, scale_Ng, 1.0), offset_Ng, (stored, zero_Ng))


def _scale_fp4(weight_NK: Tensor, size_K: Tensor) -> Tensor:
    """The scale that keeps a group within 6, or half of it where that costs less, columns weighted by their inputs."""
    _, scale_Ng = formats.quantise_fp4(weight_NK)
    grouped_Ngn, size_gn = weight_NK.unflatten(1, (-1, FP4_GROUP)), size_K.unflatten(0, (-1, FP4_GROUP))
    costs = []
    for tried_Ng in (scale_Ng, scale_Ng / 2):
        spread_Ng1 = tried_Ng.unsqueeze(-1)
        change_Ngn = _snap_fp4(grouped_Ngn / spread_Ng1) * spread_Ng1 - grouped_Ngn
        costs.append((change_Ngn.square() * size_gn).sum(-1))
    # 2^-127, half of the smallest normal number, is the smallest scale that can be stored.
    return torch.where((costs[1] < costs[0]) & (scale_Ng > 2.0**-126), scale_Ng / 2, scale_Ng)


def _snap_fp8(ratios: Tensor) -> Tensor:
    return ratios.clamp(-formats.FP8_MAX, formats.FP8_MAX).to(formats.FP8).float()


def _snap_fp4(ratios: Tensor) -> Tensor:
    """The nearest number of e2m1, of two as near the one with the even code."""
    size = ratios.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round_() * step, ratios)


def _snap_int8(ratios: Tensor) -> Tensor:
    return ratios.round().clamp_(-127, 127)


def _snap_int4(ratios: Tensor) -> Tensor:
    return ratios.round().clamp_(0, 15)


_SNAPS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"fp8": _snap_fp8, "fp4": _snap_fp4, "int8": _snap_int8, "int4": _snap_int4}
)


def _codes(snapped_NK: Tensor, form: str) -> Tensor:
    if form == "fp8":
        return snapped_NK.to(formats.FP8)
    if form == "fp4":
        codes = torch.bucketize(snapped_NK.abs(), _FP4_MAGNITUDES).to(torch.uint8)
        return formats.pack_fp4(codes | torch.signbit(snapped_NK).to(torch.uint8) << 3)
    return snapped_NK.to(torch.int8 if form == "int8" else torch.uint8)
