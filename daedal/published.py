"""Between published `config.json` files and the fields of `ModelConfig`: families, defaults, legacy spellings.

Everything that a file may say in an older way, or leave unsaid, is settled here in one place, before any check.
Standard library only.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from daedal import published_v4
from daedal.errors import ConfigError
from daedal.rope import number, rope_from_published, rope_to_published

if TYPE_CHECKING:
    from daedal.config import ModelConfig

DENSE_FAMILIES = ("llama", "qwen2", "qwen3")
INDEXED_FAMILIES = ("deepseek_v32",)
LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3", *INDEXED_FAMILIES)
COMPRESSED_FAMILIES = ("deepseek_v4",)
FAMILIES = DENSE_FAMILIES + LATENT_FAMILIES + COMPRESSED_FAMILIES
ARCHITECTURES = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "deepseek_v2": "DeepseekV2ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
        "deepseek_v32": "DeepseekV32ForCausalLM",
        "deepseek_v4": "DeepseekV4ForCausalLM",
    }
)

_V3_SILENT = {
    "max_position_embeddings": 4096,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
# What each family's readers assume where the file is silent.
_SILENT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
        "qwen3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 128},
        "deepseek_v2": {
            "max_position_embeddings": 2048,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "scoring_func": "softmax",
            "topk_method": "greedy",
        },
        "deepseek_v3": _V3_SILENT,
        "deepseek_v32": {
            **_V3_SILENT,
            "max_position_embeddings": 163840,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 2048,
        },
        "deepseek_v4": published_v4.SILENT,
    }
)


# Fields whose null is an answer of its own: no query latent, no shared experts, no normalisation.
_NULL_MEANS_NONE = ("q_lora_rank", "n_shared_experts", "norm_topk_prob")


def fold(published: Mapping[str, Any]) -> dict[str, Any]:
    """The published fields under today's names, with each family's silent defaults filled in."""
    family = published.get("model_type")
    published_v4.refuse_later_kinds(published)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"model_type is {family!r}: Daedal reads {known} so far; see docs/unsupported.md")
    given = {name: value for name, value in published.items() if value is not None or name in _NULL_MEANS_NONE}
    folded = {**_SILENT[family], **given}
    folded["dtype"] = str(published.get("dtype") or published.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if family in COMPRESSED_FAMILIES:
        return published_v4.fold(folded)
    foreign = _COMPRESSED_ONLY if family in LATENT_FAMILIES else (*_COMPRESSED_ONLY, "num_nextn_predict_layers")
    for name in foreign:
        folded.pop(name, None)
    folded["rope_parameters"] = rope_from_published(folded)
    heads = folded.get("num_attention_heads")
    if folded.get("num_key_value_heads") is None or family in LATENT_FAMILIES:
        # Latent attention has keys for every head; files say all sorts of things here.
        folded["num_key_value_heads"] = heads
    if family in LATENT_FAMILIES:
        _fold_experts(folded)
        nope, rope = folded.get("qk_nope_head_dim"), folded.get("qk_rope_head_dim")
        if isinstance(nope, int) and isinstance(rope, int):
            folded["head_dim"] = nope + rope
        folded.pop("layer_types", None)
    elif folded.get("head_dim") is None and isinstance(heads, int) and isinstance(folded.get("hidden_size"), int):
        folded["head_dim"] = folded["hidden_size"] // max(heads, 1)
    _refuse_windows(published)
    return folded


def _refuse_windows(published: Mapping[str, Any]) -> None:
    """Qwen's switch for sliding windows, where it reaches any layer. (Llama has none, whatever its file says.)"""
    window, first = published.get("sliding_window"), published.get("max_window_layers")
    layers = published.get("num_hidden_layers")
    reaches = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
    if window and published.get("use_sliding_window") and reaches:
        message = f"sliding_window is {window}: {published['model_type']} with sliding windows is not supported yet"
        raise ConfigError(f"{message}; see docs/unsupported.md")


