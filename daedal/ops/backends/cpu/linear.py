"""Linear maps on native kernels: packed matrices and stacks of them, and plain float32 matrices.

Activations are rounded as the kernels need: to eight bits per group of columns for int8, int4 and fp4 weights, to
bfloat16 for the others and where many rows go through the matrix unit. Plain bfloat16 matrices are declined: PyTorch
reads those as fast. Knows nothing of layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from daedal.ops.backends.cpu.program import TYPES, call, recorder
from daedal.ops.backends.cpu.rows import BACKEND, FLOATS, declines
from daedal.ops.exactness import is_exact
from daedal.ops.packed import Packed
from daedal.ops.registry import REGISTRY
from daedal.packed import FORMATS, PANEL, padded_columns

FORMAT_NUMBERS = {name: number for number, name in enumerate(FORMATS)}

_SIDE = 8  # bytes that a group of a prepared row takes beside its codes
_WIDENED = 768 << 10  # as in matmul.h
# Plain float32: PyTorch's matrix product overtakes a loop of dot products.
_MOST_PLAIN = 32
# So few rows never go through the matrix unit.
_FEW = 2


class _Rows(NamedTuple):
    """Rows in memory, row i at (i // inner) * outer + (i % inner) * step elements."""

    number: int
    inner: int
    outer: int
    step: int


def _rows(x: Tensor) -> _Rows | None:
    """How a kernel finds the rows of x [..., D]; None where two strides do not say it."""
    columns = x.shape[-1]
    if x.stride(-1) != 1 and columns > 1:
        return None
    if x.dim() == 2:
        return _Rows(x.shape[0], 1, x.stride(0), 0)
    if x.is_contiguous():
        return _Rows(x.numel() // columns if columns else 0, 1, columns, 0)
    if x.dim() == 3:
        return _Rows(x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1))
    return None


def _linear_supports(x_TD: Tensor, weight_FD: Tensor | Packed, bias_F: Tensor | None) -> str | None:
    if isinstance(weight_FD, Packed):
        if x_TD.dtype not in FLOATS:
            return f"takes bfloat16 and float32, not {x_TD.dtype}"
        weight = weight_FD.data
    else:
        if weight_FD.dtype != torch.float32 or x_TD.dtype != torch.float32:
            return f"not packed, and {weight_FD.dtype}"
        if weight_FD.dim() != 2 or not weight_FD.is_contiguous():
            return "the weight's rows do not lie side by side"
        if x_TD.numel() > _MOST_PLAIN * x_TD.shape[-1] and not (is_exact() or recorder()):
            return f"PyTorch is faster for more than {_MOST_PLAIN} rows by a float32 matrix"
        weight = weight_FD
    if bias_F is not None and (bias_F.dtype not in FLOATS or not bias_F.is_contiguous()):
        return f"takes a bias in bfloat16 or float32, dense, not {bias_F.dtype}"
    if x_TD.shape[-1] == 0 or _rows(x_TD) is None:
        return "the numbers of a row do not lie side by side"
    return declines(x_TD, weight, bias_F)


@REGISTRY.register("linear", BACKEND, supports=_linear_supports)
def linear(x_TD: Tensor, weight_FD: Tensor | Packed, bias_F: Tensor | None) -> Tensor:
    rows = _rows(x_TD)
    assert rows is not None
    features = weight_FD.shape[-2]
    y_TF = torch.empty((*x_TD.shape[:-1], features), dtype=x_TD.dtype)
    if y_TF.numel() == 0:
        return y_TF
    if isinstance(weight_FD, Packed):
        _packed(x_TD, 1, rows, 0, weight_FD, bias_F, y_TF)
    else:
        bias_type = 0 if bias_F is None else TYPES[bias_F.dtype]
        call("dense_linear", x_TD, *rows, x_TD.shape[-1], weight_FD, features, bias_F, bias_type, y_TF)
    return y_TF


def _grouped_supports(x_TGC: Tensor, weight_GFC: Tensor | Packed) -> str | None:
    if not isinstance(weight_GFC, Packed):
        return f"not packed, but {weight_GFC.dtype}"
    if x_TGC.dtype not in FLOATS:
        return f"takes bfloat16 and float32, not {x_TGC.dtype}"
    if x_TGC.dim() != 3 or x_TGC.stride(2) != 1:
        return "the numbers of a row do not lie side by side"
    return declines(x_TGC, weight_GFC.data)


@REGISTRY.register("grouped_linear", BACKEND, supports=_grouped_supports)
def grouped_linear(x_TGC: Tensor, weight_GFC: Packed) -> Tensor:
    num_tokens, groups, _ = x_TGC.shape
    y_TGF = torch.empty((num_tokens, groups, weight_GFC.rows), dtype=x_TGC.dtype)
    if y_TGF.numel():
        rows = _Rows(num_tokens, 1, x_TGC.stride(0), 0)
        _packed(x_TGC, groups, rows, x_TGC.stride(1), weight_GFC, None, y_TGF)
    return y_TGF


def _packed(
    x: Tensor,
    groups: int,
    rows: _Rows,
    group_stride: int,
    weight: Packed,
    bias_F: Tensor | None,
    y: Tensor,
) -> None:
    threads = torch.get_num_threads()
    scratch = torch.empty(_scratch_bytes(groups * rows.number, rows.number, weight, threads), dtype=torch.uint8)
    call(
        "packed_linear",
        x,
        TYPES[x.dtype],
        groups,
        *rows,
        group_stride,
        weight.columns,
        weight.data,
        FORMAT_NUMBERS[weight.format],
        weight.rows,
        bias_F,
        0 if bias_F is None else TYPES[bias_F.dtype],
        y,
        scratch,
        threads,
        is_exact(),
    )


def _scratch_bytes(prepared: int, rows: int, weight: Packed, threads: int) -> int:
    """For rows made ready in any level's way, and where there are many, panels widened by each thread."""
    nbytes = prepared * row_bytes(weight.format, weight.columns)
    return nbytes if rows <= _FEW else nbytes + threads * widened_bytes(weight)


def row_bytes(name: str, columns: int) -> int:
    """At most, of a row of activations made ready for weights of this format."""
    padded = padded_columns(name, columns)
    return 4 * padded + _SIDE * (padded // FORMATS[name].group) + 64


def widened_bytes(weight: Packed) -> int:
    """Of the panels that one thread holds widened to bfloat16; bf16 panels are used where they lie."""
    return 0 if weight.format == "bf16" else max(_WIDENED, 2 * PANEL * 2 * weight.padded_columns)
