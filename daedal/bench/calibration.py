"""This machine's own ceilings, measured in some seconds, as the planner's `this` reads them.

What is written is a `Chip`: bandwidth and peaks are what the kernels reached at the median, and shares of them what an
engine reached. A machine that did other work meanwhile is told of, and its figures are not kept unless asked.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from daedal.bench import machine, pieces
from daedal.bench.attending import Attending, attending
from daedal.bench.overheads import Overheads, Steps, overheads
from daedal.bench.pieces import BY_ROWS, READ_BYTES, SIDE, Rate
from daedal.bench.timing import Clock
from daedal.bench.workload import CHUNK
from daedal.checkpoint.staging import sync
from daedal.cost.energy import Meter
from daedal.cost.hardware import CALIBRATION, Chip
from daedal.errors import ConfigError
from daedal.places import cache_directory

MOST_SPREAD, MOST_OTHERS = 0.10, 0.10
_PEAKS: Mapping[str, str] = MappingProxyType({"int8": "int8", "int4": "w4", "fp8": "fp8"})
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """seconds: of each measurement. The sizes are for machines; tests take smaller ones."""

    seconds: float = 0.4
    read_bytes: int = READ_BYTES
    side: int = SIDE
    past: int = 4096
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 60:
            raise ConfigError(f"--seconds is {self.seconds:g}: it must be above 0 and at most 60")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """chip: what will be written. read, multiplied: by format, with all threads. by_rows: FLOP/s by the planner's name
    of a format and by rows. by_threads: of the fastest format.

    spread: half of the repeats of the median measurement lie within so large a part of their median. others: share of
    the processors that other programs took, None where the system does not tell.
    """

    chip: Chip
    read: Mapping[str, Rate]
    multiplied: Mapping[str, Rate]
    by_rows: Mapping[str, Mapping[int, Rate]]
    by_threads: Mapping[int, Rate]
    attending: Attending
    overheads: Overheads
    energy: str
    spread: float
    others: float | None
    seconds: float

    @property
    def busy(self) -> str | None:
        """Why these figures are not this machine's ceilings; None where nothing speaks against them."""
        if self.spread > MOST_SPREAD:
            return f"repeats lie {self.spread:.0%} apart, at most {MOST_SPREAD:.0%} is a quiet machine"
        if self.others is not None and self.others > MOST_OTHERS:
            return f"other programs took {self.others:.0%} of the processors, at most {MOST_OTHERS:.0%} is quiet"
        return None


