"""What a model would do on devices that one need not have: what fits, how fast, bound by what, for how much.

Puts the pieces together: the work of a step, how devices share it, what of their peaks they reach, power and prices.
Predictions are of one steady load: a batch of sequences that all have the same context. What is not in the model is
listed in `NOT_MODELLED`, and belongs beside every figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from daedal.cost import memory, parallel, roofline
from daedal.cost.hardware import Chip, Efficiency, efficiency
from daedal.cost.memory import Fit
from daedal.cost.parallel import Layout
from daedal.cost.prices import Prices, per_million
from daedal.cost.roofline import Step
from daedal.cost.work import ROUTED, Model, Part
from daedal.errors import ConfigError

NOT_MODELLED = (
    "queueing and uneven arrival of requests",
    "prompts read in while others decode",
    "prefixes that requests share",
    "uneven loads of experts between devices",
    "transfers that overlap with arithmetic",
    "pipeline parallelism, and tensor and expert parallelism at once",
    "clocks that fall when chips are hot",
    "power of the host, fans and network",
)
TIERS = ("memory", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """tokens_per_second: of all sequences. seconds: of one step. Per million tokens: joules, None where the power is
    not known, and dollars by the label of the price.
    """

    tokens_per_second: float
    seconds: float
    bound: str
    step: Step
    joules_per_million: float | None
    dollars_per_million: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One model on one kind of hardware, at one context and batch. Rates are None where it does not fit; then
    `devices_needed` says how many would do (a power of two, None if none). first_token: seconds to read one prompt in.
    """

    hardware: str
    chip: Chip
    layout: Layout
    context: int
    batch: int
    fit: Fit
    devices_needed: int | None
    decode: Rate | None
    prefill: Rate | None
    first_token: float | None


def predict(
    model: Model,
    *,
    hardware: str,
    chip: Chip,
    devices: int,
    context: int,
    batch: int,
    prices: Prices,
    acceptance: float = 0.0,
    experts_in: str = "memory",
) -> Prediction:
    """Predicts the fastest layout of those that fit, by its decoding.

    acceptance: probability that a drafted token is taken, given the one before was. experts_in: where experts go that
    do not fit, on one device. ConfigError for what makes no sense.
    """
    _check(context, batch, devices, acceptance, experts_in, chip)
    reached = efficiency(chip)
    away = experts_in != "memory"
    best: Prediction | None = None
    for layout in parallel.layouts(model.config, devices):
        held = memory.fit(model, layout, chip, reached, batch=batch, context=context, away=away)
        found = Prediction(
            hardware=hardware,
            chip=chip,
            layout=layout,
            context=context,
            batch=batch,
            fit=held,
            devices_needed=None,
            decode=None,
            prefill=None,
            first_token=None,
        )
        if not held.short:
            tier = experts_in if held.far else None
            found = _rated(found, model, reached, prices, acceptance, tier)
        if best is None or _better(found, best):
            best = found
    if best is None:
        raise ConfigError(
            f"{devices} devices cannot share the {model.config.num_attention_heads} heads evenly, nor the "
            f"{model.config.n_routed_experts} experts with one for each: give another number"
        )
    if best.decode is None:
        needed = memory.devices_needed(model, chip, reached, batch=batch, context=context)
        best = replace(best, devices_needed=needed)
    return best


def _check(context: int, batch: int, devices: int, acceptance: float, experts_in: str, chip: Chip) -> None:
    for name, value in (("--context", context), ("--batch", batch), ("devices", devices)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"--acceptance is {acceptance}: it is a share, give 0 to 1")
    if experts_in not in TIERS:
        raise ConfigError(f"--experts-in is {experts_in!r}: it may be {', '.join(TIERS)}")
    if devices > 1 and chip.sends(devices) is None:
        some = f"up to {chip.peers} devices" if chip.link is not None else "one device"
        raise ConfigError(f"how fast {devices} of {chip.name} send to each other is not known: give {some} of it")
    if experts_in != "memory":
        if devices > 1:
            raise ConfigError(f"--experts-in {experts_in} is modelled on one device: give one")
        if (chip.host if experts_in == "host" else chip.disk) is None:
            raise ConfigError(f"how fast {chip.name} reads from {experts_in} is not known: leave --experts-in out")


def _better(one: Prediction, other: Prediction) -> bool:
    if one.decode is None or other.decode is None:
        return other.decode is None and (one.decode is not None or one.fit.short < other.fit.short)
    return one.decode.tokens_per_second > other.decode.tokens_per_second


def _rated(
    found: Prediction, model: Model, reached: Efficiency, prices: Prices, acceptance: float, tier: str | None
) -> Prediction:
    layout, batch, context = found.layout, found.batch, found.context
    resident = 1 - found.fit.far / model.expert_bytes if found.fit.far else 1.0
    layers = model.config.num_hidden_layers

    def timed(
        parts: Sequence[Part], layers: int, sequences: float, tokens: float, activations: float | None = None
    ) -> Step:
        parts = [_fetched(part, resident) for part in parts]
        return roofline.step(
            parts,
            found.chip,
            reached,
            layers=layers,
            devices=layout.devices,
            tier=tier,
            sequences=sequences,
            experts=model.met(tokens) / layout.devices,
            activations=activations,
        )

    def prompted(parts: Sequence[Part], prompts: int, steps: int) -> Step:
        tokens = prompts * context / steps
        return timed(parts, layers, prompts / steps, tokens, tokens * model.activations)

    def rate(step: Step, tokens: float) -> Rate:
        watts = _watts(found.chip, step)
        per_second, devices = tokens / step.seconds, layout.devices
        hourly = prices.per_hour(found.hardware, watts)
        return Rate(
            tokens_per_second=per_second,
            seconds=step.seconds,
            bound=step.bound,
            step=step,
            joules_per_million=None if watts is None else watts * devices / per_second * 1e6,
            dollars_per_million={name: per_million(cost * devices, per_second) for name, cost in hourly.items()},
        )

    taken = sum(acceptance**draft for draft in range(1 + model.num_drafts))
    checked = batch * (1 + model.num_drafts)
    stepped = parallel.decode(model, layout, batch=batch, context=context)
    decoded = timed(stepped, layers + model.num_drafts, layout.sequences(batch), checked)
    prompts = max(1, min(layout.sequences(batch), reached.chunk // context))
    read, steps = parallel.prefill(model, layout, prompts=prompts, context=context, chunk=reached.chunk)
    alone, alone_steps = parallel.prefill(model, layout, prompts=1, context=context, chunk=reached.chunk)
    several = min(layout.devices, batch) if layout.kind == parallel.EXPERT else 1
    return replace(
        found,
        decode=rate(decoded, batch * taken),
        prefill=rate(prompted(read, prompts, steps), prompts * several * context / steps),
        first_token=prompted(alone, 1, alone_steps).seconds * alone_steps,
    )


def _fetched(part: Part, resident: float) -> Part:
    """Experts that lie outside are fetched: of those that a step meets, as many as do not fit."""
    if resident == 1 or not part.name.endswith(ROUTED):
        return part
    return replace(part, far_bytes=part.weight_bytes * (1 - resident))


def _watts(chip: Chip, step: Step) -> float | None:
    """Peak power while parts run, idle power between them; peak power throughout where the idle one is not known."""
    if chip.watts_peak is None:
        return None
    idle = chip.watts_peak if chip.watts_idle is None else chip.watts_idle
    busy = 1 - step.overhead / step.seconds
    return idle + (chip.watts_peak - idle) * busy
