"""Checks of the numbers that a recipe gives: each is a number, finite and in range, or refused by its name.

A file format may hand over text where a number was meant: YAML reads `1e-20`, without a decimal point, as a string.
Such a value is refused here, with the way to write it, and never converted. Knows nothing of what the numbers are for.
"""

import math
from numbers import Real

from daedal.errors import ConfigError


def number(name: str, value: object, *, low: float, high: float, above: bool = False) -> float:
    """`value` as a float from `low` to `high`; above: `low` itself is refused. ConfigError for anything else."""
    span = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"`{name}` is {_shown(value)}: it must be {span}{_remedy(value)}")
    given = float(value)
    if not math.isfinite(given) or not low <= given <= high or (above and given == low):
        raise ConfigError(f"`{name}` is {value!r}: it must be {span}")
    return given


def whole(name: str, value: object, *, low: int, high: int = 2**53) -> int:
    """`value` as an int from `low` to `high`. ConfigError for anything else, a float with no fraction included."""
    span = f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"`{name}` is {_shown(value)}: it must be {span}{_remedy(value)}")
    if not low <= value <= high:
        raise ConfigError(f"`{name}` is {value!r}: it must be {span}")
    return value


def _shown(value: object) -> str:
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


def _remedy(value: object) -> str:
    if not isinstance(value, str):
        return ""
    try:
        meant = float(value)
    except ValueError:
        return ", written without quotes"
    mantissa, mark, exponent = repr(meant).partition("e")
    plain = f"{mantissa if '.' in mantissa else mantissa + '.0'}{mark}{exponent}"
    return f", so write {plain} without quotes (YAML takes a number like 1e-20, with no decimal point, for text)"
