"""Chips as kernels see them: which formats their units multiply, how many cores, how much memory beside each.

What is known of chips that may not be here lies in `silicon.toml`; of a chip that is here, torch is asked as well.
Backends ask `of(device)` and choose forms and block sizes by what they find, never by a chip's name. Inside `assumed`
every device counts as the chip that is named, which is how a plan for another chip is made. Knows no op and no model.
"""

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch

from daedal.errors import ConfigError

THIS = "this"
# What every accelerator is taken to multiply until somebody says more.
_PLAIN = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One chip, as `silicon.toml` explains it. Numbers are None where nobody told."""

    key: str
    name: str
    device: str
    target: str
    formats: frozenset[str]
    doubles: bool = True
    called: tuple[str, ...] = ()
    cores: int | None = None
    lanes: int | None = None
    on_chip_bytes: int | None = None
    sums_on_chip: bool = False
    most_programs: int | None = None
    alignment: int = 1
    narrowest: int = 1
    memory: tuple[str, ...] = ()
    source: str
    certainty: str

    def __post_init__(self) -> None:
        for label in ("cores", "lanes", "on_chip_bytes", "most_programs", "alignment", "narrowest"):
            value = getattr(self, label)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{label} of {self.key} is {value!r}: it must be a whole number above 0, or left out")
        for label in ("doubles", "sums_on_chip"):
            if not isinstance(getattr(self, label), bool):
                raise ConfigError(f"{label} of {self.key} is {getattr(self, label)!r}: it must be true or false")
        if "float32" not in self.formats:
            raise ConfigError(f"formats of {self.key} lack float32: every chip has it")

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether matrix units take numbers of this type as they are."""
        return str(dtype).removeprefix("torch.") in self.formats

    @property
    def maker(self) -> str:
        """Whose compilers the target belongs to: "nvidia", "amd", or what stands before the first digit."""
        for prefix, maker in (("sm_", "nvidia"), ("gfx", "amd"), ("Ascend", "huawei")):
            if self.target.startswith(prefix):
                return maker
        return self.device


_assumed: ContextVar[Profile | None] = ContextVar("assumed_profile", default=None)


def names() -> tuple[str, ...]:
    """The chips that `read` knows, without `this`."""
    return tuple(_table())


def read(name: str) -> Profile:
    """The chip called so; `this` is the accelerator at hand, or the CPU. ConfigError for one that nobody described."""
    if name == THIS:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return of(accelerator or torch.device("cpu"))
    if name not in _table():
        raise ConfigError(f"profile is {name!r}: give one of {', '.join(_table())}, or {THIS}")
    return _table()[name]


def of(device: torch.device) -> Profile:
    """What is known of the chip behind a device."""
    return _assumed.get() or _present(device.type, device.index)


@contextmanager
def assumed(profile: Profile) -> Iterator[None]:
    """Inside the block every device counts as this chip."""
    token = _assumed.set(profile)
    try:
        yield
    finally:
        _assumed.reset(token)


def described(key: str, row: dict[str, Any]) -> Profile:
    """A profile from a row of `silicon.toml`."""
    try:
        lists: dict[str, Any] = {name: tuple(row.get(name, ())) for name in ("memory", "called")}
        lists["formats"] = frozenset(row["formats"])
        return Profile(key=key, **{**row, **lists})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{key} is described with {error} amiss: silicon.toml explains the fields") from None


@cache
def _table() -> dict[str, Profile]:
    text = resources.files("daedal.ops").joinpath("silicon.toml").read_text(encoding="utf-8")
    return {key: described(key, row) for key, row in tomllib.loads(text).items()}


@cache
def _present(kind: str, index: int | None) -> Profile:
    plain = Profile(
        key=THIS, name=kind, device=kind, target=kind, formats=_PLAIN, source="asked of torch", certainty="measured"
    )
    if kind == "cpu":
        return replace(plain, name="CPU", formats=_PLAIN | {"int8"}, cores=os.cpu_count())
    if kind != "cuda":
        return _called(kind, index, plain)
    properties = torch.cuda.get_device_properties(torch.device(kind, index or 0))
    target = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        target = properties.gcnArchName.split(":")[0]
    alike = (profile for profile in _table().values() if profile.target == target)
    known = next(alike, replace(plain, target=target))
    return replace(
        known,
        key=THIS,
        name=properties.name,
        cores=properties.multi_processor_count,
        lanes=properties.warp_size,
        on_chip_bytes=getattr(properties, "shared_memory_per_block_optin", known.on_chip_bytes),
    )


def _called(kind: str, index: int | None, plain: Profile) -> Profile:
    """The chip that is called as torch calls the one at hand; `plain` where torch does not tell, or nobody knows it."""
    ask = getattr(getattr(torch, kind, None), "get_device_properties", None)
    name = "" if ask is None else str(getattr(ask(index or 0), "name", ""))
    alike = (profile for profile in _table().values() if profile.device == kind and name.startswith(profile.called))
    # PyTorch's kernels for Apple's chips have no float64 either, whichever chip it is.
    known = next(alike, replace(plain, doubles=kind != "mps"))
    return replace(known, key=THIS, name=name or plain.name)
