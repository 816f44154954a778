"""What a step knows on the host (boundaries, lengths, pages) as the vendor's ops read it, and the mask they ask for.

Copied to the device once for all layers of a step. Knows no op.
"""

from functools import lru_cache

import torch
from torch import Tensor

from daedal.ops.backends.npu.vendor import MASK_SIDE


@lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32."""
    return torch.tensor(numbers, dtype=torch.int32).to(device)


@lru_cache(maxsize=4)
def causal_mask(device: torch.device) -> Tensor:
    """True where a key is hidden: the one square from which the op takes what it needs, at every length."""
    return torch.ones((MASK_SIDE, MASK_SIDE), dtype=torch.bool, device=device).triu_(1)
