"""What counting costs costs: the share of a decode step that the engine's meter takes.

    python benchmarks/metering.py smollm2-135m --weights int8 --batch 1 16

Each step of an engine with a tariff is timed as a whole and inside the meter, energy read as `daedal serve` reads it on
this machine; shares are medians over steps, and so hardly move when the machine is busy. Prints a table, and one JSON
line last.
"""

import argparse
import json
import statistics
import time
from typing import Any

from circumstances import circumstances
from rich.console import Console
from rich.table import Table

import daedal
from daedal.checkpoint.sources import resolve
from daedal.cost import energy
from daedal.cost.spending import Tariff
from daedal.infer.metering import Meter
from daedal.infer.request import Request, SamplingParams

PROMPT, STEPS = 128, 60


class Timed:
    """Stands in the place of a meter and times it."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        wanted = getattr(self._meter, name)

        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = wanted(*given, **named)
            self.seconds += time.perf_counter() - start
            return result

        return call


def measure(model: Any, batch: int) -> dict[str, float]:
    tariff = Tariff(energy=energy.meter(None))
    engine = daedal.Engine(model, max_batch=batch, max_context=PROMPT + STEPS + 2, tariff=tariff)
    timed = engine._meter = Timed(engine._meter)  # type: ignore[assignment, arg-type]
    for number in range(batch):
        ids = tuple((7 * number + place) % model.config.vocab_size for place in range(PROMPT))
        params = SamplingParams(max_tokens=STEPS + 1, temperature=0.0, ignore_eos=True)
        engine.add(Request(id=str(number), prompt=ids, params=params))
    inside, whole = [], []
    while engine.has_work:
        timed.seconds, start = 0.0, time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:
            passes = max(len(output.ids) for output in outputs)
            whole.append((time.perf_counter() - start) / passes)
            inside.append(timed.seconds / passes)
    shares = [part / step for part, step in zip(inside, whole, strict=True)]
    return {
        "batch": batch,
        "meter_microseconds": statistics.median(inside) * 1e6,
        "step_microseconds": statistics.median(whole) * 1e6,
        "share": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args()
    model = daedal.load(resolve(given.model), weights=given.weights)
    rows = [measure(model, batch) for batch in given.batch]
    table = Table(title=f"{given.model}, {given.weights}: the meter's part of a decode step")
    for heading in ("requests", "meter, µs", "step, µs", "share"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (f"{row['meter_microseconds']:.1f}", f"{row['step_microseconds']:,.0f}", f"{row['share']:.2%}")
        table.add_row(f"{row['batch']:.0f}", *cells)
    Console().print(table)
    print(json.dumps({**circumstances(), "model": given.model, "weights": given.weights, "rows": rows}))


if __name__ == "__main__":
    main()
