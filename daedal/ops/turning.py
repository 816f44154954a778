"""Factors of a product turned by an orthogonal matrix along the axis that it sums over: the sum stays, outliers do not.

One large number of a group sets the step to which all others are rounded. Turned by a Hadamard matrix it becomes many
that are alike (QuaRot, Ashkboos et al., 2024, arXiv 2404.00456). Blocks are small, so that a turn is a cheap product on
any unit. Signs come first: without them numbers that are all alike, as an outlier's are from token to token, would meet
in one. Those of Golay's sequences spread a constant evenly. Knows no backend and no number format.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def turn(x: Tensor, block: int | None) -> Tensor:
    """x [..., K] with each `block` of its last axis turned, in its own dtype; K is filled up with noughts to whole
    blocks. None gives x. block: a power of four.
    """
    if block is None:
        return x
    padding = -x.shape[-1] % block
    blocks = (x.shape[-1] + padding) // block
    turned: Tensor = F.pad(x, (0, padding)).unflatten(-1, (blocks, block)) @ matrix(block, x.dtype, x.device)
    return turned.flatten(-2)


@lru_cache(maxsize=8)
def matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[block, block], orthogonal, every number one over the root of `block` in magnitude."""
    signs = other = torch.ones(1)
    hadamard = torch.ones(1, 1)
    while len(signs) < block:
        signs, other = torch.cat((signs, other)), torch.cat((signs, -other))
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    # Made on the CPU: a device may have no such small ops, and is asked once.
    turned: Tensor = signs.unsqueeze(1) * hadamard / block**0.5
    return turned.to(device, dtype)
