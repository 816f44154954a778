"""How kernels are started: block sizes tried once for each kind of input, and whole numbers kept on the device.

A space is a short list of constants to try; the first that a chip takes is what the interpreter runs, and what is
compiled ahead of time. Measuring is Triton's own. What a step knows on the host (boundaries, lengths) is copied to the
device once, however many layers ask for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from daedal.ops import silicon
from daedal.ops.backends.triton.spaces import Space, first_of
from daedal.ops.backends.triton.supports import INTERPRETED

_SCHEDULE = ("num_warps", "num_stages")


class _First:
    """A kernel under the first point of its space that the chip takes: for the interpreter, which has no warps and no
    stages, and for chips whose sums lie beside the core, where the points behind the first may not fit.
    """

    def __init__(self, kernel: Any, point: Mapping[str, int]):
        self._kernel = kernel
        self._constants = {name: value for name, value in point.items() if name not in _SCHEDULE}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._kernel[grid], **self._constants)


class _Tuned:
    """A kernel whose points are tried when it is first started: not before is the chip asked what it is."""

    def __init__(self, kernel: Any, space: Space, key: Sequence[str]):
        self._kernel, self._space, self._key = kernel, space, key

    def __getitem__(self, grid: Any) -> Any:
        return (self._first() if INTERPRETED else self._runner)[grid]  # the interpreter's chip is an assumed one

    def _first(self) -> _First:
        return _First(self._kernel, first_of(self._space, silicon.read(silicon.THIS).narrowest))

    @cached_property
    def _runner(self) -> Any:
        if silicon.read(silicon.THIS).sums_on_chip:
            return self._first()
        configs = [
            triton.Config(
                {name: value for name, value in point.items() if name not in _SCHEDULE},
                **{name: point[name] for name in _SCHEDULE if name in point},
            )
            for point in self._space
        ]
        return triton.autotune(configs=configs, key=list(self._key))(self._kernel)


def tuned(kernel: Any, space: Space, key: Sequence[str]) -> _Tuned:
    """The kernel, to be started as kernel[grid](...): the fastest point of `space` for each value of `key`."""
    return _Tuned(kernel, space, key)


def stretches(number: int, programs: int, device: torch.device, *, most: int | None = None) -> Iterator[slice]:
    """`number` things, each of so many programs, in runs that one start may have on the chip; `most` in a run."""
    limit = silicon.of(device).most_programs
    bounds = [number, *(() if limit is None else (limit // programs,)), *(() if most is None else (most,))]
    step = max(1, min(bounds))
    for first in range(0, number, step):
        yield slice(first, min(first + step, number))


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
