"""Packed matrices of random codes, scales and zero points, of every format, for the tests of kernels."""

import torch
from torch import Tensor

from daedal.ops import packed
from daedal.ops.packed import Packed
from daedal.packed import FORMATS, PANEL


def random_packed(name: str, *shape: int) -> Packed:
    """A stack of any shape [..., N, K]; all codes occur, the numbers are about as large in every format."""
    *leading, rows, columns = shape
    grouped = (*leading, rows, -(-columns // FORMATS[name].group))
    scale = (torch.rand(grouped) + 0.1).bfloat16().float()
    if name == "bf16":
        return packed.pack(name, torch.randn(shape).bfloat16())
    if name == "int8":
        return packed.pack(name, _codes(shape, -127, 128).to(torch.int8), scale / 128)
    if name == "int4":
        return packed.pack(name, _codes(shape, 0, 16), scale / 8, _codes(grouped, 0, 256))
    if name == "fp8":
        codes = _codes(shape, 0, 256)
        codes[(codes & 127) == 127] = 0  # NaN
        shared = scale.index_select(-2, torch.arange(rows) // PANEL * PANEL)
        return packed.pack(name, codes.view(torch.float8_e4m3fn), shared / 128)
    return packed.pack(name, _codes(shape, 0, 16), torch.exp2(torch.randint(-6, 0, grouped).float()))


def _codes(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int32).to(torch.uint8 if low == 0 else torch.int8)
