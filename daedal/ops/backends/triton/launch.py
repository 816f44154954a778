"""How kernels are started: block sizes tried once for each kind of input, and whole numbers kept on the device.

A space is a short list of constants to try; the first is what the interpreter runs and what is compiled ahead of time.
Measuring is Triton's own. What a step knows on the host (boundaries, lengths) is copied to the device once, however
many layers ask for it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from daedal.ops.backends.triton.spaces import Space
from daedal.ops.backends.triton.supports import INTERPRETED

_SCHEDULE = ("num_warps", "num_stages")


class _First:
    """A kernel under the first point of its space, for the interpreter, which has no warps and no stages."""

    def __init__(self, kernel: Any, point: Mapping[str, int]):
        self._kernel = kernel
        self._constants = {name: value for name, value in point.items() if name not in _SCHEDULE}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._kernel[grid], **self._constants)


def tuned(kernel: Any, space: Space, key: Sequence[str]) -> Any:
    """The kernel, to be started as kernel[grid](...): the fastest point of `space` for each value of `key`."""
    if INTERPRETED:
        return _First(kernel, space[0])
    configs = [
        triton.Config(
            {name: value for name, value in point.items() if name not in _SCHEDULE},
            **{name: point[name] for name in _SCHEDULE if name in point},
        )
        for point in space
    ]
    return triton.autotune(configs=configs, key=list(key))(kernel)


@lru_cache(maxsize=256)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, copied once for all layers of a step."""
    return sent(torch.tensor(numbers, dtype=torch.int32), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; nobody waits for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def block_of(size: int, least: int = 16) -> int:
    """The power of two that holds so many numbers; products want 16 at least."""
    return max(least, 1 << (max(size, 1) - 1).bit_length())
