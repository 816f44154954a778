"""Fills a model from a checkpoint directory: every parameter found, checked, converted, and nothing left over.

Tensors that need no conversion stay on the memory map. FP8 weights are expanded with their block scales, in float32,
then rounded once to the model's dtype. A missing, misshapen or unknown tensor is an error that names it; nothing is
half-loaded, because the model is built only after all names are checked.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from daedal.checkpoint.names import SCALE_SUFFIX, Piece, is_beside, pieces
from daedal.checkpoint.shards import Shards
from daedal.config import ModelConfig
from daedal.errors import BackendError, CheckpointError, ConfigError
from daedal.model.transformer import Transformer, empty
from daedal.ops.formats import FP8, dequantise_blocks
from daedal.shapes import Slot, parameters

Progress = Callable[[int, int], None]
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def load(
    directory: Path | str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """The model of a checkpoint directory, ready to run.

    device: "auto" takes the accelerator that torch sees, else the CPU. dtype: None keeps what the files hold; float32
    means full-precision arithmetic, quantised weights expanded exactly. weights: a format to keep weights in; none is
    supported yet besides None. progress: called with (parameters done, parameters in all).
    """
    if weights is not None:
        raise ConfigError(f"weights={weights!r}: no packed weight format is supported yet; leave it out")
    directory = Path(directory)
    config = ModelConfig.read(directory)
    shards = Shards(directory)
    slots = parameters(config)
    _check_names(slots, config, shards)
    chosen = dtype or shards.dtype(next(pieces(slots[0])).name) or getattr(torch, config.dtype)
    if chosen not in _PLAIN:
        raise ConfigError(f"dtype is {chosen}: give torch.bfloat16, float16, float32 or float64")
    target = resolve_device(device)
    model = empty(config, device="meta", dtype=chosen)
    for done, slot in enumerate(slots):
        kept = torch.float32 if slot.role == "router_bias" else chosen
        _assign(model, slot.name, _read(slot, config, shards, kept).to(target))
        if progress is not None:
            progress(done + 1, len(slots))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def resolve_device(device: torch.device | str) -> torch.device:
    """The device called so; "auto" is the accelerator where there is one. BackendError where it is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    present = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"device is {device!r}, which torch cannot read: write it as cpu, cuda or cuda:1") from error
    if chosen.type not in present:
        raise BackendError(f"device is {str(device)!r}, this machine has {' and '.join(present)}: give one, or auto")
    return chosen


def _check_names(slots: list[Slot], config: ModelConfig, shards: Shards) -> None:
    wanted: set[str] = set()
    for slot in slots:
        for piece in pieces(slot):
            wanted.add(piece.name)
            if piece.name not in shards:
                message = f"{shards.directory} lacks tensor {piece.name}, which config.json calls for"
                raise CheckpointError(f"{message}: fetch the checkpoint again")
            found = shards.shape(piece.name)
            if found != piece.shape:
                message = f"tensor {piece.name} has shape {list(found)}, config.json calls for {list(piece.shape)}"
                raise CheckpointError(f"{shards.directory}: {message}; check that the files belong together")
    for name in shards.files:
        if name not in wanted and name.removesuffix(SCALE_SUFFIX) not in wanted and not is_beside(name, config, shards):
            message = f"tensor {name} has no place in a {config.model_type} model: check config.json"
            raise CheckpointError(f"{shards.directory}: {message}")


def _read(slot: Slot, config: ModelConfig, shards: Shards, dtype: torch.dtype) -> Tensor:
    parts = list(pieces(slot))
    if len(parts) == 1 and not parts[0].place:
        return _plain(parts[0], config, shards).to(dtype)
    stacked = torch.empty(slot.shape, dtype=dtype)
    for piece in parts:
        stacked[piece.place] = _plain(piece, config, shards)
    return stacked


def _plain(piece: Piece, config: ModelConfig, shards: Shards) -> Tensor:
    """One published tensor in a plain float type."""
    tensor = shards.read(piece.name)
    if tensor.dtype in _PLAIN:
        return tensor
    if tensor.dtype != FP8:
        message = f"tensor {piece.name} is {tensor.dtype}: Daedal reads float and FP8 e4m3 weights so far"
        raise CheckpointError(f"{shards.directory}: {message}")
    if config.quantization_config is None:
        message = f"tensor {piece.name} is FP8 but config.json has no quantization_config: restore it"
        raise CheckpointError(f"{shards.directory}: {message}")
    scale_name = piece.name + SCALE_SUFFIX
    if scale_name not in shards:
        raise CheckpointError(f"{shards.directory} lacks {scale_name}, the scales of an FP8 tensor: fetch it again")
    block = config.quantization_config["weight_block_size"]
    try:
        return dequantise_blocks(tensor, shards.read(scale_name), (block[0], block[1]))
    except CheckpointError as error:
        raise CheckpointError(f"{shards.directory}: {scale_name}: {error}") from error


def _assign(model: Transformer, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        setattr(owner, leaf, torch.nn.Parameter(tensor))
