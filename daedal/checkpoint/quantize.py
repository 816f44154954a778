"""Moves a checkpoint between number formats, tensor by tensor: bf16, FP8 and FP4 as its publisher ships them.

FP8: every matrix that is stock FP8, experts too (as V4's `-Base`). FP4: routed experts in FP4, the rest as FP8. What is
never quantised stays plain: embedding, head, norms, router, mixing weights, compressors. Drafting modules travel with
the model. Never more than one shard is in memory; how one matrix changes is the business of `conversion`. int8 and int4
have no stock layout: they are written packed, for Daedal's CPU kernels alone (`packing`).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint import packing
from daedal.checkpoint.calibration import Calibrated, Calibration
from daedal.checkpoint.contents import Contents
from daedal.checkpoint.conversion import Converted, convert
from daedal.checkpoint.packed_files import FOLDER, WEIGHTS_FILE
from daedal.checkpoint.repacking import Slab
from daedal.checkpoint.rewriting import check_destination, small_files
from daedal.checkpoint.sensitivity import sensitivity
from daedal.checkpoint.shards import Shards
from daedal.checkpoint.writing import SHARD_BYTES, Planned, publish, published_config, write_checkpoint
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.layouts import Piece
from daedal.packed import HEAD
from daedal.shapes import Slot, drafting, parameters

FORMATS = ("bf16", "fp8", "fp4")
PACKED_FORMATS = ("int8", "int4")
PACKED_LAYOUT = "packed"
_STOCK = MappingProxyType({"deepseek_v3": FORMATS[:2], "deepseek_v32": FORMATS[:2], "deepseek_v4": FORMATS})
_QUANTIZATION: Mapping[str, Any] = MappingProxyType(
    {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
)
_EXCEPTIONS = "modules_to_not_convert"


@dataclass(frozen=True, kw_only=True)
class RoleReport:
    """What became of the tensors of one role. tensors: written, scales counted. dtypes: as written. largest_error: over
    its matrices, the norm of the change divided by the norm of what was there.
    """

    role: str
    tensors: int
    dtypes: tuple[str, ...]
    largest_error: float


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """tokens: read. matrices: rounded by them. unreached: matrices of experts that too few of them reached, rounded
    plainly. exact: modules that were left in bfloat16.
    """

    tokens: int
    matrices: int
    unreached: int
    exact: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """bytes_*: of all weight files. tensors: written, scales counted. inexact: FP4 matrices that FP8 could not hold
    exactly.
    """

    to: str
    layout: str
    tensors: int
    bytes_before: int
    bytes_after: int
    inexact: int
    roles: tuple[RoleReport, ...]
    calibration: CalibrationReport | None = None


def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    to: str,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    calibration: Callable[[], Sequence[Tensor]] | None = None,
    keep: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Writes the checkpoint `src` to `dst` in another number format, with its tokenizer and other small files.

    to: "bf16", "fp8" or "fp4", in a stock layout; "int8" or "int4", packed. layout: names to write, None for the
    family's published ones, "packed" for Daedal's CPU kernels alone. calibration: gives token ids, int64 [T] each, of
    texts for which matrices are rounded (`checkpoint.calibration`), once all else is checked; None rounds each number
    to the nearest. keep: share of the numbers to be rounded that stay in bfloat16, those of the matrices whose rounding
    the texts show to cost most (`checkpoint.sensitivity`); the routed experts are never among them.
    progress: called with (done, in all), of tensors, or of bytes for what is packed.
    ConfigError for a format that the family has no stock layout for; CheckpointError for a damaged source, a DSpark
    draft, or a destination that is not free. What lay at `dst` stays until all is there.
    """
    source, destination = Path(src), Path(dst)
    config = ModelConfig.read(source)
    packed = layout == PACKED_LAYOUT or (to in PACKED_FORMATS and layout is None)
    if to in PACKED_FORMATS and not packed:
        raise ConfigError(f"layout is {layout!r}: {to} has no stock layout, leave it out")
    check_format(config, to, packed=packed)
    if calibration is not None and to == "bf16":
        raise ConfigError("the format is 'bf16': it has nothing to calibrate, leave the calibration text out")
    if keep and calibration is None:
        raise ConfigError(f"the share to keep is {keep:g}: only a calibration text tells which matrices, give one")
    chosen = layouts.choose(config, None if packed else layout)
    check_destination(source, destination)
    if (weights := packing.carried(source)) is not None:
        raise CheckpointError(f"{source} is packed as {weights} already: quantise the original checkpoint")
    shards = Shards(source)
    drafts = layouts.has_drafting(shards.files, config)
    slots = parameters(config) + (drafting(config) if drafts else [])
    contents, tally = Contents(shards, config, slots, drafting=drafts), Tally()
    aim = _Aim(config=config, to=to, layout=PACKED_LAYOUT if packed else chosen, drafts=drafts)
    if calibration is not None:
        given = aim.calibration(calibration(), contents)
        told = sensitivity(contents, config, given)
        aim = replace(aim, exact=told.spared(config, given.formats, keep))
        given = replace(aim.calibration(given.windows, contents), outputs=told.outputs)
        contents = Calibrated(shards, config, slots, given, drafting=drafts, noted=tally.note_calibrated)
    before, others = sum((source / file).stat().st_size for file in set(shards.files.values())), small_files(source)
    if packed:
        identity = {"weights": to, "drafting": drafts, "exact": sorted(aim.exact)}
        write = partial(packing.write_folder, aim.planned(), contents, identity, progress, tally.note_packed)
        publish(destination, published_config(aim.target), write, others=others)
        written = destination.glob(f"{FOLDER}/{WEIGHTS_FILE}")
    else:
        plan = list(_Conversion(contents, aim.target, tally).plan(chosen))
        published = published_config(aim.target)
        write_checkpoint(destination, published, plan, shard_bytes=shard_bytes, others=others, progress=progress)
        written = destination.glob("model*.safetensors")
    report = tally.report(to, aim.layout, before, written)
    return replace(report, calibration=_calibration_report(contents, aim.exact))


