"""Whether gradients are wanted of tensors: what every backend asks before it takes them. Knows no ops."""

import torch
from torch import Tensor


def wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
