"""By what `daedal serve` counts the cost of answers: the power and the price of the machine that it runs on.

Energy is the processor's own count where it has one, else a model by the power of the hardware that is named; money is
what that hardware costs in the table of prices. Without `--hardware` a CPU is what `daedal bench --calibrate` found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from daedal.cost import hardware, prices
from daedal.cost.spending import Tariff, chip_here, energy_of, price_of
from daedal.errors import ConfigError

CostOption = Annotated[
    bool, typer.Option("--cost", help="Say in every answer's usage what it has cost; else only where a request asks.")
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What the server runs on, as `daedal cost` knows it, for power and price; `this` where a CPU is measured.",
    ),
]
PricesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Your own prices (TOML), over the known ones; see docs/cost.md.")
]
PriceOption = Annotated[
    str | None, typer.Option(metavar="LABEL", help="Which price of the hardware, where it has several.")
]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a user gave."""

    hardware: str | None = None
    prices: Path | None = None
    price: str | None = None

    def tariff(self, *, on_cpu: bool, processes: int = 1) -> Tariff:
        """For a server on a CPU, or on accelerators. processes: that hold the model together, each with an accelerator
        of its own. ConfigError for hardware and prices that do not exist.
        """
        chip = chip_here(on_cpu=on_cpu) if self.hardware is None else hardware.read(self.hardware)
        counter = energy_of(chip, on_cpu=on_cpu, processes=processes)
        devices = 1 if on_cpu else processes
        if chip is None:
            if self.prices is not None or self.price is not None:
                option = "--prices" if self.price is None else "--price"
                raise ConfigError(
                    f"{option} is given and nobody knows of which hardware: name it with --hardware, which may be "
                    f"{hardware.THIS} once `daedal bench --calibrate` has run"
                )
            return Tariff(energy=counter, processes=processes, devices=devices)
        name = hardware.THIS if self.hardware is None else self.hardware
        price = price_of(prices.read(self.prices), name, self.price)
        return Tariff(energy=counter, price=price, processes=processes, devices=devices)
