"""Linear layers whose product is an op, so that a backend may read their weights in its own way.

`arithmetic`, where it is set, is what training rounds the factors to (`train.precision` sets it); None computes in the
inputs' dtype. Training keeps weights in float32 and casts them here (`Transformer.compute_dtype`); else both agree.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.ops.arithmetic import Arithmetic
from daedal.ops.packed import Packed


class Linear(nn.Linear):
    """[T, in] to [T, out]."""

    arithmetic: Arithmetic | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.arithmetic is None:
            return ops.linear(x_TD, like(self.weight, x_TD), None if self.bias is None else like(self.bias, x_TD))
        y_TF = ops.scaled_linear(x_TD, self.weight, self.arithmetic)
        return y_TF if self.bias is None else y_TF + self.bias.to(y_TF.dtype)


class WideLinear(nn.Linear):
    """[T, in] to [T, out] in the weight's own dtype, float32 whatever the model's: see `shapes.Slot.wide`."""

    def __init__(self, columns: int, rows: int):
        super().__init__(columns, rows, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD.to(self.weight.dtype), self.weight)


class GroupedLinear(nn.Module):
    """[T, G, in] to [T, G x out]: each group its own matrix, stored one below the other."""

    arithmetic: Arithmetic | None = None

    def __init__(self, groups: int, columns: int, rows: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * rows, columns))

    def forward(self, x_TGC: Tensor) -> Tensor:
        weight: Tensor | Packed = self.weight
        if isinstance(weight, Tensor):
            weight = weight.unflatten(0, (self.groups, -1))
        if self.arithmetic is not None:
            return _each(x_TGC, weight, self.arithmetic)
        return ops.grouped_linear(x_TGC, like(weight, x_TGC)).flatten(1)


W = TypeVar("W", Tensor, Packed, Tensor | Packed)


def like(weight: W, x: Tensor) -> W:
    """The weight in x's dtype; packed ones are read by ops as they are."""
    return weight if isinstance(weight, Packed) or weight.dtype == x.dtype else weight.to(x.dtype)


def _each(x_TGC: Tensor, weight_GFC: Tensor | Packed, arithmetic: Arithmetic) -> Tensor:
    """[T, G x F]: groups one after the other."""
    assert isinstance(weight_GFC, Tensor)
    pairs = zip(x_TGC.unbind(1), weight_GFC.unbind(), strict=True)
    return torch.cat([ops.scaled_linear(x_TC, weight_FC, arithmetic) for x_TC, weight_FC in pairs], 1)
