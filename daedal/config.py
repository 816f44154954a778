"""The configuration of a model, its fields spelled as in published `config.json` files.

One frozen dataclass serves every family; a checkpoint's own file is the catalogue. Legacy spellings fold in
`published.py`, then everything is checked, so that no other room meets a missing or contradictory field. Knows
nothing of tensors: standard library only.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from daedal.errors import CheckpointError, ConfigError
from daedal.published import ARCHITECTURES, FAMILIES, LATENT_FAMILIES, coerce, fold
from daedal.rope import RopeParameters, rope_to_published

_LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that the shapes and the arithmetic of a model follow from.

    Fields that a family does not have are None (or 0 for counts of experts). `published` is the file as it was read,
    kept so that saving loses nothing that Daedal does not itself need.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    rope_interleave: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    layer_types: tuple[str, ...] = ()
    mlp_layer_types: tuple[str, ...] = ()
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    moe_intermediate_size: int | None = None
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    published: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not self.layer_types:
            kind = "latent_attention" if self.is_latent else "full_attention"
            object.__setattr__(self, "layer_types", (kind,) * self.num_hidden_layers)
        if not self.mlp_layer_types:
            object.__setattr__(self, "mlp_layer_types", ("dense",) * self.num_hidden_layers)
        _check_layers(self)
        if self.is_latent:
            _check_latent(self)
        if "sparse" in self.mlp_layer_types:
            _check_experts(self)
        if self.quantization_config is not None:
            _check_quantization(self.quantization_config)

    @property
    def is_latent(self) -> bool:
        """Whether attention is MLA (V2, V3)."""
        return self.model_type in LATENT_FAMILIES

    @property
    def rope_dim(self) -> int:
        """Numbers of each head that are rotated."""
        return self.qk_rope_head_dim if self.qk_rope_head_dim is not None else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections have a bias: always in Qwen2, elsewhere by `attention_bias`."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def eos_token_ids(self) -> frozenset[int]:
        if self.eos_token_id is None:
            return frozenset()
        ids = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        return frozenset(ids)

    @classmethod
    def read(cls, directory: Path | str) -> "ModelConfig":
        """Reads `config.json` of a checkpoint directory; CheckpointError or ConfigError says what is wrong with it."""
        path = Path(directory) / "config.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            message = f"{directory} has no config.json, so it is not a checkpoint: give a directory that has one"
            raise CheckpointError(message) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): check the file and its permissions") from error
        try:
            published = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON ({error}): fetch the file again") from error
        if not isinstance(published, dict):
            raise CheckpointError(f"{path} holds {type(published).__name__}, not an object: fetch the file again")
        return cls.from_published(published)

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> "ModelConfig":
        """A configuration from the contents of a published `config.json`, old or new spellings."""
        folded = fold(published)
        known = {item.name for item in fields(cls)} - {"published"}
        chosen = {name: value for name, value in folded.items() if name in known and value is not None}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in chosen:
                raise ConfigError(f"`{name}` is missing: config.json of a {folded['model_type']} model must have it")
        for item in fields(cls):
            if item.name in chosen:
                chosen[item.name] = coerce(item.name, item.type, chosen[item.name])
        return cls(**chosen, published=dict(published))

    def to_published(self) -> dict[str, Any]:
        """The contents of a stock `config.json`: what was read, with every field that Daedal understands brought up to
        date. Rotary parameters are written in the new and the old spelling; code references (`auto_map`) are dropped.
        """
        result = {name: value for name, value in self.published.items() if name not in ("auto_map", "torch_dtype")}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("published", "rope_parameters", "layer_types", "mlp_layer_types"):
                continue
            if value is None and item.name not in self.published and item.name not in ("q_lora_rank", "eos_token_id"):
                continue
            if not self.is_latent and item.name in _LATENT_ONLY:
                continue
            result[item.name] = list(value) if isinstance(value, tuple) else value
        if self.quantization_config is None:
            result.pop("quantization_config", None)
        if self.is_latent:
            # Published DeepSeek files have no head_dim, and readers derive it from the rotary part.
            result.pop("head_dim", None)
            kinds = (*self.mlp_layer_types, "sparse")
            result["first_k_dense_replace"] = kinds.index("sparse")
        result["architectures"] = [ARCHITECTURES[self.model_type]]
        result["rope_theta"] = self.rope_parameters.rope_theta
        rope = rope_to_published(self.rope_parameters)
        result["rope_parameters"] = rope
        stretched = {name: value for name, value in rope.items() if name != "rope_theta"}
        result["rope_scaling"] = None if rope["rope_type"] == "default" else {**stretched, "type": rope["rope_type"]}
        return result

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with other values, checked again."""
        return replace(self, **changes)


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
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def _in_range(config: ModelConfig, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None or not low <= value <= _LARGEST:
            raise ConfigError(f"`{name}` is {value}: it must be a whole number from {low} to {_LARGEST}")


def _one_of(config: ModelConfig, name: str, *allowed: str) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}: Daedal knows {', '.join(allowed)} for {config.model_type}")


