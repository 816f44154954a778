"""Writes a checkpoint as other frameworks read it: the published names, plain numbers, the tokenizer's files.

What is plain already stays bit for bit; FP8 is expanded with its scales; drafting modules are left out. Only models
that the runner has are written (`support`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint import packing
from daedal.checkpoint.contents import Contents
from daedal.checkpoint.rewriting import check_destination, small_files
from daedal.checkpoint.shards import Shards
from daedal.checkpoint.writing import SHARD_BYTES, Planned, published_config, write_checkpoint
from daedal.config import ModelConfig
from daedal.errors import CheckpointError, ConfigError
from daedal.layouts import Piece
from daedal.ports.support import check_runs
from daedal.shapes import Slot, parameters

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """tensors: written. dtype: of the weights; what a router is corrected by stays float32. expanded: tensors that were
    quantised before. nbytes: of all tensors.
    """

    tensors: int
    dtype: str
    expanded: int
    nbytes: int


def export(
    src: Path | str,
    dst: Path | str,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Writes the checkpoint `src` to `dst` for MindSpore's runner, with its tokenizer and other small files.

    dtype: of DTYPES; None keeps what the files hold, and takes config.json's word where they are quantised. progress:
    called with (tensors done, in all). ConfigError for a model that the runner does not have, CheckpointError for a
    damaged source or a destination that is not free.
    """
    source, destination = Path(src), Path(dst)
    config = ModelConfig.read(source)
    check_runs(config)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    check_destination(source, destination)
    if (weights := packing.carried(source)) is not None:
        raise CheckpointError(f"{source} is packed as {weights}, for Daedal alone: export the original checkpoint")
    slots = parameters(config)
    contents = Contents(Shards(source), config, slots)
    target = config.replace(
        dtype=dtype or _held(contents, config, slots[0]), quantization_config=None, num_nextn_predict_layers=0
    )
    planned = list(_planned(target))
    plan = [Planned(piece.nbytes, partial(_read, contents, slot, part, piece)) for slot, part, piece in planned]
    write_checkpoint(
        destination,
        published_config(target),
        plan,
        shard_bytes=shard_bytes,
        others=small_files(source),
        progress=progress,
    )
    return ExportReport(
        tensors=len(plan),
        dtype=target.dtype,
        expanded=sum(contents.plain_dtype(slot) is None for slot, _, _ in planned),
        nbytes=sum(entry.nbytes for entry in plan),
    )


def _held(contents: Contents, config: ModelConfig, embedding: Slot) -> str:
    held = contents.plain_dtype(embedding)
    name = config.dtype if held is None else str(held).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _planned(target: ModelConfig) -> Iterator[tuple[Slot, int, Piece]]:
    """Every tensor to write: its slot, which of the slot's matrices it is, and what it is called."""
    for slot in parameters(target):
        for part, piece in enumerate(layouts.pieces(slot, target, layouts.TRANSFORMERS)):
            yield slot, part, piece


def _read(contents: Contents, slot: Slot, part: int, piece: Piece) -> Mapping[str, Tensor]:
    numbers = contents.stored(slot, part).values()
    # Tensors of one file that share memory are refused, and mapped ones do.
    return {piece.name: numbers.reshape(piece.shape).to(getattr(torch, piece.dtype), copy=True)}
