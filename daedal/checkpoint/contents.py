"""What a checkpoint directory holds, checked by its headers against what a model needs, then read part by part.

Every tensor must be there, in the shape that config.json calls for, in a number format that its layout allows, with its
scales and nothing left over; only then is a number read. So nothing is half-loaded, and a file that contradicts its
configuration is named. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint.shards import PLAIN, Shards
from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.layouts import Piece
from daedal.ops import formats
from daedal.shapes import Slot

_BYTES = (torch.int8, torch.uint8)
_SCALES = (torch.float8_e8m0fnu, torch.uint8, *PLAIN)


@dataclass(frozen=True)
class Stored:
    """One matrix as its file has it: numbers, or codes with their scales. dtype: of either.

    Codes may also be new, made by calibration: then `error` is the norm of the change divided by the norm of what was
    there, and dtype may be "int8" or "int4", which no file has; zero: the zero points of int4.
    """

    name: str
    dtype: str
    tensor: Tensor
    scale: Tensor | None
    block: tuple[int, int]
    zero: Tensor | None = None
    error: float | None = None

    def values(self) -> Tensor:
        """The numbers it stands for: as stored, or exactly in float32."""
        if self.scale is None:
            return self.tensor
        try:
            if self.dtype == layouts.FP4:
                return formats.dequantise_fp4(self.tensor, self.scale)
            return formats.dequantise_blocks(self.tensor, self.scale, self.block)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {self.name}: {error}") from error


class Contents:
    """The tensors of `slots` in a checkpoint. layout: the one that was found.

    drafting: `slots` has the drafting modules too; without it their tensors are passed over. CheckpointError, naming
    the tensor, for whatever does not fit.
    """

    def __init__(self, shards: Shards, config: ModelConfig, slots: Sequence[Slot], *, drafting: bool = False):
        self._shards = shards
        self._config = config
        self.block = _block(config)
        sign = layouts.dspark_sign(shards.files, config) if drafting else None
        if sign is not None:
            raise self._refusal(f"{sign} shows a DSpark draft, which Daedal does not know: leave its tensors out")
        try:
            self.layout = layouts.detect(shards.files, config)
            self._spelled = layouts.spellings(shards.files, self.layout)
        except CheckpointError as error:
            raise self._refusal(str(error)) from error
        self._found = {
            slot.name: [self._find(piece, slot) for piece in layouts.pieces(slot, config, self.layout)]
            for slot in slots
        }
        self._places = {slot.name: layouts.places(slot) for slot in slots}
        self._check_leftovers(drafting=drafting)

    def read(self, slot: Slot, dtype: torch.dtype, part: tuple[slice, ...] = ()) -> Tensor:
        """A slot on the CPU in `dtype`, a hash table in int64; mapped where it needs no conversion. part: a slice for
        each of the first axes, of which alone it is wanted; of a quantised matrix all is read.
        """
        first = self._found[slot.name][0]
        if slot.role == "hash_table":
            return self._ids(first.name)
        if first.scale is None and first.shape == slot.shape:
            return self._shards.read(first.name, part).to(dtype)
        if slot.role != "routed_expert":
            return self.stored(slot, 0).values()[part].to(dtype)
        (experts,) = part or (slice(0, slot.shape[0]),)
        filled = torch.empty((experts.stop - experts.start, *slot.shape[1:]), dtype=dtype)
        for number, (expert, *rows) in enumerate(self._places[slot.name]):
            assert isinstance(expert, int)
            if experts.start <= expert < experts.stop:
                filled[(expert - experts.start, *rows)] = self.stored(slot, number).values()
        return filled

    def plain_dtype(self, slot: Slot) -> torch.dtype | None:
        """The type that a slot is stored in; None where it is quantised."""
        first = self._found[slot.name][0]
        return None if first.scale is not None else self._shards.dtype(first.name)

    def stored(self, slot: Slot, part: int) -> Stored:
        """Matrix `part` of a slot, in the order of `layouts.places`, as the file has it."""
        found = self._found[slot.name]
        stacked = found[0].shape == slot.shape
        piece = found[0 if stacked else part]
        tensor = self._shards.read(piece.name, self._places[slot.name][part] if stacked else ())
        scale = None if piece.scale is None else self._shards.read(piece.scale.name)
        return Stored(piece.name, piece.dtype, tensor, scale, self.block)

    def _find(self, piece: Piece, slot: Slot) -> Piece:
        """The piece as it lies in the files: their spelling of its name, their number format."""
        name = self._spelled.get(piece.name)
        if name is None:
            raise self._refusal(f"lacks tensor {piece.name}, which config.json calls for: fetch the checkpoint again")
        dtype = self._shards.dtype(name)
        if slot.role == "hash_table":
            allowed = dtype in (torch.int64, torch.int32)
            found = replace(piece, name=name)
        elif dtype in PLAIN:
            allowed = True
            found = replace(piece, name=name, dtype=str(dtype).removeprefix("torch."), scale=None)
        else:
            allowed = dtype == formats.FP8 or (dtype in _BYTES and piece.dtype == layouts.FP4)
            found = self._quantised(piece, name, dtype) if allowed else piece
        if not allowed:
            raise self._refusal(f"tensor {name} is {dtype}, {_due(slot, piece)} is due: check config.json")
        self._check_shape(name, found.stored_shape)
        return found

    def _quantised(self, piece: Piece, name: str, dtype: torch.dtype) -> Piece:
        if self._config.quantization_config is None:
            raise self._refusal(f"tensor {name} is {dtype} but config.json has no quantization_config: restore it")
        if piece.scale is None:
            raise self._refusal(f"tensor {name} is {dtype}, but its kind is never quantised: take the original file")
        kind = layouts.FP8 if dtype == formats.FP8 else layouts.FP4
        if kind == layouts.FP4 and piece.shape[-1] % layouts.FP4_GROUP:
            columns = f"tensor {name} has {piece.shape[-1]} columns"
            raise self._refusal(f"{columns}: FP4 comes in groups of {layouts.FP4_GROUP}; check config.json")
        scale = layouts.scale_of(piece.scale.name, piece.shape, kind, block=self.block, scale_dtype=piece.scale.dtype)
        spelled = self._spelled.get(scale.name)
        if spelled is None:
            raise self._refusal(f"lacks {scale.name}, the scales of {name}: fetch the checkpoint again")
        scale_dtype = self._shards.dtype(spelled)
        if scale_dtype not in _SCALES:
            raise self._refusal(f"tensor {spelled} is {scale_dtype}: scales are float32 or e8m0; fetch the file again")
        self._check_shape(spelled, scale.shape)
        return replace(piece, name=name, dtype=kind, scale=replace(scale, name=spelled))

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        held = self._shards.shape(name)
        if held != wanted:
            message = f"tensor {name} has shape {list(held)}, config.json calls for {list(wanted)}"
            raise self._refusal(f"{message}; check that the files belong together")

    def _check_leftovers(self, *, drafting: bool) -> None:
        pieces = [piece for found in self._found.values() for piece in found]
        used = {piece.name for piece in pieces} | {piece.scale.name for piece in pieces if piece.scale is not None}
        for name in self._shards.files:
            if name in used or layouts.is_beside(name, self._config, self._shards.files, drafting=drafting):
                continue
            raise self._refusal(f"tensor {name} has no place in a {self._config.model_type} model: check config.json")

    def _ids(self, name: str) -> Tensor:
        """A hash table, int64 [V, A]; every number in it must be an expert."""
        ids = self._shards.read(name).to(torch.int64)
        low, high, last = int(ids.min()), int(ids.max()), self._config.n_routed_experts - 1
        if low < 0 or high > last:
            raise self._refusal(f"tensor {name} has experts {low} to {high}, the model has 0 to {last}: fetch it again")
        return ids

    def _refusal(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._shards.directory}: {message}")


def _block(config: ModelConfig) -> tuple[int, int]:
    quantization = config.quantization_config
    rows, columns = (128, 128) if quantization is None else quantization["weight_block_size"]
    return rows, columns


def _due(slot: Slot, piece: Piece) -> str:
    return "int64" if slot.role == "hash_table" else f"a plain float or {piece.dtype}"
