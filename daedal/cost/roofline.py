"""How long a step takes on a device: for each part what bounds it, one part after another, and what launching costs.

A part takes as long as the slowest of reading its bytes, multiplying, sending, and fetching from beyond the memory;
parts do not overlap each other. That is a model of a well-kept engine, not a promise: shares of the peaks stand in
`efficiency.toml`, and how far predictions were off is kept with the measurements. Knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from daedal.cost.hardware import Chip, Efficiency
from daedal.cost.work import Part

MEMORY, COMPUTE, LINK, OVERHEAD = "memory", "compute", "link", "overhead"
TIERS: Mapping[str, str] = MappingProxyType({"host": LINK, "disk": "disk"})


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A part, its seconds, and what bounds it."""

    part: Part
    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step in time. overhead: seconds that no part explains."""

    parts: Sequence[Timed]
    overhead: float

    @property
    def seconds(self) -> float:
        return sum(timed.seconds for timed in self.parts) + self.overhead

    @property
    def by_bound(self) -> Mapping[str, float]:
        """Seconds of each bound."""
        found = {OVERHEAD: self.overhead}
        for timed in self.parts:
            found[timed.bound] = found.get(timed.bound, 0.0) + timed.seconds
        return found

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        return max(self.by_bound, key=lambda bound: self.by_bound[bound])


def step(
    parts: Sequence[Part],
    chip: Chip,
    reached: Efficiency,
    *,
    layers: int,
    devices: int = 1,
    tier: str | None = None,
    sequences: float = 1.0,
    experts: float = 0.0,
    activations: float | None = None,
) -> Step:
    """Times the parts of a step of `layers` layers on each of some devices. tier: "host" or "disk", where the far bytes
    of parts lie. sequences: in the step. experts: that it meets, in all layers. activations: bytes that pass between
    matrices, of a step that reads prompts; None for one that decodes.
    """
    layer, passed = reached.layer_seconds, 0.0
    if activations is not None:
        layer = layer if reached.prompt_layer_seconds is None else reached.prompt_layer_seconds
        passed = 0.0 if reached.activations is None else activations / reached.activations
    layer += max(sequences - 1, 0.0) * reached.sequence_seconds
    return Step(
        parts=[timed(part, chip, reached, devices, tier) for part in parts],
        overhead=layers * layer + passed + experts * reached.expert_seconds + reached.step_seconds,
    )


def timed(part: Part, chip: Chip, reached: Efficiency, devices: int = 1, tier: str | None = None) -> Timed:
    """One part of a step, alone."""
    share = reached.attention_by.get(part.kind or "", reached.attention) if part.cache_bytes else reached.compute
    bandwidth = reached.bandwidth_by.get(part.arithmetic, reached.bandwidth)
    cache = reached.cache_by.get(part.kind or "", reached.cache)
    seconds = {
        MEMORY: (part.weight_bytes / bandwidth + part.cache_bytes / cache) / chip.bandwidth,
        COMPUTE: part.flops / (share * chip.rate(part.arithmetic)),
    }
    if part.link_bytes:
        sends = chip.sends(devices)
        assert sends is not None
        seconds[LINK] = part.link_bytes / (reached.link * sends)
    if part.far_bytes:
        assert tier is not None
        rate = chip.host if tier == "host" else chip.disk
        assert rate is not None
        seconds[TIERS[tier]] = seconds.get(TIERS[tier], 0.0) + part.far_bytes / rate
    bound = max(seconds, key=lambda name: seconds[name])
    # Few rows are slower than the peak, and what then takes longer than reading alone includes the reading.
    slowed = part.flops / (share * chip.rate(part.arithmetic, part.rows))
    return Timed(part=part, seconds=max(seconds[bound], slowed), bound=bound)
