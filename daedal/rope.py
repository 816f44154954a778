"""Rotary embedding as configurations describe it: its base, how it is stretched to longer contexts, old spellings.

Angles themselves are computed by the model. Standard library only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from daedal.errors import ConfigError

_ROPE_NEEDS = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary embedding: its base and how it is stretched to longer contexts.

    `mscale` and `mscale_all_dim` are YaRN's length corrections as DeepSeek uses them (V2, appendix on long context);
    `attention_factor` overrides the multiplier of cos and sin that would follow from them.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_NEEDS:
            raise ConfigError(f"rope_type is {self.rope_type!r}: it must be one of {', '.join(_ROPE_NEEDS)}")
        for name in _ROPE_NEEDS[self.rope_type]:
            if getattr(self, name) is None:
                raise ConfigError(f"rope_type {self.rope_type!r} lacks `{name}`: add it to rope_parameters")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                low = 0.0 if item.name.startswith("mscale") else 1e-9
                if not (math.isfinite(value) and low <= value <= 1e12):
                    raise ConfigError(f"rope_parameters.{item.name} is {value}: it must be a finite positive number")
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope_parameters.truncate is {self.truncate!r}: it must be true or false")
        if self.rope_type == "yarn" and self.rope_theta <= 1.0:
            raise ConfigError(f"rope_parameters.rope_theta is {self.rope_theta}: YaRN needs a base above 1")
        slow, fast = self.low_freq_factor, self.high_freq_factor
        if slow is not None and fast is not None and fast <= slow:
            message = f"rope_parameters.high_freq_factor is {fast}, low_freq_factor {slow}"
            raise ConfigError(f"{message}: the first must be the larger")

    def length_scale(self) -> float:
        """What YaRN multiplies the softmax scale by in V2 and V3: m^2 with m = 1 + 0.1 mscale_all_dim ln(factor)."""
        if self.rope_type == "default" or not self.mscale_all_dim or self.factor is None:
            return 1.0
        return _yarn_magnitude(self.factor, self.mscale_all_dim) ** 2

    def rotation_scale(self) -> float:
        """What cos and sin are multiplied by: 1 unless YaRN asks for more."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor is not None
        if self.mscale and self.mscale_all_dim:
            return _yarn_magnitude(self.factor, self.mscale) / _yarn_magnitude(self.factor, self.mscale_all_dim)
        return _yarn_magnitude(self.factor, 1.0)


def rope_from_published(folded: Mapping[str, Any]) -> RopeParameters:
    """`rope_parameters`, or the older `rope_theta` beside `rope_scaling` with `type`.

    Where a file has both, the older one counts, as transformers reads it.
    """
    given = folded.get("rope_scaling") or folded.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters is {given!r}: it must be an object")
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str):
        raise ConfigError(f"rope_type is {kind!r}: it must be one of {', '.join(_ROPE_NEEDS)}")
    known = {item.name for item in fields(RopeParameters)}
    chosen = {name: value for name, value in given.items() if name in known and value is not None}
    chosen.setdefault("rope_theta", folded.get("rope_theta") or 10000.0)
    chosen["rope_type"] = kind
    if given.get("partial_rotary_factor", folded.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported yet; see docs/unsupported.md")
    if kind in ("yarn", "llama3") and folded.get("original_max_position_embeddings") is not None:
        chosen.setdefault("original_max_position_embeddings", folded["original_max_position_embeddings"])
    if kind == "yarn":
        original = chosen.setdefault("original_max_position_embeddings", folded.get("max_position_embeddings"))
        if chosen.get("factor") is None and isinstance(original, int) and original > 0:
            chosen["factor"] = folded["max_position_embeddings"] / original
    for name in chosen:
        if name not in ("rope_type", "truncate"):
            kind_of = int if name == "original_max_position_embeddings" else float
            chosen[name] = number(f"rope_parameters.{name}", chosen[name], kind_of)
    return RopeParameters(**chosen)


def rope_to_published(rope: RopeParameters) -> dict[str, Any]:
    names = ("rope_type", "rope_theta", *_ROPE_NEEDS[rope.rope_type])
    if rope.rope_type == "yarn":
        names += ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
    return {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}


def number(name: str, value: Any, kind: type) -> int | float:
    """`value` as `kind` (int or float); ConfigError where it is no such number."""
    good = isinstance(value, int) if kind is int else isinstance(value, int | float)
    if isinstance(value, bool) or not good:
        raise ConfigError(f"`{name}` is {value!r}: it must be {'a whole number' if kind is int else 'a number'}")
    return int(value) if kind is int else float(value)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
