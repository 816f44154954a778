"""What answers cost while they are made: work, memory held over time, time of the device, energy, money.

A tariff says what a second of the device and a joule come to; it is chosen once, when an engine is made. Energy is
measured or modelled (`energy`), money follows from the table of prices. Time in which nothing runs belongs to no
answer. Knows no requests.
"""

from dataclasses import dataclass
from typing import Self

from daedal.cost import energy, hardware
from daedal.cost.energy import Meter
from daedal.cost.hardware import Chip
from daedal.cost.prices import Prices
from daedal.errors import ConfigError

_HOUR, _KILOWATT = 3600.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class Spent:
    """flops: a multiply-add counts 2. kv_byte_seconds: bytes of the cache held, times how long. device_seconds: a share
    of the steps' time. joules, dollars: None where nobody measured or told.
    """

    flops: float
    kv_byte_seconds: float
    device_seconds: float
    joules: float | None = None
    dollars: float | None = None

    def __add__(self, other: Self) -> "Spent":
        """Both together; what is not known of one is not known of the sum."""
        return Spent(
            flops=self.flops + other.flops,
            kv_byte_seconds=self.kv_byte_seconds + other.kv_byte_seconds,
            device_seconds=self.device_seconds + other.device_seconds,
            joules=_sum(self.joules, other.joules),
            dollars=_sum(self.dollars, other.dollars),
        )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True, kw_only=True)
class Price:
    """dollars_per_second: of a device, whatever it does. dollars_per_joule: of the electricity that comes on top, 0
    where it is in the first. label: whose price that is.
    """

    label: str
    dollars_per_second: float
    dollars_per_joule: float


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """What is counted beside work and memory; None where it is not known.

    processes: that hold the model together, each with such a cache as the one that counts. devices: that all of them
    run on; a machine's CPU is one. energy: of all of them. price: of one device.
    """

    energy: Meter | None = None
    price: Price | None = None
    processes: int = 1
    devices: int = 1

    def spent(self, *, flops: float, kv_byte_seconds: float, device_seconds: float, joules: float) -> Spent:
        """Of all processes and devices, from what the counting process held and how long it took; with the money that
        it comes to, None where a price counts electricity and nobody the joules.
        """
        known = None if self.energy is None else joules
        kv_byte_seconds, device_seconds = self.processes * kv_byte_seconds, self.devices * device_seconds
        return Spent(
            flops=flops,
            kv_byte_seconds=kv_byte_seconds,
            device_seconds=device_seconds,
            joules=known,
            dollars=self._dollars(device_seconds, known),
        )

    def _dollars(self, seconds: float, joules: float | None) -> float | None:
        price = self.price
        if price is None or (joules is None and price.dollars_per_joule):
            return None
        return price.dollars_per_second * seconds + price.dollars_per_joule * (joules or 0.0)


def chip_here(*, on_cpu: bool) -> Chip | None:
    """What this process runs on, where that is a CPU that was measured; ConfigError for a damaged measurement."""
    return hardware.read(hardware.THIS) if on_cpu and hardware.calibrated() else None


def energy_of(chip: Chip | None, *, on_cpu: bool, processes: int = 1) -> Meter | None:
    """How joules are counted on a chip: by a CPU's own counters, else by its power, a measured or an assumed one; on an
    accelerator by its peak power, None where that is not known. processes: that do the same work, on one CPU or each on
    a chip of its own.
    """
    watts = None if chip is None else chip.watts_peak
    if on_cpu:
        counted = energy.meter(None, processes=processes)
        modelled = watts is not None and not isinstance(counted, energy.Rapl)
        return energy.meter(watts, processes=processes) if modelled else counted
    return None if chip is None or watts is None else energy.Steady(watts, chip.name, devices=processes)


def price_of(prices: Prices, hardware: str, label: str | None = None) -> Price | None:
    """The price of one device, None where the table has none. ConfigError where it has several and `label` chooses none
    of them, or chooses what is not there.
    """
    idle, drawing = prices.per_hour(hardware, 0.0), prices.per_hour(hardware, _KILOWATT)
    known = ", ".join(map(repr, idle)) or "none"
    if label is None and len(idle) > 1:
        raise ConfigError(f"{hardware} has several prices, {known}: choose one with --price")
    if label is not None and label not in idle:
        raise ConfigError(f"--price is {label!r}, and the prices of {hardware} are {known}: give one of them")
    if not idle:
        return None
    chosen = label or next(iter(idle))
    return Price(
        label=chosen,
        dollars_per_second=idle[chosen] / _HOUR,
        dollars_per_joule=(drawing[chosen] - idle[chosen]) / _HOUR / _KILOWATT,
    )
