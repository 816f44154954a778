"""What `daedal bench` shows and writes: tables for people, and one object for programs. Measures nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from daedal.cli.units import in_bytes, in_flops

if TYPE_CHECKING:
    from daedal.bench.calibration import Calibration
    from daedal.bench.measuring import Phase, Point
    from daedal.bench.pieces import Rate

_ABSENT = "-"


def points_table(title: str, points: "Sequence[Point]") -> Table:
    """A row for each phase of each point."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("context", "batch", "", "tok/s", "each", "spread", "predicted", "error", "J/token", "KV cache"):
        table.add_column(heading, justify="left" if not heading else "right")
    for point in points:
        asked = (f"{point.context:,}", f"{point.batch:,}")
        for phase in point.phases:
            table.add_row(*asked, phase.name, *_cells(phase, point.batch), in_bytes(point.kv_bytes or 0))
        if point.refusal is not None:
            table.add_row(*asked, "refused", *(_ABSENT,) * 7)
    return table


def _cells(phase: "Phase", batch: int) -> Sequence[str]:
    return (
        _rate(phase.rate),
        _rate(phase.rate / batch),
        f"{phase.timing.spread:.0%}" if len(phase.timing.seconds) > 1 else _ABSENT,
        _ABSENT if phase.predicted is None else _rate(phase.predicted),
        _ABSENT if phase.error is None else f"{phase.error:+.0%}",
        _ABSENT if phase.joules_per_token is None else f"{phase.joules_per_token:.3g}",
    )


def point_object(point: "Point") -> dict[str, object]:
    """As docs/cost.md lists its keys."""
    return {
        "batch": point.batch,
        "context": point.context,
        "refusal": point.refusal,
        "kv_bytes": point.kv_bytes,
        "kv_bytes_predicted": point.kv_bytes_predicted,
        "phases": [
            {
                "phase": phase.name,
                "tokens_per_second": phase.rate,
                "seconds": phase.timing.median,
                "spread": phase.timing.spread,
                "repeats": len(phase.timing.seconds),
                "held_tokens": phase.held,
                "joules_per_token": phase.joules_per_token,
                "predicted_tokens_per_second": phase.predicted,
                "error_percent": None if phase.error is None else 100 * phase.error,
            }
            for phase in point.phases
        ],
    }


def calibration_tables(found: "Calibration") -> list[Table]:
    """The ceilings by format, and what was reached beside them."""
    rates = Table(title=found.chip.name, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("weights", "read per second", "spread", "multiplied per second", "spread"):
        rates.add_column(heading, justify="left" if heading == "weights" else "right")
    for form, read in found.read.items():
        multiplied = found.multiplied[form]
        cells = (in_bytes(read.per_second), _spread(read), in_flops(multiplied.per_second), _spread(multiplied))
        rates.add_row(form, *cells)
    for count, rate in found.by_threads.items():
        name = f"{count} thread{'s' if count > 1 else ''}, the fastest format"
        rates.add_row(name, in_bytes(rate.per_second), _spread(rate), _ABSENT, _ABSENT)
    rest = Table(title="of a step, beside them", title_justify="left", show_header=False, box=box.SIMPLE)
    parts = found.overheads
    for name, seconds in (
        ("every step", parts.step_seconds),
        ("every layer", parts.layer_seconds),
        ("another sequence, in each layer", parts.sequence_seconds),
        ("another expert, in each layer", parts.expert_seconds),
        ("every layer that reads a prompt", parts.prompt_layer_seconds),
    ):
        rest.add_row(name, "hidden by noise" if seconds is None else f"{seconds * 1e6:.2f} µs")
    for name, value, show in (
        ("passed between matrices of prompts, per second", parts.activations, in_bytes),
        ("power under load", found.chip.watts_peak, lambda watts: f"{watts:.1f} W, {found.energy}"),
    ):
        rest.add_row(name, "not known" if value is None else show(value))
    rest.add_row("memory", in_bytes(found.chip.memory_bytes))
    others = "" if found.others is None else f"; other programs took {found.others:.0%} of the processors"
    rest.add_row("spread of repeats", f"{found.spread:.1%} in the median{others}")
    return [rates, _rows_table(found), _attention_table(found), rest]


def _rows_table(found: "Calibration") -> Table:
    table = Table(title="multiplied per second, by rows", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("format", *(str(rows) for rows in next(iter(found.by_rows.values())))):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for form, rates in found.by_rows.items():
        table.add_row(form, *(in_flops(rate.per_second) for rate in rates.values()))
    return table


def _attention_table(found: "Calibration") -> Table:
    table = Table(title="attention", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("kind", "cache read per second", "spread", "multiplied per second, in prompts", "spread"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, decode in found.attending.decode.items():
        prefill = found.attending.prefill[kind]
        cells = (in_bytes(decode.per_second), _spread(decode), in_flops(prefill.per_second), _spread(prefill))
        table.add_row(kind, *cells)
    return table


def calibration_object(found: "Calibration") -> dict[str, object]:
    """As docs/cost.md lists its keys."""
    return {
        "chip": asdict(found.chip),
        "read_bytes_per_second": {form: rate.per_second for form, rate in found.read.items()},
        "flops_per_second": {form: rate.per_second for form, rate in found.multiplied.items()},
        "read_bytes_per_second_by_threads": {count: rate.per_second for count, rate in found.by_threads.items()},
        "energy": found.energy,
        "spread": found.spread,
        "others": found.others,
        "busy": found.busy,
        "seconds": found.seconds,
    }


def _spread(rate: "Rate") -> str:
    return f"{rate.timing.spread:.0%}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