def _fold_experts(folded: dict[str, Any]) -> None:
    """Which layers are sparse, from `first_k_dense_replace` and `moe_layer_freq`; absent counts become 0 or 1."""
    layers = folded.get("num_hidden_layers")
    first = folded.get("first_k_dense_replace") or 0
    every = folded.get("moe_layer_freq") or 1
    for name in ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"):
        folded[name] = folded.get(name) or 0
    for name in ("n_group", "topk_group"):
        folded[name] = 1 if folded.get(name) is None else folded[name]
    if folded.get("mlp_layer_types") is None and isinstance(layers, int) and layers <= 10**5:
        if not (isinstance(first, int) and isinstance(every, int) and first >= 0 and every > 0):
            message = f"first_k_dense_replace is {first!r} and moe_layer_freq {every!r}: both must be whole numbers"
            raise ConfigError(message)
        sparse = bool(folded["n_routed_experts"])
        folded["mlp_layer_types"] = [
            "sparse" if sparse and layer >= first and layer % every == 0 else "dense" for layer in range(layers)
        ]


def coerce(name: str, annotation: Any, value: Any) -> Any:
    """JSON's lists become tuples; numbers, strings and booleans are checked against the field's type."""
    kind = str(annotation)
    if name == "eos_token_id" and isinstance(value, list):
        return tuple(number(name, item, int) for item in value)
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"`{name}` is {value!r}: it must be a list of names")
        return tuple(value)
    if kind.startswith("<class 'bool'"):
        if not isinstance(value, bool):
            raise ConfigError(f"`{name}` is {value!r}: it must be true or false")
        return value
    if "int" in kind and "Mapping" not in kind:
        return number(name, value, int)
    if "float" in kind:
        return number(name, value, float)
    if "'str'" in kind and not isinstance(value, str):
        raise ConfigError(f"`{name}` is {value!r}: it must be a string")
    if "Mapping" in kind and not isinstance(value, Mapping):
        raise ConfigError(f"`{name}` is {value!r}: it must be an object")
    return value


def unfold(config: "ModelConfig") -> dict[str, Any]:
    """The published fields of `config`: those that were read, brought up to date. `fold` gives the same config back.

    Rotary parameters are written in the new and the old spelling, V4's in its own.
    """
    result = {name: value for name, value in config.published.items() if name not in ("auto_map", "torch_dtype")}
    foreign = set() if config.is_latent or config.is_compressed else _LATENT_ONLY
    if not config.is_compressed:
        foreign = foreign | _COMPRESSED_ONLY
    if not config.is_indexed and not config.is_compressed:
        foreign = foreign | _INDEX_ONLY
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in _WRITTEN_APART or item.name in foreign:
            continue
        if value is None and item.name not in config.published and item.name not in ("q_lora_rank", "eos_token_id"):
            continue
        result[item.name] = list(value) if isinstance(value, tuple) else value
    if config.quantization_config is None:
        result.pop("quantization_config", None)
    result["architectures"] = [ARCHITECTURES[config.model_type]]
    if config.is_compressed:
        return result | published_v4.unfold(config, result)
    if config.is_latent:
        # Published DeepSeek files have no head_dim, and readers derive it from the rotary part.
        result.pop("head_dim", None)
        kinds = (*config.mlp_layer_types, "sparse")
        result["first_k_dense_replace"] = kinds.index("sparse")
    result["rope_theta"] = config.rope_parameters.rope_theta
    rope = rope_to_published(config.rope_parameters)
    result["rope_parameters"] = rope
    stretched = {name: value for name, value in rope.items() if name != "rope_theta"}
    result["rope_scaling"] = None if rope["rope_type"] == "default" else {**stretched, "type": rope["rope_type"]}
    return result


_WRITTEN_APART = frozenset(
    {"published", "rope_parameters", "compress_rope_parameters", "compress_rates", "layer_types", "mlp_layer_types"}
)
_LATENT_ONLY = frozenset(
    {
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "scoring_func",
        "topk_method",
        "norm_topk_prob",
        "routed_scaling_factor",
        "num_nextn_predict_layers",
        "rope_interleave",
    }
)
_INDEX_ONLY = frozenset({"index_n_heads", "index_head_dim", "index_topk"})
_COMPRESSED_ONLY = frozenset(
    {
        "swiglu_limit",
        "sliding_window",
        "compress_rates",
        "compress_rope_parameters",
        "o_groups",
        "o_lora_rank",
        "hc_mult",
        "hc_sinkhorn_iters",
        "hc_eps",
        "expert_dtype",
    }
)
