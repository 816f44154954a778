"""What is packed of a model, in which format, and how many bytes that takes: what holds and what counts weights agree.

`weights` names the format that most matrices get; the rules here settle the rest. Packed: the matrices of linear
layers, routed experts, the head. Plain: the embedding, norms, routers, biases, tables, and whatever is wide (float32).
A matrix [N, K] is cut into panels of 16 rows; a panel holds codes, scales and zero points and ends on a multiple of 64
bytes. The order of those bytes is defined where tensors are (`ops/packed.py`). Standard library only.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from daedal.config import ModelConfig
from daedal.shapes import Slot

PANEL = 16  # rows of a matrix that are packed together
LINE = 64  # bytes: panels start on multiples
HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Format:
    """bits: of a code. group: columns that share a scale; columns are padded to a multiple. scale, zero: bytes of them
    per row and group; `shared` scales stand once for the panel.
    """

    bits: int
    group: int
    scale: int = 0
    zero: int = 0
    shared: bool = False


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "bf16": Format(bits=16, group=32),
        "int8": Format(bits=8, group=64, scale=2),
        "int4": Format(bits=4, group=32, scale=2, zero=1),
        "fp8": Format(bits=8, group=128, scale=4, shared=True),
        "fp4": Format(bits=4, group=32, scale=1),
    }
)
WEIGHTS = tuple(FORMATS)

_PUBLISHED = frozenset({"fp8", "fp4"})
_LINEAR = frozenset({"attention", "indexer", "dense_mlp", "shared_expert", "draft"})
# A head of 4 bits costs much quality; published FP8 and FP4 checkpoints have it in bfloat16.
_HEAD: Mapping[str, str] = MappingProxyType({"int8": "int8", "int4": "int8"})

Part = Literal["whole", "keys", "values", "folded"]


@dataclass(frozen=True)
class Kept:
    """One packed matrix, or a stack of them. name: where the model holds it. part: which part of its slot it is;
    `keys`, `values` and `folded` (the keys, transposed) are those of latent attention's expansion.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    part: Part = "whole"

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.format, self.shape)


def padded_columns(name: str, columns: int) -> int:
    """Columns as a format holds them: whole groups."""
    group = FORMATS[name].group
    return -(-columns // group) * group


def panel_bytes(name: str, columns: int) -> int:
    """Bytes from one panel to the next."""
    form, padded = FORMATS[name], padded_columns(name, columns)
    rows = 1 if form.shared else PANEL
    nbytes = PANEL * padded * form.bits // 8 + padded // form.group * (rows * form.scale + PANEL * form.zero)
    return -(-nbytes // LINE) * LINE


def packed_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix [N, K] or of a stack of them [..., N, K]."""
    *leading, rows, columns = shape
    count = 1
    for size in leading:
        count *= size
    return count * -(-rows // PANEL) * panel_bytes(name, columns)


def kept(slot: Slot, config: ModelConfig, weights: str, exact: Set[str] = frozenset()) -> tuple[Kept, ...]:
    """What of a slot is packed; nothing where it stays a plain tensor. A tied head is packed from the embedding's slot,
    which stays plain beside it. exact: slots that are to be in bfloat16; what a quantised checkpoint excepts is too, in
    the formats that checkpoints are published in.
    """
    excepted = config.quantization_config is not None and not config.quantises(slot.name.removesuffix(".weight"))
    if slot.name in exact or (excepted and weights in _PUBLISHED):
        weights = "bf16"
    if slot.role == "head" or (slot.role == "embedding" and config.tie_word_embeddings):
        return (Kept(HEAD, _HEAD.get(weights, "bf16"), slot.shape),)
    if slot.role == "routed_expert":
        return (Kept(slot.name, weights, slot.shape),)
    if slot.role not in _LINEAR or slot.wide or not slot.name.endswith(".weight"):
        return ()
    if slot.name.endswith(".kv_b_proj.weight"):
        return _expansion(slot, config, weights)
    form = weights
    if weights == "fp4" and (config.n_routed_experts or slot.role != "dense_mlp"):
        form = "fp8"  # as V4 is published: experts alone have FP4; a dense model's MLP stands for them
    if slot.name.endswith(".o_a_proj.weight"):
        assert config.o_groups is not None
        return (Kept(slot.name, form, (config.o_groups, slot.shape[0] // config.o_groups, slot.shape[1])),)
    return (Kept(slot.name, form, slot.shape),)


def stays_plain(slot: Slot, config: ModelConfig, weights: str) -> bool:
    """Whether the model holds the slot as a tensor."""
    return slot.role == "embedding" or not kept(slot, config, weights)


def _expansion(slot: Slot, config: ModelConfig, weights: str) -> tuple[Kept, ...]:
    """Keys are held twice, also transposed, so both must stand for the same numbers: int8 with square blocks can do
    that, formats with groups along one axis cannot.
    """
    assert config.kv_lora_rank is not None
    assert config.qk_nope_head_dim is not None
    assert config.v_head_dim is not None
    owner, form = slot.name.removesuffix(".weight"), "bf16" if weights == "bf16" else "int8"
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    return (
        Kept(f"{owner}.keys", form, (heads, config.qk_nope_head_dim, latent), "keys"),
        Kept(f"{owner}.values", form, (heads, config.v_head_dim, latent), "values"),
        Kept(f"{owner}.folded", form, (heads, latent, config.qk_nope_head_dim), "folded"),
    )
