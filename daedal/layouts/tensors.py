"""The published tensors of each of our slots, layout by layout, and how many they are.

Scales go by `_scale_inv` after the weight's name in transformers' names (V3, section 3.3) and by `.scale` beside
`.weight` in V4's own. V4's experts in transformers' names are one stack where they are plain; quantised ones keep their
published words, each by itself, because transformers scales no stack. Which layout a directory has, `recognition` says.
"""

from collections.abc import Iterator

from daedal import shapes
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.layouts import deepseek_v4
from daedal.layouts.piece import E8M0, FP4, FP8, Piece, Place, scale_of
from daedal.shapes import Slot

TRANSFORMERS, DEEPSEEK = "transformers", "deepseek"
LAYOUTS = (DEEPSEEK, TRANSFORMERS)


def choose(config: ModelConfig, layout: str | None) -> str:
    """`layout`, checked; None is the one that the family is published in. ConfigError for one that it does not have.

    V2, V3 and V3.2 are published in transformers' names, so there both words mean the same.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}: it must be one of {', '.join(LAYOUTS)}, or left out")
    if layout == DEEPSEEK and not (config.is_compressed or config.is_latent):
        raise ConfigError(f"layout is 'deepseek': {config.model_type} has transformers' names only; leave it out")
    return (layout or DEEPSEEK) if config.is_compressed else TRANSFORMERS


def pieces(slot: Slot, config: ModelConfig, layout: str) -> Iterator[Piece]:
    """The published tensors that make up one of our slots (of the backbone or a drafting module)."""
    if config.is_compressed and layout == TRANSFORMERS and slot.dtype not in (FP8, FP4):
        yield _piece(slot, slot.name, slot.shape, (), config, layout)
        return
    for name, shape, place in _parts(slot):
        yield _piece(slot, name, shape, place, config, layout)


def places(slot: Slot) -> list[Place]:
    """Where the matrices of a slot lie in it, each quantised by itself: every expert's gate and up, or down."""
    return [place for _, _, place in _parts(slot)]


def copies(config: ModelConfig) -> Iterator[tuple[str, Piece]]:
    """What drafting modules are published with although it is the backbone's: (name of our slot, tensor).

    V3 repeats the embedding and the head in each module (V3, section 2.2, shares them); V4 does not.
    """
    if config.is_compressed:
        return
    shape = (config.vocab_size, config.hidden_size)
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for module in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + module}."
        yield "embed_tokens.weight", Piece(f"{prefix}embed_tokens.weight", shape, config.dtype)
        yield head, Piece(f"{prefix}shared_head.head.weight", shape, config.dtype)


def empty_pieces(config: ModelConfig, *, drafting: bool) -> Iterator[Piece]:
    """What stock readers expect of latent models without shared experts: three matrices, of width 0, per sparse layer.

    drafting: for the drafting modules' layers too.
    """
    if config.n_shared_experts or not config.is_latent:
        return
    hidden = config.hidden_size
    for layer in range(config.num_hidden_layers + (config.num_nextn_predict_layers if drafting else 0)):
        if config.mlp_kind(layer) == "sparse":
            owner = f"model.layers.{layer}.mlp.shared_experts"
            yield Piece(f"{owner}.gate_proj.weight", (0, hidden), config.dtype)
            yield Piece(f"{owner}.up_proj.weight", (0, hidden), config.dtype)
            yield Piece(f"{owner}.down_proj.weight", (hidden, 0), config.dtype)


def tensor_count(config: ModelConfig, *, drafting: bool) -> int:
    """How many tensors a checkpoint of `config` has in the layout and the formats it is published in, scales counted.

    drafting: with the drafting modules.
    """
    layout = choose(config, None)
    slots = shapes.parameters(config) + (shapes.drafting(config) if drafting else [])
    found = [piece for slot in slots for piece in pieces(slot, config, layout)]
    found += empty_pieces(config, drafting=drafting)
    if drafting:
        found += [piece for _, piece in copies(config)]
    return sum(1 if piece.scale is None else 2 for piece in found)


def _parts(slot: Slot) -> Iterator[tuple[str, tuple[int, ...], Place]]:
    """(our name with the experts taken apart, shape, place) of each matrix of a slot."""
    if slot.role != "routed_expert":
        yield slot.name, slot.shape, ()
        return
    stem, kind = slot.name.rsplit(".", 1)
    experts, rows, columns = slot.shape
    half = rows // 2
    for expert in range(experts):
        owner = f"{stem}.{expert}"
        if kind == "gate_up_proj":
            yield f"{owner}.gate_proj.weight", (half, columns), (expert, slice(0, half))
            yield f"{owner}.up_proj.weight", (half, columns), (expert, slice(half, rows))
        else:
            yield f"{owner}.down_proj.weight", (rows, columns), (expert,)


def _piece(slot: Slot, ours: str, shape: tuple[int, ...], place: Place, config: ModelConfig, layout: str) -> Piece:
    name = _published_name(ours, config, layout)
    if slot.dtype not in (FP8, FP4):
        return Piece(name, shape, slot.dtype, place)
    assert config.quantization_config is not None
    block = config.quantization_config["weight_block_size"]
    scale = deepseek_v4.scale_name(name) if layout == DEEPSEEK else f"{name}_scale_inv"
    scale_dtype = E8M0 if config.is_compressed else "float32"
    held = scale_of(scale, shape, slot.dtype, block=(block[0], block[1]), scale_dtype=scale_dtype)
    return Piece(name, shape, slot.dtype, place, held)


def _published_name(ours: str, config: ModelConfig, layout: str) -> str:
    if layout == DEEPSEEK:
        return deepseek_v4.published_name(ours)
    if ours.startswith("mtp.") and not config.is_compressed:
        _, module, inner = ours.split(".", 2)
        # The last norm of a V3 drafting module stands beside the copy of the head.
        inner = f"shared_head.{inner}" if inner == "norm.weight" else inner
        return f"model.layers.{config.num_hidden_layers + int(module)}.{inner}"
    if config.is_compressed:
        ours = deepseek_v4.with_published_experts(ours)
    return ours if ours.startswith("lm_head.") else f"model.{ours}"
