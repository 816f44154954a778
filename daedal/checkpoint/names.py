"""Between our parameters and the names that published checkpoints give them.

Our names are the published ones without `model.`, except that routed experts are stacked: one of our slots then has
many published pieces, each with its place in the stack. One description serves reading and writing.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from daedal.config import ModelConfig
from daedal.shapes import Slot

SCALE_SUFFIX = "_scale_inv"

# Tensors that a backbone may be shipped with and does not need: rotary tables that old exporters wrote out, drafting
# modules under V4's name. V3's own drafting module is an extra layer, told by its index.
_BESIDE = re.compile(r"(.*\.rotary_emb\.inv_freq|mtp\..*|.*\.masked_bias|.*\.attn\.bias)$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Piece:
    """One published tensor: its name, its shape, and where in our slot it lies (indices of the leading axes)."""

    name: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...] = ()


def pieces(slot: Slot) -> Iterator[Piece]:
    """The published tensors that make up one of our slots."""
    prefix = "" if slot.name.startswith("lm_head.") else "model."
    if slot.role != "routed_expert":
        yield Piece(prefix + slot.name, slot.shape)
        return
    stem, kind = slot.name.rsplit(".", 1)
    experts, rows, columns = slot.shape
    for expert in range(experts):
        owner = f"{prefix}{stem}.{expert}"
        if kind == "gate_up_proj":
            half = rows // 2
            yield Piece(f"{owner}.gate_proj.weight", (half, columns), (expert, slice(0, half)))
            yield Piece(f"{owner}.up_proj.weight", (half, columns), (expert, slice(half, rows)))
        else:
            yield Piece(f"{owner}.down_proj.weight", (rows, columns), (expert,))


def empty_pieces(config: ModelConfig) -> Iterator[Piece]:
    """What stock readers expect of a model without shared experts: the three matrices, of width 0, per sparse layer."""
    if config.n_shared_experts:
        return
    hidden = config.hidden_size
    for layer, kind in enumerate(config.mlp_layer_types):
        if kind == "sparse":
            owner = f"model.layers.{layer}.mlp.shared_experts"
            yield Piece(f"{owner}.gate_proj.weight", (0, hidden))
            yield Piece(f"{owner}.up_proj.weight", (0, hidden))
            yield Piece(f"{owner}.down_proj.weight", (hidden, 0))


def is_beside(name: str, config: ModelConfig, names: Container[str]) -> bool:
    """Whether a published tensor, one of `names`, is known not to belong to the backbone.

    V3's drafting module is stored as one more layer; its `eh_proj` tells it from a layer that config.json forgot.
    """
    if _BESIDE.match(name):
        return True
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    if ".mlp.shared_experts." in name and not config.n_shared_experts:
        return True
    layer = _LAYER.match(name)
    if layer is None or int(layer.group(1)) < config.num_hidden_layers:
        return False
    return f"{layer.group(0)}eh_proj.weight" in names
