"""One token drawn from a row of logits, on a native kernel (`native/draw.h`). Knows no requests and no other rows."""

import ctypes
from typing import Protocol

from daedal.ops.backends.cpu.program import native

_BLOCK = 128  # as in native/draw.h


class Filters(Protocol):
    """What changes a row's distribution. top_k: 0 for none; top_p: 1; min_p: 0."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


class NativeDraws:
    """Draws from rows of `columns` float32 logits, with memory of its own: one thread at a time.

    A call is the same words again and again, but for what differs from draw to draw: between two steps, which sweep the
    processor's caches, every further object costs a microsecond.
    """

    def __init__(self, columns: int):
        blocks = -(-columns // _BLOCK)
        self._place = ctypes.c_int64()
        self._scratch = (ctypes.c_double * (blocks + (blocks + 2 * columns + 32) // 2 + 1))()
        library = native()
        self._words = (ctypes.c_int64 * 11)(library.kernels["draw"], 9, 0, columns)
        self._words[9], self._words[10] = ctypes.addressof(self._place), ctypes.addressof(self._scratch)
        self._reals = (ctypes.c_double * 11).from_buffer(self._words)
        self._run = library.run

    def draw(self, address: int, filters: Filters, uniform: float) -> int:
        """The column at the fraction `uniform` of what the filters leave; the row lies, dense, at `address`."""
        words, reals = self._words, self._reals
        words[2], words[5] = address, filters.top_k
        reals[4], reals[6], reals[7], reals[8] = filters.temperature, filters.top_p, filters.min_p, uniform
        self._run(words, threads=1)
        return self._place.value
