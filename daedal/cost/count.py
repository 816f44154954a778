"""What a model costs before anything is measured: parameters, cache bytes and FLOPs, counted from its configuration.

Everything comes from the lists of `shapes`, by role, so a count cannot drift from the model that serves. Knows no
device, no time and no price; no tensor is made, so a laptop counts what it could never hold. The FLOPs of attention
follow DeepSeek-V2, section 2.1, with the key and value projections absorbed, as decoding computes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from daedal import shapes
from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.shapes import Slot

GROUPED_HEADS = 8  # the grouped-query model that a cache is compared with


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """The counts of one model at one context length.

    context: tokens of one sequence. total_params: the backbone, without MTP modules. active_params: what one token
    passes through: its chosen routed experts and everything else but the input embedding; the output head counts.
    decode_flops_per_token: a multiply-add counts 2, precisions are not weighted. kv_bytes_*: as shipped; mha_* and
    gqa8_*: the same layers in the same number format with a key and a value per head, and with 8 of each.
    """

    model: str
    context: int
    total_params: int
    active_params: int
    kv_bytes_per_token: int
    kv_bytes_at_context: int
    decode_flops_per_token: int
    mha_kv_bytes_per_token: int
    mha_kv_bytes_at_context: int
    gqa8_kv_bytes_per_token: int
    gqa8_kv_bytes_at_context: int


def report(config: ModelConfig, *, model: str, context: int) -> CostReport:
    """Counts `config` at `context` tokens. ConfigError where the context is not a positive number."""
    if context < 1:
        raise ConfigError(f"context is {context}: a sequence has at least 1 token, give a larger --context")
    parameters, cache = shapes.parameters(config), shapes.cache(config)
    active = active_params(config, parameters)
    kv_bytes = sum(slot.nbytes for slot in cache)
    per_head = 2 * value_head_dim(config) * sum(_bytes_per_number(cache).values())
    mha, gqa8 = (heads * per_head for heads in (config.num_attention_heads, compared_heads(config)))
    return CostReport(
        model=model,
        context=context,
        total_params=sum(slot.numel for slot in parameters),
        active_params=active,
        kv_bytes_per_token=kv_bytes,
        kv_bytes_at_context=kv_bytes * context,
        decode_flops_per_token=2 * active + attention_flops(config, cache) * context,
        mha_kv_bytes_per_token=mha,
        mha_kv_bytes_at_context=mha * context,
        gqa8_kv_bytes_per_token=gqa8,
        gqa8_kv_bytes_at_context=gqa8 * context,
    )


def active_params(config: ModelConfig, parameters: Iterable[Slot]) -> int:
    """Parameters that one token is multiplied with. A tied embedding counts once: as the head."""
    active = 0
    for slot in parameters:
        if slot.role == "routed_expert":
            active += slot.numel // slot.shape[0] * config.num_experts_per_tok
        elif slot.role != "embedding" or config.tie_word_embeddings:
            active += slot.numel
    return active


def attention_flops(config: ModelConfig, cache: Iterable[Slot]) -> int:
    """FLOPs that all layers spend on each cached token while one token is decoded: its score, then its value.

    A latent row is scored whole by every head, and its latent part is the value; a key or value row costs every query
    head one head's width.
    """
    flops = 0
    for slot in cache:
        if slot.name == "latent":
            assert config.kv_lora_rank is not None
            flops += 2 * config.num_attention_heads * (slot.numel + config.kv_lora_rank)
        else:
            flops += 2 * config.num_attention_heads * slot.shape[-1]
    return flops


def value_head_dim(config: ModelConfig) -> int:
    """The width of a head in the model with ordinary attention that a cache is compared with."""
    return config.head_dim if config.v_head_dim is None else config.v_head_dim


def compared_heads(config: ModelConfig) -> int:
    """Key heads of the grouped-query model: 8, or all of them where the model has fewer."""
    return min(GROUPED_HEADS, config.num_attention_heads)


def _bytes_per_number(cache: Iterable[Slot]) -> dict[int | None, int]:
    """Per layer, the bytes of one number in its cache."""
    return {slot.layer: slot.nbytes // slot.numel for slot in cache}
