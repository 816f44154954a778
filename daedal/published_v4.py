"""V4's own spellings in `config.json`: layer kinds as compression ratios, two rotations, hash layers as a count.

DeepSeek publishes one ratio per layer (0: window only, 4: sparse over compressed entries, 128: all of heavily
compressed entries) and more for draft blocks; transformers writes names of layer kinds and nested rotary parameters.
Both are read; the published spelling is written, with the names of the kinds beside it. Standard library only.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from daedal.errors import ConfigError
from daedal.rope import RopeParameters, number, rope_from_published, rope_to_published

if TYPE_CHECKING:
    from daedal.config import ModelConfig

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_KIND_OF_RATIO = MappingProxyType({0: SLIDING, 4: SPARSE, 128: HEAVY})
_RATES = MappingProxyType({SPARSE: 4, HEAVY: 128})
_MOST_LAYERS = 10**5

SILENT: Mapping[str, Any] = MappingProxyType(
    {
        "max_position_embeddings": 1048576,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "q_lora_rank": 1024,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "num_hash_layers": 3,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
    }
)


def refuse_later_kinds(published: Mapping[str, Any]) -> None:
    """ConfigError for V4.1, whose files look much like V4's but mean another model."""
    family = str(published.get("model_type"))
    text = published.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    engram = any(str(name).startswith("engram") for name in (*published, *inner))
    nested = str(inner.get("model_type", "")).startswith("deepseek_v4")
    if family.startswith(("deepseek_v41", "deepseek_v4_1", "deepseek_v4.1")) or engram or nested:
        raise ConfigError(
            f"model_type is {family!r}: this is DeepSeek V4.1 (engram, shared compressed keys), which Daedal does not "
            "run; give a V4 checkpoint, and see docs/unsupported.md"
        )


def fold(folded: dict[str, Any]) -> dict[str, Any]:
    """`folded` (defaults filled in) with V4's spellings under the names of `ModelConfig`."""
    layers = folded.get("num_hidden_layers")
    count = layers if isinstance(layers, int) and 0 <= layers <= _MOST_LAYERS else 0
    if folded.get("moe_intermediate_size") is None and folded.get("intermediate_size") is not None:
        folded["moe_intermediate_size"] = folded["intermediate_size"]
    folded["intermediate_size"] = folded.get("moe_intermediate_size")
    folded["compress_rates"] = _rates(folded)
    folded["layer_types"] = _layer_types(folded, count)
    folded["mlp_layer_types"] = _mlp_layer_types(folded, count)
    folded["qk_rope_head_dim"] = _rope_dim(folded)
    folded["rope_parameters"], folded["compress_rope_parameters"] = _ropes(folded)
    quantization = folded.get("quantization_config")
    if folded.get("expert_dtype") is None and isinstance(quantization, Mapping):
        folded["expert_dtype"] = quantization.get("expert_dtype")
    # Left over from V3 in some files: V4's readers know no groups and always normalise.
    folded |= {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    folded["n_shared_experts"] = folded.get("n_shared_experts") or 0
    return folded


def unfold(config: "ModelConfig", result: dict[str, Any]) -> dict[str, Any]:
    """V4's own fields of a published file; what they replace is taken out of `result`."""
    for name in ("rope_parameters", "intermediate_size", "partial_rotary_factor", "compress_rate_csa"):
        result.pop(name, None)
    hashed = config.mlp_layer_types.count("hash_moe")
    rates = [config.compress_rate(layer) or 0 for layer in range(config.num_hidden_layers)]
    assert config.compress_rope_parameters is not None
    rope = rope_to_published(config.compress_rope_parameters)
    kind = rope.pop("rope_type")
    theta = rope.pop("rope_theta")
    rope.pop("attention_factor", None)
    return {
        "compress_ratios": rates + [0] * config.num_nextn_predict_layers,
        "compress_rates": dict(config.compress_rates),
        "layer_types": list(config.layer_types),
        "mlp_layer_types": list(config.mlp_layer_types),
        "num_hash_layers": hashed,
        "rope_theta": config.rope_parameters.rope_theta,
        "compress_rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
    }


def _rates(folded: Mapping[str, Any]) -> dict[str, int]:
    given = folded.get("compress_rates")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"`compress_rates` is {given!r}: give an object from layer kind to rate")
    rates = {**_RATES, **(given or {})}
    for kind, name in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        if folded.get(name) is not None:
            rates[kind] = folded[name]
    for kind, rate in rates.items():
        number(f"compress_rates.{kind}", rate, int)
    return rates


