"""One token drawn from one row of logits: temperature, then top-k, top-p of what top-k left, and min-p, as transformers
orders them (vLLM applies min-p before the other two).

On the CPU, whatever the model runs on: by a native kernel, or in NumPy where there is none; a first call into PyTorch
between two steps on a CPU costs more than the arithmetic here. Ties go to the lowest id throughout. Knows no batch and
no generators.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from daedal.ops.backends.cpu.drawing import Filters, NativeDraws
from daedal.ops.backends.cpu.program import missing
from daedal.ops.registry import REGISTRY

Array = np.ndarray[Any, np.dtype[Any]]

_FIRST_CANDIDATES = 256  # sorted first in search of a nucleus; sixteen times as many whenever that is too few
_BLOCK = 128  # weights summed as one, before one of them is looked for: running sums of all are the slowest way


class Draws:
    """Draws from rows of float32 logits, again and again while their memory is written anew. One thread at a time."""

    def __init__(self, logits_NV: Array):
        self._rows = np.ascontiguousarray(logits_NV)
        self._native: NativeDraws | None = None
        if REGISTRY.forced in (None, "cpu") and missing() is None:
            self._native = NativeDraws(self._rows.shape[1])
        self._address, self._stride = self._rows.ctypes.data, self._rows.strides[0]

    def draw(self, row: int, filters: Filters, uniform: float) -> int:
        """The token at the fraction `uniform` of a row's filtered distribution, tokens in the order of their ids."""
        if self._native is None:
            return draw(self._rows[row], filters, uniform)
        return self._native.draw(self._address + row * self._stride, filters, uniform)


def draw(logits_V: Array, params: Filters, uniform: float) -> int:
    """The token at the fraction `uniform` of the filtered distribution, tokens in the order of their ids."""
    ids_C, weights_C = filtered(logits_V, params)
    num_whole = len(weights_C) // _BLOCK
    sums = weights_C[: num_whole * _BLOCK].reshape(num_whole, _BLOCK).sum(1)
    sums = np.append(sums, weights_C[num_whole * _BLOCK :].sum())
    block, rest = _locate(sums, uniform * _sum(sums))
    place, _ = _locate(weights_C[block * _BLOCK : (block + 1) * _BLOCK], rest)
    index = block * _BLOCK + place
    return index if ids_C is None else int(ids_C[index])


def _locate(weights_C: Array, target: float) -> tuple[int, float]:
    """Whose weight holds the place `target` on the line of all of them, and how far into it."""
    cumulative_C = weights_C.cumsum(dtype=np.float64)
    # Rounding must not reach the total: what lies beyond the last weight above zero may not be chosen.
    target = min(target, math.nextafter(float(cumulative_C[-1]), 0.0))
    index = int(cumulative_C.searchsorted(target, side="right"))
    return index, target - (float(cumulative_C[index - 1]) if index else 0.0)


def filtered(logits_V: Array, params: Filters) -> tuple[Array | None, Array]:
    """What temperature, top-k, top-p and min-p leave of float32 logits: ids, ascending, and weights, not normalised.

    ids are None where nothing is filtered. Top-p keeps the fewest tokens that reach the mass; min-p those of at least
    that fraction of the likeliest. Each filter only says how many of the likeliest stay, so nothing is sorted beyond
    what they need.
    """
    peak = logits_V.max()

    def weights(logits: Array) -> Array:
        # The peak goes first, so that no temperature overflows.
        below = logits - peak
        if params.temperature != 1.0:
            below /= params.temperature
        weighed: Array = np.exp(below, out=below)
        return weighed

    has_top_k = 0 < params.top_k < len(logits_V)
    if not has_top_k and params.top_p == 1.0 and params.min_p == 0.0:
        return None, weights(logits_V)
    if has_top_k:
        ranked_C = _highest(logits_V, params.top_k)
        mass = _sum(weights(ranked_C))
    elif params.top_p < 1.0:
        mass = _sum(weights(logits_V))
        ranked_C = _reaching(logits_V, weights, params.top_p * mass)
    else:
        (ids_C,) = (weights(logits_V) >= params.min_p).nonzero()
        return ids_C, weights(logits_V[ids_C])
    weights_C = weights(ranked_C)
    num_kept = int((weights_C >= params.min_p).sum())
    if params.top_p < 1.0:
        before_C = weights_C.cumsum(dtype=np.float64) - weights_C
        num_kept = min(num_kept, int((before_C < params.top_p * mass).sum()))
    ids_C = _down_to(logits_V, ranked_C[num_kept - 1], num_kept)
    return ids_C, weights(logits_V[ids_C])


def likeliest(scores_V: Array, count: int) -> Array:
    """int64 ids, ascending, of the `count` highest scores; of equal scores at the border the lowest ids."""
    count = min(count, len(scores_V))
    return _down_to(scores_V, _highest(scores_V, count)[-1], count)


def _highest(scores_V: Array, count: int) -> Array:
    """The `count` highest scores, highest first."""
    first = len(scores_V) - count
    ranked: Array = np.sort(np.partition(scores_V, first)[first:])[::-1]
    return ranked


def _down_to(scores_V: Array, border: Any, count: int) -> Array:
    """`likeliest`, given its lowest score."""
    ids_C: Array = (scores_V >= border).nonzero()[0]
    surplus = len(ids_C) - count
    if surplus == 0:
        return ids_C
    (tied,) = (scores_V[ids_C] == border).nonzero()
    kept_C: Array = np.delete(ids_C, tied[-surplus:])
    return kept_C


def _reaching(logits_V: Array, weights: Callable[[Array], Array], mass: float) -> Array:
    """The highest logits, highest first, enough of them to hold the mass."""
    count = _FIRST_CANDIDATES
    while True:
        ranked_C = _highest(logits_V, min(count, len(logits_V)))
        if count >= len(logits_V) or _sum(weights(ranked_C)) >= mass:
            return ranked_C
        count *= 16


def _sum(weights: Array) -> float:
    return float(weights.sum(dtype=np.float64))
