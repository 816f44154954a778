"""Linear layers whose arithmetic is an op, so that a backend may read their weights in its own way."""

import torch
from torch import Tensor, nn

from daedal import ops
from daedal.ops.packed import Packed


class Linear(nn.Linear):
    """[T, in] to [T, out]."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight, self.bias)


class WideLinear(nn.Linear):
    """[T, in] to [T, out] in the weight's own dtype, float32 whatever the model's: see `shapes.Slot.wide`."""

    def __init__(self, columns: int, rows: int):
        super().__init__(columns, rows, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD.to(self.weight.dtype), self.weight)


class GroupedLinear(nn.Module):
    """[T, G, in] to [T, G x out]: each group its own matrix, stored one below the other."""

    def __init__(self, groups: int, columns: int, rows: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * rows, columns))

    def forward(self, x_TGC: Tensor) -> Tensor:
        weight: Tensor | Packed = self.weight
        if isinstance(weight, Tensor):
            weight = weight.unflatten(0, (self.groups, -1))
        return ops.grouped_linear(x_TGC, weight).flatten(1)
