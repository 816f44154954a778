"""Writes a model as a stock checkpoint, in the names its family is published in.

What is not written is not promised: config.json declares no quantisation, and drafting modules only where the model
holds them. Numbers that are published in float32 whatever the rest is in, such as V4's mixing weights, stay so.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from daedal import layouts
from daedal.checkpoint.writing import SHARD_BYTES, Planned, published_config, write_checkpoint
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.layouts import Piece
from daedal.model.packing import is_packed
from daedal.model.transformer import Transformer
from daedal.shapes import drafting, parameters


def save(
    model: Transformer, directory: Path | str, *, layout: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `model` to `directory` in the dtype it holds.

    layout: "deepseek" or "transformers"; None is the family's published one. shard_bytes: a file's size at most, unless
    one tensor alone is larger. Files of other kinds that lie there, such as a tokenizer, are left alone. ConfigError
    for a model whose weights are packed.
    """
    if is_packed(model):
        raise ConfigError(
            "the model's weights are packed, which no stock layout knows: save the one it was loaded from"
        )
    config = model.config.replace(
        dtype=str(model.dtype).removeprefix("torch."),
        quantization_config=None,
        expert_dtype=None,
        num_nextn_predict_layers=len(model.mtp),
    )
    save_state(config, model.state_dict(), directory, layout=layout, shard_bytes=shard_bytes)


def save_state(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    directory: Path | str,
    *,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As `save`, of parameters by their slots' names; `config` promises what they are: no quantisation, and as many
    drafting modules as there are.
    """
    plan = list(_planned(config, layouts.choose(config, layout), state))
    write_checkpoint(Path(directory), published_config(config), plan, shard_bytes=shard_bytes)


def _planned(config: ModelConfig, layout: str, state: Mapping[str, Tensor]) -> Iterator[Planned]:
    for slot in parameters(config) + drafting(config):
        for piece in layouts.pieces(slot, config, layout):
            yield Planned(piece.nbytes, partial(_published, state[slot.name], piece, shared=bool(piece.place)))
    for name, piece in layouts.copies(config):
        yield Planned(piece.nbytes, partial(_published, state[name], piece, shared=True))
    for piece in layouts.empty_pieces(config, drafting=True):
        yield Planned(0, partial(_published, torch.empty(piece.shape), piece, shared=False))


def _published(tensor: Tensor, piece: Piece, *, shared: bool) -> dict[str, Tensor]:
    """A piece as it goes to disk. Tensors of one file that share memory are refused, so what is shared is copied."""
    part = tensor[piece.place].clone() if shared else tensor
    return {piece.name: part.detach().to("cpu", getattr(torch, piece.dtype)).contiguous()}