def check_format(config: ModelConfig, to: str, *, packed: bool = False) -> None:
    """ConfigError for a format that Daedal does not write, or, unless packed, that models of this family are not
    shipped in.
    """
    if to not in FORMATS + PACKED_FORMATS:
        raise ConfigError(f"the format is {to!r}: Daedal writes {', '.join(FORMATS + PACKED_FORMATS)}")
    if packed or to in PACKED_FORMATS:
        return
    stock = _STOCK.get(config.model_type, FORMATS[:1])
    if to not in stock:
        raise ConfigError(
            f"the format is {to!r}, {config.model_type} is published in {' and '.join(stock)}: only formats that stock "
            "readers of a family know are written; layout packed has them all, for Daedal alone"
        )
    for name in ("hidden_size", "moe_intermediate_size") if to == "fp4" else ():
        if getattr(config, name) % layouts.FP4_GROUP:
            raise ConfigError(f"`{name}` is {getattr(config, name)}: FP4 packs groups of {layouts.FP4_GROUP}; use fp8")


class Tally:
    """What became of each role's tensors so far."""

    def __init__(self) -> None:
        self.inexact = 0
        self._tensors: dict[str, set[str]] = defaultdict(set)
        self._dtypes: dict[str, set[str]] = defaultdict(set)
        self._errors: dict[str, float] = defaultdict(float)

    def note(self, role: str, name: str, dtype: str, *, error: float = 0.0, exact: bool = True) -> None:
        """One tensor that is written, or one matrix of it."""
        self._tensors[role].add(name)
        self._dtypes[role].add(dtype)
        self._errors[role] = max(self._errors[role], error)
        self.inexact += not exact

    def note_packed(self, planned: packing.Planned, slab: Slab | None) -> None:
        role = planned.slot.role if planned.kept is None or planned.kept.name != HEAD else "head"
        self.note(role, planned.entry.name, planned.entry.kind, error=0.0 if slab is None else slab.error())

    def note_calibrated(self, slot: Slot, error: float) -> None:
        self._errors[slot.role] = max(self._errors[slot.role], error)

    def report(self, to: str, layout: str, bytes_before: int, written: Iterable[Path]) -> QuantizeReport:
        roles = tuple(
            RoleReport(
                role=role,
                tensors=len(names),
                dtypes=tuple(sorted(self._dtypes[role])),
                largest_error=self._errors[role],
            )
            for role, names in self._tensors.items()
        )
        return QuantizeReport(
            to=to,
            layout=layout,
            tensors=sum(role.tensors for role in roles),
            bytes_before=bytes_before,
            bytes_after=sum(file.stat().st_size for file in written),
            inexact=self.inexact,
            roles=roles,
        )


class _Conversion:
    """From what a checkpoint holds to what its target calls for."""

    def __init__(self, contents: Contents, target: ModelConfig, tally: Tally):
        self.target = target
        self._tally = tally
        self._contents = contents
        self._power_of_two = _power_of_two(target)

    def plan(self, layout: str) -> Iterator[Planned]:
        """Every tensor to write, in the order of the forward pass."""
        slots = {slot.name: slot for slot in parameters(self.target) + drafting(self.target)}
        for slot in slots.values():
            parts = range(len(layouts.places(slot)))
            for index, piece in enumerate(layouts.pieces(slot, self.target, layout)):
                inside = parts if piece.shape == slot.shape else parts[index : index + 1]
                yield Planned(piece.nbytes, partial(self._make, slot, piece, inside))
        for name, piece in layouts.copies(self.target):
            yield Planned(piece.nbytes, partial(self._make, slots[name], piece, range(1)))
        for piece in layouts.empty_pieces(self.target, drafting=True):
            yield Planned(0, partial(_empty, piece))

    def _make(self, slot: Slot, piece: Piece, parts: range) -> Mapping[str, Tensor]:
        """One published tensor with its scales, made of some of the matrices of a slot."""
        self._tally.note(slot.role, piece.name, piece.dtype)
        if piece.scale is not None:
            self._tally.note(slot.role, piece.scale.name, piece.dtype)
        if slot.role == "hash_table":
            return {piece.name: self._contents.read(slot, torch.int64)}
        made = [self._matrix(slot, piece, part) for part in parts]
        for matrix in made:
            self._tally.note(slot.role, piece.name, piece.dtype, error=matrix.error, exact=matrix.exact)
        if len(made) > 1:
            return {piece.name: _stack(slot, [matrix.tensor for matrix in made])}
        tensor, scale = made[0].tensor.reshape(piece.stored_shape), made[0].scale
        # Two tensors of a file that share memory are refused there.
        found = {piece.name: tensor.clone()}
        return found if piece.scale is None or scale is None else {**found, piece.scale.name: scale}

    def _matrix(self, slot: Slot, piece: Piece, part: int) -> Converted:
        stored = self._contents.stored(slot, part)
        return convert(stored, piece, self._contents.block, power_of_two=self._power_of_two)


