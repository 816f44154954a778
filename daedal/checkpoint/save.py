"""Writes a model as a stock checkpoint: published names, sharded safetensors, config.json.

What a reader trusts is moved into place last: all files are written beside their targets and flushed to disk, then
renamed, weights before the index, the index before config.json. A crash before the renames leaves what was there.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from daedal.checkpoint.names import Piece, empty_pieces, pieces
from daedal.checkpoint.shards import INDEX, SINGLE
from daedal.checkpoint.staging import sync
from daedal.errors import CheckpointError
from daedal.model.transformer import Transformer
from daedal.shapes import parameters

SHARD_BYTES = 4 * 2**30
_PARTIAL = ".partial"


def save(model: Transformer, directory: Path | str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model` to `directory` in the dtype it holds, in its family's published layout.

    shard_bytes: a file's size at most, unless one tensor alone is larger. Files of other kinds that lie there, such as
    a tokenizer, are left alone.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = _write(model, directory, shard_bytes)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error}): free space or choose another place") from error
    finally:
        for leftover in directory.glob(f"*{_PARTIAL}"):
            leftover.unlink()
    for old in directory.glob("model*.safetensors*"):
        if old.name not in written:
            old.unlink()


def _write(model: Transformer, directory: Path, shard_bytes: int) -> list[str]:
    """Writes and renames; returns the names of the weight files and the index, in the order of the renames."""
    state = model.state_dict()
    plan = _plan(model, state, shard_bytes)
    files, weight_map = [], {}
    for number, shard in enumerate(plan, 1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {piece.name: _published(state[slot], piece) for slot, piece in shard}
        if number == len(plan):
            empties = empty_pieces(model.config)
            tensors |= {piece.name: torch.empty(piece.shape, dtype=model.dtype) for piece in empties}
        save_file(tensors, directory / (file + _PARTIAL), metadata={"format": "pt"})
        files.append(file)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(plan) > 1:
        total = sum(_nbytes(state[slot], piece) for shard in plan for slot, piece in shard)
        _write_json(directory / (INDEX + _PARTIAL), {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    # What is not written is not promised: no scales, no drafting module.
    held = str(model.dtype).removeprefix("torch.")
    config = model.config.replace(dtype=held, quantization_config=None, num_nextn_predict_layers=0)
    _write_json(directory / ("config.json" + _PARTIAL), config.to_published())
    for file in (*files, "config.json"):
        sync(directory / (file + _PARTIAL))
    if len(plan) == 1:
        (directory / INDEX).unlink(missing_ok=True)
    for file in (*files, "config.json"):
        os.replace(directory / (file + _PARTIAL), directory / file)
    sync(directory)
    return files


def _plan(model: Transformer, state: Mapping[str, Tensor], shard_bytes: int) -> list[list[tuple[str, Piece]]]:
    """Our slot's name and published piece of every tensor, grouped in order into shards."""
    shards: list[list[tuple[str, Piece]]] = [[]]
    size = 0
    for slot in parameters(model.config):
        for piece in pieces(slot):
            nbytes = _nbytes(state[slot.name], piece)
            if shards[-1] and size + nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((slot.name, piece))
            size += nbytes
    return shards


def _published(tensor: Tensor, piece: Piece) -> Tensor:
    """A piece as it goes to disk. Slices of a stack share its memory, which the format refuses, so they are copied."""
    part = tensor[piece.place].clone() if piece.place else tensor
    return part.detach().to("cpu").contiguous()


def _nbytes(tensor: Tensor, piece: Piece) -> int:
    return math.prod(piece.shape) * tensor.element_size()


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
