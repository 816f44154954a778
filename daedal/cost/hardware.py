"""Chips as capabilities, from `hardware.toml` beside this file, and what shares of them are reached, `efficiency.toml`.

`this` is the machine at hand, known once it has been measured: the measurement lies in Daedal's cache. Knows no model.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from daedal.errors import ConfigError
from daedal.places import cache_directory

THIS = "this"
CALIBRATION = "calibration.json"
KINDS = ("gpu", "npu", "cpu", "measured")
# Formats that multiply the same codes, the fastest first: where a chip lacks one, weights are widened to the next.
_INSTEAD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp4": ("fp4", "fp8", "bf16"),
        "fp8": ("fp8", "bf16"),
        "w4": ("w4", "int8", "bf16"),
        "int8": ("int8", "bf16"),
        "bf16": ("bf16",),
    }
)


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares and overheads of a kind of chip, as `efficiency.toml` explains them. Known of measured machines only:
    sequence_seconds, expert_seconds: of a sequence beyond the first in a layer, and of an expert that a layer meets;
    prompt_layer_seconds: of a layer of a step that reads prompts, None for as any other; activations: bytes per second
    of the rows that pass between matrices, None where they cost nothing; bandwidth_by: `bandwidth` for weights of a
    format; cache_by, attention_by: `cache` and `attention` for the kinds of `work.Part`.
    """

    compute: float
    attention: float
    bandwidth: float
    cache: float
    link: float
    layer_seconds: float
    step_seconds: float
    chunk: int
    usable: float
    runtime_bytes: float
    source: str
    pairs: int
    sequence_seconds: float = 0.0
    expert_seconds: float = 0.0
    prompt_layer_seconds: float | None = None
    activations: float | None = None
    bandwidth_by: Mapping[str, float] = field(default_factory=dict, hash=False)
    cache_by: Mapping[str, float] = field(default_factory=dict, hash=False)
    attention_by: Mapping[str, float] = field(default_factory=dict, hash=False)
    median_error: float | None = None
    ninth_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. Bytes, bytes per second, FLOP/s by format, watts; None for what nobody told.

    link: what it sends to its peers, of which there are `peers` with itself; network: to those beyond. host, disk: how
    fast it reads what lies beyond its memory. by_rows: FLOP/s by format and number of rows of products with matrices
    that lie in memory; a format without them reaches its peak with any number. reached: fields of `Efficiency` that
    were measured on this chip.
    """

    name: str
    kind: str
    memory_bytes: float
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    link: float | None = None
    peers: int = 1
    network: float | None = None
    host: float | None = None
    disk: float | None = None
    watts_idle: float | None = None
    watts_peak: float | None = None
    by_rows: Mapping[str, Mapping[int, float]] = field(default_factory=dict, hash=False)
    reached: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str
    date: str
    certainty: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind of {self.name} is {self.kind!r}: it must be one of {', '.join(KINDS)}")
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if item.type in (float, float | None)}
        numbers |= {f"peak of {form}": rate for form, rate in self.peak.items()}
        for form, rates in self.by_rows.items():
            numbers |= {f"peak of {form} with {rows} rows": rate for rows, rate in rates.items()}
        for label, value in numbers.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise ConfigError(f"{label} of {self.name} is {value!r}: it must be a number above 0")
        unknown = self.reached.keys() - {item.name for item in fields(Efficiency)}
        if unknown:
            raise ConfigError(f"reached of {self.name} has {min(unknown)!r}, which is no share: see efficiency.toml")
        if "bf16" not in self.peak:
            raise ConfigError(f"{self.name} has no peak in bf16: every chip needs one, other formats may be left out")

    def sends(self, devices: int) -> float | None:
        """Bytes per second that one of so many devices can send to the others; None where nobody told."""
        return self.link if devices <= self.peers else self.network

    def multiplies(self, arithmetic: str) -> str:
        """The format in which the chip multiplies numbers of a format: it, or the next wider one that it has."""
        return next(form for form in _INSTEAD[arithmetic] if form in self.peak)

    def rate(self, arithmetic: str, rows: float | None = None) -> float:
        """FLOP/s of products of numbers of a format, at the peak or of so many rows; between two numbers of rows that
        were measured, a power of the rows.
        """
        form = self.multiplies(arithmetic)
        measured = sorted(self.by_rows.get(form, {}).items())
        if rows is None or not measured:
            return self.peak[form]
        (low, rate), *others = measured
        for high, faster in others:
            if rows <= high:
                return rate * math.pow(faster / rate, math.log(max(rows, low) / low) / math.log(high / low))
            low, rate = high, faster
        return rate


def names() -> tuple[str, ...]:
    """The chips that `read` knows, without `this`."""
    return tuple(_table("hardware.toml"))


def calibrated() -> bool:
    """Whether this machine has been measured."""
    return (cache_directory() / CALIBRATION).is_file()


def read(name: str) -> Chip:
    """The chip called `name`; ConfigError for one that nobody described, and for `this` before it was measured."""
    if name == THIS:
        return _measured()
    table = _table("hardware.toml")
    if name not in table:
        raise ConfigError(
            f"hardware is {name!r}: give one of {', '.join(table)}, or {THIS}, with a number before (8xh200)"
        )
    return described(table[name], name)


def efficiency(chip: Chip) -> Efficiency:
    """What a chip reaches: as chips of its kind do, but for what was measured on this one."""
    return Efficiency(**{**_table("efficiency.toml")[chip.kind], **chip.reached})


def _measured() -> Chip:
    path = cache_directory() / CALIBRATION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("this machine has not been measured: run `daedal bench --calibrate` first") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): run `daedal bench --calibrate` again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no object: run `daedal bench --calibrate` again")
    return described(found, THIS)


def described(row: Mapping[str, Any], name: str | None = None) -> Chip:
    """The chip of a row of `hardware.toml` or of a calibration; ConfigError for what no chip has."""
    name = row.get("name", THIS) if name is None else name
    known = {item.name for item in fields(Chip)}
    unknown, missing = row.keys() - known, {"name", "kind", "memory_bytes", "bandwidth", "peak"} - row.keys()
    if unknown or missing:
        wrong = f"has {min(unknown)!r}, which no chip has" if unknown else f"lacks {min(missing)!r}"
        raise ConfigError(f"the description of {name} {wrong}: docs/cost.md lists what a chip has")
    # The keys of an object in JSON are text.
    by_rows = {
        form: {int(rows): rate for rows, rate in rates.items()} for form, rates in row.get("by_rows", {}).items()
    }
    return Chip(**{"name": name, "source": "", "date": "", "certainty": "measured", **row, "by_rows": by_rows})


@cache
def _table(file: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("daedal.cost").joinpath(file).read_text(encoding="utf-8"))
