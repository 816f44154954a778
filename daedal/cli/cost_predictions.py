"""What `daedal cost --hardware` shows: one row for each hardware, context and batch, and the same for machines.

Knows how predictions are written, not how they are made.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from daedal.cli.cost_arguments import Devices
from daedal.cli.units import in_bytes, in_flops
from daedal.config import ModelConfig
from daedal.cost import hardware, plan, prices, work
from daedal.cost.hardware import Chip
from daedal.cost.plan import NOT_MODELLED, Prediction, Rate
from daedal.cost.prices import Prices
from daedal.cost.roofline import Timed
from daedal.errors import ConfigError

_ABSENT = "-"
_NOTE_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to predict, as the user said it."""

    devices: Sequence[Devices]
    contexts: Sequence[int]
    batches: Sequence[int]
    weights: str
    kv_cache_dtype: str
    skew: float
    acceptance: float | None
    experts_in: str


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of one model. refused: hardware that could not be predicted, and why."""

    model: str
    made: Sequence[Prediction]
    refused: Mapping[str, str]


def predictions(name: str, config: ModelConfig, wanted: Wanted, table: Prices) -> Predictions:
    """Predicts every combination. A machine that was not measured is told of; it is an error if there is no other."""
    model = work.model(
        config,
        weights=wanted.weights,
        kv_dtype=wanted.kv_cache_dtype,
        skew=wanted.skew,
        drafting=wanted.acceptance is not None,
    )
    chips, refused = _chips(wanted.devices)
    made = [
        plan.predict(
            model,
            hardware=devices.chip,
            chip=chip,
            devices=devices.number,
            context=context,
            batch=batch,
            prices=table,
            acceptance=wanted.acceptance or 0.0,
            experts_in=wanted.experts_in,
        )
        for devices, chip in chips
        for context in wanted.contexts
        for batch in wanted.batches
    ]
    return Predictions(model=name, made=made, refused=refused)


def _chips(wanted: Sequence[Devices]) -> tuple[list[tuple[Devices, Chip]], dict[str, str]]:
    found: list[tuple[Devices, Chip]] = []
    refused: dict[str, str] = {}
    for devices in wanted:
        try:
            found.append((devices, hardware.read(devices.chip)))
        except ConfigError as error:
            if devices.chip != hardware.THIS or len(wanted) == 1:
                raise
            refused[str(devices)] = str(error)
    return found, refused


def read_prices(own: Path | None) -> Prices:
    """The table of prices, the user's own on top."""
    return prices.read(own)


def show(console: Console, predicted: Sequence[Predictions], wanted: Wanted) -> None:
    """The tables of each model, the parts of a step where there is one prediction only, and what has to be said."""
    for one in predicted:
        console.print(_memory(one, wanted))
        if any(made.decode for made in one.made):
            console.print(_speed(one), _money(one))
        if len(one.made) == 1 and one.made[0].decode is not None:
            console.print(_parts(one.made[0].decode))
    for name, reason in predicted[0].refused.items():
        console.print(f"{name}: {reason}")
    for note in _notes([made for one in predicted for made in one.made]):
        console.print(textwrap.fill(note, _NOTE_WIDTH))


def _memory(predicted: Predictions, wanted: Wanted) -> Table:
    table = _empty(_title(predicted.model, wanted), ("users at once", "cache of each", "fits"))
    for one in predicted.made:
        table.add_row(*_asked(one), f"{one.fit.users:,}", in_bytes(one.fit.kv_per_sequence), _fits(one))
    return table


def _speed(predicted: Predictions) -> Table:
    headings = ("decode tok/s", "each", "bound", "prefill tok/s", "bound", "first token")
    table = _empty(f"{predicted.model}, speed", headings)
    for one in predicted.made:
        if one.decode is not None and one.prefill is not None and one.first_token is not None:
            decode, prefill = one.decode.tokens_per_second, one.prefill.tokens_per_second
            cells = (_rate(decode), _rate(decode / one.batch), one.decode.bound)
            table.add_row(*_asked(one), *cells, _rate(prefill), one.prefill.bound, _seconds(one.first_token))
    return table


