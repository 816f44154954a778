"""What `daedal bench --out` measured of a model, as rates at any context between those that were measured.

Seconds and joules of a token are interpolated along the context, both in logarithms, and never beyond its ends. Knows
no model and no quality.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daedal.errors import ConfigError
from daedal.text.files import parse_object, read_text

BENCH = "bench.json"
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One token at one context. joules: None where nothing counted them. spread: of the repeats, as a share."""

    context: float
    seconds: float
    joules: float | None
    spread: float
    kv_bytes: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """weights: the packed format, None for a model as loaded. points: by phase and batch, by rising context."""

    model: str
    device: str
    weights: str | None
    energy: str | None
    points: Mapping[tuple[str, int], Sequence[Measured]]

    @property
    def batches(self) -> list[int]:
        """Those that were measured."""
        return sorted({batch for _, batch in self.points})

    def at(self, phase: str, *, batch: int, context: float) -> Measured | str:
        """A token at a context, or why it was not measured."""
        points = self.points.get((phase, batch), ())
        if not points:
            return f"{phase} was not measured at batch {batch}"
        first, last = points[0].context, points[-1].context
        if not first <= context <= last:
            return (
                f"{phase} at batch {batch} was measured at {_span(first, last)} tokens, and the work has "
                f"{context:,.0f}: run `daedal bench` with a --context on either side"
            )
        upper = next(place for place, point in enumerate(points) if point.context >= context)
        return _between(points[max(upper - 1, 0)], points[upper], context)


def read_bench(path: Path) -> Bench:
    """ConfigError where the file is not what `daedal bench` writes, or holds no figures."""
    told = parse_object(read_text(path), path)
    try:
        found: dict[tuple[str, int], list[Measured]] = {}
        for point in _rows(told["points"]):
            for phase in _rows(point["phases"]):
                held = found.setdefault((str(phase["phase"]), int(point["batch"])), [])
                held.append(_measured(phase, float(point["kv_bytes"])))
        bench = Bench(
            model=str(told["model"]),
            device=str(told["device"]),
            weights=None if told["weights"] is None else str(told["weights"]),
            energy=None if told["energy"] is None else str(told["energy"]),
            points={key: sorted(held, key=lambda one: one.context) for key, held in found.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not what `daedal bench --out` writes ({error}): measure again") from error
    if not bench.points:
        raise ConfigError(f"{path} holds no figures, every point of it was refused: measure again with smaller ones")
    return bench


def _rows(value: object) -> list[dict[str, Any]]:
    if not (isinstance(value, list) and all(isinstance(row, dict) for row in value)):
        raise TypeError("a list of objects is missing")
    return value


def _measured(phase: Mapping[str, Any], kv_bytes: float) -> Measured:
    rate, joules, spread = float(phase["tokens_per_second"]), phase["joules_per_token"], float(phase["spread"])
    context = float(phase["held_tokens"])
    if not (0 < rate < math.inf and 0 <= spread < math.inf and 1 <= context < math.inf and kv_bytes >= 0):
        raise ValueError(f"a rate of {rate} at {context} tokens")
    if joules is not None and not 0 <= float(joules) < math.inf:
        raise ValueError(f"{joules} joules")
    each = None if joules is None else float(joules)
    return Measured(context=context, seconds=1 / rate, joules=each, spread=spread, kv_bytes=kv_bytes)


def _between(low: Measured, high: Measured, context: float) -> Measured:
    if low.context == high.context:
        return high
    share = math.log(context / low.context) / math.log(high.context / low.context)

    def mixed(first: float, last: float) -> float:
        if first <= 0 or last <= 0:
            return first + share * (last - first)
        return math.exp(math.log(first) + share * math.log(last / first))

    known = low.joules is not None and high.joules is not None
    return Measured(
        context=context,
        seconds=mixed(low.seconds, high.seconds),
        joules=mixed(low.joules or 0.0, high.joules or 0.0) if known else None,
        spread=max(low.spread, high.spread),
        kv_bytes=mixed(low.kv_bytes, high.kv_bytes),
    )


def _span(first: float, last: float) -> str:
    return f"{first:,.0f}" if first == last else f"{first:,.0f} to {last:,.0f}"
