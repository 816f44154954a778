"""From a checkpoint's tensors to packed matrices, one after the other, in memory bounded by the largest matrix.

FP8 and FP4 codes that a file holds are taken over where the wanted format has the same numbers; all else is expanded
exactly and rounded once. A stack of experts comes expert by expert, and a large plain matrix some panels at a time:
panels know nothing of one another. Which slot gets which format, `daedal.packed` says; writes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal import layouts
from daedal.checkpoint.contents import Contents, Stored
from daedal.errors import CheckpointError
from daedal.ops import formats
from daedal.ops.integers import BLOCK, quantise_int4, quantise_int8, quantise_int8_blocks
from daedal.ops.packed import Packed, pack
from daedal.packed import FORMATS, PANEL, Kept
from daedal.shapes import Slot

_SLAB = 2**24  # numbers of a plain matrix at a time
_FP8_BLOCK = (128, FORMATS["fp8"].group)

Codes = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Slab:
    """Some panels of a matrix, or a stack. name: of the tensor that it was made of, for messages."""

    packed: Packed
    parts: Sequence[Stored]
    kept: Kept

    def error(self) -> float:
        """The norm of the change, divided by the norm of what was there."""
        new = [part.error for part in self.parts if part.error is not None]
        if new:
            return max(new)
        before = _values(self.parts)
        if self.kept.part != "whole":
            before = _part_of_expansion(before, self.kept)
        before = before.float().reshape(self.packed.shape)
        size = float(torch.linalg.vector_norm(before, dtype=torch.float64))
        change = torch.linalg.vector_norm(self.packed.dense() - before, dtype=torch.float64)
        return float(change) / size if size else 0.0


def slabs(contents: Contents, slot: Slot, kept: Kept) -> Iterator[Slab]:
    """What `kept` keeps of a slot, in the order in which its bytes follow each other. CheckpointError, naming the
    tensor, for numbers that are not finite.
    """
    stack = kept.shape[:-2]
    for parts in _sources(contents, slot, kept):
        try:
            if kept.part != "whole":
                packed = _pack_expansion(_part_of_expansion(_values(parts), kept), kept)
            else:
                packed = _pack(parts, kept.format, () if slot.role == "routed_expert" else stack)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {parts[0].name}: {error}") from error
        yield Slab(packed, parts, kept)


def _sources(contents: Contents, slot: Slot, kept: Kept) -> Iterator[list[Stored]]:
    """The stored matrices that are packed together: their rows follow each other."""
    if slot.role == "routed_expert":
        places = layouts.places(slot)
        each = len(places) // slot.shape[0]
        for first in range(0, len(places), each):
            yield [contents.stored(slot, part) for part in range(first, first + each)]
        return
    stored = contents.stored(slot, 0)
    if stored.scale is not None or len(kept.shape) > 2:
        yield [stored]
        return
    rows, columns = slot.shape
    step = max(1, _SLAB // columns // _FP8_BLOCK[0]) * _FP8_BLOCK[0]
    for start in range(0, rows, step):
        yield [replace(stored, tensor=stored.tensor[start : start + step])]


def _pack(parts: Sequence[Stored], form: str, stack: tuple[int, ...]) -> Packed:
    if form == "fp8":
        codes, scale = _fp8(parts, stack)
        return pack(form, codes, scale)
    made = _codes(parts, form)
    return pack(form, *(None if one is None else _stacked(one, stack) for one in made))  # type: ignore[arg-type]


def _codes(parts: Sequence[Stored], form: str) -> Codes:
    """[N, K] of all parts, in a format whose rows know nothing of one another."""
    if form == "fp4":
        each = [_fp4(part) for part in parts]
        return torch.cat([codes for codes, _ in each]), torch.cat([scale for _, scale in each]), None
    if parts[0].dtype == form and parts[0].scale is not None:
        return _joined(parts)
    values = _values(parts)
    if form == "int4":
        return quantise_int4(values)
    if form == "int8":
        return *quantise_int8(values), None
    return values.bfloat16(), None, None


def _joined(parts: Sequence[Stored]) -> Codes:
    """New int8 or int4 codes as they are."""
    codes, scale = torch.cat([part.tensor for part in parts]), torch.cat([_given(part.scale) for part in parts])
    zero = torch.cat([_given(part.zero) for part in parts]) if parts[0].zero is not None else None
    return codes, scale, zero


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _fp4(part: Stored) -> tuple[Tensor, Tensor]:
    """One code a byte, and float32 scales."""
    if part.scale is not None and part.dtype == layouts.FP4:
        coded, scale = part.tensor.view(torch.uint8), formats.scale_values(part.scale)
    else:
        values = part.values()
        columns = values.shape[-1]
        coded, scale = formats.quantise_fp4(F.pad(values, (0, -columns % layouts.FP4_GROUP)))
        coded = coded.view(torch.uint8)
        return _nibbles(coded)[:, :columns], scale
    return _nibbles(coded), scale


def _nibbles(coded: Tensor) -> Tensor:
    return torch.stack((coded & 15, coded >> 4), -1).flatten(-2)


def _fp8(parts: Sequence[Stored], stack: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes as bytes [..., N, K] and scales [..., N, K / 128], the same for all rows of a panel.

    Each part is quantised by itself, as publishers do; where a panel would then have rows of two scales, all at once.
    """
    each = [_fp8_part(part) for part in parts]
    codes = _stacked(torch.cat([codes for codes, _ in each]), stack)
    scale = _stacked(torch.cat([scale for _, scale in each]), stack)
    if _same_in_panels(scale):
        return codes, scale
    values = _stacked(_values(parts), stack)
    rows, columns = values.shape[-2:]
    found, scale_bk = formats.quantise_blocks(values, _FP8_BLOCK)
    return found.view(torch.uint8), _by_row(scale_bk, _FP8_BLOCK, rows, columns)


