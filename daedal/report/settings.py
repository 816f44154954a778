"""What a token costs where it is computed: seconds, joules, dollars and memory held, measured here or predicted.

A setting is one hardware at one batch. Its tokens are priced at the mean context of a workload, apart for tokens that
are read and for tokens that are written. Every setting says how far its figures may be off. Knows no answers, and
prints nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daedal.cost import hardware, plan
from daedal.cost.hardware import THIS, Chip
from daedal.cost.plan import Prediction, Rate
from daedal.cost.prices import Prices
from daedal.cost.work import Model
from daedal.report.benches import Bench, Measured
from daedal.report.workloads import Unit

COUNTED, MEASURED, PREDICTED = "counted", "measured", "predicted"
ANYWHERE = "any"


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token's share of a step of all sequences. byte_seconds: of all memory that the model takes meanwhile."""

    seconds: float
    byte_seconds: float
    joules: float | None
    dollars: float | None


@dataclass(frozen=True, kw_only=True)
class Off:
    """How far figures may be off, as shares: of predictions the median and what nine of ten stayed under, over `pairs`
    that were held against measurements, None where none were; of measurements the spread of repeats.
    """

    median: float | None = None
    ninth: float | None = None
    pairs: int = 0
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something is computed. devices: `8xh200`, or ANYWHERE for what is counted and holds on all."""

    devices: str
    batch: int | None
    source: str


COUNTS = Place(devices=ANYWHERE, batch=None, source=COUNTED)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model in one place. read, written: None where the workload has no such tokens, and where `recorded`: then
    seconds and joules are those of the work itself, and `per_second` are dollars of a second. price: whose it is;
    energy: where joules are from; None where they are not known.
    """

    place: Place
    off: Off
    read: Token | None
    written: Token | None
    price: str | None
    energy: str | None
    recorded: bool = False
    per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Tokens that a sequence holds, on average over the tokens that are read, and over those that are written; None
    without such tokens. prompt: tokens of what is read at once.
    """

    prompt: float | None
    written: float | None

    @classmethod
    def of(cls, units: Sequence[Unit]) -> "Contexts":
        """Prompts are weighed by their tokens: what is long takes most of the time."""
        lengths = [unit.shared + ending for unit in units for ending in unit.endings]
        wrote = [(unit.read + (unit.written + 1) / 2, unit.written) for unit in units if unit.written]
        tokens = sum(count for _, count in wrote)
        return cls(
            prompt=sum(length * length for length in lengths) / sum(lengths) if any(lengths) else None,
            written=sum(held * count for held, count in wrote) / tokens if tokens else None,
        )


def measured(bench: Bench, model: Model, contexts: Contexts, *, batch: int, prices: Prices) -> Setting | str:
    """From rates of this machine, or why they tell nothing of this work. Memory is the weights and the cache."""
    found: dict[str, Measured | None] = {"prefill": None, "decode": None}
    for phase, context in (("prefill", contexts.prompt), ("decode", contexts.written)):
        if context is not None:
            point = bench.at(phase, batch=batch, context=max(context, 1.0))
            if isinstance(point, str):
                return point
            found[phase] = point
    points = [point for point in found.values() if point is not None]
    watts = max((point.joules / point.seconds for point in points if point.joules is not None), default=None)
    price, per_second = _price(prices, THIS, watts)

    def token(point: Measured | None) -> Token | None:
        if point is None:
            return None
        return Token(
            seconds=point.seconds,
            byte_seconds=(model.weight_bytes + point.kv_bytes) * point.seconds,
            joules=point.joules,
            dollars=None if per_second is None else per_second * point.seconds,
        )

    return Setting(
        place=Place(devices=THIS, batch=batch, source=MEASURED),
        off=Off(spread=max(point.spread for point in points)),
        read=token(found["prefill"]),
        written=token(found["decode"]),
        price=price,
        energy=bench.energy if all(point.joules is not None for point in points) else None,
    )


def recorded(units: Sequence[Unit], *, energy: str | None, prices: Prices) -> Setting | None:
    """What was measured while the work was done; None where nothing was. energy: where the joules are from."""
    if any(unit.seconds is None for unit in units):
        return None
    seconds = sum(unit.seconds or 0.0 for unit in units)
    joules = None if any(unit.joules is None for unit in units) else sum(unit.joules or 0.0 for unit in units)
    price, per_second = _price(prices, THIS, None if joules is None or not seconds else joules / seconds)
    return Setting(
        place=Place(devices=THIS, batch=None, source=MEASURED),
        off=Off(),
        read=None,
        written=None,
        price=price,
        energy=energy if joules is not None else None,
        recorded=True,
        per_second=per_second,
    )


def predicted(
    model: Model, chip: Chip, contexts: Contexts, *, name: str, devices: int, batch: int, prices: Prices
) -> Setting | str:
    """From the planner, or why the model cannot run there."""
    tokens: dict[str, Token | None] = {"prefill": None, "decode": None}
    price = None
    for phase, context in (("prefill", contexts.prompt), ("decode", contexts.written)):
        if context is None:
            continue
        found = plan.predict(
            model,
            hardware=name,
            chip=chip,
            devices=devices,
            context=max(round(context), 1),
            batch=batch,
            prices=prices,
        )
        rate = found.decode if phase == "decode" else found.prefill
        if rate is None:
            return _too_large(found, devices)
        tokens[phase], price = _token(found, rate)
    reached = hardware.efficiency(chip)
    return Setting(
        place=Place(devices=name if devices == 1 else f"{devices}x{name}", batch=batch, source=PREDICTED),
        off=Off(median=reached.median_error, ninth=reached.ninth_error, pairs=reached.pairs),
        read=tokens["prefill"],
        written=tokens["decode"],
        price=price,
        energy=_power(chip),
    )


def _power(chip: Chip) -> str | None:
    """Where predicted joules are from."""
    if chip.watts_peak is None:
        return None
    if chip.watts_idle is None:
        return "the chip’s peak power throughout, an upper estimate, because its idle power is not known"
    return "the chip’s peak power while parts of a step run, its idle power between them"


def _token(found: Prediction, rate: Rate) -> tuple[Token, str | None]:
    fit, per_token = found.fit, 1 / rate.tokens_per_second
    held = fit.weights - fit.far + fit.sequences * fit.kv_per_sequence + fit.workspace
    price = _chosen(rate.dollars_per_million)
    return Token(
        seconds=per_token,
        byte_seconds=held * fit.devices * per_token,
        joules=None if rate.joules_per_million is None else rate.joules_per_million / 1e6,
        dollars=None if price is None else rate.dollars_per_million[price] / 1e6,
    ), price


def _too_large(found: Prediction, devices: int) -> str:
    each = " on each" if devices > 1 else ""
    needed = "no number of them does" if found.devices_needed is None else f"{found.devices_needed} would hold it"
    return f"it does not fit: {found.fit.short / 2**30:.2f} GiB are missing{each}, {needed}"


def _price(prices: Prices, name: str, watts: float | None) -> tuple[str | None, float | None]:
    """Whose price, and dollars of a second of one device; the user's own rows stand last."""
    hourly = prices.per_hour(name, watts)
    label = _chosen(hourly)
    return label, None if label is None else hourly[label] / 3600


def _chosen(prices: Mapping[str, float]) -> str | None:
    """The price that is shown where there are several: the last row of the table, where the user's own stand."""
    return next(reversed(list(prices)), None)
