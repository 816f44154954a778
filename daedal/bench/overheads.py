"""What an engine's step costs beside its products: differences between small models.

Two models that differ in one thing alone, on the same engine: the difference of their steps is what that thing costs.
More layers: a layer, of a step that decodes and of one that reads a prompt. More sequences: a sequence in each layer.
More active experts: an expert. Wider layers and longer prompts: rows that pass between matrices. Knows the planner's
count of work, and no time but what it is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from daedal.bench import small_models
from daedal.bench.timing import Clock, Timing, repeated
from daedal.bench.workload import CHUNK, Workload
from daedal.config import ModelConfig
from daedal.cost import work
from daedal.cost.hardware import Chip, efficiency
from daedal.cost.roofline import timed

FEW, MANY, BATCH, SHORT = 4, 24, 16, 64
SHORT_PROMPT = 16
WIDE_FEW, WIDE_MANY, WIDE, WIDE_HEADS, WIDE_DIM = 2, 8, 512, 8, 64


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds of every step, of a layer, of a sequence beyond the first in a layer, of an expert that a layer meets, of
    a layer of a step that reads prompts; bytes per second that pass between matrices. None where noise hid the
    difference.
    """

    step_seconds: float | None
    layer_seconds: float | None
    sequence_seconds: float | None
    expert_seconds: float | None
    prompt_layer_seconds: float | None
    activations: float | None
    timings: Mapping[str, Timing]


class Steps:
    """Times steps of small models, all in one way. chunk: tokens of the long prompts."""

    def __init__(
        self,
        *,
        packed: bool,
        dtype: torch.dtype,
        device: torch.device,
        clock: Clock,
        seconds: float,
        chunk: int = CHUNK,
    ):
        self.packed, self._dtype, self._device = packed, dtype, device
        self._clock, self._seconds, self.chunk = clock, seconds, chunk
        self.timings: dict[str, Timing] = {}

    def decode(self, name: str, config: ModelConfig, *, batch: int = 1) -> float:
        """Median seconds of a decoding step."""
        load = self._load(config, batch, SHORT)
        load.start()
        timing = repeated(load.step, clock=self._clock, seconds=self._seconds, most=load.steps_left - 1)
        self.timings[name] = timing
        return timing.median

    def prefill(self, name: str, config: ModelConfig, *, context: int) -> float:
        """Median seconds of reading a prompt in one step."""
        load = self._load(config, 1, context + 1)
        timing = repeated(load.read_prompts, clock=self._clock, seconds=self._seconds)
        self.timings[name] = timing
        return timing.median

    def _load(self, config: ModelConfig, batch: int, context: int) -> Workload:
        model = small_models.build(config, packed=self.packed, dtype=self._dtype, device=self._device)
        return Workload(model, batch=batch, context=context, alone=True)


def overheads(steps: Steps, chip: Chip) -> Overheads:
    """Runs the small models, a few steps of each. chip: what products take here."""
    few = steps.decode("few layers", small_models.dense(FEW))
    many = steps.decode("many layers", small_models.dense(MANY))
    batch = steps.decode("many layers, batch", small_models.dense(MANY), batch=BATCH)
    sparse = steps.decode("2 experts", small_models.latent(MANY, active=2))
    fuller = steps.decode("10 experts", small_models.latent(MANY, active=10))
    shallow = steps.prefill("few layers, prompt", small_models.dense(FEW), context=SHORT_PROMPT)
    deep = steps.prefill("many layers, prompt", small_models.dense(MANY), context=SHORT_PROMPT)
    layer, prompt_layer = _positive((many - few) / (MANY - FEW)), _positive((deep - shallow) / (MANY - FEW))
    return Overheads(
        step_seconds=None if layer is None else _positive(few - FEW * layer),
        layer_seconds=layer,
        sequence_seconds=_positive((batch - many) / (MANY * (BATCH - 1))),
        expert_seconds=_positive((fuller - sparse) / (MANY * 8)),
        prompt_layer_seconds=prompt_layer,
        activations=_activations(steps, chip, prompt_layer or 0.0),
        timings=steps.timings,
    )


def _activations(steps: Steps, chip: Chip, prompt_layer: float) -> float | None:
    """Bytes that the rows of a long prompt pass between matrices, over what the layers take beside their products."""
    found, products, passed = [], [], []
    for layers in (WIDE_FEW, WIDE_MANY):
        config = small_models.dense(layers, hidden=WIDE, heads=WIDE_HEADS, dim=WIDE_DIM)
        found.append(steps.prefill(f"wide, layers: {layers}", config, context=steps.chunk))
        model = work.model(config, weights=small_models.FORMAT if steps.packed else "bf16", kv_dtype="bf16")
        parts, _ = work.prefill(model, prompts=1, context=steps.chunk, chunk=steps.chunk)
        reached = efficiency(chip)
        products.append(sum(timed(part, chip, reached).seconds for part in parts))
        passed.append(model.activations * steps.chunk)
    few, many = (taken - product for taken, product in zip(found, products, strict=True))
    beside = many - few - (WIDE_MANY - WIDE_FEW) * prompt_layer
    return None if beside <= 0 else (passed[1] - passed[0]) / beside


def _positive(value: float) -> float | None:
    return value if value > 0 else None
