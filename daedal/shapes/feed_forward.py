"""Parameters of the feed-forward kinds: one gated MLP, and experts with a learned router or a hash table."""

from collections.abc import Iterator

from daedal.config import ModelConfig
from daedal.shapes.attention import linear
from daedal.shapes.slot import Slot

_SHIPPED_EXPERTS = {"fp4": "float4_e2m1fn_x2", "fp8": "float8_e4m3fn"}


def feed_forward(config: ModelConfig, prefix: str, layer: int) -> Iterator[Slot]:
    """The feed-forward part of one layer, names under `prefix`."""
    kind = config.mlp_kind(layer)
    if kind == "dense":
        yield from _gated_mlp(config, prefix, layer, config.intermediate_size, "dense_mlp")
    else:
        yield from _experts(config, prefix, layer, kind)


def _gated_mlp(config: ModelConfig, prefix: str, layer: int, width: int, role: str) -> Iterator[Slot]:
    hidden, bias = config.hidden_size, config.mlp_bias and role == "dense_mlp"
    yield from linear(config, f"{prefix}gate_proj", width, hidden, role, layer, bias=bias)
    yield from linear(config, f"{prefix}up_proj", width, hidden, role, layer, bias=bias)
    yield from linear(config, f"{prefix}down_proj", hidden, width, role, layer, bias=bias)


def _experts(config: ModelConfig, prefix: str, layer: int, kind: str) -> Iterator[Slot]:
    assert config.moe_intermediate_size is not None
    hidden, experts, width = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield Slot(f"{prefix}gate.weight", (experts, hidden), "router", config.dtype, layer)
    if kind == "hash":
        table = (config.vocab_size, config.num_experts_per_tok)
        yield Slot(f"{prefix}gate.tid2eid", table, "hash_table", "int64", layer)
    elif config.topk_method == "noaux_tc":
        yield Slot(f"{prefix}gate.e_score_correction_bias", (experts,), "router_bias", "float32", layer, wide=True)
    shipped = config.dtype
    if config.quantization_config is not None:
        shipped = _SHIPPED_EXPERTS.get(config.expert_dtype or "fp8", config.dtype)
    yield Slot(f"{prefix}experts.gate_up_proj", (experts, 2 * width, hidden), "routed_expert", shipped, layer)
    yield Slot(f"{prefix}experts.down_proj", (experts, hidden, width), "routed_expert", shipped, layer)
    if config.n_shared_experts:
        shared = f"{prefix}shared_experts."
        yield from _gated_mlp(config, shared, layer, config.n_shared_experts * width, "shared_expert")
