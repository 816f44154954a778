"""The work of one step of a model, by part: FLOPs and in which arithmetic, bytes of weights and of cache.

A step is a batch of sequences that each bring tokens: one each when decoding, a chunk of a prompt when reading it in.
Parts are the roles of `shapes` (attention, routed_expert, head...) and what attention reads (`reading`); parts follow
each other, so their times add. Knows no device and no time; that is the business of `roofline`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from daedal import layouts, shapes
from daedal.config import ModelConfig
from daedal.cost import cached, formats
from daedal.cost.cached import Size
from daedal.cost.experts import distinct
from daedal.cost.reading import INDEXER, Reading, readings
from daedal.errors import ConfigError
from daedal.shapes import Slot

ROUTED = "routed_expert"
_KINDS: Mapping[str, str] = MappingProxyType(
    {"full": "full", "latent": "latent", "window": "compressed", "sparse": "compressed", "heavy": "compressed"}
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a step. link_bytes: what one device sends to others; far_bytes: read from beyond its memory.

    rows: that are multiplied with each of the matrices, None where there is none. kind: of attention, "full", "latent"
    or "compressed"; None for what is no attention. split: among how many devices the cached rows may be divided, one
    head's rows to one; None where there are none.
    """

    name: str
    flops: float = 0.0
    arithmetic: str = "bf16"
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    link_bytes: float = 0.0
    far_bytes: float = 0.0
    rows: float | None = None
    kind: str | None = None
    split: int | None = None

    def scaled(self, work: float, *, weights: float = 1.0, cache: float = 1.0) -> "Part":
        """FLOPs, bytes of weights and bytes of cache multiplied."""
        return replace(
            self,
            flops=self.flops * work,
            weight_bytes=self.weight_bytes * weights,
            cache_bytes=self.cache_bytes * cache,
        )


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """What a token is multiplied with, of one role and arithmetic. multiplied: parameters that one token meets."""

    role: str
    arithmetic: str
    multiplied: int
    read: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A configuration in chosen formats, added up once. expert_layers: layers with routed experts.

    weight_bytes: all that is held, `expert_bytes` of it routed experts. drafts: what the drafting modules add, empty
    without them. readings: what a decoded token reads and in how many layers, backbone: without the modules.
    state_bytes: what the next entries of a sequence are made of. activations: bytes of the rows, in 16 bits, that one
    token passes into and out of matrices.
    """

    config: ModelConfig
    weights: str
    kv_dtype: str
    skew: float
    matrices: tuple[Matrices, ...]
    drafts: tuple[Matrices, ...]
    weight_bytes: int
    expert_bytes: int
    expert_layers: int
    kv_size: Size
    readings: Mapping[Reading, int]
    backbone: Mapping[Reading, int]
    state_bytes: int
    activations: int

    @property
    def num_drafts(self) -> int:
        """Tokens that the drafting modules add to a step of one sequence."""
        return self.config.num_nextn_predict_layers if self.drafts else 0

    def kv_bytes(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens: rows, rings, and what the next entries are made of."""
        rows = (layers * cached.at_context([one.slot], context, self.kv_size) for one, layers in self.readings.items())
        return sum(rows) + self.state_bytes

    def distinct(self, tokens: float) -> float:
        """Share of the routed experts of a layer that `tokens` tokens meet."""
        experts = self.config.n_routed_experts
        return distinct(experts, self.config.num_experts_per_tok, tokens, skew=self.skew) / experts

    def met(self, tokens: float) -> float:
        """Routed experts that `tokens` tokens meet, in all layers together."""
        if not self.expert_layers:
            return 0.0
        return self.expert_layers * self.config.n_routed_experts * self.distinct(tokens)


def model(
    config: ModelConfig,
    *,
    weights: str = formats.SHIPPED,
    kv_dtype: str = "auto",
    skew: float = 0.0,
    drafting: bool = False,
) -> Model:
    """Adds up a configuration; ConfigError for a format that does not exist, a skew below 0, or no drafting module."""
    backbone = shapes.parameters(config)
    if drafting and (layouts.dspark_sign((), config) or not config.num_nextn_predict_layers):
        raise ConfigError(
            f"--acceptance is for drafting (MTP) modules, and this {config.model_type} has none that Daedal knows: "
            "leave it out"
        )
    distinct(1, 1, 1, skew=skew)
    modules = shapes.drafting(config) if drafting else []
    every = list(formats.held(config, [*backbone, *modules], weights))
    experts = [one.nbytes for slot, one in zip([*backbone, *modules], every, strict=True) if slot.role == ROUTED]
    kept = zip(backbone, every, strict=False)
    expert_layers = {slot.layer for slot in backbone if slot.role == ROUTED}
    return Model(
        config=config,
        weights=weights,
        kv_dtype=kv_dtype,
        skew=skew,
        matrices=_matrices(config, kept),
        drafts=_matrices(config, zip(modules, every[len(backbone) :], strict=True)),
        weight_bytes=sum(one.nbytes for one in every),
        expert_bytes=sum(experts),
        expert_layers=len(expert_layers),
        kv_size=cached.size_of(kv_dtype, shapes.cache(config)),
        readings=readings(config, drafting=drafting),
        backbone=readings(config),
        state_bytes=cached.state(shapes.cache(config, drafting=drafting)),
        activations=_activations(config, backbone),
    )


