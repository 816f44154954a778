"""What `cost_error.py` compares with predictions: `python benchmarks/cost_measured.py [--rounds 5]`, 4 minutes a round.

Calibrates this machine before each run of a model and after the last, as `daedal bench --calibrate` does but shorter:
machines that are shared run faster and slower from minute to minute, so everything is measured in several rounds. A run
measures prompts and decoding of one model through the engine. Nothing is predicted here and nothing is fitted. Models
that are not in Daedal's cache are written there, with random weights. A machine at work cannot be measured by the
clock: `--cpu-time` uses one thread and counts the seconds that it had a processor.
"""

import argparse
import json
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances
from rich.console import Console

from daedal.bench import calibration
from daedal.bench.calibration import Effort
from daedal.bench.machine import Others
from daedal.bench.timing import Clock, Timing, repeated, shared
from daedal.bench.workload import Workload
from daedal.checkpoint.load import load
from daedal.checkpoint.save import save
from daedal.checkpoint.sources import SMOLLM2, resolve
from daedal.config import ModelConfig
from daedal.cost import energy
from daedal.model.transformer import Transformer, empty, initialise
from daedal.places import cache_directory

PAIRS = Path(__file__).with_name("cost_pairs.toml")
OUT = Path(__file__).with_name("cost_measured.json")
RUNS = ("smol:int4", "a:int4", "a2:int4", "v4s:int4", "a:int8", "smol:bf16", "a:bf16", "v4s:bf16", "a2:bf16")
POINTS = ("1x128", "1x2048", "4x128", "4x1024", "16x128")
LONG = "1x8192"  # of the runs that --long counts
READ_BYTES = 2**28  # half of what a calibration reads at most, as it is done so often
SHORT = 512  # tokens of prompts that are read several times

log = Console(stderr=True)


def checkpoint(name: str) -> Path:
    """The directory of a model, written if it is not there."""
    if name == "smol":
        return resolve(SMOLLM2.name)
    directory = cache_directory() / "bench" / name
    if not directory.is_dir():
        published = tomllib.loads(PAIRS.read_text(encoding="utf-8"))["models"][name]
        log.print(f"writing {directory}")
        model = initialise(empty(ModelConfig.from_published(published), dtype=torch.bfloat16), seed=0)
        save(model, directory)
    return directory


def measured(model: Transformer, batch: int, context: int, clock: Clock, seconds: float) -> Iterator[dict[str, Any]]:
    """Reading prompts, then decoding."""
    load = Workload(model, batch=batch, context=context)
    if batch > 1 or context <= SHORT:
        timing = repeated(load.read_prompts, clock=clock, seconds=seconds, least=1, warm=batch * context <= SHORT)
        yield _point("prefill", batch, context - 1, batch * (context - 1), timing)
        load.start()
    else:
        timing = repeated(load.start, clock=clock, seconds=0, least=1, warm=False)
        held = load.held - 1
        yield _point("prefill", batch, held, batch * held, timing)
    load.step()
    before = load.held
    timing = shared(load.step, clock=clock, seconds=seconds, most=load.steps_left - 1)
    yield _point("decode", batch, (before + load.held) // 2, batch, timing)


def _point(phase: str, batch: int, held: int, tokens: int, timing: Timing) -> dict[str, Any]:
    rate, repeats = tokens / timing.median, len(timing.seconds)
    return {"phase": phase, "batch": batch, "tokens": held, "rate": rate, "spread": timing.spread, "repeats": repeats}


def measure(
    runs: Sequence[str], asked: Sequence[str], long: int, rounds: int, clock: Clock, seconds: float, effort: Effort
) -> dict[str, Any]:
    """chips: this machine, before each run and after the last. points: `run` is the number of the run, from 0, counted
    through all rounds; points of the same model, weights, phase and `asked` are one measurement repeated.
    """
    chips: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []

    def calibrate() -> None:
        found = calibration.calibrate(
            device=torch.device("cpu"), dtype=torch.bfloat16, meter=energy.meter(None), effort=effort, clock=clock
        )
        chips.append({name: value for name, value in asdict(found.chip).items() if value is not None})

    for number, run in enumerate(run for _ in range(rounds) for run in runs):
        calibrate()
        name, _, weights = run.partition(":")
        log.print(f"measuring {name} in {weights}")
        model = load(checkpoint(name), device="cpu", dtype=torch.bfloat16, weights=weights)
        for which in (*asked, *([LONG] if number % len(runs) < long else [])):
            batch, _, context = which.partition("x")
            found = measured(model, int(batch), int(context), clock, seconds)
            told = {"run": number, "asked": which, "model": name, "weights": weights}
            points.extend({**told, **point} for point in found)
    calibrate()
    return {"chips": chips, "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="MODEL:WEIGHTS")
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="BATCHxCONTEXT")
    parser.add_argument("--long", type=int, default=5, help=f"so many of the runs also at {LONG}")
    parser.add_argument("--rounds", type=int, default=5, help="of all runs")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement at least")
    parser.add_argument("--effort", type=float, default=0.04, help="seconds of each figure of a calibration")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    clock: Callable[[], float] = time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
        clock = time.thread_time
    for run in arguments.runs:
        checkpoint(run.partition(":")[0])
    others, started = Others(), time.perf_counter()
    effort = Effort(seconds=arguments.effort, read_bytes=READ_BYTES)
    found = measure(
        arguments.runs, arguments.points, arguments.long, arguments.rounds, clock, arguments.seconds, effort
    )
    told = {
        **circumstances(),
        "clock": "one thread's time on a processor" if arguments.cpu_time else "wall",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started, 1),
        "others": others.share(),
        **found,
    }
    arguments.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in told.items() if key not in ("chips", "points")}))


if __name__ == "__main__":
    main()
