"""Plain tensor operations as native calls: what joins the ops of a recorded step. Semantics are PyTorch's own."""

import torch
from torch import Tensor

from daedal.ops.backends.cpu.program import TYPES, call
from daedal.ops.rows import Unrecordable

AXES = 5
_BINARY = ("add", "sub", "mul", "div")
_UNARY = ("cos", "sin", "neg", "sigmoid")


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense copy in `dtype`."""
    result = torch.empty(x.shape, dtype=dtype)
    _copy(x, result)
    return result


def concatenate(parts: list[Tensor], dim: int) -> Tensor:
    # Empty vectors of any shape are allowed to torch.cat; here every part has the others' shape.
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    dim %= parts[0].dim()
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    result = torch.empty(shape, dtype=dtype)
    for part, place in zip(parts, result.split(sizes, dim), strict=True):
        _copy(part, place)
    return result


def binary(name: str, x: Tensor | float, y: Tensor | float) -> Tensor:
    """x + y, x - y, x * y or x / y, broadcast; floating point, computed in float32."""
    dtype = torch.result_type(x, y)
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unrecordable(f"{name} in {dtype} has no native form")
    left, right = (side if isinstance(side, Tensor) else torch.tensor(side, dtype=torch.float32) for side in (x, y))
    left, right = torch.broadcast_tensors(left, right)
    result = torch.empty(left.shape, dtype=dtype)
    sides = left, TYPES[left.dtype], right, TYPES[right.dtype], result, TYPES[dtype]
    places = (*_padded(left.stride(), 0), *_padded(right.stride(), 0), *_padded(result.stride(), 0))
    call("binary", _BINARY.index(name), *sides, *_padded(left.shape, 1), *places)
    return result


def unary(name: str, x: Tensor) -> Tensor:
    """cos, sin, neg or sigmoid of every number, computed in float32."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Unrecordable(f"{name} in {x.dtype} has no native form")
    result = torch.empty(x.shape, dtype=x.dtype)
    places = (*_padded(x.shape, 1), *_padded(x.stride(), 0), *_padded(result.stride(), 0))
    call("unary", _UNARY.index(name), x, TYPES[x.dtype], result, TYPES[x.dtype], *places)
    return result


def peaks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum, and where it is: of equals the first, NaN where there is one. x: [rows, columns]."""
    if x.dtype != torch.float32 or x.dim() != 2 or not x.is_contiguous() or not x.numel():
        raise Unrecordable("maxima of anything but dense rows of float32 have no native form")
    rows, threads = len(x), torch.get_num_threads()
    values, places = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    scratch = torch.empty((rows * threads, 2), dtype=torch.int64)
    call("row_peaks", x, *x.shape, values, places, scratch, threads)
    return values, places


def gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows of `table` [N, ...] at `index` (int64, any shape): [*index, ...]."""
    if not table.is_contiguous() or not index.is_contiguous() or index.dtype != torch.int64:
        raise Unrecordable("gathering from a table that is not dense has no native form")
    result = torch.empty((*index.shape, *table.shape[1:]), dtype=table.dtype)
    call("gather_rows", table, index, result, index.numel(), table[:1].nbytes)
    return result


def scatter(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """Writes `rows` into `table` at `index`, in place."""
    if not table.is_contiguous() or not index.is_contiguous() or rows.dtype != table.dtype:
        raise Unrecordable("scattering into a table that is not dense has no native form")
    dense = rows if rows.is_contiguous() else convert(rows, rows.dtype)
    call("scatter_rows", table, index, dense, index.numel(), table[:1].nbytes)


def _copy(source: Tensor, target: Tensor) -> None:
    if source.dtype not in TYPES or target.dtype not in TYPES:
        raise Unrecordable(f"copying {source.dtype} to {target.dtype} has no native form")
    types = source, TYPES[source.dtype], target, TYPES[target.dtype]
    shape = _padded(target.shape, 1)
    call("copy", *types, *shape, *_padded(source.expand_as(target).stride(), 0), *_padded(target.stride(), 0))


def _padded(sizes: tuple[int, ...], fill: int) -> tuple[int, ...]:
    if len(sizes) > AXES:
        raise Unrecordable(f"tensors of {len(sizes)} axes have no native form")
    return (*(fill for _ in range(AXES - len(sizes))), *sizes)