def _activations(config: ModelConfig, slots: Iterable[Slot]) -> int:
    """In and out of every matrix but the head, whose rows are few; V4's streams once more, where results are added."""
    numbers = 0
    for slot in slots:
        if len(slot.shape) < 2 or slot.role in ("embedding", "head", "hash_table"):
            continue
        times = config.num_experts_per_tok if slot.role == ROUTED else 1
        numbers += times * (slot.shape[-1] + slot.shape[-2])
        if slot.role == "hyper_connection":
            numbers += 2 * slot.shape[-1]
    return 2 * numbers


def _matrices(config: ModelConfig, slots: Iterable[tuple[Slot, formats.Held]]) -> tuple[Matrices, ...]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for slot, one in slots:
        if not one.read:
            continue
        role = "head" if slot.role == "embedding" else slot.role
        numel = slot.numel // slot.shape[0] * config.num_experts_per_tok if role == ROUTED else slot.numel
        key = (role, one.arithmetic)
        multiplied, read = found.get(key, (0, 0))
        found[key] = (multiplied + numel, read + one.read)
    return tuple(
        Matrices(role=role, arithmetic=arithmetic, multiplied=multiplied, read=read)
        for (role, arithmetic), (multiplied, read) in found.items()
    )


def decode(model: Model, *, batch: int, context: int, met: float | None = None) -> list[Part]:
    """One step that decodes `batch` sequences of `context` tokens each, drafts included where the model has them.

    With drafting modules a step checks one token of each module beside the one that is sure. met: tokens that choose
    experts together, where that is not this batch.
    """
    checked = batch * (1 + model.num_drafts)
    together = checked if met is None else met * checked / batch
    parts = [_multiply(model, one, checked, together) for one in model.matrices]
    for draft in model.drafts:
        part = _multiply(model, draft, batch, together * batch / checked)
        parts.append(replace(part, name=f"drafting: {part.name}"))
    if model.drafts:
        head = next(one for one in model.matrices if one.role == "head")
        part = _multiply(model, head, batch, batch).scaled(model.num_drafts, weights=model.num_drafts)
        parts.append(replace(part, name="drafting: head"))
    for reading, layers in model.readings.items():
        rows = reading.rows(context)
        held = cached.rows(reading.slot, context)
        read = min(held, rows * checked // batch)
        flops = 2.0 * layers * reading.absorbed * rows * checked
        parts.append(_read(model, reading, flops, float(layers * batch * read * model.kv_size(reading.slot))))
    return _together(parts)


def prefill(model: Model, *, prompts: int, context: int, chunk: int, devices: int = 1) -> tuple[list[Part], int]:
    """The mean step of reading `prompts` prompts of `context` tokens together, and how many such steps there are.
    devices: so many do the same with other prompts, and their tokens choose experts together.

    A step brings at most `chunk` tokens. Latent rows are multiplied in the form that costs less: expanded once per
    step, or absorbed. The head sees the last token of each prompt only.
    """
    steps = -(-prompts * context // chunk)
    tokens = prompts * context / steps
    parts = []
    for one in model.matrices:
        part = _multiply(model, one, tokens, tokens * devices)
        if one.role == "head":
            part = part.scaled(prompts / steps / tokens, weights=1 / steps)
            part = replace(part, rows=max(prompts / steps, 1.0))
        parts.append(part)
    for reading, layers in model.backbone.items():
        first, last = (cached.rows(reading.slot, -(-context * step // steps)) for step in (1, steps))
        held = prompts * (first + last) / 2
        every = prompts * reading.rows_up_to(context) / steps
        flops = 2.0 * layers * reading.cheapest(every, held - tokens)
        read = min(held, every)
        parts.append(_read(model, reading, flops, layers * read * model.kv_size(reading.slot)))
    return _together(parts), steps


def _multiply(model: Model, one: Matrices, tokens: float, together: float) -> Part:
    read, rows = float(one.read), tokens
    if one.role == ROUTED:
        share = model.distinct(together)
        read, rows = (
            one.read * share,
            together * model.config.num_experts_per_tok / model.config.n_routed_experts / share,
        )
    flops = 2.0 * one.multiplied * tokens
    return Part(name=one.role, flops=flops, arithmetic=one.arithmetic, weight_bytes=read, rows=rows)


def _read(model: Model, reading: Reading, flops: float, nbytes: float) -> Part:
    name = "index keys" if reading.kind == INDEXER else f"cache: {reading.kind}"
    split = model.config.num_key_value_heads if reading.kind == "full" else 1
    kind = _KINDS.get(reading.kind)
    return Part(name=name, flops=flops, arithmetic=reading.arithmetic, cache_bytes=nbytes, kind=kind, split=split)


def _together(parts: Sequence[Part]) -> list[Part]:
    """Parts of one name and arithmetic as one."""
    found: dict[tuple[str, str], Part] = {}
    for part in parts:
        key = (part.name, part.arithmetic)
        if key in found:
            one = found[key]
            part = replace(
                part,
                flops=one.flops + part.flops,
                weight_bytes=one.weight_bytes + part.weight_bytes,
                cache_bytes=one.cache_bytes + part.cache_bytes,
            )
        found[key] = part
    return list(found.values())