def _check_sizes(config: ModelConfig) -> None:
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model_type is {config.model_type!r}: it must be one of {', '.join(FAMILIES)}")
    _in_range(config, 1, *_SIZES)
    if config.num_hidden_layers > 10_000:
        raise ConfigError(f"`num_hidden_layers` is {config.num_hidden_layers}: the most that Daedal builds is 10000")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"`num_attention_heads` is {config.num_attention_heads}, `num_key_value_heads` is "
            f"{config.num_key_value_heads}: the first must be a multiple of the second"
        )
    if config.rope_dim % 2:
        raise ConfigError(f"the rotated part of a head has {config.rope_dim} numbers: it must be even")
    if not 0.0 <= config.rms_norm_eps < 1.0:
        raise ConfigError(f"`rms_norm_eps` is {config.rms_norm_eps}: it must be from 0 to below 1")
    _one_of(config, "hidden_act", "silu")
    _one_of(config, "dtype", "bfloat16", "float16", "float32", "float64")
    for token in (*config.eos_token_ids, config.bos_token_id or 0):
        if token < 0:
            raise ConfigError(f"a special token id is {token}: ids start at 0")


def _check_layers(config: ModelConfig) -> None:
    for name in ("layer_types", "mlp_layer_types"):
        given = len(getattr(config, name))
        if given != config.num_hidden_layers:
            raise ConfigError(
                f"`{name}` has {given} entries, `num_hidden_layers` is {config.num_hidden_layers}: give one per layer"
            )
    allowed = {"latent_attention"} if config.is_latent else {"full_attention"}
    for kind in set(config.layer_types) - allowed:
        raise ConfigError(f"layer_types has {kind!r}: Daedal knows {', '.join(allowed)} for {config.model_type} so far")
    for kind in set(config.mlp_layer_types) - ({"dense", "sparse"} if config.is_latent else {"dense"}):
        raise ConfigError(f"mlp_layer_types has {kind!r}: {config.model_type} has dense (and DeepSeek sparse) layers")


def _check_latent(config: ModelConfig) -> None:
    _in_range(config, 1, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if config.q_lora_rank is not None:
        _in_range(config, 1, "q_lora_rank")
    assert config.qk_nope_head_dim is not None
    if config.head_dim != config.qk_nope_head_dim + config.rope_dim:
        raise ConfigError(
            f"`head_dim` is {config.head_dim}: in latent attention it must be qk_nope_head_dim + qk_rope_head_dim = "
            f"{config.qk_nope_head_dim + config.rope_dim}; leave it out"
        )


def _check_experts(config: ModelConfig) -> None:
    _in_range(config, 1, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    _in_range(config, 0, "n_shared_experts")
    experts, groups = config.n_routed_experts, config.n_group
    if config.model_type == "deepseek_v2":
        _one_of(config, "scoring_func", "softmax")
        _one_of(config, "topk_method", "greedy", "group_limited_greedy")
        if config.norm_topk_prob:
            raise ConfigError("norm_topk_prob is true: no deepseek_v2 reader agrees on its meaning; set it to false")
    else:
        _one_of(config, "scoring_func", "sigmoid")
        _one_of(config, "topk_method", "noaux_tc")
    if experts % groups:
        raise ConfigError(f"`n_routed_experts` is {experts}, `n_group` is {groups}: groups must be of equal size")
    if config.topk_group > groups:
        raise ConfigError(f"`topk_group` is {config.topk_group}, `n_group` is {groups}: keep at most all groups")
    if config.topk_method == "noaux_tc" and experts // groups < 2:
        raise ConfigError(
            f"`n_group` is {groups} for {experts} experts: groups are ranked by their best two, so need two"
        )
    reach = experts if config.topk_method == "greedy" else config.topk_group * (experts // groups)
    if config.num_experts_per_tok > reach:
        raise ConfigError(
            f"`num_experts_per_tok` is {config.num_experts_per_tok}: lower it, only {reach} experts can be chosen from"
        )
    if not math.isfinite(config.routed_scaling_factor):
        raise ConfigError(f"`routed_scaling_factor` is {config.routed_scaling_factor}: it must be finite")


def _check_quantization(quantization: Mapping[str, Any]) -> None:
    method = quantization.get("quant_method")
    if method != "fp8":
        raise ConfigError(f"quantization_config.quant_method is {method!r}: Daedal reads 'fp8' so far")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ConfigError(f"quantization_config.weight_block_size is {block!r}: give two block sizes, as in [128, 128]")
