"""Fills the MindSpore network from the safetensors files of a stock checkpoint, read by MindSpore's own loader.

What must be there, under which names and where it belongs, `shapes` and `layouts` say. One file is in memory at a time,
beside what is not yet whole. Plain numbers only: quantised checkpoints are expanded by `daedal export`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from daedal import layouts, shapes
from daedal.checkpoint.index import weight_files
from daedal.config import ModelConfig
from daedal.errors import CheckpointError
from daedal.layouts import Piece
from daedal.shapes import Slot

Array = NDArray[np.float32]

_PLAIN = (ms.float32, ms.float16, ms.bfloat16)


def fill(network: Any, config: ModelConfig, directory: Path) -> None:
    """Every parameter from the files, rounded once to the network's type. CheckpointError, naming the tensor, for what
    does not fit.
    """
    targets = network.parameters_dict()
    slots = shapes.parameters(config)
    due = {piece.name: (slot, piece) for slot in slots for piece in layouts.pieces(slot, config, layouts.TRANSFORMERS)}
    halves: dict[str, _Half] = {}
    for name, tensor in _tensors(directory, config):
        if name not in due:
            continue
        slot, piece = due.pop(name)
        half = halves.setdefault(slot.name, _Half(slot, config))
        half.take(_numbers(tensor, piece, directory), piece)
        if half.missing == 0:
            for target, numbers in _targets(halves.pop(slot.name), config):
                targets[target].set_data(Tensor(numbers).astype(targets[target].dtype))
    if due:
        raise CheckpointError(
            f"{directory} lacks tensor {min(due)}, which config.json calls for: fetch the checkpoint again"
        )


class _Half:
    """A slot whose tensors have come in part. missing: how many have not."""

    def __init__(self, slot: Slot, config: ModelConfig):
        self.name = slot.name
        self.numbers: Array = np.empty(slot.shape, dtype=np.float32)
        self.missing = sum(1 for _ in layouts.pieces(slot, config, layouts.TRANSFORMERS))

    def take(self, numbers: Array, piece: Piece) -> None:
        self.numbers[piece.place] = numbers
        self.missing -= 1


def _tensors(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Every tensor of every file that may belong to the backbone."""
    seen: set[str] = set()
    for file in weight_files(directory):
        try:
            held: Mapping[str, Any] = ms.load_checkpoint(str(directory / file), format="safetensors")
        except (ValueError, RuntimeError, OSError) as error:
            message = f"{directory / file} is damaged or no safetensors file ({error})"
            raise CheckpointError(f"{message}: fetch the file again") from error
        for name in held:
            if name in seen:
                raise CheckpointError(f"{directory}: tensor {name} is in two files: fetch the checkpoint again")
        seen |= held.keys()
        yield from held.items()
    # Names tell whether a further layer is a drafting module, so all of them must be known.
    known = {piece.name for slot in shapes.parameters(config) for piece in _pieces(slot, config)}
    for name in seen - known:
        if not layouts.is_beside(name, config, seen, drafting=False):
            raise CheckpointError(
                f"{directory}: tensor {name} has no place in a {config.model_type} model: check config.json"
            )


def _pieces(slot: Slot, config: ModelConfig) -> Iterator[Piece]:
    return layouts.pieces(slot, config, layouts.TRANSFORMERS)


def _numbers(tensor: Any, piece: Piece, directory: Path) -> Array:
    if tensor.dtype not in _PLAIN:
        raise CheckpointError(
            f"{directory}: tensor {piece.name} is {tensor.dtype}: `daedal export` writes what MindSpore reads"
        )
    if tuple(tensor.shape) != piece.shape:
        message = f"tensor {piece.name} has shape {list(tensor.shape)}, config.json calls for {list(piece.shape)}"
        raise CheckpointError(f"{directory}: {message}; check that the files belong together")
    numbers: Array = tensor.astype(ms.float32).asnumpy()
    return numbers


def _targets(half: _Half, config: ModelConfig) -> Iterator[tuple[str, Array]]:
    """A slot's numbers by the names of the network's parameters."""
    if not half.name.endswith(".kv_b_proj.weight"):
        yield half.name, half.numbers
        return
    stem = half.name.removesuffix("weight")
    by_head = half.numbers.reshape(config.num_attention_heads, -1, half.numbers.shape[-1])
    yield f"{stem}keys", np.ascontiguousarray(by_head[:, : config.qk_nope_head_dim])
    yield f"{stem}values", np.ascontiguousarray(by_head[:, config.qk_nope_head_dim :])