def _fp8_part(part: Stored) -> tuple[Tensor, Tensor]:
    rows, columns = part.values().shape if part.scale is None else _shape(part)
    block, group = _FP8_BLOCK, _FP8_BLOCK[1]
    if part.scale is not None and part.dtype == layouts.FP8 and part.block[1] % group == 0:
        codes, scale_bk, block = part.tensor, formats.scale_values(part.scale), part.block
    elif part.scale is not None and part.dtype == layouts.FP4:
        codes, scale_bk, _ = formats.fp4_to_fp8(part.tensor, part.scale, block)
    else:
        codes, scale_bk = formats.quantise_blocks(part.values(), block)
    return codes.view(torch.uint8), _by_row(scale_bk, block, rows, columns)


def _shape(part: Stored) -> tuple[int, int]:
    rows, columns = part.tensor.shape
    return rows, 2 * columns if part.dtype == layouts.FP4 else columns


def _by_row(scale_bk: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Scales of blocks as scales of each row's groups of 128 columns."""
    groups = -(-columns // _FP8_BLOCK[1])
    spread = scale_bk.repeat_interleave(block[0], -2)[..., :rows, :]
    return spread.repeat_interleave(block[1] // _FP8_BLOCK[1], -1)[..., :groups]


def _same_in_panels(scale_Ng: Tensor) -> bool:
    rows = scale_Ng.shape[-2]
    first = scale_Ng[..., ::PANEL, :].repeat_interleave(PANEL, -2)[..., :rows, :]
    return torch.equal(first, scale_Ng)


def _part_of_expansion(values: Tensor, kept: Kept) -> Tensor:
    """[H, N, L] keys, [H, V, L] values or [H, L, N] keys transposed, of MLA's expansion [H (N + V), L]."""
    heads, rows, columns = kept.shape
    each: Tensor = values.unflatten(0, (heads, -1))
    if kept.part == "folded":
        each = each[:, :columns].transpose(1, 2)
    return each[:, -rows:] if kept.part == "values" else each[:, :rows]


def _pack_expansion(values: Tensor, kept: Kept) -> Packed:
    if kept.format == "bf16":
        return pack("bf16", values.bfloat16())
    if kept.part == "values":
        return pack("int8", *quantise_int8(values))
    codes, scale_bk = quantise_int8_blocks(values)
    return pack("int8", codes, scale_bk.repeat_interleave(BLOCK, -2)[..., : kept.shape[-2], :])


def _values(parts: Sequence[Stored]) -> Tensor:
    return parts[0].values() if len(parts) == 1 else torch.cat([part.values() for part in parts])


def _stacked(rows: Tensor, stack: tuple[int, ...]) -> Tensor:
    return rows.unflatten(0, (*stack, -1)) if stack else rows