def _stack(slot: Slot, matrices: Sequence[Tensor]) -> Tensor:
    filled = torch.empty(slot.shape, dtype=matrices[0].dtype)
    for place, matrix in zip(layouts.places(slot), matrices, strict=True):
        filled[place] = matrix
    return filled


def _empty(piece: Piece) -> Mapping[str, Tensor]:
    return {piece.name: torch.empty(piece.shape, dtype=getattr(torch, piece.dtype))}


@dataclass(frozen=True, kw_only=True)
class _Aim:
    """What is to be written. layout: the one that was found. exact: slots that stay in bfloat16."""

    config: ModelConfig
    to: str
    layout: str
    drafts: bool
    exact: frozenset[str] = frozenset()

    @property
    def target(self) -> ModelConfig:
        """The configuration of what is written."""
        if self.layout == PACKED_LAYOUT:
            return _target(self.config, "bf16", drafts=self.drafts)
        return _excepting(_target(self.config, self.to, drafts=self.drafts), self.exact)

    def planned(self) -> list[packing.Planned]:
        """What a packed folder holds."""
        return packing.plan(self.config, self.to, drafts=self.drafts, exact=self.exact)

    def calibration(self, windows: Sequence[Tensor], contents: Contents) -> Calibration:
        """Of the slots of the backbone that are quantised."""
        if self.layout == PACKED_LAYOUT:
            return Calibration(windows=windows, formats=_packed_formats(self.planned()))
        formats, power_of_two = _stock_formats(self.target, self.layout), _power_of_two(self.target)
        return Calibration(windows=windows, formats=formats, block=contents.block, power_of_two=power_of_two)


def _stock_formats(target: ModelConfig, layout: str) -> dict[str, str]:
    """Those of a published layout, and to what."""
    kinds = {layouts.FP8: "fp8", layouts.FP4: "fp4"}
    first = ((slot.name, next(layouts.pieces(slot, target, layout))) for slot in parameters(target))
    return {name: kinds[piece.dtype] for name, piece in first if piece.dtype in kinds}


def _packed_formats(planned: Sequence[packing.Planned]) -> dict[str, str]:
    """The same of a packed model, but for the head and the expansion of latents, which have formats of their own."""
    kept = [one.kept for one in planned if one.kept is not None and not one.slot.name.startswith("mtp.")]
    return {
        one.name: one.format
        for one in kept
        if one.part == "whole" and one.name != HEAD and one.format != "bf16"
        if one.format != "fp4" or one.shape[-1] % layouts.FP4_GROUP == 0
    }


def _calibration_report(contents: Contents, exact: Collection[str]) -> CalibrationReport | None:
    if not isinstance(contents, Calibrated):
        return None
    return CalibrationReport(
        tokens=contents.tokens,
        matrices=contents.matrices,
        unreached=contents.unreached,
        exact=tuple(sorted(name.removesuffix(".weight") for name in exact)),
    )


def _power_of_two(target: ModelConfig) -> bool:
    return target.is_compressed or (target.quantization_config or {}).get("scale_fmt") == "ue8m0"


def _target(config: ModelConfig, to: str, *, drafts: bool) -> ModelConfig:
    """The configuration of what is written. A block size or a kind of scales that the source has is kept."""
    quantization = None
    if to != "bf16":
        stock = dict(_QUANTIZATION)
        if config.model_type != "deepseek_v3":
            stock["scale_fmt"] = "ue8m0"
        given = config.quantization_config or {}
        quantization = {name: given[name] for name in (*stock, "scale_fmt", _EXCEPTIONS) if name in given}
        quantization = stock | quantization
    return config.replace(
        dtype="bfloat16",
        quantization_config=quantization,
        expert_dtype=to if config.is_compressed and to != "bf16" else None,
        num_nextn_predict_layers=config.num_nextn_predict_layers if drafts else 0,
    )


def _excepting(target: ModelConfig, exact: Collection[str]) -> ModelConfig:
    """The same with these slots' modules named as exceptions, as stock readers look for them."""
    if not exact or target.quantization_config is None:
        return target
    named = [f"model.{name.removesuffix('.weight')}" for name in sorted(exact)]
    given = target.quantization_config.get(_EXCEPTIONS) or []
    return target.replace(quantization_config={**target.quantization_config, _EXCEPTIONS: [*given, *named]})
