"""Packed matrices: weights in the byte order that CPU kernels read, in one of five number formats.

A matrix [N, K] is cut into panels of 16 rows. A panel holds its codes, then its scales, then its zero points, and ends
on a multiple of 64 bytes; rows and columns that pad it are zero. Codes lie in runs of 4 bytes per row, row after row,
so that one 64-byte vector holds the next few columns of all 16 rows: what a dot-product instruction wants as it is, and
a matrix unit as a tile. This file defines the order, in plain PyTorch; kernels are held to it by tests. Sizes are facts
of `daedal.packed`; how numbers become codes is the business of `formats` and `integers`.

| format | codes | scale | columns per scale |
|---|---|---|---|
| bf16 | bfloat16 | none | |
| int8 | signed, 8 bits | bfloat16 | 64 |
| int4 | unsigned, 4 bits, less a zero point of 1/16 steps in one byte | bfloat16 | 32 |
| fp8 | e4m3 (V3, section 3.3) | float32, one for the panel | 128 |
| fp4 | e2m1 (V4, section 3.4) | e8m0 | 32 |
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from daedal.ops import formats
from daedal.packed import FORMATS, PANEL, Format, padded_columns, panel_bytes

ZERO_STEPS = 16  # of an int4 zero point, per code

# FP8 kernels widen the even and the odd bytes of a run apart, so columns 1 and 2 change places.
_FP8_RUN = (0, 2, 1, 3)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [N, K], or a stack of them [..., N, K]. data: uint8, flat, one matrix after the other."""

    data: Tensor
    format: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.data.dtype == torch.uint8
        assert self.data.shape == (self.count * self.matrix_bytes,)

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def padded_columns(self) -> int:
        return padded_columns(self.format, self.columns)

    @property
    def count(self) -> int:
        """Matrices in the stack."""
        count = 1
        for size in self.shape[:-2]:
            count *= size
        return count

    @property
    def panels(self) -> int:
        """Of one matrix."""
        return -(-self.rows // PANEL)

    @property
    def panel_bytes(self) -> int:
        return panel_bytes(self.format, self.columns)

    @property
    def matrix_bytes(self) -> int:
        return self.panels * self.panel_bytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., N, K]: exactly what the codes and scales stand for in float32, then rounded to `dtype`."""
        matrices = self.data.view(self.count, self.panels, self.panel_bytes)
        dense = torch.stack([_unpack(matrix, self.format, self.columns) for matrix in matrices])
        return dense[:, : self.rows].reshape(self.shape).to(dtype)

    def __getitem__(self, index: int) -> "Packed":
        """One member of the first leading axis: the same memory."""
        members = self.data.unflatten(0, (self.shape[0], -1))
        return Packed(members[index], self.format, self.shape[1:])

    def joined(self) -> "Packed":
        """A stack [G, N, K] as one matrix [G N, K]: the same memory. N is a whole number of panels."""
        assert self.rows % PANEL == 0
        return replace(self, shape=(self.count * self.rows, self.columns))

    def stacked(self, *leading: int) -> "Packed":
        """The same matrices under other leading sizes."""
        return replace(self, shape=(*leading, *self.shape[-2:]))


def pack(
    name: str,
    codes_NK: Tensor,
    scale_Ng: Tensor | None = None,
    zero_Ng: Tensor | None = None,
) -> Packed:
    """A packed matrix, or stack, from codes [..., N, K] and scales and zero points [..., N, K / group].

    codes: bfloat16 for bf16, else uint8 or int8 as the format's table says, FP8 as its bytes, one 4-bit code a byte.
    scale: float32, exact in what the format stores; for fp8 equal in each panel's rows. zero: uint8.
    """
    *leading, rows, columns = codes_NK.shape
    if leading:
        flat = [codes_NK.reshape(-1, rows, columns)]
        flat += [side.reshape(-1, *side.shape[-2:]) for side in (scale_Ng, zero_Ng) if side is not None]
        data = torch.cat([pack(name, *parts).data for parts in zip(*flat, strict=True)])
        return Packed(data, name, (*leading, rows, columns))
    form, panels, padded = FORMATS[name], -(-rows // PANEL), padded_columns(name, columns)
    pad_rows = panels * PANEL - rows
    codes = F.pad(codes_NK if name == "bf16" else codes_NK.view(torch.uint8), (0, padded - columns, 0, pad_rows))
    parts = [_interleave(codes, name)]
    if scale_Ng is not None:
        scales_PgN = F.pad(scale_Ng, (0, 0, 0, pad_rows)).unflatten(0, (panels, PANEL)).transpose(1, 2)
        parts.append(_store_scales(scales_PgN, form, name))
    if zero_Ng is not None:
        zeros = F.pad(zero_Ng, (0, 0, 0, pad_rows)).unflatten(0, (panels, PANEL)).transpose(1, 2)
        parts.append(zeros.reshape(panels, -1))
    together = torch.cat(parts, 1)
    data = F.pad(together, (0, panel_bytes(name, columns) - together.shape[1])).flatten()
    return Packed(data, name, (rows, columns))


def _interleave(codes: Tensor, name: str) -> Tensor:
    """uint8 [P, bytes] from padded codes [16 P, K]."""
    panels_PNK: Tensor = codes.unflatten(0, (-1, PANEL))
    if name == "bf16":
        pairs: Tensor = panels_PNK.unflatten(2, (-1, 2))
        return pairs.transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    if FORMATS[name].bits == 4:
        low, high = panels_PNK.unflatten(2, (-1, 2, 4)).unbind(3)
        nibbles: Tensor = (low | high << 4).transpose(1, 2)
        return nibbles.flatten(1)
    runs: Tensor = panels_PNK.unflatten(2, (-1, 4))
    return (runs[..., _FP8_RUN] if name == "fp8" else runs).transpose(1, 2).flatten(1)


def _store_scales(scales_PgN: Tensor, form: Format, name: str) -> Tensor:
    if form.shared:
        return scales_PgN[..., :1].float().contiguous().view(torch.uint8).flatten(1)
    if name == "fp4":
        return scales_PgN.to(torch.float8_e8m0fnu).view(torch.uint8).flatten(1)
    return scales_PgN.bfloat16().contiguous().view(torch.uint8).flatten(1)


def _unpack(matrix_Pb: Tensor, name: str, columns: int) -> Tensor:
    """float32 [16 P, K] from one matrix's panels."""
    form, padded = FORMATS[name], padded_columns(name, columns)
    groups = padded // form.group
    rows = 1 if form.shared else PANEL
    sizes = [PANEL * padded * form.bits // 8, groups * rows * form.scale, groups * PANEL * form.zero]
    codes, scales, zeros = matrix_Pb[:, : sum(sizes)].split(sizes, 1)
    if name == "bf16":
        pairs: Tensor = codes.contiguous().view(torch.bfloat16).unflatten(1, (-1, PANEL, 2))
        return pairs.transpose(1, 2).reshape(-1, padded)[:, :columns].float()
    values = _numbers(codes, name)
    scales_PgN = _read_scales(scales.contiguous(), name).unflatten(1, (groups, rows))
    grouped: Tensor = values.unflatten(2, (groups, form.group))
    if form.zero:
        zeros_PNg = zeros.unflatten(1, (groups, PANEL)).transpose(1, 2)
        grouped = grouped - zeros_PNg.float().unsqueeze(-1) / ZERO_STEPS
    dense: Tensor = grouped * scales_PgN.transpose(1, 2).unsqueeze(-1)
    return dense.flatten(2).flatten(0, 1)[:, :columns]


def _numbers(codes_Pb: Tensor, name: str) -> Tensor:
    """float32 [P, 16, K]: what the codes stand for, without scales."""
    runs: Tensor = codes_Pb.unflatten(1, (-1, PANEL, 4)).transpose(1, 2)
    if FORMATS[name].bits == 4:
        both = torch.stack((runs & 15, runs >> 4), 3).flatten(2)
        if name == "int4":
            return both.float()
        return formats.unpack_fp4(formats.pack_fp4(both))
    if name == "int8":
        return runs.flatten(2).view(torch.int8).float()
    return runs[..., _FP8_RUN].flatten(2).contiguous().view(torch.float8_e4m3fn).float()


def _read_scales(scales_Pb: Tensor, name: str) -> Tensor:
    if name == "fp8":
        return scales_Pb.view(torch.float32)
    if name == "fp4":
        return formats.scale_values(scales_Pb)
    return scales_Pb.view(torch.bfloat16).float()
