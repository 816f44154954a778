"""Joules: read from the processor's own counters (RAPL) where the system lets us, else by a stated model.

RAPL counts what packages and memory draw, of all programs. The model is the processor's design power times the share of
its time that this process used: an estimate, and called so wherever it is shown. Of an accelerator nothing is read: it
counts as drawing its peak power while it works. Knows nothing of what runs.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daedal.errors import ConfigError

POWERCAP = Path("/sys/class/powercap")
ASSUMED_WATTS_PER_CORE = 5.0


class Meter(Protocol):
    """Counts joules up from an arbitrary start. source: in words, for people."""

    source: str
    watts: float | None  # the design power, where that is a model

    def read(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class _Zone:
    path: Path
    wraps_at: int

    def read(self) -> int:
        """Microjoules, which start again at 0 above `wraps_at`."""
        return int((self.path / "energy_uj").read_text())


class Rapl:
    """The counters of all packages and of their memory. Read it more often than they wrap: at least each minute."""

    source = "RAPL, packages and memory, of all programs"
    watts: float | None = None

    def __init__(self, zones: list[_Zone]):
        self._zones, self._last, self._total = zones, [zone.read() for zone in zones], 0

    def read(self) -> float:
        for index, zone in enumerate(self._zones):
            now = zone.read()
            passed = now - self._last[index]
            self._total += passed if passed >= 0 else passed + zone.wraps_at + 1
            self._last[index] = now
        return self._total / 1e6


class Modelled:
    """Design power x the share of all cores' time that this process used, and as much for each of the `processes` that
    do the same work.
    """

    def __init__(
        self,
        watts: float,
        cores: int,
        *,
        given: bool,
        processes: int = 1,
        used: Callable[[], float] = time.process_time,
    ):
        self.watts: float | None = watts
        self._joules_per_second, self._used = processes * watts / cores, used
        alike = "" if processes == 1 else f", as of one of {processes} processes alike"
        self.source = f"a model: {watts:g} W {'as given' if given else 'assumed'} x utilisation of {cores} cores{alike}"

    def read(self) -> float:
        return self._used() * self._joules_per_second


class Steady:
    """A constant power, of `devices` alike: of use where only the time between two readings in which something ran is
    counted.
    """

    def __init__(self, watts: float, chip: str, *, devices: int = 1, clock: Callable[[], float] = time.perf_counter):
        self.watts: float | None = devices * watts
        of = chip if devices == 1 else f"{devices} x {chip}"
        self.source = f"a model: {self.watts:g} W, the peak power of {of}, while it works"
        self._watts, self._clock = self.watts, clock

    def read(self) -> float:
        return self._clock() * self._watts


def meter(watts: float | None, *, root: Path = POWERCAP, cores: int | None = None, processes: int = 1) -> Meter:
    """RAPL where it can be read and no design power is given, else the model. processes: on this machine that do the
    same work, this one among them. ConfigError for watts below 0.
    """
    if watts is not None and not 0 < watts <= 1e5:
        raise ConfigError(f"--watts is {watts:g}: it must be above 0 and at most 100000")
    zones = [] if watts is not None else _zones(root)
    if zones:
        return Rapl(zones)
    cores = cores or os.cpu_count() or 1
    return Modelled(watts or ASSUMED_WATTS_PER_CORE * cores, cores, given=watts is not None, processes=processes)


def _zones(root: Path) -> list[_Zone]:
    """Those that count apart: packages and memory. Parts of a package are counted in it."""
    found = []
    for path in sorted(root.glob("intel-rapl:*")):
        try:
            name = (path / "name").read_text().strip()
            zone = _Zone(path=path, wraps_at=int((path / "max_energy_range_uj").read_text()))
            zone.read()
        except (OSError, ValueError):
            continue
        if name == "dram" or name.startswith("package"):
            found.append(zone)
    return found