def _layer_types(folded: Mapping[str, Any], count: int) -> list[Any]:
    """Explicit names first, then published ratios, then the pattern that readers assume of a silent file."""
    given, ratios = folded.get("layer_types"), folded.get("compress_ratios")
    if given is not None:
        return list(given) if isinstance(given, list | tuple) else given
    if ratios is None:
        return [SPARSE if layer > 2 and layer % 2 else HEAVY for layer in range(count)]
    if not isinstance(ratios, list | tuple) or len(ratios) < count:
        raise ConfigError(f"`compress_ratios` is {ratios!r}: give one ratio for each of {count} layers")
    for ratio in ratios[:count]:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _KIND_OF_RATIO:
            raise ConfigError(f"`compress_ratios` has {ratio!r}: V4 has 0, 4 and 128; name other kinds in layer_types")
    return [_KIND_OF_RATIO[ratio] for ratio in ratios[:count]]


def _mlp_layer_types(folded: Mapping[str, Any], count: int) -> list[Any]:
    given = folded.get("mlp_layer_types")
    if given is not None:
        return list(given) if isinstance(given, list | tuple) else given
    hashed = number("num_hash_layers", folded["num_hash_layers"], int)
    return ["hash_moe" if layer < hashed else "moe" for layer in range(count)]


def _rope_dim(folded: Mapping[str, Any]) -> int | None:
    given, part, head = (folded.get(name) for name in ("qk_rope_head_dim", "partial_rotary_factor", "head_dim"))
    if part is None or not isinstance(head, int):
        return 64 if given is None else int(number("qk_rope_head_dim", given, int))
    share = number("partial_rotary_factor", part, float) * head
    if not abs(share) <= head:
        raise ConfigError(f"`partial_rotary_factor` is {part}: it must be from 0 to 1")
    if given is not None and abs(number("qk_rope_head_dim", given, int) - share) >= 1:
        message = f"`qk_rope_head_dim` is {given}, `partial_rotary_factor` {part} of {head}"
        raise ConfigError(f"{message}: they contradict each other, keep one")
    return int(share) if given is None else int(given)


def _ropes(folded: Mapping[str, Any]) -> tuple[RopeParameters, RopeParameters]:
    """(of layers with a window only, of layers with compressed entries): the second alone may be stretched, and its
    YaRN changes angles only, never magnitudes (architecture sheet, V4; the published code).
    """
    nested = folded.get("rope_parameters")
    nested = nested if isinstance(nested, Mapping) else {}
    plain, stretched = nested.get("main"), nested.get("compress")
    if not isinstance(plain, Mapping) or not isinstance(stretched, Mapping):
        plain = {"rope_type": "default"}
        stretched = folded.get("rope_scaling") or nested or {"rope_type": "default"}
    if not isinstance(stretched, Mapping):
        raise ConfigError(f"rope_scaling is {stretched!r}: it must be an object")
    ropes = []
    for given, theta in ((plain, folded["rope_theta"]), (stretched, folded["compress_rope_theta"])):
        inner = {name: value for name, value in given.items() if name != "partial_rotary_factor"}
        if given is stretched and stretched is not nested.get("compress"):
            inner["rope_theta"] = theta
        kind = inner.get("rope_type") or inner.get("type")
        if kind == "yarn":
            inner["attention_factor"] = 1.0
        known = ("max_position_embeddings", "original_max_position_embeddings")
        context = {name: folded[name] for name in known if folded.get(name) is not None}
        ropes.append(rope_from_published({"rope_parameters": inner, "rope_theta": theta, **context}))
    return ropes[0], ropes[1]
