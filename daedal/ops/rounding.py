"""Rounding weights so that their products stay right: the error of each column is taken up by the columns after it.

What a layer computes is x W^T. Over inputs with second moments H, a change E of W costs trace(E H E^T), which rounding
each number to the nearest does not minimise where inputs are correlated. Columns are rounded one after the other, the
largest inputs first; what each leaves behind is made good by those not yet rounded, as far as H says they can (optimal
brain surgery, Hassibi and Stork 1993; GPTQ, Frantar et al. 2022). Where second moments G of the outputs' gradients say
which outputs matter, the cost is trace(G E H E^T), and the rows of a block take up each other's errors in the same way
(both sides: YAQA, Tseng et al. 2025). Scales and zero points are those of plain rounding, FP4's alone may be halved; so
every reader of a format reads the result. Knows no model and no text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.layouts import FP4_GROUP
from daedal.ops import formats, integers
from daedal.ops.packed import ZERO_STEPS
from daedal.packed import FORMATS

# Added to the diagonals of H and G, as a share of their means. Large, because sums over some thousand tokens must serve
# texts of other kinds: with 0.01 the calibration text gains more and all others less (docs/log.md, 2026-11-22).
DAMPING = 0.5

_FP4_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
ROWS = 128  # in a block of rows that take up each other's errors
_TURN = 16  # rows of each block that are rounded at once
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

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each number, [N, K]."""
        return _spread(self.scale_Ng, self.group, columns), _spread(self.zero_Ng, self.group, columns)


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
    outputs_bRR: Tensor | None = None,
) -> Coded:
    """`weight_NK` in a format: "fp8" in blocks of `block`, with scales that are powers of two if wanted; "fp4", "int8",
    "int4". given: one for all rows, or one for each of as many equal runs of rows. outputs_bRR: second moments of the
    gradients of the outputs, for each block of `ROWS` rows, the last filled up with zeros; only with one `given`.
    CheckpointError for weights that are not finite, or that the format cannot hold.
    """
    weight_NK = weight_NK.float()
    size_K = torch.stack([one.size_K for one in given]).sum(0)
    grid = _grid(weight_NK, size_K, form, block, power_of_two)
    if outputs_bRR is not None:
        assert len(given) == 1
        return _coded(_round_rows(given[0], weight_NK, grid, outputs_bRR), grid, form)
    rows = weight_NK.shape[0] // len(given)
    runs = zip(given, weight_NK.split(rows), grid.scale_Ng.split(rows), grid.zero_Ng.split(rows), strict=True)
    snapped_NK = torch.cat([_round(*run, grid.group, grid.snap) for run in runs])
    return _coded(snapped_NK, grid, form)


def _coded(snapped_NK: Tensor, grid: "_Grid", form: str) -> Coded:
    scale_NK, zero_NK = grid.spread(snapped_NK.shape[1])
    return Coded(_codes(snapped_NK, form), *grid.stored, (snapped_NK - zero_NK) * scale_NK)


def nearest(weight_NK: Tensor, form: str, *, block: tuple[int, int] = (128, 128), power_of_two: bool = False) -> Tensor:
    """float32 [N, K]: what plain rounding makes of `weight_NK`, in a format as `compensated` takes it. CheckpointError
    for weights that are not finite, or that the format cannot hold.
    """
    weight_NK = weight_NK.float()
    grid = _grid(weight_NK, None, form, block, power_of_two)
    scale_NK, zero_NK = grid.spread(weight_NK.shape[1])
    return (grid.snap(weight_NK / scale_NK + zero_NK) - zero_NK) * scale_NK


def _round_rows(given: Feedback, weight_NK: Tensor, grid: _Grid, outputs_bRR: Tensor) -> Tensor:
    """Snapped numbers [N, K]. Blocks go side by side, `_TURN` rows of each at a time, those that matter most first; the
    rows of a turn know nothing of each other.
    """
    rows, columns = weight_NK.shape
    order_bR, upper_bRR = _row_feedback(outputs_bRR)
    places_bR = order_bR + ROWS * torch.arange(len(order_bR)).unsqueeze(-1)
    filler = (0, 0, 0, places_bR.numel() - rows)
    scale_Ng, zero_Ng = F.pad(grid.scale_Ng, filler, value=1.0), F.pad(grid.zero_Ng, filler)
    left_bRK = F.pad(weight_NK, filler)[places_bR]
    found_NK = torch.empty(places_bR.numel(), columns)
    for start in range(0, ROWS, _TURN):
        turn, behind = slice(start, start + _TURN), slice(start + _TURN, ROWS)
        places_n = places_bR[:, turn].flatten()
        wanted_nK, scale_ng, zero_ng = left_bRK[:, turn].flatten(0, 1), scale_Ng[places_n], zero_Ng[places_n]
        snapped_nK = _round(given, wanted_nK, scale_ng, zero_ng, grid.group, grid.snap)
        found_NK[places_n] = snapped_nK
        scale_nK, zero_nK = _spread(scale_ng, grid.group, columns), _spread(zero_ng, grid.group, columns)
        error_brK = torch.addcmul(wanted_nK, snapped_nK - zero_nK, scale_nK, value=-1).unflatten(0, (-1, _TURN))
        error_brK = torch.linalg.solve_triangular(upper_bRR[:, turn, turn].mT, error_brK, upper=False)
        left_bRK[:, behind] -= upper_bRR[:, turn, behind].mT @ error_brK
    return found_NK[:rows]


def _row_feedback(outputs_bRR: Tensor) -> tuple[Tensor, Tensor]:
    """For each block the order of its rows, and the upper Cholesky factor of the inverse in that order."""
    size_bR = outputs_bRR.diagonal(dim1=1, dim2=2)
    order_bR = torch.argsort(size_bR, dim=1, descending=True, stable=True)
    ordered_bRR = outputs_bRR.double().take_along_dim(order_bR.unsqueeze(-1), 1)
    ordered_bRR = ordered_bRR.take_along_dim(order_bR.unsqueeze(1), 2)
    mean = float(size_bR.mean())
    ordered_bRR.diagonal(dim1=1, dim2=2).add_(DAMPING * mean if mean > 0 else 1.0)
    inverse_bRR = torch.cholesky_inverse(torch.linalg.cholesky(ordered_bRR))
    return order_bR, torch.linalg.cholesky(inverse_bRR, upper=True).float()


def _spread(side_Ng: Tensor, group: int, columns: int) -> Tensor:
    return side_Ng.repeat_interleave(group, 1)[:, :columns]


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


def _grid(weight_NK: Tensor, size_K: Tensor | None, form: str, block: tuple[int, int], power_of_two: bool) -> _Grid:
    """Scales and zero points as plain rounding finds them, FP4's halved where `size_K` calls for it. A scale of 0
    divides as 1.
    """
    zero_Ng: Tensor | None = None
    if form == "fp8":
        _, stored = formats.quantise_blocks(weight_NK, block, power_of_two=power_of_two)
        scale_Ng = stored.repeat_interleave(block[0], 0)[: weight_NK.shape[0]]
    elif form == "fp4":
        scale_Ng = stored = formats.quantise_fp4(weight_NK)[1] if size_K is None else _scale_fp4(weight_NK, size_K)
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