def _money(predicted: Predictions) -> Table:
    headings = ("J per token out", "in", "$ per million out", "in")
    table = _empty(f"{predicted.model}, energy and money", headings)
    for one in predicted.made:
        if one.decode is not None and one.prefill is not None:
            joules = (_joules(one.decode), _joules(one.prefill))
            table.add_row(*_asked(one), *joules, _dollars(one.decode), _dollars(one.prefill))
    return table


def _empty(title: str, headings: Sequence[str]) -> Table:
    """A table that begins with what was asked."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("hardware", "context", "batch", *headings):
        table.add_column(heading, justify="left" if heading in ("hardware", "bound", "fits") else "right")
    return table


def _asked(one: Prediction) -> tuple[str, str, str]:
    return str(Devices(one.layout.devices, one.hardware)), f"{one.context:,}", f"{one.batch:,}"


def _parts(rate: Rate) -> Table:
    """One decoding step on one device."""
    table = Table(title="a decoding step, on each device", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("part", "compute", "in", "weights read", "cache read", "sent or fetched", "time", "bound"):
        table.add_column(heading, justify="left" if heading in ("part", "in", "bound") else "right")
    for timed in rate.step.parts:
        part = timed.part
        moved = part.link_bytes + part.far_bytes
        amounts = (part.weight_bytes, part.cache_bytes, moved)
        cells = [in_bytes(amount) if amount else _ABSENT for amount in amounts]
        compute = (in_flops(part.flops), part.arithmetic) if part.flops else (_ABSENT, "")
        table.add_row(part.name, *compute, *cells, _micros(timed.seconds), timed.bound)
    table.add_row("launching", _ABSENT, "", _ABSENT, _ABSENT, _ABSENT, _micros(rate.step.overhead), "overhead")
    return table


def _title(model: str, wanted: Wanted) -> str:
    said = [f"weights {wanted.weights}", f"cache {wanted.kv_cache_dtype}"]
    if wanted.skew:
        said.append(f"loads of experts skewed by {wanted.skew:g}")
    if wanted.acceptance is not None:
        said.append(f"drafts accepted with {wanted.acceptance:g}")
    if wanted.experts_in != "memory":
        said.append(f"experts that do not fit in {wanted.experts_in}")
    return f"{model}, predicted: {', '.join(said)}"


def _fits(one: Prediction) -> str:
    if one.decode is not None:
        away = f", {in_bytes(one.fit.far)} of experts outside" if one.fit.far else ""
        return ("yes" if one.layout.devices == 1 else one.layout.kind) + away
    needed = "no number of them does" if one.devices_needed is None else f"{one.devices_needed} would hold it"
    each = " on each" if one.layout.devices > 1 else ""
    return f"no: {in_bytes(one.fit.short)} short{each}, {needed}"


def _notes(made: Sequence[Prediction]) -> list[str]:
    notes = []
    chips = {one.hardware: one.chip for one in made}
    unpriced = [one.hardware for one in made if one.decode is not None and not one.decode.dollars_per_million]
    unpowered = [name for name, chip in chips.items() if chip.watts_peak is None]
    if unpriced:
        notes.append(f"no price is known for {', '.join(dict.fromkeys(unpriced))}: give one with --prices FILE")
    if unpowered:
        notes.append(f"no power is known for {', '.join(unpowered)}, so no energy")
    notes += _widened(made)
    for kind in dict.fromkeys(chip.kind for chip in chips.values()):
        reached = hardware.efficiency(next(chip for chip in chips.values() if chip.kind == kind))
        notes.append(_off(kind, reached))
    doubtful = [
        f"{name} {chip.certainty}" for name, chip in chips.items() if chip.certainty not in ("datasheet", "measured")
    ]
    if doubtful:
        notes.append(f"figures of chips that are not the maker's final ones: {', '.join(doubtful)}")
    notes.append(f"not modelled: {'; '.join(NOT_MODELLED)}")
    return notes


def _widened(made: Sequence[Prediction]) -> list[str]:
    """Where a chip lacks the arithmetic of the model's numbers."""
    found = {
        (one.hardware, timed.part.arithmetic, one.chip.multiplies(timed.part.arithmetic))
        for one in made
        for timed in (one.decode.step.parts if one.decode else ())
    }
    return [
        f"{name} has no {form} arithmetic: such numbers are multiplied in {used}"
        for name, form, used in sorted(found)
        if form != used
    ]


