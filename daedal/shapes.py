"""The keystone: every parameter and every cache slot of a model, listed from its configuration alone.

The model on the meta device equals this list exactly, the checkpoint reader knows from it what is missing, the cache
allocates by it, and the cost model counts from it, so that none of them can drift from the others. Standard library
only: it serves models that no laptop could hold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from daedal.config import ModelConfig

DTYPE_BYTES = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
    }
)

ROLES = (
    "embedding",
    "head",
    "norm",
    "attention",
    "dense_mlp",
    "router",
    "router_bias",
    "routed_expert",
    "shared_expert",
    "cache",
)


@dataclass(frozen=True)
class Slot:
    """One parameter, or one cache entry per token.

    dtype: as shipped by the publisher. layer: None for what belongs to no layer. Routed experts are stacked: their
    first axis is the expert.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    dtype: str
    layer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


def parameters(config: ModelConfig) -> list[Slot]:
    """Every parameter of the backbone, in the order of the forward pass. A tied head is not listed twice."""
    slots = [Slot("embed_tokens.weight", (config.vocab_size, config.hidden_size), "embedding", config.dtype)]
    for layer in range(config.num_hidden_layers):
        slots.extend(_layer(config, layer))
    slots.append(Slot("norm.weight", (config.hidden_size,), "norm", config.dtype))
    if not config.tie_word_embeddings:
        slots.append(Slot("lm_head.weight", (config.vocab_size, config.hidden_size), "head", config.dtype))
    return slots


def cache(config: ModelConfig) -> list[Slot]:
    """What one token adds to the cache, layer by layer.

    Latent attention stores one row per token: the normalised latent, then the rotated key part that all heads share
    (V2, section 2.1.2). Grouped-query attention stores keys and values of its own heads.
    """
    slots = []
    for layer, kind in enumerate(config.layer_types):
        if kind == "latent_attention":
            assert config.kv_lora_rank is not None
            slots.append(Slot("latent", (config.kv_lora_rank + config.rope_dim,), "cache", config.dtype, layer))
        else:
            heads = (config.num_key_value_heads, config.head_dim)
            slots.extend(Slot(name, heads, "cache", config.dtype, layer) for name in ("key", "value"))
    return slots


def _layer(config: ModelConfig, layer: int) -> Iterator[Slot]:
    prefix = f"layers.{layer}."
    hidden = config.hidden_size
    yield Slot(f"{prefix}input_layernorm.weight", (hidden,), "norm", config.dtype, layer)
    if config.layer_types[layer] == "latent_attention":
        yield from _latent_attention(config, f"{prefix}self_attn.", layer)
    else:
        yield from _dense_attention(config, f"{prefix}self_attn.", layer)
    yield Slot(f"{prefix}post_attention_layernorm.weight", (hidden,), "norm", config.dtype, layer)
    if config.mlp_layer_types[layer] == "sparse":
        yield from _experts(config, f"{prefix}mlp.", layer)
    else:
        yield from _gated_mlp(config, f"{prefix}mlp.", layer, config.intermediate_size, "dense_mlp")


def _linear(
    config: ModelConfig, name: str, rows: int, columns: int, role: str, layer: int, *, bias: bool = False
) -> Iterator[Slot]:
    dtype = "float8_e4m3fn" if config.quantization_config is not None else config.dtype
    yield Slot(f"{name}.weight", (rows, columns), role, dtype, layer)
    if bias:
        yield Slot(f"{name}.bias", (rows,), role, config.dtype, layer)


def _dense_attention(config: ModelConfig, prefix: str, layer: int) -> Iterator[Slot]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _linear(config, prefix + name, rows, hidden, "attention", layer, bias=config.qkv_bias)
    yield from _linear(config, f"{prefix}o_proj", hidden, queries, "attention", layer, bias=config.output_bias)
    if config.model_type == "qwen3":
        for name in ("q_norm", "k_norm"):
            yield Slot(f"{prefix}{name}.weight", (head,), "norm", config.dtype, layer)


def _latent_attention(config: ModelConfig, prefix: str, layer: int) -> Iterator[Slot]:
    assert config.kv_lora_rank is not None
    assert config.qk_nope_head_dim is not None
    assert config.v_head_dim is not None
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries, bias = heads * config.head_dim, config.attention_bias
    if config.q_lora_rank is None:
        yield from _linear(config, f"{prefix}q_proj", queries, hidden, "attention", layer)
    else:
        rank = config.q_lora_rank
        yield from _linear(config, f"{prefix}q_a_proj", rank, hidden, "attention", layer, bias=bias)
        yield Slot(f"{prefix}q_a_layernorm.weight", (rank,), "norm", config.dtype, layer)
        yield from _linear(config, f"{prefix}q_b_proj", queries, rank, "attention", layer)
    rows = latent + config.rope_dim
    yield from _linear(config, f"{prefix}kv_a_proj_with_mqa", rows, hidden, "attention", layer, bias=bias)
    yield Slot(f"{prefix}kv_a_layernorm.weight", (latent,), "norm", config.dtype, layer)
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield from _linear(config, f"{prefix}kv_b_proj", expanded, latent, "attention", layer)
    yield from _linear(config, f"{prefix}o_proj", hidden, heads * config.v_head_dim, "attention", layer, bias=bias)


def _gated_mlp(config: ModelConfig, prefix: str, layer: int, width: int, role: str) -> Iterator[Slot]:
    hidden, bias = config.hidden_size, config.mlp_bias and role == "dense_mlp"
    yield from _linear(config, f"{prefix}gate_proj", width, hidden, role, layer, bias=bias)
    yield from _linear(config, f"{prefix}up_proj", width, hidden, role, layer, bias=bias)
    yield from _linear(config, f"{prefix}down_proj", hidden, width, role, layer, bias=bias)


def _experts(config: ModelConfig, prefix: str, layer: int) -> Iterator[Slot]:
    assert config.moe_intermediate_size is not None
    hidden, experts, width = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    shipped = "float8_e4m3fn" if config.quantization_config is not None else config.dtype
    yield Slot(f"{prefix}gate.weight", (experts, hidden), "router", config.dtype, layer)
    if config.topk_method == "noaux_tc":
        yield Slot(f"{prefix}gate.e_score_correction_bias", (experts,), "router_bias", "float32", layer)
    yield Slot(f"{prefix}experts.gate_up_proj", (experts, 2 * width, hidden), "routed_expert", shipped, layer)
    yield Slot(f"{prefix}experts.down_proj", (experts, hidden, width), "routed_expert", shipped, layer)
    if config.n_shared_experts:
        shared = f"{prefix}shared_experts."
        yield from _gated_mlp(config, shared, layer, config.n_shared_experts * width, "shared_expert")
