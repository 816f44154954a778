"""Products of float32 tensors whose factors were bfloat16 before: exact factors, float32 sums and float32 results.

A CPU with bfloat16 products is several times as fast at them as at float32 ones, but torch rounds the result of a
product of bfloat16 tensors to bfloat16 too. Products of float32 tensors whose factors may be rounded lose nothing where
the numbers were bfloat16 to begin with. Knows no ops.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def narrow_factors(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on a CPU round their factors to bfloat16, if that is faster there. Not for threads."""
    if device.type != "cpu":
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # since torch 2.9, not in its stubs
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