def _off(kind: str, reached: hardware.Efficiency) -> str:
    if reached.median_error is None or reached.ninth_error is None:
        return f"{kind}: these predictions were held against no measurement"
    return (
        f"{kind}: {reached.pairs} predictions held against measurements were off by {reached.median_error:.0%} in the "
        f"median, nine of ten by at most {reached.ninth_error:.0%}"
    )


def as_objects(predicted: Predictions, wanted: Wanted) -> list[dict[str, object]]:
    """One object for each prediction, as docs/cost.md lists its keys; a refusal has `refusal` in place of figures."""
    refused: list[dict[str, object]] = [
        {"model": predicted.model, "hardware": name, "refusal": reason} for name, reason in predicted.refused.items()
    ]
    return [_object(predicted.model, one, wanted) for one in predicted.made] + refused


def _object(model: str, one: Prediction, wanted: Wanted) -> dict[str, object]:
    reached = hardware.efficiency(one.chip)
    return {
        "model": model,
        "hardware": one.hardware,
        "devices": one.layout.devices,
        "layout": one.layout.kind,
        "context": one.context,
        "batch": one.batch,
        "weights": wanted.weights,
        "kv_cache_dtype": wanted.kv_cache_dtype,
        "fits": one.decode is not None,
        "short_bytes": round(one.fit.short),
        "devices_needed": one.devices_needed,
        "memory_bytes": round(one.fit.memory),
        "weight_bytes": round(one.fit.weights),
        "far_bytes": round(one.fit.far),
        "kv_bytes_per_sequence": round(one.fit.kv_per_sequence),
        "workspace_bytes": round(one.fit.workspace),
        "users": one.fit.users,
        "first_token_seconds": one.first_token,
        **_flat("decode", "output", one.decode),
        **_flat("prefill", "input", one.prefill),
        "error_median": reached.median_error,
        "error_ninth": reached.ninth_error,
        "error_pairs": reached.pairs,
        "chip_source": one.chip.source,
        "chip_date": one.chip.date,
        "chip_certainty": one.chip.certainty,
    }


def _flat(phase: str, tokens: str, rate: Rate | None) -> dict[str, object]:
    """The figures of one phase under keys of their own; null where the model does not fit."""
    step = None if rate is None else rate.step
    return {
        f"{phase}_tokens_per_second": None if rate is None else rate.tokens_per_second,
        f"{phase}_step_seconds": None if rate is None else rate.seconds,
        f"{phase}_bound": None if rate is None else rate.bound,
        f"{phase}_seconds_by_bound": None if step is None else dict(step.by_bound),
        f"{phase}_parts": None if step is None else [_part(timed) for timed in step.parts],
        f"joules_per_million_{tokens}": None if rate is None else rate.joules_per_million,
        f"dollars_per_million_{tokens}": None if rate is None else dict(rate.dollars_per_million),
    }


def _part(timed: Timed) -> dict[str, object]:
    part = timed.part
    return {
        "name": part.name,
        "flops": part.flops,
        "arithmetic": part.arithmetic,
        "weight_bytes": part.weight_bytes,
        "cache_bytes": part.cache_bytes,
        "link_bytes": part.link_bytes,
        "far_bytes": part.far_bytes,
        "seconds": timed.seconds,
        "bound": timed.bound,
    }


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _micros(value: float) -> str:
    return f"{value * 1e6:,.1f} µs"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"


def _joules(rate: Rate) -> str:
    return _ABSENT if rate.joules_per_million is None else f"{rate.joules_per_million / 1e6:.3g}"


def _dollars(rate: Rate) -> str:
    if not rate.dollars_per_million:
        return _ABSENT
    low, high = (
        f"{value:.3g}" for value in (min(rate.dollars_per_million.values()), max(rate.dollars_per_million.values()))
    )
    return low if low == high else f"{low}-{high}"
