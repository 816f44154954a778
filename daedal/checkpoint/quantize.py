"""Moves a checkpoint between bf16, FP8 and FP4 as its publisher ships them, tensor by tensor.

FP8: every matrix that is stock FP8, experts too (as V4's `-Base`). FP4: routed experts in FP4, the rest as FP8. What is
never quantised stays plain: embedding, head, norms, router, mixing weights, compressors. Drafting modules travel with
the model. Never more than one shard is in memory; how one matrix changes is the business of `conversion`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint.contents import Contents
from daedal.checkpoint.conversion import Converted, convert
from daedal.checkpoint.shards import INDEX, Shards
from daedal.checkpoint.writing import SHARD_BYTES, STAGING, Planned, published_config, write_checkpoint
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.layouts import Piece
from daedal.shapes import Slot, drafting, parameters

FORMATS = ("bf16", "fp8", "fp4")
_STOCK = MappingProxyType({"deepseek_v3": FORMATS[:2], "deepseek_v32": FORMATS[:2], "deepseek_v4": FORMATS})
_QUANTIZATION: Mapping[str, Any] = MappingProxyType(
    {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
)
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})


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


def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    to: str,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Writes the checkpoint `src` to `dst` in another number format, with its tokenizer and other small files.

    to: "bf16", "fp8" or "fp4". layout: names to write, None for the family's published ones. progress: called with
    (tensors done, tensors in all). ConfigError for a format that the family has no stock layout for; CheckpointError
    for a damaged source, a DSpark draft, or a destination that is not free. What lay at `dst` stays until all is there.
    """
    source, destination = Path(src), Path(dst)
    config = ModelConfig.read(source)
    check_format(config, to)
    chosen = layouts.choose(config, layout)
    _check_destination(source, destination)
    shards = Shards(source)
    drafts = layouts.has_drafting(shards.files, config)
    slots = parameters(config) + (drafting(config) if drafts else [])
    contents = Contents(shards, config, slots, drafting=drafts)
    conversion = _Conversion(contents, _target(config, to, drafts=drafts))
    write_checkpoint(
        destination,
        published_config(conversion.target),
        list(conversion.plan(chosen)),
        shard_bytes=shard_bytes,
        others=_small_files(source),
        progress=progress,
    )
    roles = conversion.roles()
    return QuantizeReport(
        to=to,
        layout=chosen,
        tensors=sum(role.tensors for role in roles),
        bytes_before=sum((source / file).stat().st_size for file in set(shards.files.values())),
        bytes_after=sum(file.stat().st_size for file in destination.glob("model*.safetensors")),
        inexact=conversion.inexact,
        roles=roles,
    )


def check_format(config: ModelConfig, to: str) -> None:
    """ConfigError for a format that Daedal does not write, or that models of this family are not shipped in."""
    if to not in FORMATS:
        raise ConfigError(f"the format is {to!r}: Daedal writes {', '.join(FORMATS)} so far")
    stock = _STOCK.get(config.model_type, FORMATS[:1])
    if to not in stock:
        raise ConfigError(
            f"the format is {to!r}, {config.model_type} is published in {' and '.join(stock)}: only formats that stock "
            "readers of a family know are written"
        )
    for name in ("hidden_size", "moe_intermediate_size") if to == "fp4" else ():
        if getattr(config, name) % layouts.FP4_GROUP:
            raise ConfigError(f"`{name}` is {getattr(config, name)}: FP4 packs groups of {layouts.FP4_GROUP}; use fp8")


class _Conversion:
    """From what a checkpoint holds to what its target calls for, with a tally. inexact: as reported."""

    def __init__(self, contents: Contents, target: ModelConfig):
        self.target = target
        self.inexact = 0
        self._contents = contents
        self._power_of_two = (target.quantization_config or {}).get("scale_fmt") == "ue8m0"
        self._tensors: dict[str, int] = defaultdict(int)
        self._dtypes: dict[str, set[str]] = defaultdict(set)
        self._errors: dict[str, float] = defaultdict(float)

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

    def roles(self) -> tuple[RoleReport, ...]:
        return tuple(
            RoleReport(
                role=role,
                tensors=count,
                dtypes=tuple(sorted(self._dtypes[role])),
                largest_error=self._errors[role],
            )
            for role, count in self._tensors.items()
        )

    def _make(self, slot: Slot, piece: Piece, parts: range) -> Mapping[str, Tensor]:
        """One published tensor with its scales, made of some of the matrices of a slot."""
        self._tensors[slot.role] += 1 if piece.scale is None else 2
        self._dtypes[slot.role].add(piece.dtype)
        if slot.role == "hash_table":
            return {piece.name: self._contents.read(slot, torch.int64)}
        made = [self._matrix(slot, piece, part) for part in parts]
        self._errors[slot.role] = max(self._errors[slot.role], *(matrix.error for matrix in made))
        self.inexact += sum(not matrix.exact for matrix in made)
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


def _target(config: ModelConfig, to: str, *, drafts: bool) -> ModelConfig:
    """The configuration of what is written. A block size or a kind of scales that the source has is kept."""
    quantization = None
    if to != "bf16":
        stock = dict(_QUANTIZATION)
        if config.model_type != "deepseek_v3":
            stock["scale_fmt"] = "ue8m0"
        given = config.quantization_config or {}
        quantization = {name: given[name] for name in (*stock, "scale_fmt") if name in given}
        quantization = stock | quantization
    return config.replace(
        dtype="bfloat16",
        quantization_config=quantization,
        expert_dtype=to if config.is_compressed and to != "bf16" else None,
        num_nextn_predict_layers=config.num_nextn_predict_layers if drafts else 0,
    )


def _check_destination(source: Path, destination: Path) -> None:
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"source and destination are both {destination}: give another destination")
    if source.resolve() in destination.resolve().parents:
        raise CheckpointError(f"{destination} lies inside {source}: give a destination elsewhere")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: give a directory that is empty or does not exist yet")
    held = {path.name for path in destination.iterdir()} if destination.is_dir() else set()
    if held - {STAGING} and "config.json" not in held:
        raise CheckpointError(f"{destination} holds files that are no checkpoint: give an empty or new directory")


def _small_files(source: Path) -> dict[str, Path]:
    """The files beside the weights, such as a tokenizer's, by name; of directories only `encoding`, which tells V4's
    chat formats apart. Hidden files are left where they are.
    """
    made_anew = ("config.json", INDEX)
    return {
        path.relative_to(source).as_posix(): path
        for path in sorted((*source.iterdir(), *source.glob("encoding/*")))
        if path.is_file() and not path.name.startswith(".") and path.name not in made_anew
        if path.suffix not in _WEIGHTS and not path.name.endswith(".index.json")
    }
