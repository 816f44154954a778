"""Whether a model is right as often as it is sure: calibration error, Brier score, and the bins of a reliability plot.

All take, for each item, the probabilities of its choices, which add up to one, and which choice is right. Items may
have different numbers of choices. Knows neither models nor how probabilities came about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15

Probabilities = Sequence[Sequence[float] | NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """`count` items whose confidence is above `low` and at most `high`, and their means, None without items."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def softmax(logprobs: Sequence[float]) -> NDArray[np.float64]:
    """Probabilities of choices that are all there are."""
    shifted = np.asarray(logprobs, dtype=np.float64) - max(logprobs)
    shares: NDArray[np.float64] = np.exp(shifted)
    shares /= shares.sum()
    return shares


def reliability(probabilities: Probabilities, gold: Sequence[int], *, bins: int = BINS) -> list[Bin]:
    """Items by the probability of their likeliest choice, in `bins` equal steps from 0 to 1."""
    confidence_N = np.array([np.max(row) for row in probabilities])
    correct_N = np.array([np.argmax(row) == right for row, right in zip(probabilities, gold, strict=True)])
    place_N = np.clip(np.ceil(confidence_N * bins) - 1, 0, bins - 1)
    found = []
    for place in range(bins):
        inside_N = place_N == place
        some = bool(inside_N.any())
        found.append(
            Bin(
                low=place / bins,
                high=(place + 1) / bins,
                count=int(inside_N.sum()),
                confidence=float(confidence_N[inside_N].mean()) if some else None,
                accuracy=float(correct_N[inside_N].mean()) if some else None,
            )
        )
    return found


def expected_calibration_error(probabilities: Probabilities, gold: Sequence[int], *, bins: int = BINS) -> float:
    """The mean distance between confidence and accuracy over the bins, weighed by their items (arXiv 1706.04599)."""
    held = [one for one in reliability(probabilities, gold, bins=bins) if one.count]
    apart = sum(one.count * abs((one.accuracy or 0.0) - (one.confidence or 0.0)) for one in held)
    return apart / sum(one.count for one in held)


def brier_score(probabilities: Probabilities, gold: Sequence[int]) -> float:
    """The mean over items of the squared distance, over all choices, from certainty of the right one: 0 to 2."""
    return float(np.mean(brier_scores(probabilities, gold)))


def brier_scores(probabilities: Probabilities, gold: Sequence[int]) -> list[float]:
    """Of each item."""
    return [
        float(np.sum((np.asarray(row) - np.eye(len(row))[right]) ** 2))
        for row, right in zip(probabilities, gold, strict=True)
    ]


def negative_log_likelihood(probabilities: Probabilities, gold: Sequence[int]) -> float:
    """The mean over items of -log p(right choice), in nats; a probability of 0 counts as the least that a float has."""
    return float(np.mean(nats_spent(probabilities, gold)))


def nats_spent(probabilities: Probabilities, gold: Sequence[int]) -> list[float]:
    """Of each item."""
    least = np.finfo(np.float64).tiny
    return [float(-np.log(max(row[right], least))) for row, right in zip(probabilities, gold, strict=True)]