def calibrate(
    *,
    device: torch.device,
    dtype: torch.dtype,
    meter: Meter,
    effort: Effort | None = None,
    clock: Clock = time.perf_counter,
    others: Callable[[], float | None] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Measures. dtype: what unpacked models compute in here. others: the share that other programs took since now."""
    effort, others = effort or Effort(), others or machine.Others().share
    started, pace = clock(), _Pace(device, clock, effort, progress)
    read = {form: pace.read(form) for form in pace.forms}
    best = max(read, key=lambda form: read[form].per_second)
    by_threads = {}
    for count in pieces.thread_counts() if device.type == "cpu" else ():
        with pieces.threads(count):
            by_threads[count] = pace.read(best)
    busy_started, busy_joules = clock(), meter.read()
    multiplied = {form: pace.multiply(form) for form in pace.forms}
    watts = (meter.read() - busy_joules) / max(clock() - busy_started, 1e-9)
    by_rows = {name: pace.by_rows(form) for name, form in _served(pace.forms).items()}
    progress("attention", 2, 3)
    packed = "int8" in pace.forms
    attended = attending(
        device, dtype=torch.bfloat16 if packed else dtype, clock=clock, seconds=effort.seconds / 2, past=effort.past
    )
    power = (meter.watts or watts) if device.type == "cpu" else None
    chip = _chip(device, read, multiplied, by_rows, attended, power, meter)
    progress("steps of small engines", 2, 3)
    steps = Steps(packed=packed, dtype=dtype, device=device, clock=clock, seconds=effort.seconds, chunk=effort.chunk)
    found = overheads(steps, chip)
    progress("done", 3, 3)
    rates = [*read.values(), *by_threads.values(), *multiplied.values(), *attended.decode.values()]
    rates += [*attended.prefill.values(), *(rate for several in by_rows.values() for rate in several.values())]
    spreads = sorted(timing.spread for timing in [*(rate.timing for rate in rates), *found.timings.values()])
    return Calibration(
        chip=replace(chip, reached={**chip.reached, **_known(found)}),
        read=read,
        multiplied=multiplied,
        by_rows=by_rows,
        by_threads=by_threads,
        attending=attended,
        overheads=found,
        energy=meter.source,
        spread=spreads[len(spreads) // 2],
        others=others(),
        seconds=clock() - started,
    )


class _Pace:
    """Measures the formats of one device, all with one effort, and says where it is."""

    def __init__(self, device: torch.device, clock: Clock, effort: Effort, progress: Progress):
        self.forms = pieces.formats(device)
        self._device, self._clock, self._effort, self._progress = device, clock, effort, progress

    def read(self, form: str) -> Rate:
        self._progress(f"reading {form}", 0, 3)
        return pieces.read_rate(
            form, self._device, clock=self._clock, seconds=self._effort.seconds, nbytes=self._effort.read_bytes
        )

    def multiply(self, form: str) -> Rate:
        self._progress(f"multiplying {form}", 1, 3)
        return pieces.multiply_rate(
            form, self._device, clock=self._clock, seconds=self._effort.seconds, side=self._effort.side
        )

    def by_rows(self, form: str) -> dict[int, Rate]:
        """A sixteenth of what is read, in half the time each."""
        self._progress(f"rows of {form}", 1, 3)
        seconds, nbytes = self._effort.seconds / 2, self._effort.read_bytes // 16
        return {
            rows: pieces.rows_rate(form, rows, self._device, clock=self._clock, seconds=seconds, nbytes=nbytes)
            for rows in BY_ROWS
        }


def _served(forms: Sequence[str]) -> dict[str, str]:
    """By the planner's names, the formats that models are held in here."""
    packed = {name: form for form, name in _PEAKS.items() if form in forms}
    return {"bf16": "bf16" if "bf16" in forms else "bfloat16", **packed}


def _known(found: Overheads) -> dict[str, float]:
    """What noise did not hide."""
    names = (
        "step_seconds",
        "layer_seconds",
        "sequence_seconds",
        "expert_seconds",
        "prompt_layer_seconds",
        "activations",
    )
    values = {name: getattr(found, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def write(found: Calibration, *, force: bool = False) -> Path:
    """Keeps the figures in Daedal's cache, whole or not at all. ConfigError for a busy machine, unless forced, and
    where nothing can be written.
    """
    if found.busy and not force:
        raise ConfigError(
            f"this machine is busy: {found.busy}; nothing was kept: measure again when it is idle, or give --force"
        )
    path = cache_directory() / CALIBRATION
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    row = {name: value for name, value in asdict(found.chip).items() if value is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error}): set DAEDAL_CACHE to a place that can") from error
    return path


def _chip(
    device: torch.device,
    read: Mapping[str, Rate],
    multiplied: Mapping[str, Rate],
    by_rows: Mapping[str, Mapping[int, Rate]],
    attended: Attending,
    watts: float | None,
    meter: Meter,
) -> Chip:
    """Without what small models tell."""
    bandwidth = max(rate.per_second for rate in read.values())
    rates = {form: rate.per_second for form, rate in multiplied.items()}
    peak = {"float32": rates["float32"], "bf16": max(rates["bfloat16"], rates.get("bf16", 0.0))}
    peak |= {name: rates[form] for form, name in _PEAKS.items() if form in rates}
    bandwidth_by = {name: read[form].per_second / bandwidth for name, form in _served(tuple(read)).items()}
    cache_by = {kind: rate.per_second / bandwidth for kind, rate in attended.decode.items()}
    attention_by = {kind: rate.per_second / peak["bf16"] for kind, rate in attended.prefill.items()}
    return Chip(
        name=machine.processor() if device.type == "cpu" else str(device),
        kind="measured",
        memory_bytes=float(machine.memory_bytes(device)),
        bandwidth=bandwidth,
        peak=peak,
        by_rows={name: {rows: rate.per_second for rows, rate in rates.items()} for name, rates in by_rows.items()},
        watts_peak=watts if watts is not None and watts > 0 else None,
        reached={
            "bandwidth": read.get("int8", read["bfloat16"]).per_second / bandwidth,
            "bandwidth_by": bandwidth_by,
            "cache": cache_by["latent"],
            "attention": attention_by["compressed"],
            "cache_by": cache_by,
            "attention_by": attention_by,
        },
        source=f"daedal bench --calibrate, {torch.get_num_threads()} threads; watts by {meter.source}",
        date=time.strftime("%Y-%m-%d"),
        certainty="measured",
    )
