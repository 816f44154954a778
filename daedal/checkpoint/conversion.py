"""One matrix from the number format that a file has it in to another, and how much that changed it.

Codes already in the wanted format are copied as they are. FP4 becomes FP8 with the same numbers where FP8 can hold
them (V4, section 3.4). Everything else is expanded exactly and rounded once. Knows no file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint.contents import Stored
from daedal.errors import CheckpointError
from daedal.layouts import Piece
from daedal.ops import formats


@dataclass(frozen=True)
class Converted:
    """tensor: numbers or codes; scale: of codes. error: the norm of the change divided by the norm of what was there.
    exact: False where FP4 did not fit into FP8.
    """

    tensor: Tensor
    scale: Tensor | None = None
    error: float = 0.0
    exact: bool = True


def convert(stored: Stored, wanted: Piece, block: tuple[int, int], *, power_of_two: bool) -> Converted:
    """`stored` in the format of `wanted`. block: of FP8 codes; power_of_two: whether their scales must be, whatever
    they are stored in. CheckpointError, naming the tensor, for numbers that are not finite.
    """
    if wanted.scale is None:
        values = stored.values()
        rounded = values.to(getattr(torch, wanted.dtype))
        return Converted(rounded, error=_change(values, rounded))
    as_e8m0 = wanted.scale.dtype == layouts.E8M0
    try:
        found = _codes(stored, wanted.dtype, block, power_of_two=power_of_two or as_e8m0)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {stored.name}: {error}") from error
    assert found.scale is not None
    scale = formats.to_e8m0(found.scale) if as_e8m0 else found.scale
    return Converted(found.tensor, scale, found.error, found.exact)


def _codes(stored: Stored, dtype: str, block: tuple[int, int], *, power_of_two: bool) -> Converted:
    """Codes of `dtype` with float32 scales."""
    if stored.scale is not None and stored.dtype == dtype:
        kept = formats.scale_values(stored.scale)
        if not power_of_two or formats.are_powers_of_two(kept):
            return Converted(stored.tensor, kept, stored.error or 0.0)
    exact = True
    if dtype == layouts.FP4:
        tensor, scale = formats.quantise_fp4(stored.values())
        after = formats.dequantise_fp4(tensor, scale)
    elif stored.scale is not None and stored.dtype == layouts.FP4:
        tensor, scale, exact = formats.fp4_to_fp8(stored.tensor, stored.scale, block)
        if exact:
            return Converted(tensor, scale)
        after = formats.dequantise_blocks(tensor, scale, block)
    else:
        tensor, scale = formats.quantise_blocks(stored.values(), block, power_of_two=power_of_two)
        after = formats.dequantise_blocks(tensor, scale, block)
    return Converted(tensor, scale, _change(stored.values(), after), exact)


def _change(before: Tensor, after: Tensor) -> float:
    if before.dtype == after.dtype and before.data_ptr() == after.data_ptr():
        return 0.0
    size = float(torch.linalg.vector_norm(before, dtype=torch.float64))
    if size == 0.0:
        return 0.0
    wide = torch.promote_types(before.dtype, after.dtype)
    return float(torch.linalg.vector_norm(before.to(wide) - after.to(wide), dtype=torch.float64)) / size
